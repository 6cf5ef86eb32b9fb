"""One published file as if it were memory: each block is verified, and fetched from S3, when it is first touched."""

import mmap
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from marc_pipeline.storage import Storage, disk_full_names, is_s3, join
from marc_pipeline.storage.checksums import RandomAccess, missing_named, open_published, require_block, require_size
from marc_schemas.files import BLOCK_BYTES, PublishedFile

# Of S3: a gap that costs less to read than another request does, the largest request, and how many at once.
GAP_BLOCKS, REQUEST_BLOCKS, REQUESTS_AT_ONCE = 4, 32, 8


class MappedFile:
    """The bytes of one published file, none of which is handed out before its block was verified once.

    A local file is mapped as it lies. Of one on S3, the blocks that were asked for lie in a temporary file without a
    name, so that none is fetched twice. Threads may share it: at worst a block is verified by two of them.

    Args:
        storage: access to it.
        root: what its path is relative to.
        published: with the checksums.

    Raises:
        CorruptFile: it is missing or has another size; later, when a block differs, or what is still to fetch is gone.
    """

    def __init__(self, storage: Storage, root: str, published: PublishedFile) -> None:
        self.uri = join(root, published.path)
        self._storage, self._published = storage, published
        self._verified = np.zeros(-(-published.bytes // BLOCK_BYTES), bool)
        self._source: pa.NativeFile | None = None
        if is_s3(self.uri):
            self._source = open_published(storage, root, published)
            self._copy = tempfile.TemporaryFile(prefix="marc-table-")  # noqa: SIM115 - it lives as long as this does
            self._copy.truncate(published.bytes)
            self._map = mmap.mmap(self._copy.fileno(), published.bytes, access=mmap.ACCESS_READ)
        else:
            with missing_named(self.uri), Path(self.uri).open("rb") as file:
                require_size(os.fstat(file.fileno()).st_size, self.uri, published)
                self._map = mmap.mmap(file.fileno(), published.bytes, access=mmap.ACCESS_READ)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._published.bytes

    def view(self, start: int, end: int) -> memoryview:
        """Verified bytes from ``start`` to before ``end``, not copied.

        Raises:
            CorruptFile: a block differs.
        """
        self.require(start, end)
        return memoryview(self._map)[start:end]

    def records(self, size: int) -> NDArray[np.void]:
        """What would be a record of ``size`` bytes at every offset, not copied and **not verified**.

        Ask :meth:`require` for those that are read.
        """
        return np.ndarray((self.bytes - size + 1,), np.dtype((np.void, size)), buffer=self._map, strides=(1,))

    def require(self, starts: ArrayLike, ends: ArrayLike) -> None:
        """Verify the blocks that hold these ranges of bytes, those that were verified before left out.

        Args:
            starts: first byte of each range [n].
            ends: byte after its last one [n], larger.

        Raises:
            CorruptFile: a block differs.
        """
        # +1 where a range begins, −1 after it ends: what lies in none sums up to 0.
        edges = np.zeros(len(self._verified) + 1, np.int64)
        np.add.at(edges, np.asarray(starts) // BLOCK_BYTES, 1)
        np.add.at(edges, (np.asarray(ends) - 1) // BLOCK_BYTES + 1, -1)
        missing = np.flatnonzero((np.cumsum(edges[:-1]) > 0) & ~self._verified)
        if not len(missing):
            return
        if self._source is None:
            for block in missing.tolist():
                start = block * BLOCK_BYTES
                require_block(memoryview(self._map)[start : start + BLOCK_BYTES], block, self.uri, self._published)
                self._verified[block] = True
            return
        with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="fetch") as pool:
            list(pool.map(partial(self._fetch, self._source), requests(missing)))

    def open(self) -> pa.PythonFile:
        """For :class:`pyarrow.parquet.ParquetFile`: what it reads is verified."""
        return pa.PythonFile(_MappedReader(self), mode="r")

    def close(self) -> None:
        """Close the memory map and, for a file on S3, its temporary copy and the connection.

        Views that were handed out stay valid; while one exists, the map stays open as well.
        """
        with suppress(BufferError):
            self._map.close()
        if self._source is not None:
            self._source.close()
            self._copy.close()

    def _fetch(self, source: pa.NativeFile, blocks: range) -> None:
        start = blocks.start * BLOCK_BYTES
        with missing_named(self.uri):
            try:
                data = memoryview(source.read_at(min(blocks.stop * BLOCK_BYTES, self.bytes) - start, start))
            except OSError as error:
                # Of an object that was removed since it was opened, pyarrow only says that it cannot be read.
                if self._storage.stat(self.uri) is None:
                    raise FileNotFoundError(self.uri) from error
                raise
        for number, block in enumerate(blocks):
            piece = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            require_block(piece, block, self.uri, self._published)
        with disk_full_names(f"a temporary copy of {self.uri}"):
            # Written through the file, not the map: a full disk is an error then, and not the end of the process.
            _write_all(self._copy.fileno(), data, start)
        self._verified[blocks.start : blocks.stop] = True


def _write_all(file: int, data: memoryview, start: int) -> None:
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def requests(blocks: NDArray[np.int64]) -> Sequence[range]:
    """Ranges of blocks to ask a store for: neighbours together, narrow gaps included, none too long.

    Args:
        blocks: numbers that are wanted, ascending, at least one.

    >>> requests(np.array([1, 2, 5, 40]))
    [range(1, 6), range(40, 41)]
    """
    cuts = np.flatnonzero(np.diff(blocks) > GAP_BLOCKS) + 1
    return [
        range(start, min(start + REQUEST_BLOCKS, int(run[-1]) + 1))
        for run in np.split(blocks, cuts)
        for start in range(int(run[0]), int(run[-1]) + 1, REQUEST_BLOCKS)
    ]


class _MappedReader(RandomAccess):
    """A place within a mapped file."""

    def __init__(self, file: MappedFile) -> None:
        super().__init__(file.bytes)
        self._file = file

    def view(self, start: int, end: int) -> memoryview:
        return self._file.view(start, end)

"""Verified memory map of one published file. A block is verified, and fetched from S3, on its first access.

Readers look up single rows of large files. Whole-file verification would read everything, so each block is verified.
"""

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

# Requests to S3: gaps that are cheaper to read than another request, the largest request, and parallel requests.
GAP_BLOCKS, REQUEST_BLOCKS, REQUESTS_AT_ONCE = 4, 32, 8


class MappedFile:
    """The bytes of one published file. Every block is verified before its bytes are returned.

    A local file is memory-mapped. Blocks of a file on S3 are fetched once, into an unnamed temporary file. Threads may
    share the object; two threads may verify the same block.

    ``root`` is the uri that the path of ``published`` is relative to.

    Raises:
        CorruptFile: the file is missing or has another size; on access: a block differs or the object was deleted.
    """

    def __init__(self, storage: Storage, root: str, published: PublishedFile) -> None:
        self.uri = join(root, published.path)
        self._storage, self._published = storage, published
        self._verified = np.zeros(-(-published.bytes // BLOCK_BYTES), bool)
        self._source: pa.NativeFile | None = None
        if is_s3(self.uri):
            self._source = open_published(storage, root, published)
            self._copy = tempfile.TemporaryFile(prefix="marc-table-")  # noqa: SIM115 - closed by close()
            self._copy.truncate(published.bytes)
            self._map = mmap.mmap(self._copy.fileno(), published.bytes, access=mmap.ACCESS_READ)
        else:
            with missing_named(self.uri), Path(self.uri).open("rb") as file:
                require_size(os.fstat(file.fileno()).st_size, self.uri, published)
                self._map = mmap.mmap(file.fileno(), published.bytes, access=mmap.ACCESS_READ)

    @property
    def bytes(self) -> int:
        """Size of the file in bytes."""
        return self._published.bytes

    def view(self, start: int, end: int) -> memoryview:
        """Return the verified bytes in [``start``, ``end``), without a copy.

        Raises:
            CorruptFile: a block differs.
        """
        self.require(start, end)
        return memoryview(self._map)[start:end]

    def records(self, size: int) -> NDArray[np.void]:
        """Return an array whose element i is the ``size`` bytes at offset i, without a copy and **not verified**.

        Call :meth:`require` for the elements that you read.
        """
        return np.ndarray((self.bytes - size + 1,), np.dtype((np.void, size)), buffer=self._map, strides=(1,))

    def require(self, starts: ArrayLike, ends: ArrayLike) -> None:
        """Verify the blocks of these ranges that are not verified yet.

        ``starts`` [n] are the offsets of the first bytes, ``ends`` [n] those after the last bytes.

        Raises:
            CorruptFile: a block differs.
        """
        # +1 where a range begins, −1 after it ends: the running sum of a block is the number of ranges that touch it.
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
        """Return a verified file object for :class:`pyarrow.parquet.ParquetFile`."""
        return pa.PythonFile(_MappedReader(self), mode="r")

    def close(self) -> None:
        """Close the memory map and, for a file on S3, the temporary file and the connection.

        Existing views stay valid and keep the map open.
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
                # For a deleted object pyarrow raises an unspecific OSError.
                if self._storage.stat(self.uri) is None:
                    raise FileNotFoundError(self.uri) from error
                raise
        for number, block in enumerate(blocks):
            piece = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            require_block(piece, block, self.uri, self._published)
        with disk_full_names(f"a temporary copy of {self.uri}"):
            # A full disk raises an error in pwrite; a write to the map would kill the process.
            _write_all(self._copy.fileno(), data, start)
        self._verified[blocks.start : blocks.stop] = True


def _write_all(file: int, data: memoryview, start: int) -> None:
    while data:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def requests(blocks: NDArray[np.int64]) -> Sequence[range]:
    """Return ranges of blocks to request: neighbours in one request, narrow gaps included, long ranges split.

    ``blocks`` are at least one number, in ascending order.

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
    """Random access to a mapped file."""

    def __init__(self, file: MappedFile) -> None:
        super().__init__(file.bytes)
        self._file = file

    def view(self, start: int, end: int) -> memoryview:
        return self._file.view(start, end)

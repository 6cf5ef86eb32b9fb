"""Reader of the table of one release: rows, vectors by item id or row id, and item ids by row id, all verified."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from marc_pipeline.errors import CorruptFile, MissingFile, UserError
from marc_pipeline.storage import Storage, is_s3, join
from marc_pipeline.storage.checksums import require_blocks
from marc_pipeline.storage.mapped_file import MappedFile
from marc_pipeline.table.file import TableFile
from marc_schemas.feature_table import bucket_number, table_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import row_id
from marc_schemas.release import Release

READ_THREADS = 4

Matrix = NDArray[np.float32]
R = TypeVar("R")


class UnknownItems(UserError, KeyError):
    """Item ids that the release does not contain, in ``ids``."""

    def __init__(self, ids: Sequence[str], release: str) -> None:
        self.ids = list(ids)
        shown = ", ".join(map(repr, self.ids[:10])) + (", …" if len(self.ids) > 10 else "")
        self._message = f"release {release} does not contain item {shown} ({len(self.ids)} missing)"
        super().__init__(self._message)

    def __str__(self) -> str:
        return self._message


class TableReader:
    """The feature table of one release, at the uri that this reader uses."""

    def __init__(self, facts: Release, *, uri: str, storage: Storage) -> None:
        self._facts = facts
        self._uri = uri
        self._storage = storage
        self._verified = False
        self._opened: dict[str, TableFile] = {}

    def files(self) -> list[str]:
        """Return the uris of the Parquet files, for other engines, which do not verify checksums."""
        return [join(self._uri, file.path) for file in self._facts.table.files]

    def first_item(self) -> str:
        """Return the item id of the first row. Only the item ids of the first file are read.

        Raises:
            CorruptFile: the file differs from its checksum.
        """
        found: str = self._open(self._facts.table.files[0]).item_ids[0].as_py()
        return found

    def close(self) -> None:
        """Close the files that look-ups keep open."""
        while self._opened:
            self._opened.popitem()[1].close()

    def dataset(self) -> pads.Dataset:
        """Return the files as one dataset, after all of them are verified.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
        """
        self._verify_files()
        form = pads.ParquetFileFormat()
        filesystem, root = self._storage.filesystem(self._uri)
        fragments = [
            form.make_fragment(
                join(root, file.path),
                filesystem=filesystem,
                partition_expression=(pads.field("ds") == self._facts.ds)
                & (pads.field("bucket") == pa.scalar(bucket_number(file.path), pa.int32())),
            )
            for file in self._facts.table.files
        ]
        return pads.FileSystemDataset(fragments, table_schema(self._facts.table.dim), form, filesystem)

    def vectors(self, ids: Sequence[str]) -> Matrix:
        """Return the vectors, float32 [n, d], of items in the given order.

        Raises:
            UnknownItems: some ids are not in the release.
            CorruptFile: a file differs from its checksum.
        """
        if undecodable := [name for name in ids if not _is_text(name)]:
            raise UnknownItems(undecodable, self._facts.release_id)
        names = pa.array(ids, pa.string())
        out, known = self._vectors_of(np.fromiter(map(row_id, ids), np.int64, len(ids)), names)
        if not known.all():
            raise UnknownItems(names.filter(pa.array(~known)).to_pylist(), self._facts.release_id)
        return out

    def vectors_of_rows(self, row_ids: NDArray[np.int64]) -> Matrix:
        """Return the vectors, float32 [n, d], of row ids [n] in the given order.

        Raises:
            CorruptFile: the table lacks a row id, or a file differs from its checksum.
        """
        out, known = self._vectors_of(row_ids, None)
        if not known.all():
            raise self._lacking()
        return out

    def item_ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Return the item ids of row ids of any shape; None for FAISS's -1.

        Raises:
            CorruptFile: the table lacks a row id, or a file differs from its checksum.
        """
        out = np.full(rows.size, None, dtype=object)
        flat = rows.reshape(-1)
        given = np.flatnonzero(flat >= 0)
        known = np.zeros(len(given), bool)

        def take_names(file: TableFile, places: NDArray[np.int64]) -> None:
            at = file.find(flat[given[places]])
            found = at >= 0
            known[places[found]] = True
            out[given[places[found]]] = file.item_ids.take(pa.array(at[found])).to_numpy(zero_copy_only=False)

        self._for_each_file(flat[given], take_names)
        if not known.all():
            raise self._lacking()
        return out.reshape(rows.shape)

    def numpy(self) -> tuple[pa.ChunkedArray, Matrix]:
        """Return item ids and vectors, float32 [n, d], of all rows in the order of the files.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
        """
        out = np.empty((sum(file.rows for file in self._facts.table.files), self._facts.table.dim), np.float32)
        ends = accumulate(file.rows for file in self._facts.table.files)

        def read(file: PublishedFile, end: int) -> pa.Array:
            opened = self._open(file, keep=False)
            opened.copy_vectors(out[end - file.rows : end])
            return opened.item_ids

        names = _in_threads(read, list(zip(self._facts.table.files, ends, strict=True)))
        return pa.chunked_array(names, pa.string()), out

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return columns of all rows, by default all columns, in the order of the files.

        Raises:
            UserError: the table does not have a column.
            CorruptFile: a file is missing or differs from its checksum.
        """
        schema = table_schema(self._facts.table.dim)
        columns = schema.names if columns is None else list(columns)
        if unknown := [name for name in columns if name not in schema.names]:
            raise UserError(f"the table has no column {', '.join(unknown)}; it has {', '.join(schema.names)}")
        stored = [name for name in columns if name not in ("vector", "ds", "bucket")]

        def read(file: PublishedFile) -> pa.Table:
            opened = self._open(file, keep=False)
            found = dict(zip(stored, opened.read(stored).columns, strict=True))
            found["ds"] = pa.repeat(self._facts.ds, file.rows)
            found["bucket"] = pa.repeat(pa.scalar(bucket_number(file.path), pa.int32()), file.rows)
            if "vector" in columns:
                flat = pa.array(opened.vectors().reshape(-1))
                found["vector"] = pa.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type)
            return pa.table([found[name] for name in columns], schema=wanted)

        wanted = pa.schema([schema.field(name) for name in columns])
        tables = _in_threads(read, [(file,) for file in self._facts.table.files])
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[tuple[pa.Array, Matrix]]:
        """Yield item ids [size] and vectors, float32 [size, d], of every item once; the last batch may be smaller.

        Only one file is in memory at a time.

        Args:
            size: rows per batch, at least 1.
            seed: shuffles the files and the rows of each file; None keeps the order of the files.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
        """
        files = list(self._facts.table.files)
        random = None if seed is None else np.random.default_rng(seed)
        if random:
            files = [files[number] for number in random.permutation(len(files))]
        parts: list[tuple[pa.Array, Matrix]] = []
        missing = size
        for file in files:
            opened = self._open(file, keep=False)
            names, vectors = opened.item_ids, opened.vectors()
            del opened  # unmaps the file while the caller keeps a batch
            order = random.permutation(len(names)) if random else None
            start = 0
            while start < len(names):
                end = min(start + missing, len(names))
                if order is None:
                    parts.append((names.slice(start, end - start), vectors[start:end]))
                else:
                    parts.append((names.take(pa.array(order[start:end])), vectors[order[start:end]]))
                missing -= end - start
                start = end
                if not missing:
                    yield _joined(parts)
                    parts, missing = [], size
        if parts:
            yield _joined(parts)

    def _vectors_of(self, row_ids: NDArray[np.int64], names: pa.Array | None) -> tuple[Matrix, NDArray[np.bool_]]:
        """Return the vectors [n, d] of row ids [n], and a mask [n] of known ids.

        ``names`` are the expected item ids. They are compared, because an unknown id may have the hash of a known one:
        by chance 1 in 10^13 for a million items, but an attacker can choose such an id.
        """
        out = np.empty((len(row_ids), self._facts.table.dim), np.float32)
        known = np.zeros(len(row_ids), bool)

        def take(file: TableFile, places: NDArray[np.int64]) -> None:
            at = file.find(row_ids[places])
            places, at = places[at >= 0], at[at >= 0]
            if names is not None:
                same = pc.equal(file.item_ids.take(pa.array(at)), names.take(pa.array(places))).to_numpy(
                    zero_copy_only=False
                )
                places, at = places[same], at[same]
            file.take_vectors(at, out, places)
            known[places] = True

        self._for_each_file(row_ids, take)
        return out, known

    def _for_each_file(self, row_ids: NDArray[np.int64], act: Callable[[TableFile, NDArray[np.int64]], None]) -> None:
        """Call ``act`` with every file that may contain some of the row ids [n], and the indices of these row ids."""
        buckets = row_ids % self._facts.table.buckets
        order = np.argsort(buckets, kind="stable")
        numbers, starts = np.unique(buckets[order], return_index=True)
        tasks = [
            (file, order[start:end])
            for number, start, end in zip(numbers.tolist(), starts, [*starts[1:], len(order)], strict=False)
            for file in self._by_bucket.get(number, [])
        ]
        if is_s3(self._uri) or any(file.path not in self._opened for file, _ in tasks):
            _in_threads(lambda file, places: act(self._open(file), places), tasks)
        else:
            for file, places in tasks:
                act(self._opened[file.path], places)

    def _open(self, file: PublishedFile, *, keep: bool = True) -> TableFile:
        """Return an open file; with ``keep`` it stays open for later look-ups."""
        if file.path in self._opened:
            return self._opened[file.path]
        opened = TableFile(MappedFile(self._storage, self._uri, file), rows=file.rows, dim=self._facts.table.dim)
        if keep:
            # If two threads open the same file, one of the two objects is kept.
            opened = self._opened.setdefault(file.path, opened)
        return opened

    def _lacking(self) -> CorruptFile:
        return CorruptFile(
            f"the index of release {self._facts.release_id} contains ids that its table lacks; run `marc verify`"
        )

    def _verify_files(self) -> None:
        if self._verified:
            # A dataset is read later and in other threads, so a deleted file must be reported now.
            if (files := self.files()) and self._storage.stat(files[0]) is None:
                raise MissingFile(f"{files[0]} is missing; the release cannot be read without it")
            return
        _in_threads(
            lambda file: require_blocks(self._storage, self._uri, file), [(file,) for file in self._facts.table.files]
        )
        self._verified = True

    @cached_property
    def _by_bucket(self) -> dict[int, list[PublishedFile]]:
        found: dict[int, list[PublishedFile]] = {}
        for file in self._facts.table.files:
            found.setdefault(bucket_number(file.path), []).append(file)
        return found


def _is_text(name: str) -> bool:
    """Return whether an id is valid UTF-8; a shell turns other bytes into lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _in_threads(action: Callable[..., R], arguments: Sequence[tuple[object, ...]]) -> list[R]:
    """Call ``action`` in a few threads and raise the first error. Checksums, copies and requests release the GIL."""
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read") as pool:
        return list(pool.map(lambda given: action(*given), arguments))


def _joined(parts: Sequence[tuple[pa.Array, Matrix]]) -> tuple[pa.Array, Matrix]:
    if len(parts) == 1:
        return parts[0]
    return pa.concat_arrays([names for names, _ in parts]), np.concatenate([vectors for _, vectors in parts])

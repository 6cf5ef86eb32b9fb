"""Reader of one Parquet file of the feature table: rows by number or row id, or all; item ids are cached."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.errors import CorruptFile
from marc_pipeline.storage.mapped_file import MappedFile
from marc_pipeline.table.plain_pages import values_start
from marc_schemas.feature_table import LAYOUT_FOOTER, PLAIN_LAYOUT, ROW_ID_COLUMN, VECTOR_COLUMN, file_schema

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]


class TableFile:
    """Rows of one file, in the file's order. Every byte is verified before its first use.

    Files with uncompressed vectors (see :mod:`marc_pipeline.table.plain_pages`) are read by row. Files of an earlier
    version are read by row group.

    ``rows`` is the number of rows that the release lists, ``dim`` the length d of the vectors.

    Raises:
        CorruptFile: the footer is damaged, or rows or columns differ from the release.
    """

    def __init__(self, file: MappedFile, *, rows: int, dim: int) -> None:
        self._file, self._dim = file, dim
        parquet = pq.ParquetFile(file.open())
        self._metadata, schema = parquet.metadata, parquet.schema_arrow
        self.rows = self._metadata.num_rows
        if self.rows != rows or not schema.remove_metadata().equals(file_schema(dim)):
            found = f"{self.rows:,} rows with columns {schema.names}"
            raise CorruptFile(f"{file.uri} has {found}, not those of its release; run `marc verify`")
        self._leaves = {self._metadata.schema.column(n).path: n for n in range(self._metadata.num_columns)}
        self._groups = [self._metadata.row_group(number) for number in range(self._metadata.num_row_groups)]
        # First row of each row group, then the number of rows.
        self._starts = np.array([0, *accumulate(group.num_rows for group in self._groups)])
        self._row_ids_at = self._values_of(ROW_ID_COLUMN, 8)
        self._vectors_at = self._values_of(VECTOR_COLUMN, 4 * dim)

    @property
    def group_rows(self) -> list[int]:
        """Number of rows of each row group."""
        return [group.num_rows for group in self._groups]

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Return columns of all rows."""
        for leaf in self._leaves.keys() & set(columns):
            self._require_chunks(leaf)
        return self._parquet().read(columns=list(columns)).replace_schema_metadata()

    def vectors(self) -> Matrix:
        """Return a copy of all vectors, float32 [n, d]."""
        out = np.empty((self.rows, self._dim), np.float32)
        self.copy_vectors(out)
        return out

    def groups(self) -> Iterator[Matrix]:
        """Yield the vectors of each row group, float32 [n, d], without a copy where they are uncompressed."""
        self._require_chunks(VECTOR_COLUMN)
        for group, (start, end) in enumerate(pairwise(self._starts.tolist())):
            if self._vectors_at is None:
                yield self._decoded(group)
                continue
            begin = int(self._vectors_at[group])
            data = self._file.view(begin, begin + (end - start) * self._dim * 4)
            # The array may be unaligned, which numpy allows.
            yield np.frombuffer(data, np.float32).reshape(-1, self._dim)

    def copy_vectors(self, out: Matrix) -> None:
        """Write the vectors of all rows into ``out`` [n, d]."""
        self._copy_groups(range(len(self._groups)), out)

    def batches(self, size: int) -> Iterator[tuple[Rows, Matrix]]:
        """Yield row ids [n] and vectors float32 [n, d] as copies, whole row groups with at least ``size`` rows."""
        row_ids, begun = self.row_ids(), 0
        for group, end in enumerate(self._starts[1:].tolist()):
            if end - self._starts[begun] < size and end < self.rows:
                continue
            start = int(self._starts[begun])
            out = np.empty((end - start, self._dim), np.float32)
            self._copy_groups(range(begun, group + 1), out)
            yield row_ids[start:end], out
            begun = group + 1

    def take_vectors(self, at: Rows, out: Matrix, places: Rows) -> None:
        """Copy the vectors of the rows ``at`` [n] into the rows ``places`` [n] of ``out``."""
        groups = np.searchsorted(self._starts, at, side="right") - 1
        rows = at - self._starts[groups]
        if self._vectors_at is None:
            for group in np.unique(groups).tolist():
                chosen = groups == group
                out[places[chosen]] = self._decoded(group)[rows[chosen]]
            return
        size = self._dim * out.itemsize
        begin = self._vectors_at[groups] + rows * size
        self._file.require(begin, begin + size)
        records = self._file.records(size)
        out.view(records.dtype)[places, 0] = records[begin]

    def close(self) -> None:
        """Close the memory map; item ids and row ids that were returned stay valid."""
        self._file.close()

    def find(self, row_ids: NDArray[np.int64]) -> Rows:
        """Return the row numbers [n] of row ids [n]; −1 for an unknown id."""
        known, order = self._by_row_id
        if not len(known):
            return np.full(len(row_ids), -1)
        at = np.minimum(np.searchsorted(known, row_ids), len(known) - 1)
        return np.where(known[at] == row_ids, order[at], np.int64(-1))

    @cached_property
    def item_ids(self) -> pa.Array:
        """Item ids of all rows, cached for look-ups."""
        return self.read(["item_id"])["item_id"].combine_chunks()

    @cached_property
    def _by_row_id(self) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """Sorted row ids and the row number of each, 12 bytes per row."""
        row_ids = self.row_ids()
        order = np.argsort(row_ids)
        return row_ids[order], order.astype(np.uint32)

    def row_ids(self) -> NDArray[np.int64]:
        """Return a copy of all row ids [n]."""
        if self._row_ids_at is None:
            found: NDArray[np.int64] = self.read(["row_id"])["row_id"].to_numpy()
            return found
        self._require_chunks(ROW_ID_COLUMN)
        out = np.empty(self.rows, np.int64)
        for group, (start, end) in enumerate(pairwise(self._starts.tolist())):
            self._copy(int(self._row_ids_at[group]), out[start:end])
        return out

    def _copy_groups(self, groups: range, out: Matrix) -> None:
        """Copy the vectors of consecutive row groups into ``out``."""
        self._require_chunks(VECTOR_COLUMN, groups)
        first = int(self._starts[groups.start])
        for group in groups:
            rows = out[int(self._starts[group]) - first : int(self._starts[group + 1]) - first]
            if self._vectors_at is None:
                rows[:] = self._decoded(group)
            else:
                self._copy(int(self._vectors_at[group]), rows)

    def _copy(self, begin: int, out: NDArray[Any]) -> None:
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(self._file.view(begin, begin + out.nbytes), np.uint8)

    def _decoded(self, group: int) -> Matrix:
        vectors = self._parquet().read_row_group(group, columns=["vector"])["vector"].combine_chunks()
        found: Matrix = vectors.flatten().to_numpy().reshape(-1, self._dim)
        return found

    def _parquet(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._file.open(), metadata=self._metadata)

    def _values_of(self, leaf: str, row_bytes: int) -> Rows | None:
        """Return the offset of a column's values in each row group; None unless all have the plain layout."""
        if (self._metadata.metadata or {}).get(LAYOUT_FOOTER.encode()) != PLAIN_LAYOUT.encode():
            return None
        column = self._leaves[leaf]
        begin = np.array([group.column(column).data_page_offset for group in self._groups])
        self._file.require(begin, begin + 1)
        found = [
            values_start(self._metadata, number, column, row_bytes=row_bytes, read=self._file.view)
            for number in range(len(self._groups))
        ]
        return None if None in found else np.array(found)

    def _require_chunks(self, leaf: str, groups: range | None = None) -> None:
        """Verify the chunks of a column together, so that S3 needs few requests."""
        chosen = self._groups if groups is None else self._groups[groups.start : groups.stop]
        chunks = [group.column(self._leaves[leaf]) for group in chosen]
        begin = np.array([chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks])
        self._file.require(begin, begin + [chunk.total_compressed_size for chunk in chunks])

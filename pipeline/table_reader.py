"""The Parquet files of one release, verified as they are read: rows, vectors by item id, item ids by row id."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.errors import CorruptFile, MissingFile, UserError
from pipeline.integrity import open_verified, require_blocks
from pipeline.storage import Storage, join
from schemas.feature_table import bucket_number, table_schema
from schemas.files import PublishedFile
from schemas.identity import row_id
from schemas.release import Release

VERIFY_THREADS = 4

Matrix = NDArray[np.float32]


class UnknownItems(UserError, KeyError):
    """Items that the release does not hold; ``ids`` names them."""

    def __init__(self, ids: Sequence[str], release: str) -> None:
        self.ids = list(ids)
        shown = ", ".join(map(repr, self.ids[:10])) + (", …" if len(self.ids) > 10 else "")
        self._message = f"release {release} holds no item {shown} ({len(self.ids)} missing)"
        super().__init__(self._message)

    def __str__(self) -> str:
        return self._message


class TableReader:
    """The feature table of one release.

    Args:
        facts: the release's row in the log.
        uri: the feature table as the reader reaches it.
        storage: access to it.
    """

    def __init__(self, facts: Release, *, uri: str, storage: Storage) -> None:
        self._facts = facts
        self._uri = uri
        self._storage = storage
        self._verified = False
        self._names: dict[int, tuple[NDArray[np.int64], pa.Array]] = {}

    def files(self) -> list[str]:
        """Uris of the Parquet files, for readers that bring their own engine (and check nothing)."""
        return [join(self._uri, file.path) for file in self._facts.table_files]

    def dataset(self) -> pads.Dataset:
        """The files as one dataset, verified before the first is handed out.

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
            for file in self._facts.table_files
        ]
        return pads.FileSystemDataset(fragments, table_schema(self._facts.dim), form, filesystem)

    def vectors(self, ids: Sequence[str]) -> Matrix:
        """Vectors float32 [n, d] of items, in the order asked.

        Raises:
            UnknownItems: some ids are not in the release.
            CorruptFile: a file differs from its checksum.
        """
        out = np.empty((len(ids), self._facts.dim), np.float32)
        by_bucket: dict[int, list[int]] = {}
        for place, item in enumerate(ids):
            by_bucket.setdefault(row_id(item) % self._facts.buckets, []).append(place)
        missing: list[str] = []
        for bucket, places in by_bucket.items():
            wanted = pa.array([ids[place] for place in places], pa.string())
            found = self._rows_of(bucket, wanted)
            where = pc.index_in(wanted, value_set=found["item_id"].combine_chunks())
            missing += wanted.filter(pc.is_null(where)).to_pylist()
            if not missing:
                vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self._facts.dim)
                out[places] = vectors[where.to_numpy()]
        if missing:
            raise UnknownItems(missing, self._facts.release_id)
        return out

    def vectors_of_rows(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors float32 [n, d] of row ids, in the order asked.

        Raises:
            CorruptFile: the table lacks a row id, or a file differs from its checksum.
        """
        return self.vectors(self.item_ids(row_ids).tolist())

    def item_ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Item ids of row ids, in their shape; None where a row id is FAISS's -1.

        Raises:
            CorruptFile: the table lacks a row id, or a file differs from its checksum.
        """
        out = np.full(rows.shape, None, dtype=object)
        for bucket in np.unique(rows[rows >= 0] % self._facts.buckets).tolist():
            known, names = self._bucket_names(bucket)
            places = np.nonzero((rows >= 0) & (rows % self._facts.buckets == bucket))
            at = np.minimum(np.searchsorted(known, rows[places]), len(known) - 1)
            if not np.array_equal(known[at], rows[places]):
                raise CorruptFile(
                    f"the index of release {self._facts.release_id} holds ids that its table lacks; run `marc verify`"
                )
            out[places] = names.take(pa.array(at)).to_pylist()
        return out

    def _bucket_names(self, bucket: int) -> tuple[NDArray[np.int64], pa.Array]:
        if bucket not in self._names:
            tables = []
            for file in self._files_of(bucket):
                with open_verified(self._storage, self._uri, file) as source:
                    rows = pq.ParquetFile(source).read(columns=["item_id", "row_id"])
                    tables.append(rows.replace_schema_metadata())
            names = pa.concat_tables(tables).sort_by("row_id")
            self._names[bucket] = names["row_id"].to_numpy(), names["item_id"].combine_chunks()
        return self._names[bucket]

    def _verify_files(self) -> None:
        if self._verified:
            # A dataset reads later, and in other threads: that its files are still there is said now.
            if self._facts.table_files and not self._is_here(self._facts.table_files[0]):
                raise MissingFile(f"{self.files()[0]} is missing; the release cannot be read without it")
            return
        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            # The checksums release the interpreter's lock; list() raises what a thread raised.
            list(pool.map(partial(require_blocks, self._storage, self._uri), self._facts.table_files))
        self._verified = True

    def _is_here(self, file: PublishedFile) -> bool:
        return self._storage.stat(join(self._uri, file.path)) is not None

    def _rows_of(self, bucket: int, wanted: pa.Array) -> pa.Table:
        """Candidate rows (item_id, vector) of one bucket: the row groups whose id range meets the wanted ids."""
        tables = [pa.table({"item_id": pa.array([], pa.string()), "vector": _no_vectors(self._facts.dim)})]
        names = sorted(wanted.to_pylist(), key=str.encode)
        for file in self._files_of(bucket):
            with open_verified(self._storage, self._uri, file) as source:
                parquet = pq.ParquetFile(source)
                groups = _groups_with(parquet.metadata, names)
                if groups:
                    rows = parquet.read_row_groups(groups, columns=["item_id", "vector"])
                    tables.append(rows.replace_schema_metadata().cast(tables[0].schema))
        return pa.concat_tables(tables)

    def _files_of(self, bucket: int) -> list[PublishedFile]:
        return self._by_bucket.get(bucket, [])

    @cached_property
    def _by_bucket(self) -> dict[int, list[PublishedFile]]:
        found: dict[int, list[PublishedFile]] = {}
        for file in self._facts.table_files:
            found.setdefault(bucket_number(file.path), []).append(file)
        return found


def _no_vectors(dim: int) -> pa.Array:
    return pa.array([], table_schema(dim).field("vector").type)


def _groups_with(metadata: pq.FileMetaData, names: Sequence[str]) -> list[int]:
    """Row groups whose range of item ids, compared as bytes, holds one of the sorted names."""
    keys = [name.encode() for name in names]
    groups = []
    for number in range(metadata.num_row_groups):
        statistics = metadata.row_group(number).column(0).statistics
        if statistics is None or not statistics.has_min_max:
            groups.append(number)
            continue
        low, high = statistics.min.encode(), statistics.max.encode()
        if any(low <= key <= high for key in keys):
            groups.append(number)
    return groups

"""What a ranker imports: open a release, read its vectors, ask for neighbours. Needs no torch, pyspark or airflow."""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import release_log
from pipeline.errors import CorruptFile, MissingFile, ReleaseGone, UserError
from pipeline.integrity import open_verified, require_blocks
from pipeline.storage import Storage, is_s3, join
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


def open_release(
    uri: str | Path,
    *,
    ds: str | None = None,
    release_id: str | None = None,
    at: datetime | None = None,
    storage: Storage | None = None,
) -> "OpenRelease":
    """Open a release for reading: the newest, that of a date, or one by id.

    Args:
        uri: the feature table, local or ``s3://``.
        ds: date of the snapshot, ``YYYY-MM-DD``.
        release_id: exactly this release.
        at: what was the newest, or that of the date, at this moment; with a time zone.
        storage: S3 endpoint and region; credentials come from the standard AWS chain.

    Raises:
        UserError: there is no such release.
        ReleaseGone: what was seen at that moment is not known any more.
    """
    storage = storage or Storage()
    uri = str(uri) if is_s3(str(uri)) else str(Path(uri).absolute())
    return OpenRelease(
        release_log.find_release(storage, uri, ds=ds, release_id=release_id, at=at), uri=uri, storage=storage
    )


class OpenRelease:
    """One release, pinned: whatever is published later, these are the rows and vectors of this generation.

    Files are verified against the release's checksums: block by block as look-ups read them, whole before the
    first dataset is handed out, and the index before FAISS reads it.

    Args:
        facts: the release's row in the log.
        uri: the feature table as the reader reaches it.
        storage: access to it.
    """

    def __init__(self, facts: Release, *, uri: str, storage: Storage) -> None:
        self.facts = facts
        self._uri = uri
        self._storage = storage
        self._verified = False
        self._names: dict[int, tuple[NDArray[np.int64], pa.Array]] = {}

    def __repr__(self) -> str:
        return f"<release {self.facts.release_id} of {self.facts.ds}: {self.facts.items:,} items × {self.facts.dim}>"

    def __len__(self) -> int:
        return self.facts.items

    def files(self) -> list[str]:
        """Uris of the Parquet files, for readers that bring their own engine (and check nothing)."""
        return [join(self._uri, file.path) for file in self.facts.table_files]

    def dataset(self) -> pads.Dataset:
        """The release as a pyarrow dataset, columns of the feature table with ``ds`` and ``bucket``.

        Every file is verified before the first dataset of this release is handed out; the dataset itself is a
        plain one, for any engine and any number of threads.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            self._verify_files()
        form = pads.ParquetFileFormat()
        filesystem, root = self._storage.filesystem(self._uri)
        fragments = [
            form.make_fragment(
                join(root, file.path),
                filesystem=filesystem,
                partition_expression=(pads.field("ds") == self.facts.ds)
                & (pads.field("bucket") == pa.scalar(bucket_number(file.path), pa.int32())),
            )
            for file in self.facts.table_files
        ]
        return pads.FileSystemDataset(fragments, table_schema(self.facts.dim), form, filesystem)

    def vectors(self, ids: Sequence[str]) -> Matrix:
        """Vectors float32 [n, d] of items, rows in the order asked; repeated ids give repeated rows.

        Reads only the buckets, and within them the row groups, that can hold the ids.

        Raises:
            UnknownItems: some ids are not in the release.
            CorruptFile: a file differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            return self._vectors(ids)

    def _vectors(self, ids: Sequence[str]) -> Matrix:
        out = np.empty((len(ids), self.facts.dim), np.float32)
        by_bucket: dict[int, list[int]] = {}
        for place, item in enumerate(ids):
            by_bucket.setdefault(row_id(item) % self.facts.buckets, []).append(place)
        missing: list[str] = []
        for bucket, places in by_bucket.items():
            wanted = pa.array([ids[place] for place in places], pa.string())
            found = self._rows_of(bucket, wanted)
            where = pc.index_in(wanted, value_set=found["item_id"].combine_chunks())
            missing += wanted.filter(pc.is_null(where)).to_pylist()
            if not missing:
                vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.facts.dim)
                out[places] = vectors[where.to_numpy()]
        if missing:
            raise UnknownItems(missing, self.facts.release_id)
        return out

    def search(self, queries: Matrix, k: int = 10) -> tuple[NDArray[np.object_], Matrix]:
        """Nearest items by inner product.

        Args:
            queries: float32 [n, d], or one vector [d]; normalised like the table's.
            k: neighbours per query, at most the number of items.

        Returns:
            Item ids [n, k] and scores [n, k], best first; equal scores are ordered by item id.

        Raises:
            UserError: wrong dimension, NaN, or k out of range.
            CorruptFile: the index differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        queries = np.atleast_2d(np.ascontiguousarray(queries, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.facts.dim:
            raise UserError(f"queries have shape {queries.shape}, the release needs [n, {self.facts.dim}]")
        if not np.isfinite(queries).all():
            raise UserError("queries hold NaN or infinity")
        if not 1 <= k <= self.facts.items:
            raise UserError(f"k is {k}, the release holds {self.facts.items} items")
        if not len(queries):
            return np.empty((0, k), object), np.empty((0, k), np.float32)
        with self._unless_gone():
            scores, rows = self._with_ties(queries, k)
            names = self._item_ids(rows)
        # The index may return fewer than k neighbours (narrow inverted lists): those places stay empty, last.
        order = np.array([_ranked(s, n)[:k] for s, n in zip(scores, names, strict=True)])
        return np.take_along_axis(names, order, axis=1), np.take_along_axis(scores, order, axis=1)

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """A file that is missing because its release was given up is no damage."""
        try:
            yield
        except MissingFile:
            if release_log.read_log(self._storage, self._uri).find(self.facts.release_id):
                raise
            raise ReleaseGone(
                f"release {self.facts.release_id} of {self.facts.ds} is gone: retention gave it up and its grace "
                "period is over; open the newest one"
            ) from None

    def _verify_files(self) -> None:
        if self._verified:
            # A dataset reads later, and in other threads: that its files are still there is said now.
            if self.facts.table_files and not self._is_here(self.facts.table_files[0]):
                raise MissingFile(f"{self.files()[0]} is missing; the release cannot be read without it")
            return
        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            # The checksums release the interpreter's lock; list() raises what a thread raised.
            list(pool.map(partial(require_blocks, self._storage, self._uri), self.facts.table_files))
        self._verified = True

    def _is_here(self, file: PublishedFile) -> bool:
        return self._storage.stat(join(self._uri, file.path)) is not None

    def index_row_ids(self) -> NDArray[np.int64]:
        """Row ids in the index, in no particular order."""
        with self._unless_gone():
            return np.concatenate([_shard_ids(self._read_shard(file)) for file in self.facts.index_files])

    def _with_ties(self, queries: Matrix, k: int) -> tuple[Matrix, NDArray[np.int64]]:
        """At least k neighbours, and as many more as tie with the k-th: which of them count is not FAISS's to say."""
        depth = k
        while True:
            depth = min(depth + 1, self.facts.items)
            scores, rows = self._index.search(queries, depth)
            # An index that finds fewer says -1: there is nothing more to come.
            if depth == self.facts.items or np.all((rows[:, -1] < 0) | (scores[:, -1] < scores[:, k - 1])):
                return scores, rows
            depth *= 2

    def _rows_of(self, bucket: int, wanted: pa.Array) -> pa.Table:
        """Candidate rows (item_id, vector) of one bucket: the row groups whose id range meets the wanted ids."""
        tables = [pa.table({"item_id": pa.array([], pa.string()), "vector": _no_vectors(self.facts.dim)})]
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
        for file in self.facts.table_files:
            found.setdefault(bucket_number(file.path), []).append(file)
        return found

    @cached_property
    def _index(self) -> Any:
        shards = [self._read_shard(file) for file in self.facts.index_files]
        if len(shards) == 1:
            return shards[0]
        merged: Any = faiss.IndexShards(self.facts.dim)
        # The shards bring our row ids: they must not be numbered one after the other.
        merged.successive_ids = False
        for shard in shards:
            merged.add_shard(shard)
        return merged

    def _read_shard(self, file: PublishedFile) -> Any:
        """One index file, every block verified, then mapped into memory: FAISS reads the pages that it needs."""
        root = self.facts.index_uri
        if not is_s3(root):
            require_blocks(self._storage, root, file)
            return faiss.read_index(join(root, file.path), faiss.IO_FLAG_MMAP_IFC)
        with tempfile.TemporaryDirectory(prefix="marc-index-") as folder:
            path = Path(folder) / file.path
            try:
                self._storage.fetch(join(root, file.path), path)
            except FileNotFoundError:
                raise MissingFile(f"{join(root, file.path)} is missing; run `marc verify` and restore it") from None
            require_blocks(Storage(), folder, file)
            # What is mapped stays when its name goes.
            return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)

    def _item_ids(self, rows: NDArray[np.int64]) -> NDArray[np.object_]:
        """Item ids of row ids, None where a row id is FAISS's -1."""
        out = np.full(rows.shape, None, dtype=object)
        for bucket in np.unique(rows[rows >= 0] % self.facts.buckets).tolist():
            known, names = self._bucket_names(bucket)
            places = np.nonzero((rows >= 0) & (rows % self.facts.buckets == bucket))
            at = np.minimum(np.searchsorted(known, rows[places]), len(known) - 1)
            if not np.array_equal(known[at], rows[places]):
                raise CorruptFile(
                    f"the index of release {self.facts.release_id} holds ids that its table does not; run `marc verify`"
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


def _shard_ids(shard: Any) -> NDArray[np.int64]:
    if hasattr(shard, "id_map"):
        return np.array(faiss.vector_to_array(shard.id_map), dtype=np.int64)
    lists: Any = faiss.try_extract_index_ivf(shard)
    inverted = lists.invlists
    sizes = [inverted.list_size(number) for number in range(lists.nlist)]
    ids = [faiss.rev_swig_ptr(inverted.get_ids(n), size).copy() for n, size in enumerate(sizes) if size]
    return np.concatenate(ids)


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


def _ranked(scores: NDArray[np.float32], names: NDArray[np.object_]) -> NDArray[np.int64]:
    order = sorted(range(len(scores)), key=lambda i: (names[i] is None, -scores[i], names[i] or ""))
    return np.array(order, dtype=np.int64)

"""Vectors of the feature table for the index stage: in batches, by row id, and changes between two releases."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marc_pipeline.storage import Storage
from marc_pipeline.storage.mapped_file import MappedFile
from marc_pipeline.table.file import TableFile
from marc_schemas.feature_table import bucket_number
from marc_schemas.files import PublishedFile

BATCH_ROWS = 65_536

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class TableVectors:
    """The vectors [n, dim] in the table files of an index or a shard; every byte is verified when it is read."""

    storage: Storage
    table_uri: str
    files: tuple[PublishedFile, ...]
    dim: int

    @property
    def items(self) -> int:
        """Number of vectors."""
        return sum(file.rows for file in self.files)

    def part(self, files: Sequence[PublishedFile]) -> "TableVectors":
        """The vectors of some of the files."""
        return replace(self, files=tuple(files))

    def batches(self) -> Iterator[tuple[Ids, Matrix]]:
        """Row ids [n] and vectors [n, d], a few row groups at a time, always in the same order."""
        for file in self.files:
            yield from self.open(file).batches(BATCH_ROWS)

    def take(self, wanted: Ids) -> Matrix:
        """Vectors [n, d] of row ids in the files, in the order of ``wanted``."""
        out = np.empty((len(wanted), self.dim), np.float32)
        if not len(wanted):
            return out
        for file in self.files:
            opened = self.open(file)
            places = pc.index_in(pa.array(opened.row_ids()), value_set=pa.array(wanted))
            at = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
            if len(at):
                opened.take_vectors(at, out, places.drop_null().to_numpy())
        return out

    def open(self, file: PublishedFile) -> TableFile:
        """Open one of the files; blocks are read when they are needed."""
        return TableFile(MappedFile(self.storage, self.table_uri, file), rows=file.rows, dim=self.dim)


@dataclass(frozen=True)
class VectorChanges:
    """Vectors of one bucket that differ from an earlier release.

    Attributes:
        removed: row ids [r] that were removed or have a new vector.
        added: row ids [n] that were added or have a new vector.
        vectors: vectors [n, d] of the added row ids.
    """

    removed: Ids
    added: Ids
    vectors: Matrix


def changed_vectors(
    source: TableVectors, before: Sequence[PublishedFile], *, threads: int = 1
) -> Iterator[VectorChanges]:
    """Changes since an earlier release, bucket by bucket; buckets with the same file are skipped.

    ``before`` lists the earlier files of the same buckets. ``threads`` buckets are compared at a time.
    """
    common = {file.path for file in before} & {file.path for file in source.files}
    old = {bucket_number(file.path): file for file in before if file.path not in common}
    new = {bucket_number(file.path): file for file in source.files if file.path not in common}
    buckets = sorted(old.keys() | new.keys())
    # Comparing and verifying release the GIL. Few buckets at a time, to bound the memory of the changes.
    for start in range(0, len(buckets), threads):
        with ThreadPoolExecutor(threads, thread_name_prefix="compare") as pool:
            yield from pool.map(
                lambda bucket: _bucket_changes(source, old.get(bucket), new.get(bucket)),
                buckets[start : start + threads],
            )


def _bucket_changes(source: TableVectors, old: PublishedFile | None, new: PublishedFile | None) -> VectorChanges:
    if old is not None and new is not None:
        one, other = source.open(old), source.open(new)
        ids = other.row_ids()
        if one.group_rows == other.group_rows and np.array_equal(one.row_ids(), ids):
            return _exchanged(ids, one, other)
    before, held = _contents(source, old)
    ids, vectors = _contents(source, new)
    found = pc.index_in(pa.array(ids), value_set=pa.array(before))
    known = np.flatnonzero(found.is_valid().to_numpy(zero_copy_only=False))
    where = found.drop_null().to_numpy()
    # Vectors are compared bit by bit; text and time do not matter to the index.
    equal = (vectors.view(np.uint32)[known] == held.view(np.uint32)[where]).all(axis=1)
    fresh, left = np.ones(len(ids), np.bool_), np.ones(len(before), np.bool_)
    fresh[known[equal]], left[where[equal]] = False, False
    return VectorChanges(before[left], ids[fresh], vectors[fresh])


def _exchanged(ids: Ids, old: TableFile, new: TableFile) -> VectorChanges:
    """Changes between two files with the same items at the same positions; unchanged vectors are not copied."""
    different, vectors = [], []
    for before, after in zip(old.groups(), new.groups(), strict=True):
        differs = (before.view(np.uint32) != after.view(np.uint32)).any(axis=1)
        different.append(differs)
        vectors.append(after[differs])
    changed = ids[np.concatenate(different)]
    return VectorChanges(changed, changed, np.concatenate(vectors))


def _contents(source: TableVectors, file: PublishedFile | None) -> tuple[Ids, Matrix]:
    """Row ids [n] and vectors [n, d] of a bucket."""
    if file is None:
        return np.empty(0, np.int64), np.empty((0, source.dim), np.float32)
    opened = source.open(file)
    return opened.row_ids(), opened.vectors()

"""The vectors that an index is made of, straight from the table's files, a batch at a time."""

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
class Source:
    """Table files, every byte of which is verified when it is read.

    Attributes:
        storage: access to the table.
        table_uri: root of the files.
        files: those that an index holds, or a part of it.
        dim: length d of the vectors.
    """

    storage: Storage
    table_uri: str
    files: tuple[PublishedFile, ...]
    dim: int

    @property
    def items(self) -> int:
        """How many vectors there are."""
        return sum(file.rows for file in self.files)

    def part(self, files: Sequence[PublishedFile]) -> "Source":
        """The same of some files only."""
        return replace(self, files=tuple(files))

    def batches(self) -> Iterator[tuple[Ids, Matrix]]:
        """Row ids [n] and vectors [n, d], some row groups at a time, in the same order every time."""
        for file in self.files:
            yield from self.open(file).batches(BATCH_ROWS)

    def row_ids(self, file: PublishedFile) -> Ids:
        """Row ids of one file, in its order."""
        return self.open(file).row_ids()

    def take(self, wanted: Ids) -> Matrix:
        """Vectors [n, d] of row ids that are in the files, in the order asked."""
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
        """One of the files, as far as it is read."""
        return TableFile(MappedFile(self.storage, self.table_uri, file), rows=file.rows, dim=self.dim)


@dataclass(frozen=True)
class Changes:
    """How the vectors of one bucket differ from those of a release before.

    Attributes:
        removed: row ids [r] that left, or have another vector now.
        added: row ids [n] that came, or have another vector now.
        vectors: of those that came [n, d].
    """

    removed: Ids
    added: Ids
    vectors: Matrix


def changes(source: Source, before: Sequence[PublishedFile], *, threads: int = 1) -> Iterator[Changes]:
    """What changed since a release, bucket by bucket; buckets whose file stayed are left out.

    Args:
        source: the day's files.
        before: the release's files, of the same buckets.
        threads: buckets to compare at a time.
    """
    common = {file.path for file in before} & {file.path for file in source.files}
    old = {bucket_number(file.path): file for file in before if file.path not in common}
    new = {bucket_number(file.path): file for file in source.files if file.path not in common}
    buckets = sorted(old.keys() | new.keys())
    # Comparing and verifying leave the interpreter alone. So many at a time, lest what changed piles up unread.
    for start in range(0, len(buckets), threads):
        with ThreadPoolExecutor(threads, thread_name_prefix="compare") as pool:
            yield from pool.map(
                lambda bucket: _bucket_changes(source, old.get(bucket), new.get(bucket)),
                buckets[start : start + threads],
            )


def _bucket_changes(source: Source, old: PublishedFile | None, new: PublishedFile | None) -> Changes:
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
    # Bit for bit: whatever its text or its time says, an index holds the vector.
    equal = (vectors.view(np.uint32)[known] == held.view(np.uint32)[where]).all(axis=1)
    fresh, left = np.ones(len(ids), np.bool_), np.ones(len(before), np.bool_)
    fresh[known[equal]], left[where[equal]] = False, False
    return Changes(before[left], ids[fresh], vectors[fresh])


def _exchanged(ids: Ids, old: TableFile, new: TableFile) -> Changes:
    """What changed where the same items are in the same places: no vector is copied that stayed."""
    different, vectors = [], []
    for before, after in zip(old.groups(), new.groups(), strict=True):
        differs = (before.view(np.uint32) != after.view(np.uint32)).any(axis=1)
        different.append(differs)
        vectors.append(after[differs])
    changed = ids[np.concatenate(different)]
    return Changes(changed, changed, np.concatenate(vectors))


def _contents(source: Source, file: PublishedFile | None) -> tuple[Ids, Matrix]:
    """Row ids [n] and vectors [n, d] of a bucket."""
    if file is None:
        return np.empty(0, np.int64), np.empty((0, source.dim), np.float32)
    opened = source.open(file)
    return opened.row_ids(), opened.vectors()

"""The vectors that an index is made of, straight from the table's files, a batch at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import feature_table
from pipeline.storage import Storage
from schemas.feature_table import bucket_number
from schemas.files import PublishedFile

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
        """Row ids [n] and vectors [n, d], a row group at a time, in the same order every time."""
        for file in self.files:
            yield from self._batches(file)

    def row_ids(self, file: PublishedFile) -> Ids:
        """Row ids of one file, in its order."""
        rows = feature_table.read_rows(self.storage, self.table_uri, file, columns=["row_id"])
        found: Ids = rows["row_id"].to_numpy()
        return found

    def take(self, wanted: Ids) -> Matrix:
        """Vectors [n, d] of row ids that are in the files, in the order asked."""
        out = np.empty((len(wanted), self.dim), np.float32)
        order = np.argsort(wanted)
        for file in self.files:
            _, places, rows = np.intersect1d(wanted[order], self.row_ids(file), assume_unique=True, return_indices=True)
            if len(places):
                out[order[places]] = np.concatenate([vectors for _, vectors in self._batches(file)])[rows]
        return out

    def _batches(self, file: PublishedFile) -> Iterator[tuple[Ids, Matrix]]:
        for rows in feature_table.iter_rows(self.storage, self.table_uri, file, columns=["row_id", "vector"]):
            yield rows["row_id"].to_numpy(), matrix(rows, self.dim)


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


def changes(source: Source, before: Sequence[PublishedFile]) -> Iterator[Changes]:
    """What changed since a release, bucket by bucket; buckets whose file stayed are left out.

    Args:
        source: the day's files.
        before: the release's files, of the same buckets.
    """
    common = {file.path for file in before} & {file.path for file in source.files}
    old = {bucket_number(file.path): file for file in before if file.path not in common}
    new = {bucket_number(file.path): file for file in source.files if file.path not in common}
    for bucket in sorted(old.keys() | new.keys()):
        yield _bucket_changes(source, old.get(bucket), new.get(bucket))


def matrix(rows: pa.Table, dim: int) -> Matrix:
    """Vectors [n, d] of rows of the table."""
    found: Matrix = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
    return found


def _bucket_changes(source: Source, old: PublishedFile | None, new: PublishedFile | None) -> Changes:
    before, after = _keys(source, old), _keys(source, new)
    ids = after["row_id"].to_numpy()
    same = _same(before, after)
    removed = np.setdiff1d(before["row_id"].to_numpy(), ids[same], assume_unique=True)
    if new is None or same.all():
        return Changes(removed, np.empty(0, np.int64), np.empty((0, source.dim), np.float32))
    rows = feature_table.read_rows(source.storage, source.table_uri, new, columns=["vector"])
    return Changes(removed, ids[~same], matrix(rows, source.dim)[~same])


def _keys(source: Source, file: PublishedFile | None) -> pa.Table:
    """What tells one vector from another without reading it: row id, content, and when it was encoded."""
    columns = ["row_id", "content_hash", "encoded_at"]
    if file is None:
        return feature_table.empty_rows(source.dim).select(columns)
    return feature_table.read_rows(source.storage, source.table_uri, file, columns=columns)


def _same(before: pa.Table, after: pa.Table) -> NDArray[np.bool_]:
    """Which rows of ``after`` hold the vector that ``before`` holds under the same id: carried over, not encoded."""
    where = pc.index_in(after["row_id"], value_set=before["row_id"].combine_chunks())
    equal = [pc.equal(after[name], before[name].take(where)) for name in ("content_hash", "encoded_at")]
    found: NDArray[np.bool_] = pc.fill_null(pc.and_(*equal), fill_value=False).to_numpy()
    return found

"""What a ranker imports: open a release, read its vectors, ask for neighbours. Needs no torch, pyspark or airflow."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow.dataset as pads
from numpy.typing import NDArray

from pipeline import release_log
from pipeline.errors import MissingFile, ReleaseGone, UserError
from pipeline.index_reader import IndexReader
from pipeline.storage import Storage, is_s3
from pipeline.table_reader import TableReader, UnknownItems
from schemas.release import Release

Matrix = NDArray[np.float32]

__all__ = ["OpenRelease", "UnknownItems", "open_release"]


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
        self._table = TableReader(facts, uri=uri, storage=storage)
        self._index = IndexReader(facts, storage=storage)

    def __repr__(self) -> str:
        return f"<release {self.facts.release_id} of {self.facts.ds}: {self.facts.items:,} items × {self.facts.dim}>"

    def __len__(self) -> int:
        return self.facts.items

    def files(self) -> list[str]:
        """Uris of the Parquet files, for readers that bring their own engine (and check nothing)."""
        return self._table.files()

    def dataset(self) -> pads.Dataset:
        """The release as a pyarrow dataset, columns of the feature table with ``ds`` and ``bucket``.

        Every file is verified before the first dataset of this release is handed out; the dataset itself is a
        plain one, for any engine and any number of threads.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            return self._table.dataset()

    def vectors(self, ids: Sequence[str]) -> Matrix:
        """Vectors float32 [n, d] of items, rows in the order asked; repeated ids give repeated rows.

        Reads only the buckets, and within them the row groups, that can hold the ids.

        Raises:
            UnknownItems: some ids are not in the release.
            CorruptFile: a file differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            return self._table.vectors(ids)

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
            scores, rows = self._index.search(queries, k)
            names = self._table.item_ids(rows)
        # The index may return fewer than k neighbours (narrow inverted lists): those places stay empty, last.
        order = np.array([_ranked(s, n)[:k] for s, n in zip(scores, names, strict=True)])
        return np.take_along_axis(names, order, axis=1), np.take_along_axis(scores, order, axis=1)

    def index_row_ids(self) -> NDArray[np.int64]:
        """Row ids in the index, in no particular order."""
        with self._unless_gone():
            return self._index.row_ids()

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


def _ranked(scores: NDArray[np.float32], names: NDArray[np.object_]) -> NDArray[np.int64]:
    order = sorted(range(len(scores)), key=lambda i: (names[i] is None, -scores[i], names[i] or ""))
    return np.array(order, dtype=np.int64)

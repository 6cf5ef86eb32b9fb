"""The reader's interface: open a release, read its rows and vectors, search neighbours."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
from numpy.typing import NDArray

from marc_pipeline.errors import MissingFile, ReleaseGone, UserError
from marc_pipeline.index.files import IndexReader
from marc_pipeline.index.vectors import Matrix
from marc_pipeline.reader.neighbours import NeighbourSearch
from marc_pipeline.releases import log as release_log
from marc_pipeline.storage import Storage, is_s3
from marc_pipeline.table.read import TableReader, UnknownItems
from marc_schemas.release import Release

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
        at: a moment with a time zone: open the release that was live at this moment.
        storage: S3 endpoint and region; credentials come from the standard AWS chain.

    Raises:
        UserError: there is no such release.
        ReleaseGone: the release that was live at this moment was deleted.
    """
    storage = storage or Storage()
    uri = str(uri) if is_s3(str(uri)) else str(Path(uri).absolute())
    return OpenRelease(
        release_log.find_release(storage, uri, ds=ds, release_id=release_id, at=at), uri=uri, storage=storage
    )


class OpenRelease:
    """One pinned release; later releases do not change what it returns.

    Files are verified against the release's checksums: each block when it is first read, all blocks before the first
    dataset is returned, and the index before FAISS reads it. Local files are memory-mapped. Blocks of files on S3 are
    kept in temporary files. :meth:`close`, or the end of a ``with`` block, releases both.

    Args:
        facts: the record of the release in the log.
        uri: the feature table, local or ``s3://``.
        storage: access to the table.
    """

    def __init__(self, facts: Release, *, uri: str, storage: Storage) -> None:
        self.facts = facts
        self._uri = uri
        self.storage = storage
        self._table = TableReader(facts, uri=uri, storage=storage)
        self._index = IndexReader(facts, storage=storage)
        self._neighbours = NeighbourSearch(facts, table=self._table, index=self._index)
        self._closed = False

    def __repr__(self) -> str:
        return f"<release {self.facts.release_id} of {self.facts.ds}: {len(self):,} items × {self.facts.table.dim}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # Memory maps are not pickled: the other process opens the same files.
        return partial(OpenRelease, uri=self._uri, storage=self.storage), (self.facts,)

    def __len__(self) -> int:
        return self.facts.counts.items

    def close(self) -> None:
        """Release memory maps, temporary files and file handles. A second call does nothing.

        Returned arrays, tables and datasets stay valid. The facts and :meth:`files` can still be read; any
        other call raises a :class:`UserError`. Do not close a release while another thread reads from it.
        """
        self._closed = True
        self._table.close()
        self._index.close()

    def files(self) -> list[str]:
        """Uris of the Parquet files, for other engines. These engines do not verify checksums."""
        return self._table.files()

    def dataset(self) -> pads.Dataset:
        """The release as a pyarrow dataset with all columns of the feature table, ``ds`` and ``bucket`` included.

        Every file is verified before the first dataset is returned. The dataset itself does not verify again; any
        engine can read it with any number of threads.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._table.dataset()

    def first_item(self) -> str:
        """The first item id of the first file. Reading it needs few bytes, so it can serve as an example.

        Raises:
            CorruptFile: the file is missing or differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._table.first_item()

    def vectors(self, ids: Sequence[str]) -> Matrix:
        """Vectors float32 [n, d] of items, in the order of ``ids``; repeated ids give repeated rows.

        Only the item ids of the buckets concerned, and the blocks of the requested vectors, are read.

        Raises:
            UnknownItems: some ids are not in the release.
            CorruptFile: a file differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._table.vectors(ids)

    def numpy(self) -> tuple[pa.ChunkedArray, Matrix]:
        """All item ids [n], one chunk per file, and all vectors float32 [n, d] in a new array.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._table.numpy()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, or some columns, as an Arrow table with the columns of :meth:`dataset`, one chunk per file.

        numpy, polars, DuckDB, and torch by way of numpy, share its memory without a copy.

        Raises:
            UserError: the table has no such column.
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._table.table(columns)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[tuple[pa.Array, Matrix]]:
        """Item ids [size] and vectors float32 [size, d] for training: every item once; the last batch may be smaller.

        One bucket is in memory at a time.

        Args:
            size: rows per batch.
            seed: shuffle the buckets, and the rows within each bucket. The same seed gives the same order in every
                process. None: the order of the files.

        Raises:
            UserError: size is not positive.
            CorruptFile: a file is missing or differs from its checksum; raised when the file is read.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        if size < 1:
            raise UserError(f"size is {size}; it must be at least 1")
        self._require_open()
        return self._batches(size, seed)

    def _batches(self, size: int, seed: int | None) -> Iterator[tuple[pa.Array, Matrix]]:
        with self._unless_gone():
            for batch in self._table.batches(size, seed=seed):
                yield batch
                self._require_open()

    def search(
        self,
        queries: Matrix,
        k: int = 10,
        *,
        within: Iterable[str] | None = None,
        without: Iterable[str] | None = None,
        rerank: int = 0,
    ) -> tuple[NDArray[np.object_], Matrix]:
        """Nearest items by inner product.

        Filtered search returns as many of the allowed items as unfiltered search would. The fewer items are allowed,
        the wider the index is searched, and missing neighbours are found by the table's vectors. If few items are
        allowed, the result is exact for every index type.

        A query's result does not depend on the other queries of the call. One exception: with an exact index
        (``Flat``), FAISS multiplies batches of 20 and more queries differently, and the last bits of scores may differ.

        Args:
            queries: float32 [n, d], or one vector [d]; normalised like the table's vectors.
            k: neighbours per query, at most the number of items.
            within: item ids that may be returned; ids that are not in the release are ignored.
            without: item ids that must not be returned.
            rerank: number of candidates, at least k, that are rescored with the table's vectors before the top k are
                returned; 0 for the index's own scores.

        Returns:
            Item ids [n, k] and scores [n, k], best first; equal scores are ordered by item id. Missing results are
            None and -inf, in the last places.

        Raises:
            UserError: wrong dimension, NaN, k out of range, rerank below k, or FAISS is older than the index.
            CorruptFile: the index or a file of the table differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._neighbours.search(queries, k, within=within, without=without, rerank=rerank)

    def similar(
        self,
        ids: Sequence[str],
        k: int = 10,
        *,
        within: Iterable[str] | None = None,
        without: Iterable[str] | None = None,
        rerank: int = 0,
    ) -> tuple[NDArray[np.object_], Matrix]:
        """Nearest items of items; an item is not its own neighbour. Otherwise like :meth:`search`.

        Args:
            ids: item ids [n]; they may be neighbours of one another.
            k: neighbours per item, at most the number of items; if equal to it, the last place stays empty.
            within: item ids that may be returned.
            without: item ids that must not be returned.
            rerank: number of candidates that are rescored with the table's vectors.

        Returns:
            Item ids [n, k] and scores [n, k].

        Raises:
            UnknownItems: some ids are not in the release.
            UserError, CorruptFile, ReleaseGone: as :meth:`search`.
        """
        with self._unless_gone():
            return self._neighbours.similar(ids, k, within=within, without=without, rerank=rerank)

    def index_row_ids(self) -> NDArray[np.int64]:
        """Row ids of the vectors in the index, without tombstones, in no particular order."""
        with self._unless_gone():
            return self._index.row_ids()

    def _require_open(self) -> None:
        if self._closed:
            raise UserError(f"release {self.facts.release_id} is closed; open it again with `open_release`")

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Require an open release, and raise ReleaseGone, not CorruptFile, for files that retention deleted."""
        self._require_open()
        try:
            yield
        except MissingFile:
            if release_log.read_log(self.storage, self._uri).find(self.facts.release_id):
                raise
            raise ReleaseGone(
                f"release {self.facts.release_id} of {self.facts.ds} is gone: retention deleted it after its grace "
                "period; open the newest release"
            ) from None

"""What a ranker imports: open a release, read its vectors, ask for neighbours. Needs no torch, pyspark or airflow."""

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
from marc_pipeline.reader.neighbours import Neighbours
from marc_pipeline.releases import log as release_log
from marc_pipeline.storage import Storage, is_s3
from marc_pipeline.table.read import TableReader, UnknownItems
from marc_schemas.release import Release

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

    Files are verified against the release's checksums: each block the first time that this object reads it, all of
    them before the first dataset is handed out, and the index before FAISS reads it. Local files are mapped into
    memory; blocks of files on S3 are kept in temporary files. :meth:`close`, or the end of a ``with`` block, releases
    both.

    Args:
        facts: the release's row in the log.
        uri: the feature table as the reader reaches it.
        storage: access to it.
    """

    def __init__(self, facts: Release, *, uri: str, storage: Storage) -> None:
        self.facts = facts
        self._uri = uri
        self.storage = storage
        self._table = TableReader(facts, uri=uri, storage=storage)
        self._index = IndexReader(facts, storage=storage)
        self._neighbours = Neighbours(facts, table=self._table, index=self._index)
        self._closed = False

    def __repr__(self) -> str:
        return f"<release {self.facts.release_id} of {self.facts.ds}: {len(self):,} items × {self.facts.table.dim}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        # What is mapped into memory stays here: another process opens the same files.
        return partial(OpenRelease, uri=self._uri, storage=self.storage), (self.facts,)

    def __len__(self) -> int:
        return self.facts.counts.items

    def close(self) -> None:
        """Release memory maps, temporary files and file handles. A second call does nothing.

        Arrays, tables and datasets that were handed out stay valid. The facts and :meth:`files` can still be read; any
        other call raises a :class:`UserError`. Do not close a release while another thread reads from it.
        """
        self._closed = True
        self._table.close()
        self._index.close()

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

    def first_item(self) -> str:
        """Return the id of one item, the first of the first file: an example for look-ups that needs few bytes.

        Raises:
            CorruptFile: the file is missing or differs from its checksum.
            ReleaseGone: retention deleted the release, and its grace period is over.
        """
        with self._unless_gone():
            return self._table.first_item()

    def vectors(self, ids: Sequence[str]) -> Matrix:
        """Vectors float32 [n, d] of items, rows in the order asked; repeated ids give repeated rows.

        Of the buckets that can hold the items, all ids are read once, and the blocks of the vectors that are asked for.

        Raises:
            UnknownItems: some ids are not in the release.
            CorruptFile: a file differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            return self._table.vectors(ids)

    def numpy(self) -> tuple[pa.ChunkedArray, Matrix]:
        """Everything: item ids [n], one chunk per file, and vectors float32 [n, d], one array of the caller's own.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            return self._table.numpy()

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Everything, or some columns of it, as an Arrow table with the columns of :meth:`dataset`, one chunk per file.

        What takes Arrow without a copy (numpy, polars, DuckDB, torch by way of numpy) shares its memory.

        Raises:
            UserError: a column that the table does not have.
            CorruptFile: a file is missing or differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        with self._unless_gone():
            return self._table.table(columns)

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[tuple[pa.Array, Matrix]]:
        """Item ids [size] and vectors float32 [size, d] for training: every item once, the last batch may be smaller.

        Memory is that of one bucket.

        Args:
            size: rows of a batch.
            seed: the buckets come in a shuffled order, and their rows within each; the same seed gives the same order
                whatever process reads this release. None: the order of the files.

        Raises:
            UserError: size is not positive.
            CorruptFile: a file is missing or differs from its checksum; raised when its turn comes.
            ReleaseGone: retention gave the release up, and the grace period is over.
        """
        if size < 1:
            raise UserError(f"size is {size}; a batch has at least one row")
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

        A filter loses no neighbour because the index is searched narrowly: the fewer items may be found, the wider
        it is searched, and what it still lacks is found by the table's vectors. Of few items ``within`` an index
        that is approximate even then (compressed vectors, a graph), all are scored by the table's vectors.

        The same queries give the same answer whatever they are asked together with; where the index is exact
        (``Flat``), FAISS multiplies batches of 20 and more in another way, and scores may differ in their last bits.

        Args:
            queries: float32 [n, d], or one vector [d]; normalised like the table's.
            k: neighbours per query, at most the number of items.
            within: only these item ids may be found; those that the release does not hold match nothing.
            without: none of these item ids is found.
            rerank: so many candidates of the index, at least k, are scored anew with the table's vectors and the
                best k of them returned; 0 for the index's own scores.

        Returns:
            Item ids [n, k] and scores [n, k], best first; equal scores are ordered by item id. Places for which
            there is no neighbour hold None and -inf, last.

        Raises:
            UserError: wrong dimension, NaN, k out of range, rerank below k, or a FAISS older than the index.
            CorruptFile: the index, or a file of the table, differs from its checksum.
            ReleaseGone: retention gave the release up, and the grace period is over.
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
        """Nearest items of items, each one itself left out; otherwise as :meth:`search`.

        Args:
            ids: the items [n]; they may be neighbours of one another.
            k: neighbours per item, at most the number of items; of all others one place stays empty.
            within: only these item ids may be found.
            without: none of these item ids is found.
            rerank: candidates that are scored anew with the table's vectors.

        Returns:
            Item ids [n, k] and scores [n, k].

        Raises:
            UnknownItems: some ids are not in the release.
            UserError, CorruptFile, ReleaseGone: as :meth:`search`.
        """
        with self._unless_gone():
            return self._neighbours.similar(ids, k, within=within, without=without, rerank=rerank)

    def index_row_ids(self) -> NDArray[np.int64]:
        """Row ids in the index, in no particular order."""
        with self._unless_gone():
            return self._index.row_ids()

    def _require_open(self) -> None:
        if self._closed:
            raise UserError(f"release {self.facts.release_id} is closed; open it again with `open_release`")

    @contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """Require an open release; report a file that retention deleted as a release that is gone, not as damage."""
        self._require_open()
        try:
            yield
        except MissingFile:
            if release_log.read_log(self.storage, self._uri).find(self.facts.release_id):
                raise
            raise ReleaseGone(
                f"release {self.facts.release_id} of {self.facts.ds} is gone: retention gave it up and its grace "
                "period is over; open the newest one"
            ) from None

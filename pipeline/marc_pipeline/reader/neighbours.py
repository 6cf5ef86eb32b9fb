"""Neighbours of vectors among the items of one release: filters, exact scores, and one order for equal ones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import UserError
from marc_pipeline.index.files import IndexReader
from marc_pipeline.index.search import Choice, Found, contains
from marc_pipeline.table.read import TableReader
from marc_schemas.identity import row_id
from marc_schemas.release import Release

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]

# Neighbours among so few items are exact: the index probes all its lists, or, where it holds other vectors than the
# table or walks a graph, the table's are read.
EXACT_WITHIN = 4096
# Vectors of the table, and scores, that are held at a time.
EXACT_ROWS = 65_536
EXACT_CELLS = 8_000_000


class Neighbours:
    """Search over one release.

    Args:
        facts: the release's row in the log.
        table: its vectors and item ids.
        index: its FAISS index.
    """

    def __init__(self, facts: Release, *, table: TableReader, index: IndexReader) -> None:
        self._facts = facts
        self._table = table
        self._index = index

    def search(
        self,
        queries: Matrix,
        k: int,
        *,
        within: Iterable[str] | None = None,
        without: Iterable[str] | None = None,
        rerank: int = 0,
    ) -> tuple[NDArray[np.object_], Matrix]:
        """Item ids and scores [n, k]; see :meth:`marc_pipeline.reader.release.OpenRelease.search`."""
        queries = self._checked(queries)
        self._check(k, rerank)
        names = np.full((len(queries), k), None, object)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        choice = self._choice(within, without)
        if len(queries) and (choice is None or choice.count):
            for found in self._found(queries, k, choice, rerank):
                names[found.places], scores[found.places] = self._named(found, k)
        return names, scores

    def similar(
        self,
        ids: Sequence[str],
        k: int,
        *,
        within: Iterable[str] | None = None,
        without: Iterable[str] | None = None,
        rerank: int = 0,
    ) -> tuple[NDArray[np.object_], Matrix]:
        """Item ids and scores [n, k]; see :meth:`marc_pipeline.reader.release.OpenRelease.similar`."""
        self._check(k, rerank)
        # An item is mostly its own nearest neighbour: one more is asked for, and it is left out.
        wanted = min(k + 1, self._facts.counts.items)
        names, scores = self.search(
            self._table.vectors(ids), wanted, within=within, without=without, rerank=rerank and max(rerank, wanted)
        )
        own = names == np.array(ids, object)[:, None]
        order = np.argsort(own, axis=1, kind="stable")
        names[own], scores[own] = None, -np.inf
        return np.take_along_axis(names, order, axis=1)[:, :k], np.take_along_axis(scores, order, axis=1)[:, :k]

    def _check(self, k: int, rerank: int) -> None:
        if not 1 <= k <= self._facts.counts.items:
            raise UserError(f"k is {k}, the release holds {self._facts.counts.items} items")
        if rerank and rerank < k:
            raise UserError(f"rerank is {rerank}: of fewer candidates than k = {k} there is nothing to choose")

    def _checked(self, queries: Matrix) -> Matrix:
        queries = np.atleast_2d(np.ascontiguousarray(queries, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self._facts.table.dim:
            raise UserError(f"queries have shape {queries.shape}, the release needs [n, {self._facts.table.dim}]")
        if not np.isfinite(queries).all():
            raise UserError("queries hold NaN or infinity")
        return queries

    def _choice(self, within: Iterable[str] | None, without: Iterable[str] | None) -> Choice | None:
        """What the filters leave; None where they leave everything."""
        out = self._known(without, "without") if without is not None else np.empty(0, np.int64)
        if within is not None:
            rows = self._known(within, "within")
            rows = rows[~contains(out, rows)]
            return Choice(rows, only=True, count=len(rows))
        return Choice(out, only=False, count=self._facts.counts.items - len(out)) if len(out) else None

    def _known(self, items: Iterable[str], name: str) -> Ids:
        """Sorted row ids of those items that the release holds."""
        if isinstance(items, str):
            raise UserError(f"{name} is one text, {items!r}; it takes several item ids")
        rows = np.unique(np.fromiter(_row_ids(items, name), np.int64))
        return rows[contains(self._index.sorted_row_ids, rows)]

    def _found(self, queries: Matrix, k: int, choice: Choice | None, rerank: int) -> Iterator[Found]:
        """Of each query the best k, or fewer where there are no more, and all that tie with the k-th."""
        few = choice is not None and choice.count <= EXACT_WITHIN
        if few and not self._index.scans_exactly:
            yield from self._exact(queries, np.arange(len(queries)), k, choice)
            return
        candidates = min(max(k, rerank), self._facts.counts.items)
        wanted = min(candidates, choice.count if choice else self._facts.counts.items)
        for found in self._index.search(queries, candidates, choice, widest=few):
            if rerank:
                found = self._reranked(queries, found)  # noqa: PLW2901
            if choice is None and not self._facts.index.build.tombstones:
                yield found
                continue
            # What a graph does not reach for a filter, or past the dead, is looked for in the table.
            short = (found.rows >= 0).sum(axis=1) < wanted
            if short.any():
                yield from self._exact(queries, found.places[short], k, choice)
            if not short.all():
                yield Found(found.places[~short], found.scores[~short], found.rows[~short])

    def _exact(self, queries: Matrix, places: NDArray[np.intp], k: int, choice: Choice | None) -> Iterator[Found]:
        """Neighbours by the table's vectors, part by part of the items that may be found."""
        rows = self._index.sorted_row_ids
        if choice is not None:
            rows = choice.rows if choice.only else rows[~contains(choice.rows, rows)]
        # Bucket by bucket: each file is opened once, or twice.
        rows = rows[np.argsort(rows % self._facts.table.buckets, kind="stable")]
        best = Found(places, np.empty((len(places), 0), np.float32), np.empty((len(places), 0), np.int64))
        for start in range(0, len(rows), EXACT_ROWS):
            part = rows[start : start + EXACT_ROWS]
            best = _better(best, queries[places], part, self._table.vectors_of_rows(part), k)
        yield best

    def _reranked(self, queries: Matrix, found: Found) -> Found:
        """The same candidates by the table's vectors, best first."""
        known, where = np.unique(found.rows[found.rows >= 0], return_inverse=True)
        vectors = self._table.vectors_of_rows(known)
        scores = np.full_like(found.scores, -np.inf)
        ends = np.cumsum((found.rows >= 0).sum(axis=1))
        for place, own in enumerate(np.split(where, ends[:-1])):
            scores[place, : len(own)] = _products(queries[found.places[place]][None], vectors[own])[0]
        order = np.argsort(-scores, axis=1, kind="stable")
        return replace(
            found,
            scores=np.take_along_axis(scores, order, axis=1),
            rows=np.take_along_axis(found.rows, order, axis=1),
        )

    def _named(self, found: Found, k: int) -> tuple[NDArray[np.object_], Matrix]:
        """Item ids and scores [q, k], equal scores in the order of the ids."""
        scores, rows = _filled(found, k)
        names = self._table.item_ids(rows[:, :k])
        equal = (scores[:, 1 : k + 1] == scores[:, :k][:, : scores.shape[1] - 1]) & (rows[:, 1 : k + 1] >= 0)
        tied, best = np.flatnonzero(equal.any(axis=1)), scores[:, :k]
        if not len(tied):
            return names, best
        best = best.copy()
        for place, own in zip(tied, self._table.item_ids(rows[tied]), strict=True):
            last = int((rows[place] >= 0).sum())
            order = sorted(range(last), key=lambda i: (-scores[place, i], own[i]))[:k]
            names[place, : len(order)], best[place, : len(order)] = own[order], scores[place, order]
        return names, best


def _row_ids(items: Iterable[str], name: str) -> Iterator[int]:
    for item in items:
        if not isinstance(item, str):
            raise UserError(f"{name} holds {item!r}; item ids are texts")
        try:
            yield row_id(item)
        except UnicodeEncodeError:
            # Half a surrogate pair is in no catalogue.
            continue


def _filled(found: Found, k: int) -> tuple[Matrix, Ids]:
    """Scores and row ids, at least k wide."""
    if found.scores.shape[1] >= k:
        return found.scores, found.rows
    missing = ((0, 0), (0, k - found.scores.shape[1]))
    return (
        np.pad(found.scores, missing, constant_values=-np.inf),
        np.pad(found.rows, missing, constant_values=-1),
    )


def _products(queries: Matrix, vectors: Matrix) -> Matrix:
    """Inner products [n, m], summed in double precision: the order of a sum, and with it the batch, cannot be seen."""
    products: Matrix = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return products


def _better(best: Found, queries: Matrix, rows: Ids, vectors: Matrix, k: int) -> Found:
    """The best k of what was found before and of some more items, with all that ties with the k-th."""
    size = max(1, EXACT_CELLS // len(rows))
    blocks = []
    for start in range(0, len(queries), size):
        block = slice(start, start + size)
        scores = np.concatenate([best.scores[block], _products(queries[block], vectors)], axis=1)
        own = np.concatenate([best.rows[block], np.broadcast_to(rows, (len(scores), len(rows)))], axis=1)
        blocks.append(_top(scores, own, k))
    width = max(scores.shape[1] for scores, _ in blocks)
    parts = [_filled(Found(best.places, *part), width) for part in blocks]
    return Found(best.places, *(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))


def _top(scores: Matrix, rows: Ids, k: int) -> tuple[Matrix, Ids]:
    """The first columns in descending order: k, and as many more as tie with the k-th in some row."""
    if k < scores.shape[1]:
        last = -np.partition(-scores, k - 1, axis=1)[:, k - 1, None]
        width = int((scores >= last).sum(axis=1).max())
        chosen = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        scores, rows = np.take_along_axis(scores, chosen, axis=1), np.take_along_axis(rows, chosen, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

"""Neighbour search in one release: filters, exact fallback, reranking, and a fixed order of equal scores."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import UserError
from marc_pipeline.index.files import IndexReader
from marc_pipeline.index.search import RowFilter, SearchResult, contains
from marc_pipeline.index.vectors import Ids, Matrix
from marc_pipeline.table.read import TableReader
from marc_schemas.identity import row_id
from marc_schemas.release import Release

# If a filter allows at most this many items, the search is exact: an index of unchanged vectors probes all its lists;
# for other index types the table's vectors are read.
EXACT_WITHIN = 4096
# Limits on the vectors and scores that an exact search has in memory at a time.
EXACT_ROWS = 65_536
EXACT_CELLS = 8_000_000


class NeighbourSearch:
    """Neighbour search in one release, with its record in the log, its table and its FAISS index."""

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
        row_filter = self._choice(within, without)
        if len(queries) and (row_filter is None or row_filter.count):
            for found in self._found(queries, k, row_filter, rerank):
                names[found.positions], scores[found.positions] = self._named(found, k)
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
        # An item is usually its own nearest neighbour: request one more and remove the item itself.
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
            raise UserError(f"k is {k}; choose 1 to {self._facts.counts.items}, the number of items in the release")
        if rerank and rerank < k:
            raise UserError(f"rerank is {rerank}; it must be 0 or at least k = {k}")

    def _checked(self, queries: Matrix) -> Matrix:
        queries = np.atleast_2d(np.ascontiguousarray(queries, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self._facts.table.dim:
            raise UserError(f"queries have shape {queries.shape}, the release needs [n, {self._facts.table.dim}]")
        if not np.isfinite(queries).all():
            raise UserError("queries contain NaN or infinity")
        return queries

    def _choice(self, within: Iterable[str] | None, without: Iterable[str] | None) -> RowFilter | None:
        """The allowed rows; None if every row is allowed."""
        out = self._known(without, "without") if without is not None else np.empty(0, np.int64)
        if within is not None:
            rows = self._known(within, "within")
            rows = rows[~contains(out, rows)]
            return RowFilter(rows, only=True, count=len(rows))
        return RowFilter(out, only=False, count=self._facts.counts.items - len(out)) if len(out) else None

    def _known(self, items: Iterable[str], name: str) -> Ids:
        """Sorted row ids of the given items; items that are not in the release are skipped."""
        if isinstance(items, str):
            raise UserError(f"{name} is the string {items!r}; pass a list of item ids")
        rows = np.unique(np.fromiter(_row_ids(items, name), np.int64))
        return rows[contains(self._index.sorted_row_ids, rows)]

    def _found(self, queries: Matrix, k: int, row_filter: RowFilter | None, rerank: int) -> Iterator[SearchResult]:
        """The top k of each query, or fewer if there are fewer items, and all results that tie with the k-th."""
        few = row_filter is not None and row_filter.count <= EXACT_WITHIN
        if few and not self._index.searcher.scans_exactly:
            yield from self._exact(queries, np.arange(len(queries)), k, row_filter)
            return
        candidates = min(max(k, rerank), self._facts.counts.items)
        wanted = min(candidates, row_filter.count if row_filter else self._facts.counts.items)
        for found in self._index.searcher.search(queries, candidates, row_filter, widest=few):
            if rerank:
                found = self._reranked(queries, found)  # noqa: PLW2901
            if row_filter is None and not self._facts.index.build.tombstones:
                yield found
                continue
            # With a filter or tombstones, a graph may find too few results: search the table instead.
            short = (found.rows >= 0).sum(axis=1) < wanted
            if short.any():
                yield from self._exact(queries, found.positions[short], k, row_filter)
            if not short.all():
                yield SearchResult(found.positions[~short], found.scores[~short], found.rows[~short])

    def _exact(
        self, queries: Matrix, places: NDArray[np.intp], k: int, row_filter: RowFilter | None
    ) -> Iterator[SearchResult]:
        """Exact neighbours from the table's vectors, some allowed items at a time."""
        rows = self._index.sorted_row_ids
        if row_filter is not None:
            rows = row_filter.rows if row_filter.only else rows[~contains(row_filter.rows, rows)]
        # In bucket order, so that each file is opened at most twice.
        rows = rows[np.argsort(rows % self._facts.table.buckets, kind="stable")]
        best = SearchResult(places, np.empty((len(places), 0), np.float32), np.empty((len(places), 0), np.int64))
        for start in range(0, len(rows), EXACT_ROWS):
            part = rows[start : start + EXACT_ROWS]
            best = _better(best, queries[places], part, self._table.vectors_of_rows(part), k)
        yield best

    def _reranked(self, queries: Matrix, found: SearchResult) -> SearchResult:
        """The same candidates, scored by the table's vectors, best first."""
        known, where = np.unique(found.rows[found.rows >= 0], return_inverse=True)
        vectors = self._table.vectors_of_rows(known)
        scores = np.full_like(found.scores, -np.inf)
        ends = np.cumsum((found.rows >= 0).sum(axis=1))
        for place, own in enumerate(np.split(where, ends[:-1])):
            scores[place, : len(own)] = _products(queries[found.positions[place]][None], vectors[own])[0]
        order = np.argsort(-scores, axis=1, kind="stable")
        return replace(
            found,
            scores=np.take_along_axis(scores, order, axis=1),
            rows=np.take_along_axis(found.rows, order, axis=1),
        )

    def _named(self, found: SearchResult, k: int) -> tuple[NDArray[np.object_], Matrix]:
        """Item ids and scores [q, k]; equal scores are ordered by item id."""
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
            raise UserError(f"{name} contains {item!r}; item ids are strings")
        try:
            yield row_id(item)
        except UnicodeEncodeError:
            # A lone surrogate cannot be an item id.
            continue


def _filled(found: SearchResult, k: int) -> tuple[Matrix, Ids]:
    """Scores and row ids, padded to at least k columns."""
    if found.scores.shape[1] >= k:
        return found.scores, found.rows
    missing = ((0, 0), (0, k - found.scores.shape[1]))
    return (
        np.pad(found.scores, missing, constant_values=-np.inf),
        np.pad(found.rows, missing, constant_values=-1),
    )


def _products(queries: Matrix, vectors: Matrix) -> Matrix:
    """Inner products [n, m], summed in float64, so that a score does not depend on its batch."""
    products: Matrix = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    return products


def _better(best: SearchResult, queries: Matrix, rows: Ids, vectors: Matrix, k: int) -> SearchResult:
    """The top k of the previous results and some more items, with all ties of the k-th."""
    size = max(1, EXACT_CELLS // len(rows))
    blocks = []
    for start in range(0, len(queries), size):
        block = slice(start, start + size)
        scores = np.concatenate([best.scores[block], _products(queries[block], vectors)], axis=1)
        own = np.concatenate([best.rows[block], np.broadcast_to(rows, (len(scores), len(rows)))], axis=1)
        blocks.append(_top(scores, own, k))
    width = max(scores.shape[1] for scores, _ in blocks)
    parts = [_filled(SearchResult(best.positions, *part), width) for part in blocks]
    return SearchResult(best.positions, *(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))


def _top(scores: Matrix, rows: Ids, k: int) -> tuple[Matrix, Ids]:
    """The top k columns in descending order, and as many more as tie with the k-th in any row."""
    if k < scores.shape[1]:
        last = -np.partition(-scores, k - 1, axis=1)[:, k - 1, None]
        width = int((scores >= last).sum(axis=1).max())
        chosen = np.argpartition(-scores, width - 1, axis=1)[:, :width]
        scores, rows = np.take_along_axis(scores, chosen, axis=1), np.take_along_axis(rows, chosen, axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

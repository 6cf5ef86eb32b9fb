"""Search over the shards of an index: filters by row id, tombstones, ties, and the search width."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.index.vectors import Ids, Matrix

# Scores held in memory at a time; ties can make results long.
CELLS = 4_000_000
# If a filter allows one vector in x, the width grows by x to this power, because the allowed neighbours are further
# away. Measured on 200,000 vectors in clusters; with a power of 1, up to 20 % of the neighbours are lost.
LISTS_GROWTH, GRAPH_GROWTH = 1.5, 1.25
# With a filter, a wider graph search is slower than a scan.
MAX_EF_SEARCH = 4096
MAX_ROW_ID = 2**63 - 1
# Limits for tuning a graph's efSearch.
NARROWEST_GRAPH_SEARCH, WIDEST_GRAPH_SEARCH = 16, 1024


@dataclass(frozen=True)
class RowFilter:
    """The vectors that a search may return.

    Attributes:
        rows: sorted row ids, all of them in the index.
        only: True to allow only ``rows``, False to exclude them.
        count: number of allowed vectors.
    """

    rows: Ids
    only: bool
    count: int

    def allows(self, rows: Ids) -> NDArray[np.bool_]:
        """Mask of the allowed row ids; -1 is never allowed."""
        allowed: NDArray[np.bool_] = (rows >= 0) & (contains(self.rows, rows) == self.only)
        return allowed


@dataclass(frozen=True)
class SearchResult:
    """Neighbours of some queries.

    Attributes:
        positions: positions [q] of these queries in the caller's array.
        scores: [q, m], best first; -inf for missing results.
        rows: row ids [q, m]; -1 for missing results.
    """

    positions: NDArray[np.intp]
    scores: Matrix
    rows: Ids


class IndexSearch:
    """One index in one or several shards of the same factory; each vector is in one shard.

    Args:
        shards: FAISS indexes whose ids are row ids; tombstones have the id -1.
        items: number of vectors without tombstones.
        tombstones: number of tombstones.
    """

    def __init__(self, shards: Sequence[Any], *, items: int, tombstones: int) -> None:
        self._shards = shards
        self._items = items
        self._tombstones = tombstones
        self._inner = _innermost(shards[0])

    @property
    def scans_exactly(self) -> bool:
        """Whether the index stores unchanged float32 vectors, so that the widest search is exact."""
        plain = isinstance(self._inner, faiss.IndexFlat | faiss.IndexIVFFlat)
        return bool(plain) and not any(isinstance(link, faiss.IndexPreTransform) for link in _chain(self._shards[0]))

    @cached_property
    def _same_lists(self) -> bool:
        """Whether all shards have the same centroids, so that the lists to probe are found once."""
        if len(self._shards) == 1 or not all(isinstance(shard, faiss.IndexIVF) for shard in self._shards):
            return False
        first, *others = (faiss.serialize_index(shard.quantizer) for shard in self._shards)
        tuned = {shard.nprobe for shard in self._shards}
        return len(tuned) == 1 and all(np.array_equal(first, other) for other in others)

    def search(
        self, queries: Matrix, k: int, row_filter: RowFilter | None = None, *, widest: bool = False
    ) -> Iterator[SearchResult]:
        """The top k of each query, and all results that tie with the k-th, because FAISS orders ties arbitrarily.

        Without a filter the search has its tuned width. The fewer vectors a filter allows, the wider
        is the search. Inverted lists are probed further until k results are found or every list was probed.

        Args:
            queries: [n, d].
            k: neighbours, at least 1.
            row_filter: allowed vectors; all by default.
            widest: with a filter, probe every list at once.

        Yields:
            Each query once, in any order.
        """
        count = row_filter.count if row_filter else self._items
        selective = row_filter is not None or self._tombstones > 0
        width, most = self._widths(count) if selective else (0, 0)
        pending = [(np.arange(len(queries)), min(k + 1, count), most if widest else width)]
        while pending:
            places, depth, width = pending.pop()
            for block in np.split(places, range(_fitting(depth), len(places), _fitting(depth))):
                scores, rows = self._once(queries[block], depth, row_filter, width)
                short = ((rows[:, :k] >= 0).sum(axis=1) < min(k, count)) & (width < most)
                tied = np.zeros_like(short)
                if depth < count:
                    # A row id of -1 in the last place means that there are no further results.
                    tied = ~short & (rows[:, -1] >= 0) & (scores[:, -1] == scores[:, k - 1])
                done = ~(short | tied)
                if done.any():
                    yield SearchResult(block[done], scores[done], rows[done])
                if short.any():
                    pending.append((block[short], depth, min(2 * width, most)))
                if tied.any():
                    pending.append((block[tied], min(2 * depth, count), width))

    def nearest(self, queries: Matrix, k: int) -> tuple[Matrix, Ids]:
        """Scores and row ids [n, k] of the top k, -inf and -1 for missing results; ties in arbitrary order."""
        return self._once(queries, k, None, search_width(self._inner) or 0)

    def _widths(self, count: int) -> tuple[int, int]:
        """The search width for ``count`` allowed vectors, and the greatest width."""
        scale = (self._items + self._tombstones) / count
        if isinstance(self._inner, faiss.IndexIVF):
            most = self._inner.nlist
            return min(math.ceil(self._inner.nprobe * scale**LISTS_GROWTH), most), most
        if isinstance(self._inner, faiss.IndexHNSW):
            tuned = self._inner.hnsw.efSearch
            width = max(tuned, min(math.ceil(tuned * scale**GRAPH_GROWTH), MAX_EF_SEARCH))
            return width, width
        return 0, 0

    def _once(self, queries: Matrix, depth: int, row_filter: RowFilter | None, width: int) -> tuple[Matrix, Ids]:
        """Scores and row ids [n, depth] over all shards."""
        if row_filter is None and not self._tombstones:
            found = self._unrestricted(queries, depth)
        elif isinstance(self._inner, faiss.IndexIVF | faiss.IndexHNSW | faiss.IndexFlat | faiss.IndexScalarQuantizer):
            selector = self._selector(row_filter)
            # FAISS changes the selector inside the parameters, so each shard gets its own.
            found = [shard.search(queries, depth, params=self._params(selector, width)) for shard in self._shards]
        else:
            found = [self._sifted(shard, queries, depth, row_filter) for shard in self._shards]
        scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        scores[rows < 0] = -np.inf
        if len(found) > 1:
            order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
            scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        return scores, rows

    def _unrestricted(self, queries: Matrix, depth: int) -> list[tuple[Matrix, Ids]]:
        """Scores and row ids [n, depth] of each shard, with the tuned width."""
        if not self._same_lists:
            return [shard.search(queries, depth) for shard in self._shards]
        near, lists = self._inner.quantizer.search(queries, self._inner.nprobe)
        return [shard.search_preassigned(queries, depth, lists, near) for shard in self._shards]

    def _selector(self, row_filter: RowFilter | None) -> Any:
        alive = faiss.IDSelectorRange(0, MAX_ROW_ID)
        if row_filter is None:
            return alive
        if row_filter.only:
            return faiss.IDSelectorBatch(row_filter.rows)
        others = faiss.IDSelectorNot(faiss.IDSelectorBatch(row_filter.rows))
        return faiss.IDSelectorAnd(alive, others) if self._tombstones else others

    def _params(self, selector: Any, width: int) -> Any:
        """Search parameters. They replace those of the index, so every tuned value is copied."""
        native: Any = faiss
        if isinstance(self._inner, faiss.IndexIVF):
            return native.SearchParametersIVF(sel=selector, nprobe=width, max_codes=self._inner.max_codes)
        if isinstance(self._inner, faiss.IndexHNSW):
            hnsw: Any = self._inner.hnsw
            return native.SearchParametersHNSW(
                sel=selector,
                efSearch=width,
                check_relative_distance=hnsw.check_relative_distance,
                bounded_queue=hnsw.search_bounded_queue,
            )
        return native.SearchParameters(sel=selector)

    def _sifted(self, shard: Any, queries: Matrix, depth: int, row_filter: RowFilter | None) -> tuple[Matrix, Ids]:
        """Search an index type without selectors: search deeper until enough results are allowed."""
        count = row_filter.count if row_filter else self._items
        reach = math.ceil(depth * (self._items + self._tombstones) / count)
        while True:
            reach = min(2 * reach, max(shard.ntotal, depth))
            blocks = np.split(queries, range(_fitting(reach), len(queries), _fitting(reach)))
            parts = [_sift(shard.search(block, reach), depth, row_filter) for block in blocks]
            scores, rows = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
            if reach >= shard.ntotal or (rows[:, -1] >= 0).all():
                return scores, rows


def _sift(found: tuple[Matrix, Ids], depth: int, row_filter: RowFilter | None) -> tuple[Matrix, Ids]:
    """The first ``depth`` allowed results in their order, padded with -1."""
    scores, rows = found
    allowed = row_filter.allows(rows) if row_filter else rows >= 0
    rows = np.where(allowed, rows, -1)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def contains(known: Ids, rows: Ids) -> NDArray[np.bool_]:
    """Mask of the row ids that occur in the sorted array ``known``."""
    if not len(known):
        return np.zeros(rows.shape, bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, rows), len(known) - 1)] == rows
    return found


def _fitting(depth: int) -> int:
    return max(1, CELLS // depth)


def _chain(index: Any) -> Iterator[Any]:
    """An index and the indexes that it wraps; the last one stores the vectors."""
    index = faiss.downcast_index(index)
    yield index
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
        yield index


def _innermost(index: Any) -> Any:
    *_, last = _chain(index)
    return last


def inverted_lists(index: Any) -> Any:
    """The IVF index inside an index; None if there is none."""
    return faiss.try_extract_index_ivf(index)


def hnsw_graph(index: Any) -> Any:
    """The HNSW index inside an index; None if there is none."""
    inside = _innermost(index)
    return inside if isinstance(inside, faiss.IndexHNSW) else None


def search_width(index: Any) -> int | None:
    """Nprobe of inverted lists or efSearch of a graph; None for other index types."""
    if (lists := inverted_lists(index)) is not None:
        return int(lists.nprobe)
    graph = hnsw_graph(index)
    return int(graph.hnsw.efSearch) if graph is not None else None


def set_search_width(index: Any, width: int | None) -> None:
    """Set nprobe or efSearch; None changes nothing."""
    if width is None:
        return
    if (lists := inverted_lists(index)) is not None:
        lists.nprobe = width
    elif (graph := hnsw_graph(index)) is not None:
        graph.hnsw.efSearch = width


def width_range(index: Any) -> tuple[int, int] | None:
    """The narrowest and the widest search; None for index types without a width."""
    if (lists := inverted_lists(index)) is not None:
        return 1, int(lists.nlist)
    return (NARROWEST_GRAPH_SEARCH, WIDEST_GRAPH_SEARCH) if hnsw_graph(index) is not None else None

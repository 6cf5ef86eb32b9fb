"""Search of FAISS indexes as if they were one: among chosen row ids only, and with everything that ties."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]

# Scores that one search may hold at a time: what ties can reach far.
CELLS = 4_000_000
# How the search widens where one vector in x may be found, x to this power: the neighbours that count then lie
# further out, in more lists. Measured on 200,000 vectors in clusters; x alone loses up to a fifth of them.
LISTS_GROWTH, GRAPH_GROWTH = 1.5, 1.25
# A graph walked wider than this for a filter is slower than a scan.
MAX_EF_SEARCH = 4096
MAX_ROW_ID = 2**63 - 1
# Between these a graph is tuned.
NARROWEST_GRAPH_SEARCH, WIDEST_GRAPH_SEARCH = 16, 1024


@dataclass(frozen=True)
class Choice:
    """Which vectors may be found.

    Attributes:
        rows: row ids, sorted, every one of them in the index.
        only: these and no others; otherwise all but these.
        count: vectors that may be found.
    """

    rows: Ids
    only: bool
    count: int

    def allows(self, rows: Ids) -> NDArray[np.bool_]:
        """Which of some row ids may be found; never -1."""
        allowed: NDArray[np.bool_] = (rows >= 0) & (contains(self.rows, rows) == self.only)
        return allowed


@dataclass(frozen=True)
class Found:
    """Neighbours of some of the queries.

    Attributes:
        places: of the queries [q] in what was asked.
        scores: [q, m], best first, -inf where there are no more.
        rows: row ids [q, m], -1 where there are no more.
    """

    places: NDArray[np.intp]
    scores: Matrix
    rows: Ids


class IndexSearch:
    """One index in one or several parts of the same factory; each vector is in one of them.

    Args:
        shards: FAISS indexes whose ids are row ids; vectors with id -1 are dead.
        items: vectors that are alive.
        tombstones: dead ones.
    """

    def __init__(self, shards: Sequence[Any], *, items: int, tombstones: int) -> None:
        self._shards = shards
        self._items = items
        self._tombstones = tombstones
        self._inner = _innermost(shards[0])

    @property
    def scans_exactly(self) -> bool:
        """Whether the index holds float32 vectors as they are and finds all of them when it searches wide enough."""
        plain = isinstance(self._inner, faiss.IndexFlat | faiss.IndexIVFFlat)
        return bool(plain) and not any(isinstance(link, faiss.IndexPreTransform) for link in _chain(self._shards[0]))

    @cached_property
    def _same_lists(self) -> bool:
        """Whether several parts have inverted lists around the same centroids: which to probe is found out once."""
        if len(self._shards) == 1 or not all(isinstance(shard, faiss.IndexIVF) for shard in self._shards):
            return False
        first, *others = (faiss.serialize_index(shard.quantizer) for shard in self._shards)
        tuned = {shard.nprobe for shard in self._shards}
        return len(tuned) == 1 and all(np.array_equal(first, other) for other in others)

    def search(self, queries: Matrix, k: int, choice: Choice | None = None, *, widest: bool = False) -> Iterator[Found]:
        """The best k of each query, and all that tie with the k-th: which of these count is not FAISS's to say.

        Without a choice the index searches as wide as it was tuned to. With one it searches as much wider as fewer
        vectors may be found, and inverted lists are probed further until k are found or there are no more.

        Args:
            queries: [n, d].
            k: neighbours, at least 1.
            choice: what may be found; everything that is alive by default.
            widest: with a choice, probe every list at once.

        Yields:
            Each query once, in any order.
        """
        count = choice.count if choice else self._items
        selective = choice is not None or self._tombstones > 0
        width, most = self._widths(count) if selective else (0, 0)
        pending = [(np.arange(len(queries)), min(k + 1, count), most if widest else width)]
        while pending:
            places, depth, width = pending.pop()
            for block in np.split(places, range(_fitting(depth), len(places), _fitting(depth))):
                scores, rows = self._once(queries[block], depth, choice, width)
                short = ((rows[:, :k] >= 0).sum(axis=1) < min(k, count)) & (width < most)
                tied = np.zeros_like(short)
                if depth < count:
                    # An index that finds fewer says -1: there is nothing more to come.
                    tied = ~short & (rows[:, -1] >= 0) & (scores[:, -1] == scores[:, k - 1])
                done = ~(short | tied)
                if done.any():
                    yield Found(block[done], scores[done], rows[done])
                if short.any():
                    pending.append((block[short], depth, min(2 * width, most)))
                if tied.any():
                    pending.append((block[tied], min(2 * depth, count), width))

    def nearest(self, queries: Matrix, k: int) -> tuple[Matrix, Ids]:
        """Scores and row ids [n, k] of the best, -inf and -1 where there are no more; ties fall as they may."""
        return self._once(queries, k, None, width_of(self._inner) or 0)

    def _widths(self, count: int) -> tuple[int, int]:
        """How wide to search for ``count`` of all vectors, and how wide one may."""
        scale = (self._items + self._tombstones) / count
        if isinstance(self._inner, faiss.IndexIVF):
            most = self._inner.nlist
            return min(math.ceil(self._inner.nprobe * scale**LISTS_GROWTH), most), most
        if isinstance(self._inner, faiss.IndexHNSW):
            tuned = self._inner.hnsw.efSearch
            width = max(tuned, min(math.ceil(tuned * scale**GRAPH_GROWTH), MAX_EF_SEARCH))
            return width, width
        return 0, 0

    def _once(self, queries: Matrix, depth: int, choice: Choice | None, width: int) -> tuple[Matrix, Ids]:
        """Scores and row ids [n, depth] over all parts."""
        if choice is None and not self._tombstones:
            found = self._unrestricted(queries, depth)
        elif isinstance(self._inner, faiss.IndexIVF | faiss.IndexHNSW | faiss.IndexFlat | faiss.IndexScalarQuantizer):
            selector = self._selector(choice)
            # A part translates the selector inside its parameters: each has its own.
            found = [shard.search(queries, depth, params=self._params(selector, width)) for shard in self._shards]
        else:
            found = [self._sifted(shard, queries, depth, choice) for shard in self._shards]
        scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
        scores[rows < 0] = -np.inf
        if len(found) > 1:
            order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
            scores, rows = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
        return scores, rows

    def _unrestricted(self, queries: Matrix, depth: int) -> list[tuple[Matrix, Ids]]:
        """Scores and row ids [n, depth] of each part, searched as it was tuned."""
        if not self._same_lists:
            return [shard.search(queries, depth) for shard in self._shards]
        near, lists = self._inner.quantizer.search(queries, self._inner.nprobe)
        return [shard.search_preassigned(queries, depth, lists, near) for shard in self._shards]

    def _selector(self, choice: Choice | None) -> Any:
        alive = faiss.IDSelectorRange(0, MAX_ROW_ID)
        if choice is None:
            return alive
        if choice.only:
            return faiss.IDSelectorBatch(choice.rows)
        others = faiss.IDSelectorNot(faiss.IDSelectorBatch(choice.rows))
        return faiss.IDSelectorAnd(alive, others) if self._tombstones else others

    def _params(self, selector: Any, width: int) -> Any:
        """Parameters replace what the index was tuned to: all of it is carried over."""
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

    def _sifted(self, shard: Any, queries: Matrix, depth: int, choice: Choice | None) -> tuple[Matrix, Ids]:
        """Search of an index that takes no selector: deeper until enough of what it finds may be found."""
        count = choice.count if choice else self._items
        reach = math.ceil(depth * (self._items + self._tombstones) / count)
        while True:
            reach = min(2 * reach, max(shard.ntotal, depth))
            blocks = np.split(queries, range(_fitting(reach), len(queries), _fitting(reach)))
            parts = [_sift(shard.search(block, reach), depth, choice) for block in blocks]
            scores, rows = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
            if reach >= shard.ntotal or (rows[:, -1] >= 0).all():
                return scores, rows


def _sift(found: tuple[Matrix, Ids], depth: int, choice: Choice | None) -> tuple[Matrix, Ids]:
    """The first ``depth`` that may be found, in their order, then -1."""
    scores, rows = found
    allowed = choice.allows(rows) if choice else rows >= 0
    rows = np.where(allowed, rows, -1)
    order = np.argsort(~allowed, axis=1, kind="stable")[:, :depth]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def contains(known: Ids, rows: Ids) -> NDArray[np.bool_]:
    """Which of some row ids are among sorted ones."""
    if not len(known):
        return np.zeros(rows.shape, bool)
    found: NDArray[np.bool_] = known[np.minimum(np.searchsorted(known, rows), len(known) - 1)] == rows
    return found


def _fitting(depth: int) -> int:
    return max(1, CELLS // depth)


def _chain(index: Any) -> Iterator[Any]:
    """An index and what it wraps: maps of ids, transforms, at last what holds the vectors."""
    index = faiss.downcast_index(index)
    yield index
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
        yield index


def _innermost(index: Any) -> Any:
    *_, last = _chain(index)
    return last


def lists_of(index: Any) -> Any:
    """The inverted lists' own index inside an index; None where there are none."""
    return faiss.try_extract_index_ivf(index)


def graph_of(index: Any) -> Any:
    """The HNSW index inside an index; None where there is none."""
    inside = _innermost(index)
    return inside if isinstance(inside, faiss.IndexHNSW) else None


def width_of(index: Any) -> int | None:
    """How widely an index searches: lists that are probed (nprobe) or efSearch of a graph; None if it has no choice."""
    if (lists := lists_of(index)) is not None:
        return int(lists.nprobe)
    graph = graph_of(index)
    return int(graph.hnsw.efSearch) if graph is not None else None


def set_width(index: Any, width: int | None) -> None:
    """Set what :func:`width_of` tells; None leaves it alone."""
    if width is None:
        return
    if (lists := lists_of(index)) is not None:
        lists.nprobe = width
    elif (graph := graph_of(index)) is not None:
        graph.hnsw.efSearch = width


def widths(index: Any) -> tuple[int, int] | None:
    """The narrowest and the widest search; None if there is no choice."""
    if (lists := lists_of(index)) is not None:
        return 1, int(lists.nlist)
    return (NARROWEST_GRAPH_SEARCH, WIDEST_GRAPH_SEARCH) if graph_of(index) is not None else None

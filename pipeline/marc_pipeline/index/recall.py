"""Recall of an index against exact search: held-out items as queries, their exact neighbours, and how sure it is."""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.index.vectors import Source

# Neighbours beyond k that are kept: what leaves is replaced from them.
SPARE = 32
# Of the best score: what rounding may set two equal ones apart.
TIE_TOLERANCE = 1e-6
# Share of intervals that hold the recall over all items, and the normal distribution's quantile for it.
CONFIDENCE, QUANTILE = 0.99, 2.5758293
# Tuned on a part of as many items as the recall is measured on.
TUNED_ON = 0.5
# Comparisons that are held in memory at a time.
CELLS = 8_000_000
# Row ids that there are not: of a place that counts for nothing, and of one where nothing was found.
UNFIT, NOTHING = -2, -3
MIXED = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]
# Vectors [q, d] and a depth to scores and row ids [q, depth], best first, -1 where there are no more.
Search = Callable[[Matrix, int], tuple[Matrix, Ids]]
Take = Callable[[Ids], Matrix]


@dataclass(frozen=True)
class Neighbours:
    """Exact neighbours of queries as far as they are known.

    Attributes:
        ids: row ids [q, depth], best first; -1 where there are no more.
        scores: inner products [q, depth]; -inf where there are no more.
        floor: [q]; every item whose score is above it is in the row.
    """

    ids: Ids
    scores: Matrix
    floor: Matrix


@dataclass(frozen=True)
class Queries:
    """Items as queries.

    Attributes:
        ids: row ids [q].
        vectors: theirs [q, d].
        held: how many of them, from the first on, measure the recall; the others say how widely to search.
        near: their exact neighbours, themselves left out.
    """

    ids: Ids
    vectors: Matrix
    held: int
    near: Neighbours


@dataclass(frozen=True)
class Recall:
    """Measured recall@k.

    Attributes:
        mean: over the held-out queries.
        low, high: where the recall over all items lies, at 99 % confidence; the mean itself where all were asked.
        queries: how many there were.
    """

    mean: float
    low: float
    high: float
    queries: int


def draw(row_ids: Ids, seed: int) -> NDArray[np.uint64]:
    """A number for every row id that is as good as random, and the same every night (splitmix64)."""
    mixed = row_ids.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIXED[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIXED[1]
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found


def sampled(source: Source, wanted: int, seed: int) -> Ids:
    """Row ids of a random sample, in random order: those with the smallest draws. A night changes few of them."""
    ids, draws = np.empty(0, np.int64), np.empty(0, np.uint64)
    for file in source.files:
        more = source.row_ids(file)
        ids, draws = np.concatenate([ids, more]), np.concatenate([draws, draw(more, seed)])
        if len(ids) > wanted:
            best = np.argpartition(draws, wanted)[:wanted]
            ids, draws = ids[best], draws[best]
    found: Ids = ids[np.lexsort((ids, draws))]
    return found


def held_out(items: int, asked: int) -> tuple[int, int]:
    """How many items measure the recall, and how many are queries in all."""
    held = min(items, asked)
    return held, min(items, held + math.ceil(asked * TUNED_ON))


def depth_of(k: int) -> int:
    """How many neighbours are kept of every query, itself among them."""
    return k + 1 + SPARE


def nothing_near(queries: int, depth: int) -> Neighbours:
    """Before anything was compared."""
    return Neighbours(
        np.full((queries, depth), -1, np.int64),
        np.full((queries, depth), -np.inf, np.float32),
        np.full(queries, -np.inf, np.float32),
    )


def nearest(ids: Ids, vectors: Matrix, batches: Iterable[tuple[Ids, Matrix]], depth: int) -> Neighbours:
    """Exact neighbours of queries among vectors that come in batches.

    Args:
        ids: row ids [q] of the queries, which are not their own neighbours.
        vectors: theirs [q, d].
        batches: row ids [n] and vectors [n, d].
        depth: how many to keep.
    """
    near = nothing_near(len(ids), depth)
    for rows, batch in batches:
        if not (len(rows) and len(ids)):
            continue
        scores, found = faiss.knn(vectors, batch, min(depth, len(batch)), metric=faiss.METRIC_INNER_PRODUCT)
        near = combined(near, _without_own(Neighbours(rows[found], scores, _floor(scores, depth)), ids))
    return near


def combined(one: Neighbours, other: Neighbours) -> Neighbours:
    """Neighbours among the items of both; no item is in the two."""
    depth = max(one.ids.shape[1], other.ids.shape[1])
    ids = np.concatenate([one.ids, other.ids], axis=1)
    scores = np.concatenate([one.scores, other.scores], axis=1)
    best = np.argsort(-scores, axis=1, kind="stable")
    ids, scores = np.take_along_axis(ids, best, axis=1), np.take_along_axis(scores, best, axis=1)
    cut = scores[:, depth] if scores.shape[1] > depth else np.full(len(ids), -np.inf, np.float32)
    return Neighbours(ids[:, :depth], scores[:, :depth], np.maximum(np.maximum(one.floor, other.floor), cut))


def without(near: Neighbours, removed: Ids) -> Neighbours:
    """Neighbours once some items have left: what is above the floor is still all that there is."""
    gone = np.isin(near.ids, removed)
    ids, scores = np.where(gone, -1, near.ids), np.where(gone, -np.inf, near.scores)
    best = np.argsort(-scores, axis=1, kind="stable")
    return replace(near, ids=np.take_along_axis(ids, best, axis=1), scores=np.take_along_axis(scores, best, axis=1))


def known(near: Neighbours, k: int, items: int) -> NDArray[np.bool_]:
    """Of which queries the scores of the first k neighbours are certain, if not which of those that tie are listed."""
    k = min(k, items - 1)
    if not k:
        return np.ones(len(near.ids), np.bool_)
    certain: NDArray[np.bool_] = near.scores[:, k - 1] >= near.floor
    return certain


def recalled(queries: Queries, search: Search, take: Take, k: int, items: int, *, held: bool) -> NDArray[np.float64]:
    """Recall@k of every query, of those that are held out or of those that are not.

    Args:
        queries: with their exact neighbours.
        search: the index.
        take: vectors [n, d] of row ids [n], for what ties with the last neighbour and is not listed.
        k: neighbours that count, fewer where there are fewer.
        items: in the index.
        held: which queries to ask.
    """
    chosen = slice(0, queries.held) if held else slice(queries.held, None)
    own, asked, near = queries.ids[chosen], queries.vectors[chosen], queries.near
    k = min(k, items - 1)
    if not k:
        return np.ones(len(own))
    _, found = search(asked, k + 1)
    found = _first(np.where(found == own[:, None], -1, found), k)
    ids, scores = near.ids[chosen], near.scores[chosen]
    least = scores[:, k - 1] - _tolerance(scores)
    fits = np.where(scores >= least[:, None], ids, UNFIT)
    step = max(1, CELLS // (k * fits.shape[1]))
    right = np.concatenate(
        [(found[n : n + step, :, None] == fits[n : n + step, None, :]).any(axis=2) for n in range(0, len(found), step)]
        or [np.zeros(found.shape, np.bool_)]
    )
    # Where the list ends among those that tie, what is not in it is judged by its own score.
    open_end = least <= near.floor[chosen]
    rows, places = np.nonzero(~right & (found >= 0) & open_end[:, None])
    if len(rows):
        others, which = np.unique(found[rows, places], return_inverse=True)
        right[rows, places] = np.einsum("nd,nd->n", asked[rows], take(others)[which]) >= least[rows]
    shares: NDArray[np.float64] = right.sum(axis=1) / k
    return shares


def bounded(shares: NDArray[np.float64], items: int) -> Recall:
    """The recall over all items, from that of a random sample of them.

    The bounds are Wilson's for as many yes-or-no answers as tell as much as the sample does, with the correction for a
    sample that is no small part of all items.

    Args:
        shares: recall [q] of the sample's queries.
        items: how many there are.
    """
    n, mean = len(shares), float(shares.mean())
    missing = (items - n) / max(1, items - 1)
    if not missing:
        return Recall(mean, mean, mean, n)
    spread = float(shares.var(ddof=1)) if n > 1 else 0.0
    answers = n * mean * (1 - mean) / spread if spread else float(n)
    answers, z = max(answers, 1.0) / missing, QUANTILE
    middle = (mean + z * z / (2 * answers)) / (1 + z * z / answers)
    reach = z / (1 + z * z / answers) * math.sqrt(mean * (1 - mean) / answers + z * z / (4 * answers**2))
    return Recall(mean, min(mean, max(0.0, middle - reach)), max(mean, min(1.0, middle + reach)), n)


def to_bytes(queries: Queries) -> bytes:
    """Queries and their neighbours as a file."""
    near, file = queries.near, io.BytesIO()
    np.savez(file, ids=queries.ids, vectors=queries.vectors, held=queries.held, near_ids=near.ids,
             near_scores=near.scores, floor=near.floor)  # fmt: skip
    return file.getvalue()


def from_bytes(data: bytes) -> Queries:
    """What :func:`to_bytes` wrote.

    Raises:
        ValueError, KeyError: it is something else.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as held:
        near = Neighbours(held["near_ids"], held["near_scores"], held["floor"])
        return Queries(held["ids"], held["vectors"], int(held["held"]), near)


def _tolerance(scores: Matrix) -> Matrix:
    """By how much scores [q, n], the best of each query first, may differ and still be equal [q]."""
    found: Matrix = np.float32(TIE_TOLERANCE) * np.abs(scores[:, 0])
    return found


def _floor(scores: Matrix, depth: int) -> Matrix:
    """What is below the last of a whole row of neighbours is not known."""
    if scores.shape[1] < depth:
        return np.full(len(scores), -np.inf, np.float32)
    return scores[:, -1].copy()


def _without_own(near: Neighbours, own: Ids) -> Neighbours:
    mine = near.ids == own[:, None]
    return replace(near, ids=np.where(mine, -1, near.ids), scores=np.where(mine, -np.inf, near.scores))


def _first(ids: Ids, k: int) -> Ids:
    """The first k of each row that are there, in their order."""
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    found: Ids = np.take_along_axis(ids, order, axis=1)
    return np.where(found < 0, NOTHING, found)

"""Recall of an index against exact search: sampled queries, their exact neighbours, and a confidence interval."""

import io
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.index.vectors import Ids, Matrix, TableVectors

# Number of spare neighbours beyond k, which replace removed ones.
SPARE = 32
# Relative to the best score: scores this close count as equal, because of rounding.
TIE_TOLERANCE = 1e-6
# The normal distribution's quantile for a 99 % confidence interval.
QUANTILE = 2.5758293
# Tuning queries per held-out query.
TUNED_ON = 0.5
# Number of comparisons in memory at a time.
CELLS = 8_000_000
# Row ids that never occur: UNFIT marks a place that does not count, NOTHING a missing result.
UNFIT, NOTHING = -2, -3
MIXED = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

# From vectors [q, d] and a depth to scores and row ids [q, depth], best first; missing results are -1.
Search = Callable[[Matrix, int], tuple[Matrix, Ids]]
Take = Callable[[Ids], Matrix]


@dataclass(frozen=True)
class ExactNeighbours:
    """Known exact neighbours of queries.

    Attributes:
        ids: row ids [q, depth], best first; -1 for missing results.
        scores: inner products [q, depth]; -inf for missing results.
        floor: [q]; every item with a score above the floor is in the row.
    """

    ids: Ids
    scores: Matrix
    floor: Matrix

    def rows(self, chosen: NDArray[np.bool_] | Ids) -> "ExactNeighbours":
        """The neighbours of some queries, by mask or by number."""
        return ExactNeighbours(self.ids[chosen], self.scores[chosen], self.floor[chosen])


@dataclass(frozen=True)
class RecallQueries:
    """Items that serve as queries of the recall measurement.

    Attributes:
        ids: row ids [q].
        vectors: query vectors [q, d].
        held: the first ``held`` queries measure the recall, the others tune the search width.
        near: exact neighbours of each query, without the query itself.
    """

    ids: Ids
    vectors: Matrix
    held: int
    near: ExactNeighbours


@dataclass(frozen=True)
class Recall:
    """Measured recall@k.

    Attributes:
        mean: mean over the held-out queries.
        low, high: 99 % confidence interval of the recall over all items; equal to the mean if all items are queries.
        queries: number of held-out queries.
    """

    mean: float
    low: float
    high: float
    queries: int


def random_keys(row_ids: Ids, seed: int) -> NDArray[np.uint64]:
    """A pseudo-random number per row id, the same in every run (splitmix64)."""
    mixed = row_ids.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * MIXED[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * MIXED[1]
    found: NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return found


def sample_row_ids(source: TableVectors, wanted: int, seed: int) -> Ids:
    """Row ids of a random sample, in random order. Few of them change from one nightly run to the next."""
    ids, keys = np.empty(0, np.int64), np.empty(0, np.uint64)
    for file in source.files:
        more = source.open(file).row_ids()
        ids, keys = np.concatenate([ids, more]), np.concatenate([keys, random_keys(more, seed)])
        if len(ids) > wanted:
            best = np.argpartition(keys, wanted)[:wanted]
            ids, keys = ids[best], keys[best]
    found: Ids = ids[np.lexsort((ids, keys))]
    return found


def query_counts(items: int, wanted: int) -> tuple[int, int]:
    """The number of held-out queries, and of held-out and tuning queries together."""
    held = min(items, wanted)
    return held, min(items, held + math.ceil(wanted * TUNED_ON))


def neighbours_kept(k: int) -> int:
    """The number of neighbours to keep per query, one of them for the query itself."""
    return k + 1 + SPARE


def no_neighbours(queries: int, depth: int) -> ExactNeighbours:
    """The empty result, before the first comparison."""
    return ExactNeighbours(
        np.full((queries, depth), -1, np.int64),
        np.full((queries, depth), -np.inf, np.float32),
        np.full(queries, -np.inf, np.float32),
    )


def exact_neighbours(ids: Ids, vectors: Matrix, batches: Iterable[tuple[Ids, Matrix]], depth: int) -> ExactNeighbours:
    """Exact neighbours of queries among vectors that come in batches.

    Args:
        ids: row ids [q] of the queries; a query is not its own neighbour.
        vectors: query vectors [q, d].
        batches: row ids [n] and vectors [n, d].
        depth: neighbours to keep per query.
    """
    near = no_neighbours(len(ids), depth)
    for rows, batch in batches:
        if not (len(rows) and len(ids)):
            continue
        scores, found = faiss.knn(vectors, batch, min(depth, len(batch)), metric=faiss.METRIC_INNER_PRODUCT)
        found_here = ExactNeighbours(rows[found], scores, _floor(scores, depth))
        near = merge_neighbours(near, _masked(found_here, found_here.ids == ids[:, None]))
    return near


def merge_neighbours(one: ExactNeighbours, other: ExactNeighbours) -> ExactNeighbours:
    """Neighbours among two disjoint sets of items."""
    depth = max(one.ids.shape[1], other.ids.shape[1])
    ids = np.concatenate([one.ids, other.ids], axis=1)
    scores = np.concatenate([one.scores, other.scores], axis=1)
    ids, scores = _by_score(ids, scores)
    cut = scores[:, depth] if scores.shape[1] > depth else np.full(len(ids), -np.inf, np.float32)
    return ExactNeighbours(ids[:, :depth], scores[:, :depth], np.maximum(np.maximum(one.floor, other.floor), cut))


def without_items(near: ExactNeighbours, removed: Ids) -> ExactNeighbours:
    """Neighbours after some items were removed. The floor stays valid."""
    left = _masked(near, np.isin(near.ids, removed))
    return ExactNeighbours(*_by_score(left.ids, left.scores), near.floor)


def certain(near: ExactNeighbours, k: int, items: int) -> NDArray[np.bool_]:
    """True if the top-k scores of a query are exact; ties may be incomplete."""
    k = min(k, items - 1)
    if not k:
        return np.ones(len(near.ids), np.bool_)
    found: NDArray[np.bool_] = near.scores[:, k - 1] >= near.floor
    return found


def recall_per_query(
    queries: RecallQueries, search: Search, take: Take, k: int, items: int, *, held: bool
) -> NDArray[np.float64]:
    """Recall@k of every held-out query, or of every tuning query.

    Args:
        queries: with their exact neighbours.
        search: the index.
        take: vectors [n, d] of row ids [n], to score results that may tie with the last neighbour but are not listed.
        k: neighbours that count; fewer if there are fewer items.
        items: number of items in the index.
        held: held-out queries if true, tuning queries otherwise.
    """
    chosen = slice(0, queries.held) if held else slice(queries.held, None)
    own, vectors, near = queries.ids[chosen], queries.vectors[chosen], queries.near
    k = min(k, items - 1)
    if not k:
        return np.ones(len(own))
    _, found = search(vectors, k + 1)
    found = _first(np.where(found == own[:, None], -1, found), k)
    ids, scores = near.ids[chosen], near.scores[chosen]
    least = scores[:, k - 1] - np.float32(TIE_TOLERANCE) * np.abs(scores[:, 0])
    fits = np.where(scores >= least[:, None], ids, UNFIT)
    step = max(1, CELLS // (k * fits.shape[1]))
    right = np.concatenate(
        [(found[n : n + step, :, None] == fits[n : n + step, None, :]).any(axis=2) for n in range(0, len(found), step)]
        or [np.zeros(found.shape, np.bool_)]
    )
    # If the list ends within a tie, a result that is not listed counts if its score reaches the k-th score.
    open_end = least <= near.floor[chosen]
    rows, places = np.nonzero(~right & (found >= 0) & open_end[:, None])
    if len(rows):
        others, which = np.unique(found[rows, places], return_inverse=True)
        right[rows, places] = np.einsum("nd,nd->n", vectors[rows], take(others)[which]) >= least[rows]
    shares: NDArray[np.float64] = right.sum(axis=1) / k
    return shares


def estimate_recall(shares: NDArray[np.float64], items: int) -> Recall:
    """The recall over all items, estimated from that of a random sample.

    The interval is Wilson's, with the finite-population correction. Its number of trials is that of a binomial sample
    whose mean has the same variance.

    Args:
        shares: recall [q] of the sampled queries.
        items: number of all items.
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


def to_bytes(queries: RecallQueries) -> bytes:
    """Queries and their neighbours as an .npz file."""
    near, file = queries.near, io.BytesIO()
    np.savez(file, ids=queries.ids, vectors=queries.vectors, held=queries.held, near_ids=near.ids,
             near_scores=near.scores, floor=near.floor)  # fmt: skip
    return file.getvalue()


def from_bytes(data: bytes) -> RecallQueries:
    """Read the file that :func:`to_bytes` wrote.

    Raises:
        ValueError, KeyError: the data is not such a file.
    """
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        near = ExactNeighbours(file["near_ids"], file["near_scores"], file["floor"])
        return RecallQueries(file["ids"], file["vectors"], int(file["held"]), near)


def _floor(scores: Matrix, depth: int) -> Matrix:
    """The floor of each query: the lowest score in its list if the list is full, else -inf."""
    if scores.shape[1] < depth:
        return np.full(len(scores), -np.inf, np.float32)
    return scores[:, -1].copy()


def _masked(near: ExactNeighbours, mask: NDArray[np.bool_]) -> ExactNeighbours:
    """Neighbours with the masked places emptied."""
    return replace(near, ids=np.where(mask, -1, near.ids), scores=np.where(mask, -np.inf, near.scores))


def _by_score(ids: Ids, scores: Matrix) -> tuple[Ids, Matrix]:
    """Ids and scores of each row, best first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)


def _first(ids: Ids, k: int) -> Ids:
    """The first k ids of each row that are not -1, in their order."""
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :k]
    found: Ids = np.take_along_axis(ids, order, axis=1)
    return np.where(found < 0, NOTHING, found)

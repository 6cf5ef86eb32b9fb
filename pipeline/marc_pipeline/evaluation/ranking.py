"""Ranks of the test part's positives among all items: Recall@10 and NDCG@10, without sampled items.

Krichene and Rendle 2020, On Sampled Metrics for Item Recommendation (KDD): metrics over sampled items may order
systems differently, so every item of the catalogue competes, except those that the user took before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from marc_pipeline.evaluation.click_data import ClickData

BEST = 10
RANKED_PAIRS = 50_000_000
"""Most pairs of a positive and an item; of more positives, a sample is ranked."""
AT_ONCE = 64
SAMPLE_SEED = 0


@dataclass(frozen=True)
class Ranking:
    """Means over the ranked positives of the test part.

    Attributes:
        recall: share of the positives that the click model ranks among the first 10 items.
        ndcg: mean of 1 / log2(1 + rank) for ranks up to 10, else 0.
        lookup_recall: share among the 10 items whose vectors have the highest cosine with the mean vector of the
            user's history; users without a history count as 0.
    """

    recall: float
    ndcg: float
    lookup_recall: float


def ranking(data: ClickData, table: Tensor, logits: Callable[[Tensor, Tensor], Tensor], systems: int) -> list[Ranking]:
    """Return the ranking of each system.

    Args:
        data: interactions with sampled negatives.
        table: vectors of all systems and a row of zeros for padding, float32 [n_items + 1, g · d].
        logits: returns logits [g, n, n_items] for users [n] and histories [n, k].
        systems: g.
    """
    rows = _ranked_rows(data)
    clicks = np.where(data.clicks[rows] < 0, data.n_items, data.clicks[rows])
    ranks: list[NDArray[np.float64]] = []
    looked_up: list[NDArray[np.float64]] = []
    vectors = functional.normalize(
        table[:-1].view(data.n_items, systems, table.shape[1] // systems).transpose(0, 1), dim=2
    )
    for start in range(0, len(rows), AT_ONCE):
        some, history = rows[start : start + AT_ONCE], torch.from_numpy(clicks[start : start + AT_ONCE])
        mean = functional.embedding_bag(history, table, mode="mean", padding_idx=data.n_items)
        cosines = mean.view(len(some), systems, mean.shape[1] // systems).transpose(0, 1) @ vectors.mT
        for scores, found in ((logits(torch.from_numpy(data.users[some]), history), ranks), (cosines, looked_up)):
            found.append(_ranks(scores, some, data))
    by_model, by_lookup = np.concatenate(ranks, axis=1), np.concatenate(looked_up, axis=1)
    return [
        Ranking(
            recall=float((model <= BEST).mean()),
            ndcg=float(np.where(model <= BEST, 1 / np.log2(1 + model), 0).mean()),
            lookup_recall=float(((lookup <= BEST) & (data.clicks[rows, 0] >= 0)).mean()),
        )
        for model, lookup in zip(by_model, by_lookup, strict=True)
    ]


def _ranked_rows(data: ClickData) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = data.split.test.start + np.flatnonzero(data.labels[data.split.test] > 0)
    most = max(1, RANKED_PAIRS // data.n_items)
    if len(rows) <= most:
        return rows
    chosen: NDArray[np.int64] = np.sort(np.random.default_rng(SAMPLE_SEED).choice(rows, most, replace=False))
    return chosen


def _ranks(scores: Tensor, rows: NDArray[np.int64], data: ClickData) -> NDArray[np.float64]:
    """Return the ranks [g, n] of the rows' items, from 1, among the items that their users had not taken before.

    Items with equal scores share their mean rank.
    """
    targets = torch.from_numpy(data.items[rows])
    own = scores.gather(2, targets.view(1, -1, 1).expand(len(scores), -1, 1))  # [g, n, 1]
    for place, row in enumerate(rows):
        first = data.users[row] * data.n_items
        start, end = np.searchsorted(data.taken, (first, first + data.n_items))
        scores[:, place, torch.from_numpy(data.taken[start:end] - first)] = -torch.inf
    above, equal = (scores > own).sum(dim=2), (scores == own).sum(dim=2)
    # The item itself is among the equal ones, unless it was taken before.
    ranks: NDArray[np.float64] = (1 + above + (equal - 1).clamp(min=0) / 2).numpy()
    return ranks

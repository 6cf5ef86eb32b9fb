"""Statistics of an evaluation: means over seeds, and differences between systems with intervals."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from marc_pipeline.evaluation.click_data import ClickData
from marc_schemas.evaluation import Summary, SystemScore

CONFIDENCE = 0.95
USER_DRAWS = 1000
DRAW_SEED = 0
RANDOM = "random"
MEANS = ("auc", "cold_auc", "warm_auc", "log_loss", "recall", "ndcg", "lookup_recall", "train_seconds")
BYTES_PER_NUMBER = 4

Key = tuple[str, int]
Predictions = Mapping[tuple[str, int, int], NDArray[np.float32]]
"""Probability of a click, float32 [test rows], by system, dimension and seed."""


@dataclass(frozen=True)
class PairedDifference:
    """The difference between two systems in one figure, paired by seed.

    Attributes:
        mean: mean difference over seeds.
        low, high: 95 % interval of the mean (Student's t); None with one seed.
        p_value: paired t-test, two-sided; None with one seed.
        seeds: number of seeds that both systems have.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    seeds: int


class WeightedAUC:
    """AUC of fixed predictions for varying weights of the rows. It sorts once; each call takes linear time.

    Args:
        labels: [n], above 0 for a click.
        predictions: [n]; a pair of equal predictions counts half.
    """

    def __init__(self, labels: NDArray[np.float32], predictions: NDArray[np.float32]) -> None:
        self._order = np.argsort(predictions)
        ranked = predictions[self._order]
        self._ties = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        self._clicked = labels[self._order] > 0

    def __call__(self, weights: NDArray[Any]) -> float:
        """Return Σ w_p w_n ([s_p > s_n] + [s_p = s_n] / 2) / Σ w_p w_n over clicks p and other rows n.

        The result is NaN without a pair. Weights [n] must not be negative.
        """
        ranked = weights[self._order]
        clicks = np.add.reduceat(np.where(self._clicked, ranked, 0), self._ties)
        others = np.add.reduceat(np.where(self._clicked, 0, ranked), self._ties)
        pairs = float(clicks.sum()) * float(others.sum())
        below = np.cumsum(others) - others
        # A product with @ would start BLAS threads, which took 20 times as long on busy cores.
        return float((clicks * (below + others / 2)).sum()) / pairs if pairs else math.nan


def summarise(
    scores: Sequence[SystemScore], predictions: Predictions, data: ClickData, *, comparison: str
) -> list[Summary]:
    """Return means over seeds, and differences to the comparison system, in the order of the scores.

    Predictions may be incomplete; a system without predictions has no interval over test users.

    Raises:
        ValueError: there are two scores for one system, dimension and seed.
    """
    runs = runs_of(scores)
    summaries = []
    for key in runs:
        rival = _rival(key, runs, comparison)
        summary = _means(key, list(runs[key].values()))
        if rival is not None:
            summary = summary.model_copy(update=_differences(key, rival, runs, predictions, data))
        summaries.append(summary)
    return summaries


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> PairedDifference | None:
    """Return the difference of two systems' figures by seed; None if they share no seed, or a figure is NaN."""
    pairs = np.array([(one[seed], other[seed]) for seed in one if seed in other]).reshape(-1, 2)
    mean = float((pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else math.nan
    if math.isnan(mean):
        return None
    if len(pairs) == 1:
        return PairedDifference(mean, None, None, None, 1)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # All differences may be nearly equal.
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        test = stats.ttest_rel(pairs[:, 0], pairs[:, 1])
    interval = test.confidence_interval(CONFIDENCE)
    # For identical systems, t is 0 / 0.
    p_value = 1.0 if math.isnan(test.pvalue) else float(test.pvalue)
    return PairedDifference(mean, float(interval.low), float(interval.high), p_value, len(pairs))


def beats_random(summaries: Sequence[Summary], predictions: Predictions, data: ClickData) -> bool:
    """Return whether the best system is better than random vectors of its dimension for other test users, too.

    The confidence is shared among all systems, because the best of many is above random vectors by chance. Without
    random vectors the answer is yes.
    """
    rivals = [s for s in summaries if s.family != "reference"]
    found = []
    for dim in {s.dim for s in summaries if s.system == RANDOM}:
        same = [s for s in rivals if s.dim == dim]
        if not same:
            continue
        best = max(same, key=lambda s: s.auc)
        keys = ((best.system, dim), (RANDOM, dim))
        one, other = (np.mean([p for key, p in predictions.items() if key[:2] == who], axis=0) for who in keys)
        interval = user_interval(one, other, data, comparisons=len(same))
        found.append(interval is None or interval[0] > 0)
    return any(found) if found else True


def user_interval(
    one: NDArray[np.float32],
    other: NDArray[np.float32],
    data: ClickData,
    *,
    part: slice | None = None,
    comparisons: int = 1,
) -> tuple[float, float] | None:
    """Return the 95 % interval of AUC(one) − AUC(other) over resampled users of a part, each with all rows.

    Args:
        one: predictions [rows of the part].
        other: predictions of the other system; identical predictions give exactly (0, 0).
        data: interactions of the evaluation.
        part: rows of the part; None for the test part.
        comparisons: number of comparisons that share the error of 5 %.

    Returns:
        The interval over 1,000 draws with a fixed seed; None if there is one user only, or no draw has both labels.
    """
    differences = _user_draws(one, other, data, data.split.test if part is None else part)
    if not len(differences):
        return None
    error = (1 - CONFIDENCE) / 2 / comparisons
    low, high = np.quantile(differences, [error, 1 - error])
    return float(low), float(high)


def user_error(one: NDArray[np.float32], other: NDArray[np.float32], data: ClickData, *, part: slice) -> float:
    """Return the standard error of AUC(one) − AUC(other) over the users of a part; 0 for fewer than two users."""
    differences = _user_draws(one, other, data, part)
    return float(differences.std()) if len(differences) else 0.0


def _user_draws(
    one: NDArray[np.float32], other: NDArray[np.float32], data: ClickData, part: slice
) -> NDArray[np.float64]:
    """Return AUC(one) − AUC(other) of each draw of the part's users that has both labels."""
    users, row_users = np.unique(data.users[part], return_inverse=True)
    labels, own = data.labels[part], data.weights[part]
    if len(users) < 2:
        return np.empty(0)
    first, second = WeightedAUC(labels, one), WeightedAUC(labels, other)
    rng = np.random.default_rng(DRAW_SEED)
    found = []
    for _ in range(USER_DRAWS):
        times = np.bincount(rng.integers(len(users), size=len(users)), minlength=len(users))
        weights = times[row_users] * own
        found.append(first(weights) - second(weights))
    differences: NDArray[np.float64] = np.array(found)
    kept: NDArray[np.float64] = differences[~np.isnan(differences)]
    return kept


def runs_of(scores: Sequence[SystemScore]) -> dict[Key, dict[int, SystemScore]]:
    """Return scores by system and dimension, and by seed.

    Raises:
        ValueError: there are two scores for one system, dimension and seed.
    """
    runs: dict[Key, dict[int, SystemScore]] = {}
    for score in scores:
        seeds = runs.setdefault((score.system, score.dim), {})
        if score.seed in seeds:
            raise ValueError(f"{score.system} at dimension {score.dim} has two scores for seed {score.seed}")
        seeds[score.seed] = score
    return runs


def _rival(key: Key, runs: Mapping[Key, Mapping[int, SystemScore]], comparison: str) -> Key | None:
    """Return the comparison system at the same dimension. References may also use its largest dimension."""
    system, dim = key
    dims = [other for name, other in runs if name == comparison]
    if system == comparison or not dims:
        return None
    if dim in dims:
        return comparison, dim
    return (comparison, max(dims)) if next(iter(runs[key].values())).family == "reference" else None


def _means(key: Key, seeds: Sequence[SystemScore]) -> Summary:
    def mean(name: str) -> float:
        return float(np.mean([getattr(score, name) for score in seeds]))

    def deviation(name: str) -> float:
        return float(np.std([getattr(score, name) for score in seeds], ddof=1)) if len(seeds) > 1 else math.nan

    system, dim = key
    return Summary(
        system=system,
        family=seeds[0].family,
        layer=seeds[0].layer,
        dim=dim,
        seeds=len(seeds),
        **{name: mean(name) for name in MEANS},
        **{f"{name}_std": deviation(name) for name in ("auc", "cold_auc", "log_loss", "recall")},
        bytes_per_item=BYTES_PER_NUMBER * dim,
    )


def _differences(
    key: Key, rival: Key, runs: Mapping[Key, Mapping[int, SystemScore]], predictions: Predictions, data: ClickData
) -> dict[str, object]:
    """Return the fields of ``Summary`` with differences."""
    difference = paired_difference(figures_of(runs[key], "auc"), figures_of(runs[rival], "auc"))
    cold = paired_difference(figures_of(runs[key], "cold_auc"), figures_of(runs[rival], "cold_auc"))
    update: dict[str, object] = {"compared_with": rival[0], "cold_difference": cold.mean if cold else None}
    if difference is not None:
        update |= {"difference": difference.mean}
        update |= {name: getattr(difference, name) for name in ("low", "high", "p_value")}
    common = [seed for seed in runs[key] if (*key, seed) in predictions and (*rival, seed) in predictions]
    if common:
        one, other = (np.mean([predictions[*who, seed] for seed in common], axis=0) for who in (key, rival))
        update["user_low"], update["user_high"] = user_interval(one, other, data) or (None, None)
    return update


def figures_of(seeds: Mapping[int, SystemScore], name: str) -> dict[int, float]:
    """Return one figure by seed."""
    return {seed: getattr(score, name) for seed, score in seeds.items()}

"""From scores to statements: means over seeds, differences with their intervals, and what follows in words."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from marc_pipeline.evaluation.click_model import ClickData
from marc_schemas.evaluation import Summary, SystemScore

CONFIDENCE = 0.95
USER_DRAWS = 1000
DRAW_SEED = 0
BYTES_PER_NUMBER = 4

Key = tuple[str, int]
Predictions = Mapping[tuple[str, int, int], NDArray[np.float32]]
"""By system, dimension and seed: probability of a click, float32 [test rows]."""


@dataclass(frozen=True)
class PairedDifference:
    """Mean over seeds of one system's figure minus another's with the same seed.

    Attributes:
        mean: of the differences.
        low: end of the 95 % interval of that mean (Student's t); None with one seed, as the two below.
        high: its other end.
        p_value: paired t-test, two-sided.
        seeds: that both systems have.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None
    seeds: int


class WeightedAUC:
    """AUC of fixed predictions under changing weights of the rows: sorted once, then linear in the rows.

    Args:
        labels: [n], above 0 for a click.
        predictions: [n]; equal ones count half.
    """

    def __init__(self, labels: NDArray[np.float32], predictions: NDArray[np.float32]) -> None:
        self._order = np.argsort(predictions)
        ranked = predictions[self._order]
        self._ties = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1]))
        self._clicked = labels[self._order] > 0

    def __call__(self, weights: NDArray[np.int64] | NDArray[np.float64]) -> float:
        """Σ w_p w_n ([s_p > s_n] + [s_p = s_n] / 2) / Σ w_p w_n over clicks p and others n; NaN without a pair.

        Args:
            weights: [n], not negative.
        """
        ranked = weights[self._order]
        clicks = np.add.reduceat(np.where(self._clicked, ranked, 0), self._ties)
        others = np.add.reduceat(np.where(self._clicked, 0, ranked), self._ties)
        pairs = float(clicks.sum()) * float(others.sum())
        below = np.cumsum(others) - others
        # Not @: BLAS takes threads for it, and waiting for them on busy cores took twenty times as long as the rest.
        return float((clicks * (below + others / 2)).sum()) / pairs if pairs else math.nan


def summarise(
    scores: Sequence[SystemScore], predictions: Predictions, data: ClickData, *, comparison: str
) -> list[Summary]:
    """Means over seeds and differences to the comparison system, in the order in which systems first appear.

    Args:
        scores: one per system, dimension and seed.
        predictions: of the same; without those of a system its interval over test users is None.
        data: what the systems were scored on.
        comparison: the system that the others are compared with.

    Raises:
        ValueError: a system, dimension and seed that is there twice.
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
    """Compare two systems by their figures per seed; None if they share no seed or a figure is NaN.

    Args:
        one: figure by seed.
        other: what is subtracted.
    """
    pairs = np.array([(one[seed], other[seed]) for seed in one if seed in other]).reshape(-1, 2)
    mean = float((pairs[:, 0] - pairs[:, 1]).mean()) if len(pairs) else math.nan
    if math.isnan(mean):
        return None
    if len(pairs) == 1:
        return PairedDifference(mean, None, None, None, 1)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # All differences may be nearly the same.
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        test = stats.ttest_rel(pairs[:, 0], pairs[:, 1])
    interval = test.confidence_interval(CONFIDENCE)
    # Identical systems: t is 0 / 0.
    p_value = 1.0 if math.isnan(test.pvalue) else float(test.pvalue)
    return PairedDifference(mean, float(interval.low), float(interval.high), p_value, len(pairs))


def user_interval(one: NDArray[np.float32], other: NDArray[np.float32], data: ClickData) -> tuple[float, float] | None:
    """95 % interval of AUC(one) − AUC(other) when the test users are drawn anew, with replacement, all rows of each.

    Args:
        one: predictions [test rows].
        other: those of the other system; identical predictions give exactly (0, 0).
        data: whose test rows they are.

    Returns:
        The interval over 1,000 draws, always the same ones; None where there is one user only, or no draw with
        both labels.
    """
    users, row_users = np.unique(data.users[data.split.test], return_inverse=True)
    labels = data.labels[data.split.test]
    if len(users) < 2:
        return None
    first, second = WeightedAUC(labels, one), WeightedAUC(labels, other)
    rng = np.random.default_rng(DRAW_SEED)
    found = []
    for _ in range(USER_DRAWS):
        times = np.bincount(rng.integers(len(users), size=len(users)), minlength=len(users))
        weights = times[row_users]
        found.append(first(weights) - second(weights))
    differences = np.array(found)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        return None
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def runs_of(scores: Sequence[SystemScore]) -> dict[Key, dict[int, SystemScore]]:
    """Scores by system and dimension, and by seed.

    Raises:
        ValueError: a system, dimension and seed that is there twice.
    """
    runs: dict[Key, dict[int, SystemScore]] = {}
    for score in scores:
        seeds = runs.setdefault((score.system, score.dim), {})
        if score.seed in seeds:
            raise ValueError(f"{score.system} at dimension {score.dim} has two scores for seed {score.seed}")
        seeds[score.seed] = score
    return runs


def _rival(key: Key, runs: Mapping[Key, Mapping[int, SystemScore]], comparison: str) -> Key | None:
    """What a system is compared with: the comparison system at its dimension, references if need be at its largest."""
    system, dim = key
    dims = [other for name, other in runs if name == comparison]
    if system == comparison or not dims:
        return None
    if dim in dims:
        return comparison, dim
    return (comparison, max(dims)) if next(iter(runs[key].values())).family == "reference" else None


def _means(key: Key, seeds: Sequence[SystemScore]) -> Summary:
    system, dim = key
    return Summary(
        system=system,
        family=seeds[0].family,
        layer=seeds[0].layer,
        dim=dim,
        seeds=len(seeds),
        auc=_mean([score.auc for score in seeds]),
        auc_std=_deviation([score.auc for score in seeds]),
        cold_auc=_mean([score.cold_auc for score in seeds]),
        cold_auc_std=_deviation([score.cold_auc for score in seeds]),
        warm_auc=_mean([score.warm_auc for score in seeds]),
        log_loss=_mean([score.log_loss for score in seeds]),
        log_loss_std=_deviation([score.log_loss for score in seeds]),
        bytes_per_item=BYTES_PER_NUMBER * dim,
        train_seconds=_mean([score.train_seconds for score in seeds]),
    )


def _mean(figures: Sequence[float]) -> float:
    return float(np.mean(figures))


def _deviation(figures: Sequence[float]) -> float:
    return float(np.std(figures, ddof=1)) if len(figures) > 1 else math.nan


def _differences(
    key: Key, rival: Key, runs: Mapping[Key, Mapping[int, SystemScore]], predictions: Predictions, data: ClickData
) -> dict[str, object]:
    """The fields of ``Summary`` that compare."""
    difference = paired_difference(figures_of(runs[key], "auc"), figures_of(runs[rival], "auc"))
    cold = paired_difference(figures_of(runs[key], "cold_auc"), figures_of(runs[rival], "cold_auc"))
    update: dict[str, object] = {"compared_with": rival[0], "cold_difference": cold.mean if cold else None}
    if difference is not None:
        update |= {
            "difference": difference.mean,
            "low": difference.low,
            "high": difference.high,
            "p_value": difference.p_value,
        }
    common = [seed for seed in runs[key] if (*key, seed) in predictions and (*rival, seed) in predictions]
    if common:
        one, other = (np.mean([predictions[*who, seed] for seed in common], axis=0) for who in (key, rival))
        update["user_low"], update["user_high"] = user_interval(one, other, data) or (None, None)
    return update


def figures_of(seeds: Mapping[int, SystemScore], name: str) -> dict[int, float]:
    """One figure of every seed."""
    return {seed: getattr(score, name) for seed, score in seeds.items()}

"""Statistics against scipy, scikit-learn and calculation by hand."""

import math
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from marc_pipeline.evaluation import statistics as module
from marc_pipeline.evaluation.click_data import ClickData
from marc_pipeline.evaluation.statistics import (
    PairedDifference,
    WeightedAUC,
    paired_difference,
    summarise,
    user_interval,
)
from marc_schemas.evaluation import Summary, SystemScore
from score_cases import NO_ROWS, click_rows, score, scores


def noisy(data: ClickData, *, seed: int, strength: float = 1.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    logits = strength * (data.labels - 0.5) + rng.normal(size=len(data.labels))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def population(rows: int, users: int) -> ClickData:
    rng = np.random.default_rng(0)
    return click_rows(rng.integers(users, size=rows).tolist(), (rng.random(rows) < 0.4).astype(float).tolist())


def summarised(entries: Sequence[SystemScore], comparison: str = "marc") -> dict[tuple[str, int], Summary]:
    return {(s.system, s.dim): s for s in summarise(entries, {}, NO_ROWS, comparison=comparison)}


# AUC under weights


ROW = st.tuples(st.booleans(), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5000001, 1.0]), st.integers(0, 4))


@given(rows=st.lists(ROW, min_size=2, max_size=60), fractions=st.booleans())
@settings(max_examples=300, deadline=None)
def test_weighted_auc_is_that_of_scikit_learn(rows: list[tuple[bool, float, int]], fractions: bool) -> None:
    labels = np.array([label for label, _, _ in rows], np.float32)
    predictions = np.array([prediction for _, prediction, _ in rows], np.float32)
    weights = np.array([weight for _, _, weight in rows])
    assume(all(weights[labels == label].sum() > 0 for label in (0, 1)))
    expected = roc_auc_score(labels, predictions, sample_weight=weights)
    repeated = roc_auc_score(labels.repeat(weights), predictions.repeat(weights))
    found = WeightedAUC(labels, predictions)(weights / 7 if fractions else weights)
    assert found == pytest.approx(expected, abs=1e-12)
    assert found == pytest.approx(repeated, abs=1e-12)


def test_weighted_auc_without_a_pair_is_nan() -> None:
    auc = WeightedAUC(np.array([1, 1, 0], np.float32), np.array([0.2, 0.3, 0.1], np.float32))
    assert auc(np.array([1, 1, 1])) == 1
    assert math.isnan(auc(np.array([1, 1, 0])))
    assert math.isnan(auc(np.array([0, 0, 5])))


# Differences between seeds


FIGURE = st.floats(0.5, 0.9)


@given(pairs=st.lists(st.tuples(FIGURE, FIGURE), min_size=2, max_size=12))
@settings(max_examples=200, deadline=None)
def test_interval_and_p_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    one, other = zip(*pairs, strict=True)
    assume(np.std(np.subtract(one, other)) > 1e-6)
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    found = paired_difference(dict(enumerate(one)), dict(enumerate(other)))
    assert found is not None
    assert found.mean == pytest.approx(np.mean(one) - np.mean(other), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.seeds == len(pairs)


def test_a_difference_by_hand() -> None:
    # Differences .01, .02, .03: mean .02, deviation .01, standard error .01 / √3; t(.975, 2) = 4.302653.
    found = paired_difference({0: 0.71, 1: 0.73, 2: 0.73}, {0: 0.70, 1: 0.71, 2: 0.70})
    assert found is not None
    assert found.mean == pytest.approx(0.02)
    assert found.low == pytest.approx(0.02 - 4.302653 * 0.01 / math.sqrt(3))
    assert found.high == pytest.approx(0.02 + 4.302653 * 0.01 / math.sqrt(3))
    # t = 2√3 with two degrees of freedom: p = 1 − t / √(2 + t²).
    assert found.p_value == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        # Without a spread, p is 0, or 1 for identical figures.
        ({0: 0.5, 1: 0.625, 2: 0.75}, {0: 0.5, 1: 0.625, 2: 0.75}, PairedDifference(0, 0, 0, 1, 3)),
        ({0: 0.75, 1: 0.875, 2: 1}, {0: 0.5, 1: 0.625, 2: 0.75}, PairedDifference(0.25, 0.25, 0.25, 0, 3)),
        ({4: 0.75}, {4: 0.5}, PairedDifference(0.25, None, None, None, 1)),
        ({3: 0.9, 1: 0.7}, {2: 0.4, 9: 0.1}, None),
        ({}, {}, None),
        ({0: math.nan, 1: 0.5}, {0: 0.5, 1: 0.5}, None),
    ],
)
def test_differences_without_a_spread_a_common_seed_or_a_number(
    one: dict[int, float], other: dict[int, float], expected: PairedDifference | None
) -> None:
    assert paired_difference(one, other) == expected


def test_runs_are_paired_by_the_seeds_that_both_systems_have() -> None:
    found = paired_difference({3: 0.9, 1: 0.7, 2: 0.5}, {2: 0.4, 9: 0.1, 3: 0.6})
    assert found is not None
    assert (found.mean, found.seeds) == (pytest.approx(0.2), 2)


# Resampled test users


def test_the_interval_over_users_equals_a_naive_one_of_repeated_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "USER_DRAWS", 30)
    data = population(200, 12)
    one, other = noisy(data, seed=1, strength=2), noisy(data, seed=2).round(1)
    rng = np.random.default_rng(module.DRAW_SEED)
    users, found = sorted(set(data.users.tolist())), []
    for _ in range(30):
        drawn = [users[place] for place in rng.integers(len(users), size=len(users))]
        rows = np.concatenate([np.flatnonzero(data.users == user) for user in drawn])
        labels = data.labels[rows]
        found.append(roc_auc_score(labels, one[rows]) - roc_auc_score(labels, other[rows]))
    assert user_interval(one, other, data) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])), abs=1e-12)
    low, high = user_interval(one, other, data) or (0, 0)
    assert user_interval(other, one, data) == pytest.approx((-high, -low), abs=1e-12)
    assert user_interval(one, one.copy(), data) == (0, 0)


def test_users_who_disagree_widen_the_interval() -> None:
    # System one is right about half of the users and wrong about the others: rows are many, users few.
    users = np.repeat(np.arange(10), 100)
    labels = np.tile([0.0, 1.0], 500)
    data = click_rows(users.tolist(), labels.tolist())
    right = np.where(users < 5, labels, 1 - labels)
    even = np.where(np.tile([True, True, False, False], 250), labels, 1 - labels)
    low, high = user_interval(right.astype(np.float32), even.astype(np.float32), data) or (0, 0)
    assert low < -0.2 < 0.2 < high


@pytest.mark.parametrize(
    ("users", "labels", "expected"),
    [
        pytest.param([0, 0], [0, 1], None, id="one user"),
        pytest.param([0, 1], [1, 1], None, id="one label"),
        # Half of the draws contain one user twice, and therefore one label, and are skipped.
        pytest.param([0, 1], [0, 1], (1, 1), id="two rows"),
    ],
)
def test_draws_without_both_labels_are_skipped(
    users: list[int], labels: list[float], expected: tuple[float, float] | None
) -> None:
    one, other = np.array([0, 1], np.float32), np.array([1, 0], np.float32)
    assert user_interval(one, other, click_rows(users, labels)) == expected


def test_ten_thousand_rows_take_less_than_three_seconds() -> None:
    data = population(10_000, 600)
    started = time.process_time()
    assert user_interval(noisy(data, seed=1), noisy(data, seed=2), data) is not None
    assert time.process_time() - started < 3


# Summaries


def test_means_and_deviations_are_over_seeds() -> None:
    aucs = [0.70, 0.72, 0.71]
    entries = [
        score("marc", 32, seed, auc, cold_auc=auc / 2, warm_auc=auc / 3, log_loss=auc / 4)
        for seed, auc in enumerate(aucs)
    ]
    (found,) = summarise(entries, {}, NO_ROWS, comparison="marc")
    assert (found.system, found.family, found.dim, found.seeds, found.bytes_per_item) == ("marc", "marc", 32, 3, 128)
    assert (found.auc, found.auc_std) == pytest.approx((0.71, 0.01))
    assert (found.cold_auc, found.cold_auc_std) == pytest.approx((0.355, 0.005))
    assert (found.log_loss, found.log_loss_std) == pytest.approx((0.1775, 0.0025))
    assert found.warm_auc == pytest.approx(0.71 / 3)
    assert found.train_seconds == pytest.approx(11)
    nothing = ("compared_with", "difference", "low", "high", "p_value", "cold_difference", "user_low", "user_high")
    assert [getattr(found, name) for name in nothing] == [None] * len(nothing)


def test_summaries_keep_the_order_of_the_scores() -> None:
    keys = [("pca-layer-3", 64), ("ids", 0), ("marc", 32), ("pca-layer-3", 32), ("marc", 64)]
    assert list(summarised(scores(dict.fromkeys(keys, 0.7)))) == keys


def test_the_difference_is_to_the_comparison_system_at_the_same_dimension() -> None:
    entries = scores({("marc", 32): 0.70, ("mrl", 32): 0.68, ("marc", 64): 0.72, ("mrl", 64): 0.73})
    found = summarised(entries)
    for dim in (32, 64):
        mrl, marc = ([s for s in entries if (s.system, s.dim) == (name, dim)] for name in ("mrl", "marc"))
        expected = stats.ttest_rel([s.auc for s in mrl], [s.auc for s in marc])
        interval = expected.confidence_interval(0.95)
        summary = found["mrl", dim]
        assert summary.compared_with == "marc"
        assert summary.difference == pytest.approx({32: -0.02, 64: 0.01}[dim])
        assert summary.difference == pytest.approx(summary.cold_difference)
        assert (summary.low, summary.high) == pytest.approx((interval.low, interval.high))
        assert summary.p_value == pytest.approx(expected.pvalue)


def test_only_references_are_compared_with_another_dimension_the_largest() -> None:
    aucs = {("ids", 0): 0.67, ("random", 32): 0.66, ("final-full", 384): 0.68, ("marc", 64): 0.72, ("marc", 32): 0.70}
    found = summarised(scores({**aucs, ("mrl", 16): 0.7}))
    assert found["ids", 0].difference == pytest.approx(0.67 - 0.72)
    assert found["final-full", 384].difference == pytest.approx(0.68 - 0.72)
    assert found["random", 32].difference == pytest.approx(0.66 - 0.70)
    assert (found["mrl", 16].compared_with, found["mrl", 16].difference) == (None, None)
    alone = summarised(scores({("mrl", 64): 0.7, ("ids", 0): 0.6}))
    assert all(s.difference is None for s in alone.values())


def test_the_interval_over_users_is_of_predictions_averaged_over_common_seeds() -> None:
    data = population(300, 15)
    entries = [score(system, 32, seed, 0.7) for system in ("marc", "mrl") for seed in range(2)]
    entries.append(score("marc", 32, 2, 0.7))
    keys = [(s.system, s.dim, s.seed) for s in entries]
    predictions = {key: noisy(data, seed=place, strength=1 + place) for place, key in enumerate(keys)}
    _, mrl = summarise(entries, predictions, data, comparison="marc")
    half = np.float32(0.5)
    one, other = (half * (predictions[name, 32, 0] + predictions[name, 32, 1]) for name in ("mrl", "marc"))
    assert (mrl.user_low, mrl.user_high) == user_interval(one, other, data)
    for system in ("marc", "mrl"):
        only = {key: value for key, value in predictions.items() if key[0] == system}
        _, mrl = summarise(entries, only, data, comparison="marc")
        assert (mrl.user_low, mrl.user_high) == (None, None)


def test_one_seed_has_no_deviation_and_without_cold_rows_there_is_no_cold_difference() -> None:
    aucs = {("marc", 32): 0.7, ("mrl", 32): 0.6}
    found = summarised(scores(aucs, seeds=1))["mrl", 32]
    assert math.isnan(found.auc_std)
    assert math.isnan(found.log_loss_std)
    assert found.difference == pytest.approx(-0.1, abs=0.01)
    assert (found.low, found.p_value) == (None, None)
    found = summarised(scores(aucs, cold_auc=math.nan))["mrl", 32]
    assert math.isnan(found.cold_auc)
    assert found.cold_difference is None


def test_two_scores_for_one_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="marc at dimension 32 has two scores for seed 1"):
        summarised([score("marc", 32, 1, 0.7), score("marc", 32, 1, 0.7)])

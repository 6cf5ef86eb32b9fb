"""Statistics against scipy, scikit-learn and calculation by hand; findings that say what the figures say, both ways."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from marc_pipeline.evaluation import statistics as module
from marc_pipeline.evaluation.click_model import ClickData
from marc_pipeline.evaluation.findings import findings
from marc_pipeline.evaluation.statistics import WeightedAUC, paired_difference, summarise, user_interval
from marc_pipeline.training.interactions import Split
from marc_schemas.evaluation import Family, Summary, SystemScore

FAMILIES: dict[str, Family] = {
    "ids": "reference",
    "random": "reference",
    "final-full": "reference",
    "autoencoder": "baseline",
    "mrl": "baseline",
    "marc": "marc",
    "marc-tuned": "marc",
}
JITTER = (0.0, 0.001, -0.001, 0.0005, -0.0005)


def family(system: str) -> Family:
    kinds: dict[str, Family] = {"pca-": "layer", "bundle:": "bundle", "marc-": "ablation"}
    if system in FAMILIES:
        return FAMILIES[system]
    return next(kind for start, kind in kinds.items() if system.startswith(start))


def score(system: str, dim: int, seed: int, auc: float, **changes: Any) -> SystemScore:
    layer = int(system.rpartition("-")[2]) if system.startswith("pca-layer-") else None
    figures: dict[str, Any] = {
        "cold_auc": auc - 0.05,
        "warm_auc": auc + 0.01,
        "log_loss": 0.6,
        "validation_auc": 0.7,
        "epoch": 3,
        "train_seconds": 10.0 + seed,
        "score_seconds": 2.0,
    }
    return SystemScore(
        system=system, family=family(system), layer=layer, dim=dim, seed=seed, auc=auc, **(figures | changes)
    )


def scores(aucs: Mapping[tuple[str, int], float], *, seeds: int = 5, **changes: Any) -> list[SystemScore]:
    """Every system at its AUC; seeds move each in its own way, and five of them leave its mean."""
    return [
        score(system, dim, seed, auc + moved, **changes)
        for place, ((system, dim), auc) in enumerate(aucs.items())
        for seed, moved in enumerate(jitter(place)[:seeds])
    ]


def jitter(place: int) -> list[float]:
    return [float(moved) for moved in np.random.default_rng(place).permutation(JITTER)]


def click_data(users: Sequence[int], labels: Sequence[float]) -> ClickData:
    """Test rows only."""
    n = len(users)
    return ClickData(
        users=np.array(users),
        items=np.zeros(n, np.int64),
        labels=np.array(labels, np.float32),
        clicks=np.full((n, 1), -1),
        split=Split(slice(0, 0), slice(0, 0), slice(0, n)),
        n_users=max(users) + 1,
        n_items=1,
        cold=np.zeros(n, np.bool_),
    )


NO_ROWS = click_data([0], [1])


def noisy(data: ClickData, *, seed: int, strength: float = 1.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    logits = strength * (data.labels - 0.5) + rng.normal(size=len(data.labels))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def population(rows: int, users: int) -> ClickData:
    rng = np.random.default_rng(0)
    return click_data(rng.integers(users, size=rows).tolist(), (rng.random(rows) < 0.4).astype(float).tolist())


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


def test_runs_are_paired_by_seed_and_only_where_both_have_it() -> None:
    found = paired_difference({3: 0.9, 1: 0.7, 2: 0.5}, {2: 0.4, 9: 0.1, 3: 0.6})
    assert found is not None
    assert found.mean == pytest.approx(0.2)
    assert found.seeds == 2
    assert paired_difference({1: 0.7}, {2: 0.7}) is None
    assert paired_difference({}, {}) is None


def test_one_seed_gives_a_difference_and_no_interval() -> None:
    found = paired_difference({4: 0.7}, {4: 0.6})
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert (found.low, found.high, found.p_value, found.seeds) == (None, None, None, 1)


def test_differences_without_spread() -> None:
    figures = {seed: 0.5 + seed / 8 for seed in range(4)}
    same = paired_difference(figures, figures)
    assert same is not None
    assert (same.mean, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    shifted = paired_difference({seed: figure + 0.25 for seed, figure in figures.items()}, figures)
    assert shifted is not None
    assert (shifted.mean, shifted.low, shifted.high, shifted.p_value) == (0.25, 0.25, 0.25, 0)


def test_nan_has_no_difference() -> None:
    assert paired_difference({0: math.nan, 1: 0.5}, {0: 0.5, 1: 0.5}) is None


# Test users drawn anew


def test_identical_systems_differ_by_exactly_nothing() -> None:
    data = population(500, 20)
    predictions = noisy(data, seed=1)
    assert user_interval(predictions, predictions.copy(), data) == (0, 0)


def test_the_interval_over_users_is_that_of_rows_repeated_naively(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_users_who_disagree_widen_the_interval() -> None:
    # System one is right about half of the users and wrong about the others: rows are many, users few.
    users = np.repeat(np.arange(10), 100)
    labels = np.tile([0.0, 1.0], 500)
    data = click_data(users.tolist(), labels.tolist())
    right = np.where(users < 5, labels, 1 - labels)
    even = np.where(np.tile([True, True, False, False], 250), labels, 1 - labels)
    low, high = user_interval(right.astype(np.float32), even.astype(np.float32), data) or (0, 0)
    assert low < -0.2 < 0.2 < high


@pytest.mark.parametrize(("users", "labels"), [([0, 0], [0, 1]), ([0, 1], [1, 1])])
def test_one_user_or_one_label_gives_no_interval(users: list[int], labels: list[float]) -> None:
    predictions = np.array([0.1, 0.2], np.float32)
    assert user_interval(predictions, predictions, click_data(users, labels)) is None


def test_draws_without_both_labels_do_not_count() -> None:
    # Half of the draws take one user twice, which leaves one label.
    data = click_data([0, 1], [0, 1])
    assert user_interval(np.array([0, 1], np.float32), np.array([1, 0], np.float32), data) == (1, 1)


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
    # Nobody is compared with himself.
    nothing = ("compared_with", "difference", "low", "high", "p_value", "cold_difference", "user_low", "user_high")
    assert [getattr(found, name) for name in nothing] == [None] * len(nothing)


def test_systems_keep_the_order_in_which_they_came() -> None:
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


def test_references_of_other_dimensions_are_compared_at_the_largest() -> None:
    aucs = {("ids", 0): 0.67, ("random", 32): 0.66, ("final-full", 384): 0.68, ("marc", 64): 0.72, ("marc", 32): 0.70}
    found = summarised(scores(aucs))
    assert found["ids", 0].difference == pytest.approx(0.67 - 0.72)
    assert found["final-full", 384].difference == pytest.approx(0.68 - 0.72)
    # At its own dimension where there is one.
    assert found["random", 32].difference == pytest.approx(0.66 - 0.70)


def test_other_systems_of_a_dimension_that_the_comparison_lacks_are_not_compared() -> None:
    found = summarised(scores({("marc", 32): 0.7, ("mrl", 64): 0.7}))
    assert (found["mrl", 64].compared_with, found["mrl", 64].difference) == (None, None)
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


def test_one_seed_has_no_deviation() -> None:
    found = summarised(scores({("marc", 32): 0.7, ("mrl", 32): 0.6}, seeds=1))["mrl", 32]
    assert math.isnan(found.auc_std)
    assert math.isnan(found.log_loss_std)
    assert found.difference == pytest.approx(-0.1, abs=0.01)
    assert (found.low, found.p_value) == (None, None)


def test_without_cold_rows_there_is_no_cold_difference() -> None:
    found = summarised(scores({("marc", 32): 0.7, ("mrl", 32): 0.6}, cold_auc=math.nan))["mrl", 32]
    assert math.isnan(found.cold_auc)
    assert found.cold_difference is None


def test_two_scores_for_one_seed_are_refused() -> None:
    with pytest.raises(ValueError, match="marc at dimension 32 has two scores for seed 1"):
        summarised([score("marc", 32, 1, 0.7), score("marc", 32, 1, 0.7)])


# Findings


BASE = {
    ("ids", 0): 0.673,
    ("final-full", 384): 0.680,
    **{(f"pca-layer-{layer}", 32): auc for layer, auc in enumerate([0.689, 0.690, 0.692, 0.679])},
    ("autoencoder", 32): 0.690,
    ("marc", 32): 0.700,
}
CHANGES = [
    ("marc-no-constraints", "leaving out the information constraints"),
    ("marc-crossing", "adding a difference in structure"),
    ("marc-keep", "adding the constraint that z keeps what h holds"),
    ("marc-final", "reading the final layer instead of the chosen one"),
]


def sentences(aucs: Mapping[tuple[str, int], float], *, seeds: int = 5, **changes: Any) -> list[str]:
    entries = scores(aucs, seeds=seeds, **changes)
    return findings(summarise(entries, {}, NO_ROWS, comparison="marc"), entries, layers=3, comparison="marc")


def the_one(found: Sequence[str], *words: str) -> str:
    (sentence,) = [s for s in found if all(word in s for word in words)]
    return sentence


def test_the_mid_layer_advantage_is_there_or_not_or_not_shown() -> None:
    there = the_one(sentences(BASE), "mid-layer advantage at d = 32")
    assert "is confirmed: test AUC 0.6920 for the PCA of layer 2" in there
    assert "0.6790 for the final layer's, +0.0130 (95 % interval +0.0" in there
    deviation = np.std(JITTER, ddof=1)
    assert f"+{0.013 / deviation:.1f} pooled standard deviations" in there
    final_first = sentences(BASE | {("pca-layer-3", 32): 0.699})
    assert "is refuted" in the_one(final_first, "mid-layer advantage")
    even = sentences(BASE | {("pca-layer-3", 32): 0.6921})
    assert "is not confirmed" in the_one(even, "mid-layer advantage")


def test_the_embeddings_are_no_middle_layer() -> None:
    found = sentences(BASE | {("pca-layer-0", 32): 0.6999})
    assert "layer 2, the best middle one" in the_one(found, "mid-layer advantage")
    # As a rival they count.
    assert "marc does not demonstrably beat pca-layer-0, the best of 4 layers" in the_one(found, "pca-layer-0", "beat")


@pytest.mark.parametrize("rival", [("pca-layer-2", 32), ("autoencoder", 32), ("bundle:0123", 32)])
def test_a_rival_is_beaten_or_wins_or_neither(rival: tuple[str, int]) -> None:
    name = rival[0]
    beats = the_one(sentences({**BASE, rival: 0.692}), f"marc beats {name}")
    assert beats.startswith("At d = 32 marc")
    assert "+0.0080 (95 % interval +0.0" in beats
    loses = the_one(sentences({**BASE, rival: 0.710}), f"marc loses to {name}")
    assert "−0.0100 (95 % interval −0.0" in loses
    neither = the_one(sentences({**BASE, rival: 0.7001}), f"marc does not demonstrably beat {name}")
    assert "−0.0001 (95 % interval −0.00" in neither
    assert "5 seeds)." in neither


def test_the_best_layer_is_the_rival_not_every_layer() -> None:
    found = sentences(BASE)
    assert len([s for s in found if "marc beats pca-layer" in s]) == 1
    assert "pca-layer-2, the best of 4 layers by test AUC" in the_one(found, "marc beats pca-layer")


@pytest.mark.parametrize(("ablation", "change"), CHANGES)
def test_an_ablation_says_what_its_part_is_worth(ablation: str, change: str) -> None:
    adds = change.startswith("adding")
    lower, higher, even = (
        the_one(sentences({**BASE, (ablation, 32): auc}), ablation) for auc in (0.692, 0.708, 0.7001)
    )
    assert f"At d = 32 {change} lowers the AUC ({'harmful' if adds else 'worth having'})" in lower
    assert f"{ablation} minus marc is −0.0080 (95 %" in lower
    assert f"{change} raises the AUC ({'worth having' if adds else 'harmful'})" in higher
    assert f"{change} makes no difference that can be shown (worth nothing here)" in even


def test_an_ablation_that_changes_nothing_at_all_is_worth_nothing() -> None:
    entries = scores(BASE)
    entries += [
        s.model_copy(update={"system": "marc-no-constraints", "family": "ablation"})
        for s in entries
        if s.system == "marc"
    ]
    summaries = summarise(entries, {}, NO_ROWS, comparison="marc")
    found = findings(summaries, entries, layers=3, comparison="marc")
    assert "makes no difference" in the_one(found, "marc-no-constraints", "+0.0000 to +0.0000, p = 1.000")


@pytest.mark.parametrize(
    ("cold", "words"),
    [(0.65, "marc is better than"), (0.60, "marc is worse than"), (0.6301, "marc is not demonstrably better or worse")],
)
def test_cold_items_are_told_apart_from_the_rest(cold: float, words: str) -> None:
    moved = {"marc": jitter(1), "pca-layer-2": jitter(2)}
    entries = [
        s.model_copy(update={"cold_auc": (cold if s.system == "marc" else 0.63) + moved[s.system][s.seed]})
        for s in scores({key: auc for key, auc in BASE.items() if key[0] in moved})
    ]
    found = findings(summarise(entries, {}, NO_ROWS, comparison="marc"), entries, layers=3, comparison="marc")
    sentence = the_one(found, "cold items at d = 32")
    assert words in sentence
    assert f"AUC {cold:.4f} and 0.6300, " in sentence


def test_cold_items_that_cannot_be_judged_are_said_to_be_so() -> None:
    assert "no AUC" in the_one(sentences(BASE, cold_auc=math.nan), "Cold items at d = 32")


@pytest.mark.parametrize(
    ("full", "words"),
    [(0.68, "is higher: +0.0200"), (0.72, "is lower: −0.0200"), (0.7001, "is not demonstrably different: −0.0001")],
)
def test_storage_is_set_against_the_full_width(full: float, words: str) -> None:
    found = the_one(sentences({**BASE, ("marc", 64): 0.7, ("final-full", 384): full}), "bytes per item")
    assert "marc at d = 64 takes 256 bytes per item and the full-width final layer 1,536, 6.0 times as much" in found
    assert words in found


@pytest.mark.parametrize(
    ("auc", "words"), [(0.71, "beats"), (0.68, "loses to"), (0.6921, "does not demonstrably beat")]
)
def test_tuned_is_judged_by_the_best_middle_layer(auc: float, words: str) -> None:
    found = sentences({**BASE, ("marc-tuned", 32): auc})
    assert f"At d = 32 marc-tuned {words} pca-layer-2, the best middle layer" in the_one(found, "marc-tuned")
    assert not [s for s in sentences(BASE) if "tuned" in s]


@pytest.mark.parametrize(
    ("gain", "words"), [(0.01, "raises"), (-0.01, "lowers"), (0.0, "does not demonstrably change")]
)
def test_what_lora_gives_is_judged_on_the_validation_part(gain: float, words: str) -> None:
    entries = scores({**BASE, ("marc-final", 32): 0.685, ("marc-tuned", 32): 0.680})
    moved = {"marc-final": (0.70, jitter(1)), "marc-tuned": (0.70 + gain, jitter(2))}
    entries = [
        entry.model_copy(update={"validation_auc": moved[entry.system][0] + moved[entry.system][1][entry.seed]})
        if entry.system in moved
        else entry
        for entry in entries
    ]
    found = findings(summarise(entries, {}, NO_ROWS, comparison="marc"), entries, layers=3, comparison="marc")
    sentence = the_one(found, "LoRA")
    assert f"At d = 32 LoRA on the final layer {words} the validation AUC, marc-tuned against marc-final" in sentence
    assert "on the test part −0.0050" in sentence
    assert not [s for s in sentences({**BASE, ("marc-tuned", 32): 0.68}) if "LoRA" in s]


def test_every_dimension_is_judged() -> None:
    both = BASE | {(system, 64): auc for (system, dim), auc in BASE.items() if dim == 32}
    found = sentences(both)
    for words in ("mid-layer advantage", "beats autoencoder", "cold items"):
        at_32, at_64 = (s for s in found if words in s)
        assert "d = 32" in at_32
        assert "d = 64" in at_64


def test_one_seed_judges_nothing() -> None:
    found = sentences({**BASE, ("marc-no-constraints", 32): 0.6}, seeds=1)
    assert len(found) == 6
    for sentence in found:
        assert "there is no interval to judge by" in sentence
        assert "one seed" in sentence
        assert not any(
            claim in sentence for claim in ("beats", "is confirmed", "worth having", "is better", "is higher")
        )


def test_what_is_missing_is_not_judged() -> None:
    layers = {key: auc for key, auc in BASE.items() if key[0].startswith("pca")}
    found = sentences(layers)
    assert len(found) == 2
    assert "mid-layer advantage" in found[0]
    assert found[1] == "marc was not evaluated: nothing is claimed about it."
    assert sentences({("marc", 32): 0.7}) == []
    middle_only = {key: auc for key, auc in layers.items() if key[0] != "pca-layer-3"}
    assert not [s for s in sentences(middle_only) if "mid-layer" in s]


def test_other_users_are_mentioned_and_may_cast_doubt() -> None:
    entries = scores({("pca-layer-1", 32): 0.69, ("marc", 32): 0.70})
    plain = summarise(entries, {}, NO_ROWS, comparison="marc")
    sure, unsure = (
        [s.model_copy(update={"user_low": low, "user_high": high}) if s.layer else s for s in plain]
        for low, high in ((-0.012, -0.003), (-0.012, 0.003))
    )
    one, other = (
        the_one(findings(summaries, entries, layers=3, comparison="marc"), "marc beats") for summaries in (sure, unsure)
    )
    # The summary subtracts marc; the sentence subtracts from it.
    assert one.endswith("; with resampled test users +0.0030 to +0.0120.")
    assert other.endswith("; with resampled test users −0.0030 to +0.0120, so it may not hold for other users.")


def test_other_users_cast_no_doubt_where_nothing_is_claimed() -> None:
    entries = scores({("mrl", 32): 0.7001, ("marc", 32): 0.7})
    summaries = [
        s.model_copy(update={"user_low": -0.004, "user_high": 0.003}) if s.system == "mrl" else s
        for s in summarise(entries, {}, NO_ROWS, comparison="marc")
    ]
    (found,) = findings(summaries, entries, layers=3, comparison="marc")
    assert found.startswith("At d = 32 marc does not demonstrably beat mrl")
    assert found.endswith("; with resampled test users −0.0030 to +0.0040.")


def test_verdicts_agree_with_their_figures_everywhere() -> None:
    """Over many made-up evaluations: a claim is made exactly where the interval excludes 0."""
    for auc, spread in itertools.product(np.linspace(0.680, 0.704, 13), (1, 10)):
        entries = [
            s.model_copy(update={"auc": s.auc + spread * JITTER[s.seed % 5] * (s.system == "marc")})
            for s in scores({("mrl", 32): 0.692, ("marc", 32): float(auc)})
        ]
        summaries = summarise(entries, {}, NO_ROWS, comparison="marc")
        (mrl,) = [s for s in summaries if s.system == "mrl"]
        assert mrl.low is not None
        assert mrl.high is not None
        verb = "beats" if mrl.high < 0 else "loses to" if mrl.low > 0 else "does not demonstrably beat"
        assert f"marc {verb} mrl: " in findings(summaries, entries, layers=3, comparison="marc")[0]

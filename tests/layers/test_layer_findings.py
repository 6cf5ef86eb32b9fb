"""Findings of layer reports: choices of metrics and their losses, the layer to keep, recommendations, sentences."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from marc_pipeline.evaluation.layer_choice import choose_layer
from marc_pipeline.layers.findings import (
    METRICS,
    WITHOUT_CLICKS,
    best_by_test,
    best_layer,
    choices,
    choose_by_metrics,
    is_chance,
    layer_findings,
    recommend,
    with_choice,
)
from marc_schemas.layers import JudgedLayer, JudgedModel

NAN = math.nan
BY_NAME = {metric.name: metric for metric in METRICS}


def layers_of(
    metrics: Mapping[str, Sequence[float]] | None = None,
    *,
    test: Sequence[Sequence[float]] = (),
    folds: Sequence[Sequence[float]] = (),
    count: int = 5,
    seconds: Sequence[float] = (),
) -> list[JudgedLayer]:
    """Layers 0 to count − 1; other metrics are NaN. Folds start at layer 1 if those of layer 0 are missing."""
    return [
        JudgedLayer(
            layer=number,
            depth=number / (count - 1),
            metrics={name: (metrics or {}).get(name, [NAN] * count)[number] for name in BY_NAME},
            seconds=seconds[number] if seconds else 1.0 + number,
            weights_bytes=1000 + 500 * number,
            test_auc=list(test[number]) if test else [],
            fold_auc=list(folds[number - count]) if folds and number >= count - len(folds) else [],
        )
        for number in range(count)
    ]


def model_of(judged: list[JudgedLayer], **changes: Any) -> JudgedModel:
    facts = {
        "sweep_id": "0", "backbone": "a/model", "layers": len(judged) - 1, "width": 8, "pooling": "mean",
        "max_tokens": 48, "dtype": "float32", "device": "cpu", "inputs": 1234, "judged": judged,
    }  # fmt: skip
    return JudgedModel.model_validate({**facts, **changes})


def chosen(judged: list[JudgedLayer]) -> dict[str, int | None]:
    return {choice.metric: choice.layer for choice in choices(judged)}


def chosen_model(judged: list[JudgedLayer], **changes: Any) -> JudgedModel:
    return with_choice(model_of(judged, **changes))


# Choices of metrics


def test_every_metric_chooses_the_layer_with_its_best_value() -> None:
    peak = [0.1, 0.2, 0.9, 0.3, 0.05]
    judged = layers_of(dict.fromkeys(BY_NAME, peak))
    high = {name for name, metric in BY_NAME.items() if metric.better == "high"}
    assert high == BY_NAME.keys() - {"curvature", "infonce"}
    assert chosen(judged) == {name: 2 if name in high else 4 for name in BY_NAME}
    assert [choice.better for choice in choices(judged)] == [metric.better for metric in METRICS]


@pytest.mark.parametrize(
    ("figures", "layer"),
    [
        pytest.param([9, 1, 2, 3, 2], 3, id="metrics do not choose the embeddings"),
        pytest.param([0, 2, 3, 3, 3], 2, id="the lowest of equal layers"),
        pytest.param([0, NAN, 1, NAN, 0.5], 2, id="undefined layers are ignored"),
        pytest.param([5, NAN, NAN, NAN, -2], 4, id="one defined layer"),
        pytest.param([1, NAN, NAN, NAN, NAN], None, id="only the embeddings are defined"),
        pytest.param([0, 1, math.inf, 2, 3], 2, id="infinity"),
        pytest.param([0, -math.inf, -5, -math.inf, -6], 2, id="minus infinity"),
    ],
)
def test_the_choice_of_a_metric(figures: list[float], layer: int | None) -> None:
    assert best_layer(BY_NAME["lidar"], dict(enumerate(figures))) == layer
    assert best_layer(BY_NAME["curvature"], {n: -figure for n, figure in enumerate(figures)}) == layer
    assert chosen(layers_of({"lidar": figures}))["lidar"] == layer


AUCS = [[0.75, 0.75], [0.60, 0.62], [0.68, 0.72], [0.66, 0.64], [0.50, 0.60]]


def test_a_choice_loses_the_distance_to_the_best_layer() -> None:
    figures: dict[str, Sequence[float]] = {"dime": [0, 1, 2, 3, 1], "lidar": [9, 0, 1, 0, 0]}
    lost = {choice.metric: choice.lost_auc for choice in choices(layers_of(figures, test=AUCS))}
    # The embeddings are the best layer, which no metric can choose.
    assert lost["dime"] == pytest.approx(0.75 - 0.65)
    assert lost["lidar"] == pytest.approx(0.75 - 0.70)
    assert lost["infonce"] is None
    without_metrics = [layer.model_copy(update={"metrics": {}}) for layer in layers_of(test=AUCS)]
    assert set(chosen(without_metrics).values()) == {None}
    for judged in (without_metrics, layers_of(figures)):
        assert all(choice.lost_auc is None and choice.correlation is None for choice in choices(judged))


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.integers(500, 520)), min_size=3, max_size=12),
    st.sets(st.integers(0, 11), max_size=4),
)
def test_the_correlation_is_spearmans_over_all_defined_layers(
    pairs: list[tuple[int, int]], undefined: set[int]
) -> None:
    figures = [NAN if place in undefined else float(figure) for place, (figure, _) in enumerate(pairs)]
    aucs = [auc / 1000 for _, auc in pairs]
    judged = layers_of({"dime": figures}, test=[[auc - 0.01, auc + 0.01] for auc in aucs], count=len(pairs))
    (found,) = (choice.correlation for choice in choices(judged) if choice.metric == "dime")
    means = [fmean(layer.test_auc) for layer in judged]
    both = [(one, other) for one, other in zip(figures, means, strict=True) if not math.isnan(one)]
    if len(both) < 3 or len({one for one, _ in both}) < 2 or len({other for _, other in both}) < 2:
        assert found is None
        return
    # Spearman's correlation is Pearson's correlation of mean ranks.
    ranks = [stats.rankdata(column) for column in zip(*both, strict=True)]
    assert found == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


@given(
    st.lists(st.integers(-50, 50), min_size=2, max_size=9),
    st.sampled_from(sorted(BY_NAME)),
    st.integers(1, 5),
    st.integers(-9, 9),
)
def test_choices_do_not_depend_on_the_scale_of_a_metric(figures: list[int], name: str, scale: int, shift: int) -> None:
    plain = layers_of({name: list(map(float, figures))}, count=len(figures))
    moved = layers_of({name: [float(scale * figure + shift) for figure in figures]}, count=len(figures))
    found = chosen(plain)[name]
    assert found == chosen(moved)[name]
    assert found is not None
    good = [figure if BY_NAME[name].better == "high" else -figure for figure in figures]
    assert all(good[found] >= other for other in good[1:])
    assert all(good[found] > other for other in good[1:found])
    assert choose_by_metrics(plain) == choose_by_metrics(moved)


@given(st.lists(st.lists(st.integers(500, 900), min_size=3, max_size=3), min_size=2, max_size=8), st.integers(1, 4))
def test_choices_do_not_depend_on_the_scale_of_the_auc(aucs: list[list[int]], scale: int) -> None:
    figures = {"dime": [float(sum(row) % 7) for row in aucs], "curvature": [float(row[0]) for row in aucs]}
    found = []
    for factor in (1, scale):
        test = [[factor * auc / 4000 for auc in row] for row in aucs]
        judged = layers_of(figures, test=test, folds=test, count=len(aucs))
        model = chosen_model(judged)
        best = best_by_test(model)
        assert best is not None
        lost = [None if one.lost_auc is None else one.lost_auc / factor for one in model.choices]
        found.append((model.keep, best.layer, [one.layer for one in model.choices], lost))
    assert found[0][:3] == found[1][:3]
    assert found[0][3] == pytest.approx(found[1][3])


# The layer to keep


def test_without_clicks_the_best_mean_rank_of_one_metric_of_each_view_is_kept() -> None:
    assert {BY_NAME[name].view for name in WITHOUT_CLICKS} == {"information", "geometry", "invariance"}
    figures = {
        # The embeddings have the best values everywhere.
        "prompt_entropy": [9.0, 1, 4, 3, 2],  # ranks of layers 1 to 4: 4 1 2 3
        "curvature": [0.0, 1, 3, 2, 4],  # 1 3 2 4
        "dime": [9.0, 1, 3, 4, 2],  # 4 2 1 3
        # These metrics are ignored.
        "lidar": [0.0, 0, 0, 0, 9],
        "infonce": [9.0, 9, 9, 9, 0],
    }
    judged = layers_of(figures)
    assert choose_by_metrics(judged) == 3
    assert choose_by_metrics(layers_of({**figures, "curvature": [0.0, 1, NAN, 3, 4]})) == 2, (
        "an undefined metric is ignored"
    )
    model = chosen_model(judged)
    assert (model.keep, model.basis) == (3, "metrics")
    assert model.choices == choices(judged)


def test_of_equal_mean_ranks_the_lowest_layer_is_kept_and_without_metrics_none() -> None:
    tied = {"prompt_entropy": [0.0, 1, 3, 3, 2], "dime": [0.0, 2, 5, 5, 1]}
    assert choose_by_metrics(layers_of(tied)) == 2
    assert choose_by_metrics(layers_of(dict.fromkeys(WITHOUT_CLICKS, [1.0] * 5))) == 1
    assert choose_by_metrics(layers_of()) is None
    broken = chosen_model(layers_of())
    assert (broken.keep, recommend([broken])) == (None, [])
    assert layer_findings([broken]) == []


def test_with_clicks_only_the_training_part_decides() -> None:
    folds = [[0.6, 0.6], [0.7, 0.72], [0.66, 0.66], [0.5, 0.52]]
    metrics = {"prompt_entropy": [0.0, 1, 2, 3, 9], "dime": [0.0, 1, 2, 3, 9], "curvature": [9.0, 3, 2, 1, 0]}
    rising = [[0.1 * number] for number in range(5)]
    model = chosen_model(layers_of(metrics, test=rising, folds=folds))
    assert (model.keep, model.basis) == (choose_layer(dict(enumerate(folds, start=1))), "clicks")
    assert model.keep == 2
    # Neither the metrics nor the test AUC influence the choice.
    falling = {name: figures[::-1] for name, figures in metrics.items()}
    assert chosen_model(layers_of(falling, test=rising[::-1], folds=folds)).keep == 2


@given(st.integers(2, 9), st.randoms(use_true_random=False))
def test_without_clicks_the_embeddings_are_never_kept(count: int, random: Any) -> None:
    figures = {name: [random.choice([NAN, random.random()]) for _ in range(count)] for name in BY_NAME}
    model = chosen_model(layers_of(figures, count=count))
    assert model.keep != 0
    assert all(choice.layer != 0 for choice in model.choices)
    assert all(one.layers > 0 for one in recommend([model]))


@pytest.mark.parametrize(
    ("folds", "least", "keep"),
    [
        pytest.param([[0.70, 0.70], [0.69, 0.69], [0.68, 0.70], [0.6, 0.6], [0.6, 0.6]], 0, 0, id="the best"),
        pytest.param([[0.69, 0.71], [0.72, 0.70], [0.60, 0.60], [0.6, 0.6], [0.6, 0.6]], 0, 0, id="one error below"),
        pytest.param([[0.68, 0.70], [0.70, 0.72], [0.72, 0.70], [0.6, 0.6], [0.6, 0.6]], 0, 1, id="beyond one error"),
        pytest.param([[0.70, 0.70], [0.69, 0.69], [0.68, 0.70], [0.6, 0.6], [0.6, 0.6]], 1, 1, id="LoRA needs a layer"),
        pytest.param([[0.90], [0.69, 0.69], [0.68, 0.70], [0.6, 0.6], [0.6, 0.6]], 0, 1, id="it left the search"),
    ],
)
def test_clicks_may_keep_the_embeddings(folds: list[list[float]], least: int, keep: int) -> None:
    model = with_choice(model_of(layers_of(test=AUCS, folds=folds)), least=least)
    assert (model.keep, model.basis) == (keep, "clicks")
    (advice,) = recommend([model])
    assert advice.layers == keep


# Recommendations

GOOD = {"prompt_entropy": [0.0, 1, 2, 9, 3]}


def with_folds(*means: float) -> list[JudgedLayer]:
    return layers_of(GOOD, test=AUCS, folds=[[mean - 0.01, mean + 0.01] for mean in means])


def test_the_pooling_with_the_best_auc_is_recommended() -> None:
    models = [
        chosen_model(with_folds(0.60, 0.66, 0.60, 0.50), pooling="mean"),
        chosen_model(with_folds(0.60, 0.62, 0.70, 0.71), pooling="last"),
        chosen_model(with_folds(0.61, 0.65, 0.62, 0.55), pooling="cls"),
        chosen_model(with_folds(0.90, 0.80, 0.70, 0.60), pooling="cls", backbone="b/other"),
    ]
    for order in (models, models[::-1]):
        found = {one.backbone: one for one in recommend(order)}
        assert [one.backbone for one in recommend(order)] == list(dict.fromkeys(model.backbone for model in order))
        assert (found["a/model"].layers, found["a/model"].pooling, found["a/model"].basis) == (4, "last", "clicks")
        assert (found["b/other"].layers, found["b/other"].pooling) == (1, "cls")
    reason = recommend(models)[0].reason
    assert reason == (
        "Layer 4 of 4 has the fewest layers within one standard error of the best, layer 4, by the AUC within the "
        "training part over 2 groups of users, and last pooling is better than mean and cls. One worker encodes 200 "
        "texts per second up to this layer, 200 up to the final layer. The validation and test parts were not used."
    )
    assert "better" not in recommend(models)[1].reason


def test_the_reason_names_the_cheap_layer_the_best_one_and_their_speeds() -> None:
    folds = [[0.68, 0.70], [0.70, 0.72], [0.72, 0.71], [0.6, 0.6], [0.6, 0.6]]
    judged = layers_of(GOOD, test=AUCS, folds=folds, seconds=[0.05, 1, 2, 3, 4])
    (found,) = recommend([chosen_model(judged)])
    assert found.reason.startswith("Layer 1 of 4 has the fewest layers within one standard error of the best, layer 2,")
    assert "One worker encodes 1,000 texts per second up to this layer, 250 up to the final layer." in found.reason
    still = [layer.model_copy(update={"seconds": 0.0}) for layer in judged]
    assert "per second" not in recommend([chosen_model(still)])[0].reason


# Random vectors

CHANCE = [[0.51, 0.49, 0.50], [0.52, 0.50, 0.51], [0.50, 0.51, 0.53], [0.49, 0.50, 0.51], [0.9]]


@pytest.mark.parametrize(
    ("random", "chance"),
    [([0.50, 0.51, 0.52], True), ([0.60, 0.60, 0.60], True), ([0.48, 0.49, 0.51], False), ([], False)],
)
def test_no_layer_is_kept_unless_one_beats_random_vectors(random: list[float], chance: bool) -> None:
    model = chosen_model(layers_of(GOOD, test=AUCS, folds=CHANCE), random_auc=random, left_out=1, left_out_because="x")
    assert is_chance(model) == chance
    assert (model.keep is None, model.basis) == (chance, "clicks")
    sentences = layer_findings([model])
    if chance:
        assert recommend([model]) == []
        assert sentences[0] == (
            "Within the training part, no vector beats random ones: the best AUC of a layer is 0.5133, that of random "
            f"vectors {fmean(random):.4f}. The texts say nothing about what users take, and no layer is recommended."
        )
        assert len(sentences) == 2, "no winner among equals; only the failed input is reported, too"
    else:
        assert not any("no vector beats" in sentence for sentence in sentences)
    other = chosen_model(with_folds(0.64, 0.66, 0.66, 0.64), pooling="last")
    assert [one.pooling for one in recommend([model, other])] == ["last"]


def test_without_clicks_the_first_pooling_is_recommended() -> None:
    models = [chosen_model(layers_of(GOOD), pooling=pooling) for pooling in ("cls", "mean")]
    (found,) = recommend(models)
    assert (found.layers, found.pooling, found.basis) == (3, "cls", "metrics")
    assert "There are no clicks: layer 3 of 4 has the best mean rank of prompt entropy. This is a hint" in found.reason
    undefined = chosen_model(layers_of(), pooling="last")
    assert recommend([undefined, *models]) == [found], "a model without metrics is ignored"


# Sentences


def sentences_of(judged: list[JudgedLayer], **changes: Any) -> list[str]:
    return layer_findings([chosen_model(judged, **changes)])


def test_a_confirmed_advantage() -> None:
    """The sentence is on the layer chosen without the test part, not on the best layer by test AUC."""
    test = [[0.7, 0.7, 0.7], [0.7, 0.7, 0.71], [0.700, 0.702, 0.698], [0.65, 0.65, 0.65], [0.600, 0.601, 0.596]]
    sentences = sentences_of(layers_of(test=test, folds=[[0.6], [0.7], [0.65], [0.6]]))
    differences = np.array(test[2]) - np.array(test[4])
    assert stats.ttest_rel(test[2], test[4]).pvalue < 0.001
    reach = stats.t.ppf(0.975, 2) * stats.sem(differences)
    low, high = differences.mean() - reach, differences.mean() + reach
    assert low > 0
    assert sentences[0] == (
        "The mid-layer advantage is confirmed: layer 2, chosen without the test part, has test AUC 0.7000 ± 0.0020, "
        f"the final layer 0.5990 ± {stdev(test[4]):.4f}, +0.1010 (95 % interval +{low:.4f} to +{high:.4f}, "
        "p < 0.001, 3 seeds)."
    )
    assert any("The best layer by test AUC, 1 with 0.7033" in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("kept_layer", "verdict", "difference"),
    [
        pytest.param([0.60, 0.70], "is not confirmed", "+0.0250 (95 % interval −", id="too few seeds"),
        pytest.param([0.55, 0.50], "is refuted", "−0.1000 (95 % interval −", id="the final layer is better"),
    ],
)
def test_an_advantage_that_is_not_confirmed_or_is_refuted(
    kept_layer: list[float], verdict: str, difference: str
) -> None:
    test = [[0.5, 0.5], kept_layer, [0.6, 0.6], [0.6, 0.6], [0.65, 0.60]]
    sentence = sentences_of(layers_of(test=test, folds=[[0.9], [0.8], [0.7], [0.6]]))[0]
    assert sentence.startswith(
        f"The mid-layer advantage {verdict}: layer 1, chosen without the test part, has test AUC"
    )
    assert difference in sentence


def test_the_embeddings_alone_are_compared_with_the_final_layer_and_have_no_first_layers() -> None:
    folds = [[0.9], [0.8], [0.7], [0.6], [0.5]]
    sentences = sentences_of(layers_of(test=[[0.7, 0.71]] + [[0.6, 0.61]] * 4, folds=folds))
    assert sentences[0].startswith("The advantage of the embeddings alone is confirmed: layer 0, chosen without the")
    assert sentences[1].startswith("The embeddings alone take 20 % of the time of the whole model and 33 % of the")


def test_one_seed_gives_no_interval_and_no_deviation() -> None:
    sentences = sentences_of(
        layers_of(GOOD, test=[[0.5], [0.6], [0.7], [0.65], [0.5]], folds=[[0.9], [0.8], [0.7], [0.6]])
    )
    assert sentences[0] == (
        "The mid-layer advantage is not confirmed (there is no interval): layer 1, chosen without "
        "the test part, has test AUC 0.6000, the final layer 0.5000, +0.1000 (one seed)."
    )
    assert any("is 0.1000 above layer 1; it cannot be known" in sentence for sentence in sentences)
    assert not any("nan" in sentence or "deviation" in sentence for sentence in sentences)


def test_a_kept_final_layer_has_no_advantage() -> None:
    sentence = sentences_of(layers_of(test=[[0.9], [0.6], [0.6], [0.71], [0.7]], folds=[[0.6], [0.7], [0.8], [0.9]]))[0]
    assert sentence == ("The final layer is the layer to keep, with test AUC 0.7000; layer 0 has the best test AUC.")


def test_time_and_memory_of_the_kept_layer_and_its_distance_to_the_best_layer() -> None:
    test = [[0.5, 0.5], [0.70, 0.72], [0.60, 0.62], [0.695, 0.705], [0.5, 0.5]]
    judged = layers_of(test=test, folds=[[0.1], [0.2], [0.4], [0.3]], seconds=[1, 2, 3, 6, 8])
    for keep, behind, within in ((3, 0.01, "within"), (2, 0.1, "beyond")):
        model = model_of(judged, keep=keep, basis="clicks")
        _, saved, sharp, best = layer_findings([model])
        share, weights = {3: ("75 %", "83 %"), 2: ("38 %", "67 %")}[keep]
        assert saved == (
            f"The first {keep} of 4 layers take {share} of the time of the whole model and {weights} of the memory "
            "of its weights."
        )
        assert sharp == (
            "Within the training part the mean AUC of the 4 layers in the last round of the search is between 0.1000 "
            "and 0.4000. The smaller this range, the less certain is the choice."
        )
        assert f"is {behind:.4f} above layer {keep}, {within} one standard deviation; it cannot" in best
    assert len(layer_findings([model_of(judged, keep=1, basis="clicks")])) == 3, "the kept layer is the best one"
    still = [layer.model_copy(update={"seconds": 0.0}) for layer in judged]
    assert not any("time" in sentence for sentence in layer_findings([model_of(still, keep=1, basis="clicks")]))


def test_the_metric_with_the_best_choice_and_the_one_with_the_strongest_correlation() -> None:
    figures = {
        "dime": [0.0, 4, 5, 1, 0],  # chooses the second best block
        "lidar": [0.0, 0, 1, 2, 3],  # has the strongest correlation, a negative one, and chooses the worst layer
        "curvature": [1.0, 1, 1, 1, 1],  # has no correlation, so that it is left out
    }
    found = sentences_of(layers_of(figures, test=[[0.71], [0.70], [0.69], [0.68], [0.60]]))[-1]
    best, strongest = found.split(". L")
    assert best == (
        "Of the metrics, which do not see clicks, DiME chooses best: layer 2, at a loss of 0.0200 of test AUC"
    )
    assert strongest == "iDAR has the strongest correlation with the test AUC: Spearman −0.97 over the layers."
    assert not any("Of the metrics" in sentence for sentence in sentences_of(layers_of(figures)))


def test_failed_inputs_are_reported_and_several_models_are_named() -> None:
    odd = {"left_out": 3, "left_out_because": "ValueError: no token"}
    expected = "3 of 1,234 inputs failed and are left out; the first error: ValueError: no token."
    assert sentences_of(layers_of(GOOD), **odd)[-1] == expected
    models = [chosen_model(layers_of(GOOD), pooling="cls", **odd), chosen_model(layers_of(GOOD), backbone="b")]
    found = layer_findings(models)
    assert found[:2] == [f"a/model, cls pooling: {sentence}" for sentence in layer_findings(models[:1])]
    assert found[2:] == [f"b, mean pooling: {sentence}" for sentence in layer_findings(models[1:])]

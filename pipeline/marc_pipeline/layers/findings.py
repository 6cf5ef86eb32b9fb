"""The list of layer metrics, the layer that each metric chooses, recommendations, and findings as sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy import stats

from marc_pipeline.evaluation.findings import ADVANTAGE, difference_text, verdict
from marc_pipeline.evaluation.layer_choice import choose_layer, final_scores
from marc_pipeline.evaluation.layer_search import RANDOM, beats_random
from marc_pipeline.evaluation.statistics import paired_difference
from marc_pipeline.report.cells import plural, signed, with_deviation
from marc_schemas.layers import Basis, JudgedLayer, JudgedModel, MetricChoice, Recommendation

View = Literal["information", "geometry", "invariance"]


@dataclass(frozen=True)
class Metric:
    """A metric of representations.

    Attributes:
        name: key of its values.
        title: name in reports.
        view: the property that it measures.
        better: the better end by the meaning of the metric: richer, smoother, less changed by noise. This project
            chose it; the correlation with the AUC shows whether it holds for a model.
        unit: empty for plain numbers.
    """

    name: str
    title: str
    view: View
    better: Literal["high", "low"]
    unit: str = ""


METRICS = (
    Metric("prompt_entropy", "prompt entropy", "information", "high", "nats"),
    Metric("dataset_entropy", "dataset entropy", "information", "high", "nats"),
    Metric("effective_rank", "effective rank", "information", "high"),
    Metric("curvature", "curvature", "geometry", "low", "rad"),
    Metric("infonce", "InfoNCE", "invariance", "low", "nats"),
    Metric("information_bound", "information bound", "invariance", "high", "nats"),
    Metric("lidar", "LiDAR", "invariance", "high"),
    Metric("dime", "DiME", "invariance", "high", "nats"),
)


WITHOUT_CLICKS = ("prompt_entropy", "curvature", "dime")
"""The metrics that choose the layer without clicks, one of each view.

They were selected on ml-latest-small with the default backbone, where the best layer is known. Dataset entropy,
InfoNCE and LiDAR prefer the final layer there, which is one of the worst. On other data the choice may be poor.

Metrics never choose the embeddings. No block has mixed their tokens, so that their prompt entropy counts the different
tokens of a text, whatever the model has learned.
"""
INPUTS_PER_UNIT = 1000
"""Number of texts or images that ``JudgedLayer.seconds`` is the time of."""


def choices(judged: Sequence[JudgedLayer]) -> list[MetricChoice]:
    """Return the layer that every metric chooses, embeddings excluded, and its loss of test AUC."""
    found = []
    aucs = {layer.layer: fmean(layer.test_auc) for layer in judged if layer.test_auc}
    best = max(aucs.values(), default=None)
    for metric in METRICS:
        values = {layer.layer: layer.metrics.get(metric.name, math.nan) for layer in judged}
        layer = best_layer(metric, values)
        lost = None if best is None or layer is None else best - aucs[layer]
        facts = {"correlation": _spearman(values, aucs), "lost_auc": lost}
        found.append(MetricChoice(metric=metric.name, better=metric.better, layer=layer, **facts))
    return found


def best_layer(metric: Metric, values: Mapping[int, float]) -> int | None:
    """Return the layer with the best value, embeddings excluded; the lowest of equal layers; None if all are NaN."""
    sign = 1 if metric.better == "high" else -1
    ranked = [(-sign * value, layer) for layer, value in values.items() if layer and not math.isnan(value)]
    return min(ranked)[1] if ranked else None


def choose_by_metrics(judged: Sequence[JudgedLayer]) -> int | None:
    """Return the layer with the best mean rank over ``WITHOUT_CLICKS``; the lowest of equal ones; None if undefined."""
    layers = [layer for layer in judged if layer.layer]
    ranks = []
    for metric in _defined(judged):
        sign = 1 if metric.better == "low" else -1
        ranks.append(stats.rankdata([sign * layer.metrics[metric.name] for layer in layers]))
    return layers[int(np.argmin(np.mean(ranks, axis=0)))].layer if ranks else None


def with_choice(model: JudgedModel, *, least: int = 0) -> JudgedModel:
    """Add the choices of the metrics and the layer to keep to a model; clicks decide if there are any.

    By clicks, no layer below ``least`` is kept, and none at all if random vectors are as good.
    """
    folds = fold_aucs(model)
    basis: Basis = "clicks" if folds else "metrics"
    keep = None
    if not folds:
        keep = choose_by_metrics(model.judged)
    elif not is_chance(model):
        keep = choose_layer({layer: aucs for layer, aucs in folds.items() if layer >= least})
    return model.model_copy(update={"choices": choices(model.judged), "keep": keep, "basis": basis})


def recommend(models: Sequence[JudgedModel]) -> list[Recommendation]:
    """Return layer and pooling for each backbone: the pooling with the best AUC, or the first one without clicks."""
    found = []
    for backbone in dict.fromkeys(model.backbone for model in models):
        candidates = [model for model in models if model.backbone == backbone and model.keep is not None]
        if not candidates:
            continue
        best = max(candidates, key=_score)
        others = [model.pooling for model in candidates if model is not best and best.basis == "clicks"]
        found.append(
            Recommendation(
                backbone=backbone,
                layers=best.keep or 0,
                pooling=best.pooling,
                basis=best.basis or "metrics",
                reason=_reason(best, others),
            )
        )
    return found


def layer_findings(models: Sequence[JudgedModel]) -> list[str]:
    """Return the results with their numbers, one sentence per claim, whether it is confirmed or not."""
    found = []
    for model in models:
        lead = f"{model.backbone}, {model.pooling} pooling: " if len(models) > 1 else ""
        sentences = [_chance(model)] if is_chance(model) else [*_advantage(model), *_kept(model), *_metrics(model)]
        if model.left_out:
            sentences.append(
                f"{model.left_out} of {model.inputs:,} inputs failed and are left out; the first error: "
                f"{model.left_out_because}."
            )
        found += [lead + sentence for sentence in sentences]
    return found


def fold_aucs(model: JudgedModel) -> dict[int, list[float]]:
    """Return the AUCs of all folds within the training part by layer; empty without interactions."""
    return {layer.layer: layer.fold_auc for layer in model.judged if layer.fold_auc}


def is_chance(model: JudgedModel) -> bool:
    """Return whether no layer beats random vectors within the training part; False without interactions."""
    return bool(model.random_auc) and not beats_random({**fold_aucs(model), RANDOM: model.random_auc})


def per_second(layer: JudgedLayer) -> float:
    """Return the texts or images per second of one worker up to this layer; NaN if the time is too short."""
    return INPUTS_PER_UNIT / layer.seconds if layer.seconds > 0 else math.nan


def mean_auc(layer: JudgedLayer) -> float:
    """Return the mean test AUC over seeds; NaN without interactions."""
    return fmean(layer.test_auc) if layer.test_auc else math.nan


def std_auc(layer: JudgedLayer) -> float:
    """Return the sample standard deviation of the test AUC over seeds; NaN for fewer than 2 seeds."""
    return stdev(layer.test_auc) if len(layer.test_auc) > 1 else math.nan


def auc_text(layer: JudgedLayer) -> str:
    """Return the test AUC as ``mean ± deviation`` over seeds."""
    return with_deviation(mean_auc(layer), std_auc(layer))


def best_by_test(model: JudgedModel) -> JudgedLayer | None:
    """Return the layer with the highest mean test AUC; None without interactions."""
    return max((layer for layer in model.judged if layer.test_auc), key=mean_auc, default=None)


def _chance(model: JudgedModel) -> str:
    best = max(map(fmean, final_scores(fold_aucs(model)).values()))
    return (
        f"Within the training part, no vector beats random ones: the best AUC of a layer is {best:.4f}, that of random "
        f"vectors {fmean(model.random_auc):.4f}. The texts say nothing about what users take, and no layer is "
        "recommended."
    )


def _advantage(model: JudgedModel) -> list[str]:
    """Compare the kept layer with the final layer. The best layer by test AUC is partly the best by chance."""
    best, final = best_by_test(model), model.judged[-1]
    if best is None or model.keep is None:
        return []
    if model.keep == model.layers:
        return [
            f"The final layer is the layer to keep, with test AUC {auc_text(final)}; layer {best.layer} has the best "
            "test AUC."
        ]
    layer = model.judged[model.keep]
    difference = paired_difference(dict(enumerate(layer.test_auc)), dict(enumerate(final.test_auc)))
    kind = "mid-layer advantage" if layer.layer else "advantage of the embeddings alone"
    return [
        f"The {kind} {verdict(difference, *ADVANTAGE)}: layer {layer.layer}, chosen without the test "
        f"part, has test AUC {auc_text(layer)}, the final layer {auc_text(final)}, {difference_text(difference)}."
    ]


def _kept(model: JudgedModel) -> list[str]:
    if model.keep is None:
        return []
    layer, final, best = model.judged[model.keep], model.judged[-1], best_by_test(model)
    found = []
    if final.seconds > 0:
        time, memory = layer.seconds / final.seconds, layer.weights_bytes / final.weights_bytes
        kept = f"first {model.keep} of {model.layers} layers" if model.keep else "embeddings alone"
        found.append(
            f"The {kept} take {100 * time:.0f} % of the time of the whole model and {100 * memory:.0f} % of the memory "
            "of its weights."
        )
    if folds := fold_aucs(model):
        last = [fmean(aucs) for aucs in final_scores(folds).values()]
        chance = f", that of random vectors is {fmean(model.random_auc):.4f}" if model.random_auc else ""
        found.append(
            f"Within the training part the mean AUC of the {plural(len(last), 'layer')} in the last round of the "
            f"search is between {min(last):.4f} and {max(last):.4f}{chance}. The smaller this range, the less certain "
            "is the choice."
        )
    if best is not None and best.layer != layer.layer:
        spread, behind = std_auc(best), mean_auc(best) - mean_auc(layer)
        within = "" if math.isnan(spread) else f", {'within' if behind <= spread else 'beyond'} one standard deviation"
        found.append(
            f"The best layer by test AUC, {best.layer} with {auc_text(best)}, is {behind:.4f} above layer "
            f"{layer.layer}{within}; it cannot be known before the test."
        )
    return found


def _metrics(model: JudgedModel) -> list[str]:
    titles = {metric.name: metric.title for metric in METRICS}
    known = [choice for choice in model.choices if choice.correlation is not None and choice.lost_auc is not None]
    if not known:
        return []
    cheap = min(known, key=lambda choice: choice.lost_auc or 0.0)
    strong = max(known, key=lambda choice: abs(choice.correlation or 0.0))
    return [
        f"Of the metrics, which do not see clicks, {titles[cheap.metric]} chooses best: layer {cheap.layer}, at a loss "
        f"of {cheap.lost_auc:.4f} of test AUC. {titles[strong.metric]} has the strongest correlation with the test "
        f"AUC: Spearman {signed(strong.correlation, 2)} over the layers."
    ]


def _reason(model: JudgedModel, others: Sequence[str]) -> str:
    if model.basis == "clicks":
        final = final_scores(fold_aucs(model))
        best = max(final, key=lambda layer: (fmean(final[layer]), -layer))
        beside = f", and {model.pooling} pooling is better than {' and '.join(others)}" if others else ""
        return (
            f"Layer {model.keep} of {model.layers} has the fewest layers within one standard error of the best, layer "
            f"{best}, by the AUC within the training part over {plural(len(final[best]), 'group')} of users{beside}."
            f"{_cost(model)} The validation and test parts were not used."
        )
    titles = ", ".join(metric.title for metric in _defined(model.judged))
    return (
        f"There are no clicks: layer {model.keep} of {model.layers} has the best mean rank of {titles}. "
        "This is a hint, not a measurement."
    )


def _cost(model: JudgedModel) -> str:
    kept, final = (per_second(model.judged[layer]) for layer in (model.keep or 0, model.layers))
    if math.isnan(kept) or math.isnan(final):
        return ""
    return f" One worker encodes {kept:,.0f} texts per second up to this layer, {final:,.0f} up to the final layer."


def _defined(judged: Sequence[JudgedLayer]) -> list[Metric]:
    """The metrics of ``WITHOUT_CLICKS`` that are defined in every layer except the embeddings."""
    return [
        metric
        for metric in METRICS
        if metric.name in WITHOUT_CLICKS
        and not any(math.isnan(layer.metrics.get(metric.name, math.nan)) for layer in judged if layer.layer)
    ]


def _score(model: JudgedModel) -> float:
    folds = fold_aucs(model)
    return max(map(fmean, final_scores(folds).values())) if folds else 0.0


def _spearman(values: Mapping[int, float], aucs: Mapping[int, float]) -> float | None:
    pairs = [(values[layer], auc) for layer, auc in aucs.items() if not math.isnan(values[layer])]
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    left, right = zip(*pairs, strict=True)
    return float(stats.spearmanr(left, right).statistic)

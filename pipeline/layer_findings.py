"""From figures of layers to a judgement: what each metric would choose, what that costs, and the layer to keep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from scipy import stats

from pipeline.model.statistics import paired_difference
from pipeline.plots import signed
from schemas.layers import Basis, JudgedLayer, JudgedModel, MetricChoice, Recommendation

MANY_LAYERS = 12

View = Literal["information", "geometry", "invariance"]


@dataclass(frozen=True)
class Metric:
    """A metric of representations.

    Attributes:
        name: key of its figure.
        title: for people.
        view: what it looks at.
        better: which end is taken for the better one, by what the metric means: richer, smoother, less moved by noise.
            That is this project's choice; whether it holds for a model, the correlation tells.
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
"""One metric of each view, which together choose where there are no clicks.

This project's choice, made where the answer was known: on ml-latest-small with the default backbone, where the
dataset's entropy, InfoNCE and LiDAR prefer the final layer, one of the worst. What it promises elsewhere is little.
"""


def choices(judged: Sequence[JudgedLayer]) -> list[MetricChoice]:
    """What every metric would choose among the layers that can be kept, and what that costs.

    Args:
        judged: all layers, the embeddings first.
    """
    found = []
    aucs = {layer.layer: fmean(layer.test_auc) for layer in judged if layer.test_auc}
    best = max((auc for layer, auc in aucs.items() if layer), default=None)
    for metric in METRICS:
        figures = {layer.layer: layer.metrics.get(metric.name, math.nan) for layer in judged}
        layer = best_layer(metric, figures)
        lost = None if best is None or layer is None else best - aucs[layer]
        correlation = _spearman(figures, aucs)
        found.append(
            MetricChoice(metric=metric.name, better=metric.better, layer=layer, correlation=correlation, lost_auc=lost)
        )
    return found


def best_layer(metric: Metric, figures: Mapping[int, float]) -> int | None:
    """The layer, of those that can be kept, where a metric is best; of equals the lowest."""
    sign = 1 if metric.better == "high" else -1
    ranked = [(-sign * figure, layer) for layer, figure in figures.items() if layer and not math.isnan(figure)]
    return min(ranked)[1] if ranked else None


def smoothed(scores: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """A smooth curve through the mean score of all layers: a parabola, of a dozen layers and more a quartic.

    One layer's AUC is known to about what layers differ by, and the best of several is a lottery. Neighbours hold
    nearly the same, so a curve that falls off towards its ends is known far better than any point of it. Many layers
    tell a peak that lies towards one end, which a parabola would move to the middle.

    Args:
        scores: of every layer, one per fold.
    """
    layers = sorted(scores)
    means = np.array([fmean(scores[layer]) for layer in layers])
    depth = np.linspace(-1, 1, len(layers))
    degree = 2 if len(layers) < MANY_LAYERS else 4
    curve = np.polynomial.Polynomial.fit(depth, means, deg=min(degree, len(layers) - 1))(depth)
    return dict(zip(layers, curve.round(9).tolist(), strict=True))


def choose_layer(scores: Mapping[int, Sequence[float]]) -> int:
    """The layer where :func:`smoothed` scores are highest; of equals the lowest.

    Args:
        scores: AUC of every layer, one per fold.
    """
    curve = smoothed(scores)
    return min(curve, key=lambda layer: (-curve[layer], layer))


def choose_by_metrics(judged: Sequence[JudgedLayer]) -> int | None:
    """The layer with the best mean rank over ``WITHOUT_CLICKS``; of equals the lowest; None where all are undefined.

    Args:
        judged: all layers, the embeddings first.
    """
    layers = [layer for layer in judged if layer.layer]
    ranks = []
    for metric in (metric for metric in METRICS if metric.name in WITHOUT_CLICKS):
        sign = 1 if metric.better == "low" else -1
        figures = [sign * layer.metrics.get(metric.name, math.nan) for layer in layers]
        if not any(map(math.isnan, figures)):
            ranks.append(stats.rankdata(figures))
    if not ranks:
        return None
    return layers[int(np.argmin(np.mean(ranks, axis=0)))].layer


def kept(model: JudgedModel) -> JudgedModel:
    """The same with its choices, and with the layer to keep."""
    folds = {layer.layer: layer.fold_auc for layer in model.judged if layer.fold_auc}
    found = choices(model.judged)
    if folds:
        keep: int | None = choose_layer(folds)
        basis: Basis = "clicks"
    else:
        keep, basis = choose_by_metrics(model.judged), "metrics"
    return model.model_copy(update={"choices": found, "keep": keep, "basis": basis})


def recommend(models: Sequence[JudgedModel]) -> list[Recommendation]:
    """Where to cut each backbone, and how to pool: of several poolings the one that scored best with clicks.

    Without clicks nothing says which pooling is better: the first one stands.

    Args:
        models: from :func:`kept`; those of one backbone differ in their pooling.
    """
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


def findings(models: Sequence[JudgedModel]) -> list[str]:
    """One sentence per claim: what came out, with its figures, also where it is not what one would wish."""
    several = len(models) > 1
    found = []
    for model in models:
        lead = f"{model.backbone}, {model.pooling} pooling: " if several else ""
        sentences = [*_advantage(model), *_kept(model), *_metrics(model)]
        if model.left_out:
            sentences.append(
                f"{model.left_out} of {model.inputs:,} inputs could not be run and are left out; the first: "
                f"{model.left_out_because}."
            )
        found += [lead + sentence for sentence in sentences]
    return found


def mean_auc(layer: JudgedLayer) -> float:
    """Mean test AUC over seeds, NaN without interactions."""
    return fmean(layer.test_auc) if layer.test_auc else math.nan


def std_auc(layer: JudgedLayer) -> float:
    """Sample standard deviation of the test AUC over seeds, NaN with fewer than two."""
    return stdev(layer.test_auc) if len(layer.test_auc) > 1 else math.nan


def best_by_test(model: JudgedModel) -> JudgedLayer | None:
    """The layer with the highest mean test AUC among those that can be kept."""
    return max((layer for layer in model.judged if layer.layer and layer.test_auc), key=mean_auc, default=None)


def _advantage(model: JudgedModel) -> list[str]:
    """Of the kept layer: it was chosen without the test part. The best one by that part is best by chance as well."""
    best, final = best_by_test(model), model.judged[-1]
    if best is None or model.keep is None:
        return []
    if model.keep == model.layers:
        return [f"The final layer is to be kept, with test AUC {_auc(final)}; the best layer by that is {best.layer}."]
    layer = model.judged[model.keep]
    difference = paired_difference(dict(enumerate(layer.test_auc)), dict(enumerate(final.test_auc)))
    shown, interval = "has no interval to judge by", ""
    if difference is not None and difference.low is not None and difference.high is not None:
        interval = f" (95 % interval {signed(difference.low)} to {signed(difference.high)}, {difference.seeds} seeds)"
        shown = "is there" if difference.low > 0 else "is not shown"
        shown = "is not there, on the contrary" if difference.high < 0 else shown
    return [
        f"The mid-layer advantage {shown}: layer {layer.layer}, chosen without the test part, has test AUC "
        f"{_auc(layer)}, the final layer {_auc(final)}, {signed(mean_auc(layer) - mean_auc(final))}{interval}."
    ]


def _kept(model: JudgedModel) -> list[str]:
    if model.keep is None:
        return []
    layer, final, best = model.judged[model.keep], model.judged[-1], best_by_test(model)
    found = []
    if final.seconds > 0:
        time, memory = layer.seconds / final.seconds, layer.weights_bytes / final.weights_bytes
        found.append(
            f"The first {model.keep} of {model.layers} layers take {100 * time:.0f} % of the whole model's time and "
            f"{100 * memory:.0f} % of its weights' memory."
        )
    folds = {layer.layer: layer.fold_auc for layer in model.judged if layer.fold_auc}
    if folds:
        curve = smoothed(folds).values()
        found.append(
            f"Within the training part the layers' smoothed AUC lies between {min(curve):.4f} and {max(curve):.4f}: "
            "the choice is as sharp as that."
        )
    if best is not None and best.layer != layer.layer:
        spread, behind = std_auc(best), mean_auc(best) - mean_auc(layer)
        within = "" if math.isnan(spread) else f", {'within' if behind <= spread else 'beyond'} one standard deviation"
        found.append(
            f"The best layer by test AUC, {best.layer} with {_auc(best)}, is {behind:.4f} above layer {layer.layer}"
            f"{within}; nobody could choose it beforehand."
        )
    return found


def _metrics(model: JudgedModel) -> list[str]:
    titles = {metric.name: metric for metric in METRICS}
    known = [choice for choice in model.choices if choice.correlation is not None and choice.lost_auc is not None]
    if not known:
        return []
    cheap = min(known, key=lambda choice: choice.lost_auc or 0.0)
    strong = max(known, key=lambda choice: abs(choice.correlation or 0.0))
    return [
        f"Of the metrics, which see no click, {titles[cheap.metric].title} chooses best: layer {cheap.layer}, at a "
        f"loss of {cheap.lost_auc:.4f} of test AUC. {titles[strong.metric].title} goes with the test AUC most closely: "
        f"Spearman {signed(strong.correlation or 0.0, 2)} over the layers."
    ]


def _reason(model: JudgedModel, others: Sequence[str]) -> str:
    beside = f", and {model.pooling} pooling before {' and '.join(others)}" if others else ""
    if model.basis == "clicks":
        folds = {layer.layer: layer.fold_auc for layer in model.judged if layer.fold_auc}
        return (
            f"A smooth curve through the AUC within the training part, over {len(folds[min(folds)])} groups of users, "
            f"is highest at layer {model.keep} of {model.layers}{beside}; nothing behind the 80 % boundary had a say."
        )
    titles = [
        metric.title
        for metric in METRICS
        if metric.name in WITHOUT_CLICKS
        and not any(math.isnan(layer.metrics.get(metric.name, math.nan)) for layer in model.judged if layer.layer)
    ]
    return (
        f"There are no clicks: layer {model.keep} of {model.layers} has the best mean rank of "
        f"{', '.join(titles)}. A hint, no measurement."
    )


def _score(model: JudgedModel) -> float:
    folds = {layer.layer: layer.fold_auc for layer in model.judged if layer.fold_auc}
    return max(smoothed(folds).values()) if folds else 0.0


def _auc(layer: JudgedLayer) -> str:
    spread = std_auc(layer)
    return f"{mean_auc(layer):.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")


def _spearman(figures: Mapping[int, float], aucs: Mapping[int, float]) -> float | None:
    pairs = [(figures[layer], auc) for layer, auc in aucs.items() if not math.isnan(figures[layer])]
    if len(pairs) < 3 or any(len(set(column)) < 2 for column in zip(*pairs, strict=True)):
        return None
    left, right = zip(*pairs, strict=True)
    return float(stats.spearmanr(left, right).statistic)

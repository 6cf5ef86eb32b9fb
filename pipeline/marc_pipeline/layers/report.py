"""The report of a layer sweep: tables of layers and of the choices of metrics, and plots by depth."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from marc_pipeline.evaluation.layer_choice import final_scores
from marc_pipeline.layers.findings import METRICS, auc_text, fold_aucs, mean_auc, per_second, std_auc
from marc_pipeline.report import plots
from marc_pipeline.report.cells import UNKNOWN, fixed, signed
from marc_pipeline.report.page import write_folder
from marc_pipeline.report.sections import ReportPage, ReportSection, ReportTable, plot_section
from marc_schemas.layers import JudgedLayer, JudgedModel, LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEGABYTE = 1e6
FEW_LAYERS = 12
"""Above this number of layers, neighbours on the axis of speed are so close that their numbers alternate."""
SPEED = (
    "Each point is a layer, with its number. The best layers are at the top, the cheapest ones on the right. Below the "
    "dashed line, random vectors predict better. Hollow points left the search early: their AUC is from fewer users."
)
DERIVED = {"effective_rank", "information_bound"}
MEANING = {
    "prompt_entropy": "matrix-based entropy of the token states of a text, mean over texts: how many directions "
    "the tokens use.",
    "dataset_entropy": "the same entropy of the pooled states of all texts.",
    "effective_rank": "exp of the Shannon entropy of the data set: how many directions the texts use.",
    "curvature": "mean angle between the steps from token to token: 0 is a straight line, π/2 a right-angled zigzag.",
    "infonce": "how hard it is to find the other view of a text in its block: 0 is certainty, log n is chance.",
    "information_bound": "log n − InfoNCE: a lower bound of the information that one view has about the other.",
    "lidar": "effective rank of the differences between texts, in units of the differences between their views.",
    "dime": "how much smaller the joint entropy of the views is with their true pairs than with shuffled pairs.",
}


def write_layer_report(report: LayerReport, folder: Path) -> list[Path]:
    """Write ``layers.json``, Markdown and HTML pages, and the plots.

    Returns:
        The files written.
    """
    return write_folder("layers", report, layer_page(report), folder)


def layer_page(report: LayerReport) -> ReportPage:
    """The content of the report."""
    title = "Layers of " + ", ".join(dict.fromkeys(model.backbone for model in report.models))
    advice = [
        f"{one.backbone}: keep layer {one.layers} with {one.pooling} pooling. {one.reason}"
        for one in report.recommendations
    ]
    return ReportPage(title, list(_sections(report)), lead=advice, findings=report.findings)


def layer_table(model: JudgedModel, *, brief: bool = False) -> ReportTable:
    """One row per layer; ``brief`` leaves out metrics that follow from another one."""
    metrics = [metric for metric in METRICS if not (brief and metric.name in DERIVED)]
    clicks = any(layer.test_auc for layer in model.judged)
    header = ["layer", *(["test AUC", "training AUC"] if clicks else [])]
    header += [metric.title for metric in metrics] + ["time", "weights, MB"]
    rows = []
    for layer in model.judged:
        row = [f"{layer.layer}{' *' if layer.layer == model.keep else ''}"]
        if clicks:
            row += [auc_text(layer), fixed(fmean(layer.fold_auc) if layer.fold_auc else None)]
        row += [_metric_text(layer.metrics.get(metric.name, math.nan)) for metric in metrics]
        rows.append([*row, _share(layer, model), _megabytes(layer.weights_bytes)])
    return ReportTable(header, rows, numbers=range(1, len(header)), caption="Every layer; * marks the layer to keep.")


def choice_table(model: JudgedModel) -> ReportTable:
    """One row per metric: the layer that it would choose, and its loss of test AUC."""
    titles = {metric.name: metric.title for metric in METRICS}
    rows = [
        [
            titles[choice.metric],
            choice.better,
            UNKNOWN if choice.layer is None else str(choice.layer),
            fixed(choice.lost_auc),
            signed(choice.correlation, 2),
        ]
        for choice in model.choices
    ]
    header = ["metric", "better", "chooses layer", "test AUC lost", "Spearman with test AUC"]
    caption = "The layer that each metric would choose; metrics do not see clicks."
    return ReportTable(header, rows, numbers=range(1, len(header)), caption=caption)


def _sections(report: LayerReport) -> Iterator[ReportSection]:
    if any(map(fold_aucs, report.models)):
        yield from plot_section("auc_by_speed.png", "AUC by speed", _speed(report), SPEED)
    if any(layer.test_auc for model in report.models for layer in model.judged):
        yield from plot_section("auc_by_depth.png", "Downstream AUC by relative depth", _aucs(report))
    yield from plot_section("metrics_by_depth.png", "Metrics by relative depth", _metrics(report))
    yield from plot_section("cost_by_depth.png", "Cost by relative depth", _cost(report))
    for model in report.models:
        tables = [layer_table(model), choice_table(model)]
        yield ReportSection(_name(model, report), [_setting(model)], tables=tables)
    yield ReportSection("Metrics", points=[f"{metric.title}: {MEANING[metric.name]}" for metric in METRICS])
    yield ReportSection("Method", points=list(_method(report)), folded=True)


def _setting(model: JudgedModel) -> str:
    cut = f", at most {model.max_tokens} tokens" if model.max_tokens else ""
    return (
        f"{model.layers} layers of width {model.width}, {model.pooling} pooling{cut}, {model.dtype} on {model.device}; "
        f"{model.inputs - model.left_out:,} {'texts' if model.max_tokens else 'images'}."
    )


def _method(report: LayerReport) -> Iterator[str]:
    if report.kind == "images":
        yield (
            f"The metrics are computed on {report.sample:,} images and {report.views} views of each: random crops, "
            "flips and colours. A token is a patch."
        )
    else:
        yield (
            f"The metrics are computed on {report.sample:,} distinct texts of the catalogue of {report.ds} and "
            f"{report.views} views of each: typing errors in {100 * report.probability:.0f} % of the words."
        )
    yield (
        f"Entropies have order {report.order:g} and are in nats, of rows of unit length. InfoNCE (temperature "
        f"{report.temperature:g}) and DiME compare the first two views within blocks of up to {report.block:,} "
        f"{report.kind}."
    )
    yield (
        "Definitions: Skean et al., Layer by Layer, ICML 2025, arXiv 2502.02013. The better end of a metric follows "
        "from its meaning; the correlation shows whether this is true for the model."
    )
    if report.dim:
        yield (
            f"Test AUC: a click model reads the layer's whitened PCA at d = {report.dim}, fitted on the training part; "
            "mean ± sample standard deviation over seeds. It is shown, but it does not influence the choice."
        )
        yield (
            "The choice uses the AUC within the training part: the regression that MARC starts from, on groups of "
            "users that it was not fitted on. Every layer costs time in every nightly run, so that the fewest layers "
            "within one standard error of the best are kept. Layers that left the search early have a training AUC "
            "from fewer users."
        )
    yield (
        "The metrics choose among the outputs of blocks, not the embeddings: before the first block, prompt entropy "
        f"counts the different {'patches of an image' if report.kind == 'images' else 'tokens of a text'}, whatever "
        "the model has learned."
    )
    yield (
        "Time is that of one worker, for the embeddings and all blocks up to the layer, as a share of the whole model. "
        "Layer 0 is the input of the first block, the last layer the output of the whole model."
    )


def _name(model: JudgedModel, report: LayerReport) -> str:
    several = len({one.pooling for one in report.models}) > 1
    return f"{model.backbone}, {model.pooling} pooling" if several else model.backbone


# Plots


def _speed(report: LayerReport) -> "Figure | None":
    """AUC within the training part against texts per second, one point per layer; None if no layer has a time."""
    figure, (panel,) = plots.panel_figure(height=4.4)
    for place, model in enumerate(report.models):
        style, folds, finalists = plots.series_style(place), fold_aucs(model), final_scores(fold_aucs(model))
        layers = [model.judged[layer] for layer in sorted(folds) if not math.isnan(per_second(model.judged[layer]))]
        for final in (True, False):
            some = [layer for layer in layers if (layer.layer in finalists) == final]
            speeds, aucs = list(map(per_second, some)), [fmean(layer.fold_auc) for layer in some]
            look = {"linestyle": "none"} | ({"label": _label(model, report)} if final else {"markerfacecolor": "none"})
            panel.plot(speeds, aucs, **(style | look))
            for layer, x, y in zip(some, speeds, aucs, strict=True):
                _number(panel, layer.layer, x, y, crowded=model.layers > FEW_LAYERS)
                if layer.layer == model.keep:
                    _ring(panel, x, y)
        if model.random_auc:
            panel.axhline(fmean(model.random_auc), label="random vectors", color=plots.GREY, linestyle="--")
    if not panel.texts:
        return None
    plots.log_axis(panel)
    panel.set_xlabel(f"{report.kind} per second of one worker", fontsize=9)
    panel.set_ylabel("AUC within the training part", fontsize=9)
    plots.legend(figure)
    return figure


def _aucs(report: LayerReport) -> "Figure":
    """Two panels: test AUC of every layer, and the AUC that the choice uses."""
    figure, (tested, folded) = plots.panel_figure(2, columns=2, height=3.9, sharey=True)
    for place, model in enumerate(report.models):
        style = plots.series_style(place)
        layers = [layer for layer in model.judged if layer.test_auc]
        deviations = [0.0 if math.isnan(std_auc(layer)) else std_auc(layer) for layer in layers]
        aucs, label = list(map(mean_auc, layers)), _label(model, report)
        tested.errorbar(_depths(layers), aucs, yerr=deviations, label=label, **(style | plots.BAR))
        folds = {layer: fmean(aucs) for layer, aucs in fold_aucs(model).items()}
        folded.plot(_depths([model.judged[layer] for layer in folds]), list(folds.values()), **style)
        if model.keep is not None:
            _mark_kept(folded, model, folds.get(model.keep))
            _mark_kept(tested, model, mean_auc(model.judged[model.keep]))
    tested.set_title(f"test AUC of the layer's PCA, d = {report.dim}", fontsize=11)
    folded.set_title("AUC within the training part", fontsize=11)
    return _finished(figure)


def _metrics(report: LayerReport) -> "Figure":
    """A panel for each metric."""
    figure, panels = plots.panel_figure(len(METRICS), columns=3, height=2.5)
    for panel, metric in zip(panels, METRICS, strict=True):
        _curves(panel, report, lambda layer, name=metric.name: layer.metrics.get(name, math.nan))  # type: ignore[misc]
        unit = f", {metric.unit}" if metric.unit else ""
        panel.set_title(f"{metric.title}{unit} ({metric.view})", fontsize=10)
    return _finished(figure)


def _cost(report: LayerReport) -> "Figure":
    """Time and weights up to every layer."""
    figure, (left, right) = plots.panel_figure(2, columns=2, height=2.9)
    _curves(left, report, lambda layer: layer.seconds)
    left.set_title(f"seconds of one worker for 1,000 {report.kind}", fontsize=10)
    _curves(right, report, lambda layer: layer.weights_bytes / MEGABYTE)
    right.set_title("weights, MB", fontsize=10)
    for panel in (left, right):
        panel.set_ylim(bottom=0)
    return _finished(figure)


def _finished(figure: "Figure") -> "Figure":
    for panel in figure.axes:
        plots.depth_axis(panel)
        panel.set_xlabel("relative depth", fontsize=9)
    plots.legend(figure)
    return figure


def _curves(panel: "Axes", report: LayerReport, value: Callable[[JudgedLayer], float]) -> None:
    for place, model in enumerate(report.models):
        values = [value(layer) for layer in model.judged]
        panel.plot(_depths(model.judged), values, label=_label(model, report), **plots.series_style(place))
        _mark_kept(panel, model, None if model.keep is None else values[model.keep])


def _mark_kept(panel: "Axes", model: JudgedModel, height: float | None) -> None:
    if model.keep is not None and height is not None and not math.isnan(height):
        depth = model.judged[model.keep].depth
        _ring(panel, depth, height)
        panel.axvline(depth, color=plots.GREY, linewidth=0.8, linestyle=":")


def _number(panel: "Axes", layer: int, x: float, y: float, *, crowded: bool) -> None:
    """Write the number of a layer beside its point, outside the ring of the layer to keep."""
    side = -1 if crowded and layer % 2 else 1
    panel.annotate(
        str(layer), (x, y), (-4 * side * crowded, 7 * side), textcoords="offset points", ha="center",
        va="bottom" if side > 0 else "top", fontsize=7,
    )  # fmt: skip


def _ring(panel: "Axes", x: float, y: float) -> None:
    panel.plot(
        [x], [y], label="layer to keep", marker="o", markersize=12, markerfacecolor="none", color=plots.BLACK,
        linestyle="none",
    )  # fmt: skip


def _label(model: JudgedModel, report: LayerReport) -> str:
    return plots.plot_text(_name(model, report), end=True)


def _depths(layers: Sequence[JudgedLayer]) -> list[float]:
    return [layer.depth for layer in layers]


# Cells


def _share(layer: JudgedLayer, model: JudgedModel) -> str:
    whole = model.judged[-1].seconds
    return f"{100 * layer.seconds / whole:.0f} %" if whole > 0 else UNKNOWN


def _metric_text(value: float) -> str:
    return fixed(value, 3 if abs(value) < 100 else 1)


def _megabytes(size: int) -> str:
    found = size / MEGABYTE
    return fixed(found, 0 if found >= 10 else 2)

"""A judgement of layers as a folder to read: its JSON, a page that opens without a network, a table and plots."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from pipeline.layer_findings import METRICS, Metric, mean_auc, smoothed, std_auc
from pipeline.plots import (
    BAR,
    BLACK,
    CYCLE,
    GREY,
    MARKERS,
    PageTable,
    Section,
    html_page,
    legend,
    markdown_text,
    new_figure,
    plot_text,
    save,
    signed,
    svg,
    tidy,
)
from schemas.layers import JudgedLayer, JudgedModel, LayerReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA, PAGE, TEXT = "layers.json", "layers.html", "layers.md"
AUC_FILE, METRICS_FILE, COST_FILE = "auc_by_depth.png", "metrics_by_depth.png", "cost_by_depth.png"
TITLES = {
    AUC_FILE: "Downstream AUC by relative depth",
    METRICS_FILE: "Metrics by relative depth",
    COST_FILE: "Cost by relative depth",
}
UNKNOWN = "–"
MEGABYTE = 1e6
DERIVED = {"effective_rank", "information_bound"}
VIEWS = {"information": "Information", "geometry": "Geometry", "invariance": "Invariance"}

MEANING = {
    "prompt_entropy": "Matrix-based entropy of a text's token states, mean over texts: how many directions they use.",
    "dataset_entropy": "The same of the pooled states of all texts.",
    "effective_rank": "exp of the dataset's Shannon entropy: how many directions the texts fill.",
    "curvature": "Mean angle between the steps from token to token: 0 is a straight line, π/2 a right-angled zigzag.",
    "infonce": "How hard it is to find a text's other view among the block's: 0 is certainty, log n chance.",
    "information_bound": "log n − InfoNCE: a lower bound of what one view tells of the other.",
    "lidar": "Effective rank of what tells texts apart, in units of what their views differ by.",
    "dime": "By how much the true pairing of views makes their joint entropy smaller than a broken one.",
}


def write_report(report: LayerReport, folder: Path) -> list[Path]:
    """Write ``layers.json``, ``layers.html``, ``layers.md`` and the plots as PNG.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page, text = folder / DATA, folder / PAGE, folder / TEXT
    data.write_text(report.model_dump_json(indent=1), encoding="utf-8")
    plots = _plots(report)
    page.write_text(_page(report, plots), encoding="utf-8")
    text.write_text(_markdown(report, list(plots)), encoding="utf-8")
    return [page, text, data, *(save(figure, folder / name) for name, figure in plots.items())]


def layer_rows(model: JudgedModel, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a model's table, layer by layer; ``brief`` without what follows from another column."""
    metrics = [metric for metric in METRICS if not (brief and metric.name in DERIVED)]
    clicks = any(layer.test_auc for layer in model.judged)
    header = ["layer", *(["test AUC", "training AUC"] if clicks else [])]
    header += [metric.title for metric in metrics] + ["time", "weights, MB"]
    rows = []
    for layer in model.judged:
        kept = " *" if layer.layer == model.keep else ""
        row = [f"{layer.layer}{kept}"]
        if clicks:
            row += [_auc(layer.test_auc, mean_auc(layer), std_auc(layer)), _mean(layer.fold_auc)]
        row += [_figure(layer.metrics.get(metric.name, math.nan)) for metric in metrics]
        row += [_share(layer, model), _megabytes(layer.weights_bytes)]
        rows.append(row)
    return header, rows


def choice_rows(model: JudgedModel) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what every metric would choose."""
    titles = {metric.name: metric.title for metric in METRICS}
    header = ["metric", "better", "chooses layer", "test AUC lost", "Spearman with test AUC"]
    rows = [
        [
            titles[choice.metric],
            choice.better,
            UNKNOWN if choice.layer is None else str(choice.layer),
            UNKNOWN if choice.lost_auc is None else f"{choice.lost_auc:.4f}",
            UNKNOWN if choice.correlation is None else signed(choice.correlation, 2),
        ]
        for choice in model.choices
    ]
    return header, rows


# Page


def _page(report: LayerReport, plots: "dict[str, Figure]") -> str:
    sections = [Section(TITLES[name], figures=[svg(figure, title=TITLES[name])]) for name, figure in plots.items()]
    sections += [
        Section(
            _name(model, report),
            text=[_how(model)],
            tables=[
                _table(*layer_rows(model), caption="Every layer; * is to be kept."),
                _table(*choice_rows(model), caption="What every metric would choose, without having seen a click."),
            ],
        )
        for model in report.models
    ]
    sections.append(Section("What the metrics mean", points=[f"{m.title}: {MEANING[m.name]}" for m in METRICS]))
    sections.append(Section("How it was measured", points=list(_measured(report)), folded=True))
    advice = [
        f"{one.backbone}: keep layer {one.layers} with {one.pooling} pooling. {one.reason}"
        for one in report.recommendations
    ]
    return html_page(
        "Layers of " + ", ".join(dict.fromkeys(model.backbone for model in report.models)),
        sections,
        lead=" ".join(advice),
        findings=report.findings,
    )


def _table(header: list[str], rows: list[list[str]], *, caption: str) -> PageTable:
    return PageTable(header, rows, numbers=range(1, len(header)), caption=caption)


def _how(model: JudgedModel) -> str:
    cut = f", at most {model.max_tokens} tokens" if model.max_tokens else ""
    return (
        f"{model.layers} layers of width {model.width}, {model.pooling} pooling{cut}, {model.dtype} on {model.device}; "
        f"{model.inputs - model.left_out:,} {'texts' if model.max_tokens else 'images'}."
    )


def _measured(report: LayerReport) -> Iterator[str]:
    if report.kind == "images":
        yield (
            f"The metrics see {report.sample:,} images, and {report.views} views of each: random crops, flips and "
            "colours. A token is a patch."
        )
    else:
        yield (
            f"The metrics see {report.sample:,} distinct texts of the catalogue of {report.ds}, and {report.views} "
            f"views of each: noise as people type it, on {100 * report.probability:.0f} % of the words."
        )
    yield (
        f"Entropies are of order {report.order:g}, in nats, of rows of unit length. InfoNCE (temperature "
        f"{report.temperature:g}) and DiME compare the first two views within blocks of up to {report.block:,} "
        f"{report.kind}."
    )
    yield (
        "Definitions: Skean et al., Layer by Layer, ICML 2025, arXiv 2502.02013. Which end of a metric is the better "
        "one is read from what it means; the correlation tells whether that holds for this model."
    )
    if report.dim:
        yield (
            f"Test AUC: a click model reads the layer's whitened PCA at d = {report.dim}, fitted on the training part; "
            "mean ± sample standard deviation over seeds. It is shown, and has no say in the choice."
        )
        yield (
            "The choice goes by the AUC within the training part: the regression that MARC starts from, on groups of "
            "users that it did not see, smoothed over the layers."
        )
    yield (
        "Time is one worker's, for the embeddings and all blocks up to the layer, as a share of the whole model's; "
        "layer 0 is what the first block gets, the last layer the whole model's output."
    )


def _markdown(report: LayerReport, plots: Sequence[str]) -> str:
    lines = ["# Layers", ""]
    for one in report.recommendations:
        advice = f"**Keep layer {one.layers} of {markdown_text(one.backbone)} with {one.pooling} pooling.**"
        lines += [f"{advice} {one.reason}", ""]
    lines += [*(f"- {markdown_text(finding)}" for finding in report.findings), ""]
    lines += [line for name in plots for line in (f"![{TITLES[name]}]({name})", "")]
    for model in report.models:
        lines += [f"## {markdown_text(_name(model, report))}", "", _how(model), ""]
        for header, rows in (layer_rows(model), choice_rows(model)):
            lines += [_line(header), _line(["---"] * len(header)), *map(_line, rows), ""]
    lines += ["## How it was measured", "", *(f"- {sentence}" for sentence in _measured(report)), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _name(model: JudgedModel, report: LayerReport) -> str:
    several = len({one.pooling for one in report.models}) > 1
    return f"{model.backbone}, {model.pooling} pooling" if several else model.backbone


# Plots


def _plots(report: LayerReport) -> "dict[str, Figure]":
    found = {METRICS_FILE: _metrics(report), COST_FILE: _cost(report)}
    if any(layer.test_auc for model in report.models for layer in model.judged):
        found = {AUC_FILE: _aucs(report), **found}
    return found


def _aucs(report: LayerReport) -> "Figure":
    """Test AUC of every layer, with what the choice went by beside it."""
    figure = new_figure(4.4)
    panels = figure.subplots(1, 2, sharey=True)
    for place, model in enumerate(report.models):
        style = {"color": CYCLE[place % len(CYCLE)], "marker": MARKERS[place % len(MARKERS)]}
        label = plot_text(_name(model, report), end=True)
        tested = [layer for layer in model.judged if layer.test_auc]
        deviations = [0.0 if math.isnan(std_auc(layer)) else std_auc(layer) for layer in tested]
        panels[0].errorbar(_depths(tested), list(map(mean_auc, tested)), yerr=deviations, label=label, **style, **BAR)
        folded = [layer for layer in model.judged if layer.fold_auc]
        if folded:
            panels[1].plot(_depths(folded), [fmean(layer.fold_auc) for layer in folded], **style, linestyle="none")
            curve = smoothed({layer.layer: layer.fold_auc for layer in folded})
            panels[1].plot(_depths(folded), list(curve.values()), color=style["color"], linewidth=1.6)
            _mark_kept(panels[1], model, curve.get(model.keep or 0))
        if model.keep is not None:
            _mark_kept(panels[0], model, mean_auc(model.judged[model.keep]))
    panels[0].set_title(f"test AUC of the layer's PCA, d = {report.dim}", fontsize=11)
    panels[1].set_title("AUC within the training part, smoothed", fontsize=11)
    for panel in panels:
        _depth_axis(tidy(panel))
    legend(figure)
    return figure


def _metrics(report: LayerReport) -> "Figure":
    """A panel for each metric."""
    columns = 3
    figure = new_figure(0.5 + 2.5 * math.ceil(len(METRICS) / columns))
    panels = figure.subplots(math.ceil(len(METRICS) / columns), columns, squeeze=False).ravel()
    for panel, metric in zip(panels, METRICS, strict=False):
        _curves(panel, report, lambda layer, metric=metric: layer.metrics.get(metric.name, math.nan))  # type: ignore[misc]
        panel.set_title(_panel_title(metric), fontsize=10)
    for panel in panels[len(METRICS) :]:
        panel.remove()
    legend(figure)
    return figure


def _cost(report: LayerReport) -> "Figure":
    """Time and weights up to every layer."""
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2)
    _curves(left, report, lambda layer: layer.seconds)
    left.set_title(f"seconds of one worker for 1,000 {report.kind}", fontsize=10)
    _curves(right, report, lambda layer: layer.weights_bytes / MEGABYTE)
    right.set_title("weights, MB", fontsize=10)
    for panel in (left, right):
        panel.set_ylim(bottom=0)
    legend(figure)
    return figure


def _curves(panel: "Axes", report: LayerReport, figure_of: Callable[[JudgedLayer], float]) -> None:
    for place, model in enumerate(report.models):
        figures = [figure_of(layer) for layer in model.judged]
        panel.plot(
            _depths(model.judged),
            figures,
            label=plot_text(_name(model, report), end=True),
            color=CYCLE[place % len(CYCLE)],
            marker=MARKERS[place % len(MARKERS)],
            linewidth=1.6,
            markersize=4.5,
        )
        _mark_kept(panel, model, figures[model.keep] if model.keep is not None else None)
    _depth_axis(tidy(panel))


def _mark_kept(panel: "Axes", model: JudgedModel, height: float | None) -> None:
    if model.keep is not None and height is not None and not math.isnan(height):
        depth = model.judged[model.keep].depth
        panel.plot(
            [depth], [height], marker="o", markersize=12, markerfacecolor="none", color=BLACK, linestyle="none",
            label="to be kept",
        )  # fmt: skip
        panel.axvline(depth, color=GREY, linewidth=0.8, linestyle=":")


def _depth_axis(panel: "Axes") -> None:
    panel.set_xlim(-0.03, 1.03)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
    panel.set_xlabel("relative depth", fontsize=9)


def _panel_title(metric: Metric) -> str:
    return f"{metric.title}{f', {metric.unit}' if metric.unit else ''} ({VIEWS[metric.view].lower()})"


def _depths(layers: Sequence[JudgedLayer]) -> list[float]:
    return [layer.depth for layer in layers]


def _share(layer: JudgedLayer, model: JudgedModel) -> str:
    whole = model.judged[-1].seconds
    return f"{100 * layer.seconds / whole:.0f} %" if whole > 0 else UNKNOWN


def _auc(aucs: Sequence[float], mean: float, deviation: float) -> str:
    if not aucs:
        return UNKNOWN
    return f"{mean:.4f}" if math.isnan(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def _mean(figures: Sequence[float]) -> str:
    return f"{fmean(figures):.4f}" if figures else UNKNOWN


def _figure(value: float) -> str:
    return UNKNOWN if math.isnan(value) else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def _megabytes(size: int) -> str:
    found = size / MEGABYTE
    return f"{found:,.0f}" if found >= 10 else f"{found:.2f}"

"""The report of an evaluation: a table of systems per dimension, the method, and plots of the AUC."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from marc_pipeline.report import plots
from marc_pipeline.report.cells import fixed, interval, p_text, plural, signed, with_deviation
from marc_pipeline.report.page import write_folder
from marc_pipeline.report.sections import ReportPage, ReportSection, ReportTable, plot_section
from marc_schemas.evaluation import Evaluation, Family, Summary
from marc_schemas.layers import Decision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON = "marc"
FAMILIES: tuple[Family, ...] = get_args(Family)
CHOSEN: dict[Decision, str] = {
    "clicks": "chosen on the training part alone",
    "configuration": "as configured",
    "adopted": "as adopted from a layer report",
    "all": "the final one",
}
COLOURS = {
    "marc": plots.BLUE,
    "marc-tuned": plots.SKY,
    "autoencoder": plots.PINK,
    "mrl": plots.RED,
    "contrastive": plots.BLACK,
    "random": plots.GREY,
    "final-full": plots.ORANGE,
}
BROWN = "#8C564B"
SPREAD_OCTAVES = 0.5

RANKS = ("Recall@10 ± std", "NDCG@10", "look-up Recall@10")

METHOD = (
    "Every system makes one vector per item. A small click model is trained for each system, dimension and seed; it "
    "reads the vectors without changing them. Its input: the item's vector, the mean vector of the user's last clicks, "
    "their product, and embeddings of the user id and the item id. It learns from the training part. The validation "
    "part chooses its epoch. All numbers are from the test part.",
    "The parts are split by time: every row of a part is later than every row of the part before.",
    "±: sample standard deviation over seeds. The vectors and the click model are trained with the same seed.",
    f"minus {COMPARISON}: mean difference in test AUC between runs of the same seed, with its 95 % interval (Student's "
    "t) and the two-sided p of the paired t-test. There is no correction for the number of comparisons.",
    "other users: 95 % interval of that difference when the test users are drawn again (1,000 draws with replacement, "
    "predictions averaged over seeds). The interval over seeds shows what another training could give; this one shows "
    "what other users could give.",
    "cold: items with fewer than five ratings in the training part.",
    "Recall@10, NDCG@10 (for purchases without ratings): ranks of the test part's positives among all items of the "
    "catalogue, without those that the user took before, by the click model. Look-up: by the cosine with the mean "
    "vector of the user's last clicks.",
    "The best layer in the findings is the best by test AUC. It cannot be known before the test, so it is the hardest "
    "rival.",
)


def write_evaluation_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write ``evaluation.json``, Markdown and HTML pages, and the plots that there is data for.

    Returns:
        The files written.
    """
    return write_folder("evaluation", evaluation, evaluation_page(evaluation), folder)


def evaluation_page(evaluation: Evaluation) -> ReportPage:
    """The content of the report."""
    title = f"Evaluation on {evaluation.backbone}"
    return ReportPage(title, list(_sections(evaluation)), findings=evaluation.findings)


def _sections(evaluation: Evaluation) -> Iterator[ReportSection]:
    yield from plot_section("auc_by_layer.png", "Test AUC by layer", _by_layer(evaluation))
    yield from plot_section("auc_by_dimension.png", "Test AUC by dimension", _by_dimension(evaluation))
    yield from plot_section("ablations.png", "Effect of the ablations", _ablations(evaluation))
    for dim in sorted({s.dim for s in evaluation.summaries}):
        yield ReportSection(f"d = {dim}" if dim else "Without vectors", tables=[_table(evaluation.summaries, dim)])
    yield ReportSection("Data", points=_data(evaluation))
    yield ReportSection("Method", points=METHOD)


def _data(evaluation: Evaluation) -> list[str]:
    train, validation, test = evaluation.rows
    return [
        f"training set {evaluation.training_id}: {evaluation.users:,} users, {evaluation.items:,} items",
        f"{train:,} rows for training, {validation:,} for validation, {test:,} for test, "
        f"{evaluation.cold_rows:,} of these of cold items",
        f"rows without a click: {evaluation.negatives}",
        f"backbone {evaluation.backbone}: {evaluation.layers} layers of width {evaluation.width}; "
        f"layer {evaluation.chosen_layer} {CHOSEN[evaluation.decision]}",
        plural(len({score.seed for score in evaluation.scores}), "seed"),
    ]


def _table(summaries: Sequence[Summary], dim: int) -> ReportTable:
    """One row per system of a dimension, by family, layers by number."""
    own = [s.dim for s in summaries if s.system == COMPARISON]
    elsewhere = f" at d = {max(own)}" if own and dim not in own else ""
    minus = f"minus {COMPARISON}{elsewhere} (95 % interval)"
    scores = ["AUC ± std", "cold AUC ± std", "log loss ± std"]
    shown = [s for s in sorted(summaries, key=_place) if s.dim == dim]
    ranked = any(not math.isnan(s.recall) for s in shown)
    header = ["system", "family", *scores, *(RANKS if ranked else ()), minus, "p", "other users", "bytes per item"]
    rows = [_cells(s, ranked=ranked) for s in shown]
    return ReportTable(header, rows, numbers=range(2, len(header)))


def _place(summary: Summary) -> tuple[int, int]:
    return FAMILIES.index(summary.family), -1 if summary.layer is None else summary.layer


def _cells(s: Summary, *, ranked: bool) -> list[str]:
    over_seeds = "" if s.low is None else f" ({interval(s.low, s.high)})"
    return [
        s.system,
        s.family,
        with_deviation(s.auc, s.auc_std),
        with_deviation(s.cold_auc, s.cold_auc_std),
        with_deviation(s.log_loss, s.log_loss_std),
        *([with_deviation(s.recall, s.recall_std), fixed(s.ndcg), fixed(s.lookup_recall)] if ranked else []),
        f"{signed(s.difference)}{over_seeds}",
        fixed(None) if s.p_value is None else p_text(s.p_value),
        interval(s.user_low, s.user_high),
        f"{s.bytes_per_item:,}",
    ]


# Plots


def _by_layer(evaluation: Evaluation) -> "Figure | None":
    """PCA of every layer, a panel per dimension; the comparison system as a band, random vectors as a line."""
    dims = sorted({s.dim for s in evaluation.summaries if s.family == "layer"})
    if not dims:
        return None
    figure, panels = plots.panel_figure(len(dims), columns=2, height=3.6, sharey=True)
    for panel, dim in zip(panels, dims, strict=True):
        _layer_panel(panel, [s for s in evaluation.summaries if s.dim == dim], evaluation.layers)
        panel.set_title(f"d = {dim}", fontsize=11)
    figure.supxlabel(f"layer of {evaluation.backbone} (0: embeddings, {evaluation.layers}: final)", fontsize=10)
    figure.supylabel("test AUC, mean ± std over seeds", fontsize=10)
    plots.legend(figure)
    return figure


def _layer_panel(panel: "Axes", summaries: Sequence[Summary], layers: int) -> None:
    curve = sorted((s for s in summaries if s.family == "layer"), key=_place)
    _bars(panel, [float(s.layer or 0) for s in curve], curve, "whitened PCA of the layer", plots.GREEN, "o")
    for s in summaries:
        if s.system == COMPARISON:
            panel.axhline(s.auc, color=plots.BLUE, linewidth=1.6, label=f"{COMPARISON}, band: ± std")
            if not math.isnan(s.auc_std):
                panel.axhspan(s.auc - s.auc_std, s.auc + s.auc_std, color=plots.BLUE, alpha=0.18, linewidth=0)
        elif s.system == "random":
            panel.axhline(s.auc, color=plots.GREY, linewidth=1.6, linestyle="--", label="random vectors")
    # At most about a dozen ticks, also for deep backbones.
    panel.set_xticks(range(0, layers + 1, max(1, math.ceil(layers / 12))))


def _bars(axes: "Axes", x: Sequence[float], points: Sequence[Summary], label: str, colour: str, marker: str) -> Any:  # noqa: ANN401 - a handle for a legend
    """Draw AUC and its standard deviation."""
    aucs, deviations = [s.auc for s in points], [s.auc_std for s in points]
    return axes.errorbar(x, aucs, yerr=deviations, color=colour, marker=marker, label=label, **plots.BAR)


def _by_dimension(evaluation: Evaluation) -> "Figure | None":
    """AUC of every system against the size of its vectors."""
    series = _series(evaluation)
    if not series:
        return None
    figure, (axes,) = plots.panel_figure(height=4.5)
    axes.set_xscale("log", base=2)
    handles: list[tuple[float, Any]] = []
    for place, (label, colour, points) in enumerate(series):
        x = [_beside(s, label, series) for s in points]
        marker = plots.MARKERS[place % len(plots.MARKERS)]
        handles.append((points[-1].auc, _bars(axes, x, points, label, colour, marker)))
    for s in evaluation.summaries:
        if s.dim == 0:
            label = f"{s.system} (no vectors)"
            line = axes.axhline(s.auc, color=plots.BLACK, linewidth=1.2, linestyle=":", label=label)
            handles.append((s.auc, line))
    _size_axes(axes, sorted({s.dim for _, _, points in series for s in points}))
    # In the order of the right ends of the lines.
    ranked = sorted(handles, key=lambda pair: -pair[0])
    figure.legend(handles=[handle for _, handle in ranked], loc="outside right upper", frameon=False)
    return figure


def _beside(s: Summary, label: str, series: Sequence[tuple[str, str, list[Summary]]]) -> float:
    """The x value of a point, near its dimension: points of one dimension stand side by side, so that all bars show."""
    labels = [other for other, _, points in series if any(point.dim == s.dim for point in points)]
    octaves = SPREAD_OCTAVES * ((labels.index(label) + 0.5) / len(labels) - 0.5)
    return float(s.dim * 2**octaves)


def _series(evaluation: Evaluation) -> list[tuple[str, str, list[Summary]]]:
    """Label, colour and points of every line, the highest first. Ablations have their own plot."""
    layers = [s for s in evaluation.summaries if s.family == "layer"]
    dims = sorted({s.dim for s in layers})
    best = [max((s for s in layers if s.dim == dim), key=lambda s: s.auc) for dim in dims]
    groups: dict[str, tuple[str, list[Summary]]] = {
        "best layer, PCA": (plots.GREEN, best),
        "final layer, PCA": (plots.ORANGE, [s for s in layers if s.layer == evaluation.layers]),
    }
    for s in evaluation.summaries:
        if s.family in ("reference", "baseline", "marc", "bundle") and s.dim:
            label = "final layer, full width" if s.system == "final-full" else s.system
            groups.setdefault(label, (COLOURS.get(s.system, BROWN), []))[1].append(s)
    found = [
        (label, colour, sorted(points, key=lambda s: s.dim)) for label, (colour, points) in groups.items() if points
    ]
    return sorted(found, key=lambda line: -line[2][-1].auc)


def _size_axes(axes: "Axes", dims: Sequence[int]) -> None:
    """Ticks at the dimensions below, the same in bytes above."""
    axes.set_xlim(dims[0] / 2**0.5, dims[-1] * 2**0.5)
    axes.set_xticks(dims, [f"{dim}" for dim in dims])
    axes.set(xlabel="numbers per vector, d", ylabel="test AUC, mean ± std over seeds")
    above = axes.secondary_xaxis("top", functions=(lambda d: np.multiply(d, 4), lambda b: np.divide(b, 4)))
    above.set_xticks([4 * dim for dim in dims], [f"{4 * dim:,}" for dim in dims])
    above.set_xlabel("bytes per item")
    above.spines["top"].set_visible(False)
    for both in (axes, above):
        both.minorticks_off()


def _ablations(evaluation: Evaluation) -> "Figure | None":
    """Difference of every ablation to the comparison system, a colour per dimension."""
    found = [s for s in evaluation.summaries if s.family == "ablation" and s.difference is not None]
    if not found:
        return None
    systems = list(dict.fromkeys(s.system for s in found))
    dims = sorted({s.dim for s in found})
    figure, (axes,) = plots.panel_figure(height=1.1 + 0.35 * len(systems) * (1 + len(dims)))
    axes.axvline(0, color=plots.BLACK, linewidth=1.2)
    for s in found:
        place = dims.index(s.dim)
        height = systems.index(s.system) + 0.25 * (place - (len(dims) - 1) / 2)
        colour = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PINK)[place % 4]
        _difference(axes, s, height, colour=colour, marker=plots.MARKERS[place % 10])
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"test AUC minus that of {COMPARISON}")
    plots.legend(figure)
    return figure


def _difference(axes: "Axes", s: Summary, height: float, *, colour: str, marker: str) -> None:
    if s.user_low is not None and s.user_high is not None:
        below = height + 0.08
        axes.hlines(below, s.user_low, s.user_high, color=colour, linewidth=1.2, label="thin: 95 % over test users")
    if s.low is not None and s.high is not None:
        axes.hlines(height, s.low, s.high, color=colour, linewidth=3, label="thick: 95 % over seeds")
    point: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 8, "markeredgecolor": "white"}
    axes.plot(s.difference or 0.0, height, linestyle="", label=f"d = {s.dim}", **point)

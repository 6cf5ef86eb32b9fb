"""An evaluation as a folder to read: its JSON, a Markdown page of findings and tables, and plots."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from pydantic_core import to_json

from pipeline.plots import (
    BAR,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    MARKERS,
    ORANGE,
    PINK,
    RED,
    SKY,
    legend,
    new_figure,
    save,
    signed,
    tidy,
)  # fmt: skip
from schemas.evaluation import Evaluation, Family, Summary
from schemas.layers import Decision

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARISON = "marc"
FAMILIES: tuple[Family, ...] = get_args(Family)
UNKNOWN = "–"
CHOSEN: dict[Decision, str] = {
    "clicks": "chosen by the training part alone",
    "configuration": "as configured",
    "adopted": "as adopted from a judgement of layers",
    "all": "the final one",
}

COLOURS = {"marc": BLUE, "marc-tuned": SKY, "autoencoder": PINK, "mrl": RED, "contrastive": BLACK, "random": GREY}
SPREAD_OCTAVES = 0.5
LAYERS_FILE, DIMENSIONS_FILE, ABLATIONS_FILE = "auc_by_layer.png", "auc_by_dimension.png", "ablations.png"
TITLES = {
    LAYERS_FILE: "Test AUC by layer",
    DIMENSIONS_FILE: "Test AUC by dimension",
    ABLATIONS_FILE: "What the ablations change",
}
TERMS = {"loss": "loss", "click": "click (BCE)", "keep": "keep, nHSIC(h, z)", "decouple": "decouple, nHSIC(z, s)"}

MEASURED = """\
- Every system makes one vector per item. A small click model, trained anew for each system, dimension and seed, reads
  them frozen: the item's vector, the mean of those of the user's last clicks, their product, and a user-id and an
  item-id embedding. It learns from the training part; the validation part chooses its epoch; all figures are of the
  test part.
- The parts are cut by time: every row of a part is later than every row of the part before.
- ±: sample standard deviation over seeds. A seed is that of the vectors' training and of the click model.
- minus {comparison}: mean difference in test AUC between runs of the same seed, with its 95 % interval (Student's t)
  and the paired t-test's two-sided p. Nothing is corrected for the number of comparisons.
- other users: 95 % interval of that difference when the test users are drawn anew (1,000 draws with replacement,
  predictions averaged over seeds). Intervals over seeds say what another training would give, these what other people
  would.
- cold: items with fewer than five ratings in the training part.
- The best layer of the findings is the best by test AUC. Nobody can choose so well beforehand: it is the hardest rival.
"""


def write_report(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write ``evaluation.json``, ``evaluation.md`` and those plots that there are figures for.

    In the JSON a NaN is the string "NaN": valid JSON, and ``Evaluation`` reads it back.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, page = folder / "evaluation.json", folder / "evaluation.md"
    # Not model_dump_json: it makes a null of NaN, which the contract refuses.
    data.write_bytes(to_json(evaluation.model_dump(), inf_nan_mode="strings", indent=2))
    plots = []
    for name, draw in ((LAYERS_FILE, _by_layer), (DIMENSIONS_FILE, _by_dimension), (ABLATIONS_FILE, _ablations)):
        figure = draw(evaluation)
        if figure is not None:
            plots.append(save(figure, folder / name))
    page.write_text(_page(evaluation, [plot.name for plot in plots]), encoding="utf-8")
    return [data, page, *plots]


def training_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Plot the terms of the training loss by epoch, and the validation AUC on a second axis.

    Args:
        history: one row per validation: ``epoch``, whole or not, and any of ``loss``, ``click``, ``keep``,
            ``decouple`` and ``validation_auc``; what else there is is left aside.
        path: of the PNG.

    Raises:
        ValueError: there is no row.
    """
    if not history:
        raise ValueError("there are no training curves without a validation")
    figure = new_figure(4.5)
    left = tidy(figure.subplots())
    for (name, label), colour, marker in zip(TERMS.items(), (BLACK, BLUE, GREEN, PINK), MARKERS, strict=False):
        _curve(left, history, name, label=label, colour=colour, marker=marker)
    left.set(xlabel="epoch", ylabel="training, mean since the last point")
    left.locator_params(axis="x", integer=True)
    if any("validation_auc" in row for row in history):
        right = left.twinx()
        right.spines["top"].set_visible(False)
        _curve(right, history, "validation_auc", label="validation AUC (right)", colour=RED, marker="D")
        right.set_ylabel("validation AUC", color=RED)
        right.tick_params(axis="y", colors=RED)
    legend(figure)
    save(figure, path)


# Page


def _page(evaluation: Evaluation, plots: Sequence[str]) -> str:
    train, validation, test = evaluation.rows
    seeds = {score.seed for score in evaluation.scores}
    return "\n".join(
        [
            f"# Evaluation on {evaluation.backbone}",
            "",
            "## What came out",
            "",
            *(f"- {finding}" for finding in evaluation.findings),
            "",
            *(line for plot in plots for line in (f"![{TITLES[plot]}]({plot})", "")),
            *_tables(evaluation.summaries),
            "## Data",
            "",
            f"- training set `{evaluation.training_id}`: {evaluation.users:,} users, {evaluation.items:,} items",
            f"- {train:,} rows for training, {validation:,} for validation, {test:,} for test, "
            f"{evaluation.cold_rows:,} of these of cold items",
            f"- backbone {evaluation.backbone}: {evaluation.layers} layers of width {evaluation.width}; "
            f"layer {evaluation.chosen_layer} {CHOSEN[evaluation.decision]}",
            f"- {len(seeds)} seed{'s' * (len(seeds) != 1)}",
            "",
            "## How it was measured",
            "",
            MEASURED.format(comparison=COMPARISON),
        ]
    )


def _tables(summaries: Sequence[Summary]) -> Iterator[str]:
    """One table per dimension."""
    dims = sorted({s.dim for s in summaries})
    own = [s.dim for s in summaries if s.system == COMPARISON]
    for dim in dims:
        elsewhere = f" at d = {max(own)}" if own and dim not in own else ""
        yield f"## {f'd = {dim}' if dim else 'Without vectors'}"
        yield ""
        yield (
            "| system | family | AUC ± std | cold AUC ± std | log loss ± std "
            f"| minus {COMPARISON}{elsewhere} (95 % interval) | p | other users | bytes per item |"
        )
        yield "|---|---|---|---|---|---|---|---|---|"
        rows = (s for s in summaries if s.dim == dim)
        yield from map(_row, sorted(rows, key=_place))
        yield ""


def _place(summary: Summary) -> tuple[int, int]:
    return FAMILIES.index(summary.family), -1 if summary.layer is None else summary.layer


def _row(s: Summary) -> str:
    difference = UNKNOWN if s.difference is None else f"{signed(s.difference)} {_interval(s.low, s.high)}".strip()
    cells = [
        s.system,
        s.family,
        _with_deviation(s.auc, s.auc_std),
        _with_deviation(s.cold_auc, s.cold_auc_std),
        _with_deviation(s.log_loss, s.log_loss_std),
        difference,
        UNKNOWN if s.p_value is None else "< 0.001" if s.p_value < 0.001 else f"{s.p_value:.3f}",
        _interval(s.user_low, s.user_high) or UNKNOWN,
        f"{s.bytes_per_item:,}",
    ]
    return f"| {' | '.join(cells)} |"


def _with_deviation(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return UNKNOWN
    return f"{mean:.4f}" if math.isnan(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"({signed(low)} to {signed(high)})"


# Plots


def _by_layer(evaluation: Evaluation) -> "Figure | None":
    """PCA of every layer, a panel per dimension; the comparison system as a band, random vectors as a line."""
    dims = sorted({s.dim for s in evaluation.summaries if s.family == "layer"})
    if not dims:
        return None
    columns = min(2, len(dims))
    lines = math.ceil(len(dims) / columns)
    figure = new_figure(0.6 + 3.6 * lines)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for panel, dim in zip_longest(panels, dims):
        if dim is None:
            panel.remove()
            continue
        _layer_panel(tidy(panel), [s for s in evaluation.summaries if s.dim == dim], evaluation.layers)
        panel.set_title(f"d = {dim}", fontsize=11)
    figure.supxlabel(f"layer of {evaluation.backbone} (0: embeddings, {evaluation.layers}: final)", fontsize=10)
    figure.supylabel("test AUC, mean ± std over seeds", fontsize=10)
    legend(figure)
    return figure


def _layer_panel(panel: "Axes", summaries: Sequence[Summary], layers: int) -> None:
    curve = sorted((s for s in summaries if s.family == "layer"), key=_place)
    panel.errorbar(
        [float(s.layer or 0) for s in curve],
        [s.auc for s in curve],
        yerr=[s.auc_std for s in curve],
        color=GREEN,
        marker="o",
        label="whitened PCA of the layer",
        **BAR,
    )
    for s in summaries:
        if s.system == COMPARISON:
            panel.axhline(s.auc, color=BLUE, linewidth=1.6, label=f"{COMPARISON}, band: ± std")
            if not math.isnan(s.auc_std):
                panel.axhspan(s.auc - s.auc_std, s.auc + s.auc_std, color=BLUE, alpha=0.18, linewidth=0)
        elif s.system == "random":
            panel.axhline(s.auc, color=GREY, linewidth=1.6, linestyle="--", label="random vectors")
    # A tick for each of a dozen layers; of a deep backbone, for some.
    panel.set_xticks(range(0, layers + 1, max(1, math.ceil(layers / 12))))


def _by_dimension(evaluation: Evaluation) -> "Figure | None":
    """AUC of every system against the size of its vectors."""
    series = _series(evaluation)
    if not series:
        return None
    figure = new_figure(5)
    axes = tidy(figure.subplots())
    axes.set_xscale("log", base=2)
    handles: list[tuple[float, Any]] = []
    for place, (label, colour, points) in enumerate(series):
        handle = axes.errorbar(
            [_beside(s, label, series) for s in points],
            [s.auc for s in points],
            yerr=[s.auc_std for s in points],
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            label=label,
            **BAR,
        )
        handles.append((points[-1].auc, handle))
    for s in evaluation.summaries:
        if s.dim == 0:
            line = axes.axhline(s.auc, color=BLACK, linewidth=1.2, linestyle=":", label=f"{s.system} (no vectors)")
            handles.append((s.auc, line))
    _size_axes(axes, sorted({s.dim for _, _, points in series for s in points}))
    # In the order of the lines' right ends.
    ranked = sorted(handles, key=lambda pair: -pair[0])
    figure.legend(handles=[handle for _, handle in ranked], loc="outside right upper", frameon=False)
    return figure


def _beside(s: Summary, label: str, series: Sequence[tuple[str, str, list[Summary]]]) -> float:
    """Where a point stands around its dimension: side by side, or the bars would hide one another."""
    labels = [other for other, _, points in series if any(point.dim == s.dim for point in points)]
    octaves = SPREAD_OCTAVES * ((labels.index(label) + 0.5) / len(labels) - 0.5)
    return float(s.dim * 2**octaves)


def _series(evaluation: Evaluation) -> list[tuple[str, str, list[Summary]]]:
    """Label, colour and points of every line, the highest first; ablations have a plot of their own."""
    layers = [s for s in evaluation.summaries if s.family == "layer"]
    dims = sorted({s.dim for s in layers})
    best = [max((s for s in layers if s.dim == dim), key=lambda s: s.auc) for dim in dims]
    groups: dict[str, tuple[str, list[Summary]]] = {
        "best layer, PCA": (GREEN, best),
        "final layer, PCA": (ORANGE, [s for s in layers if s.layer == evaluation.layers]),
    }
    for s in evaluation.summaries:
        if s.family in ("reference", "baseline", "marc", "bundle") and s.dim:
            label = "final layer, full width" if s.system == "final-full" else s.system
            colour = ORANGE if s.system == "final-full" else COLOURS.get(s.system, "#8C564B")
            groups.setdefault(label, (colour, []))[1].append(s)
    found = [
        (label, colour, sorted(points, key=lambda s: s.dim)) for label, (colour, points) in groups.items() if points
    ]
    return sorted(found, key=lambda line: -line[2][-1].auc)


def _size_axes(axes: "Axes", dims: Sequence[int]) -> None:
    """Ticks at the dimensions below, the same in bytes above."""
    from matplotlib.ticker import NullLocator  # noqa: PLC0415 - as in new_figure

    axes.set_xlim(dims[0] / 2**0.5, dims[-1] * 2**0.5)
    axes.set_xticks(dims, [f"{dim}" for dim in dims])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="numbers per vector, d", ylabel="test AUC, mean ± std over seeds")
    above = axes.secondary_xaxis("top", functions=(lambda d: np.multiply(d, 4), lambda b: np.divide(b, 4)))
    above.set_xticks([4 * dim for dim in dims], [f"{4 * dim:,}" for dim in dims])
    above.xaxis.set_minor_locator(NullLocator())
    above.set_xlabel("bytes per item")
    above.spines["top"].set_visible(False)


def _ablations(evaluation: Evaluation) -> "Figure | None":
    """Difference of every ablation to the comparison system, a colour per dimension."""
    found = [s for s in evaluation.summaries if s.family == "ablation" and s.difference is not None]
    if not found:
        return None
    systems = list(dict.fromkeys(s.system for s in found))
    dims = sorted({s.dim for s in found})
    figure = new_figure(1.6 + 0.35 * len(systems) * (1 + len(dims)))
    axes = tidy(figure.subplots())
    axes.axvline(0, color=BLACK, linewidth=1.2)
    for s in found:
        place = dims.index(s.dim)
        height = systems.index(s.system) + 0.25 * (place - (len(dims) - 1) / 2)
        _difference(axes, s, height, colour=(BLUE, ORANGE, GREEN, PINK)[place % 4], marker=MARKERS[place % 10])
    axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"test AUC minus that of {COMPARISON}")
    legend(figure)
    return figure


def _difference(axes: "Axes", s: Summary, height: float, *, colour: str, marker: str) -> None:
    if s.user_low is not None and s.user_high is not None:
        below = height + 0.08
        axes.hlines(below, s.user_low, s.user_high, color=colour, linewidth=1.2, label="thin: 95 % over test users")
    if s.low is not None and s.high is not None:
        axes.hlines(height, s.low, s.high, color=colour, linewidth=3, label="thick: 95 % over seeds")
    point: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 8, "markeredgecolor": "white"}
    axes.plot(s.difference or 0.0, height, linestyle="", label=f"d = {s.dim}", **point)


def _curve(
    axes: "Axes", history: Sequence[Mapping[str, float]], name: str, *, label: str, colour: str, marker: str
) -> None:
    rows = [row for row in history if name in row]
    if rows:
        epochs, values = [row["epoch"] for row in rows], [row[name] for row in rows]
        axes.plot(epochs, values, label=label, color=colour, marker=marker, linewidth=1.6, markersize=4)

"""The report of benchmark scores by layer: findings, tables per model, and plots."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from marc_pipeline.layers.scores import COUNTS
from marc_pipeline.report import plots
from marc_pipeline.report.cells import UNKNOWN, fixed, plural, signed
from marc_pipeline.report.page import write_folder
from marc_pipeline.report.sections import ReportPage, ReportSection, ReportTable, plot_section
from marc_schemas.scores import LayerComparison, ModelCurve, ScoreReport, TaskWinner

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COUNTING = "last counted layer"
SHARED = "Incomplete models, over the tasks that their layers share"
LIKE_FOR_LIKE = (
    "Only counted layers, and only tasks that each of them has. All means are over the same tasks, unlike in the table "
    "above."
)
COMPARED = ["final", "best layer", "best", "gain"]
# An incomplete model is drawn if its layers share at least this part of all tasks.
DRAWN = Fraction(1, 2)
# Up to this many curves share one panel.
PANEL_CURVES = 4

READING = (
    "The score of a model at a layer is the mean of the main scores of its tasks. All tasks have the same weight.",
    "Complete: every layer from the lowest to the highest on record has a score of every task of the model.",
    f"A layer is counted if it has at least {COUNTS.numerator} of {COUNTS.denominator} of the model's tasks. "
    "Incomplete models are compared over counted layers only, in two ways: as recorded, where the mean of a layer is "
    "over the tasks that it has; and over the tasks that all counted layers have. Only the second way is fair: a layer "
    "without a hard task looks better than it is.",
    "Final: the highest counted layer. The scores do not show whether the model has higher layers.",
    "Best: the layer with the highest mean; of equal layers the lowest. It was chosen by these same scores, so on "
    "other tasks its gain may be smaller.",
    "Relative depth: the layer divided by the highest layer on record.",
)


def write_score_report(report: ScoreReport, folder: Path) -> list[Path]:
    """Write ``scores.json``, Markdown and HTML pages, and the plots that there are scores for.

    Returns:
        The files written.
    """
    return write_folder("scores", report, score_page(report), folder)


def score_page(report: ScoreReport) -> ReportPage:
    """The content of the report."""
    complete = sum(model.complete for model in report.models)
    lead = (
        f"{plural(len(report.models), 'model')}, {complete} of them complete; {plural(len(report.tasks), 'task')} in "
        "all. A score is the main score of a task on the frozen vectors of one layer."
    )
    title = "Benchmark scores by layer"
    return ReportPage(title, list(_sections(report)), lead=[lead], findings=score_findings(report))


def _sections(report: ScoreReport) -> Iterator[ReportSection]:
    yield from plot_section(
        "scores_by_layer.png",
        "Mean score by relative depth",
        score_curves(report),
        "Stars mark the best layer. Dashed lines with hollow marks: incomplete models, means over the shared tasks.",
    )
    yield ReportSection("Models, as recorded", tables=[model_table(report)])
    if shared_table(report).rows:
        yield ReportSection(SHARED, [LIKE_FOR_LIKE], tables=[shared_table(report)])
    yield ReportSection("Model by model", points=model_sentences(report))
    yield from plot_section(
        "task_winners.png",
        "Best layer of each task",
        winner_grid(report),
        "Each cell shows the layer where the score of the task is highest; the colour is its relative depth.",
    )
    if not all(model.complete for model in report.models):
        yield ReportSection("Missing scores", tables=[_missing_table(report)])
    for model in report.models:
        yield ReportSection(model.name, tables=[_winner_table(model), _layer_table(model)], folded=True)
    yield ReportSection("How to read this report", points=READING)


# Sentences


def score_findings(report: ScoreReport) -> list[str]:
    """The main results, one sentence each."""
    complete = [model for model in report.models if model.complete]
    found = list(_overall(complete))
    gains = [(model.same_tasks.gain, model) for model in complete if model.same_tasks]
    if len(gains) > 1:
        found.append(f"The largest gain is that of {_sentence(max(gains, key=lambda pair: pair[0])[1])}")
    elif gains:
        found.append(_sentence(gains[0][1]))
    found += [_sentence(model) for model in report.models if not model.complete and not complete]
    incomplete = [model.name for model in report.models if not model.complete]
    if complete and incomplete:
        found.append(
            f"Incomplete: {', '.join(incomplete)}. Layers are absent or lack tasks, so only means over the tasks that "
            "their layers share can be compared."
        )
    return found


def model_sentences(report: ScoreReport) -> list[str]:
    """One sentence per model, complete models first."""
    return [_sentence(model) for model in sorted(report.models, key=lambda model: not model.complete)]


def _overall(complete: Sequence[ModelCurve]) -> Iterator[str]:
    compared = [model.same_tasks for model in complete if model.same_tasks]
    if len(compared) > 1:
        before = sum(c.best_layer < c.final_layer for c in compared)
        yield f"In {before} of {len(compared)} complete models a layer before the last on record has the highest mean."
    depths = [winner.layer / model.highest_layer for model in complete for winner in model.winners]
    if depths:
        early = sum(depth < 1 for depth in depths)
        yield (
            f"Task by task, {early:,} of {len(depths):,} best layers ({100 * early / len(depths):.0f} %) are before "
            f"the last on record; half of all have a relative depth of {median(depths):.2f} or less."
        )


def _sentence(model: ModelCurve) -> str:
    recorded, same = model.as_recorded, model.same_tasks
    if recorded is None:
        return f"{model.name}: too few scores to compare layers ({_record(model)})."
    best_tasks = plural(recorded.best_tasks, "task")
    if model.complete:
        return f"{model.name}: {_compared(recorded, 'last on record')} ({best_tasks}, {recorded.layers} layers)."
    sentence = f"{model.name}, incomplete ({_record(model)}): as recorded, {_compared(recorded, COUNTING)}"
    if recorded.best_tasks != recorded.final_tasks:
        sentence += f", the first over {best_tasks}, the second over {recorded.final_tasks}"
    if same is not None:
        shared = f"over the {plural(same.best_tasks, 'task')} that all {same.layers} counted layers have"
        sentence += f"; {shared}, {_compared(same, COUNTING)}"
    return f"{sentence}."


def _compared(c: LayerComparison, last: str) -> str:
    if c.best_layer == c.final_layer:
        return f"no layer is better than the {last}, {c.final_layer}, with {fixed(c.final)}"
    return f"layer {c.best_layer} has {fixed(c.best)}, the {last}, {c.final_layer}, {fixed(c.final)}: {_gain(c)}"


def _record(model: ModelCurve) -> str:
    """Counts of layers and tasks on record, and of missing layers and scores."""
    parts = [plural(len(model.layers), "layer"), plural(len(model.tasks), "task")]
    if model.absent_layers:
        parts.append(f"{plural(len(model.absent_layers), 'layer')} absent between the lowest and the highest")
    if model.partial_layers:
        parts += [
            f"{plural(len(model.partial_layers), 'layer')} without all tasks",
            f"{_missing(model)} scores missing",
        ]
    return ", ".join(parts)


def _missing(model: ModelCurve) -> str:
    return f"{model.missing_scores:,} of {len(model.layers) * len(model.tasks):,}"


def _gain(c: LayerComparison) -> str:
    return signed(c.gain) + ("" if c.percent is None else f" (+{c.percent:.1f} %)")


# Tables


def model_table(report: ScoreReport) -> ReportTable:
    """One row per model: layers and tasks on record, the final layer, the best layer, the gain."""
    rows = [
        [m.name, _range(m), str(len(m.tasks)), "yes" if m.complete else "no", *_cells(m.as_recorded)]
        for m in report.models
    ]
    return ReportTable(["model", "layers", "tasks", "complete", *COMPARED], rows, numbers=(1, 2, 4, 5, 6, 7))


def shared_table(report: ScoreReport) -> ReportTable:
    """One row per incomplete model that can be compared over the tasks that its layers share."""
    rows = [
        [model.name, str(same.layers), f"{same.best_tasks} of {len(model.tasks)}", *_cells(same)]
        for model in report.models
        if not model.complete and (same := model.same_tasks) is not None
    ]
    return ReportTable(["model", "counted layers", "shared tasks", *COMPARED], rows, numbers=range(1, 7))


def _range(model: ModelCurve) -> str:
    first, last = model.layers[0].layer, model.highest_layer
    return f"{len(model.layers)} ({first}–{last})" if first != last else f"1 ({first})"


def _cells(c: LayerComparison | None) -> list[str]:
    if c is None:
        return [UNKNOWN] * len(COMPARED)
    return [fixed(c.final), f"{c.best_layer} of {c.final_layer}", fixed(c.best), _gain(c)]


def _missing_table(report: ScoreReport) -> ReportTable:
    rows = []
    for model in report.models:
        if not model.complete:
            absent = ", ".join(map(str, model.absent_layers))
            partial = [mean for mean in model.layers if mean.layer in model.partial_layers]
            without = ", ".join(f"{mean.layer} ({mean.tasks})" for mean in partial)
            rows.append([model.name, _range(model), absent or UNKNOWN, without or UNKNOWN, _missing(model)])
    header = ["model", "layers on record", "absent layers", "layers without every task (tasks)", "scores missing"]
    return ReportTable(header, rows, numbers=(4,))


def _winner_table(model: ModelCurve) -> ReportTable:
    rows = [
        [w.task, str(w.layer), fixed(w.score), fixed(w.final), signed(w.gain), str(w.layers)] for w in model.winners
    ]
    header = ["task", "best layer", "score", "score of the final layer", "gain", "layers with a score"]
    return ReportTable(header, rows, numbers=range(1, 6), caption=f"{model.name}: the best layer of each task")


def _layer_table(model: ModelCurve) -> ReportTable:
    rows = [
        [str(m.layer), f"{_depth(m.layer, model):.2f}", str(m.tasks), fixed(m.mean), fixed(m.same_tasks_mean)]
        for m in model.layers
    ]
    header = ["layer", "relative depth", "tasks", "mean", "mean over shared tasks"]
    return ReportTable(header, rows, numbers=range(5), caption=f"{model.name}: mean score of each layer")


# Plots


def drawn(report: ScoreReport) -> list[ModelCurve]:
    """Return complete models, and incomplete models whose layers share enough tasks."""
    return [
        model
        for model in report.models
        if model.complete or (model.same_tasks and model.same_tasks.best_tasks >= DRAWN * len(report.tasks))
    ]


def score_curves(report: ScoreReport) -> "Figure | None":
    """Mean score against relative depth, one curve per model; with many models one panel per family."""
    models = drawn(report)
    if not models:
        return None
    families = list(dict.fromkeys(model.family for model in models))
    groups = [[model for model in models if model.family == family] for family in families]
    if len(models) <= PANEL_CURVES:
        groups = [models]
    # Four panels make a square.
    columns = 2 if len(groups) == 4 else 3
    figure, panels = plots.panel_figure(len(groups), columns=columns, height=3.7, sharey=True)
    for panel, group in zip(panels, groups, strict=True):
        for place, model in enumerate(group):
            _draw(panel, model, len(report.tasks), alone=len(groups) == 1, place=place)
        plots.depth_axis(panel)
        if len(groups) > 1:
            panel.set_title(plots.plot_text(group[0].family), fontsize=11)
            panel.legend(frameon=False, fontsize=8, loc="best")
    figure.supxlabel("relative depth (layer / highest layer on record)", fontsize=10)
    figure.supylabel("mean score", fontsize=10)
    if len(groups) == 1:
        plots.legend(figure, columns=2)
    return figure


def _draw(panel: "Axes", model: ModelCurve, tasks: int, *, alone: bool, place: int) -> None:
    compared = model.same_tasks
    if compared is None:
        return
    means = {mean.layer: mean.same_tasks_mean for mean in model.layers if mean.same_tasks_mean is not None}
    # NaN for layers that are absent or not counted: the line has a gap there.
    layers = range(min(means), max(means) + 1)
    label = model.name if alone else model.size or model.family
    if compared.best_tasks != tasks:
        label += f" ({compared.best_tasks} of {tasks} tasks)"
    style = plots.series_style(place) | {"markersize": 4}
    if not model.complete:
        style |= {"linestyle": "--", "markerfacecolor": "white"}
    depths, scores = [_depth(layer, model) for layer in layers], [means.get(layer, math.nan) for layer in layers]
    panel.plot(depths, scores, label=plots.plot_text(label), **style)
    star: dict[str, Any] = {"marker": "*", "markersize": 12, "markeredgecolor": plots.BLACK, "markeredgewidth": 0.7}
    panel.plot([_depth(compared.best_layer, model)], [compared.best], color=style["color"], linestyle="", **star)


def winner_grid(report: ScoreReport) -> "Figure | None":
    """Best layer of every task and model, coloured by relative depth; tasks with early winners first."""
    models = drawn(report)
    if not models:
        return None
    found: dict[str, dict[int, TaskWinner]] = {}
    for column, model in enumerate(models):
        for winner in model.winners:
            found.setdefault(winner.task, {})[column] = winner
    depths = {
        task: {column: _depth(winner.layer, models[column]) for column, winner in by_model.items()}
        for task, by_model in found.items()
    }
    tasks = sorted(found, key=lambda task: (math.fsum(depths[task].values()) / len(depths[task]), task))
    figure = plots.new_figure(1.9 + 0.24 * len(tasks))
    axes = figure.subplots()
    axes.set_facecolor(plots.FAINT)
    grid = [[depths[task].get(column, math.nan) for column in range(len(models))] for task in tasks]
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for line, task in enumerate(tasks):
        for column, winner in found[task].items():
            # Viridis is dark at its low end and light at its high end.
            colour = "white" if grid[line][column] < 0.6 else plots.BLACK
            axes.text(column, line, str(winner.layer), ha="center", va="center", fontsize=8, color=colour)
    names = [plots.plot_text(model.name + ("" if model.complete else " *")) for model in models]
    axes.set_xticks(range(len(models)), names, rotation=30, ha="left", rotation_mode="anchor", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(tasks)), [plots.plot_text(task) for task in tasks], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="relative depth of the best layer", fraction=0.03, pad=0.02)
    if not all(model.complete for model in models):
        axes.set_xlabel("* incomplete: the best of the layers that have the task", fontsize=9, loc="left")
    return figure


def _depth(layer: int, model: ModelCurve) -> float:
    return layer / model.highest_layer if model.highest_layer else 0.0

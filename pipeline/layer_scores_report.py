"""Benchmark scores by layer as a folder to read: JSON, Markdown, one HTML page and plots."""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from pipeline.layer_scores import COUNTS
from pipeline.plots import (
    BLACK,
    CYCLE,
    FAINT,
    MARKERS,
    PageTable,
    Section,
    html_page,
    legend,
    markdown_text,
    new_figure,
    plot_text,
    save,
    svg,
    tidy,
)  # fmt: skip
from schemas.scores import Comparison, ModelCurve, ScoreReport, TaskWinner

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNKNOWN = "–"
TITLE = "Benchmark scores by layer"
COUNTING = "last that counts"
SHARED = "Models that are not complete, over the tasks that their layers share"
LIKE_FOR_LIKE = (
    "Of the layers that count, over those tasks that each of them has: like for like, unlike the table above."
)
CURVES_FILE, WINNERS_FILE = "scores_by_layer.png", "task_winners.png"
TITLES = {CURVES_FILE: "Mean score by relative depth", WINNERS_FILE: "Where the best layer of each task lies"}
# An incomplete model is drawn over the tasks that its layers share, if those are at least so many of all tasks.
DRAWN = Fraction(1, 2)
# Up to so many curves share one panel.
PANEL_CURVES = 4
PANEL_COLUMNS = 3

MEASURED = [
    "A model's score at a layer is the mean of its tasks' main scores there; every task weighs the same.",
    "Complete: every layer from the lowest to the highest on record has a score of every task of the model.",
    f"A layer counts when it has at least {COUNTS.numerator} of {COUNTS.denominator} of the model's tasks. "
    "In a model that is not complete, only layers that count are compared, in two ways: as recorded, each "
    "layer's mean being over the tasks that it has; and over those tasks that all of these layers have. Only the "
    "second is like for like: a layer that lacks a hard task looks better than it is.",
    "Final: the highest layer that counts. Whether the model has higher ones, the scores do not say.",
    "Best: the layer with the highest mean, the lowest of equals. It was chosen by these same scores: on other tasks "
    "it may gain less.",
    "Relative depth: the layer divided by the highest layer on record.",
]


def write_report(report: ScoreReport, folder: Path) -> list[Path]:
    """Write ``scores.json``, ``scores.md``, ``scores.html`` and those plots that there are scores for.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, text, page = (folder / f"scores.{kind}" for kind in ("json", "md", "html"))
    data.write_text(report.model_dump_json(indent=2), encoding="utf-8")
    plots, elements = [], {}
    for name, draw in ((CURVES_FILE, curves), (WINNERS_FILE, winners)):
        figure = draw(report)
        if figure is not None:
            plots.append(save(figure, folder / name))
            elements[name] = svg(figure, title=TITLES[name])
    text.write_text(_markdown(report, [plot.name for plot in plots]), encoding="utf-8")
    page.write_text(html_page(TITLE, _sections(report, elements), lead=_lead(report), findings=findings(report)))
    return [data, text, page, *plots]


# Words


def findings(report: ScoreReport) -> list[str]:
    """What a reader should know first, in sentences."""
    complete = [model for model in report.models if model.complete]
    found = list(_overall(complete))
    gains = [(model.same_tasks.gain, model) for model in complete if model.same_tasks]
    if len(gains) > 1:
        found.append(f"The most is gained by {_sentence(max(gains, key=lambda pair: pair[0])[1])}")
    elif gains:
        found.append(_sentence(gains[0][1]))
    found += [_sentence(model) for model in report.models if not model.complete and not complete]
    incomplete = [model.name for model in report.models if not model.complete]
    if complete and incomplete:
        verb = "is" if len(incomplete) == 1 else "are"
        found.append(
            f"Not complete {verb} {', '.join(incomplete)}: layers are absent, or have not all tasks. Like for like are "
            "only means over the tasks that layers share."
        )
    return found


def sentences(report: ScoreReport) -> list[str]:
    """One sentence a model: complete ones, then the others, with what is missing of them."""
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
            f"Task by task, {early:,} of {len(depths):,} best layers ({100 * early / len(depths):.0f} %) lie before "
            f"the last on record, half of all at a relative depth of {median(depths):.2f} or less."
        )


def _sentence(model: ModelCurve) -> str:
    recorded, same = model.as_recorded, model.same_tasks
    if recorded is None:
        return f"{model.name}: too little on record to compare layers ({_record(model)})."
    if model.complete:
        return f"{model.name}: {_compared(recorded)} ({_tasks(recorded.best_tasks)}, {recorded.layers} layers)."
    said = f"{model.name}, not complete ({_record(model)}): as recorded, {_compared(recorded, COUNTING)}"
    if recorded.best_tasks != recorded.final_tasks:
        said += f", the one over {_tasks(recorded.best_tasks)}, the other over {recorded.final_tasks}"
    if same is not None:
        said += f"; over the {_tasks(same.best_tasks)} that all {same.layers} layers have which count, "
        said += _compared(same, COUNTING)
    return f"{said}."


def _compared(c: Comparison, last: str = "last on record") -> str:
    if c.best_layer == c.final_layer:
        return f"no layer is better than the {last}, {c.final_layer}, with {_score(c.final)}"
    final = f"the {last}, {c.final_layer}, {_score(c.final)}"
    return f"layer {c.best_layer} has {_score(c.best)}, {final}: {_gain(c)}"


def _record(model: ModelCurve) -> str:
    """What is on record, and what is missing of it."""
    said = [f"{len(model.layers)} layer{'s' * (len(model.layers) != 1)}, {_tasks(len(model.tasks))}"]
    if model.absent_layers:
        said.append(f"{len(model.absent_layers)} more absent between the lowest and the highest")
    if model.partial_layers:
        all_scores = len(model.layers) * len(model.tasks)
        said.append(f"{len(model.partial_layers)} without all tasks")
        said.append(f"{model.missing_scores:,} of {all_scores:,} scores missing")
    return ", ".join(said)


def _lead(report: ScoreReport) -> str:
    complete = sum(model.complete for model in report.models)
    return (
        f"{len(report.models)} model{'s' * (len(report.models) != 1)}, {complete} of them complete; "
        f"{_tasks(len(report.tasks))} in all. A score is a task's main score on the frozen vectors of one layer."
    )


def _tasks(count: int) -> str:
    return f"{count} task{'s' * (count != 1)}"


def _score(score: float) -> str:
    return f"{score:.4f}"


def _gain(c: Comparison) -> str:
    return f"+{c.gain:.4f}" + ("" if c.percent is None else f" (+{c.percent:.1f} %)")


# Tables


def model_table(report: ScoreReport) -> PageTable:
    """One row a model: what is on record, the final and the best layer, the gain."""
    return PageTable(
        ["model", "layers", "tasks", "complete", "final", "best layer", "best", "gain"],
        [
            [
                model.name,
                _range(model),
                str(len(model.tasks)),
                "yes" if model.complete else "no",
                *_cells(model.as_recorded),
            ]
            for model in report.models
        ],
        numbers=(1, 2, 4, 5, 6, 7),
    )


def shared_table(report: ScoreReport) -> PageTable:
    """One row for each model that is not complete but can be compared: the same over the tasks its layers share."""
    return PageTable(
        ["model", "layers that count", "shared tasks", "final", "best layer", "best", "gain"],
        [
            [model.name, str(same.layers), f"{same.best_tasks} of {len(model.tasks)}", *_cells(same)]
            for model in report.models
            if not model.complete and (same := model.same_tasks) is not None
        ],
        numbers=(1, 2, 3, 4, 5, 6),
    )


def _range(model: ModelCurve) -> str:
    first, last = model.layers[0].layer, model.highest_layer
    return f"{len(model.layers)} ({first}–{last})" if first != last else f"1 ({first})"


def _cells(c: Comparison | None) -> list[str]:
    if c is None:
        return [UNKNOWN] * 4
    return [_score(c.final), f"{c.best_layer} of {c.final_layer}", _score(c.best), _gain(c)]


def _incomplete_table(report: ScoreReport) -> PageTable:
    return PageTable(
        ["model", "layers on record", "absent layers", "layers without every task (tasks)", "scores missing"],
        [
            [
                model.name,
                _range(model),
                _list(map(str, model.absent_layers)),
                _list(f"{mean.layer} ({mean.tasks})" for mean in model.layers if mean.layer in model.partial_layers),
                f"{model.missing_scores:,} of {len(model.layers) * len(model.tasks):,}",
            ]
            for model in report.models
            if not model.complete
        ],
        numbers=(4,),
    )


def _list(words: "Iterator[str] | map[str]") -> str:
    return ", ".join(words) or UNKNOWN


def _winner_table(model: ModelCurve) -> PageTable:
    return PageTable(
        ["task", "best layer", "score", "final layer's", "gain", "layers with a score"],
        [
            [
                winner.task,
                str(winner.layer),
                _score(winner.score),
                UNKNOWN if winner.final is None else _score(winner.final),
                UNKNOWN if winner.gain is None else f"+{winner.gain:.4f}",
                str(winner.layers),
            ]
            for winner in model.winners
        ],
        numbers=(1, 2, 3, 4, 5),
        caption=f"{model.name}: the best layer of each task",
    )


def _layer_table(model: ModelCurve) -> PageTable:
    return PageTable(
        ["layer", "relative depth", "tasks", "mean", "mean over shared tasks"],
        [
            [
                str(mean.layer),
                f"{_depth(mean.layer, model):.2f}",
                str(mean.tasks),
                _score(mean.mean),
                UNKNOWN if mean.same_tasks_mean is None else _score(mean.same_tasks_mean),
            ]
            for mean in model.layers
        ],
        numbers=(0, 1, 2, 3, 4),
        caption=f"{model.name}: mean score of each layer",
    )


# Pages


def _sections(report: ScoreReport, elements: dict[str, str]) -> list[Section]:
    found = []
    if CURVES_FILE in elements:
        found.append(
            Section(
                TITLES[CURVES_FILE],
                ["Stars mark the best layer. Dashed with hollow marks: not complete, means over the shared tasks."],
                figures=[elements[CURVES_FILE]],
            )
        )
    found.append(Section("Models, as recorded", tables=[model_table(report)]))
    if shared_table(report).rows:
        found.append(Section(SHARED, [LIKE_FOR_LIKE], tables=[shared_table(report)]))
    found.append(Section("Model by model", points=sentences(report)))
    if WINNERS_FILE in elements:
        found.append(
            Section(
                TITLES[WINNERS_FILE],
                ["Each cell: the layer where the task's score is highest, coloured by its relative depth."],
                figures=[elements[WINNERS_FILE]],
            )
        )
    if any(not model.complete for model in report.models):
        found.append(Section("What is missing", tables=[_incomplete_table(report)]))
    found += [
        Section(f"{m.name}: figures", tables=[_winner_table(m), _layer_table(m)], folded=True) for m in report.models
    ]
    return [*found, Section("How to read this", points=MEASURED)]


def _markdown(report: ScoreReport, plots: Sequence[str]) -> str:
    lines = [f"# {TITLE}", "", _lead(report), "", *(f"- {markdown_text(finding)}" for finding in findings(report)), ""]
    lines += [line for plot in plots for line in (f"![{TITLES[plot]}]({plot})", "")]
    lines += ["## Models, as recorded", "", *_markdown_table(model_table(report))]
    if shared_table(report).rows:
        lines += [f"## {SHARED}", "", LIKE_FOR_LIKE, "", *_markdown_table(shared_table(report))]
    lines += ["## Model by model", "", *(f"- {markdown_text(sentence)}" for sentence in sentences(report)), ""]
    if any(not model.complete for model in report.models):
        lines += ["## What is missing", "", *_markdown_table(_incomplete_table(report))]
    for model in report.models:
        lines += [f"## {markdown_text(model.name)}", "", *_markdown_table(_winner_table(model))]
        lines += _markdown_table(_layer_table(model))
    return "\n".join([*lines, "## How to read this", "", *(f"- {sentence}" for sentence in MEASURED), ""])


def _markdown_table(table: PageTable) -> Iterator[str]:
    if table.caption:
        yield markdown_text(table.caption)
        yield ""
    yield f"| {' | '.join(table.header)} |"
    yield f"|{'|'.join('---:' if place in table.numbers else '---' for place in range(len(table.header)))}|"
    for row in table.rows:
        yield f"| {' | '.join(map(markdown_text, row))} |"
    yield ""


# Plots


def drawn(report: ScoreReport) -> list[ModelCurve]:
    """Complete models, and those whose layers share enough tasks."""
    return [
        model
        for model in report.models
        if model.complete or (model.same_tasks and model.same_tasks.best_tasks >= DRAWN * len(report.tasks))
    ]


def curves(report: ScoreReport) -> "Figure | None":
    """Mean score against relative depth, a curve a model; a panel a family where there are many."""
    models = drawn(report)
    if not models:
        return None
    families = list(dict.fromkeys(model.family for model in models))
    groups = [[model for model in models if model.family == family] for family in families]
    if len(models) <= PANEL_CURVES:
        groups = [models]
    # Four panels make a square.
    columns = 2 if len(groups) == 4 else min(PANEL_COLUMNS, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(0.5 + 3.7 * lines if lines > 1 else 4.6)
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for panel, group in zip(panels, groups, strict=False):
        tidy(panel)
        for place, model in enumerate(group):
            _draw(panel, model, len(report.tasks), alone=len(groups) == 1, place=place)
        panel.set_xlim(-0.03, 1.03)
        if len(groups) > 1:
            panel.set_title(plot_text(group[0].family), fontsize=11)
            panel.legend(frameon=False, fontsize=8, loc="best")
    for panel in panels[len(groups) :]:
        panel.remove()
    figure.supxlabel("relative depth (layer / highest layer on record)", fontsize=10)
    figure.supylabel("mean score", fontsize=10)
    if len(groups) == 1:
        legend(figure, columns=2)
    return figure


def _draw(panel: "Axes", model: ModelCurve, tasks: int, *, alone: bool, place: int) -> None:
    compared = model.same_tasks
    if compared is None:
        return
    means = {mean.layer: mean.same_tasks_mean for mean in model.layers if mean.same_tasks_mean is not None}
    # NaN where a layer is absent or does not count: there is no line across what is not known.
    layers = range(min(means), max(means) + 1)
    label = model.name if alone else model.size or model.family
    if compared.best_tasks != tasks:
        label += f" ({compared.best_tasks} of {tasks} tasks)"
    style: dict[str, Any] = {"color": CYCLE[place % len(CYCLE)], "linewidth": 1.6, "markersize": 4}
    if not model.complete:
        style |= {"linestyle": "--", "markerfacecolor": "white"}
    marker = MARKERS[place % len(MARKERS)]
    depths, scores = [_depth(layer, model) for layer in layers], [means.get(layer, math.nan) for layer in layers]
    panel.plot(depths, scores, marker=marker, label=plot_text(label), **style)
    star: dict[str, Any] = {"markeredgecolor": BLACK, "markeredgewidth": 0.7, "linestyle": "", "markersize": 12}
    best = _depth(compared.best_layer, model), compared.best
    panel.plot(*[[number] for number in best], marker="*", color=style["color"], **star)


def winners(report: ScoreReport) -> "Figure | None":
    """Best layer of every task and model, coloured by relative depth; tasks with early winners first."""
    models = drawn(report)
    if not models:
        return None
    found: dict[str, dict[int, TaskWinner]] = {}
    for column, model in enumerate(models):
        for winner in model.winners:
            found.setdefault(winner.task, {})[column] = winner
    depths = {
        task: [_depth(winner.layer, models[column]) for column, winner in by_model.items()]
        for task, by_model in found.items()
    }
    tasks = sorted(found, key=lambda task: (math.fsum(depths[task]) / len(depths[task]), task))
    figure = new_figure(1.9 + 0.24 * len(tasks))
    axes = figure.subplots()
    grid = [
        [_depth(found[task][c].layer, models[c]) if c in found[task] else math.nan for c in range(len(models))]
        for task in tasks
    ]
    axes.set_facecolor(FAINT)
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for line, task in enumerate(tasks):
        for column, winner in found[task].items():
            # Viridis is dark below and light above.
            colour = "white" if grid[line][column] < 0.6 else BLACK
            axes.text(column, line, str(winner.layer), ha="center", va="center", fontsize=8, color=colour)
    names = [plot_text(model.name + ("" if model.complete else " *")) for model in models]
    axes.set_xticks(range(len(models)), names, rotation=30, ha="left", rotation_mode="anchor", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(tasks)), [plot_text(task) for task in tasks], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="relative depth of the best layer", fraction=0.03, pad=0.02)
    if not all(model.complete for model in models):
        axes.set_xlabel("* not complete: the best of the layers that have the task", fontsize=9, loc="left")
    return figure


def _depth(layer: int, model: ModelCurve) -> float:
    return layer / model.highest_layer if model.highest_layer else 0.0

"""The report of benchmark scores: its sentences, its tables, its page, and what its plots show."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from pages import Page, assert_stands_alone

from pipeline.layer_scores import judge_scores, read_scores
from pipeline.layer_scores_report import (
    curves,
    drawn,
    findings,
    model_table,
    sentences,
    shared_table,
    winners,
    write_report,
)
from schemas.scores import LayerScore, ScoreReport

FILES = ["scores.json", "scores.md", "scores.html", "scores_by_layer.png", "task_winners.png"]
HOSTILE = ['<script>alert("1")</script>', "a|b`c*d_e", "$x^{$", "_hidden", "{{ 7*7 }}", "&lt;", "x\\frac", "ü" * 300]


@pytest.fixture(scope="session")
def published(repository: Path) -> ScoreReport:
    path = repository.parent / "shared" / "data" / "mteb_layer_scores.csv"
    if not path.is_file():
        pytest.skip("the published scores shared/data/mteb_layer_scores.csv are not beside this checkout")
    return judge_scores(read_scores([path]))


def report(*models: tuple[str, str], layers: int = 5, without: set[tuple[int, str]] = frozenset()) -> ScoreReport:  # type: ignore[assignment]
    """Every model's tasks win at layer 1, 2 and 3; scores that are left out are so in the last model."""
    return judge_scores(
        LayerScore(
            family=family, size=size, layer=layer, task=task, score=0.5 + 0.01 * number - 0.02 * abs(layer - best)
        )
        for number, (family, size) in enumerate(models)
        for layer in range(layers)
        for task, best in (("early", 1), ("middle", 2), ("late", 3))
        if number < len(models) - 1 or (layer, task) not in without
    )


def lines_of(figure: Figure) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points of every curve by panel and label, those that are not known left out."""
    return {
        (axes.get_title(), str(line.get_label())): [
            (float(x), float(y)) for x, y in zip(*line.get_data(), strict=True) if not math.isnan(float(y))
        ]
        for axes in figure.axes
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def stars_of(figure: Figure) -> list[tuple[float, float]]:
    stars = [line for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "*"]
    return sorted((float(x), float(y)) for star in stars for x, y in zip(*star.get_data(), strict=True))


# Plots


def test_every_complete_published_model_has_its_curve(published: ScoreReport) -> None:
    figure = curves(published)
    assert figure is not None
    lines = lines_of(figure)
    complete = [model for model in published.models if model.complete]
    assert len(complete) == 7
    for model in complete:
        last = model.layers[-1].layer
        wanted = [(mean.layer / last, mean.mean) for mean in model.layers]
        assert np.array(lines[model.family, model.size]) == pytest.approx(np.array(wanted))
    for model in drawn(published):
        assert model.same_tasks is not None
        last = model.layers[-1].layer
        best = (model.same_tasks.best_layer / last, model.same_tasks.best)
        assert any(star == pytest.approx(best) for star in stars_of(figure))
    assert len(stars_of(figure)) == len(lines) == len(drawn(published))


def test_an_incomplete_model_is_drawn_over_shared_tasks_and_says_so(published: ScoreReport) -> None:
    figure = curves(published)
    assert figure is not None
    (model,) = (model for model in published.models if model.name == "LLM2Vec-mntp-unsup-simcse 8B")
    points = lines_of(figure)[model.family, "8B (30 of 32 tasks)"]
    counting = [mean for mean in model.layers if mean.same_tasks_mean is not None]
    assert np.array(points) == pytest.approx(np.array([(mean.layer / 32, mean.same_tasks_mean) for mean in counting]))
    # One task is no more than half of all: not drawn.
    assert "Pythia 1b" not in [model.name for model in drawn(published)]


def test_no_line_crosses_layers_that_are_not_known() -> None:
    found = report(("a", ""), without={(2, "early"), (2, "middle"), (2, "late")})
    figure = curves(found)
    assert figure is not None
    (line, _) = figure.axes[0].get_lines()
    assert [math.isnan(float(y)) for y in line.get_ydata()] == [False, False, True, False, False]
    assert line.get_linestyle() == "--"


@pytest.mark.parametrize(("families", "panels"), [(1, 1), (2, 1), (4, 1), (5, 5), (7, 7)])
def test_a_panel_a_family_where_there_are_many(families: int, panels: int) -> None:
    figure = curves(report(*[(f"family {number}", "1b") for number in range(families)]))
    assert figure is not None
    assert len(figure.axes) == panels
    assert len(lines_of(figure)) == families
    figure.canvas.draw()


def test_the_winners_lie_where_they_are(published: ScoreReport) -> None:
    figure = winners(published)
    assert figure is not None
    axes = figure.axes[0]
    tasks = [label.get_text() for label in axes.get_yticklabels()]
    models = drawn(published)
    assert [label.get_text().removesuffix(" *") for label in axes.get_xticklabels()] == [m.name for m in models]
    grid = axes.get_images()[0].get_array()
    assert grid is not None
    assert grid.shape == (32, len(models))
    for column, model in enumerate(models):
        for winner in model.winners:
            depth = winner.layer / model.layers[-1].layer
            assert grid[tasks.index(winner.task), column] == pytest.approx(depth)
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert ((len(models) - 1, tasks.index("BIOSSES")), "17") in written
    assert len(written) == sum(len(model.winners) for model in models)


def test_a_task_that_a_model_lacks_has_no_cell() -> None:
    rows = [("a", "t"), ("a", "u"), ("b", "t")]
    found = judge_scores(
        LayerScore(family=family, size="", layer=layer, task=task, score=layer)
        for family, task in rows
        for layer in (0, 1)
    )
    figure = winners(found)
    assert figure is not None
    assert len(figure.axes[0].texts) == 3
    assert lines_of(curves(found) or Figure()).keys() == {("", "a"), ("", "b (1 of 2 tasks)")}


def test_nothing_to_draw() -> None:
    empty = judge_scores([LayerScore(family="a", size="", layer=0, task="t", score=1.0)])
    assert curves(empty) is winners(empty) is None
    assert curves(ScoreReport(tasks=[], models=[])) is None


# Words and files


def test_the_findings_come_first_and_are_few(published: ScoreReport) -> None:
    said = findings(published)
    assert said[0] == "In 6 of 7 complete models a layer before the last on record has the highest mean."
    depths = [w.layer / m.layers[-1].layer for m in published.models if m.complete for w in m.winners]
    early, middle = sum(depth < 1 for depth in depths), np.median(depths)
    assert said[1].startswith(f"Task by task, {early} of {7 * 32} best layers")
    assert said[1].endswith(f"depth of {middle:.2f} or less.")
    assert said[2].startswith("The most is gained by Pythia 14m: layer 0 has 0.4044")
    assert said[3].startswith("Not complete are bert base, bert large, LLM2Vec-mntp 8B")
    assert len(said) == 4


def test_every_model_has_its_sentence_with_what_is_missing(published: ScoreReport) -> None:
    said = sentences(published)
    assert len(said) == len(published.models)
    (pythia,) = (line for line in said if line.startswith("Pythia 410m"))
    assert "layer 17 has 0.5189, the last on record, 24, 0.4684: +0.0506 (+10.8 %) (32 tasks, 25 layers)" in pythia
    (simcse,) = (line for line in said if line.startswith("LLM2Vec-mntp-unsup-simcse"))
    assert "not complete (32 layers, 32 tasks, 4 without all tasks, 48 of 1,024 scores missing)" in simcse
    assert "layer 24 has 0.6665, the last that counts, 32, 0.6418: +0.0247 (+3.8 %)" in simcse
    assert "the one over 31 tasks, the other over 32" in simcse
    assert "over the 30 tasks that all 30 layers have which count, layer 27 has 0.6754" in simcse
    assert any(line.startswith("bert base: too little on record") for line in said)
    shared = {row[0]: row for row in shared_table(published).rows}
    assert shared["LLM2Vec-mntp-unsup-simcse 8B"][2:] == [
        "30 of 32",
        "0.6601",
        "27 of 32",
        "0.6754",
        "+0.0153 (+2.3 %)",
    ]
    assert "Pythia 410m" not in shared


@pytest.mark.parametrize(
    ("without", "beginning"),
    [(set(), "m: layer 2 has"), ({(0, "early")}, "m, not complete (5 layers, 3 tasks, 1 without all tasks, 1 of 15")],
)
def test_the_finding_of_a_single_model_is_its_own(without: set[tuple[int, str]], beginning: str) -> None:
    assert any(line.startswith(beginning) for line in findings(report(("m", ""), without=without)))


def test_the_files(published: ScoreReport, tmp_path: Path) -> None:
    written = write_report(published, tmp_path / "new" / "folder")
    assert [path.name for path in written] == FILES
    assert ScoreReport.model_validate_json(written[0].read_bytes()) == published
    for plot in written[3:]:
        image = imread(plot)
        assert image.shape[0] > 500
        assert image.std() > 0.05
    text = written[1].read_text()
    assert "| Pythia 410m | 25 (0–24) | 32 | yes | 0.4684 | 17 of 24 | 0.5189 | +0.0506 (+10.8 %) |" in text
    assert "![Mean score by relative depth](scores_by_layer.png)" in text
    again = write_report(published, tmp_path / "again")
    assert [path.read_bytes() for path in again[:3]] == [path.read_bytes() for path in written[:3]]


def test_the_page_stands_alone_and_begins_with_the_findings(published: ScoreReport, tmp_path: Path) -> None:
    html = write_report(published, tmp_path)[2].read_text()
    page = Page(html)
    assert_stands_alone(page)
    assert page.tags["svg"] == 2
    assert set(re.findall(r"https?://[^\"'\s<]*", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.said("li")[: len(findings(published))] == findings(published)
    assert html.index(findings(published)[0]) < html.index("<svg") < html.index("<table")
    table = model_table(published)
    assert page.cells[: 1 + len(table.rows)] == [list(table.header), *map(list, table.rows)]
    # Text of the plots is text.
    assert {"160m", "relative depth (layer / highest layer on record)"} <= {text for _, text in page.text}


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    rows = [
        LayerScore(family=name, size="1b", layer=layer, task=task, score=0.1 * layer)
        for name in HOSTILE
        for layer in range(3)
        for task in HOSTILE
    ]
    found = judge_scores(rows)
    _, text, page, *plots = write_report(found, tmp_path)
    assert len(plots) == 2
    html = Page(page.read_text())
    assert_stands_alone(html)
    cells = {row[0] for row in html.cells}
    assert {*HOSTILE, *(f"{name} 1b" for name in HOSTILE)} <= cells
    table = [line for line in text.read_text().splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) - 1 for line in table}
    assert columns == {8, 6, 5}
    assert "<script>" not in text.read_text()
    # Every model has its curve, also one whose name begins with an underscore.
    assert len(lines_of(curves(found) or Figure())) == len(HOSTILE)


@pytest.mark.parametrize("models", [[], [("a", "")], [("a", ""), ("b", "")]])
def test_a_report_of_little(tmp_path: Path, models: list[tuple[str, str]]) -> None:
    found = report(*models, layers=1)
    written = write_report(found, tmp_path)
    assert [path.name for path in written] == FILES[:3]
    assert_stands_alone(Page(written[2].read_text()))
    assert json.loads(written[0].read_text())["models"] == [model.model_dump() for model in found.models]


def test_many_models_and_tasks_are_drawn(tmp_path: Path) -> None:
    rows = [
        LayerScore(
            family=f"family {number % 9}", size=f"{number}m", layer=layer, task=f"task {task}", score=layer * task
        )
        for number in range(16)
        for layer in range(3)
        for task in range(40)
    ]
    assert len(write_report(judge_scores(rows), tmp_path)) == len(FILES)


def test_scores_are_read_and_judged_without_heavy_packages() -> None:
    code = """
import sys
import pipeline.layer_scores, pipeline.layer_scores_report
print({'torch', 'mteb', 'matplotlib', 'pandas', 'datasets', 'pyspark'} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

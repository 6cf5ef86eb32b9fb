"""The report of benchmark scores: sentences, tables and plots."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from marc_pipeline.layers.scores import judge_scores, read_scores
from marc_pipeline.layers.scores_report import (
    drawn,
    model_sentences,
    model_table,
    score_curves,
    score_findings,
    score_page,
    shared_table,
    winner_grid,
    write_score_report,
)
from marc_schemas.scores import LayerScore, ScoreReport
from report_cases import HOSTILE_SCORES, NAMES, scores_of


@pytest.fixture(scope="module")
def published(published_scores: Path) -> ScoreReport:
    return judge_scores(read_scores([published_scores]))


def lines_of(figure: Figure) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Points of every curve by panel and label, without NaN."""
    return {
        (axes.get_title(), str(line.get_label())): [
            (float(x), float(y)) for x, y in zip(*line.get_data(), strict=True) if not math.isnan(float(y))
        ]
        for axes in figure.axes
        for line in axes.get_lines()
        if not str(line.get_label()).startswith("_")
    }


def curves_of(report: ScoreReport) -> Figure:
    figure = score_curves(report)
    assert figure is not None
    return figure


def stars_of(figure: Figure) -> list[tuple[float, float]]:
    stars = [line for axes in figure.axes for line in axes.get_lines() if line.get_marker() == "*"]
    return sorted((float(x), float(y)) for star in stars for x, y in zip(*star.get_data(), strict=True))


# Plots


def test_every_complete_published_model_has_a_curve(published: ScoreReport) -> None:
    figure = curves_of(published)
    lines = lines_of(figure)
    complete = [model for model in published.models if model.complete]
    assert len(complete) == 7
    for model in complete:
        last = model.layers[-1].layer
        expected = [(mean.layer / last, mean.mean) for mean in model.layers]
        assert np.array(lines[model.family, model.size]) == pytest.approx(np.array(expected))
    for model in drawn(published):
        assert model.same_tasks is not None
        last = model.layers[-1].layer
        best = (model.same_tasks.best_layer / last, model.same_tasks.best)
        assert any(star == pytest.approx(best) for star in stars_of(figure))
    assert len(stars_of(figure)) == len(lines) == len(drawn(published))


def test_an_incomplete_model_is_drawn_over_shared_tasks_with_a_label(published: ScoreReport) -> None:
    figure = curves_of(published)
    (model,) = (model for model in published.models if model.name == "LLM2Vec-mntp-unsup-simcse 8B")
    points = lines_of(figure)[model.family, "8B (30 of 32 tasks)"]
    counting = [mean for mean in model.layers if mean.same_tasks_mean is not None]
    assert np.array(points) == pytest.approx(np.array([(mean.layer / 32, mean.same_tasks_mean) for mean in counting]))
    # A model with fewer than half of the tasks in common is not drawn.
    assert "Pythia 1b" not in [model.name for model in drawn(published)]


def test_a_curve_has_gaps_at_missing_layers() -> None:
    found = scores_of(("a", ""), without=[(2, "early"), (2, "middle"), (2, "late")])
    (line, _) = curves_of(found).axes[0].get_lines()
    assert [math.isnan(float(y)) for y in line.get_ydata()] == [False, False, True, False, False]
    assert line.get_linestyle() == "--"


@pytest.mark.parametrize(("families", "panels"), [(1, 1), (2, 1), (4, 1), (5, 5), (7, 7)])
def test_many_models_have_one_panel_per_family(families: int, panels: int) -> None:
    figure = curves_of(scores_of(*[(f"family {number}", "1b") for number in range(families)]))
    assert len(figure.axes) == panels
    assert len(lines_of(figure)) == families
    figure.canvas.draw()
    assert len(lines_of(curves_of(HOSTILE_SCORES))) == len(NAMES), "hostile names are labels"


def test_the_grid_shows_the_best_layer_of_each_task_and_model(published: ScoreReport) -> None:
    figure = winner_grid(published)
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


def test_a_missing_task_has_no_cell() -> None:
    rows = [("a", "t"), ("a", "u"), ("b", "t")]
    found = judge_scores(
        LayerScore(family=family, size="", layer=layer, task=task, score=layer)
        for family, task in rows
        for layer in (0, 1)
    )
    figure = winner_grid(found)
    assert figure is not None
    assert len(figure.axes[0].texts) == 3
    assert lines_of(curves_of(found)).keys() == {("", "a"), ("", "b (1 of 2 tasks)")}


def test_without_comparable_models_there_are_no_plots() -> None:
    empty = judge_scores([LayerScore(family="a", size="", layer=0, task="t", score=1.0)])
    assert score_curves(empty) is winner_grid(empty) is None
    assert score_curves(ScoreReport(tasks=[], models=[])) is None


# Sentences and tables


def test_findings_of_the_published_scores(published: ScoreReport) -> None:
    sentences = score_page(published).findings
    assert sentences == score_findings(published)
    assert sentences[0] == "In 6 of 7 complete models a layer before the last on record has the highest mean."
    depths = [w.layer / m.layers[-1].layer for m in published.models if m.complete for w in m.winners]
    early, middle = sum(depth < 1 for depth in depths), np.median(depths)
    assert sentences[1].startswith(f"Task by task, {early} of {7 * 32} best layers")
    assert sentences[1].endswith(f"depth of {middle:.2f} or less.")
    assert sentences[2].startswith("The largest gain is that of Pythia 14m: layer 0 has 0.4044")
    assert sentences[3].startswith("Incomplete: bert base, bert large, LLM2Vec-mntp 8B")
    assert len(sentences) == 4


SIMCSE = "LLM2Vec-mntp-unsup-simcse 8B"


@pytest.mark.parametrize(
    ("beginning", "words"),
    [
        (
            "Pythia 410m",
            ["layer 17 has 0.5189, the last on record, 24, 0.4684: +0.0506 (+10.8 %) (32 tasks, 25 layers)"],
        ),
        (
            SIMCSE,
            [
                "incomplete (32 layers, 32 tasks, 4 layers without all tasks, 48 of 1,024 scores missing)",
                "layer 24 has 0.6665, the last counted layer, 32, 0.6418: +0.0247 (+3.8 %)",
                "the first over 31 tasks, the second over 32",
                "over the 30 tasks that all 30 counted layers have, layer 27 has 0.6754",
            ],
        ),
        ("bert base", [": too few scores to compare layers"]),
    ],
)
def test_every_model_has_a_sentence_with_its_missing_scores(
    published: ScoreReport, beginning: str, words: list[str]
) -> None:
    sentences = model_sentences(published)
    assert len(sentences) == len(published.models)
    (sentence,) = (sentence for sentence in sentences if sentence.startswith(beginning))
    assert all(part in sentence for part in words)


def test_cells_of_the_tables_of_models(published: ScoreReport) -> None:
    models, shared = ({row[0]: row[1:] for row in table(published).rows} for table in (model_table, shared_table))
    assert models["Pythia 410m"] == [
        "25 (0–24)", "32", "yes", "0.4684", "17 of 24", "0.5189", "+0.0506 (+10.8 %)",
    ]  # fmt: skip
    assert shared[SIMCSE][1:] == ["30 of 32", "0.6601", "27 of 32", "0.6754", "+0.0153 (+2.3 %)"]
    assert "Pythia 410m" not in shared
    assert score_page(published).sections[1].tables == [model_table(published)]


@pytest.mark.parametrize(
    ("without", "beginning"),
    [([], "m: layer 2 has"), ([(0, "early")], "m, incomplete (5 layers, 3 tasks, 1 layer without all tasks, 1 of 15")],
)
def test_the_finding_of_a_single_model(without: list[tuple[int, str]], beginning: str) -> None:
    sentences = score_findings(scores_of(("m", ""), without=without))
    assert any(sentence.startswith(beginning) for sentence in sentences)


def test_the_report_of_the_published_scores_is_written(published: ScoreReport, tmp_path: Path) -> None:
    data, _, page, *plots = write_score_report(published, tmp_path)
    assert ScoreReport.model_validate_json(data.read_bytes()) == published
    assert len(plots) == 2
    assert all(text in page.read_text() for text in (">160m<", "relative depth (layer / highest layer on record)"))

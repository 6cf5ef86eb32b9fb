"""The report of layers: tables, the description of the measurement, and plots."""

import math
import re

import numpy as np
import pytest
from matplotlib.axes import Axes

from marc_pipeline.layers import report as module
from marc_pipeline.layers.findings import METRICS
from marc_pipeline.layers.report import choice_table, layer_page, layer_table
from marc_schemas.layers import JudgedModel
from pages import HOSTILE
from report_cases import LAYERS, layers_of, model_of


def test_the_page_recommends_and_shows_both_tables_of_every_model() -> None:
    for report in LAYERS.values():
        page = layer_page(report)
        assert page.findings == report.findings
        assert list(page.lead) == [
            f"{one.backbone}: keep layer {one.layers} with {one.pooling} pooling. {one.reason}"
            for one in report.recommendations
        ]
        tables = [table for section in page.sections for table in section.tables]
        assert tables == [table for model in report.models for table in (layer_table(model), choice_table(model))]


def test_the_page_describes_the_measurement() -> None:
    def method(name: str) -> str:
        return " ".join(module._method(LAYERS[name])) + " ".join(map(module._setting, LAYERS[name].models))

    texts, images, without = method("clicks"), method("images"), method("no clicks")
    for fact in ("1,234 distinct texts of the catalogue of 2026-11-20", "4 views", "30 % of the words", "d = 64",
                 "order 1", "temperature 0.1", "up to 500 texts", "4 layers of width 384, mean pooling, at most 48",
                 "48 tokens, float32 on cpu; 1,200 texts."):  # fmt: skip
        assert fact in texts, fact
    assert "77 images and 4 views of each" in images
    assert "up to 500 images" in images
    assert "mean pooling, float32 on cpu; 77 images." in images
    assert not re.search("texts|catalogue|words|tokens", images)
    assert "AUC" not in without
    assert "before the first block, prompt entropy counts the different tokens of a text" in without
    assert "the fewest layers within one standard error of the best are kept" in texts
    for name in ("images", "clicks"):
        assert module._cost(LAYERS[name]).axes[0].get_title().endswith("texts" if name == "clicks" else "images")


@pytest.mark.parametrize("name", ["hostile", "hostile, no clicks"])
def test_hostile_names_are_distinct_in_every_legend(name: str) -> None:
    """Some names start with an underscore or with another name."""
    for section in layer_page(LAYERS[name]).sections:
        for plot in section.plots:
            (legend,) = plot.figure.legends
            names = [entry.get_text() for entry in legend.get_texts() if entry.get_text() != "layer to keep"]
            assert len(set(names)) == len(HOSTILE)
            assert max(map(len, names)) < 60


# Tables


def test_cells_of_the_table_of_layers() -> None:
    model = model_of()
    table = layer_table(model)
    header, rows = table.header, table.rows
    assert header == ["layer", "test AUC", "training AUC", *(metric.title for metric in METRICS), "time", "weights, MB"]
    assert rows[0] == [
        "0", "0.6100 ± 0.0141", "0.6600", "0.000", "0.100", "0.200", "0.300", "0.400", "0.500", "–", "0.700",
        "6 %", "2.00",
    ]  # fmt: skip
    assert model.keep == 2
    assert [row[0] for row in rows] == ["0", "1", "2 *", "3", "4"]
    assert (rows[4][1:3], rows[4][-2:]) == (["0.6500 ± 0.0141", "0.6600"], ["100 %", "6.00"])
    brief = layer_table(model, brief=True)
    assert [name for name in header if name not in brief.header] == ["effective rank", "information bound"]
    assert all(len(row) == len(brief.header) for row in brief.rows)
    assert not [name for name in layer_table(model_of(clicks=False)).header if "AUC" in name]


def test_cells_of_large_figures_one_seed_and_zero_seconds() -> None:
    model = model_of()
    last = model.judged[-1].model_copy(
        update={"metrics": {"lidar": 12345.678, "infonce": -0.0004}, "test_auc": [0.7], "weights_bytes": 1_234_567_890}
    )
    still = [layer.model_copy(update={"seconds": 0.0}) for layer in [*model.judged[:-1], last]]
    table = layer_table(model.model_copy(update={"judged": still}))
    found = dict(zip(table.header, table.rows[-1], strict=True))
    names = ("LiDAR", "test AUC", "weights, MB", "time", "curvature")
    assert [found[name] for name in names] == ["12,345.7", "0.7000", "1,235", "–", "–"]


def test_cells_of_the_table_of_choices() -> None:
    table = choice_table(model_of())
    assert table.header[0] == "metric"
    found = {row[0]: row[1:] for row in table.rows}
    assert found["DiME"] == ["high", "4", "0.0000", "+1.00"]
    assert found["curvature"] == ["low", "1", "0.0300", "+1.00"]
    assert found["LiDAR"] == ["high", "–", "–", "–"]
    assert [row[0] for row in table.rows] == [metric.title for metric in METRICS]
    assert {row[3] for row in choice_table(model_of(clicks=False)).rows} == {"–"}


# Plots


def curves(panel: Axes) -> list[tuple[list[float], list[float]]]:
    """Abscissae and ordinates of every curve of more than two points."""
    found = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in panel.get_lines()]  # type: ignore[arg-type]
    return [(x, y) for x, y in found if len(x) > 2]


def marked(panel: Axes) -> list[tuple[float, float]]:
    rings = [line for line in panel.get_lines() if line.get_label() == "layer to keep"]
    return [(float(ring.get_xdata()[0]), float(ring.get_ydata()[0])) for ring in rings]  # type: ignore[index]


MODELS = LAYERS["models"].models
DEPTHS = [[layer.depth for layer in model.judged] for model in MODELS]


def test_every_metric_has_a_panel_with_its_values() -> None:
    figure = module._metrics(LAYERS["models"])
    assert len(figure.axes) == len(METRICS)
    for panel, metric in zip(figure.axes, METRICS, strict=True):
        assert metric.title in panel.get_title()
        assert metric.unit in panel.get_title()
        expected = [[layer.metrics[metric.name] for layer in model.judged] for model in MODELS]
        found = curves(panel)
        assert [x for x, _ in found] == DEPTHS
        np.testing.assert_equal([y for _, y in found], expected)
        kept_at = [
            (model.judged[model.keep or 0].depth, line[model.keep or 0])
            for model, line in zip(MODELS, expected, strict=True)
        ]
        assert marked(panel) == ([] if metric.name == "lidar" else kept_at)


def test_axes_of_costs_start_at_0() -> None:
    seconds, weights = module._cost(LAYERS["models"]).axes
    assert curves(seconds) == [
        (depths, [layer.seconds for layer in model.judged]) for depths, model in zip(DEPTHS, MODELS, strict=True)
    ]
    assert [y for _, y in curves(weights)] == [
        [layer.weights_bytes / 1e6 for layer in model.judged] for model in MODELS
    ]
    assert seconds.get_ylim()[0] == weights.get_ylim()[0] == 0


def speeds_of(model: JudgedModel) -> list[float]:
    return [1000 / layer.seconds for layer in model.judged]


def test_the_first_picture_has_a_numbered_point_for_every_layer_by_speed() -> None:
    for report in LAYERS.values():
        plotted = [plot.file for section in layer_page(report).sections for plot in section.plots]
        assert (plotted[0] == "auc_by_speed.png") == bool(report.dim)
        assert ("auc_by_speed.png" in plotted) == bool(report.dim), "no such picture without clicks"
    folds = [[0.70, 0.72], [0.71, 0.73], [0.74], [0.70, 0.73], [0.69, 0.70]]
    model = model_of(folds=folds, random_auc=[0.5, 0.52])
    figure = module._speed(layers_of(model, model_of("b/other", place=1)))
    assert figure is not None
    (panel,) = figure.axes
    assert panel.get_xlabel() == "texts per second of one worker"
    speeds, means = speeds_of(model), [np.mean(aucs) for aucs in folds]
    early = [line for line in panel.get_lines() if line.get_markerfacecolor() == "none"]
    numbers = {note.get_text(): note.xy for note in panel.texts[:5]}  # type: ignore[attr-defined]
    assert numbers == {str(layer): pytest.approx((speeds[layer], means[layer])) for layer in range(5)}
    drawn = [line for line in panel.get_lines() if line.get_linestyle() == "None" and line.get_label() == "a/model"]
    assert [list(map(float, line.get_xdata())) for line in drawn] == [[speeds[layer] for layer in (0, 1, 3, 4)]]
    hollow = [float(line.get_xdata()[0]) for line in early if len(line.get_xdata()) and line.get_marker() == "o"]
    assert speeds[2] in hollow, "it left the search early"
    assert marked(panel)[0] == pytest.approx((speeds[model.keep or 0], means[model.keep or 0]))
    (chance,) = (line for line in panel.get_lines() if line.get_label() == "random vectors")
    assert list(chance.get_ydata()) == pytest.approx([0.51, 0.51])


def test_layers_without_a_time_are_not_drawn_by_speed() -> None:
    still = [layer.model_copy(update={"seconds": 0.0}) for layer in model_of().judged]
    assert module._speed(layers_of(model_of(judged=still))) is None


def test_the_test_auc_is_drawn_beside_the_auc_of_the_choice() -> None:
    tested, folded = module._aucs(LAYERS["models"]).axes
    assert "d = 64" in tested.get_title()
    bars = [bar.lines for bar in tested.containers]  # type: ignore[attr-defined]
    for model, depths, (line, _, (spread,)) in zip(MODELS, DEPTHS, bars, strict=True):
        assert list(line.get_xdata()) == depths
        assert list(line.get_ydata()) == pytest.approx([0.61 + 0.01 * layer.layer for layer in model.judged])
        heights = [float(np.ptp(segment[:, 1])) for segment in spread.get_segments()]
        assert heights == pytest.approx([2 * math.sqrt(2) * 0.01] * len(depths))
    for model, depths, (x, y) in zip(MODELS, DEPTHS, curves(folded), strict=True):
        assert x == depths
        assert y == pytest.approx([layer.fold_auc[0] for layer in model.judged])
    assert [x for x, _ in marked(tested)] == [model.judged[model.keep or 0].depth for model in MODELS]
    assert len(marked(folded)) == 2


def test_one_seed_is_drawn_without_an_error_bar() -> None:
    model = model_of()
    judged = [layer.model_copy(update={"test_auc": layer.test_auc[:1]}) for layer in model.judged]
    tested, _ = module._aucs(layers_of(model.model_copy(update={"judged": judged}))).axes
    (bar,) = tested.containers
    segments = bar.lines[2][0].get_segments()  # type: ignore[attr-defined]
    assert all(np.ptp(segment[:, 1]) == 0 for segment in segments)

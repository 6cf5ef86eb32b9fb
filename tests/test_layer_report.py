"""The report of a judgement of layers: a page that stands alone, JSON that reads back, plots that show the figures."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread
from pages import Page, assert_stands_alone

from pipeline import layer_report as module
from pipeline.layer_findings import METRICS, findings, kept, recommend, smoothed
from pipeline.layer_report import choice_rows, layer_rows, write_report
from schemas.layers import JudgedLayer, JudgedModel, LayerReport

NAN = math.nan
TEXT_FILES = ["layers.html", "layers.md", "layers.json"]
PLOTS = ["auc_by_depth.png", "metrics_by_depth.png", "cost_by_depth.png"]
HOSTILE = [
    '/models/<script>alert("1")</script>', "/a|b`c*d_e", "/$x^{$/bert", "_hidden", "{{ 7*7 }}", "/&lt;/]]>", "x\\frac",
    "/" + "ü" * 300 + "/one", "/" + "ü" * 300 + "/other", "<!-- -->", "a\nb",
]  # fmt: skip


def model_of(
    backbone: str = "a/model", *, pooling: str = "mean", place: int = 0, clicks: bool = True, count: int = 5,
    undefined: Sequence[str] = ("lidar",), **changes: Any,
) -> JudgedModel:  # fmt: skip
    """Layer l's figure of metric m is l + m / 10 + place / 100; some metrics are nowhere defined."""
    judged = [
        JudgedLayer(
            layer=number,
            depth=number / (count - 1),
            metrics={
                metric.name: NAN if metric.name in undefined else number + m / 10 + place / 100
                for m, metric in enumerate(METRICS)
            },
            seconds=0.5 + 2.0 * number + place,
            weights_bytes=2_000_000 + 1_000_000 * number,
            test_auc=[0.6 + 0.01 * number, 0.62 + 0.01 * number] if clicks else [],
            fold_auc=[0.7 - 0.01 * (number - 2) ** 2 - 0.001 * place] if clicks and number else [],
        )
        for number in range(count)
    ]
    facts = {
        "sweep_id": f"{place}", "backbone": backbone, "layers": count - 1, "width": 384, "pooling": pooling,
        "max_tokens": 48, "dtype": "float32", "device": "cpu", "inputs": 1234, "judged": judged,
    }  # fmt: skip
    return kept(JudgedModel.model_validate({**facts, **changes}))


def report_of(*models: JudgedModel, **changes: Any) -> LayerReport:
    facts = {
        "report_id": "0123", "ds": "2026-11-20", "dim": 64, "sample": 1234, "views": 4, "probability": 0.3,
        "block": 500, "order": 1.0, "temperature": 0.1, "models": models,
        "recommendations": recommend(models), "findings": findings(models),
    }  # fmt: skip
    return LayerReport.model_validate({**facts, **changes})


REPORTS = {
    "clicks": report_of(model_of(left_out=34, left_out_because="ValueError: <no> token")),
    "no clicks": report_of(model_of(clicks=False), dim=0),
    "poolings": report_of(model_of(), model_of(pooling="last", place=1), model_of(pooling="cls", place=2)),
    "models": report_of(model_of(), model_of("b/other", place=1, count=13)),
    "images": report_of(model_of(clicks=False, max_tokens=0, inputs=77), kind="images", ds="", dim=0, sample=77),
    "nothing defined": report_of(model_of(clicks=False, undefined=[metric.name for metric in METRICS]), dim=0),
    "one layer": report_of(model_of(count=2)),
}


@pytest.fixture(scope="module", params=["clicks", "poolings", "images", "nothing defined", "one layer"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerReport, list[Path]]:
    """A report and what was written of it."""
    report = REPORTS[request.param]
    return report, write_report(report, tmp_path_factory.mktemp("report") / "new" / "folder")


def tables(markdown: str) -> list[list[list[str]]]:
    """Header and rows of every table, the rule between them left out."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE):
        header, rule, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert set(rule) == {" --- "}
        assert len({len(row) for row in [header, rule, *rows]}) == 1, block
        found.append([[cell.strip() for cell in row] for row in [header, *rows]])
    return found


# --- files


def test_the_folder_holds_what_is_returned(case: tuple[LayerReport, list[Path]]) -> None:
    report, written = case
    plots = PLOTS if report.dim else PLOTS[1:]
    assert [path.name for path in written] == [*TEXT_FILES, *plots]
    assert sorted(written[0].parent.iterdir()) == sorted(written)
    for plot in written[3:]:
        image = np.asarray(imread(plot))[..., :3]
        assert image.shape[1] == 1800
        assert 0.002 < (image < 0.8).any(axis=-1).mean() < 0.5


def test_the_json_reads_back(case: tuple[LayerReport, list[Path]]) -> None:
    report, (_, _, data, *_) = case

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(data.read_text(), parse_constant=refuse)
    found = LayerReport.model_validate_json(data.read_text())
    # NaN is not equal to itself; in words it is.
    assert repr(found) == repr(report)


def test_the_page_stands_alone_and_shows_every_table(case: tuple[LayerReport, list[Path]]) -> None:
    report, (html, *_) = case
    page = Page(html.read_text(encoding="utf-8"))
    assert_stands_alone(page)
    assert page.tags["svg"] == (3 if report.dim else 2)
    for model in report.models:
        for header, rows in (layer_rows(model), choice_rows(model)):
            assert all(row in page.cells for row in [header, *rows])
    text = " ".join(text for _, text in page.text)
    for one in report.recommendations:
        assert f"{one.backbone}: keep layer {one.layers} with {one.pooling} pooling. {one.reason}" in text
    assert all(finding in text for finding in report.findings)


def test_the_markdown_holds_the_same_tables_and_names_its_plots(case: tuple[LayerReport, list[Path]]) -> None:
    report, (_, markdown, _, *plots) = case
    text = markdown.read_text(encoding="utf-8")
    expected = [table for model in report.models for table in (layer_rows(model), choice_rows(model))]
    assert tables(text) == [[header, *rows] for header, rows in expected]
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == [path.name for path in plots]
    assert all(f"with {one.pooling} pooling.**" in text for one in report.recommendations)
    assert text.count("\n- ") >= len(report.findings)


def test_what_the_page_says_of_the_measurement_is_what_was_measured() -> None:
    def said(name: str) -> str:
        return " ".join(module._measured(REPORTS[name])) + " ".join(map(module._how, REPORTS[name].models))

    texts, images, without = said("clicks"), said("images"), said("no clicks")
    for fact in ("1,234 distinct texts of the catalogue of 2026-11-20", "4 views", "30 % of the words", "d = 64",
                 "order 1", "temperature 0.1", "up to 500 texts", "4 layers of width 384, mean pooling, at most 48",
                 "48 tokens, float32 on cpu; 1,200 texts."):  # fmt: skip
        assert fact in texts, fact
    assert "77 images, and 4 views of each" in images
    assert "up to 500 images" in images
    assert "mean pooling, float32 on cpu; 77 images." in images
    assert not re.search("texts|catalogue|words|tokens", images)
    assert "AUC" not in without


def test_what_is_counted_in_images_is_not_called_texts() -> None:
    assert module._cost(REPORTS["images"]).axes[0].get_title() == "seconds of one worker for 1,000 images"
    assert module._cost(REPORTS["clicks"]).axes[0].get_title() == "seconds of one worker for 1,000 texts"


@pytest.mark.parametrize("clicks", [True, False])
def test_hostile_names_are_text_everywhere(tmp_path: Path, clicks: bool) -> None:
    models = [model_of(name, place=place, clicks=clicks) for place, name in enumerate(HOSTILE)]
    report = report_of(*models, dim=64 if clicks else 0)
    html, markdown, data, *_ = write_report(report, tmp_path)
    assert LayerReport.model_validate_json(data.read_text()).models[0].backbone == HOSTILE[0]
    page = Page(html.read_text(encoding="utf-8"))
    assert_stands_alone(page)
    headings = page.said("h2")
    assert all(any(name.split() == heading.split() for heading in headings) for name in HOSTILE)
    text = markdown.read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)[<`]", text)
    assert len(tables(text)) == 2 * len(HOSTILE)
    assert text.count("\n## ") == len(HOSTILE) + 1
    # Every model has its line in the legend, also where a name begins with an underscore or with another's.
    for figure in module._plots(report).values():
        (legend,) = figure.legends
        names = [entry.get_text() for entry in legend.get_texts() if entry.get_text() != "to be kept"]
        assert len(set(names)) == len(HOSTILE)
        assert max(map(len, names)) < 60


# --- tables


def test_cells_of_the_table_of_layers() -> None:
    model = model_of()
    header, rows = layer_rows(model)
    assert header == ["layer", "test AUC", "training AUC", *(metric.title for metric in METRICS), "time", "weights, MB"]
    assert rows[0] == [
        "0", "0.6100 ± 0.0141", "–", "0.000", "0.100", "0.200", "0.300", "0.400", "0.500", "–", "0.700", "6 %", "2.00",
    ]  # fmt: skip
    assert model.keep == 2
    assert [row[0] for row in rows] == ["0", "1", "2 *", "3", "4"]
    assert (rows[4][1:3], rows[4][-2:]) == (["0.6500 ± 0.0141", "0.6600"], ["100 %", "6.00"])
    brief, short = layer_rows(model, brief=True)
    assert [name for name in header if name not in brief] == ["effective rank", "information bound"]
    assert all(len(row) == len(brief) for row in short)
    without, _ = layer_rows(model_of(clicks=False))
    assert not [name for name in without if "AUC" in name]


def test_large_figures_one_seed_and_a_clock_that_stood_still() -> None:
    model = model_of()
    last = model.judged[-1].model_copy(
        update={"metrics": {"lidar": 12345.678, "infonce": -0.0004}, "test_auc": [0.7], "weights_bytes": 1_234_567_890}
    )
    still = [layer.model_copy(update={"seconds": 0.0}) for layer in [*model.judged[:-1], last]]
    header, rows = layer_rows(model.model_copy(update={"judged": still}))
    found = dict(zip(header, rows[-1], strict=True))
    assert (found["LiDAR"], found["test AUC"], found["weights, MB"], found["time"]) == (
        "12,345.7",
        "0.7000",
        "1,235",
        "–",
    )
    assert found["curvature"] == "–"


def test_cells_of_the_table_of_choices() -> None:
    header, rows = choice_rows(model_of())
    assert header[0] == "metric"
    found = {row[0]: row[1:] for row in rows}
    assert found["DiME"] == ["high", "4", "0.0000", "+1.00"]
    assert found["curvature"] == ["low", "1", "0.0300", "+1.00"]
    assert found["LiDAR"] == ["high", "–", "–", "–"]
    assert [row[0] for row in rows] == [metric.title for metric in METRICS]
    assert {row[3] for row in choice_rows(model_of(clicks=False))[1]} == {"–"}


# --- plots


def curves(panel: Axes) -> list[tuple[list[float], list[float]]]:
    """Abscissae and ordinates of every curve of more than two points."""
    found = [(list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))) for line in panel.get_lines()]  # type: ignore[arg-type]
    return [(x, y) for x, y in found if len(x) > 2]


def marked(panel: Axes) -> list[tuple[float, float]]:
    rings = [line for line in panel.get_lines() if line.get_label() == "to be kept"]
    return [(float(ring.get_xdata()[0]), float(ring.get_ydata()[0])) for ring in rings]  # type: ignore[index]


MODELS = REPORTS["models"].models
DEPTHS = [[layer.depth for layer in model.judged] for model in MODELS]


def test_every_metric_has_its_panel_with_its_figures() -> None:
    figure = module._metrics(REPORTS["models"])
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


def test_costs_are_drawn_from_zero() -> None:
    seconds, weights = module._cost(REPORTS["models"]).axes
    assert curves(seconds) == [
        (depths, [layer.seconds for layer in model.judged]) for depths, model in zip(DEPTHS, MODELS, strict=True)
    ]
    assert [y for _, y in curves(weights)] == [
        [layer.weights_bytes / 1e6 for layer in model.judged] for model in MODELS
    ]
    assert seconds.get_ylim()[0] == weights.get_ylim()[0] == 0


def test_the_auc_is_drawn_beside_what_the_choice_went_by() -> None:
    tested, folded = module._aucs(REPORTS["models"]).axes
    assert "d = 64" in tested.get_title()
    bars = [bar.lines for bar in tested.containers]  # type: ignore[attr-defined]
    for model, depths, (line, _, (spread,)) in zip(MODELS, DEPTHS, bars, strict=True):
        assert list(line.get_xdata()) == depths
        assert list(line.get_ydata()) == pytest.approx([0.61 + 0.01 * layer.layer for layer in model.judged])
        heights = [float(np.ptp(segment[:, 1])) for segment in spread.get_segments()]
        assert heights == pytest.approx([2 * math.sqrt(2) * 0.01] * len(depths))
    points, smooth = curves(folded)[0::2], curves(folded)[1::2]
    for model, depths, (x, y), (along, curve) in zip(MODELS, DEPTHS, points, smooth, strict=True):
        folds = {layer.layer: layer.fold_auc for layer in model.judged[1:]}
        assert x == along == depths[1:], "the embeddings cannot be kept"
        assert y == pytest.approx([fold for (fold,) in folds.values()])
        assert curve == list(smoothed(folds).values())
    assert [x for x, _ in marked(tested)] == [model.judged[model.keep or 0].depth for model in MODELS]
    assert len(marked(folded)) == 2


def test_one_seed_is_drawn_without_a_spread() -> None:
    model = model_of()
    judged = [layer.model_copy(update={"test_auc": layer.test_auc[:1]}) for layer in model.judged]
    tested, _ = module._aucs(report_of(model.model_copy(update={"judged": judged}))).axes
    (bar,) = tested.containers
    segments = bar.lines[2][0].get_segments()  # type: ignore[attr-defined]
    assert all(np.ptp(segment[:, 1]) == 0 for segment in segments)


# --- manners


def test_matplotlib_is_loaded_for_a_report_only_and_pyplot_never(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.layer_report import write_report
from schemas.layers import LayerReport
print("matplotlib" in sys.modules)
write_report(LayerReport.model_validate_json(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2]))
print("matplotlib.pyplot" in sys.modules)
"""
    (tmp_path / "report.json").write_text(REPORTS["clicks"].model_dump_json())
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "report.json"), str(tmp_path / "out")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "False"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*TEXT_FILES, *PLOTS}

"""The report of an evaluation: the table of every dimension, facts about data and method, and what the plots show."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marc_pipeline.evaluation import report as module
from marc_pipeline.evaluation.report import evaluation_page, write_evaluation_report
from marc_pipeline.report.plots import BLUE, GREEN, GREY, SKY
from marc_pipeline.report.sections import ReportSection
from marc_schemas.evaluation import Evaluation
from pages import is_drawn, picture, shows
from report_cases import EVALUATION_PLOTS, EVALUATIONS, SYSTEMS, evaluation_of

EVALUATION = evaluation_of()


def sections(evaluation: Evaluation) -> dict[str, ReportSection]:
    return {section.heading: section for section in evaluation_page(evaluation).sections}


def rows(evaluation: Evaluation) -> dict[tuple[str, str], Sequence[str]]:
    """Cells by the heading of the section and the system."""
    tables = [(name, table) for name, section in sections(evaluation).items() for table in section.tables]
    return {(heading, row[0]): row[1:] for heading, table in tables for row in table.rows}


# Page


def test_every_system_is_in_the_table_of_its_dimension_with_its_figures() -> None:
    found = rows(EVALUATION)
    assert list(dict.fromkeys(heading for heading, _ in found)) == ["Without vectors", "d = 32", "d = 64", "d = 384"]
    assert all(len(rows(data)) == len(data.summaries) for data, _ in EVALUATIONS.values())
    assert found["d = 32", "mrl"] == [
        "baseline", "0.6783 ± 0.0021", "0.6282 ± 0.0043", "0.6619 ± 0.0032", "−0.0229 (−0.0263 to −0.0195)", "0.013",
        "−0.0285 to −0.0173", "128",
    ]  # fmt: skip
    assert found["d = 64", "marc"][1:] == [
        "0.7018 ± 0.0021", "0.6517 ± 0.0043", "0.6384 ± 0.0032", "–", "–", "–", "256",
    ]  # fmt: skip
    assert found["d = 384", "final-full"][-1] == "1,536"
    for s in EVALUATION.summaries:
        assert found[f"d = {s.dim}" if s.dim else "Without vectors", s.system][1] == f"{s.auc:.4f} ± 0.0021"


def test_systems_are_sorted_by_family_and_layers_by_number() -> None:
    (table,) = sections(EVALUATION)["d = 32"].tables
    families = [family for family, _ in itertools.groupby(row[1] for row in table.rows)]
    assert families == ["reference", "layer", "baseline", "ablation", "marc", "bundle"]
    assert [row[0] for row in table.rows if row[1] == "layer"] == ["pca-layer-0", "pca-layer-2", "pca-layer-10"]


def test_the_table_says_what_is_subtracted() -> None:
    headers = [table.header[5] for section in sections(EVALUATION).values() for table in section.tables]
    here, elsewhere = "minus marc (95 % interval)", "minus marc at d = 64 (95 % interval)"
    assert headers == [elsewhere, here, here, elsewhere]


def test_small_p_values_are_not_0() -> None:
    found = rows(evaluation_of(p_value=1e-9))
    assert {cells[5] for cells in found.values()} == {"< 0.001"}
    assert {cells[5] for cells in rows(EVALUATION).values()} == {"–", "0.013"}


def test_one_seed_has_no_deviation() -> None:
    one = evaluation_of(seeds=1)
    assert not [cell for cells in rows(one).values() for cell in cells if "±" in cell or "nan" in cell.lower()]
    assert sections(one)["Data"].points[-1] == "1 seed"


def test_the_page_begins_with_the_findings_and_tells_of_data_and_method() -> None:
    page = evaluation_page(EVALUATION)
    assert page.findings == EVALUATION.findings
    headings = [section.heading for section in page.sections]
    assert headings[3:] == ["Without vectors", "d = 32", "d = 64", "d = 384", "Data", "Method"]
    facts = ["610 users, 9,742 items", "80,669", "10,083", "10,084", "3,358", "0123abcd", "5 seeds", "layer 2 chosen"]
    data = " ".join(page.sections[-2].points)
    assert all(fact in data for fact in facts)
    assert not [point for point in page.sections[-1].points if "{" in point]


# Plots


def heights(panel: Any) -> dict[str, list[float]]:
    """The y values of every labelled line and error bar of a panel."""
    return {
        label: np.unique((handle[0] if isinstance(handle, tuple) else handle).get_ydata()).tolist()
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }


def test_every_panel_shows_the_figures_of_its_dimension() -> None:
    figure = module._by_layer(EVALUATION)
    assert figure is not None
    for panel, dim in zip(figure.axes, (32, 64), strict=True):
        assert panel.get_title() == f"d = {dim}"
        more = dim / 100_000
        assert heights(panel) == {
            "whitened PCA of the layer": pytest.approx([0.679 + more, 0.689 + more, 0.691 + more]),
            "marc, band: ± std": pytest.approx([0.7012 + more]),
            "random vectors": pytest.approx([0.6735 + more]),
        }


@pytest.mark.parametrize(("layers", "ticks"), [(1, [0, 1]), (10, [*range(11)]), (32, [*range(0, 33, 3)])])
def test_deep_backbones_do_not_crowd_the_axis(layers: int, ticks: list[int]) -> None:
    figure = module._by_layer(EVALUATION.model_copy(update={"layers": layers}))
    assert figure is not None
    assert figure.axes[0].get_xticks().tolist() == ticks


def test_the_plot_by_dimension_shows_every_system_but_ablations_and_lesser_layers() -> None:
    figure = module._by_dimension(EVALUATION)
    assert figure is not None
    drawn = heights(figure.axes[0])
    assert drawn["best layer, PCA"] == pytest.approx([0.691 + dim / 100_000 for dim in (32, 64)])
    assert drawn["final layer, PCA"] == pytest.approx([0.679 + dim / 100_000 for dim in (32, 64)])
    assert drawn["final layer, full width"] == pytest.approx([0.6805])
    assert drawn["ids (no vectors)"] == pytest.approx([0.6728])
    others = {system for system, family, _, _ in SYSTEMS if family not in ("layer", "ablation")}
    assert drawn.keys() == others | {
        "best layer, PCA", "final layer, PCA", "final layer, full width", "ids (no vectors)",
    }  # fmt: skip
    (above,) = figure.axes[0].child_axes
    assert above.get_xticks().tolist() == [128, 256, 1536]


def test_ablations_are_drawn_where_they_differ() -> None:
    figure = module._ablations(EVALUATION)
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["marc-no-constraints", "marc-crossing"]
    points = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() in ("o", "s")]  # type: ignore[index]
    expected = [auc - 0.7012 + dim / 100_000 for dim in (32, 64) for auc in (0.6950, 0.7003)]
    assert points == pytest.approx(expected)
    # A bar over seeds and one over users for each.
    widths = [np.ptp(bar.get_segments()[0][:, 0]) for bar in axes.collections]  # type: ignore[attr-defined]
    assert sorted(widths) == pytest.approx([0.0068] * 4 + [0.0112] * 4)


def test_each_system_has_its_colour_and_pictures_fit_a_page(tmp_path: Path) -> None:
    write_evaluation_report(EVALUATION, tmp_path / "all")
    write_evaluation_report(evaluation_of(without=["marc", "layer"]), tmp_path / "fewer")
    by_layer, by_dimension, ablations = (picture(tmp_path / "all" / name) for name in EVALUATION_PLOTS)
    fewer = picture(tmp_path / "fewer" / "auc_by_dimension.png")
    for image in (by_layer, by_dimension, ablations):
        assert image.shape[0] < 1.2 * image.shape[1]
        assert is_drawn(image)
    for colour in (BLUE, SKY, GREEN):
        assert shows(by_dimension, colour)
        assert not shows(fewer, colour)
    assert all(shows(by_layer, colour) for colour in (BLUE, GREEN, GREY))

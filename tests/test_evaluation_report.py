"""The report of an evaluation: every system with its figures, pictures that show something, JSON that reads back."""

import itertools
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
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from pipeline import evaluation_report as module
from pipeline.evaluation_report import training_curves, write_report
from schemas.evaluation import Evaluation, Family, Summary, SystemScore

PLOTS = ["auc_by_layer.png", "auc_by_dimension.png", "ablations.png"]
SYSTEMS: list[tuple[str, Family, int | None, float]] = [
    # Not in the order of the families.
    ("marc", "marc", 2, 0.7012),
    ("marc-no-constraints", "ablation", 2, 0.6950),
    ("marc-crossing", "ablation", 2, 0.7003),
    ("pca-layer-10", "layer", 10, 0.6790),
    ("pca-layer-2", "layer", 2, 0.6910),
    ("pca-layer-0", "layer", 0, 0.6890),
    ("autoencoder", "baseline", 2, 0.6901),
    ("mrl", "baseline", 10, 0.6780),
    ("contrastive", "baseline", 10, 0.6760),
    ("marc-tuned", "marc", 10, 0.7040),
    ("bundle:ba04743a58d17c34", "bundle", 10, 0.6800),
    ("random", "reference", None, 0.6735),
]


def summary(system: str, family: Family, layer: int | None, dim: int, auc: float, *, seeds: int = 5) -> Summary:
    compared = system != "marc"
    many = seeds > 1
    return Summary(
        system=system,
        family=family,
        layer=layer,
        dim=dim,
        seeds=seeds,
        auc=auc,
        auc_std=0.0021 if many else math.nan,
        cold_auc=auc - 0.0501,
        cold_auc_std=0.0043 if many else math.nan,
        warm_auc=auc + 0.01,
        log_loss=1.3402 - auc,
        log_loss_std=0.0032 if many else math.nan,
        bytes_per_item=4 * dim,
        compared_with="marc" if compared else None,
        difference=auc - 0.7012 if compared else None,
        low=auc - 0.7012 - 0.0034 if compared and many else None,
        high=auc - 0.7012 + 0.0034 if compared and many else None,
        p_value=0.0127 if compared and many else None,
        cold_difference=auc - 0.7012 if compared else None,
        user_low=auc - 0.7012 - 0.0056 if compared else None,
        user_high=auc - 0.7012 + 0.0056 if compared else None,
        train_seconds=12.5,
    )


def evaluation(*, seeds: int = 5, dims: Sequence[int] = (32, 64), without: Sequence[Family] = ()) -> Evaluation:
    """Made-up figures; an AUC grows with the dimension so that no two tables are alike."""
    summaries = [
        summary(system, family, layer, dim, auc + dim / 100_000, seeds=seeds)
        for dim in dims
        for system, family, layer, auc in SYSTEMS
    ]
    summaries += [
        summary("ids", "reference", None, 0, 0.6728, seeds=seeds),
        summary("final-full", "reference", 10, 384, 0.6805, seeds=seeds),
    ]
    summaries = [s for s in summaries if s.family not in without]
    return Evaluation(
        training_id="0123abcd",
        backbone="sentence-transformers/all-MiniLM-L6-v2",
        layers=10,
        width=384,
        users=610,
        items=9742,
        rows=(80_669, 10_083, 10_084),
        cold_rows=3358,
        chosen_layer=2,
        scores=[score(s, seed) for s in summaries for seed in range(seeds)],
        summaries=summaries,
        findings=["At d = 32 marc beats pca-layer-2: +0.0102.", "The mid-layer advantage at d = 32 is there."],
    )


def score(s: Summary, seed: int) -> SystemScore:
    return SystemScore(
        system=s.system,
        family=s.family,
        layer=s.layer,
        dim=s.dim,
        seed=seed,
        auc=s.auc,
        cold_auc=s.cold_auc,
        warm_auc=s.warm_auc,
        log_loss=s.log_loss,
        validation_auc=0.68,
        epoch=7,
        train_seconds=s.train_seconds,
        score_seconds=2.5,
    )


def tables(page: str) -> dict[str, list[list[str]]]:
    """Rows of cells below each heading, header and rule left out."""
    found: dict[str, list[list[str]]] = {}
    for section in page.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
        if rows:
            assert set(rows[1]) == {"---"}
            assert len({len(row) for row in rows}) == 1
            found[heading] = rows[2:]
    return found


def picture(path: Path) -> Any:
    """Red, green and blue [height, width, 3], 0 to 255."""
    return (np.asarray(imread(path))[..., :3] * 255).round().astype(np.uint8)


def shows(image: Any, colour: str) -> bool:
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    return int((image == wanted).all(axis=-1).sum()) > 50


def is_drawn(image: Any) -> bool:
    """Neither blank nor full, with ink in every quarter."""
    height, width, _ = image.shape
    ink = (image < 200).any(axis=-1)
    quarters = [ink[r : r + height // 2, c : c + width // 2] for r in (0, height // 2) for c in (0, width // 2)]
    return 0.002 < ink.mean() < 0.5 and all(quarter.any() for quarter in quarters)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(evaluation(), folder)
    return folder


# Files


def test_the_folder_holds_what_is_returned(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    written = write_report(evaluation(), folder)
    assert written == [folder / name for name in ("evaluation.json", "evaluation.md", *PLOTS)]
    assert sorted(folder.iterdir()) == sorted(written)
    assert write_report(evaluation(), folder) == written


def test_the_json_reads_back(report: Path) -> None:
    assert Evaluation.model_validate_json((report / "evaluation.json").read_text()) == evaluation()


def test_the_json_of_figures_that_are_not_there_is_valid_and_reads_back(tmp_path: Path) -> None:
    given = evaluation(seeds=1)
    given = given.model_copy(update={"scores": [s.model_copy(update={"cold_auc": math.nan}) for s in given.scores]})
    write_report(given, tmp_path)
    text = (tmp_path / "evaluation.json").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(text, parse_constant=refuse)
    found = Evaluation.model_validate_json(text)
    assert all(math.isnan(s.cold_auc) for s in found.scores)
    assert all(math.isnan(s.auc_std) for s in found.summaries)
    # NaN is not equal to itself; in words it is.
    assert repr(found) == repr(given)


# Page


def test_every_system_is_in_the_table_of_its_dimension_with_its_figures(report: Path) -> None:
    found = tables((report / "evaluation.md").read_text())
    assert list(found) == ["Without vectors", "d = 32", "d = 64", "d = 384"]
    rows = {(heading, row[0]): row[1:] for heading, table in found.items() for row in table}
    assert len(rows) == len(evaluation().summaries)
    assert rows["d = 32", "mrl"] == [
        "baseline",
        "0.6783 ± 0.0021",
        "0.6282 ± 0.0043",
        "0.6619 ± 0.0032",
        "−0.0229 (−0.0263 to −0.0195)",
        "0.013",
        "(−0.0285 to −0.0173)",
        "128",
    ]
    assert rows["d = 64", "marc"][1:] == [
        "0.7018 ± 0.0021", "0.6517 ± 0.0043", "0.6384 ± 0.0032", "–", "–", "–", "256",
    ]  # fmt: skip
    assert rows["d = 384", "final-full"][-1] == "1,536"
    for s in evaluation().summaries:
        heading = f"d = {s.dim}" if s.dim else "Without vectors"
        assert rows[heading, s.system][1] == f"{s.auc:.4f} ± 0.0021"


def test_systems_are_sorted_by_family_and_layers_by_number(report: Path) -> None:
    rows = tables((report / "evaluation.md").read_text())["d = 32"]
    families = [family for family, _ in itertools.groupby(row[1] for row in rows)]
    assert families == ["reference", "layer", "baseline", "ablation", "marc", "bundle"]
    assert [row[0] for row in rows if row[1] == "layer"] == ["pca-layer-0", "pca-layer-2", "pca-layer-10"]


def test_the_table_says_what_is_subtracted(report: Path) -> None:
    page = (report / "evaluation.md").read_text()
    headers = [line for line in page.splitlines() if line.startswith("| system")]
    assert ["minus marc (" in header for header in headers] == [False, True, True, False]
    assert ["minus marc at d = 64 (" in header for header in headers] == [True, False, False, True]


def test_small_p_values_are_not_0(tmp_path: Path) -> None:
    given = evaluation()
    tiny = [s.model_copy(update={"p_value": 1e-9}) if s.system == "mrl" else s for s in given.summaries]
    write_report(given.model_copy(update={"summaries": tiny}), tmp_path)
    assert {row[6] for row in tables((tmp_path / "evaluation.md").read_text())["d = 32"]} == {"–", "0.013", "< 0.001"}


def test_the_page_begins_with_the_findings_and_tells_of_data_and_method(report: Path) -> None:
    page = (report / "evaluation.md").read_text()
    first, *_ = page.split("\n![")
    assert all(f"- {finding}\n" in first for finding in evaluation().findings)
    facts = ["610 users, 9,742 items", "80,669", "10,083", "10,084", "3,358", "0123abcd", "5 seeds", "layer 2 chosen"]
    assert all(fact in page for fact in facts)
    assert page.index("## What came out") < page.index("## d = 32") < page.index("## Data")
    assert page.index("## Data") < page.index("## How it was measured")
    assert "{" not in page
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page) == PLOTS


# Pictures


def test_pictures_show_something_and_fit_a_page(report: Path) -> None:
    for name in PLOTS:
        image = picture(report / name)
        assert image.shape[1] == 1800
        assert image.shape[0] < 1.2 * image.shape[1]
        assert is_drawn(image), name


def test_one_seed_is_drawn_without_bars(tmp_path: Path) -> None:
    write_report(evaluation(seeds=1, dims=(32,)), tmp_path)
    assert all(is_drawn(picture(tmp_path / name)) for name in PLOTS)
    page = (tmp_path / "evaluation.md").read_text()
    rows = tables(page)["d = 32"]
    assert not [cell for row in rows for cell in row if "±" in cell or "nan" in cell.lower()]
    assert "\n- 1 seed\n" in page


@pytest.mark.parametrize("dims", [(16,), (16, 32, 64), (8, 16, 32, 64)])
def test_any_number_of_dimensions_is_drawn(tmp_path: Path, dims: Sequence[int]) -> None:
    write_report(evaluation(dims=dims), tmp_path)
    assert all(is_drawn(picture(tmp_path / name)) for name in PLOTS)


@pytest.mark.parametrize(
    ("without", "plots"),
    [
        (["layer"], ["auc_by_dimension.png", "ablations.png"]),
        (["ablation"], ["auc_by_layer.png", "auc_by_dimension.png"]),
        (["layer", "baseline", "ablation", "marc", "bundle"], ["auc_by_dimension.png"]),
        (["reference", "baseline", "marc"], PLOTS),
        (["reference", "layer", "baseline", "ablation", "marc", "bundle"], []),
    ],
)
def test_missing_systems_leave_out_their_pictures_only(
    tmp_path: Path, without: Sequence[Family], plots: list[str]
) -> None:
    given = evaluation(without=without)
    written = write_report(given, tmp_path)
    assert [path.name for path in written] == ["evaluation.json", "evaluation.md", *plots]
    page = (tmp_path / "evaluation.md").read_text()
    assert re.findall(r"\(([^)]+\.png)\)", page) == plots
    assert sum(map(len, tables(page).values())) == len(given.summaries)


def heights(panel: Any) -> dict[str, list[float]]:
    """What is drawn in a panel: y of every labelled line and error bar."""
    return {
        label: np.unique((handle[0] if isinstance(handle, tuple) else handle).get_ydata()).tolist()
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }


def test_every_panel_shows_the_figures_of_its_dimension() -> None:
    figure = module._by_layer(evaluation())
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
    figure = module._by_layer(evaluation().model_copy(update={"layers": layers}))
    assert figure is not None
    assert figure.axes[0].get_xticks().tolist() == ticks


def test_the_plot_by_dimension_shows_every_system_but_ablations_and_lesser_layers() -> None:
    figure = module._by_dimension(evaluation())
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
    figure = module._ablations(evaluation())
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["marc-no-constraints", "marc-crossing"]
    points = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() in ("o", "s")]  # type: ignore[index]
    expected = [auc - 0.7012 + dim / 100_000 for dim in (32, 64) for auc in (0.6950, 0.7003)]
    assert points == pytest.approx(expected)
    # A bar over seeds and one over users for each.
    widths = [np.ptp(bar.get_segments()[0][:, 0]) for bar in axes.collections]  # type: ignore[attr-defined]
    assert sorted(widths) == pytest.approx([0.0068] * 4 + [0.0112] * 4)


def test_each_system_has_its_colour(tmp_path: Path, report: Path) -> None:
    write_report(evaluation(without=["marc", "layer"]), tmp_path)
    by_dimension, fewer = (picture(folder / "auc_by_dimension.png") for folder in (report, tmp_path))
    for colour in (module.BLUE, module.SKY, module.GREEN):
        assert shows(by_dimension, colour)
        assert not shows(fewer, colour)
    by_layer = picture(report / "auc_by_layer.png")
    assert all(shows(by_layer, colour) for colour in (module.BLUE, module.GREEN, module.GREY))


def test_a_difference_that_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    given = evaluation()
    lonely = [s.model_copy(update={"difference": None}) for s in given.summaries]
    written = write_report(given.model_copy(update={"summaries": lonely}), tmp_path)
    assert "ablations.png" not in [path.name for path in written]


# Training curves


CURVES = [
    {"epoch": 0.5 * k, "step": 40 * k, "loss": 0.7 / k, "click": 0.6 / k, "keep": 0.1 * k, "decouple": 0.3 / k,
     "validation_auc": 0.6 + 0.01 * k}
    for k in range(1, 9)
]  # fmt: skip
TERM_COLOURS = {
    "click": module.BLUE,
    "keep": module.GREEN,
    "decouple": module.PINK,
    "validation_auc": module.RED,
}


def test_training_curves_show_every_term(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    training_curves(CURVES, path)
    image = picture(path)
    assert is_drawn(image)
    assert image.shape[1] == 1800
    assert all(shows(image, colour) for colour in TERM_COLOURS.values())


@pytest.mark.parametrize("missing", list(TERM_COLOURS))
def test_training_curves_leave_out_what_was_not_recorded(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "curves.png"
    training_curves([{name: value for name, value in row.items() if name != missing} for row in CURVES], path)
    image = picture(path)
    assert {name for name, colour in TERM_COLOURS.items() if shows(image, colour)} == TERM_COLOURS.keys() - {missing}


@pytest.mark.parametrize(
    "history", [CURVES[:1], [{"epoch": 1}], [{"epoch": 1, "loss": math.nan}], [*CURVES, {"epoch": 5}]]
)
def test_short_and_broken_histories_are_drawn(tmp_path: Path, history: list[dict[str, float]]) -> None:
    training_curves(history, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_no_history_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training curves without a validation"):
        training_curves([], tmp_path / "curves.png")


# Manners


def test_matplotlib_is_loaded_for_pictures_only_and_pyplot_never(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from pipeline.evaluation_report import training_curves
before = "matplotlib" in sys.modules
training_curves([{"epoch": 1, "loss": 2}, {"epoch": 2, "loss": 1}], Path(sys.argv[1]))
print(before, "matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "curves.png")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False", "False"]

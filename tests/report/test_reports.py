"""Every report as a folder: the files, JSON that reads back, and pages in HTML and Markdown with the same content."""

import re
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from marc_pipeline.report.sections import ReportPage, ReportPlot
from pages import Page, assert_stands_alone, is_drawn, markdown_tables, on_one_line, picture, strict_json
from report_cases import CASES, ReportCase


@dataclass(frozen=True)
class Written:
    """A case, its content and its written files."""

    case: ReportCase
    page: ReportPage
    files: list[Path]

    @property
    def plots(self) -> list[ReportPlot]:
        return [plot for section in self.page.sections for plot in section.plots]

    @property
    def tables(self) -> list[list[list[str]]]:
        tables = chain.from_iterable(section.tables for section in self.page.sections)
        return [[list(map(on_one_line, row)) for row in [table.header, *table.rows]] for table in tables]


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    case = CASES[request.param]
    files = case.write(case.data, tmp_path_factory.mktemp("report") / "new" / "folder")
    return Written(case, case.page(case.data), files)


def test_the_returned_files_are_those_in_the_folder(written: Written) -> None:
    case, files = written.case, written.files
    assert [path.name for path in files] == [*(f"{case.name}.{end}" for end in ("json", "md", "html")), *case.plots]
    assert sorted(files[0].parent.iterdir()) == sorted(files)
    for path in files[3:]:
        image = picture(path)
        assert image.shape[1] == 1800
        assert is_drawn(image, most=0.95), path.name


def test_the_json_can_be_read(written: Written) -> None:
    text = written.files[0].read_text(encoding="utf-8")
    strict_json(text)
    # NaN is not equal to itself, but its text is.
    assert repr(type(written.case.data).model_validate_json(text)) == repr(written.case.data)


def test_the_html_page_needs_no_other_file_and_shows_everything(written: Written) -> None:
    html = written.files[2].read_text(encoding="utf-8")
    page = Page(html)
    assert_stands_alone(page)
    assert page.tags["svg"] == len(written.case.plots)
    addresses = set(re.findall(r"https?://[^\"'\s<&]*", html))
    assert addresses - {"http://example.org/"} <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert [list(map(on_one_line, row)) for row in page.cells] == list(chain.from_iterable(written.tables))
    said = [on_one_line(text) for _, text in page.text]
    headings = [section.heading for section in written.page.sections]
    points = chain.from_iterable(section.points for section in written.page.sections)
    assert [*map(on_one_line, headings)] == list(map(on_one_line, page.said("h2")))
    for text in (written.page.title, *written.page.lead, *written.page.findings, *points):
        assert on_one_line(text) in said
    if written.page.findings:
        assert html.index('class="findings"') < html.index("<h2>")


def test_the_markdown_page_has_the_same_tables_and_links_its_plots(written: Written) -> None:
    text = written.files[1].read_text(encoding="utf-8")
    assert markdown_tables(text) == written.tables
    assert re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text) == [plot.file for plot in written.plots] == written.case.plots
    assert not re.search(r"(?<!\\)[<`]", text)
    assert text.count("\n## ") == len(written.page.sections)
    before, *_ = text.split("\n## ")
    assert before.count("\n- ") == len(written.page.findings)
    assert not re.search(r"\n\n\n|\n\n\Z", text)


@pytest.mark.parametrize("name", ["evaluation: one dimension", "scores: incomplete"])
def test_the_same_report_gives_the_same_text(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    first, again, over = (case.write(case.data, tmp_path / folder) for folder in ("first", "again", "first"))
    assert over == first
    assert [path.read_bytes() for path in first[:3]] == [path.read_bytes() for path in again[:3]]


def test_matplotlib_is_imported_for_plots_only_and_pyplot_never(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import marc_pipeline.evaluation.report, marc_pipeline.layers.scores_report
from marc_pipeline.report.training_curves import training_curves
print({"matplotlib", "jinja2", "torch", "mteb", "pandas", "datasets", "pyspark"} & set(sys.modules))
training_curves([{"epoch": 1, "loss": 2}, {"epoch": 2, "loss": 1}], Path(sys.argv[2]))
print("torch" in sys.modules)
from marc_pipeline.layers.report import LayerReport, write_layer_report
print("jinja2" in sys.modules)
write_layer_report(LayerReport.model_validate_json(Path(sys.argv[1]).read_bytes()), Path(sys.argv[3]))
print("matplotlib" in sys.modules, "matplotlib.pyplot" in sys.modules)
"""
    data = tmp_path / "report.json"
    data.write_text(CASES["layers: one layer"].data.model_dump_json())
    command = [sys.executable, "-c", code, data, tmp_path / "curves.png", tmp_path / "report"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["set()", "False", "False", "True False"]

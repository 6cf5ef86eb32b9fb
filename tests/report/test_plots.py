"""Plots as SVG, and the pages that contain them."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from marc_pipeline.report.page import markdown_text, render
from marc_pipeline.report.plots import legend, panel_figure, svg
from marc_pipeline.report.sections import ReportPage, ReportPlot, ReportSection, ReportTable
from pages import Page, assert_stands_alone

HOSTILE = '<script>alert("x")</script> & {{ 7*7 }} ]]> id="a" href="http://example.org/"'


def figure(*values: float, label: str = "a line") -> Figure:
    drawn, (axes,) = panel_figure(height=3)
    axes.plot(range(len(values)), values, marker="o", label=label)
    axes.fill_between(range(len(values)), values, alpha=0.2)
    legend(drawn)
    return drawn


def test_the_same_figure_gives_the_same_characters_without_a_date() -> None:
    first, again = (svg(figure(1, 2, 3), title="t") for _ in range(2))
    assert first == again
    assert not re.search(r"\b20\d\d-\d\d", first)
    assert first != svg(figure(1, 2, 4), title="t")
    # Another process has other random and hash seeds.
    code = (
        "from test_plots import figure; from marc_pipeline.report.plots import svg; "
        "print(svg(figure(1, 2, 3), title='t'), end='')"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=here)
    assert done.stdout == first


def test_an_svg_is_one_element_with_a_title_and_text() -> None:
    element = ElementTree.fromstring(svg(figure(1, 2, 3, label="mean score"), title="Scores & layers"))  # noqa: S314
    assert element.tag == "{http://www.w3.org/2000/svg}svg"
    assert element[0].text == "Scores & layers"
    assert "mean score" in ["".join(text.itertext()).strip() for text in element.iter() if text.tag.endswith("text")]
    assert "viewBox" in element.attrib


def test_references_inside_a_figure_point_to_its_own_ids() -> None:
    for number, element in enumerate((svg(figure(1, 2)), svg(figure(2, 1)))):
        page = Page(element)
        assert_stands_alone(page)
        assert page.linked, number
        assert len({name.split("-")[0] for name in page.ids}) == 1


def test_a_page_of_several_figures_and_tables_needs_no_other_file() -> None:
    plots = [ReportPlot("up.png", "up", figure(1, 2)), ReportPlot("down.png", "down", figure(2, 1))]
    sections = [
        ReportSection("Curves", ["One.", "Two."], plots=plots),
        ReportSection("Table", tables=[ReportTable(["name", "score"], [["a", "0.1"], ["b", "0.2"]], [1], "c")]),
        ReportSection("More", points=["p"], folded=True),
    ]
    page = ReportPage("A title", sections, lead=["A lead."], findings=["First.", "Second."])
    html = render(page, "html")
    found = Page(html)
    assert_stands_alone(found)
    assert found.said("title", "h1")[:2] == ["A title", "A title"]
    assert found.said("li") == ["First.", "Second.", "p"]
    assert found.said("h2") == ["Curves", "Table", "More"]
    assert found.said("p") == ["A lead.", "One.", "Two."]
    assert found.cells == [["name", "score"], ["a", "0.1"], ["b", "0.2"]]
    assert (found.tags["svg"], found.tags["details"], html.count('class="number"')) == (2, 1, 3)
    assert (
        render(page, "md")
        == """\
# A title

A lead.

- First.
- Second.

## Curves

One.

Two.

![up](up.png)

![down](down.png)

## Table

c

| name | score |
|---|---:|
| a | 0.1 |
| b | 0.2 |

## More

- p
"""
    )


def test_hostile_text_is_escaped_everywhere() -> None:
    section = ReportSection(
        HOSTILE,
        paragraphs=[HOSTILE],
        points=[HOSTILE],
        plots=[ReportPlot("plot.png", HOSTILE, figure(1, 2, label=HOSTILE))],
        tables=[ReportTable([HOSTILE], [[HOSTILE]], caption=HOSTILE)],
    )
    page = ReportPage(HOSTILE, [section], lead=[HOSTILE], findings=[HOSTILE])
    html = Page(render(page, "html"))
    assert_stands_alone(html)
    # Title, heading, lead, finding, heading, paragraph, point, caption, two cells; title and legend of the figure.
    assert [text for _, text in html.text].count(HOSTILE) == 12
    # The same without the title of the page, and without the figure's legend.
    assert render(page, "md").count(markdown_text(HOSTILE)) == 10


@pytest.mark.parametrize("sections", [[], [ReportSection("Nothing")]])
def test_an_empty_page_is_valid(sections: list[ReportSection]) -> None:
    assert_stands_alone(Page(render(ReportPage("Empty", sections), "html")))
    assert render(ReportPage("Empty", sections), "md").startswith("# Empty\n")


def test_a_legend_has_several_lines_or_does_not_exist_without_labels() -> None:
    drawn, (axes,) = panel_figure(height=2)
    axes.plot([1, 2])
    legend(drawn)
    assert not drawn.legends
    for number in range(9):
        axes.plot([1, 2], label=f"line {number}")
    legend(drawn, columns=4)
    assert drawn.legends[0]._ncols == 4


def test_the_wheel_carries_every_file_of_the_package_with_the_templates(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {
        "packages": ["pipeline/marc_pipeline", "schemas/marc_schemas"]
    }
    folder = repository / "pipeline" / "marc_pipeline" / "report" / "templates"
    assert {path.name for path in folder.iterdir()} == {"page.html.jinja", "page.md.jinja"}

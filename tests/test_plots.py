"""Plots as SVG inside of a page that stands alone."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from pages import Page, assert_stands_alone

from pipeline import plots
from pipeline.plots import PageTable, Section, html_page, legend, new_figure, svg, tidy

HOSTILE = '<script>alert("x")</script> & {{ 7*7 }} ]]> id="a" href="http://example.org/"'


def figure(*values: float, label: str = "a line") -> Figure:
    drawn = new_figure(3)
    axes = tidy(drawn.subplots())
    axes.plot(range(len(values)), values, marker="o", label=label)
    axes.fill_between(range(len(values)), values, alpha=0.2)
    legend(drawn)
    return drawn


def test_the_same_figure_gives_the_same_characters_without_a_date() -> None:
    first, again = (svg(figure(1, 2, 3), title="t") for _ in range(2))
    assert first == again
    assert not re.search(r"\b20\d\d-\d\d", first)
    assert first != svg(figure(1, 2, 4), title="t")
    # Another process, as chance and hash seeds differ there.
    code = (
        "from test_plots import figure; from pipeline.plots import svg; print(svg(figure(1, 2, 3), title='t'), end='')"
    )
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=here)
    assert done.stdout == first


def test_an_svg_is_one_element_with_its_title_and_real_text() -> None:
    element = ElementTree.fromstring(svg(figure(1, 2, 3, label="mean score"), title="Scores & layers"))  # noqa: S314
    assert element.tag == "{http://www.w3.org/2000/svg}svg"
    assert element[0].text == "Scores & layers"
    assert "mean score" in ["".join(text.itertext()).strip() for text in element.iter() if text.tag.endswith("text")]
    assert "viewBox" in element.attrib


def test_references_inside_a_figure_are_those_to_its_own_parts() -> None:
    for number, element in enumerate((svg(figure(1, 2)), svg(figure(2, 1)))):
        page = Page(element)
        assert_stands_alone(page)
        assert page.linked, number
        assert len({name.split("-")[0] for name in page.ids}) == 1


def test_a_page_of_several_figures_and_tables_stands_alone() -> None:
    sections = [
        Section("Curves", text=["One.", "Two."], figures=[svg(figure(1, 2)), svg(figure(2, 1))]),
        Section("Table", tables=[PageTable(["name", "score"], [["a", "0.1"], ["b", "0.2"]], numbers=[1], caption="c")]),
        Section("More", points=["p"], folded=True),
    ]
    html = html_page("A title", sections, lead="A lead.", findings=["First.", "Second."])
    page = Page(html)
    assert_stands_alone(page)
    assert page.said("title", "h1")[:2] == ["A title", "A title"]
    assert page.said("li") == ["First.", "Second.", "p"]
    assert page.said("h2") == ["Curves", "Table", "More"]
    assert page.said("p") == ["A lead.", "One.", "Two."]
    assert page.cells == [["name", "score"], ["a", "0.1"], ["b", "0.2"]]
    assert page.tags["svg"] == 2
    assert page.tags["details"] == 1
    assert html.count('class="number"') == 3
    assert set(re.findall(r"https?://[^\"'\s<]*", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_hostile_text_is_text_wherever_it_stands() -> None:
    table = PageTable([HOSTILE], [[HOSTILE]], caption=HOSTILE)
    section = Section(
        HOSTILE,
        text=[HOSTILE],
        points=[HOSTILE],
        figures=[svg(figure(1, 2, label=HOSTILE), title=HOSTILE)],
        tables=[table],
    )
    page = Page(html_page(HOSTILE, [section], lead=HOSTILE, findings=[HOSTILE]))
    assert_stands_alone(page)
    said = [text for _, text in page.text]
    # Title, heading, lead, finding, heading, paragraph, point, caption, two cells; the figure's title and legend.
    assert said.count(HOSTILE) == 12


@pytest.mark.parametrize("sections", [[], [Section("Nothing")]])
def test_a_page_with_nothing_in_it_opens(sections: list[Section]) -> None:
    assert_stands_alone(Page(html_page("Empty", sections)))


def test_a_legend_without_labels_is_none() -> None:
    drawn = new_figure(2)
    drawn.subplots().plot([1, 2])
    legend(drawn)
    assert not drawn.legends


def test_a_long_legend_takes_several_lines() -> None:
    drawn = new_figure(2)
    axes = drawn.subplots()
    for number in range(9):
        axes.plot([1, 2], label=f"line {number}")
    legend(drawn, columns=4)
    assert drawn.legends[0]._ncols == 4


def test_the_module_opens_without_matplotlib_and_jinja2() -> None:
    code = "import sys, pipeline.plots; print({'matplotlib', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_template_is_among_the_files_of_the_package() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(plots.__file__).parents[1] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["pipeline"]
    folder = Path(plots.__file__).parent
    assert folder / "templates" / plots.TEMPLATE in {path for pattern in patterns for path in folder.glob(pattern)}

"""The content of a report: a list of sections, independent of the format that it is written in."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ReportTable:
    """A table.

    Attributes:
        header: names of the columns, plain text.
        rows: cells, plain text.
        numbers: indexes of the columns with numbers, which are aligned right.
        caption: a line above the table.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    caption: str = ""


@dataclass(frozen=True)
class ReportPlot:
    """A plot: a PNG file in the folder, and an SVG inside the HTML page.

    Attributes:
        file: name of the PNG file.
        title: text for screen readers.
        figure: the plot.
    """

    file: str
    title: str
    figure: "Figure"


@dataclass(frozen=True)
class ReportSection:
    """A heading and its content, in the order of the attributes. All text is plain; the templates escape it.

    Attributes:
        folded: whether the HTML page shows the content only after a click; in print it is shown.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    plots: Sequence[ReportPlot] = ()
    tables: Sequence[ReportTable] = ()
    folded: bool = False


@dataclass(frozen=True)
class ReportPage:
    """A whole report.

    Attributes:
        title: plain text, as are all others.
        sections: in their order.
        lead: paragraphs below the title.
        findings: a list below the lead: the main results.
    """

    title: str
    sections: Sequence[ReportSection]
    lead: Sequence[str] = ()
    findings: Sequence[str] = ()


def plot_section(file: str, title: str, figure: "Figure | None", *paragraphs: str) -> list[ReportSection]:
    """The section of one plot; an empty list if there is no figure, because there is no data for it."""
    return [] if figure is None else [ReportSection(title, paragraphs, plots=[ReportPlot(file, title, figure)])]

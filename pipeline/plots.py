"""What the reports share: the style of their plots, plots as SVG, and one HTML page that needs nothing from outside."""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, for colour-blind readers too; without their yellow, too faint on white.
BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
BLACK, GREY, FAINT = "#000000", "#767676", "#E6E6E6"
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, GREY)
MARKERS = "osD^vPX*<>"
BAR: dict[str, Any] = {"capsize": 3, "linewidth": 1.6, "markersize": 5.5}
WIDTH_INCHES = 9
# Characters of a name in a plot.
LONGEST = 40
DPI = 200
# Any constant: matplotlib derives ids from it instead of from chance.
HASH_SALT = "marc"
TEMPLATE = "report.html.jinja"


# Plots


def new_figure(height: float, *, width: float = WIDTH_INCHES) -> "Figure":
    """An empty figure, sizes in inches, whose parts find their own places."""
    # Not pyplot, which keeps every figure of the process. Here: whoever writes no plots need not have matplotlib.
    from matplotlib.figure import Figure  # noqa: PLC0415

    return Figure(figsize=(width, height), layout="constrained")


def tidy(axes: "Axes") -> "Axes":
    """The same axes, with two spines and a faint grid behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT)
    axes.set_axisbelow(True)
    return axes


def legend(figure: "Figure", *, columns: int | None = None) -> None:
    """Above all panels, each label once: on one line, or in so many columns."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper center",
            ncols=min(columns or len(handles), len(handles)),
            frameon=False,
        )


def plot_text(name: str, *, end: bool = False) -> str:
    """A name for a plot: dollars begin no formula, a leading underscore hides no line, and it stays short.

    Args:
        name: any text.
        end: whether a long name keeps its end instead of its beginning, as suits a path.
    """
    name = " ".join(name.split())
    if len(name) > LONGEST:
        name = f"…{name[1 - LONGEST :]}" if end else f"{name[: LONGEST - 1]}…"
    return name.replace("\\", "/").replace("$", r"\$").removeprefix("_") or "?"


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG; returns its path."""
    figure.savefig(path, dpi=DPI, format="png", facecolor="white")
    return path


def svg(figure: "Figure", *, title: str = "") -> str:
    """A figure as one ``<svg>`` element for an HTML page: text stays text, and nothing is fetched.

    The same figure gives the same characters, without a date. Ids begin with a hash of the figure: those of different
    figures in one page do not clash.

    Args:
        figure: any.
        title: what a screen reader says.
    """
    import matplotlib as mpl  # noqa: PLC0415 - as in new_figure

    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": HASH_SALT, "svg.fonttype": "none"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", facecolor="white", metadata=nothing)
    # The prolog names a document type on the web, and has no place inside a page.
    element = written.getvalue()
    element = element[element.index("<svg") :]
    prefix = f"f{hashlib.sha256((title + element).encode()).hexdigest()[:10]}-"
    # Only inside of tags: text that reads like an id stays as it is.
    element = re.sub(r"<[^>]+>", lambda tag: _with_prefix(tag.group(), prefix), element)
    opening, rest = element.split(">", 1)
    label = f"<title>{escape(title)}</title>" if title else ""
    return f'{opening} role="img">{label}{rest}'


def _with_prefix(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid=")', rf"\g<1>{prefix}", tag)
    tag = re.sub(r'((?:xlink:)?href="#)', rf"\g<1>{prefix}", tag)
    return re.sub(r"(url\(#)", rf"\g<1>{prefix}", tag)


# Page


@dataclass(frozen=True)
class PageTable:
    """A table of a page.

    Attributes:
        header: names of the columns.
        rows: text of the cells, plain; the page escapes it.
        numbers: places of the columns that hold numbers.
        caption: what the table shows.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A section of a page: its heading, then what there is of text, figures and tables.

    Attributes:
        heading: plain text.
        text: paragraphs, plain.
        points: a list below the paragraphs, plain.
        figures: elements that :func:`svg` gave; put in as they are.
        tables: below the figures.
        folded: whether a reader opens the section first; in print it is open.
    """

    heading: str
    text: Sequence[str] = ()
    points: Sequence[str] = ()
    figures: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    folded: bool = False


def signed(figure: float, digits: int = 4) -> str:
    """A figure with its sign, minus as people print it."""
    return f"{figure:+.{digits}f}".replace("-", "−")


def markdown_text(text: str) -> str:
    """A text that is no part of Markdown's or HTML's own signs, on one line."""
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.replace("&", "&amp;").split())


def html_page(title: str, sections: Sequence[Section], *, lead: str = "", findings: Sequence[str] = ()) -> str:
    """One HTML file with style and figures inside: it opens without a network, on light and dark screens and on paper.

    Args:
        title: of the page.
        sections: in their order.
        lead: a paragraph below the title.
        findings: a list below that, what a reader should know first.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 - as in new_figure

    templates = Environment(
        loader=PackageLoader("pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template(TEMPLATE).render(title=title, lead=lead, findings=findings, sections=sections)

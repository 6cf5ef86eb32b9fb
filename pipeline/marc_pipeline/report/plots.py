"""Plots of the reports: their style, and a plot as SVG.

matplotlib is imported inside the functions: commands that draw nothing must open without it.
"""

import hashlib
import io
import math
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which colour-blind readers can tell apart; without its yellow, too faint on white.
BLUE, ORANGE, GREEN, RED, SKY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7"
BLACK, GREY, FAINT = "#000000", "#767676", "#E6E6E6"
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK, GREY)
MARKERS = "osD^vPX*<>"
BAR: dict[str, Any] = {"capsize": 3, "linewidth": 1.6, "markersize": 5.5}
WIDTH_INCHES = 9
LONGEST_NAME = 40
DPI = 200
# matplotlib derives the ids in an SVG from this constant; by default they are random.
HASH_SALT = "marc"


def new_figure(height: float) -> "Figure":
    """An empty figure of the reports' width; height in inches."""
    # Not pyplot: it keeps every figure until the process ends.
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH_INCHES, height), layout="constrained")


def panel_figure(
    count: int = 1, *, height: float, columns: int = 1, sharey: bool = False
) -> "tuple[Figure, list[Axes]]":
    """A figure with a grid of ``count`` panels; height of one row in inches."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(0.5 + height * rows)
    panels = list(figure.subplots(rows, columns, sharey=sharey, squeeze=False).ravel())
    for unused in panels[count:]:
        unused.remove()
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=FAINT)
        panel.set_axisbelow(True)
    return figure, panels[:count]


def series_style(place: int) -> dict[str, Any]:
    """Colour, marker and line of the series at a place, starting with 0."""
    colour, marker = CYCLE[place % len(CYCLE)], MARKERS[place % len(MARKERS)]
    return {"color": colour, "marker": marker, "linewidth": 1.6, "markersize": 4.5}


def depth_axis(panel: "Axes") -> None:
    """Fix the limits of a panel whose x axis is the relative depth of a layer."""
    panel.set_xlim(-0.03, 1.03)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])


def log_axis(panel: "Axes") -> None:
    """Make the x axis of a panel logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def legend(figure: "Figure", *, columns: int | None = None) -> None:
    """Add one legend above all panels, each label once; on one line unless ``columns`` is given."""
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
    """A name that matplotlib shows as it is: no formula begins at a dollar sign, and a leading underscore is removed.

    Args:
        name: any text; beyond 40 characters it is shortened.
        end: keep the end of a long name instead of its beginning; useful for paths.
    """
    name = " ".join(name.split())
    if len(name) > LONGEST_NAME:
        name = f"…{name[1 - LONGEST_NAME :]}" if end else f"{name[: LONGEST_NAME - 1]}…"
    return name.replace("\\", "/").replace("$", r"\$").removeprefix("_") or "?"


def save(figure: "Figure", path: Path) -> Path:
    """Write the figure as PNG; returns the path."""
    figure.savefig(path, dpi=DPI, format="png", facecolor="white")
    return path


def svg(figure: "Figure", *, title: str = "") -> str:
    """Return the figure as one ``<svg>`` element for an HTML page, with real text and without external files.

    Equal figures give equal elements, without a date. Ids start with a hash of the figure, so that several figures in
    one page have no id in common.

    Args:
        figure: the plot.
        title: text for screen readers.
    """
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": HASH_SALT, "svg.fonttype": "none"}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", facecolor="white", metadata=metadata)
    # The XML prolog is not allowed inside an HTML page.
    element = written.getvalue()
    element = element[element.index("<svg") :]
    prefix = f"f{hashlib.sha256((title + element).encode()).hexdigest()[:10]}-"
    # Only inside tags: text that looks like an id stays as it is.
    element = re.sub(r"<[^>]+>", lambda tag: _with_prefix(tag.group(), prefix), element)
    opening, rest = element.split(">", 1)
    label = f"<title>{escape(title)}</title>" if title else ""
    return f'{opening} role="img">{label}{rest}'


def _with_prefix(tag: str, prefix: str) -> str:
    return re.sub(r'(\sid="|(?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}", tag)

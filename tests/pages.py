"""Check HTML pages, Markdown tables and pictures: what they show, and what a browser would fetch."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread

# Names with a meaning in HTML, Markdown, Jinja or matplotlib, and long ones.
HOSTILE = [
    '/models/<script>alert("1")</script>', "/a|b`c*d_e", "/$x^{$/bert", "_hidden", "{{ 7*7 }}", "/&lt;/]]>", "x\\frac",
    "/" + "ü" * 300 + "/one", "/" + "ü" * 300 + "/other", "<!-- -->", "a\nb", 'id="a" href="http://example.org/"',
]  # fmt: skip

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr", "base", "source"}
FETCHED = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """The parts of an HTML page.

    Attributes:
        problems: tags that are closed wrongly or never, and scripts.
        ids: count of every element id.
        fetched: addresses that the browser would load or go to, also those in styles.
        linked: ids that the page refers to.
        text: visible text with the name of its element.
        cells: text of the cells of every row of a table.
    """

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.problems: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.linked: set[str] = set()
        self.text: list[tuple[str, str]] = []
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in {"td", "th"}:
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)

    def _element(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name in FETCHED:
                self._address(value or "")
            for address in re.findall(r"url\(([^)]*)\)", value or ""):
                self._address(address)
            if name.startswith("on"):
                self.problems.append(f"<{tag} {name}=…> runs a script")

    def _address(self, address: str) -> None:
        if address.startswith("#"):
            self.linked.add(address[1:])
        elif not address.startswith("data:"):
            self.fetched.append(address)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self._open[-1:]}")
            return
        self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "style":
            self.fetched += re.findall(r"@import[^;]*", data)
            for address in re.findall(r"url\(([^)]*)\)", data):
                self._address(address)
        if inside in {"td", "th"}:
            self.cells[-1][-1] += data
        if data.strip():
            self.text.append((inside, data.strip()))

    def said(self, *tags: str) -> list[str]:
        """Text of the elements with these names, in the order of the page."""
        return [text for tag, text in self.text if tag in tags]


def assert_stands_alone(page: Page) -> None:
    """The page is well formed, fetches and runs nothing, and every link leads to one place inside it."""
    assert not page.problems
    assert not page.fetched
    assert not page.tags["script"]
    assert not page.tags["iframe"]
    assert {name for name, count in page.ids.items() if count > 1} == set()
    assert page.linked <= page.ids.keys()


def on_one_line(text: str) -> str:
    return " ".join(text.split())


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Header and rows of every table; escapes are undone."""
    found: list[list[list[str]]] = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        header, rule, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()]
        assert set(rule) <= {"---", "---:"}
        assert len({len(row) for row in [header, rule, *rows]}) == 1, block
        found.append([[_unescaped(cell.strip()) for cell in row] for row in [header, *rows]])
    return found


def _unescaped(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text).replace("&amp;", "&")


def strict_json(text: str) -> Any:
    """The value of a JSON text; a bare NaN or Infinity is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def picture(path: Path) -> Any:
    """Red, green and blue [height, width, 3], 0 to 255."""
    return (np.asarray(imread(path))[..., :3] * 255).round().astype(np.uint8)


def shows(image: Any, colour: str) -> bool:
    """Whether the image has many pixels of exactly this colour."""
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    return int((image == wanted).all(axis=-1).sum()) > 50


def is_drawn(image: Any, *, most: float = 0.5) -> bool:
    """Whether the picture is neither blank nor full, with ink in every quarter."""
    height, width, _ = image.shape
    ink = (image < 200).any(axis=-1)
    quarters = [ink[r : r + height // 2, c : c + width // 2] for r in (0, height // 2) for c in (0, width // 2)]
    return 0.002 < ink.mean() < most and all(quarter.any() for quarter in quarters)

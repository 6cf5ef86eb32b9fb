"""Reading an HTML page as a browser without a network would: what it shows, what it fetches, what its links mean."""

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr", "base", "source"}
FETCHED = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}


class Page(HTMLParser):
    """A page taken apart.

    Attributes:
        problems: tags that were closed wrongly or never.
        ids: of elements, with how often each is there.
        fetched: what the browser would load or go to: addresses, styles included.
        linked: ids that something in the page refers to.
        text: what a reader sees, by element name of what holds it.
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
        """What elements of these names say, in the page's order."""
        return [text for tag, text in self.text if tag in tags]


def assert_stands_alone(page: Page) -> None:
    """A well-formed page that fetches nothing, runs nothing, and whose links all lead to one place inside of it."""
    assert not page.problems
    assert not page.fetched
    assert not page.tags["script"]
    assert not page.tags["iframe"]
    assert {name for name, count in page.ids.items() if count > 1} == set()
    assert page.linked <= page.ids.keys()

"""``marc``: help texts, the version, the list of releases, and the summary of one release."""

import logging
import re
import shlex
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer.main

from command_line import marc
from marc_pipeline import entry
from marc_pipeline.cli.app import app
from marc_pipeline.cli.options import print_lines, print_table
from marc_pipeline.reader.release import OpenRelease
from marc_pipeline.releases import log as release_log
from marc_schemas.release import Release
from published import DS, Site, items
from release_cases import altered

COMMANDS: dict[str, Any] = {"": typer.main.get_command(app), **getattr(typer.main.get_command(app), "commands", {})}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Release]:
    site = Site(tmp_path_factory.mktemp("site"))
    return site.root, site.publish({**items(40), "[n, d]": items(1)["item-0"]})


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", COMMANDS, ids=lambda name: name or "marc")
def test_help_shows_every_help_text_whole(tmp_path: Path, name: str) -> None:
    shown = marc(tmp_path, *name.split(), "--help").stdout
    printed = words(shown).replace("- ", "-")
    command = COMMANDS[name]
    for text in (command.help, *(option.help for option in command.params if getattr(option, "help", None))):
        assert words(text).replace("- ", "-") in printed
    # The overview shows the whole first sentence of each command.
    assert not any(line.endswith("...") for line in shown.splitlines() if not line.startswith("Usage"))


def test_some_help_text_contains_brackets() -> None:
    texts = [getattr(option, "help", None) or "" for command in COMMANDS.values() for option in command.params]
    assert any(re.search(r"\[n, d\]", text) for text in texts)


def test_the_version_is_the_package_version(tmp_path: Path) -> None:
    assert marc(tmp_path, "--version").stdout == f"marc-pipeline {version('marc-pipeline')}\n"


def various(made: Release) -> list[Release]:
    """Releases in every state, with small and large counts."""
    first = {"counts__new": 12_345_678, "counts__changed": 1_234_567, "counts__deleted": 999_999}
    then = {"counts__new": 0, "counts__reused": 123_456_000, "counts__quarantined": 7_654_321}
    changes: list[dict[str, Any]] = [
        {"retired_at": datetime(2026, 12, 1, 23, 59, tzinfo=UTC), "turn": 1},
        {"turn": 2, "counts__items": 123_456_789, **first},
        {"turn": 3, "counts__items": 123_456_789, **then},
        {"ds": "2026-11-21", "turn": 1, "withdrawn": True, "counts__items": 0, "counts__new": 0},
    ]
    return [
        altered(made, release_id=f"20261120T120000{number:06d}-ab{number:02d}", **change)
        for number, change in enumerate(changes)
    ]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_list_of_releases_fits_the_terminal_without_truncation(
    published: tuple[Path, Release], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    root, made = published
    releases = various(made)
    monkeypatch.setattr(release_log, "read_releases", lambda *_: releases)
    monkeypatch.setattr("marc_pipeline.cli.options.PIPE_WIDTH", width)
    lines = marc(root, "releases").stdout.splitlines()
    assert max(map(len, lines)) <= width
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    first, state, content = (" ".join(column) for column in zip(*cells, strict=True))
    assert words(first) == " ".join(f"{one.release_id} {made.bundle.version}" for one in releases)
    states = (f"{DS} retired 2026-12-01 23:59", f"{DS} superseded", f"{DS} live", "2026-11-21 withdrawal")
    assert words(state) == " ".join(f"{one} {made.index.recall:.4f}" for one in states)
    printed = words(content)
    for part in (
        "123,456,789 items 12,345,678 new, 1,234,567 changed, 999,999 deleted",
        "123,456,000 reused, 7,654,321 quarantined",
        "0 items",
    ):
        assert part in printed
    # In a wide terminal the state is on the line of the id, for `grep`.
    assert width < 80 or any("live" in line and releases[2].release_id in line for line in lines)


def test_releases_can_be_limited_to_a_date(published: tuple[Path, Release]) -> None:
    root, made = published
    assert made.release_id in marc(root, "releases").stdout
    assert made.release_id in marc(root, "releases", "--ds", DS).stdout
    assert made.release_id not in marc(root, "releases", "--ds", "2026-11-21").stdout
    assert "the newest date" not in words(marc(root, "releases", "--help").stdout)


def test_the_summary_shows_one_look_up_with_texts_and_reads_no_whole_file(
    published: tuple[Path, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = published
    opened: list[OpenRelease] = []
    make = OpenRelease.__init__

    def note(self: OpenRelease, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        opened.append(self)

    def whole_file(*_: Any) -> None:
        raise AssertionError("a file of the table is read whole")

    monkeypatch.setattr(OpenRelease, "__init__", note)
    monkeypatch.setattr("marc_pipeline.table.read.require_blocks", whole_file)
    shown = marc(root, "summary", "--ds", DS)
    assert shown.exit_code == 0, shown.exception
    printed = words(re.sub("[│┃]", " ", shown.stdout))
    (quoted,) = re.findall(r"marc lookup --item (.+) -k 3", printed)
    (item,) = shlex.split(quoted)
    assert f"{item}: text of {item}:" in printed
    neighbours = re.findall(r"→ ([^(]+) \((-?[01]\.\d{3})\): text of ([^:]+):", printed)
    assert len(neighbours) == 3
    assert all(name == of != item for name, _, of in neighbours)
    assert [score for _, score, _ in neighbours] == sorted((score for _, score, _ in neighbours), reverse=True)
    assert [one._closed for one in opened] == [True, True]


def test_without_the_work_area_the_summary_shows_ids_only(site: Site, tmp_path: Path) -> None:
    site.publish(items(40))
    shutil.rmtree(tmp_path / "work")
    printed = marc(tmp_path, "summary", "--ds", DS).stdout
    assert len(re.findall(r"→ item-\d+ \(0\.\d{3}\)", printed)) == 3
    assert "text of" not in printed


def test_ids_in_brackets_are_printed_unchanged(published: tuple[Path, Release]) -> None:
    shown = marc(published[0], "lookup", "--item", "[n, d]", "--item", "item-0", "-k", "1").stdout
    assert "Nearest to [n, d]" in shown
    assert re.search(r"│ \[n, d\] +│ 1\.0000", shown)


HOSTILE, SHOWN = "\x1b[2Ja[red]b\x9b31m", r"\x1b[2Ja[red]b\x9b31m"


def test_control_characters_of_ids_never_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    print_lines([HOSTILE])
    print_table(None, ["id", "text"], [[HOSTILE, "two\nlines"]])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    entry.configure_logging()
    logging.getLogger("marc_pipeline").warning("row %s", HOSTILE)
    found = capsys.readouterr()
    assert found.out.count(SHOWN) == 2
    assert found.err.count(SHOWN) == 1
    assert not {"\x1b", "\x9b"} & set(found.out + found.err)

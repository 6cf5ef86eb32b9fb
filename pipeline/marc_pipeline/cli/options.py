"""Options and output functions that the commands share."""

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from marc_pipeline.config import Settings, load_settings
from marc_pipeline.deployment import Deployment, open_deployment
from marc_pipeline.entry import visible

Ds = Annotated[str, typer.Option("--ds", help="Date of the snapshot, YYYY-MM-DD.")]
MaybeDs = Annotated[str | None, typer.Option("--ds", help="Date of the snapshot; default: the newest date.")]
At = Annotated[
    str | None,
    typer.Option("--at", help="Show the release that was live at this time, such as 2026-11-20T06:00:00+00:00."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

PIPE_WIDTH = 160


@dataclass(frozen=True)
class State:
    """The options before the command. The configuration is read when a command first needs it."""

    config: Path | None

    @cached_property
    def deployment(self) -> Deployment:
        """Settings and storage."""
        return open_deployment(load_settings(self.config))

    @property
    def settings(self) -> Settings:
        """The configuration."""
        return self.deployment.settings


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, default=str, ensure_ascii=False) + "\n")


def print_lines(lines: list[str]) -> None:
    """Print plain lines on standard output, for pipes."""
    sys.stdout.write("".join(f"{visible(line)}\n" for line in lines))


def print_table(
    title: str | None,
    columns: list[str],
    rows: list[list[str]],
    *,
    right: tuple[int, ...] = (),
    lines: bool = False,
) -> None:
    """Print a table on standard output; ``right`` lists right-aligned columns, ``lines`` separates the rows."""
    table = Table(title=None if title is None else Text(title), title_justify="left", show_lines=lines)
    for place, name in enumerate(columns):
        table.add_column(
            name, justify="right" if place in right else "left", overflow="fold", no_wrap=place == 0 < len(columns) - 1
        )
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    # A pipe has no width to fit.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(table)

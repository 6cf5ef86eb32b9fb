"""Options, machine name, table and JSON output that all benchmarks share."""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLIC_DATA = REPOSITORY / "data" / "public"
CORES = len(os.sched_getaffinity(0))
LIBRARIES = ("torch", "faiss", "pyarrow", "pyspark")
WIDTH = 190

# Benchmarks build releases and bundles with the fixtures of the tests.
sys.path.append(str(REPOSITORY / "tests" / "fixtures"))


def options(description: str | None, **defaults: Any) -> argparse.Namespace:
    """Options of the command line by their defaults; the docstring of a benchmark explains them.

    Every benchmark has ``--json FILE``, which receives all figures.

    Args:
        description: text of ``--help``.
        defaults: a type in place of a default makes an option optional; a tuple lists choices, the first is the
            default; a list holds numbers separated by commas; False makes a switch.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "json": Path}.items():
        option = f"--{name.replace('_', '-')}"
        if default is False:
            parser.add_argument(option, action="store_true")
        elif isinstance(default, type):
            parser.add_argument(option, type=default)
        elif isinstance(default, tuple):
            parser.add_argument(option, choices=default, default=default[0])
        else:
            kind = numbers if isinstance(default, list) else type(default)
            parser.add_argument(option, type=kind, default=default, help=f"default: {default}")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [int(number) for number in text.split(",")]


@contextmanager
def working_folder(given: Path | None = None) -> Iterator[Path]:
    """The given folder, or a temporary one."""
    with tempfile.TemporaryDirectory(prefix="marc-benchmark-") as temporary:
        yield (given or Path(temporary)).resolve()


def cpu() -> str:
    """Name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> dict[str, Any]:
    """Cores, processor and the versions of the imported libraries."""
    versions = {name: str(sys.modules[name].__version__) for name in LIBRARIES if name in sys.modules}
    return {"cores": CORES, "cpu": cpu(), **versions}


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of a call; its result is freed after the clock stops."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    del result
    return seconds


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest value, relative to the median."""
    return (max(values) - min(values)) / statistics.median(values)


def progress(line: str) -> None:
    """Print a line to standard error; minutes may pass between lines."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def show(title: str, columns: str, rows: Iterable[Sequence[Any]], *, texts: int = 1, notes: Sequence[str] = ()) -> None:
    """Print one table below a title that names the processor.

    Args:
        title: first line above the table.
        columns: ``name`` or ``name:format`` of each column, separated by ``|``.
        rows: values of each row; None and strings are shown as they are; an empty row draws a line.
        texts: number of leading columns that are aligned to the left.
        notes: lines below the table.
    """
    facts = machine()
    libraries = [f"{name} {facts[name]}" for name in LIBRARIES if name in facts]
    heading = ", ".join([f"{title}\n{facts['cores']} cores of {facts['cpu']}", *libraries])
    table = Table()
    named = [column.partition(":") for column in columns.split("|")]
    for place, (name, _, _) in enumerate(named):
        table.add_column(name, justify="left" if place < texts else "right", no_wrap=place >= texts)
    for row in rows:
        if row:
            table.add_row(*(cell(value, form) for value, (_, _, form) in zip(row, named, strict=False)))
        else:
            table.add_section()
    console = Console(width=WIDTH)
    for part in (heading, table, *notes):
        console.print(part)


def cell(value: object, form: str) -> str:
    return value if isinstance(value, str) else "" if value is None else format(value, form)


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Write machine and figures if the user named a file."""
    if path:
        path.write_text(json.dumps({**machine(), **figures}, indent=1))

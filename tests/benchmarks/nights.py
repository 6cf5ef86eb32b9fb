"""What a night costs when little changed, and a backfill of one bucket, beside a full run: all in one go, one table.

    python tests/benchmarks/nights.py [--items 50000] [--folder DIR]

Every line is the whole ``marc`` command in a process of its own: start of Python and Spark, reading the catalogue,
loading the model, all stages. The model is the one that ``make nightly`` trains: the embedded default.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marc_pipeline.example.ratings import write_interactions
from marc_pipeline.example.shop import write_catalogue
from marc_schemas.plan import Plan

DAYS = [f"2026-11-{day}" for day in range(20, 25)]
FULL, CHANGED, NOTHING, ONE_BUCKET, FEW = DAYS
STAGES = ("plan", "encode", "audit", "index")
PLANNED = "encode, as planned"
CONFIG = """
root: {folder}/data
catalogue:
  uri: {folder}/catalogue/{{ds}}.csv
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
interactions:
  uri: {folder}/interactions.parquet
buckets: 64
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nights-") as temporary:
        folder = arguments.folder or Path(temporary)
        prepare(folder, arguments.items)
        measured = [
            ("start-up: a catalogue of 100 items", *timed(folder, "run", "--ds", FEW, elsewhere="few")),
            ("full: every text is new", *timed(folder, "run", "--ds", FULL)),
            ("1 % of the texts changed", *timed(folder, "run", "--ds", CHANGED)),
            ("nothing changed", *timed(folder, "run", "--ds", NOTHING)),
            ("every text once more", *timed(folder, "backfill", "--ds", CHANGED, "--recompute")),
            (
                "one bucket of 64, computed anew",
                *timed(folder, "backfill", "--ds", FULL, "--bucket", "7", "--recompute"),
            ),
        ]
    show(measured, arguments.items)


def prepare(folder: Path, items: int) -> None:
    """Catalogues, clicks and a bundle."""
    (folder / "marc.yaml").write_text(CONFIG.format(folder=folder))
    first = write_catalogue(folder / "catalogue", ds=FULL, items=items)
    write_interactions(folder / "interactions.parquet", first)
    rows = list(csv.reader(io.StringIO(first.read_text(encoding="utf-8", errors="surrogateescape"), newline="")))
    header, body = rows[0], rows[1:]
    title = header.index("title")
    altered = [list(row) for row in body]
    for row in altered[7::100]:
        row[title] += " again"
    for ds, content in ((CHANGED, altered), (NOTHING, altered), (FEW, body[:100])):
        with (folder / "catalogue" / f"{ds}.csv").open(
            "w", encoding="utf-8", errors="surrogateescape", newline=""
        ) as file:
            csv.writer(file).writerows([header, *content])
    marc(folder, "train", "--ds", FULL)


def marc(folder: Path, *arguments: str, elsewhere: str = "data") -> dict[str, Any]:
    command = [sys.executable, "-c", "from marc_pipeline.cli.app import main; main()", *arguments, "--json"]
    env = {**os.environ, "MARC_CONFIG": str(folder / "marc.yaml"), "HF_HUB_OFFLINE": "1"}
    env |= {"MARC_ROOT": str(folder / elsewhere), "MARC_BUNDLE_URI": str(folder / "data" / "bundles")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def timed(folder: Path, *arguments: str, elsewhere: str = "data") -> tuple[float, dict[str, Any]]:
    started = time.monotonic()
    answer = marc(folder, *arguments, elsewhere=elsewhere)
    seconds = time.monotonic() - started
    plans = (folder / elsewhere / "work" / "plans").glob("*/plan.json")
    newest = max(plans, key=lambda path: path.stat().st_mtime)
    return seconds, {**answer, PLANNED: Plan.model_validate_json(newest.read_text()).seconds}


def show(measured: list[tuple[str, float, dict[str, Any]]], items: int) -> None:
    full = measured[1][1]
    table = Table(title=f"{items:,} items, 64 buckets, {os.cpu_count()} cores")
    for column in ("", "texts", "seconds", "of full", *STAGES, "the rest", PLANNED):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds, answer in measured:
        stages = [answer["seconds"].get(stage, 0.0) for stage in STAGES]
        shown = [f"{value:.1f}" for value in (*stages, seconds - sum(stages))]
        planned = "unknown" if answer[PLANNED] is None else f"{answer[PLANNED]:.1f}"
        table.add_row(name, f"{answer['encoded']:,}", f"{seconds:.1f}", f"{seconds / full:.1%}", *shown, planned)
    console = Console(width=170)
    console.print(table)
    start, bucket = measured[0][1], measured[-1][1]
    console.print(f"one bucket: {bucket:.1f} s; 2/64 of full plus start-up: {full / 32 + start:.1f} s")


if __name__ == "__main__":
    main()

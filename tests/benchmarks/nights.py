"""Measure what a night costs when little changed, and a backfill of one bucket, relative to a full run: one table.

    python tests/benchmarks/nights.py [--items 50000] [--folder DIR]

Each row is one ``marc`` command in a process of its own: start of Python and Spark, reading the catalogue, loading
the model, and all stages. ``marc train`` trains the embedded default model first, as ``make nightly`` does.
"""

import csv
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measuring import options, show, working_folder, write_json

from marc_pipeline.example.ratings import write_interactions
from marc_pipeline.example.shop import write_catalogue
from marc_schemas.plan import Plan

FULL, CHANGED, NOTHING, FEW = (f"2026-11-{day}" for day in range(20, 24))
STAGES = ("plan", "encode", "audit", "index")
PLANNED = "encode, as planned"
COLUMNS = (
    f"|texts:,|seconds:.1f|of full:.1%|{''.join(f'{stage}:.1f|' for stage in STAGES)}start and rest:.1f|{PLANNED}:.1f"
)
FULL_ROW = "full: every text is new"
# Name of the row, arguments of marc.
COMMANDS = {
    "start-up: a catalogue of 100 items": ("run", "--ds", FEW),
    FULL_ROW: ("run", "--ds", FULL),
    "1 % of the texts changed": ("run", "--ds", CHANGED),
    "nothing changed": ("run", "--ds", NOTHING),
    "every text again": ("backfill", "--ds", CHANGED, "--recompute"),
    "one bucket of 64, re-encoded": ("backfill", "--ds", FULL, "--bucket", "7", "--recompute"),
}
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


def prepare(folder: Path, items: int) -> None:
    """Write configuration, catalogues and clicks, and train a bundle."""
    (folder / "marc.yaml").write_text(CONFIG.format(folder=folder))
    first = write_catalogue(folder / "catalogue", ds=FULL, items=items)
    write_interactions(folder / "interactions.parquet", first)
    # The example holds bytes that are not UTF-8.
    encoding: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
    header, *body = csv.reader(io.StringIO(first.read_text(**encoding), newline=""))
    altered = [list(row) for row in body]
    for row in altered[7::100]:
        row[header.index("title")] += " again"
    for ds, content in ((CHANGED, altered), (NOTHING, altered), (FEW, body[:100])):
        with (folder / "catalogue" / f"{ds}.csv").open("w", newline="", **encoding) as file:
            csv.writer(file).writerows([header, *content])
    marc(folder, "train", "--ds", FULL)


def root_of(folder: Path, *arguments: str) -> Path:
    """The 100 items have a table of their own."""
    return folder / ("few" if FEW in arguments else "data")


def marc(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run one command in a new process; returns its JSON answer."""
    command = [sys.executable, "-c", "from marc_pipeline.cli.app import main; main()", *arguments, "--json"]
    env = {**os.environ, "MARC_CONFIG": str(folder / "marc.yaml"), "HF_HUB_OFFLINE": "1"}
    env |= {"MARC_ROOT": str(root_of(folder, *arguments)), "MARC_BUNDLE_URI": str(folder / "data" / "bundles")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def measure(folder: Path, *arguments: str) -> dict[str, Any]:
    """Seconds of a whole command and of its stages, number of texts, and the planned encode time."""
    started = time.monotonic()
    answer = marc(folder, *arguments)
    total = time.monotonic() - started
    plans = (root_of(folder, *arguments) / "work" / "plans").glob("*/plan.json")
    newest = max(plans, key=lambda path: path.stat().st_mtime)
    stages = {stage: answer["seconds"].get(stage, 0.0) for stage in STAGES}
    planned = Plan.model_validate_json(newest.read_text()).seconds
    return {"texts": answer["encoded"], "total": total, "stages": stages, PLANNED: planned}


def main() -> None:
    given = options(__doc__, items=50_000, folder=Path)
    with working_folder(given.folder) as folder:
        prepare(folder, given.items)
        nights = {name: measure(folder, *arguments) for name, arguments in COMMANDS.items()}
    full = nights[FULL_ROW]["total"]
    start, *_, bucket = (night["total"] for night in nights.values())
    note = f"one bucket: {bucket:.1f} s; 2/64 of a full run and the start-up: {full / 32 + start:.1f} s"
    rows = []
    for name, night in nights.items():
        total, stages = night["total"], night["stages"].values()
        planned = "unknown" if night[PLANNED] is None else night[PLANNED]
        rows.append((name, night["texts"], total, total / full, *stages, total - sum(stages), planned))
    show(f"{given.items:,} items, 64 buckets", COLUMNS, rows, notes=[note])
    write_json(given.json, {"items": given.items, "nights": nights})


if __name__ == "__main__":
    main()

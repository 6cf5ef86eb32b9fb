"""What the plan stage costs beside Spark's bare write of the same rows, hash-partitioned: side by side, one table.

    python tests/benchmarks/planning.py [--rows 10000000] [--buckets 64] [--runs 3] [--changed] [--folder DIR]

Every measurement is a process of its own, with the Spark session that ``marc plan`` starts; the clock runs from the
session's start to the end of the work. Measurements alternate, the table shows medians. The bare write reads the
catalogue, repartitions it by id into as many files as there are buckets, and writes them with the plan's compression.
Peaks are of resident memory, added up over the processes of a kind, sampled ten times a second. "CPU s" is what all
processes took, start of Python and Spark included: it says most where a machine is shared. The model is the embedded
default's tokenizer; nothing is encoded.
"""

# ruff: noqa: E402 - run as a script, it must find its neighbours first

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    # Its own folder goes: the tests' module of the same name is meant.
    sys.path[:1] = [str(HERE.parents[1]), str(HERE.parent)]

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from marc_pipeline.config import CatalogueSettings, Settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.model.bundle import open_bundle, promote
from marc_pipeline.nightly.plan import make_plan
from marc_pipeline.nightly.plan_identity import identify_plan
from marc_pipeline.spark.session import spark_session
from marc_pipeline.table.write import write_bucket_file
from marc_pipeline.work_area import Workspace
from marc_schemas.feature_table import file_schema
from planning import DIM, DS, STORAGE, Row, bundle_at, publish_files, tokenizer_json

FIRST_NIGHT, BEFORE = DS, "2026-11-19"
SLICE = 100_000
FILES = 16
WORDS_IN = {"title": (2, 7), "description": (9, 26)}
ONE_IN = {"older duplicate": 1000, "no id": 5000, "no text": 10_000, "changed": 100}
BARE, PLAN, AGAIN = "Spark's bare write", "plan, first night", "plan, 1 % changed"
SAMPLED_S = 0.1
MAX_TOKENS = 128


@dataclass(frozen=True)
class Measured:
    """One measurement: wall and processor seconds, peaks in MB, and what the work reported."""

    seconds: float
    processor: float
    jvm: float
    workers: float
    facts: Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--buckets", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--changed", action="store_true", help="also plan against a release of which 1 %% changed")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--measure", choices=[BARE, PLAN, AGAIN], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder, given.buckets)))  # noqa: T201 - its parent reads it
        return
    with tempfile.TemporaryDirectory(prefix="planning-") as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        prepare(folder, given.rows)
        works = [BARE, PLAN]
        found: dict[str, list[Measured]] = {work: [] for work in works}
        for _ in range(given.runs):
            for work in works:
                found[work].append(in_a_process(work, folder, given.buckets))
        if given.changed:
            publish_base(folder, given.buckets)
            found[AGAIN] = [in_a_process(AGAIN, folder, given.buckets) for _ in range(given.runs)]
        show(found, given)


# --- what is planned


def prepare(folder: Path, rows: int) -> None:
    """The catalogue and a bundle; a catalogue of as many rows that is there already is taken as it is."""
    catalogue = folder / "catalogue"
    mark = folder / "rows"
    if not mark.exists() or mark.read_text() != str(rows):
        shutil.rmtree(catalogue, ignore_errors=True)
        catalogue.mkdir(parents=True)
        write_catalogue(catalogue, rows)
        mark.write_text(str(rows))
    bundles = settings_of(folder, 1).bundle_uri
    promote(STORAGE, bundles, bundle_at(bundles, max_tokens=MAX_TOKENS).version)


def write_catalogue(folder: Path, rows: int) -> None:
    """Parquet files of short texts with a few rows that cannot be used, slice by slice."""
    vocabulary = json.loads(tokenizer_json())["model"]["vocab"]
    words = pa.array([word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2])
    generator = np.random.default_rng(1)
    edges = np.linspace(0, rows, FILES + 1).astype(int).tolist()
    for number in range(FILES):
        writer = None
        for start in range(edges[number], edges[number + 1], SLICE):
            made = catalogue_slice(generator, words, start, min(start + SLICE, edges[number + 1]))
            writer = writer or pq.ParquetWriter(folder / f"part-{number:03d}.parquet", made.schema, compression="zstd")
            writer.write_table(made)
        if writer:
            writer.close()


def catalogue_slice(generator: np.random.Generator, words: pa.Array, start: int, end: int) -> pa.Table:
    numbers = np.arange(start, end)
    # An older row comes before the one that replaces it, most often in the same file.
    older = (numbers % ONE_IN["older duplicate"] == 3) & (numbers + 1 < end)
    ids = pc.binary_join_element_wise("item", pc.utf8_lpad(pa.array(numbers + older).cast("string"), 9, "0"), "-")
    texts = {name: sentences(generator, words, len(numbers), *span) for name, span in WORDS_IN.items()}
    empty = pa.array(numbers % ONE_IN["no text"] == 7)
    return pa.table(
        {
            "item_id": pc.if_else(pa.array(numbers % ONE_IN["no id"] == 5), None, ids),
            **{name: pc.if_else(empty, None, text) for name, text in texts.items()},
            "updated_at": pa.array(1_700_000_000_000_000 + numbers * 1_000_000, pa.timestamp("us", "UTC")),
        }
    )


def sentences(generator: np.random.Generator, words: pa.Array, count: int, least: int, most: int) -> pa.Array:
    """Texts of ``least`` to ``most`` words, the first ones of the vocabulary being the most frequent."""
    lengths = generator.integers(least, most, count)
    total = int(lengths.sum())
    chosen = (len(words) ** generator.random(total)).astype(np.int64) - 1
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(chosen))), " ")


def settings_of(folder: Path, buckets: int) -> Settings:
    source = CatalogueSettings(
        uri=str(folder / "catalogue"), updated_at_column="updated_at", template="{title}. {description}"
    )
    return Settings(catalogue=source, root=str(folder / "data"), buckets=buckets)


def publish_base(folder: Path, buckets: int) -> None:
    """Release the day before what was planned last, with other texts for 1 % of the items."""
    settings = settings_of(folder, buckets)
    plan = Workspace(STORAGE, settings.work_uri, identify_plan(open_deployment(settings), ds=FIRST_NIGHT).plan_id)
    bundle = open_bundle(STORAGE, settings.bundle_uri).version
    files = []
    for bucket in range(buckets):
        items = pq.read_table(plan.items_uri(bucket, None))
        altered = pa.array(np.arange(items.num_rows) % ONE_IN["changed"] == 0)
        hashes = pc.if_else(altered, pc.utf8_reverse(items["content_hash"]), items["content_hash"])
        schema = file_schema(DIM)
        vectors = np.random.default_rng(bucket).standard_normal(items.num_rows * DIM).astype(np.float32)
        made = {
            "item_id": items["item_id"],
            "row_id": items["row_id"],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors), type=schema.field("vector").type),
            "content_hash": hashes,
            "bundle": pa.repeat(bundle, items.num_rows),
            "encoded_at": pa.repeat(pa.scalar(0, pa.int64()), items.num_rows).cast(schema.field("encoded_at").type),
        }
        rows = pa.table([made[name] for name in schema.names], schema=schema)
        given = {"ds": BEFORE, "bucket": bucket, "plan_id": "0" * 32}
        files.append(write_bucket_file(STORAGE, settings.table_uri, rows, footer={}, **given))
    publish_files(settings, files, ds=BEFORE)


# --- measuring


def in_a_process(work: str, folder: Path, buckets: int) -> Measured:
    """Measure in a process of its own, whose descendants' memory is watched."""
    command = [sys.executable, str(Path(__file__).resolve()), "--measure", work]
    command += ["--folder", str(folder), "--buckets", str(buckets)]
    # What an earlier measurement wrote is on its way to the disk no longer.
    os.sync()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        peaks, spent = {"jvm": 0, "workers": 0}, dict[int, float]()
        done = threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peaks, spent, done))
        watcher.start()
        answer = process.stdout.read() if process.stdout else ""
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{work} failed with exit code {process.returncode}")
    facts = json.loads(answer)
    print(f"{work}: {facts['seconds']:.1f} s", file=sys.stderr, flush=True)  # noqa: T201 - minutes pass between lines
    return Measured(facts["seconds"], sum(spent.values()), peaks["jvm"] / 1e6, peaks["workers"] / 1e6, facts)


def watch(root: int, peaks: dict[str, int], spent: dict[int, float], done: threading.Event) -> None:
    """Keep the largest resident memory of the JVM, and of the Python processes that it started, in bytes.

    ``spent`` gets the processor seconds of every process so far.
    """
    while not done.wait(SAMPLED_S):
        for kind, size in resident(root, spent).items():
            peaks[kind] = max(peaks[kind], size)


def resident(root: int, spent: dict[int, float]) -> dict[str, int]:
    """Bytes of the JVM below a process, and of the JVM's own descendants."""
    children: dict[int, list[int]] = {}
    sizes, seconds, names = {}, {}, {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            name, _, rest = (entry / "stat").read_text().rpartition(")")
            fields = rest.split()
        except OSError:
            continue
        process = int(entry.name)
        children.setdefault(int(fields[1]), []).append(process)
        sizes[process] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        seconds[process] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        names[process] = name.rpartition("(")[2]
    found = {"jvm": 0, "workers": 0}
    open_ends = [(root, False)]
    while open_ends:
        process, below = open_ends.pop()
        spent[process] = seconds.get(process, 0.0)
        name = names.get(process, "")
        # What the JVM forks to change a file's mode is for a moment as large as itself.
        if name == "java" and not below:
            found["jvm"] += sizes[process]
        elif below and name.startswith("python"):
            found["workers"] += sizes[process]
        open_ends += [(child, below or name == "java") for child in children.get(process, [])]
    return found


def measure(work: str, folder: Path, buckets: int) -> Row:
    """Do one piece of work in a session of its own; seconds, and what it wrote."""
    settings = settings_of(folder, buckets)
    target = folder / "bare"
    shutil.rmtree(target, ignore_errors=True)
    if work != BARE:
        shutil.rmtree(settings.work_uri, ignore_errors=True)
    with spark_session(settings.spark, name=work) as spark:
        started = time.monotonic()
        if work == BARE:
            rows = spark.read.parquet(f"file://{folder / 'catalogue'}")
            rows.repartition(buckets, "item_id").write.option("compression", "zstd").parquet(f"file://{target}")
            seconds = time.monotonic() - started
            return {"seconds": seconds, **written(target)}
        identity = identify_plan(open_deployment(settings), ds=FIRST_NIGHT)
        plan = make_plan(spark, settings, identity, storage=STORAGE)
        seconds = time.monotonic() - started
    facts = {name: getattr(plan, name) for name in ("plan_id", "items", "new", "changed", "tokens", "tokens_exact")}
    facts |= {"rows_read": plan.rows_read, "quarantined": plan.quarantined}
    return {"seconds": seconds, **facts, **written(Path(settings.work_uri, "plans", plan.plan_id, "items"))}


def written(folder: Path) -> Row:
    files = list(folder.rglob("*.parquet"))
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def show(found: dict[str, list[Measured]], given: argparse.Namespace) -> None:
    bare = statistics.median(one.seconds for one in found[BARE])
    title = f"{given.rows:,} rows, {given.buckets} buckets, {os.cpu_count()} cores, median of {given.runs}"
    table = Table(title=title)
    columns = "seconds,each run,rows/s,of bare,CPU s,files,MB written,peak MB: JVM,Python workers"
    for column in ("", *columns.split(",")):
        table.add_column(column, justify="left" if not column else "right")
    for work, runs in found.items():
        seconds = statistics.median(one.seconds for one in runs)
        facts = runs[-1].facts
        table.add_row(
            work,
            f"{seconds:.1f}",
            " ".join(f"{one.seconds:.1f}" for one in runs),
            f"{given.rows / seconds:,.0f}",
            f"{seconds / bare:.2f}",
            f"{statistics.median(one.processor for one in runs):.0f}",
            f"{facts['files']:,}",
            f"{facts['bytes'] / 1e6:,.0f}",
            f"{max(one.jvm for one in runs):,.0f}",
            f"{max(one.workers for one in runs):,.0f}",
        )
    console = Console(width=150)
    console.print(table)
    for work, runs in found.items():
        if work != BARE:
            report(console, work, [one.facts for one in runs])


def report(console: Console, work: str, facts: Sequence[Row]) -> None:
    shown = {name: value for name, value in facts[-1].items() if name not in {"seconds", "files", "bytes"}}
    console.print(f"{work}: {json.dumps(shown)}")


if __name__ == "__main__":
    main()

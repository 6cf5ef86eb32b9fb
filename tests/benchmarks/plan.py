"""Compare the plan stage with Spark's plain hash-partitioned write of the same rows: one table.

    python tests/benchmarks/plan.py [--rows 10000000] [--buckets 64] [--runs 3] [--changed] [--folder DIR]

Each measurement is a process of its own with the Spark session of ``marc plan``. The clock runs from the start of the
session to the end of the work. Measurements alternate. The plain write reads the catalogue, repartitions it by id
into as many files as there are buckets, and writes them with the compression of the plan. Memory is the resident
memory of the JVM, and of all its Python workers, sampled ten times a second. "CPU s" counts all processes with their
start; compare it on a shared machine. ``--changed`` also plans against a release of which 1 % changed. The bundle has
the tokenizer of the default model and encodes nothing.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measuring import options, progress, show, working_folder, write_json
from processes import watched
from rows import PLAN_ID, feature_rows

from marc_pipeline.config import CatalogueSettings, Settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.model.bundle import open_bundle, promote
from marc_pipeline.nightly.plan import make_plan
from marc_pipeline.nightly.plan_identity import identify_plan
from marc_pipeline.spark.session import spark_session
from marc_pipeline.table.write import write_bucket_file
from marc_pipeline.work_area import Workspace
from planning import DIM, DS, STORAGE, bundle_at, publish_files, tokenizer_json

BEFORE = "2026-11-19"
SLICE = 100_000
FILES = 16
WORDS_IN = {"title": (2, 7), "description": (9, 26)}
# One row in so many.
OLDER_DUPLICATE, NO_ID, NO_TEXT, CHANGED = 1000, 5000, 10_000, 100
WRITE, PLAN, AGAIN = "Spark's plain write", "plan, first night", "plan, 1 % changed"
MAX_TOKENS = 128
FACTS = ("plan_id", "items", "new", "changed", "tokens", "tokens_exact", "rows_read", "quarantined")
COLUMNS = "|seconds:.1f|runs|rows/s:,.0f|× write:.2f|CPU s:.0f|files:,|MB written:,.0f|JVM, MB:,.0f|workers, MB:,.0f"


@dataclass(frozen=True)
class Measured:
    """One measurement: wall and processor seconds, peaks in MB, and the answer of the process."""

    seconds: float
    processor: float
    jvm: float
    workers: float
    facts: dict[str, Any]


# --- the catalogue


def prepare(folder: Path, rows: int) -> None:
    """Write the catalogue and a bundle; an existing catalogue of as many rows is kept."""
    catalogue, mark = folder / "catalogue", folder / "rows"
    if not mark.exists() or mark.read_text() != str(rows):
        shutil.rmtree(catalogue, ignore_errors=True)
        catalogue.mkdir(parents=True)
        write_catalogue(catalogue, rows)
        mark.write_text(str(rows))
    bundles = settings_of(folder, 1).bundle_uri
    promote(STORAGE, bundles, bundle_at(bundles, max_tokens=MAX_TOKENS).version)


def write_catalogue(folder: Path, rows: int) -> None:
    """Parquet files of short texts with a few unusable rows, slice by slice."""
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
    """Rows ``start`` to ``end`` of the catalogue."""
    rows = np.arange(start, end)
    # An older row precedes the row that replaces it, usually in the same file.
    older = (rows % OLDER_DUPLICATE == 3) & (rows + 1 < end)
    ids = pc.binary_join_element_wise("item", pc.utf8_lpad(pa.array(rows + older).cast("string"), 9, "0"), "-")
    texts = {name: sentences(generator, words, len(rows), *span) for name, span in WORDS_IN.items()}
    empty = pa.array(rows % NO_TEXT == 7)
    return pa.table(
        {
            "item_id": pc.if_else(pa.array(rows % NO_ID == 5), None, ids),
            **{name: pc.if_else(empty, None, text) for name, text in texts.items()},
            "updated_at": pa.array(1_700_000_000_000_000 + rows * 1_000_000, pa.timestamp("us", "UTC")),
        }
    )


def sentences(generator: np.random.Generator, words: pa.Array, count: int, least: int, most: int) -> pa.Array:
    """Texts of ``least`` to ``most`` words; the first words of the vocabulary are the most frequent."""
    lengths = generator.integers(least, most, count)
    chosen = (len(words) ** generator.random(int(lengths.sum()))).astype(np.int64) - 1
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(chosen))), " ")


def settings_of(folder: Path, buckets: int) -> Settings:
    source = CatalogueSettings(
        uri=str(folder / "catalogue"), updated_at_column="updated_at", template="{title}. {description}"
    )
    return Settings(catalogue=source, root=str(folder / "data"), buckets=buckets)


def publish_base(folder: Path, buckets: int) -> None:
    """Release the latest plan's items under the day before, with other texts for 1 % of them."""
    settings = settings_of(folder, buckets)
    plan = Workspace(STORAGE, settings.work_uri, identify_plan(open_deployment(settings), ds=DS).plan_id)
    bundle = open_bundle(STORAGE, settings.bundle_uri).version
    files = []
    for bucket in range(buckets):
        path = Path(plan.items_uri(bucket, None))
        if not path.exists():
            continue
        items = pq.read_table(path)
        altered = pa.array(np.arange(items.num_rows) % CHANGED == 0)
        hashes = pc.if_else(altered, pc.utf8_reverse(items["content_hash"]), items["content_hash"])
        vectors = np.random.default_rng(bucket).standard_normal((items.num_rows, DIM), np.float32)
        rows = feature_rows(items["item_id"], items["row_id"], vectors, hashes, bundle=bundle)
        given: dict[str, Any] = {"dim": DIM, "ds": BEFORE, "bucket": bucket, "plan_id": PLAN_ID, "footer": {}}
        file = write_bucket_file(STORAGE, settings.table_uri, [rows], **given)
        files += [file] if file else []
    publish_files(settings, files, ds=BEFORE)


# --- measuring


def measure_in_process(work: str, folder: Path, buckets: int) -> Measured:
    """Measure in a new process, and watch the memory of its descendants."""
    command = [sys.executable, __file__, "--measure", work, "--folder", str(folder), "--buckets", str(buckets)]
    # Pending writes of the previous measurement must not slow this one down.
    os.sync()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        watched(process.pid) as usage,
    ):
        answer = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{work} failed with exit code {process.returncode}")
    facts = json.loads(answer)
    progress(f"{work}: {facts['seconds']:.1f} s")
    return Measured(facts["seconds"], sum(usage.seconds.values()), usage.jvm / 1e6, usage.workers / 1e6, facts)


def measure(work: str, folder: Path, buckets: int) -> dict[str, Any]:
    """Do one piece of work in a new session; returns its seconds and what it wrote."""
    settings, target = settings_of(folder, buckets), folder / "plain"
    shutil.rmtree(target if work == WRITE else settings.work_uri, ignore_errors=True)
    facts: dict[str, Any] = {}
    with spark_session(settings.spark, name=work) as spark:
        started = time.monotonic()
        if work == WRITE:
            rows = spark.read.parquet(f"file://{folder / 'catalogue'}")
            rows.repartition(buckets, "item_id").write.option("compression", "zstd").parquet(f"file://{target}")
        else:
            deployment = open_deployment(settings)
            plan = make_plan(spark, deployment, identify_plan(deployment, ds=DS))
            facts = {name: getattr(plan, name) for name in FACTS}
            target = Path(settings.work_uri, "plans", plan.plan_id, "items")
        seconds = time.monotonic() - started
    files = list(target.rglob("*.parquet"))
    return {"seconds": seconds, "files": len(files), "bytes": sum(file.stat().st_size for file in files), **facts}


def row(work: str, runs: list[Measured], rows: int, plain: float) -> tuple[Any, ...]:
    """One row of the table; ``plain`` is the median time of the plain write."""
    seconds, facts = median(one.seconds for one in runs), runs[-1].facts
    times = (seconds, " ".join(f"{one.seconds:.1f}" for one in runs), rows / seconds, seconds / plain)
    peaks = (max(one.jvm for one in runs), max(one.workers for one in runs))
    return work, *times, median(one.processor for one in runs), facts["files"], facts["bytes"] / 1e6, *peaks


def main() -> None:
    given = options(__doc__, rows=10_000_000, buckets=64, runs=3, changed=False, folder=Path, measure="")
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder, given.buckets)))  # noqa: T201 - its parent reads it
        return
    with working_folder(given.folder) as folder:
        prepare(folder, given.rows)
        found: dict[str, list[Measured]] = {WRITE: [], PLAN: []}
        for _ in range(given.runs):
            for work, runs in found.items():
                runs.append(measure_in_process(work, folder, given.buckets))
        if given.changed:
            publish_base(folder, given.buckets)
            found[AGAIN] = [measure_in_process(AGAIN, folder, given.buckets) for _ in range(given.runs)]
    plain = median(one.seconds for one in found[WRITE])
    plans = {work: {name: found[work][-1].facts[name] for name in FACTS} for work in found if work != WRITE}
    title = f"{given.rows:,} rows, {given.buckets} buckets, medians of {given.runs}"
    notes = [f"{work}: {json.dumps(facts)}" for work, facts in plans.items()]
    show(title, COLUMNS, [row(work, runs, given.rows, plain) for work, runs in found.items()], notes=notes)
    write_json(given.json, {work: [asdict(one) for one in runs] for work, runs in found.items()})


if __name__ == "__main__":
    main()

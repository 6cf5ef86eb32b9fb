"""Where the time of a bucket goes, what Spark adds to it, and how much memory a bucket of many rows takes.

    python tests/benchmarks/worker.py [--items 50000] [--layers 6] [--runs 3] [--memory]

The worker is ``encode_bucket`` as a Spark task calls it; the items are short texts, all of them new. First one bucket
on all cores, by what it is busy with; then the same items in 16 buckets through Spark's ``run_buckets`` and through as
many bare processes as there are cores, rounds interleaved, starting apart. ``--memory`` adds the highest memory of a
process of its own with 100,000 and with 1,000,000 rows (one layer of the model: rows are what it is about).
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from material import BACKBONE, CORES, add_data, cpu, netflix, quiet, sample, short
from rich.console import Console
from rich.table import Table

from marc_pipeline.bundles.making import train_pca
from marc_pipeline.config import EncodeSettings, SparkSettings, TrainSettings
from marc_pipeline.model import batches, compressor, encoder
from marc_pipeline.model import tokens as tokenising
from marc_pipeline.model.bundle import Bundle
from marc_pipeline.nightly.encode import EncodeTask, encode_bucket
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.session import spark_session
from marc_pipeline.spark.tasks import run_buckets
from marc_pipeline.storage import Storage
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import ITEMS, Change
from marc_schemas.feature_table import MANTISSA_BITS
from marc_schemas.identity import content_hash, row_id
from marc_schemas.plan import BucketPlan
from marc_schemas.receipt import Receipt

DS = "2026-11-20"
DIM = 64
BUCKETS = 16
MEMORY_ROWS = (100, 100_000, 1_000_000)
# About 16 MB, as the planner writes them.
GROUP_ROWS = 65_536


# Set-up.


def train(folder: Path, corpus: Sequence[str], layers: int) -> Bundle:
    """A bundle as a night has it."""
    return train_pca(
        sample(corpus, 1000),
        template="{title}",
        train=TrainSettings(layers=layers, dim=DIM),
        encode=EncodeSettings(device="cpu"),
        storage=Storage(),
        bundle_uri=str(folder / f"bundles-{layers}"),
        resources=TaskResources(cpus=CORES),
    )


def plan(folder: Path, bundle: Bundle, texts: Sequence[str], buckets: int) -> list[EncodeTask]:
    """Write new items in so many buckets; a task for each, as the encode stage hands them to Spark."""
    workspace = Workspace(Storage(), str(folder / "work"), content_hash(f"{len(texts)} texts, {buckets} buckets"))
    rows: list[list[tuple[str, int, str, str, str]]] = [[] for _ in range(buckets)]
    for number, text in enumerate(texts):
        name = f"item-{number:08d}"
        rows[row_id(name) % buckets].append((name, row_id(name), text, content_hash(text), Change.NEW.value))
    tasks = []
    for bucket, items in enumerate(rows):
        path = Path(workspace.items_uri(bucket, None))
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [list(column) for column in zip(*items, strict=True)] or [[] for _ in ITEMS]
        pq.write_table(pa.table(columns, schema=ITEMS), path, row_group_size=GROUP_ROWS, compression="zstd")
        characters = sum(len(text) for _, _, text, _, _ in items)
        counts = {"items": len(items), "new": len(items), "changed": 0, "unchanged": 0, "deleted": 0}
        tasks.append(
            EncodeTask(
                workspace=workspace,
                table_uri=str(folder / "table"),
                settings=EncodeSettings(device="cpu"),
                ds=DS,
                bundle=bundle.version,
                bundle_uri=bundle.uri,
                base=None,
                planned_at=datetime.now(UTC),
                mantissa_bits=MANTISSA_BITS,
                work=BucketPlan(bucket=bucket, **counts, tokens=characters),
            )
        )
    return tasks


def afresh(tasks: Sequence[EncodeTask]) -> list[EncodeTask]:
    """The same items as another plan: where a bucket was encoded before, its first receipt would stand."""
    old = tasks[0].workspace
    new = replace(old, plan_id=content_hash(str(time.time_ns())))
    shutil.copytree(Path(old.uri) / "items", Path(new.uri) / "items")
    return [replace(task, workspace=new) for task in tasks]


# One bucket, by what it is busy with.


@dataclass
class Stopwatch:
    """Seconds by name, of functions that are replaced by ones that note how long they took; of all threads together."""

    seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                taken = time.perf_counter() - started
                with self.lock:
                    self.seconds[name] = self.seconds.get(name, 0.0) + taken

        return call

    @contextmanager
    def on(self, name: str, owner: ModuleType | type, attribute: str) -> Iterator[None]:
        with mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute))):
            yield

    @contextmanager
    def on_results(self, name: str, owner: ModuleType) -> Iterator[None]:
        """Note how long the module waits for the results of its thread pools."""

        def submit(pool: ThreadPoolExecutor, *arguments: Any) -> Future[Any]:
            future = ThreadPoolExecutor.submit(pool, *arguments)
            future.result = self.timed(name, future.result)  # type: ignore[method-assign]
            return future

        pools = type("WatchedPool", (ThreadPoolExecutor,), {"submit": submit})
        with mock.patch.object(owner, "ThreadPoolExecutor", pools):
            yield


@dataclass(frozen=True)
class Split:
    """One bucket's seconds by what it was busy with; of the cores' time, what nobody used, and what others did.

    Tokenising and writing happen beside the model: the parts are more than the whole. ``alone`` is what happened while
    the model did not run.
    """

    seconds: float
    parts: dict[str, float]
    alone: float
    idle: float
    others: float
    texts: int
    tokens: int
    padded_tokens: int
    dtype: str


def take_apart(task: EncodeTask) -> Split:
    """Encode a bucket with the worker's functions timed; the encoder is loaded by an earlier call."""
    watch = Stopwatch()
    encoder.load_encoder.cache_clear()
    with (
        watch.on("tokenise", tokenising, "token_ids"),
        watch.on_results("for tokens", encoder),
        watch.on("pool, compress", batches.PackedTokens, "pool"),
        watch.on("pool, compress", compressor.WhitenedPCA, "forward"),
        watch.on("write", pq.ParquetWriter, "write_table"),
    ):
        resources = TaskResources(cpus=CORES)
        encoder.load_encoder(task.workspace.storage, task.bundle_uri, task.bundle, task.settings, resources).encode(
            [""]
        )
        watch.seconds.clear()
        before, nobody_before, started = cpu_seconds(), idle_seconds(), time.monotonic()
        receipt = encode_bucket(task, resources)
        seconds = time.monotonic() - started
        used, nobody = cpu_seconds() - before, idle_seconds() - nobody_before
    encoder.load_encoder.cache_clear()
    parts = {name: watch.seconds.get(name, 0.0) for name in ("tokenise", "for tokens", "pool, compress", "write")}
    parts["model"] = receipt.model_seconds - parts["pool, compress"]
    return Split(
        seconds=seconds,
        parts=parts,
        alone=seconds - receipt.model_seconds,
        idle=nobody / seconds / CORES,
        others=max(0.0, 1 - (used + nobody) / seconds / CORES),
        texts=receipt.encoded,
        tokens=receipt.tokens,
        padded_tokens=receipt.padded_tokens,
        dtype=receipt.dtype,
    )


def cpu_seconds() -> float:
    """What all threads of this process have used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def idle_seconds() -> float:
    """Time of all cores in which they had nothing to do."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=6)
    return (int(ticks[4]) + int(ticks[5])) / os.sysconf("SC_CLK_TCK")


# Spark, and the same in bare processes.


@dataclass
class Rounds:
    """What the rounds of one way to run the buckets gave."""

    name: str
    start: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    receipts: list[Receipt] = field(default_factory=list)

    def add(self, start: float, seconds: float, receipts: list[Receipt]) -> None:
        self.start.append(start)
        self.seconds.append(seconds)
        self.receipts = receipts


def through_spark(tasks: Sequence[EncodeTask], warm_up: Sequence[EncodeTask], rounds: Rounds) -> None:
    """One job on as many Python workers as there are cores, which have loaded their encoders."""
    started = time.monotonic()
    with spark_session(SparkSettings(master=f"local[{CORES}]"), name="worker benchmark") as spark:

        def job(of: Sequence[EncodeTask]) -> list[Receipt]:
            weight = lambda task: task.work.tokens  # noqa: E731
            return run_buckets(spark, encode_bucket, of, label="encode", weight=weight, unit="characters")

        job(warm_up)
        ready = time.monotonic()
        receipts = job(tasks)
        rounds.add(ready - started, time.monotonic() - ready, receipts)


def through_processes(tasks: Sequence[EncodeTask], warm_up: Sequence[EncodeTask], rounds: Rounds) -> None:
    """The same number of processes, heaviest bucket first; they have loaded their encoders."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    arguments = (warm_up[0], context.Barrier(CORES + 1))
    with ProcessPoolExecutor(CORES, mp_context=context, initializer=load, initargs=arguments) as processes:
        ordered = sorted(tasks, key=lambda task: task.work.tokens, reverse=True)
        # Processes are started as work arrives: this much starts all, and none begins before the barrier.
        waiting = [processes.submit(os.getpid) for _ in range(CORES)]
        arguments[1].wait()
        for one in waiting:
            one.result()
        ready = time.monotonic()
        receipts = list(processes.map(bare, ordered))
        rounds.add(ready - started, time.monotonic() - ready, receipts)


def load(task: EncodeTask, together: Any) -> None:
    bare(task)
    together.wait()


def bare(task: EncodeTask) -> Receipt:
    return encode_bucket(task, TaskResources(cpus=1))


# Memory.


def highest(task: EncodeTask, answers: Any) -> None:
    """Runs in a process of its own: MB at most, and seconds."""
    started = time.monotonic()
    encode_bucket(task, TaskResources(cpus=CORES))
    # Not getrusage's figure: a process inherits that from the one that started it.
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith("VmHWM")]
    answers.put((int(line.split()[1]) / 1024, time.monotonic() - started))


def memory(task: EncodeTask) -> tuple[float, float]:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=highest, args=(task, answers))
    process.start()
    found: tuple[float, float] = answers.get()
    process.join()
    return found


# The command.


def main() -> None:
    arguments = parse()
    console = Console(width=150)
    corpus = netflix(arguments.data)
    logging.getLogger("marc_pipeline").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="worker-benchmark-") as temporary, quiet():
        folder = Path(temporary)
        texts = short(corpus, arguments.items)
        bundle = train(folder, corpus, arguments.layers)
        (whole,) = plan(folder, bundle, texts, 1)
        tasks = plan(folder, bundle, texts, BUCKETS)
        warm_up = plan(folder, bundle, texts[: 8 * CORES], CORES)
        splits, spark, processes = [], Rounds(f"Spark, local[{CORES}]"), Rounds(f"{CORES} bare processes")
        for _ in range(arguments.runs):
            splits.append(take_apart(*afresh([whole])))
            through_processes(afresh(tasks), afresh(warm_up), processes)
            through_spark(afresh(tasks), afresh(warm_up), spark)
        show_split(splits, arguments.layers, console)
        show_rounds(processes, spark, splits, console)
        peaks = {}
        if arguments.memory:
            small = train(folder, corpus, 1)
            for rows in arguments.memory_rows:
                peaks[rows] = memory(plan(folder, small, short(corpus, rows), 1)[0])
            show_memory(peaks, console)
    if arguments.json:
        figures = {
            "cores": CORES,
            "cpu": cpu(),
            "torch": torch.__version__,
            "layers": arguments.layers,
            "bucket": [asdict(split) for split in splits],
            "buckets": [{"name": one.name, "start": one.start, "seconds": one.seconds} for one in (processes, spark)],
            "memory_mb": {rows: peak for rows, (peak, _) in peaks.items()},
        }
        arguments.json.write_text(json.dumps(figures, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure the highest memory as well")
    parser.add_argument(
        "--memory-rows", type=lambda value: [int(one) for one in value.split(",")], default=list(MEMORY_ROWS)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as well")
    add_data(parser)
    return parser.parse_args()


def show_split(splits: Sequence[Split], layers: int, console: Console) -> None:
    one = splits[0]
    seconds = statistics.median(split.seconds for split in splits)
    padding = 1 - one.tokens / one.padded_tokens
    table = Table(
        title=f"one bucket of {one.texts:,} texts, {one.tokens / one.texts:.1f} tokens each ({padding:.1%} padding); "
        f"{BACKBONE}, {layers} layers, {one.dtype}\n{CORES} cores of {cpu()}, torch {torch.__version__}",
        title_justify="left",
    )
    for column in ("busy with", "seconds", "of the bucket", "µs per text"):
        table.add_column(column, justify="left" if column == "busy with" else "right")

    def row(name: str, taken: float) -> None:
        table.add_row(name, f"{taken:.2f}", f"{taken / seconds:.1%}", f"{taken / one.texts * 1e6:,.0f}")

    for name in ("model", "pool, compress"):
        row(name, statistics.median(split.parts[name] for split in splits))
    row("neither: the model waits", statistics.median(split.alone for split in splits))
    row("  of this, for tokens", statistics.median(split.parts["for tokens"] for split in splits))
    table.add_section()
    for name in ("tokenise", "write"):
        row(f"{name}, beside the model", statistics.median(split.parts[name] for split in splits))
    table.add_section()
    table.add_row("the bucket", f"{seconds:.2f}", "100.0%", f"{seconds / one.texts * 1e6:,.0f}")
    for name in ("idle", "others"):
        share = statistics.median(getattr(split, name) for split in splits)
        shown = {"idle": "cores idle", "others": "cores used by others"}[name]
        table.add_row(shown, f"{share * seconds:.2f}", f"{share:.1%}", "")
    console.print(table)


def show_rounds(processes: Rounds, spark: Rounds, splits: Sequence[Split], console: Console) -> None:
    texts = splits[0].texts
    whole = statistics.median(split.seconds for split in splits)
    bare_seconds = statistics.median(processes.seconds)
    table = Table(title=f"{texts:,} texts in {BUCKETS} buckets", title_justify="left")
    for column in ("", "start s", "seconds", "texts/s", "× bare", "spread", "seconds in buckets"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        f"one bucket, {CORES} threads", "", f"{whole:.2f}", f"{texts / whole:,.0f}", f"{bare_seconds / whole:.2f}"
    )
    for rounds in (processes, spark):
        seconds = statistics.median(rounds.seconds)
        table.add_row(
            rounds.name,
            f"{statistics.median(rounds.start):.1f}",
            f"{seconds:.2f}",
            f"{texts / seconds:,.0f}",
            f"{bare_seconds / seconds:.2f}",
            f"{(max(rounds.seconds) - min(rounds.seconds)) / seconds:.0%}",
            f"{sum(receipt.seconds for receipt in rounds.receipts) / CORES:.2f}",
        )
    console.print(table)


def show_memory(peaks: dict[int, tuple[float, float]], console: Console) -> None:
    table = Table(title="highest memory of one worker (1 layer)", title_justify="left")
    for column in ("rows in the bucket", "MB", "MB beyond the fewest", "bytes per row", "seconds"):
        table.add_column(column, justify="right")
    fewest, (base, _) = min(peaks.items())
    for rows, (peak, seconds) in peaks.items():
        per_row = f"{(peak - base) * 2**20 / (rows - fewest):,.0f}" if rows > fewest else ""
        table.add_row(f"{rows:,}", f"{peak:,.0f}", f"{peak - base:,.0f}", per_row, f"{seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()

"""Measure where the time of a bucket goes, the overhead of Spark, and the memory of a large bucket.

    python tests/benchmarks/worker.py [--items 50000] [--layers 6] [--runs 3] [--memory] [--data FOLDER]

The worker is ``encode_bucket``, as a Spark task calls it. All items are short new texts. The first table splits the
time of one bucket on all cores. The second table compares the same items in 16 buckets: through Spark, and through as
many plain processes as there are cores, in alternating rounds with separate start times. ``--memory`` adds the peak
memory of a process with 100,000 and 1,000,000 rows. It uses one layer of the model, because only rows matter there.
"""

import logging
import multiprocessing
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter, time_ns
from types import ModuleType
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
from material import BACKBONE, netflix, quiet, sample, short
from measuring import CORES, PUBLIC_DATA, options, show, spread, working_folder, write_json
from processes import memory_mb
from rows import row_ids

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
from marc_schemas.identity import content_hash
from marc_schemas.plan import BucketPlan
from marc_schemas.receipt import Receipt

DS = "2026-11-20"
DIM = 64
BUCKETS = 16
# About 16 MB, as in the files of the plan stage.
GROUP_ROWS = 65_536
MODEL, POOL, WAIT, TOKENISE, WRITE = "model", "pool, compress", "for tokens", "tokenise", "write"


def train(folder: Path, corpus: Sequence[str], layers: int) -> Bundle:
    """A PCA bundle with the first layers of the default backbone."""
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
    """Write new items into buckets; returns one task per bucket, as the encode stage makes them."""
    workspace = Workspace(Storage(), str(folder / "work"), content_hash(f"{len(texts)} texts, {buckets} buckets"))
    ids = [f"item-{number:08d}" for number in range(len(texts))]
    numbers = row_ids(ids)
    columns = [ids, numbers, texts, map(content_hash, texts), [Change.NEW.value] * len(ids)]
    items = pa.table([list(column) for column in columns], schema=ITEMS)
    tasks = []
    for bucket in range(buckets):
        rows = items.filter(pa.array(numbers % buckets == bucket))
        path = Path(workspace.items_uri(bucket, None))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, path, row_group_size=GROUP_ROWS, compression="zstd")
        counts = {"items": len(rows), "new": len(rows), "changed": 0, "unchanged": 0, "deleted": 0}
        characters = sum(map(len, rows["text"].to_pylist()))
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


def copied(tasks: Sequence[EncodeTask]) -> list[EncodeTask]:
    """The same items under a new plan id, because a finished bucket would keep its receipt."""
    old = tasks[0].workspace
    new = replace(old, plan_id=content_hash(str(time_ns())))
    shutil.copytree(Path(old.uri) / "items", Path(new.uri) / "items")
    return [replace(task, workspace=new) for task in tasks]


# --- one bucket


@dataclass
class Stopwatch:
    """Seconds by name, summed over threads, of functions that are patched to measure themselves."""

    seconds: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                taken = perf_counter() - started
                with self.lock:
                    self.seconds[name] = self.seconds.get(name, 0.0) + taken

        return call

    def on(self, name: str, owner: ModuleType | type, attribute: str) -> Any:
        """A patch of one function."""
        return mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute)))

    @contextmanager
    def on_results(self, name: str, owner: ModuleType) -> Iterator[None]:
        """Measure how long the module waits for the results of its thread pools."""

        def submit(pool: ThreadPoolExecutor, *arguments: Any) -> Future[Any]:
            future = ThreadPoolExecutor.submit(pool, *arguments)
            future.result = self.timed(name, future.result)  # type: ignore[method-assign]
            return future

        pools = type("WatchedPool", (ThreadPoolExecutor,), {"submit": submit})
        with mock.patch.object(owner, "ThreadPoolExecutor", pools):
            yield


@dataclass(frozen=True)
class Split:
    """Time of one bucket.

    Attributes:
        seconds: of the whole bucket.
        parts: seconds by activity; tokenising and writing overlap with the model, so the sum exceeds ``seconds``.
        alone: seconds in which the model did not run.
        idle: share of the cores' time in which no process used them.
        others: share of the cores' time that other processes used.
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


def split_bucket(task: EncodeTask) -> Split:
    """Encode a bucket with patched functions; an earlier call has loaded the encoder."""
    watch, resources = Stopwatch(), TaskResources(cpus=CORES)
    encoder.load_encoder.cache_clear()
    with (
        watch.on(TOKENISE, tokenising, "text_tokens"),
        watch.on_results(WAIT, encoder),
        watch.on(POOL, batches.PackedTokens, "pool"),
        watch.on(POOL, compressor.WhitenedPCA, "forward"),
        watch.on(WRITE, pq.ParquetWriter, "write_table"),
    ):
        loaded = encoder.load_encoder(task.workspace.storage, task.bundle_uri, task.bundle, task.settings, resources)
        loaded.encode([""])
        watch.seconds.clear()
        used, idle, started = cpu_seconds(), idle_seconds(), monotonic()
        receipt = encode_bucket(task, resources)
        seconds = monotonic() - started
        used, idle = cpu_seconds() - used, idle_seconds() - idle
    encoder.load_encoder.cache_clear()
    parts = {name: watch.seconds.get(name, 0.0) for name in (TOKENISE, WAIT, POOL, WRITE)}
    return Split(
        seconds=seconds,
        parts=parts | {MODEL: receipt.model_seconds - parts[POOL]},
        alone=seconds - receipt.model_seconds,
        idle=idle / seconds / CORES,
        others=max(0.0, 1 - (used + idle) / seconds / CORES),
        texts=receipt.encoded,
        tokens=receipt.tokens,
        padded_tokens=receipt.padded_tokens,
        dtype=receipt.dtype,
    )


def cpu_seconds() -> float:
    """Processor time of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def idle_seconds() -> float:
    """Idle time of all cores."""
    ticks = Path("/proc/stat").read_text().split(maxsplit=6)
    return (int(ticks[4]) + int(ticks[5])) / os.sysconf("SC_CLK_TCK")


# --- many buckets


@dataclass
class Rounds:
    """The rounds of one way to run the buckets; ``busy`` is the sum of the buckets' seconds in the last round."""

    name: str
    start: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    busy: float = 0.0

    def add(self, started: float, ready: float, receipts: list[Receipt]) -> None:
        self.seconds.append(monotonic() - ready)
        self.start.append(ready - started)
        self.busy = sum(receipt.seconds for receipt in receipts)


def through_spark(tasks: Sequence[EncodeTask], warm_up: Sequence[EncodeTask], rounds: Rounds) -> None:
    """One job on as many Python workers as there are cores; the warm-up loads their encoders."""
    started = monotonic()
    with spark_session(SparkSettings(master=f"local[{CORES}]"), name="worker benchmark") as spark:

        def job(of: Sequence[EncodeTask]) -> list[Receipt]:
            weight = lambda task: task.work.tokens  # noqa: E731
            return run_buckets(spark, encode_bucket, of, label="encode", weight=weight, unit="characters")

        job(warm_up)
        ready = monotonic()
        rounds.add(started, ready, job(tasks))


def through_processes(tasks: Sequence[EncodeTask], warm_up: Sequence[EncodeTask], rounds: Rounds) -> None:
    """The same number of processes, heaviest bucket first; the warm-up loads their encoders."""
    started = monotonic()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(CORES + 1)
    arguments = (warm_up[0], barrier)
    with ProcessPoolExecutor(CORES, mp_context=context, initializer=load, initargs=arguments) as processes:
        ordered = sorted(tasks, key=lambda task: task.work.tokens, reverse=True)
        # The pool starts a process per waiting task. All processes start, and none begins before the barrier.
        waiting = [processes.submit(os.getpid) for _ in range(CORES)]
        barrier.wait()
        for one in waiting:
            one.result()
        ready = monotonic()
        rounds.add(started, ready, list(processes.map(encode_on_one_core, ordered)))


def load(task: EncodeTask, barrier: Any) -> None:
    encode_on_one_core(task)
    barrier.wait()


def encode_on_one_core(task: EncodeTask) -> Receipt:
    return encode_bucket(task, TaskResources(cpus=1))


# --- memory


def measure_memory(task: EncodeTask, answers: Any) -> None:
    """Encode in this new process; answers with peak MB and seconds."""
    started = monotonic()
    encode_bucket(task, TaskResources(cpus=CORES))
    answers.put((memory_mb("VmHWM"), monotonic() - started))


def peak_memory(task: EncodeTask) -> tuple[float, float]:
    """Peak MB and seconds of a process that encodes one bucket."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=measure_memory, args=(task, answers))
    process.start()
    found: tuple[float, float] = answers.get()
    process.join()
    return found


# --- tables


def show_split(splits: Sequence[Split], layers: int) -> None:
    one, seconds = splits[0], median(split.seconds for split in splits)

    def row(name: str, taken: float) -> tuple[Any, ...]:
        return name, taken, taken / seconds, taken / one.texts * 1e6

    def part(name: str) -> float:
        return median(split.parts[name] for split in splits)

    def share(name: str, of_cores: float) -> tuple[Any, ...]:
        return name, of_cores * seconds, of_cores, None

    padding = 1 - one.tokens / one.padded_tokens
    facts = f"{one.texts:,} texts, {one.tokens / one.texts:.1f} tokens each ({padding:.1%} padding)"
    rows = [
        row(MODEL, part(MODEL)),
        row(POOL, part(POOL)),
        row("model waits", median(split.alone for split in splits)),
        row("  of this, for tokens", part(WAIT)),
        (),
        row("tokenise, beside the model", part(TOKENISE)),
        row("write, beside the model", part(WRITE)),
        (),
        row("whole bucket", seconds),
        share("cores idle", median(split.idle for split in splits)),
        share("cores used by other processes", median(split.others for split in splits)),
    ]
    title = f"one bucket of {facts}; {BACKBONE}, {layers} layers, {one.dtype}"
    show(title, "activity|seconds:.2f|of the bucket:.1%|µs per text:,.0f", rows)


def show_rounds(processes: Rounds, spark: Rounds, splits: Sequence[Split]) -> None:
    texts, whole, plain = splits[0].texts, median(split.seconds for split in splits), median(processes.seconds)
    rows: list[tuple[Any, ...]] = [(f"one bucket, {CORES} threads", None, whole, texts / whole, plain / whole)]
    for one in (processes, spark):
        seconds = median(one.seconds)
        rates = (seconds, texts / seconds, plain / seconds)
        rows.append((one.name, median(one.start), *rates, spread(one.seconds), one.busy / CORES))
    columns = "|start s:.1f|seconds:.2f|texts/s:,.0f|× processes:.2f|spread:.0%|seconds in buckets:.2f"
    show(f"{texts:,} texts in {BUCKETS} buckets", columns, rows)


def show_memory(peaks: dict[int, tuple[float, float]]) -> None:
    fewest, (base, _) = min(peaks.items())
    rows = [
        (count, peak, peak - base, (peak - base) * 2**20 / (count - fewest) if count > fewest else None, seconds)
        for count, (peak, seconds) in peaks.items()
    ]
    columns = "rows in the bucket:,|peak MB:,.0f|MB above the smallest:,.0f|bytes per row:,.0f|seconds:.1f"
    show("peak memory of one worker (1 layer)", columns, rows, texts=0)


def main() -> None:
    given = options(
        __doc__, items=50_000, layers=6, runs=3, memory=False, memory_rows=[100, 100_000, 1_000_000], data=PUBLIC_DATA
    )
    corpus = netflix(given.data)
    logging.getLogger("marc_pipeline").setLevel(logging.WARNING)
    with working_folder() as folder, quiet():
        texts = short(corpus, given.items)
        bundle = train(folder, corpus, given.layers)
        (whole,) = plan(folder, bundle, texts, 1)
        tasks = plan(folder, bundle, texts, BUCKETS)
        warm_up = plan(folder, bundle, texts[: 8 * CORES], CORES)
        splits, spark, processes = [], Rounds(f"Spark, local[{CORES}]"), Rounds(f"{CORES} plain processes")
        for _ in range(given.runs):
            splits.append(split_bucket(*copied([whole])))
            through_processes(copied(tasks), copied(warm_up), processes)
            through_spark(copied(tasks), copied(warm_up), spark)
        show_split(splits, given.layers)
        show_rounds(processes, spark, splits)
        peaks = {}
        if given.memory:
            small = train(folder, corpus, 1)
            peaks = {rows: peak_memory(*plan(folder, small, short(corpus, rows), 1)) for rows in given.memory_rows}
            show_memory(peaks)
    figures = {
        "layers": given.layers,
        "bucket": [asdict(split) for split in splits],
        "buckets": [asdict(rounds) for rounds in (processes, spark)],
        "memory_mb": {rows: peak for rows, (peak, _) in peaks.items()},
    }
    write_json(given.json, figures)


if __name__ == "__main__":
    main()

"""The Spark session, and running one function per bucket on it: the only room of the library that imports pyspark."""

import builtins
import errno
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from typing import TypeVar, cast

from py4j.protocol import Py4JJavaError
from pyspark import SparkConf, SparkContext, TaskContext
from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession

from marc_pipeline import errors
from marc_pipeline.config import Settings, SparkSettings, StorageSettings
from marc_pipeline.resources import TaskResources, machine

T = TypeVar("T")
R = TypeVar("R")

# Progress is told at first after so many seconds, and then whenever a run is longer by this share.
PROGRESS_SECONDS, PROGRESS_SHARE = 10.0, 0.1
MOST_PROGRESS_SECONDS = 300.0
SHARED_GPU = "0.01"
# Texts can be long: a batch of Spark's default 10,000 rows may be gigabytes.
DEFAULTS = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": "2000",
    "spark.sql.session.timeZone": "UTC",
    # Column names are exact, as in the settings; "title" and "Title" are two columns.
    "spark.sql.caseSensitive": "true",
    # Nanosecond timestamps, which pandas writes, are read as integers; without this Spark refuses the whole file.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.ui.enabled": "false",
    "spark.log.level": "ERROR",
    # One bucket is one task; what a retry repeats is small.
    "spark.task.maxFailures": "4",
}
# The last line of a Python worker's traceback.
WORKER_ERROR = re.compile(r"^(marc_pipeline\.errors\.|boto\w+\.exceptions\.)?(\w+): (.+)$", re.MULTILINE)

log = logging.getLogger(__name__)


@contextmanager
def spark_session(
    settings: SparkSettings, *, name: str, gpu_tasks: bool = False, storage: StorageSettings | None = None
) -> Iterator[SparkSession]:
    """A session, stopped afterwards unless it was running before. Settings given to spark-submit win over ours.

    Args:
        settings: master and configuration.
        name: of the application.
        gpu_tasks: whether every task takes a whole GPU, where executors bring GPUs. Other stages share them,
            so that a GPU does not hold their tasks to one at a time.
        storage: where executors of a cluster read s3:// from; default: as the cluster says.
    """
    running = SparkSession.getActiveSession()
    if running is not None:
        with worker_errors():
            yield running
        return
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # Python workers fork: a tokenizer's thread pool would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ
    if submitted:
        # Connects to spark-submit's JVM, so that SparkConf knows what was given there.
        SparkContext._ensure_initialized()
    conf = SparkConf().setAppName(name)
    for key, value in {**DEFAULTS, **s3a_conf(storage or StorageSettings()), **settings.conf}.items():
        conf.setIfMissing(key, value)
    conf.setIfMissing("spark.master", settings.master)
    if conf.contains("spark.executor.resource.gpu.amount"):
        conf.setIfMissing("spark.task.resource.gpu.amount", "1" if gpu_tasks else SHARED_GPU)
    spark = _start(conf)
    try:
        with worker_errors():
            yield spark
    finally:
        spark.stop()


def configured_session(
    settings: Settings, *, name: str, gpu_tasks: bool = False
) -> AbstractContextManager[SparkSession]:
    """:func:`spark_session` with the Spark and S3 settings of a configuration."""
    return spark_session(settings.spark, storage=settings.storage, name=name, gpu_tasks=gpu_tasks)


def s3a_conf(storage: StorageSettings) -> dict[str, str]:
    """What makes Hadoop's S3A, through which executors read the catalogue, ask the same store as everything else.

    Credentials are not handed on: every executor finds its own by the AWS chain.
    """
    conf = {}
    if storage.endpoint_url:
        conf["endpoint"] = storage.endpoint_url
        # A store of one's own seldom has a host name per bucket.
        conf["path.style.access"] = "true"
        conf["connection.ssl.enabled"] = str(storage.endpoint_url.startswith("https://")).lower()
    if storage.region:
        conf["endpoint.region"] = storage.region
    return {f"spark.hadoop.fs.s3a.{key}": value for key, value in conf.items()}


def _start(conf: SparkConf) -> SparkSession:
    try:
        return SparkSession.builder.config(conf=conf).getOrCreate()
    except PySparkRuntimeError as error:
        if error.getCondition() != "JAVA_GATEWAY_EXITED":
            raise
        java = os.environ.get("JAVA_HOME", "not set")
        raise errors.UserError(f"Spark cannot start: it needs Java 17 or newer (JAVA_HOME is {java})") from None


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise what a Python worker raised on purpose, or met, as itself, not as what carried it here through Java."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        said = str(error)
        for module, name, message in reversed(WORKER_ERROR.findall(said)):
            if module.startswith("boto"):
                raise OSError(f"{name}: {message.strip()}") from None
            kind = getattr(errors if module else builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, (errors.PipelineError, OSError)):
                raise kind(message.strip()) from None
        if "Python worker exited unexpectedly" in said:
            raise errors.WorkerDied(
                "a Python worker died on every try: killed for its memory, or by encode.stuck_after_s because its "
                "device did not answer; the executor's log says which"
            ) from error
        if (full := os.strerror(errno.ENOSPC)) in said:
            raise errors.DiskFull(f"{full}, says Spark: in spark.local.dir, or where it reads and writes") from None
        raise


def run_buckets(
    spark: SparkSession,
    function: Callable[[T, TaskResources], R],
    tasks: Sequence[T],
    *,
    label: str,
    weight: Callable[[T], int],
    unit: str,
    each: str = "buckets",
    under_way: Callable[[], int] = lambda: 0,
) -> list[R]:
    """Run one Spark task per bucket, heaviest first, logging progress by weight; results in no particular order.

    Args:
        spark: the session.
        function: what to do with one task; it runs in a Python worker.
        tasks: picklable, one per bucket.
        label: name of the stage in the log.
        weight: size of a task in ``unit`` (tokens, rows): progress counts these, because items lie.
        unit: name of what ``weight`` counts.
        each: name of what a task is for.
        under_way: what is done of tasks that have not ended, in ``unit``.
    """
    if not tasks:
        return []
    context = spark.sparkContext
    ordered = sorted(tasks, key=weight, reverse=True)
    total, done, finished = sum(map(weight, ordered)), context.accumulator(0), context.accumulator(0)

    def work(task: T) -> R:
        result = function(task, task_resources())
        done.add(weight(task))
        finished.add(1)
        return result

    # One element per partition; pickled one by one, so that a large task never waits for a batch.
    mapped = context.parallelize(ordered, len(ordered)).map(work)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(mapped.collect)
        try:
            while not _finished(future, _pause(time.monotonic() - started)):
                try:
                    so_far = min(done.value + under_way(), total)
                except OSError:
                    # A line in a log is not worth the stage.
                    so_far = done.value
                _log_progress(
                    label, (unit, so_far, total), (each, finished.value, len(ordered)), time.monotonic() - started
                )
        except BaseException:
            context.cancelAllJobs()
            raise
        return future.result()


def distribute(spark: SparkSession, function: Callable[..., R], *arguments: object, processes: int) -> R:
    """Run one function in several processes that share a torch.distributed group; what the first one returns.

    Processes are started by Spark's TorchDistributor: on ``local[*]`` on this machine, on a cluster as one barrier task
    each, with a GPU where tasks are given GPUs.
    """
    local = str(spark.sparkContext.master).startswith("local")
    gpu = float(spark.conf.get("spark.task.resource.gpu.amount", "0") or 0) >= 1
    distributor = TorchDistributor(num_processes=processes, local_mode=local, use_gpu=gpu)
    # What the launcher and the members print is no result: standard output is left to that.
    with redirect_stdout(sys.stderr):
        found = distributor.run(_member, function, *arguments)
    if isinstance(found, errors.PipelineError):
        raise found
    return cast("R", found)


def _member(function: Callable[..., R], *arguments: object) -> R | errors.PipelineError:
    """What a member returns; the distributor knows of an error only that there was one."""
    try:
        return function(*arguments)
    except errors.PipelineError as error:
        return error


def hands_out_gpus(spark: SparkSession) -> bool:
    """Whether executors bring GPUs, which tasks are given."""
    return bool(spark.sparkContext.getConf().contains("spark.executor.resource.gpu.amount"))


def parallel_tasks(spark: SparkSession) -> int:
    """How many tasks run at a time, as far as Spark knows; 1 where GPUs are handed out, which it does not count."""
    if hands_out_gpus(spark):
        return 1
    return max(1, spark.sparkContext.defaultParallelism // int(spark.conf.get("spark.task.cpus", "1") or 1))


def task_resources() -> TaskResources:
    """The resources of the task that this Python worker is running."""
    task = TaskContext.get()
    if task is None:
        return machine()
    gpu = task.resources().get("gpu")
    return TaskResources(cpus=task.cpus(), gpu=gpu.addresses[0] if gpu and gpu.addresses else None)


def _pause(seconds: float) -> float:
    """Seconds until progress is told again, ``seconds`` into a run: a night's log stays short."""
    return min(max(PROGRESS_SECONDS, PROGRESS_SHARE * seconds), MOST_PROGRESS_SECONDS)


def _finished(future: Future[list[R]], seconds: float) -> bool:
    try:
        future.exception(timeout=seconds)
    except TimeoutError:
        return False
    return True


def _log_progress(label: str, work: tuple[str, int, int], tasks: tuple[str, int, int], seconds: float) -> None:
    """Work and tasks: name, how many are done, and of how many."""
    (unit, done, total), (each, finished, count) = work, tasks
    share = done / total if total else 1.0
    left = f", about {seconds / share - seconds:,.0f} s left" if share > 0 else ""
    log.info(
        "%s: %d of %d %s, %s of %s %s (%.0f %%)%s",
        *(label, finished, count, each, f"{done:,}", f"{total:,}", unit, 100 * share, left),
    )

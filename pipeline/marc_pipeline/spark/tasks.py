"""Spark tasks: run one function per bucket with progress logs, or in a torch.distributed group of processes."""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import TypeVar, cast

from pyspark import TaskContext
from pyspark.ml.torch.distributor import TorchDistributor
from pyspark.sql import SparkSession

from marc_pipeline.errors import PipelineError
from marc_pipeline.progress import SECONDS
from marc_pipeline.resources import TaskResources, machine

T = TypeVar("T")
R = TypeVar("R")

# Progress is logged every 10 s at first, and less often in a long run: after another tenth of its time, at most 300 s.
PROGRESS_SHARE = 0.1
MOST_PROGRESS_SECONDS = 300.0

log = logging.getLogger(__name__)


def run_buckets(
    spark: SparkSession,
    function: Callable[[T, TaskResources], R],
    tasks: Sequence[T],
    *,
    label: str,
    weight: Callable[[T], int],
    unit: str,
    each: str = "buckets",
    running: Callable[[], float] = lambda: 0.0,
) -> list[R]:
    """Run one Spark task per bucket, largest first, and log the progress. Returns the results in any order.

    Args:
        spark: the session.
        function: runs in a Python worker, with one task and the resources of that worker.
        tasks: picklable, one per bucket.
        label: name of the stage in the log.
        weight: size of a task in ``unit``; progress is measured in this unit, because buckets differ in size.
        unit: name of the unit of ``weight``, for example "tokens".
        each: name of one task's part of the work.
        running: returns the finished work of running tasks, in ``unit``.
    """
    if not tasks:
        return []
    context = spark.sparkContext
    ordered = sorted(tasks, key=weight, reverse=True)
    total, done, finished = sum(map(weight, ordered)), context.accumulator(0.0), context.accumulator(0)

    def work(task: T) -> R:
        result = function(task, task_resources())
        done.add(weight(task))
        finished.add(1)
        return result

    # One task per partition.
    mapped = context.parallelize(ordered, len(ordered)).map(work)
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(mapped.collect)
        try:
            while not _finished(future, _pause(time.monotonic() - started)):
                try:
                    so_far = min(done.value + running(), total)
                except OSError:
                    # Progress is only logged: a failure to read it must not fail the stage.
                    so_far = done.value
                share, seconds = so_far / total if total else 1.0, time.monotonic() - started
                log.info(
                    "%s: %d of %d %s, %s of %s %s (%.0f %%)%s",
                    *(label, finished.value, len(ordered), each, f"{so_far:,.0f}", f"{total:,}", unit, 100 * share),
                    f", about {seconds / share - seconds:,.0f} s left" if share > 0 else "",
                )
        except BaseException:
            context.cancelAllJobs()
            raise
        return future.result()


def distribute(spark: SparkSession, function: Callable[..., R], *arguments: object, processes: int) -> R:
    """Run one function in a torch.distributed group of processes; return the result of the first process.

    Spark's TorchDistributor starts the processes: on this machine for a local master, else as barrier tasks of the
    cluster. Each process gets a GPU if Spark assigns GPUs to tasks.
    """
    local = str(spark.sparkContext.master).startswith("local")
    gpu = float(spark.conf.get("spark.task.resource.gpu.amount", "0") or 0) >= 1
    distributor = TorchDistributor(num_processes=processes, local_mode=local, use_gpu=gpu)
    # Standard output belongs to results, so the output of the launcher goes to standard error.
    with redirect_stdout(sys.stderr):
        found = distributor.run(_member, function, *arguments)
    if isinstance(found, PipelineError):
        raise found
    return cast("R", found)


def _member(function: Callable[..., R], *arguments: object) -> R | PipelineError:
    """Return the error of a process as a result, because the distributor would lose its type and message."""
    try:
        return function(*arguments)
    except PipelineError as error:
        return error


def assigns_gpus(spark: SparkSession) -> bool:
    """Whether Spark assigns GPUs of the executors to tasks."""
    return bool(spark.sparkContext.getConf().contains("spark.executor.resource.gpu.amount"))


def parallel_tasks(spark: SparkSession) -> int:
    """Return the number of tasks that run at a time; 1 if Spark assigns GPUs, whose number it does not report."""
    if assigns_gpus(spark):
        return 1
    return max(1, spark.sparkContext.defaultParallelism // int(spark.conf.get("spark.task.cpus", "1") or 1))


def task_resources() -> TaskResources:
    """Return the resources of the task that this Python worker is running."""
    task = TaskContext.get()
    if task is None:
        return machine()
    gpu = task.resources().get("gpu")
    return TaskResources(cpus=task.cpus(), gpu=gpu.addresses[0] if gpu and gpu.addresses else None)


def _pause(seconds: float) -> float:
    """Return the seconds until the next progress line, ``seconds`` after the start."""
    return min(max(SECONDS, PROGRESS_SHARE * seconds), MOST_PROGRESS_SECONDS)


def _finished(future: Future[list[R]], seconds: float) -> bool:
    try:
        future.exception(timeout=seconds)
    except TimeoutError:
        return False
    return True

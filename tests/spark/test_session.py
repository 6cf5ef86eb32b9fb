"""What comes back from Spark's Python workers and from Spark itself when something goes wrong there."""

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from pyspark.errors import PySparkException

from marc_pipeline.errors import CorruptFile, DiskFull, WorkerDied
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark import session
from marc_pipeline.spark.session import run_buckets, worker_errors

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


NO_ROOM = (errno.ENOSPC, os.strerror(errno.ENOSPC), "/mnt/table")


@pytest.mark.spark
@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (CorruptFile("part-0: sha256 differs"), r"^part-0: sha256 differs$"),
        (PermissionError(errno.EACCES, "Permission denied", "/mnt/x"), r"^\[Errno 13\] Permission denied: '/mnt/x'$"),
        (DiskFull(*NO_ROOM), r"^\[Errno 28\] No space left on device: '/mnt/table'$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_worker_met_is_raised_as_itself(spark: "SparkSession", raised: Exception, message: str) -> None:
    def work(_: int) -> None:
        raise raised from OSError(*NO_ROOM)

    with pytest.raises(type(raised), match=message) as caught, worker_errors():
        spark.sparkContext.parallelize([1], 1).map(work).collect()
    assert type(caught.value) is type(raised)


def test_a_disk_that_spark_itself_filled_is_said_in_one_line() -> None:
    said = "Job aborted: java.io.IOException: No space left on device\n\tat java.base/java.io.FileOutputStream"
    with pytest.raises(DiskFull, match=r"^No space left on device, says Spark: .*spark\.local\.dir"), worker_errors():
        raise PySparkException(said)


def test_a_mistake_of_ours_stays_what_it_was() -> None:
    with pytest.raises(PySparkException, match="ValueError: our mistake"), worker_errors():
        raise PySparkException("An exception was thrown from the Python worker:\nValueError: our mistake")


@pytest.mark.spark
def test_progress_that_cannot_be_read_does_not_stop_a_stage(
    spark: "SparkSession", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> int:
        raise OSError("the store is away")

    monkeypatch.setattr(session, "PROGRESS_SECONDS", 0.05)
    caplog.set_level("INFO", logger="marc_pipeline.spark.session")
    found = run_buckets(spark, slow(), [1, 2], label="test", weight=int, unit="tokens", under_way=away)
    assert sorted(found) == [1, 2]
    assert "of 2 buckets" in caplog.text


@pytest.mark.spark
def test_progress_counts_what_is_under_way(
    spark: "SparkSession", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(session, "PROGRESS_SECONDS", 0.05)
    caplog.set_level("INFO", logger="marc_pipeline.spark.session")
    run_buckets(spark, slow(), [50, 50], label="test", weight=int, unit="tokens", under_way=lambda: 30)
    assert "30 of 100 tokens (30 %), about" in caplog.text
    assert "130" not in caplog.text


def slow() -> Callable[[int, TaskResources], int]:
    """Made anew, so that it travels to the workers as it is."""

    def slowly(task: int, _: TaskResources) -> int:
        time.sleep(0.5)
        return task

    return slowly


@pytest.mark.parametrize(("seconds", "pause"), [(0, 10), (60, 10), (600, 60), (36_000, 300)])
def test_progress_is_told_less_often_in_a_long_run(seconds: float, pause: float) -> None:
    assert session._pause(seconds) == pause


def test_a_worker_that_died_on_every_try_is_said_in_words() -> None:
    with pytest.raises(WorkerDied, match=r"encode\.stuck_after_s"), worker_errors():
        raise PySparkException("Job aborted: Python worker exited unexpectedly (crashed)")

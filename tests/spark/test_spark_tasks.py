"""Progress of Spark tasks in the log."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from marc_pipeline.resources import TaskResources
from marc_pipeline.spark import tasks
from marc_pipeline.spark.tasks import run_buckets

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def not_reachable() -> int:
    raise OSError("the store is not reachable")


@pytest.mark.spark
@pytest.mark.parametrize(
    ("work", "running", "message"),
    [([50, 50], lambda: 30, "30 of 100 tokens (30 %), about"), ([1, 2], not_reachable, "of 2 buckets")],
    ids=["running", "unreadable"],
)
def test_progress_includes_running_tasks_if_it_can_be_read(
    spark: "SparkSession",
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    work: list[int],
    running: Callable[[], int],
    message: str,
) -> None:
    monkeypatch.setattr(tasks, "SECONDS", 0.05)
    caplog.set_level("INFO", logger="marc_pipeline.spark.tasks")

    def slowly(task: int, _: TaskResources) -> int:
        time.sleep(0.5)
        return task

    found = run_buckets(spark, slowly, work, label="test", weight=int, unit="tokens", running=running)
    assert sorted(found) == work
    assert message in caplog.text
    # Progress never exceeds the total.
    assert "130" not in caplog.text


@pytest.mark.parametrize(("seconds", "pause"), [(0, 10), (60, 10), (600, 60), (36_000, 300)])
def test_progress_is_logged_less_often_in_a_long_run(seconds: float, pause: float) -> None:
    assert tasks._pause(seconds) == pause

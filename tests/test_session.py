"""What comes back from Spark's Python workers and from Spark itself when something goes wrong there."""

import errno
import os
from typing import TYPE_CHECKING

import pytest
from pyspark.errors import PySparkException

from pipeline.errors import CorruptFile, DiskFull
from pipeline.session import worker_errors

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

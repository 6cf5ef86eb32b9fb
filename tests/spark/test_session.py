"""The session: errors of Spark's Python workers and of Spark itself as it raises them, and its open ports."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyspark.errors import PySparkException

from marc_pipeline.errors import CorruptFile, DiskFull, WorkerDied
from marc_pipeline.spark.session import worker_errors

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# 127.0.0.1, ::1, and 127.0.0.1 as an IPv6 address, as the kernel writes them.
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
LISTEN = "0A"
NO_SPACE = (errno.ENOSPC, os.strerror(errno.ENOSPC), "/mnt/table")


@pytest.mark.spark
@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (CorruptFile("part-0: sha256 differs"), r"^part-0: sha256 differs$"),
        (PermissionError(errno.EACCES, "Permission denied", "/mnt/x"), r"^\[Errno 13\] Permission denied: '/mnt/x'$"),
        (DiskFull(*NO_SPACE), r"^\[Errno 28\] No space left on device: '/mnt/table'$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_a_worker_is_raised_with_its_type(spark: "SparkSession", raised: Exception, message: str) -> None:
    def work(_: int) -> None:
        raise raised from OSError(*NO_SPACE)

    with pytest.raises(type(raised), match=message) as caught, worker_errors():
        spark.sparkContext.parallelize([1], 1).map(work).collect()
    assert type(caught.value) is type(raised)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (
            "Job aborted: java.io.IOException: No space left on device\n\tat java.base/java.io.FileOutputStream",
            DiskFull,
            r"^No space left on device, Spark reports: .*spark\.local\.dir",
        ),
        ("Job aborted: Python worker exited unexpectedly (crashed)", WorkerDied, r"encode\.stuck_after_s"),
        (
            "An exception was thrown from the Python worker:\nValueError: our mistake",
            PySparkException,
            "ValueError: our mistake",
        ),
    ],
)
def test_an_error_of_spark_is_explained_if_its_cause_is_known(text: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message), worker_errors():
        raise PySparkException(text)


@pytest.mark.spark
def test_a_local_session_opens_no_port_to_other_machines(spark: "SparkSession") -> None:
    jvm = spark.sparkContext._gateway.jvm.java.lang.ProcessHandle.current().pid()
    open_sockets, addresses = set(), []
    for entry in Path(f"/proc/{jvm}/fd").iterdir():
        with suppress(FileNotFoundError):
            open_sockets.add(str(entry.readlink()))
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{jvm}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in open_sockets:
                addresses.append(fields[1].rpartition(":")[0])
    assert addresses
    assert set(addresses) <= LOOPBACK

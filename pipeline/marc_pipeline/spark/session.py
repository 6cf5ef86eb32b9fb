"""The Spark session: how it is configured and started, and how errors of its Python workers reach the caller."""

import builtins
import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from py4j.protocol import Py4JJavaError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException, PySparkRuntimeError
from pyspark.sql import SparkSession

from marc_pipeline import errors
from marc_pipeline.config import Settings, SparkSettings, StorageSettings

SHARED_GPU = "0.01"
# Texts can be long: a batch of Spark's default 10,000 rows may be gigabytes.
DEFAULTS = {
    "spark.sql.execution.arrow.maxRecordsPerBatch": "2000",
    "spark.sql.session.timeZone": "UTC",
    # Otherwise ${env:NAME} in a template would become the value of a variable, which may be a secret.
    "spark.sql.variable.substitute": "false",
    # Column names in the settings are exact: "title" and "Title" are two columns.
    "spark.sql.caseSensitive": "true",
    # Spark refuses files with nanosecond timestamps, which pandas writes, unless it reads them as integers.
    "spark.sql.legacy.parquet.nanosAsLong": "true",
    "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.ui.enabled": "false",
    "spark.log.level": "ERROR",
    # A task is one bucket, so a retry repeats little work.
    "spark.task.maxFailures": "4",
}
# The last line of a Python worker's traceback.
WORKER_ERROR = re.compile(r"^(marc_pipeline\.errors\.|boto\w+\.exceptions\.)?(\w+): (.+)$", re.MULTILINE)


@contextmanager
def spark_session(
    settings: SparkSettings, *, name: str, gpu_tasks: bool = False, storage: StorageSettings | None = None
) -> Iterator[SparkSession]:
    """Yield a Spark session and stop it afterwards; an already active session is used and kept.

    Arguments of spark-submit override the settings.

    Args:
        settings: master and configuration.
        name: name of the application.
        gpu_tasks: give every task a whole GPU, if executors have GPUs. Otherwise, tasks share them, so that a GPU
            does not limit an executor to one task at a time.
        storage: S3 store from which executors read; default: the configuration of the cluster.
    """
    running = SparkSession.getActiveSession()
    if running is not None:
        with worker_errors():
            yield running
        return
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # Python workers fork, which breaks the thread pool of a tokenizer.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        # Connects to the JVM of spark-submit, so that SparkConf has its arguments.
        SparkContext._ensure_initialized()
    conf = SparkConf().setAppName(name)
    for key, value in {**DEFAULTS, **s3a_conf(storage or StorageSettings()), **settings.conf}.items():
        conf.setIfMissing(key, value)
    conf.setIfMissing("spark.master", settings.master)
    if conf.get("spark.master", "").startswith("local"):
        # Nobody else needs the ports of a driver without executors.
        for key in ("spark.driver.host", "spark.driver.bindAddress"):
            conf.setIfMissing(key, "127.0.0.1")
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
    """Return the configuration of Hadoop's S3A, through which executors read the catalogue, for the pipeline's store.

    It has no credentials: every executor finds its own through the AWS chain.
    """
    conf = {}
    if storage.endpoint_url:
        conf["endpoint"] = storage.endpoint_url
        # Self-hosted stores rarely have a host name per bucket.
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
    """Unwrap errors of Python workers: raise pipeline, disk and S3 errors themselves instead of Spark's wrapper."""
    try:
        yield
    except (Py4JJavaError, PySparkException) as error:
        text = str(error)
        for module, name, message in reversed(WORKER_ERROR.findall(text)):
            if module.startswith("boto"):
                raise OSError(f"{name}: {message.strip()}") from None
            kind = getattr(errors if module else builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, (errors.PipelineError, OSError)):
                raise kind(message.strip()) from None
        if "Python worker exited unexpectedly" in text:
            raise errors.WorkerDied(
                "a Python worker died on every try: it was out of memory, or encode.stuck_after_s killed it because "
                "its device did not answer; the executor's log has the reason"
            ) from error
        if (full := os.strerror(errno.ENOSPC)) in text:
            raise errors.DiskFull(
                f"{full}, Spark reports: free space in spark.local.dir or in its data folders"
            ) from None
        raise

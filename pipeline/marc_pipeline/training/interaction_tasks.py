"""Interactions that are too large for one process: one Spark task per file surveys it, and writes the kept rows."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from marc_pipeline.errors import UserError
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.tasks import run_buckets
from marc_pipeline.storage import join
from marc_pipeline.training.interaction_rows import (
    ROWS,
    FileTask,
    InteractionSource,
    Selection,
    file_tasks,
    joined,
    kept_tables,
    select_rows,
)

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

R = TypeVar("R")


def read_rows_in_spark(spark: "SparkSession", source: InteractionSource, *, folder: str) -> tuple[pa.Table, Selection]:
    """Return the kept rows, in the columns of ``ROWS``, and their selection.

    Tasks write the kept rows to files in ``folder``, because Spark limits the size of results. The files are deleted.

    Raises:
        UserError: a file or a value cannot be read, or the interactions cannot be used.
    """
    run = partial(_run, spark)
    selection = select_rows(source, run)
    parts = sorted(run(partial(write_part, folder=folder), file_tasks(source, selection)))
    tables = []
    for uri in parts:
        filesystem, path = source.storage.filesystem(uri)
        with filesystem.open_input_stream(path) as stream, pa.ipc.open_stream(stream) as reader:
            tables.append(reader.read_all())
    rows = joined(tables)
    source.storage.remove(parts)
    return rows, selection


def write_part(task: FileTask, *, folder: str) -> str:
    """Write the kept rows of one file to ``folder`` and return the uri. Names of parts keep the order of the files."""
    uri, storage = join(folder, f"{task.number:06d}.arrows"), task.source.storage
    with storage.staged(uri) as staged:
        # A stream of Arrow, because it can have another dictionary per batch, and keeps the types.
        with pa.ipc.new_stream(staged, ROWS, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            for table in kept_tables(task):
                writer.write_table(table)
        storage.publish(staged, uri)
    return uri


def _run(spark: "SparkSession", function: Callable[[FileTask], R], tasks: Sequence[FileTask], /) -> list[R]:
    """Run one Spark task per file. See :class:`.interaction_rows.Run`."""
    found = run_buckets(
        spark,
        partial(_attempt, function),
        tasks,
        label="interactions",
        weight=lambda task: task.file.bytes,
        unit="bytes",
        each="files",
    )
    for result in found:
        if isinstance(result, UserError):
            raise result
    return [result for result in found if not isinstance(result, UserError)]


def _attempt(function: Callable[[FileTask], R], task: FileTask, _: TaskResources) -> R | UserError:
    """Return the user's error as a result, because Spark would retry the task, which cannot help."""
    try:
        return function(task)
    except UserError as error:
        return error

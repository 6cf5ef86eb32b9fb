"""Rows of interactions within the configured window and cap, read in two passes over the files with bounded memory.

The first pass surveys the files: counts, times, labels. If more than ``interactions.max_rows`` are left, another pass
counts the rows of users by hash, to choose a sample of users. The last pass reads the rows that are kept.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, StoredObject
from marc_pipeline.training.interaction_columns import TEXT, to_micros
from marc_pipeline.training.interaction_files import InteractionBatch, InteractionFiles, read_batches
from marc_pipeline.training.interaction_survey import (
    Feedback,
    Survey,
    clicked,
    event_weights,
    merge,
    require_usable,
    survey_batch,
)
from marc_schemas.identity import row_id

R = TypeVar("R")

CODED = pa.dictionary(pa.int32(), TEXT)
ROWS = pa.schema(
    {
        "user": CODED,
        "item": CODED,
        "label": pa.float32(),
        "weight": pa.float32(),
        "time": pa.int64(),
        "profile": CODED,
    }
)
"""Columns of interactions: ids and texts about users, times in microseconds since 1970."""
DAY_MICROS = 86_400_000_000
# Users are counted by the first 16 of the 63 bits of their hash.
HASH_BITS, USER_GROUPS = 63 - 16, 1 << 16
# About 10 s for one core. Larger files are read by Spark.
DRIVER_BYTES = 256 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """Which rows are kept, and how they count.

    Attributes:
        feedback: how rows count.
        unit: unit of times that are numbers.
        since: first time that is kept, in microseconds since 1970.
        groups: bool [USER_GROUPS], whether the users of each hash are kept; None: all users.
    """

    feedback: Feedback
    unit: str
    since: int
    groups: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class InteractionSource:
    """The files of interactions with the settings to read them; picklable for tasks of Spark."""

    files: InteractionFiles
    settings: InteractionSettings
    storage: Storage

    @property
    def small(self) -> bool:
        """Whether the files are read by this process rather than by Spark."""
        return self.files.bytes <= DRIVER_BYTES

    @cached_property
    def selection(self) -> Selection:
        """Return the rows to keep, found by this process.

        Raises:
            UserError: the interactions cannot be used.
        """
        return select_rows(self, in_process)


@dataclass(frozen=True)
class FileTask:
    """One file to read, by its number; ``selection`` is None in the first pass."""

    source: InteractionSource
    number: int
    file: StoredObject
    selection: Selection | None = None

    def batches(self) -> Iterator[InteractionBatch]:
        """Yield the rows of the file."""
        return read_batches(self.source.files, self.file.uri, self.source.storage)


class Run(Protocol):
    """Runs a function once per task, here or in Spark, and returns the results in any order."""

    def __call__(self, function: Callable[[FileTask], R], tasks: Sequence[FileTask], /) -> list[R]:
        """Return the result of every task."""
        ...


def in_process(function: Callable[[FileTask], R], tasks: Sequence[FileTask], /) -> list[R]:
    """Run the tasks one by one in this process."""
    return [function(task) for task in tasks]


def file_tasks(source: InteractionSource, selection: Selection | None = None) -> list[FileTask]:
    """Return one task per file."""
    return [FileTask(source, number, file, selection) for number, file in enumerate(source.files.files)]


def select_rows(source: InteractionSource, run: Run) -> Selection:
    """Survey the files, check them, and return the rows to keep.

    Raises:
        UserError: a file or a value cannot be read, or the interactions cannot be used.
    """
    settings = source.settings
    survey = merge(run(survey_file, file_tasks(source)))
    feedback = require_usable(survey, settings, source.files.columns.get("rating_column"))
    first, last = survey.span
    since = first if settings.days is None else max(first, last - settings.days * DAY_MICROS)
    found = Selection(feedback, survey.unit, since)
    if survey.rows <= settings.max_rows:
        return found
    counts = np.sum(run(count_users, file_tasks(source, found)), axis=0)
    groups, kept = _fitting(counts, settings.max_rows)
    if not kept:
        raise UserError(
            f"interactions.max_rows {settings.max_rows:,} is less than the rows of one group of users; raise it"
        )
    if groups is not None:
        log.info(
            "interactions: %s of %s rows are kept, all rows of a sample of users (interactions.max_rows)",
            *(f"{n:,}" for n in (kept, int(counts.sum()))),
        )
    return replace(found, groups=groups)


def survey_file(task: FileTask) -> Survey:
    """Return the facts about one file."""
    found = Survey()
    for batch in task.batches():
        found = found.merged(survey_batch(batch, task.source.settings, task.file.uri))
    return found


def count_users(task: FileTask) -> NDArray[np.int64]:
    """Return the number of kept rows of one file by the hash of the user [USER_GROUPS]."""
    counts = np.zeros(USER_GROUPS, np.int64)
    for table in kept_tables(task):
        counts += np.bincount(_user_groups(table["user"]), minlength=USER_GROUPS)
    return counts


def kept_tables(task: FileTask) -> Iterator[pa.Table]:
    """Yield the kept rows of one file in batches, with the columns of ``ROWS``."""
    selection = task.selection
    if selection is None:
        raise ValueError("rows are read after their selection")
    for batch in task.batches():
        weights, _ = event_weights(batch, task.source.settings)
        times = to_micros(batch.times, selection.unit) if batch.numeric else batch.times
        rows = (weights > 0) & (times >= selection.since)
        labels = np.ones(len(times), np.float32)
        if batch.ratings is not None and not selection.feedback.implicit:
            labels = clicked(batch.ratings, selection.feedback.positive).astype(np.float32)
        texts = pa.nulls(len(times), TEXT) if batch.texts is None else batch.texts
        table = pa.table([batch.users, batch.items, labels, weights, times, texts], names=ROWS.names).filter(rows)
        if selection.groups is not None:
            table = table.filter(selection.groups[_user_groups(table["user"])])
        # Encoded last, because a dictionary keeps the values of rows that are filtered out.
        for place, name in enumerate(ROWS.names):
            if ROWS.field(name).type == CODED:
                table = table.set_column(place, name, table[name].combine_chunks().dictionary_encode())
        yield table.cast(ROWS)


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Return tables with the columns of ``ROWS`` as one, with one dictionary per column."""
    return pa.concat_tables([ROWS.empty_table(), *tables]).unify_dictionaries().combine_chunks()


def read_rows(source: InteractionSource) -> pa.Table:
    """Return the kept rows, in the columns of ``ROWS``, read by this process.

    Raises:
        UserError: a file or a value cannot be read, or the interactions cannot be used.
    """
    return joined([table for task in file_tasks(source, source.selection) for table in kept_tables(task)])


def _user_groups(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the group of the user of each row, the first bits of the user's hash."""
    users = column.combine_chunks().dictionary_encode()
    groups = np.array([row_id(user) >> HASH_BITS for user in users.dictionary.to_pylist()], np.int64)
    of_rows: NDArray[np.int64] = groups[users.indices.to_numpy()]
    return of_rows


def _fitting(counts: NDArray[np.int64], limit: int) -> tuple[NDArray[np.bool_] | None, int]:
    """Return the groups that fit into ``limit`` rows, None if all fit, and the number of their rows.

    Groups are taken in order. A group that does not fit is skipped, so that one user with very many rows does not end
    the sample.
    """
    if counts.sum() <= limit:
        return None, int(counts.sum())
    kept, taken = 0, np.zeros(len(counts), bool)
    for group, rows in enumerate(counts.tolist()):
        if kept + rows <= limit:
            taken[group], kept = True, kept + rows
    return taken, kept

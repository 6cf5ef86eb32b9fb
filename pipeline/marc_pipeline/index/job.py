"""The index job: the vectors to index, the chosen index type, and the draft index before it is tuned."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

from marc_pipeline.config import IndexSettings
from marc_pipeline.index.choice import IndexChoice
from marc_pipeline.index.recall import RecallQueries, query_counts, sample_row_ids
from marc_pipeline.index.search import IndexSearch
from marc_pipeline.index.shards import shard_files
from marc_pipeline.index.vectors import Ids, Matrix, TableVectors
from marc_pipeline.resources import TaskResources, machine
from marc_pipeline.storage import Storage
from marc_schemas.files import PublishedFile
from marc_schemas.moments import Moments
from marc_schemas.release import IndexBuild

T = TypeVar("T")
R = TypeVar("R")


class TaskRunner(Protocol):
    """Runs tasks, either one after the other in this process or on a cluster."""

    def __call__(
        self, function: Callable[[T, TaskResources], R], tasks: Sequence[T], *, weight: Callable[[T], int]
    ) -> list[R]:
        """Return the results of all tasks, in any order; ``weight`` gives the number of vectors of a task."""


def run_in_process(
    function: Callable[[T, TaskResources], R],
    tasks: Sequence[T],
    *,
    weight: Callable[[T], int],
) -> list[R]:
    """Run every task in this process, each with all cores."""
    return [function(task, machine()) for task in tasks]


@dataclass(frozen=True)
class IndexJob:
    """Inputs of the index stage: vectors, index type and storage; see :func:`marc_pipeline.index.make.make_index`."""

    source: TableVectors
    choice: IndexChoice
    bundle: str
    buckets: int
    mantissa_bits: int
    moments: Moments
    index_uri: str
    work_uri: str
    plan_id: str
    settings: IndexSettings
    run: TaskRunner

    @property
    def storage(self) -> Storage:
        """Access to every uri."""
        return self.source.storage

    @property
    def items(self) -> int:
        """Number of vectors to index."""
        return self.source.items

    def shard(self, number: int, of: int) -> TableVectors:
        """The vectors of one of several shards."""
        return self.source.part(shard_files(self.source.files, number, buckets=self.buckets, of=of))

    def query_ids(self) -> tuple[Ids, int]:
        """Row ids of the recall queries, and how many of them, from the first on, are held out."""
        held, total = query_counts(self.items, self.settings.recall_queries)
        return sample_row_ids(self.source, total, self.settings.seed), held


@dataclass(frozen=True)
class DraftIndex:
    """An index before its search is tuned.

    Attributes:
        indexes: the shards.
        files: the stored file of each shard; None for a shard that is only in memory.
        build: facts about the last full build.
        queries: recall queries with their exact neighbours.
        parts: intermediate files, to delete once the index is stored.
    """

    indexes: tuple[Any, ...]
    files: tuple[PublishedFile | None, ...]
    build: IndexBuild
    queries: RecallQueries
    parts: tuple[PublishedFile, ...] = ()

    def search(self, vectors: Matrix, k: int) -> tuple[Matrix, Ids]:
        """Scores and row ids [q, k]."""
        return self._search.nearest(vectors, k)

    @cached_property
    def _search(self) -> IndexSearch:
        tombstones = self.build.tombstones
        alive = sum(index.ntotal for index in self.indexes) - tombstones
        return IndexSearch(self.indexes, items=alive, tombstones=tombstones)

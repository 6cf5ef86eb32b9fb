"""Tasks of the index stage: build one shard from its buckets' files, or patch the shard of an earlier release."""

import hashlib
import io
import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import faiss
import numpy as np

from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.index.faiss_index import faiss_message, fill, mergeable, new_index, patch
from marc_pipeline.index.files import load_index, map_index
from marc_pipeline.index.recall import ExactNeighbours, exact_neighbours, merge_neighbours, no_neighbours
from marc_pipeline.index.vectors import Ids, Matrix, TableVectors, VectorChanges, changed_vectors
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import check_file, describe_file
from marc_schemas.feature_table import bucket_number
from marc_schemas.files import PublishedFile
from marc_schemas.identity import files_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueryBatch:
    """Recall queries: row ids [q], vectors [q, d], and the number of neighbours to keep per query.

    Every task compares these queries with the vectors that it reads.
    """

    ids: Ids
    vectors: Matrix
    depth: int

    def no_neighbours(self) -> ExactNeighbours:
        """The empty result, before the first comparison."""
        return no_neighbours(len(self.ids), self.depth)

    def digest(self) -> str:
        """SHA-256 of ids, vectors and depth."""
        return hashlib.sha256(self.ids.tobytes() + self.vectors.tobytes() + str(self.depth).encode()).hexdigest()


@dataclass(frozen=True)
class IndexTask:
    """Shard ``number`` of ``of``, with today's table files of its buckets; sent to Spark's Python workers."""

    number: int
    of: int
    source: TableVectors
    queries: QueryBatch
    index_uri: str
    plan_id: str

    def store(self, index: Any) -> PublishedFile:
        """Publish the shard."""
        name = f"shard-{self.number:04d}"
        return store_index(index, self.source.storage, self.index_uri, folder=self.plan_id, name=name)


@dataclass(frozen=True)
class ShardTask(IndexTask):
    """The input of :func:`build_shard`.

    Attributes:
        factory: FAISS factory string.
        trained: the trained, empty index in ``work_uri``; None if the index needs no training.
        work_uri: folder for the note about a finished shard.
    """

    factory: str
    trained: PublishedFile | None
    work_uri: str

    def digest(self) -> str:
        """SHA-256 of the inputs that determine the shard's content."""
        parts = [self.of, self.number, files_digest(self.source.files), self.factory, self.queries.digest()]
        return hashlib.sha256(json.dumps([*parts, self.trained.sha256 if self.trained else None]).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A stored shard, and the exact neighbours of the queries among its vectors."""

    number: int
    file: PublishedFile
    near: ExactNeighbours


@dataclass(frozen=True)
class PatchTask(IndexTask):
    """The input of :func:`patch_shard`.

    Attributes:
        before: table files of its buckets in the base release.
        file: the shard's file in the base release.
        root: folder that the path of ``file`` is relative to.
        allowance: greatest number of changed vectors.
    """

    before: tuple[PublishedFile, ...]
    file: PublishedFile
    root: str
    allowance: int


@dataclass(frozen=True)
class PatchedShard:
    """A patched shard, in memory or stored.

    Attributes:
        number: number of the shard.
        index: the patched index; None if it is stored.
        file: the stored file; None if the index is in memory.
        removed: row ids [r] that were removed or replaced.
        added: number of vectors that were added or replaced.
        marked: number of removed vectors that are tombstones now.
        near: the queries' exact neighbours among the added vectors.
    """

    number: int
    index: Any
    file: PublishedFile | None
    removed: Ids
    added: int
    marked: int
    near: ExactNeighbours


class Unpatchable(Exception):
    """The reason why an index is rebuilt instead of patched."""


def shard_of(bucket: int, buckets: int, shards: int) -> int:
    """The number of the shard that contains a bucket."""
    return bucket * shards // buckets


def shard_files(files: Sequence[PublishedFile], number: int, *, buckets: int, of: int) -> tuple[PublishedFile, ...]:
    """The table files of a shard's buckets."""
    return tuple(file for file in files if shard_of(bucket_number(file.path), buckets, of) == number)


def build_shard(task: ShardTask, resources: TaskResources) -> Shard:
    """Build and publish one shard; a shard from an earlier attempt is reused.

    Raises:
        UserError: FAISS cannot build it.
        CorruptFile: a file of the table differs from its checksum.
    """
    if found := _read_note(task):
        return found
    faiss.omp_set_num_threads(resources.cpus)
    storage = task.source.storage
    trained = load_index(storage, task.work_uri, task.trained) if task.trained else None
    index = trained or new_index(task.factory, task.source.dim)
    near = fill_and_compare(index, task.source, task.queries, task.factory)
    shard = Shard(task.number, task.store(index), near)
    _write_note(task, shard)
    return shard


def fill_and_compare(index: Any, source: TableVectors, queries: QueryBatch, factory: str) -> ExactNeighbours:
    """Fill a trained index, and find the queries' exact neighbours among the same vectors.

    Raises:
        UserError: FAISS cannot add vectors to it.
    """
    near, reading = queries.no_neighbours(), 0

    def batches() -> Iterator[tuple[Ids, Matrix]]:
        nonlocal near, reading
        reading, read = reading + 1, 0
        what = "vectors compared" if reading == 1 else "vectors added"
        progress = ProgressLog("index", source.items, what)
        for ids, vectors in source.batches():
            if reading == 1:
                found = exact_neighbours(queries.ids, queries.vectors, [(ids, vectors)], queries.depth)
                near = merge_neighbours(near, found)
            yield ids, vectors
            read += len(ids)
            progress.at(read)

    try:
        fill(index, batches)
    except RuntimeError as error:
        raise UserError(f"index.factory {factory!r} cannot add vectors with ids: {faiss_message(error)}") from None
    return near


def patch_shard(task: PatchTask, resources: TaskResources) -> PatchedShard | str:
    """Patch one shard and publish it; return the reason, as text, if it must be rebuilt instead."""
    faiss.omp_set_num_threads(resources.cpus)
    try:
        done = patch_loaded(task)
    except (Unpatchable, CorruptFile) as error:
        return str(error)
    if done.file is not None:
        return done
    return replace(done, index=None, file=task.store(done.index))


def patch_loaded(task: PatchTask) -> PatchedShard:
    """Patch one shard in memory. A shard whose table files did not change keeps its file.

    Raises:
        Unpatchable: too many vectors changed, or FAISS cannot patch this index type.
        CorruptFile: a file differs from its checksum.
    """
    found, changed = list[VectorChanges](), 0
    for one in changed_vectors(task.source, task.before, threads=faiss.omp_get_max_threads()):
        changed += len(one.removed) + len(one.added)
        if changed > task.allowance:
            raise Unpatchable(f"more than {task.allowance:,} vectors of shard {task.number} changed")
        found.append(one)
    removed = np.concatenate([np.empty(0, np.int64), *(one.removed for one in found)])
    added = np.concatenate([np.empty(0, np.int64), *(one.added for one in found)])
    vectors = np.concatenate([np.empty((0, task.source.dim), np.float32), *(one.vectors for one in found)])
    near = exact_neighbours(task.queries.ids, task.queries.vectors, [(added, vectors)], task.queries.depth)
    same = not (len(removed) or len(added))
    # Retention may delete an earlier release before this one is published, unless both share a table file.
    if same and {file.path for file in task.before} == {file.path for file in task.source.files}:
        return PatchedShard(task.number, None, task.file, removed, 0, 0, near)
    try:
        index = map_index(task.source.storage, task.root, task.file)
        if not (same or mergeable(index)):
            index = load_index(task.source.storage, task.root, task.file)
        marked = 0 if same else patch(index, removed, added, vectors)
    except RuntimeError as error:
        raise Unpatchable(faiss_message(error)) from None
    return PatchedShard(task.number, index, None, removed, len(added), marked, near)


def store_index(index: Any, storage: Storage, uri: str, *, folder: str, name: str) -> PublishedFile:
    """Publish an index in a file named by its SHA-256; the returned path is relative to ``uri``."""
    with storage.staged(join(uri, folder, name)) as staged:
        faiss.write_index(index, str(staged))
        described = describe_file(staged, path="", rows=index.ntotal)
        path = f"{folder}/{name}-{described.sha256[:16]}.faiss"
        storage.publish(staged, join(uri, path))
    return described.model_copy(update={"path": path})


def compare_files(task: tuple[TableVectors, QueryBatch], resources: TaskResources) -> ExactNeighbours:
    """The exact neighbours of queries among the vectors of some table files."""
    source, queries = task
    faiss.omp_set_num_threads(resources.cpus)
    return exact_neighbours(queries.ids, queries.vectors, source.batches(), queries.depth)


def _note_uri(task: ShardTask) -> str:
    return join(task.work_uri, f"shard-{task.number:04d}-of-{task.of:04d}.npz")


def _write_note(task: ShardTask, shard: Shard) -> None:
    note, near = io.BytesIO(), shard.near
    facts = json.dumps({"digest": task.digest(), "file": shard.file.model_dump()})
    np.savez(note, facts=np.array(facts), ids=near.ids, scores=near.scores, floor=near.floor)
    task.source.storage.write(_note_uri(task), note.getvalue())


def _read_note(task: ShardTask) -> Shard | None:
    """The shard of an earlier attempt, if it has the same inputs and its file is intact."""
    storage = task.source.storage
    try:
        with np.load(io.BytesIO(storage.read(_note_uri(task))), allow_pickle=False) as note:
            facts = json.loads(str(note["facts"]))
            near = ExactNeighbours(note["ids"], note["scores"], note["floor"])
        file = PublishedFile.model_validate(facts["file"])
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if facts["digest"] != task.digest() or check_file(storage, task.index_uri, file):
        return None
    log.info("index: shard %d of %d exists already", task.number + 1, task.of)
    return Shard(task.number, file, near)

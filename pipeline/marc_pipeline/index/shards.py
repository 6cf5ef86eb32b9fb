"""What one task does of an index: fill one shard from its buckets' files, or patch the one that was there."""

import hashlib
import io
import json
import logging
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.index.faiss_index import fill, mergeable, new_index, patch, reason
from marc_pipeline.index.files import loaded, mapped
from marc_pipeline.index.recall import Neighbours, combined, nearest, nothing_near
from marc_pipeline.index.vectors import Changes, Source, changes
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import check_file, describe_file
from marc_schemas.feature_table import bucket_number
from marc_schemas.files import PublishedFile
from marc_schemas.identity import files_digest

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]

PROGRESS_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """The queries of the recall, which every task compares with the vectors that it reads anyway.

    Attributes:
        ids: row ids [q].
        vectors: theirs [q, d].
        depth: neighbours to keep of each.
    """

    ids: Ids
    vectors: Matrix
    depth: int

    def nothing(self) -> Neighbours:
        """Before anything was compared."""
        return nothing_near(len(self.ids), self.depth)

    def digest(self) -> str:
        """Names ids, vectors and depth."""
        return hashlib.sha256(self.ids.tobytes() + self.vectors.tobytes() + str(self.depth).encode()).hexdigest()


@dataclass(frozen=True)
class ShardTask:
    """Everything that the maker of one shard needs; travels to Spark's Python workers.

    Attributes:
        number, of: which shard, of how many.
        source: its buckets' files.
        factory: FAISS factory string.
        trained: the trained, empty index in ``work_uri``; None for one that learns nothing.
        asked: the queries.
        index_uri: folder of all indexes.
        plan_id: the plan that it is made for.
        work_uri: where the task says that it is done.
    """

    number: int
    of: int
    source: Source
    factory: str
    trained: PublishedFile | None
    asked: Asked
    index_uri: str
    plan_id: str
    work_uri: str

    def digest(self) -> str:
        """Names what the shard is made of."""
        parts = [self.of, self.number, files_digest(self.source.files), self.factory, self.asked.digest()]
        return hashlib.sha256(json.dumps([*parts, self.trained.sha256 if self.trained else None]).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A shard that is in place, and what the queries' neighbours are among its vectors."""

    number: int
    file: PublishedFile
    near: Neighbours


@dataclass(frozen=True)
class PatchTask:
    """Everything that the patcher of one shard needs.

    Attributes:
        number, of: which shard, of how many.
        source: its buckets' files as they are now.
        before: its buckets' files in the release that is patched.
        file: the shard in that release.
        root: folder that the path of ``file`` is relative to.
        asked: the queries.
        allowance: vectors that may have changed at most.
        index_uri, plan_id: where the patched shard goes.
    """

    number: int
    of: int
    source: Source
    before: tuple[PublishedFile, ...]
    file: PublishedFile
    root: str
    asked: Asked
    allowance: int
    index_uri: str
    plan_id: str


@dataclass(frozen=True)
class Patched:
    """What became of a shard.

    Attributes:
        number: which one.
        index: patched, where it was not stored.
        file: where it was stored, or stayed as it was.
        removed: row ids [r] that left it or changed.
        added: how many vectors came or changed.
        marked: how many of the removed hold their place still.
        near: the queries' neighbours among the vectors that came.
    """

    number: int
    index: Any
    file: PublishedFile | None
    removed: Ids
    added: int
    marked: int
    near: Neighbours


class Unpatchable(Exception):
    """Why an index is not patched."""


def shard_of(bucket: int, buckets: int, shards: int) -> int:
    """The shard that holds a bucket."""
    return bucket * shards // buckets


def files_of(files: Sequence[PublishedFile], number: int, *, buckets: int, of: int) -> tuple[PublishedFile, ...]:
    """The files whose buckets a shard holds."""
    return tuple(file for file in files if shard_of(bucket_number(file.path), buckets, of) == number)


def make_shard(task: ShardTask, resources: TaskResources) -> Shard:
    """Fill one shard and publish it, unless an earlier attempt did.

    Raises:
        UserError: FAISS cannot make it.
        CorruptFile: a file of the table differs from its checksum.
    """
    if found := _done(task):
        return found
    faiss.omp_set_num_threads(resources.cpus)
    storage = task.source.storage
    trained = loaded(storage, task.work_uri, task.trained) if task.trained else None
    index = trained or new_index(task.factory, task.source.dim)
    near = fill_and_compare(index, task.source, task.asked, task.factory)
    file = store(index, storage, task.index_uri, folder=task.plan_id, name=f"shard-{task.number:04d}")
    shard = Shard(task.number, file, near)
    _say_done(task, shard)
    return shard


def fill_and_compare(index: Any, source: Source, asked: Asked, factory: str) -> Neighbours:
    """Fill a trained index, and find the queries' exact neighbours in the same vectors.

    Raises:
        UserError: FAISS cannot add vectors to it.
    """
    near, reading, told = asked.nothing(), 0, time.monotonic()

    def batches() -> Iterator[tuple[Ids, Matrix]]:
        nonlocal near, reading, told
        reading, read = reading + 1, 0
        for ids, vectors in source.batches():
            if reading == 1:
                near = combined(near, nearest(asked.ids, asked.vectors, [(ids, vectors)], asked.depth))
            yield ids, vectors
            read += len(ids)
            if time.monotonic() - told > PROGRESS_SECONDS:
                told = time.monotonic()
                doing = "compared" if reading == 1 else "added"
                log.info("index: %s of %s vectors %s", f"{read:,}", f"{source.items:,}", doing)

    try:
        fill(index, batches)
    except RuntimeError as error:
        raise UserError(f"index.factory {factory!r} takes no vectors with ids: {reason(error)}") from None
    return near


def patch_shard(task: PatchTask, resources: TaskResources) -> Patched | str:
    """Patch one shard and publish it; or say why it is not patched, which is no failure of the task."""
    faiss.omp_set_num_threads(resources.cpus)
    try:
        done = patched(task)
    except (Unpatchable, CorruptFile) as error:
        return str(error)
    if done.file is not None:
        return done
    file = store(done.index, task.source.storage, task.index_uri, folder=task.plan_id, name=f"shard-{task.number:04d}")
    return Patched(task.number, None, file, done.removed, done.added, done.marked, done.near)


def patched(task: PatchTask) -> Patched:
    """Patch one shard; one whose table files are the release's is the release's too.

    Raises:
        Unpatchable: too much changed, or FAISS cannot do it.
        CorruptFile: a file differs from its checksum.
    """
    found, changed = list[Changes](), 0
    for one in changes(task.source, task.before, threads=faiss.omp_get_max_threads()):
        changed += len(one.removed) + len(one.added)
        if changed > task.allowance:
            raise Unpatchable(f"more than {task.allowance:,} more vectors changed")
        found.append(one)
    removed, added = _all(found, "removed", np.int64), _all(found, "added", np.int64)
    vectors = np.concatenate([np.empty((0, task.source.dim), np.float32), *(one.vectors for one in found)])
    near = nearest(task.asked.ids, task.asked.vectors, [(added, vectors)], task.asked.depth)
    same = not (len(removed) or len(added))
    # Files of a release that shares none of the table's files may be given up before this one is published.
    if same and {file.path for file in task.before} == {file.path for file in task.source.files}:
        return Patched(task.number, None, task.file, removed, 0, 0, near)
    try:
        index = mapped(task.source.storage, task.root, task.file)
        if not (same or mergeable(index)):
            index = loaded(task.source.storage, task.root, task.file)
        marked = 0 if same else patch(index, removed, added, vectors)
    except RuntimeError as error:
        raise Unpatchable(reason(error)) from None
    return Patched(task.number, index, None, removed, len(added), marked, near)


def store(index: Any, storage: Storage, uri: str, *, folder: str, name: str) -> PublishedFile:
    """Publish an index under its content's hash; its path is relative to ``uri``."""
    with storage.staged(join(uri, folder, name)) as staged:
        faiss.write_index(index, str(staged))
        described = describe_file(staged, path="", rows=index.ntotal)
        path = f"{folder}/{name}-{described.sha256[:16]}.faiss"
        storage.publish(staged, join(uri, path))
    return described.model_copy(update={"path": path})


def compare(task: tuple[Source, Asked], resources: TaskResources) -> Neighbours:
    """The exact neighbours of queries in some files."""
    source, asked = task
    faiss.omp_set_num_threads(resources.cpus)
    return nearest(asked.ids, asked.vectors, source.batches(), asked.depth)


def _all(found: Sequence[Changes], name: str, kind: type[np.int64]) -> Ids:
    return np.concatenate([np.empty(0, kind), *(getattr(one, name) for one in found)])


def _note_uri(task: ShardTask) -> str:
    return join(task.work_uri, f"shard-{task.number:04d}-of-{task.of:04d}.npz")


def _say_done(task: ShardTask, shard: Shard) -> None:
    note, near = io.BytesIO(), shard.near
    facts = json.dumps({"digest": task.digest(), "file": shard.file.model_dump()})
    np.savez(note, facts=np.array(facts), ids=near.ids, scores=near.scores, floor=near.floor)
    task.source.storage.write(_note_uri(task), note.getvalue())


def _done(task: ShardTask) -> Shard | None:
    """What an earlier attempt left, if every byte of it is in place."""
    storage = task.source.storage
    try:
        with np.load(io.BytesIO(storage.read(_note_uri(task))), allow_pickle=False) as note:
            facts = json.loads(str(note["facts"]))
            near = Neighbours(note["ids"], note["scores"], note["floor"])
        file = PublishedFile.model_validate(facts["file"])
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if facts["digest"] != task.digest() or check_file(storage, task.index_uri, file):
        return None
    log.info("index: shard %d of %d stands already", task.number + 1, task.of)
    return Shard(task.number, file, near)

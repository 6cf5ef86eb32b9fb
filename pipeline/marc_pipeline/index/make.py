"""Making the index of a day: the release's before, patched while it stays healthy, or a new one."""

import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, Protocol, TypeVar

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import CorruptFile, GateRefused, UserError
from marc_pipeline.index.choice import MEBIBYTE, WORKING_BYTES, Choice, choose
from marc_pipeline.index.faiss_index import merge, mergeable, new_index, reason
from marc_pipeline.index.files import loaded, mapped
from marc_pipeline.index.recall import (
    Neighbours,
    Queries,
    Recall,
    bounded,
    combined,
    depth_of,
    draw,
    from_bytes,
    held_out,
    known,
    nothing_near,
    recalled,
    sampled,
    to_bytes,
    without,
)  # fmt: skip
from marc_pipeline.index.search import IndexSearch, graph_of, lists_of, set_width, width_of, widths
from marc_pipeline.index.shards import (
    Asked,
    Patched,
    PatchTask,
    Shard,
    ShardTask,
    Unpatchable,
    compare,
    files_of,
    fill_and_compare,
    make_shard,
    patch_shard,
    patched,
    store,
)  # fmt: skip
from marc_pipeline.index.vectors import Source
from marc_pipeline.resources import TaskResources, machine
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import check_file, describe_file
from marc_pipeline.work_area import read_contract
from marc_schemas.feature_table import bucket_number
from marc_schemas.files import PublishedFile
from marc_schemas.identity import files_digest
from marc_schemas.moments import Moments
from marc_schemas.receipt import IndexReceipt, TrainedIndex
from marc_schemas.release import IndexBuild, IndexFacts, IndexFigures, Release

# A patched index that must search this many times more widely than when it was built has outlived its lists.
WIDENED = 2
# Steps in which a search is widened, once doubling has found how far.
FINE = 8
TIMED_ALONE = 100
TRAINED = "trained"
TRIES = 3

T = TypeVar("T")
R = TypeVar("R")
Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]

log = logging.getLogger(__name__)


class Run(Protocol):
    """How tasks are run: one after the other here, or all over a cluster."""

    def __call__(
        self, function: Callable[[T, TaskResources], R], tasks: Sequence[T], *, weight: Callable[[T], int]
    ) -> list[R]:
        """What the function makes of every task, in any order; ``weight`` is how many vectors a task is for."""


def in_turn(
    function: Callable[[T, TaskResources], R],
    tasks: Sequence[T],
    *,
    weight: Callable[[T], int],
) -> list[R]:
    """Every task in this process, with all of its cores."""
    return [function(task, machine()) for task in tasks]


def satisfies(built: IndexReceipt, settings: IndexSettings, *, dim: int, storage: Storage) -> bool:
    """Whether an earlier index has the type, k and recall that the settings ask for, and all its files are whole."""
    index = built.index
    return (
        index.factory in {choice.factory for choice in choose(index.items, dim, settings)}
        and index.k == settings.k
        and index.recall >= settings.target_recall
        and not any(check_file(storage, index.uri, file) for file in index.all_files)
    )


def make_index(
    files: Sequence[PublishedFile],
    *,
    base: Release | None,
    storage: Storage,
    table_uri: str,
    index_uri: str,
    work_uri: str,
    plan_id: str,
    bundle: str,
    buckets: int,
    moments: Moments,
    dim: int,
    mantissa_bits: int,
    settings: IndexSettings,
    run: Run = in_turn,
) -> IndexReceipt:
    """Make, tune, measure and store the index of one day: the base's, patched while it stays healthy, or a new one.

    Args:
        files: the day's table files, all of them.
        base: release whose index may be patched: its vectors that left are removed, new ones added.
        storage: access to every uri.
        table_uri: root of the files.
        index_uri: folder of all indexes.
        work_uri: folder where shards that are done say so, for a retry.
        plan_id: the plan that it is for.
        bundle: that made the vectors.
        buckets: of the table.
        moments: of the vectors.
        dim: length of the vectors.
        mantissa_bits: that they were rounded to.
        settings: factory, k, the recall to reach, and how far an index may be patched.
        run: how the shards of a large index are shared out.

    Raises:
        UserError: FAISS does not understand the factory string, cannot train it on so few vectors, or no index fits
            into the memory.
        GateRefused: the measured recall of a new index stays below the target.
    """
    started = time.monotonic()
    source = Source(storage, table_uri, tuple(files), dim)
    choices = choose(source.items, dim, settings)
    jobs = [
        _Job(source, choice, bundle, buckets, mantissa_bits, moments, index_uri, work_uri, plan_id, settings, run)
        for choice in choices
    ]
    job, made, found = _made_for(jobs, base)
    indexed, queries_file = _stored(made, found, job), _store_queries(made.queries, job)
    build = made.build if made.build.changed else made.build.model_copy(update={"nprobe": found.nprobe})
    storage.remove(join(work_uri, part.path) for part in made.parts)
    facts = IndexFacts(
        uri=index_uri,
        files=indexed,
        queries_file=queries_file,
        factory=job.choice.factory,
        nprobe=found.nprobe,
        ef_search=found.ef_search,
        faiss=faiss.__version__,
        build=build,
        k=settings.k,
        recall=found.recall.mean,
        recall_queries=found.recall.queries,
        figures=IndexFigures(
            memory_bytes=job.choice.memory_bytes,
            recall_low=found.recall.low,
            recall_high=found.recall.high,
            latency_ms=found.latency_ms,
            queries_per_second=found.queries_per_second,
        ),
    )
    seconds = time.monotonic() - started
    return IndexReceipt(plan_id=plan_id, files_digest=files_digest(files), index=facts, seconds=seconds)


@dataclass(frozen=True)
class _Job:
    """What the index must be, and of what."""

    source: Source
    choice: Choice
    bundle: str
    buckets: int
    mantissa_bits: int
    moments: Moments
    index_uri: str
    work_uri: str
    plan_id: str
    settings: IndexSettings
    run: Run

    @property
    def storage(self) -> Storage:
        """Access to every uri."""
        return self.source.storage

    @property
    def items(self) -> int:
        """Vectors in the index."""
        return self.source.items

    def recalled(self, made: "_Made", *, held: bool) -> NDArray[np.float64]:
        """Recall of every query that is held out, or of those that are not."""
        return recalled(made.queries, made.search, self.source.take, self.settings.k, self.items, held=held)

    def query_ids(self) -> tuple[Ids, int]:
        """Row ids of the recall's queries, and how many of them are held out."""
        held, asked = held_out(self.items, self.settings.recall_queries)
        return sampled(self.source, asked, self.settings.seed), held


def _made_for(jobs: Sequence["_Job"], base: Release | None) -> tuple["_Job", "_Made", "_Measured"]:
    """The index, patched or built; of several that would suit, the first one that reaches the recall."""
    job = next((job for job in jobs if base and job.choice.factory == base.index.factory), jobs[0])
    try:
        made = _patched(job, base)
        found = _measured(made, job)
        _require_healthy(made, found, job)
    except _Unfit as why:
        log.info("index: built anew, %s", why)
    else:
        return job, made, found
    for job in jobs:
        made = _built(job)
        found = _measured(made, job)
        if found.recall.mean >= job.settings.target_recall:
            break
        log.warning("index: recall@%d of %s is only %.4f", job.settings.k, job.choice.factory, found.recall.mean)
    _require_recall(found, job)
    return job, made, found


@dataclass(frozen=True)
class _Made:
    """An index whose search is not tuned yet.

    Attributes:
        indexes: its shards.
        files: where those are; None for one that is only in memory.
        build: when it was last built from scratch.
        queries: with their exact neighbours.
        parts: files that went into it, and are not needed once it is stored.
    """

    indexes: tuple[Any, ...]
    files: tuple[PublishedFile | None, ...]
    build: IndexBuild
    queries: Queries
    parts: tuple[PublishedFile, ...] = ()

    def search(self, vectors: Matrix, k: int) -> tuple[Matrix, Ids]:
        """Scores and row ids [q, k]."""
        return self._together.nearest(vectors, k)

    @cached_property
    def _together(self) -> IndexSearch:
        dead = self.build.tombstones
        return IndexSearch(self.indexes, items=sum(index.ntotal for index in self.indexes) - dead, tombstones=dead)


@dataclass(frozen=True)
class _Measured:
    """What a tuned index does."""

    recall: Recall
    nprobe: int | None
    ef_search: int | None
    latency_ms: float
    queries_per_second: float


class _Unfit(Exception):
    """Why an index cannot be patched and is built anew."""


# Patching


def _patched(job: _Job, base: Release | None) -> _Made:
    """The base's index without the vectors that left, and with those that came.

    Raises:
        _Unfit: it should rather be built anew.
    """
    base = _patchable(job, base)
    old = _old_queries(job, base)
    ids, held = job.query_ids()
    carried = np.flatnonzero(np.isin(old.ids, ids))
    of = len(base.index.files)
    tasks = [
        PatchTask(
            number=number,
            of=of,
            source=job.source.part(files_of(job.source.files, number, buckets=job.buckets, of=of)),
            before=files_of(base.table.files, number, buckets=job.buckets, of=of),
            file=file,
            root=base.index.uri,
            asked=Asked(old.ids[carried], old.vectors[carried], depth_of(job.settings.k)),
            allowance=int(job.settings.max_changed * base.index.build.items) - base.index.build.changed,
            index_uri=job.index_uri,
            plan_id=job.plan_id,
        )
        for number, file in enumerate(base.index.files)
    ]
    found = _patched_shards(job, tasks)
    build = _build_after(job, base, found)
    try:
        indexes = [mapped(job.storage, job.index_uri, one.file) if one.file else one.index for one in found]
    except CorruptFile as error:
        raise _Unfit(str(error)) from None
    if base.index.width:
        for index in indexes:
            set_width(index, base.index.width)
    total = sum(index.ntotal for index in indexes) - build.tombstones
    if total != job.items:
        raise _Unfit(f"patched, it holds {total:,} vectors, the table has {job.items:,}")
    return _Made(tuple(indexes), tuple(one.file for one in found), build, _queries_after(job, old, ids, held, found))


def _patched_shards(job: _Job, tasks: Sequence[PatchTask]) -> list[Patched]:
    """The shards in their order; one alone is not stored yet."""
    if len(tasks) == 1:
        try:
            return [patched(tasks[0])]
        except (Unpatchable, CorruptFile) as error:
            raise _Unfit(str(error)) from None
    found = []
    for one in job.run(patch_shard, tasks, weight=lambda task: task.source.items):
        if isinstance(one, str):
            raise _Unfit(one)
        found.append(one)
    return sorted(found, key=lambda one: one.number)


def _patchable(job: _Job, base: Release | None) -> Release:
    if base is None:
        raise _Unfit("there is no release to start from")
    if (base.bundle.version, base.table.dim, base.table.buckets) != (job.bundle, job.source.dim, job.buckets):
        raise _Unfit(f"release {base.release_id} has another bundle, or other buckets")
    if base.table.mantissa_bits != job.mantissa_bits:
        raise _Unfit(
            f"release {base.release_id} stores {base.table.mantissa_bits} mantissa bits, not {job.mantissa_bits}"
        )
    if base.index.factory != job.choice.factory:
        raise _Unfit(f"release {base.release_id} has {base.index.factory}, {job.choice.factory} is wanted")
    if base.index.uri != job.index_uri:
        raise _Unfit(f"release {base.release_id} has its index in {base.index.uri}")
    drift = math.dist(job.moments.mean, base.index.build.mean) / math.sqrt(job.moments.variance or 1.0)
    if drift > job.settings.max_drift:
        raise _Unfit(f"the mean vector moved by {drift:.3f} standard deviations since it was built")
    cap, memory = job.settings.memory_mib, WORKING_BYTES + 2 * max(file.bytes for file in base.index.files)
    if cap is not None and memory > cap * MEBIBYTE:
        raise _Unfit(f"to patch it takes {memory / MEBIBYTE:,.0f} MiB, index.memory_mib allows {cap:g}")
    return base


def _build_after(job: _Job, base: Release, found: Sequence[Patched]) -> IndexBuild:
    removed, added = sum(len(one.removed) for one in found), sum(one.added for one in found)
    build = base.index.build
    changed = build.changed + removed + added
    if changed > job.settings.max_changed * build.items:
        raise _Unfit(f"{changed:,} vectors changed since it was built of {build.items:,}")
    log.info("index: patched, %s vectors removed, %s added", f"{removed:,}", f"{added:,}")
    marked = build.tombstones + sum(one.marked for one in found)
    return build.model_copy(update={"changed": changed, "tombstones": marked})


def _old_queries(job: _Job, base: Release) -> Queries:
    """Those of the base; none of them where they cannot be read, or are kept to another depth."""
    dim, depth = job.source.dim, depth_of(job.settings.k)
    none = Queries(np.empty(0, np.int64), np.empty((0, dim), np.float32), 0, nothing_near(0, depth))
    try:
        data = job.storage.read(join(base.index.uri, base.index.queries_file.path))
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != base.index.queries_file.sha256:
        log.warning("index: the recall's queries of release %s are damaged, and drawn anew", base.release_id)
        return none
    old = from_bytes(data)
    return old if old.near.ids.shape[1] == depth else none


def _queries_after(job: _Job, old: Queries, ids: Ids, held: int, found: Sequence[Patched]) -> Queries:
    """The day's queries: what was known of those that stayed brought up to date, the others compared with all."""
    removed = np.concatenate([one.removed for one in found])
    carried = np.flatnonzero(np.isin(old.ids, ids))
    near = Neighbours(old.near.ids[carried], old.near.scores[carried], old.near.floor[carried])
    near = reduce(combined, (one.near for one in found), without(near, removed))
    certain = known(near, job.settings.k, job.items) & ~np.isin(old.ids[carried], removed)
    stays = carried[certain]
    place = {row: number for number, row in enumerate(ids.tolist())}
    where = np.array([place[row] for row in old.ids[stays].tolist()], np.int64)
    fresh = np.setdiff1d(np.arange(len(ids)), where)
    vectors = np.empty((len(ids), job.source.dim), np.float32)
    vectors[where], vectors[fresh] = old.vectors[stays], job.source.take(ids[fresh])
    exact = _compared(job, Asked(ids[fresh], vectors[fresh], depth_of(job.settings.k)), len(found))
    everything = nothing_near(len(ids), depth_of(job.settings.k))
    for rows, some in ((where, _rows(near, certain)), (fresh, exact)):
        everything.ids[rows], everything.scores[rows], everything.floor[rows] = some.ids, some.scores, some.floor
    return Queries(ids, vectors, held, everything)


def _rows(near: Neighbours, chosen: NDArray[np.bool_]) -> Neighbours:
    return Neighbours(near.ids[chosen], near.scores[chosen], near.floor[chosen])


def _compared(job: _Job, asked: Asked, of: int) -> Neighbours:
    """Exact neighbours among all vectors."""
    if not len(asked.ids):
        return asked.nothing()
    parts = [job.source.part(files_of(job.source.files, n, buckets=job.buckets, of=of)) for n in range(of)]
    tasks = [(part, asked) for part in parts]
    found = [compare(tasks[0], machine())] if of == 1 else job.run(compare, tasks, weight=lambda task: task[0].items)
    return reduce(combined, found, asked.nothing())


def _require_healthy(made: _Made, found: _Measured, job: _Job) -> None:
    settings, before = job.settings, made.build.nprobe
    if found.recall.mean < settings.target_recall:
        raise _Unfit(f"patched, its recall@{settings.k} is {found.recall.mean:.4f}")
    if found.nprobe and before and found.nprobe > WIDENED * before:
        raise _Unfit(f"patched, it needs {found.nprobe} probes for the recall, {before} when it was built")


# Building


def _built(job: _Job) -> _Made:
    ids, held = job.query_ids()
    asked = Asked(ids, job.source.take(ids), depth_of(job.settings.k))
    build = IndexBuild(items=job.items, nprobe=None, mean=job.moments.mean)
    shards = min(job.buckets, math.ceil(job.choice.index_bytes / (job.settings.shard_mib * MEBIBYTE)))
    log.info(
        "index: %s of %s vectors, %s MiB predicted, in %d shards",
        job.choice.factory, f"{job.items:,}", f"{job.choice.memory_bytes / MEBIBYTE:,.0f}", shards,
    )  # fmt: skip
    if shards == 1:
        index = _trained(job, ids)
        near = fill_and_compare(index, job.source, asked, job.choice.factory)
        return _Made((index,), (None,), build, Queries(ids, asked.vectors, held, near))
    trained = _kept_trained(job, ids) if job.choice.training else None
    empty = loaded(job.storage, job.work_uri, trained) if trained else None
    merged = job.choice.index_bytes <= job.settings.merge_mib * MEBIBYTE and mergeable(empty)
    # Parts of what becomes one file are nobody's but this plan's.
    root = job.work_uri if merged else job.index_uri
    tasks = [
        ShardTask(
            number=number,
            of=shards,
            source=job.source.part(files_of(job.source.files, number, buckets=job.buckets, of=shards)),
            factory=job.choice.factory,
            trained=trained,
            asked=asked,
            index_uri=root,
            plan_id=job.plan_id,
            work_uri=job.work_uri,
        )
        for number in range(shards)
    ]
    found, indexes = _shards(job, tasks, root)
    files = tuple(shard.file for shard in found)
    queries = Queries(ids, asked.vectors, held, reduce(combined, (shard.near for shard in found)))
    if not merged:
        return _Made(indexes, files, build, queries)
    merge(empty, indexes)
    return _Made((empty,), (None,), build, queries, parts=files)


def _shards(job: _Job, tasks: Sequence[ShardTask], root: str) -> tuple[list[Shard], tuple[Any, ...]]:
    """The shards in their order, and mapped into memory.

    Raises:
        CorruptFile: they are not there, or damaged, however often they are made.
    """
    for tries in range(TRIES):
        found = sorted(job.run(make_shard, tasks, weight=lambda task: task.source.items), key=lambda one: one.number)
        try:
            return found, tuple(mapped(job.storage, root, shard.file) for shard in found)
        except CorruptFile:
            # A rival with the same plan may have merged them meanwhile, and tidied up.
            if tries == TRIES - 1:
                raise
    raise AssertionError("unreachable")


def _trained(job: _Job, excluded: Ids) -> Any:
    """An empty index that has learnt from a sample without the queries.

    Raises:
        UserError: FAISS cannot train it on so few vectors.
    """
    index = new_index(job.choice.factory, job.source.dim)
    if not job.choice.training:
        return index
    sample = _training_sample(job, excluded)
    log.info("index: training %s on %s vectors", job.choice.factory, f"{len(sample):,}")
    try:
        index.train(sample)
    except RuntimeError as error:
        raise UserError(
            f"index.factory {job.choice.factory!r} cannot be trained on {job.items:,} vectors: {reason(error)}"
        ) from None
    return index


def _training_sample(job: _Job, excluded: Ids) -> Matrix:
    """Vectors [n, d] of whole buckets, thinned out: a bucket is a random part of the items already."""
    wanted, seed = job.choice.training, job.settings.seed + 1
    if job.items < wanted + len(excluded):
        excluded = excluded[:0]
    order = draw(np.array([bucket_number(file.path) for file in job.source.files], np.int64), seed).argsort()
    chosen, rows = [], 0
    for number in order.tolist():
        if rows < wanted + len(excluded):
            chosen.append(job.source.files[number])
            rows += chosen[-1].rows
    sample, filled = np.empty((wanted, job.source.dim), np.float32), 0
    # A little more than is wanted: how many of a bucket's rows are drawn is chance as well.
    share = 1.05 * (wanted + len(excluded)) / max(1, rows)
    for ids, vectors in job.source.part(chosen).batches():
        drawn = vectors[(draw(ids, seed) < share * 2.0**64) & ~np.isin(ids, excluded)][: wanted - filled]
        sample[filled : filled + len(drawn)] = drawn
        filled += len(drawn)
    return sample[:filled]


def _kept_trained(job: _Job, excluded: Ids) -> PublishedFile:
    """The trained, empty index in the work area: that of an earlier attempt, or a new one."""
    note, settings = join(job.work_uri, f"{TRAINED}.json"), job.settings
    named = f"{files_digest(job.source.files)} {job.choice.factory} {settings.seed} {settings.recall_queries}"
    digest = hashlib.sha256(named.encode()).hexdigest()
    earlier = read_contract(job.storage, note, TrainedIndex)
    if earlier and earlier.digest == digest and not check_file(job.storage, job.work_uri, earlier.file):
        return earlier.file
    file = store(_trained(job, excluded), job.storage, job.work_uri, folder=TRAINED, name="index")
    job.storage.write(note, TrainedIndex(digest=digest, file=file).model_dump_json().encode())
    return file


def _require_recall(found: _Measured, job: _Job) -> None:
    if found.recall.mean < job.settings.target_recall:
        choice, cap = job.choice, job.settings.memory_mib
        remedy = "choose another factory" if cap is None else f"index.memory_mib {cap:g} allows no better one"
        raise GateRefused(
            f"recall@{job.settings.k} of {choice.factory} is {found.recall.mean:.4f} over "
            f"{found.recall.queries:,} queries, index.target_recall asks for {job.settings.target_recall}; {remedy}. "
            "Nothing was published"
        )


# Tuning and storing


def _measured(made: _Made, job: _Job) -> _Measured:
    """Search no more widely than the recall asks for; how good, how quick that is."""
    _tune(made, job)
    shares = job.recalled(made, held=True)
    held, width = made.queries.vectors[: made.queries.held], width_of(made.indexes[0])
    alone = [_seconds(made, held[n : n + 1], job.settings.k) for n in range(min(TIMED_ALONE, len(held)))]
    lists = lists_of(made.indexes[0]) is not None
    return _Measured(
        recall=bounded(shares, job.items),
        nprobe=width if lists else None,
        ef_search=width if graph_of(made.indexes[0]) is not None else None,
        latency_ms=1000 * statistics.median(alone),
        queries_per_second=len(held) / max(_seconds(made, held, job.settings.k), 1e-9),
    )


def _seconds(made: _Made, vectors: Matrix, k: int) -> float:
    started = time.perf_counter()
    made.search(vectors, k)
    return time.perf_counter() - started


def _tune(made: _Made, job: _Job) -> None:
    """Widen the search until the queries that are not held out say enough, and then those that are."""
    span, settings, queries = widths(made.indexes[0]), job.settings, made.queries
    if span is None:
        return
    apart = queries.held < len(queries.ids)

    def reaches(width: int, *, held: bool) -> bool:
        for index in made.indexes:
            set_width(index, width)
        return float(job.recalled(made, held=held).mean()) >= settings.target_recall

    narrowest, widest = span
    # A patched index begins where it was, and is only ever widened.
    width = (width_of(made.indexes[0]) or narrowest) if made.build.changed else narrowest
    below = width if made.build.changed else 0
    while not reaches(width, held=not apart) and width < widest:
        below, width = width, min(2 * width, widest)
    while width - below > max(1, width // FINE) and width > narrowest:
        middle = (below + width) // 2
        below, width = (below, middle) if reaches(middle, held=not apart) else (middle, width)
    while not reaches(width, held=True) and width < widest:
        width = min(widest, width + max(1, width // FINE))


def _stored(made: _Made, found: _Measured, job: _Job) -> tuple[PublishedFile, ...]:
    """Files of the shards; one that is only in memory, or is one alone and must be searched otherwise, is stored."""
    width = found.nprobe or found.ef_search
    if len(made.files) > 1:
        return tuple(file for file in made.files if file is not None)
    (index,), (file,) = made.indexes, made.files
    if file is not None and width_of(mapped(job.storage, job.index_uri, file)) == width:
        return (file,)
    return (store(index, job.storage, job.index_uri, folder=job.plan_id, name="index"),)


def _store_queries(queries: Queries, job: _Job) -> PublishedFile:
    with job.storage.staged(join(job.index_uri, job.plan_id, "queries")) as staged:
        staged.write_bytes(to_bytes(queries))
        described = describe_file(staged, path="", rows=len(queries.ids))
        path = f"{job.plan_id}/queries-{described.sha256[:16]}.npz"
        job.storage.publish(staged, join(job.index_uri, path))
    return described.model_copy(update={"path": path})

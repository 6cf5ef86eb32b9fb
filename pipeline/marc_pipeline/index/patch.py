"""Patching: the previous release's index without removed vectors and with added ones, and its updated recall queries.

Patching is refused with :class:`Unpatchable`, and the index is rebuilt, when too much changed since the last build.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from marc_pipeline.index import recall, shards
from marc_pipeline.index.choice import MEBIBYTE, WORKING_BYTES
from marc_pipeline.index.files import map_index
from marc_pipeline.index.job import DraftIndex, IndexJob
from marc_pipeline.index.recall import ExactNeighbours, RecallQueries
from marc_pipeline.index.search import set_search_width
from marc_pipeline.index.shards import PatchedShard, PatchTask, QueryBatch, Unpatchable
from marc_pipeline.index.vectors import Ids
from marc_pipeline.resources import machine
from marc_pipeline.storage import join
from marc_schemas.release import IndexBuild, Release

log = logging.getLogger(__name__)


def patch_index(job: IndexJob, base: Release | None) -> DraftIndex:
    """Patch the index of the release ``base``.

    Raises:
        Unpatchable: the index must be rebuilt, for the reason that the exception gives.
        CorruptFile: a file of the index or the table differs from its checksum.
    """
    base = _patchable(job, base)
    old = _base_queries(job, base)
    ids, held = job.query_ids()
    carried = np.flatnonzero(np.isin(old.ids, ids))
    of = len(base.index.files)
    tasks = [
        PatchTask(
            number=number,
            of=of,
            source=job.shard(number, of),
            before=shards.shard_files(base.table.files, number, buckets=job.buckets, of=of),
            file=file,
            root=base.index.uri,
            queries=QueryBatch(old.ids[carried], old.vectors[carried], recall.neighbours_kept(job.settings.k)),
            allowance=int(job.settings.max_changed * base.index.build.items) - base.index.build.changed,
            index_uri=job.index_uri,
            plan_id=job.plan_id,
        )
        for number, file in enumerate(base.index.files)
    ]
    patched = _patch_shards(job, tasks)
    build = _build_facts(job, base, patched)
    indexes = tuple(map_index(job.storage, job.index_uri, one.file) if one.file else one.index for one in patched)
    for index in indexes:
        set_search_width(index, base.index.width)
    alive = sum(index.ntotal for index in indexes) - build.tombstones
    if alive != job.items:
        raise Unpatchable(f"the patched index has {alive:,} vectors, the table has {job.items:,}")
    queries = _updated_queries(job, old, ids, held, patched)
    return DraftIndex(indexes, tuple(one.file for one in patched), build, queries)


def _patchable(job: IndexJob, base: Release | None) -> Release:
    """The base release, if it fits the job and the data drifted little."""
    if base is None:
        raise Unpatchable("there is no previous release")
    if (base.bundle.version, base.table.dim, base.table.buckets) != (job.bundle, job.source.dim, job.buckets):
        raise Unpatchable(f"release {base.release_id} has another bundle or another number of buckets")
    if base.table.mantissa_bits != job.mantissa_bits:
        raise Unpatchable(
            f"release {base.release_id} stores {base.table.mantissa_bits} mantissa bits, not {job.mantissa_bits}"
        )
    if base.index.factory != job.choice.factory:
        raise Unpatchable(f"release {base.release_id} has index {base.index.factory}, not {job.choice.factory}")
    if base.index.uri != job.index_uri:
        raise Unpatchable(f"release {base.release_id} has its index in {base.index.uri}, not {job.index_uri}")
    drift = math.dist(job.moments.mean, base.index.build.mean) / math.sqrt(job.moments.variance or 1.0)
    if drift > job.settings.max_drift:
        raise Unpatchable(f"the mean vector moved by {drift:.3f} standard deviations since the index was built")
    cap, memory = job.settings.memory_mib, WORKING_BYTES + 2 * max(file.bytes for file in base.index.files)
    if cap is not None and memory > cap * MEBIBYTE:
        raise Unpatchable(f"patching needs {memory / MEBIBYTE:,.0f} MiB, index.memory_mib allows {cap:g}")
    return base


def _patch_shards(job: IndexJob, tasks: Sequence[PatchTask]) -> list[PatchedShard]:
    """The shards in their order. A single shard is patched in this process and not stored yet."""
    if len(tasks) == 1:
        return [shards.patch_loaded(tasks[0])]
    patched = []
    for result in job.run(shards.patch_shard, tasks, weight=lambda task: task.source.items):
        if isinstance(result, str):
            raise Unpatchable(result)
        patched.append(result)
    return sorted(patched, key=lambda shard: shard.number)


def _build_facts(job: IndexJob, base: Release, patched: Sequence[PatchedShard]) -> IndexBuild:
    removed, added = sum(len(shard.removed) for shard in patched), sum(shard.added for shard in patched)
    build = base.index.build
    changed = build.changed + removed + added
    if changed > job.settings.max_changed * build.items:
        raise Unpatchable(f"{changed:,} of {build.items:,} vectors changed since the index was built")
    log.info("index: patched, %s vectors removed, %s added", f"{removed:,}", f"{added:,}")
    tombstones = build.tombstones + sum(shard.marked for shard in patched)
    return build.model_copy(update={"changed": changed, "tombstones": tombstones})


def _base_queries(job: IndexJob, base: Release) -> RecallQueries:
    """The recall queries of the base; none if they cannot be read or keep another number of neighbours."""
    dim, depth = job.source.dim, recall.neighbours_kept(job.settings.k)
    none = RecallQueries(np.empty(0, np.int64), np.empty((0, dim), np.float32), 0, recall.no_neighbours(0, depth))
    try:
        data = job.storage.read(join(base.index.uri, base.index.queries_file.path))
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != base.index.queries_file.sha256:
        log.warning("index: recall queries of release %s are damaged; drawing new ones", base.release_id)
        return none
    old = recall.from_bytes(data)
    return old if old.near.ids.shape[1] == depth else none


def _updated_queries(
    job: IndexJob, old: RecallQueries, ids: Ids, held: int, patched: Sequence[PatchedShard]
) -> RecallQueries:
    """The queries of today with exact neighbours.

    Neighbours of carried queries are updated from the changes. Queries whose neighbours are uncertain, and new queries,
    are compared with all vectors.
    """
    depth = recall.neighbours_kept(job.settings.k)
    removed = np.concatenate([shard.removed for shard in patched])
    carried = np.flatnonzero(np.isin(old.ids, ids))
    near = reduce(
        recall.merge_neighbours,
        (shard.near for shard in patched),
        recall.without_items(old.near.rows(carried), removed),
    )
    unchanged = recall.certain(near, job.settings.k, job.items) & ~np.isin(old.ids[carried], removed)
    stays = carried[unchanged]
    place = {row: number for number, row in enumerate(ids.tolist())}
    where = np.array([place[row] for row in old.ids[stays].tolist()], np.int64)
    fresh = np.setdiff1d(np.arange(len(ids)), where)
    vectors = np.empty((len(ids), job.source.dim), np.float32)
    vectors[where], vectors[fresh] = old.vectors[stays], job.source.take(ids[fresh])
    exact = _compare(job, QueryBatch(ids[fresh], vectors[fresh], depth), len(patched))
    updated = recall.no_neighbours(len(ids), depth)
    for rows, some in ((where, near.rows(unchanged)), (fresh, exact)):
        updated.ids[rows], updated.scores[rows], updated.floor[rows] = some.ids, some.scores, some.floor
    return RecallQueries(ids, vectors, held, updated)


def _compare(job: IndexJob, queries: QueryBatch, of: int) -> ExactNeighbours:
    """Exact neighbours among all vectors, computed in one task per shard."""
    if not len(queries.ids):
        return queries.no_neighbours()
    tasks = [(job.shard(number, of), queries) for number in range(of)]
    if of == 1:
        return shards.compare_files(tasks[0], machine())
    found = job.run(shards.compare_files, tasks, weight=lambda task: task[0].items)
    return reduce(recall.merge_neighbours, found)

"""Making the index of a day: patch the previous release's index if the limits allow it, or build a new one."""

import logging
import time
from collections.abc import Sequence

import faiss

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import CorruptFile, GateRefused
from marc_pipeline.index.build import build_index
from marc_pipeline.index.choice import choose
from marc_pipeline.index.files import map_index
from marc_pipeline.index.job import DraftIndex, IndexJob, TaskRunner, run_in_process
from marc_pipeline.index.patch import patch_index
from marc_pipeline.index.recall import RecallQueries, to_bytes
from marc_pipeline.index.search import search_width
from marc_pipeline.index.shards import Unpatchable, store_index
from marc_pipeline.index.tune import IndexMeasurement, tune_and_measure
from marc_pipeline.index.vectors import TableVectors
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import check_file, describe_file
from marc_schemas.files import PublishedFile
from marc_schemas.identity import files_digest
from marc_schemas.moments import Moments
from marc_schemas.receipt import IndexReceipt
from marc_schemas.release import IndexFacts, IndexFigures, Release

# A patched index is rebuilt when it must probe more than twice as many lists as when it was built.
WIDENED = 2

log = logging.getLogger(__name__)


def satisfies(built: IndexReceipt, settings: IndexSettings, *, dim: int, storage: Storage) -> bool:
    """Whether an existing index has the type, k and recall that the settings require, and all its files are intact."""
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
    run: TaskRunner = run_in_process,
) -> IndexReceipt:
    """Patch or build, tune, measure and store the index of one day.

    Args:
        files: all table files of the day.
        base: release whose index may be patched.
        storage: access to every uri.
        table_uri: root of the table files.
        index_uri: folder of all indexes.
        work_uri: folder for notes about finished shards; a retry reads them.
        plan_id: the plan that the index belongs to.
        bundle: version of the bundle that made the vectors.
        buckets: number of buckets of the table.
        moments: mean and variance of the vectors.
        dim: length d of the vectors.
        mantissa_bits: precision that the vectors were rounded to.
        settings: factory, k, target recall, and limits on patching.
        run: runs the tasks of the shards.

    Raises:
        UserError: FAISS rejects the factory string, cannot train it on so few vectors, or no index fits into memory.
        GateRefused: the measured recall of a new index is below the target.
        CorruptFile: a file of the table differs from its checksum.
    """
    started = time.monotonic()
    source = TableVectors(storage, table_uri, tuple(files), dim)
    jobs = [
        IndexJob(source, choice, bundle, buckets, mantissa_bits, moments, index_uri, work_uri, plan_id, settings, run)
        for choice in choose(source.items, dim, settings)
    ]
    job, draft, measured = _patch_or_build(jobs, base)
    indexed, queries_file = _store(draft, measured, job), _store_queries(draft.queries, job)
    build = draft.build if draft.build.changed else draft.build.model_copy(update={"nprobe": measured.nprobe})
    storage.remove(join(work_uri, part.path) for part in draft.parts)
    facts = IndexFacts(
        uri=index_uri,
        files=indexed,
        queries_file=queries_file,
        factory=job.choice.factory,
        nprobe=measured.nprobe,
        ef_search=measured.ef_search,
        faiss=faiss.__version__,
        build=build,
        k=settings.k,
        recall=measured.recall.mean,
        recall_queries=measured.recall.queries,
        figures=IndexFigures(
            memory_bytes=job.choice.memory_bytes,
            recall_low=measured.recall.low,
            recall_high=measured.recall.high,
            latency_ms=measured.latency_ms,
            queries_per_second=measured.queries_per_second,
        ),
    )
    seconds = time.monotonic() - started
    return IndexReceipt(plan_id=plan_id, files_digest=files_digest(files), index=facts, seconds=seconds)


def _patch_or_build(jobs: Sequence[IndexJob], base: Release | None) -> tuple[IndexJob, DraftIndex, IndexMeasurement]:
    """The patched index if its recall is good enough; otherwise the first new index that reaches the target recall."""
    job = next((job for job in jobs if base and job.choice.factory == base.index.factory), jobs[0])
    try:
        draft = patch_index(job, base)
        measured = tune_and_measure(draft, job)
        _require_healthy(draft, measured, job)
    except (Unpatchable, CorruptFile) as why:
        log.info("index: building a new index: %s", why)
    else:
        return job, draft, measured
    for job in jobs:
        draft = build_index(job)
        measured = tune_and_measure(draft, job)
        if measured.recall.mean >= job.settings.target_recall:
            break
        log.warning("index: recall@%d of %s is only %.4f", job.settings.k, job.choice.factory, measured.recall.mean)
    _require_recall(measured, job)
    return job, draft, measured


def _require_healthy(draft: DraftIndex, measured: IndexMeasurement, job: IndexJob) -> None:
    settings, before = job.settings, draft.build.nprobe
    if measured.recall.mean < settings.target_recall:
        raise Unpatchable(f"recall@{settings.k} of the patched index is {measured.recall.mean:.4f}")
    if measured.nprobe and before and measured.nprobe > WIDENED * before:
        raise Unpatchable(f"the patched index needs {measured.nprobe} probes, the new one needed {before}")


def _require_recall(measured: IndexMeasurement, job: IndexJob) -> None:
    if measured.recall.mean < job.settings.target_recall:
        cap = job.settings.memory_mib
        remedy = "choose another index.factory" if cap is None else f"raise index.memory_mib {cap:g} for a better index"
        raise GateRefused(
            f"recall@{job.settings.k} of {job.choice.factory} is {measured.recall.mean:.4f} over "
            f"{measured.recall.queries:,} queries, index.target_recall is {job.settings.target_recall}; {remedy}. "
            "Nothing was published"
        )


def _store(draft: DraftIndex, measured: IndexMeasurement, job: IndexJob) -> tuple[PublishedFile, ...]:
    """The files of the shards. A single shard is stored if it is only in memory or its search width changed."""
    if len(draft.files) > 1:
        return tuple(file for file in draft.files if file is not None)
    (index,), (file,) = draft.indexes, draft.files
    width = measured.nprobe or measured.ef_search
    if file is not None and search_width(map_index(job.storage, job.index_uri, file)) == width:
        return (file,)
    return (store_index(index, job.storage, job.index_uri, folder=job.plan_id, name="index"),)


def _store_queries(queries: RecallQueries, job: IndexJob) -> PublishedFile:
    with job.storage.staged(join(job.index_uri, job.plan_id, "queries")) as staged:
        staged.write_bytes(to_bytes(queries))
        described = describe_file(staged, path="", rows=len(queries.ids))
        path = f"{job.plan_id}/queries-{described.sha256[:16]}.npz"
        job.storage.publish(staged, join(job.index_uri, path))
    return described.model_copy(update={"path": path})

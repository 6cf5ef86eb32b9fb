"""Building: a new index, trained on a sample and filled in this process or shard by shard."""

import hashlib
import logging
import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.index.choice import MEBIBYTE
from marc_pipeline.index.faiss_index import faiss_message, merge, mergeable, new_index
from marc_pipeline.index.files import load_index, map_index
from marc_pipeline.index.job import DraftIndex, IndexJob
from marc_pipeline.index.recall import RecallQueries, merge_neighbours, neighbours_kept, random_keys
from marc_pipeline.index.shards import QueryBatch, Shard, ShardTask, build_shard, fill_and_compare, store_index
from marc_pipeline.index.vectors import Ids, Matrix
from marc_pipeline.storage import join
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.work_area import read_contract
from marc_schemas.feature_table import bucket_number
from marc_schemas.files import PublishedFile
from marc_schemas.identity import files_digest
from marc_schemas.receipt import TrainedIndex
from marc_schemas.release import IndexBuild

TRAINED = "trained"
ATTEMPTS = 3

log = logging.getLogger(__name__)


def build_index(job: IndexJob) -> DraftIndex:
    """Build the index from scratch, in one shard or several.

    Raises:
        UserError: FAISS cannot train or fill this index.
        CorruptFile: a file of the table differs from its checksum.
    """
    ids, held = job.query_ids()
    queries = QueryBatch(ids, job.source.take(ids), neighbours_kept(job.settings.k))
    build = IndexBuild(items=job.items, nprobe=None, mean=job.moments.mean)
    shards = min(job.buckets, math.ceil(job.choice.index_bytes / (job.settings.shard_mib * MEBIBYTE)))
    log.info(
        "index: building %s, %s vectors, %s MiB predicted, %d shards",
        job.choice.factory, f"{job.items:,}", f"{job.choice.memory_bytes / MEBIBYTE:,.0f}", shards,
    )  # fmt: skip
    if shards == 1:
        index = _trained(job, ids)
        near = fill_and_compare(index, job.source, queries, job.choice.factory)
        return DraftIndex((index,), (None,), build, RecallQueries(ids, queries.vectors, held, near))
    trained = _stored_trained(job, ids) if job.choice.training else None
    empty = load_index(job.storage, job.work_uri, trained) if trained else None
    merged = job.choice.index_bytes <= job.settings.merge_mib * MEBIBYTE and mergeable(empty)
    # Shards that will be merged are intermediate files of this plan.
    root = job.work_uri if merged else job.index_uri
    tasks = [
        ShardTask(
            number=number,
            of=shards,
            source=job.shard(number, shards),
            factory=job.choice.factory,
            trained=trained,
            queries=queries,
            index_uri=root,
            plan_id=job.plan_id,
            work_uri=job.work_uri,
        )
        for number in range(shards)
    ]
    built, indexes = _shards(job, tasks, root)
    files = tuple(shard.file for shard in built)
    near = reduce(merge_neighbours, (shard.near for shard in built))
    recall_queries = RecallQueries(ids, queries.vectors, held, near)
    if not merged:
        return DraftIndex(indexes, files, build, recall_queries)
    merge(empty, indexes)
    return DraftIndex((empty,), (None,), build, recall_queries, parts=files)


def _shards(job: IndexJob, tasks: Sequence[ShardTask], root: str) -> tuple[list[Shard], tuple[Any, ...]]:
    """The shards in their order, and their memory-mapped indexes.

    Raises:
        CorruptFile: files are missing or damaged after every attempt.
    """
    for attempt in range(ATTEMPTS):
        found = sorted(job.run(build_shard, tasks, weight=lambda task: task.source.items), key=lambda one: one.number)
        try:
            return found, tuple(map_index(job.storage, root, shard.file) for shard in found)
        except CorruptFile:
            # A competing run of the same plan may have merged and deleted the shards.
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def _trained(job: IndexJob, excluded: Ids) -> Any:
    """An empty index, trained on a sample without the recall queries ``excluded``.

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
            f"index.factory {job.choice.factory!r} cannot be trained on {job.items:,} vectors: {faiss_message(error)}"
        ) from None
    return index


def _training_sample(job: IndexJob, excluded: Ids) -> Matrix:
    """A random sample of vectors [n, d], read from as few buckets as possible: a bucket is itself a random sample."""
    wanted, seed = job.choice.training, job.settings.seed + 1
    if job.items < wanted + len(excluded):
        excluded = excluded[:0]
    order = random_keys(np.array([bucket_number(file.path) for file in job.source.files], np.int64), seed).argsort()
    chosen, rows = [], 0
    for number in order.tolist():
        if rows < wanted + len(excluded):
            chosen.append(job.source.files[number])
            rows += chosen[-1].rows
    sample, filled = np.empty((wanted, job.source.dim), np.float32), 0
    # The number of drawn rows varies by chance: draw 5 % more.
    share = 1.05 * (wanted + len(excluded)) / max(1, rows)
    for ids, vectors in job.source.part(chosen).batches():
        drawn = vectors[(random_keys(ids, seed) < share * 2.0**64) & ~np.isin(ids, excluded)][: wanted - filled]
        sample[filled : filled + len(drawn)] = drawn
        filled += len(drawn)
    return sample[:filled]


def _stored_trained(job: IndexJob, excluded: Ids) -> PublishedFile:
    """The trained, empty index in the work area: from an earlier attempt if it fits, otherwise a new one."""
    note, settings = join(job.work_uri, f"{TRAINED}.json"), job.settings
    named = f"{files_digest(job.source.files)} {job.choice.factory} {settings.seed} {settings.recall_queries}"
    digest = hashlib.sha256(named.encode()).hexdigest()
    earlier = read_contract(job.storage, note, TrainedIndex)
    if earlier and earlier.digest == digest and not check_file(job.storage, job.work_uri, earlier.file):
        return earlier.file
    file = store_index(_trained(job, excluded), job.storage, job.work_uri, folder=TRAINED, name="index")
    job.storage.write(note, TrainedIndex(digest=digest, file=file).model_dump_json().encode())
    return file

"""The index stage: a FAISS index over a plan's files, with its recall measured against exact search."""

import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import feature_table
from pipeline.config import IndexSettings
from pipeline.errors import CorruptFile, GateRefused, UserError
from pipeline.integrity import check_file, describe_file
from pipeline.storage import Storage, join
from pipeline.workspace import files_digest
from schemas.feature_table import bucket_number
from schemas.files import PublishedFile
from schemas.receipt import IndexReceipt, Moments
from schemas.release import IndexBuild, Release

EXACT_BELOW = 20_000
TRAIN_POINTS_PER_LIST = 64
TRAIN_POINTS_MIN = 20_000
MAX_EF_SEARCH = 1024
TIES = 32
# A patched index that must probe this many times more lists than when it was built has outlived its lists.
WIDENED = 2
TIE_TOLERANCE = 1e-6
SEED = 1234

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]

log = logging.getLogger(__name__)


def choose_factory(items: int, settings: IndexSettings) -> str:
    """FAISS factory string: exact for small tables, inverted lists beyond, or what the settings name."""
    if settings.factory != "auto":
        return settings.factory
    if items < EXACT_BELOW:
        return "Flat"
    return f"IVF{2 ** round(math.log2(4 * math.sqrt(items)))},Flat"


def satisfies(built: IndexReceipt, settings: IndexSettings, *, storage: Storage) -> bool:
    """Whether an index that was built before is what the settings ask for now, every byte of it in place."""
    items = sum(file.rows for file in built.files)
    wanted = (choose_factory(items, settings), settings.k)
    return (
        (built.factory, built.k) == wanted
        and built.recall >= settings.target_recall
        and not any(check_file(storage, built.uri, file) for file in built.files)
    )


def make_index(
    files: Sequence[PublishedFile],
    *,
    base: Release | None,
    storage: Storage,
    table_uri: str,
    index_uri: str,
    plan_id: str,
    bundle: str,
    buckets: int,
    moments: Moments,
    dim: int,
    settings: IndexSettings,
) -> IndexReceipt:
    """Make, tune, measure and store the index of one day: the base's, patched while it stays healthy, or a new one.

    Args:
        files: the day's table files, all of them.
        base: release whose index may be patched: its vectors that left are removed, new ones added.
        storage: access to every uri.
        table_uri: root of the files.
        index_uri: folder of all indexes.
        plan_id: the plan that it is for.
        bundle: that made the vectors.
        buckets: of the table.
        moments: of the vectors.
        dim: length of the vectors.
        settings: factory, k, the recall to reach, and how far an index may be patched.

    Raises:
        UserError: FAISS does not understand the factory string, or cannot train it on so few vectors.
        GateRefused: the measured recall of a new index stays below the target.
    """
    started = time.monotonic()
    source = _Source(storage, table_uri, tuple(files), dim)
    truth = _exact(source, settings)
    factory = choose_factory(source.items, settings)
    wanted = _Wanted(factory, bundle, buckets, dim, moments, settings)
    try:
        made = _patched(base, source, truth, wanted, storage)
    except _Unfit as reason:
        log.info("index: built anew, %s", reason)
        made = _built(source, truth, wanted)
    uri = join(index_uri, plan_id)
    file = _store(made.index, storage, uri)
    return IndexReceipt(
        plan_id=plan_id,
        files_digest=files_digest(files),
        uri=uri,
        files=(file,),
        factory=factory,
        nprobe=_nprobe(made.index),
        build=made.build,
        k=settings.k,
        recall=made.recall,
        queries=len(truth.ids),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Wanted:
    """What the index must be."""

    factory: str
    bundle: str
    buckets: int
    dim: int
    moments: Moments
    settings: IndexSettings


@dataclass(frozen=True)
class _Made:
    """An index that reaches the recall, and when it was last built from scratch."""

    index: Any
    build: IndexBuild
    recall: float


@dataclass(frozen=True)
class _Source:
    """The vectors to index, file by file."""

    storage: Storage
    table_uri: str
    files: tuple[PublishedFile, ...]
    dim: int

    @property
    def items(self) -> int:
        """How many vectors there are."""
        return sum(file.rows for file in self.files)

    def chunks(self) -> Iterator[tuple[Ids, Matrix]]:
        """Row ids [n] and vectors [n, d], every byte verified."""
        for file in self.files:
            rows = feature_table.read_rows(self.storage, self.table_uri, file, columns=["row_id", "vector"])
            yield rows["row_id"].to_numpy(), self.vectors(rows)

    def vectors(self, rows: pa.Table) -> Matrix:
        """Vectors [n, d] of some rows."""
        found: Matrix = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self.dim)
        return found

    def keys(self, file: PublishedFile | None) -> pa.Table:
        """What tells one vector from another without reading it: row id, content, and when it was encoded."""
        columns = ["row_id", "content_hash", "encoded_at"]
        if file is None:
            return feature_table.empty_rows(self.dim).select(columns)
        return feature_table.read_rows(self.storage, self.table_uri, file, columns=columns)


class _Unfit(Exception):
    """Why an index cannot be patched and is built anew."""


def _patched(base: Release | None, source: _Source, truth: "_Truth", wanted: _Wanted, storage: Storage) -> _Made:
    """The base's index without the vectors that left, and with those that came.

    Raises:
        _Unfit: it should rather be built anew.
    """
    base = _patchable(base, wanted)
    settings = wanted.settings
    try:
        removed, added, vectors = _changes(base, source)
        changed = base.index_build.changed + len(removed) + len(added)
        if changed > settings.max_changed * base.index_build.items:
            raise _Unfit(f"{changed:,} vectors changed since it was built of {base.index_build.items:,}")
        index = _read(storage, base)
        if isinstance(index, faiss.IndexIDMap) and _ivf(index):
            raise _Unfit(f"a map over inverted lists ({base.index_factory}) confuses its ids once vectors leave")
        index.remove_ids(removed)
        index.add_with_ids(vectors, added)
    except CorruptFile as error:
        raise _Unfit(str(error)) from None
    except RuntimeError as error:
        raise _Unfit(f"{base.index_factory} cannot be patched: {_reason(error)}") from None
    if index.ntotal != source.items:
        raise _Unfit(f"patched, it holds {index.ntotal:,} vectors, the table has {source.items:,}")
    recall = _tune(index, truth, settings)
    if recall < settings.target_recall:
        raise _Unfit(f"patched, its recall@{settings.k} is {recall:.4f}")
    nprobe, before = _nprobe(index), base.index_build.nprobe
    if nprobe and before and nprobe > WIDENED * before:
        raise _Unfit(f"patched, it needs {nprobe} probes for the recall, {before} when it was built")
    log.info("index: patched, %s vectors removed, %s added", f"{len(removed):,}", f"{len(added):,}")
    return _Made(index, base.index_build.model_copy(update={"changed": changed}), recall)


def _patchable(base: Release | None, wanted: _Wanted) -> Release:
    if base is None:
        raise _Unfit("there is no release to start from")
    if (base.bundle, base.dim, base.buckets) != (wanted.bundle, wanted.dim, wanted.buckets):
        raise _Unfit(f"release {base.release_id} has another bundle, or other buckets")
    if base.index_factory != wanted.factory or len(base.index_files) != 1:
        raise _Unfit(f"release {base.release_id} has {base.index_factory}, {wanted.factory} is wanted")
    drift = math.dist(wanted.moments.mean, base.index_build.mean) / math.sqrt(wanted.moments.variance or 1.0)
    if drift > wanted.settings.max_drift:
        raise _Unfit(f"the mean vector moved by {drift:.3f} standard deviations since it was built")
    return base


def _changes(base: Release, source: _Source) -> tuple[Ids, Ids, Matrix]:
    """Row ids that left or changed since the base, row ids that came or changed, and the vectors of those [n, d]."""
    common = {file.path for file in base.table_files} & {file.path for file in source.files}
    old = {bucket_number(file.path): file for file in base.table_files if file.path not in common}
    new = {bucket_number(file.path): file for file in source.files if file.path not in common}
    removed, added = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    vectors = [np.empty((0, source.dim), np.float32)]
    for bucket in sorted(old.keys() | new.keys()):
        before, after = source.keys(old.get(bucket)), source.keys(new.get(bucket))
        ids = after["row_id"].to_numpy()
        same = _same(before, after)
        removed.append(np.setdiff1d(before["row_id"].to_numpy(), ids[same]))
        if not same.all():
            rows = feature_table.read_rows(source.storage, source.table_uri, new[bucket], columns=["vector"])
            added.append(ids[~same])
            vectors.append(source.vectors(rows)[~same])
    return np.concatenate(removed), np.concatenate(added), np.concatenate(vectors)


def _same(before: pa.Table, after: pa.Table) -> NDArray[np.bool_]:
    """Which rows of ``after`` hold the vector that ``before`` holds under the same id: carried over, not encoded."""
    where = pc.index_in(after["row_id"], value_set=before["row_id"].combine_chunks())
    equal = [pc.equal(after[name], before[name].take(where)) for name in ("content_hash", "encoded_at")]
    found: NDArray[np.bool_] = pc.fill_null(pc.and_(*equal), fill_value=False).to_numpy()
    return found


def _built(source: _Source, truth: "_Truth", wanted: _Wanted) -> _Made:
    factory, settings = wanted.factory, wanted.settings
    index = _new_index(factory, source.dim)
    if not index.is_trained:
        lists = _ivf(index)
        points = max(TRAIN_POINTS_MIN, TRAIN_POINTS_PER_LIST * (lists.nlist if lists else 1))
        try:
            index.train(_sample(source, wanted=points)[1])
        except RuntimeError as error:
            raise UserError(
                f"index.factory {factory!r} cannot be trained on {source.items:,} vectors: {_reason(error)}"
            ) from None
    try:
        for ids, vectors in source.chunks():
            index.add_with_ids(vectors, ids)
    except RuntimeError as error:
        raise UserError(f"index.factory {factory!r} takes no vectors with ids: {_reason(error)}") from None
    recall = _tune(index, truth, settings)
    if recall < settings.target_recall:
        raise GateRefused(
            f"recall@{settings.k} of {factory} is {recall:.4f} over {len(truth.ids):,} queries, "
            f"index.target_recall asks for {settings.target_recall}; choose another factory. Nothing was published"
        )
    return _Made(index, IndexBuild(items=source.items, nprobe=_nprobe(index), mean=wanted.moments.mean), recall)


@dataclass(frozen=True)
class _Truth:
    """Sampled items as queries: ids [q], vectors [q, d]; per query the ids that belong in its first k."""

    ids: Ids
    vectors: Matrix
    acceptable: list[set[int]]
    k: int


def _new_index(factory: str, dim: int) -> Any:
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if _ivf(index) is None and not factory.startswith("IDMap"):
            # Without inverted lists an index numbers its vectors itself; the map gives them our row ids.
            index = faiss.index_factory(dim, f"IDMap2,{factory}", faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"index.factory {factory!r} makes no index of {dim} dimensions: {_reason(error)}") from None
    return index


def _ivf(index: Any) -> Any:
    return faiss.try_extract_index_ivf(index)


def _nprobe(index: Any) -> int | None:
    lists = _ivf(index)
    return lists.nprobe if lists else None


def _sample(source: _Source, *, wanted: int) -> tuple[Ids, Matrix]:
    """A seeded sample of ids [n] and vectors [n, d], n = min(items, wanted)."""
    size = min(source.items, wanted)
    chosen = np.sort(np.random.default_rng(SEED).choice(source.items, size=size, replace=False))
    ids, vectors, start = [], [], 0
    for chunk_ids, chunk in source.chunks():
        inside = chosen[(chosen >= start) & (chosen < start + len(chunk_ids))] - start
        ids.append(chunk_ids[inside])
        vectors.append(chunk[inside])
        start += len(chunk_ids)
    return np.concatenate(ids), np.concatenate(vectors)


def _exact(source: _Source, settings: IndexSettings) -> _Truth:
    """Exact neighbours of sampled items, themselves left out; neighbours that tie with the k-th all count."""
    ids, queries = _sample(source, wanted=settings.recall_queries)
    k = min(settings.k, source.items - 1)
    depth = min(source.items, k + 1 + TIES)
    scores = np.full((len(ids), depth), -np.inf, np.float32)
    found = np.full((len(ids), depth), -1, np.int64)
    for chunk_ids, chunk in source.chunks():
        near, rows = faiss.knn(queries, chunk, min(depth, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
        scores = np.concatenate([scores, near], axis=1)
        found = np.concatenate([found, chunk_ids[rows]], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        scores, found = np.take_along_axis(scores, best, axis=1), np.take_along_axis(found, best, axis=1)
    acceptable = []
    for row, own in enumerate(ids.tolist()):
        others = found[row] != own
        near = scores[row][others]
        acceptable.append(set(found[row][others][near >= near[k - 1] - TIE_TOLERANCE].tolist()) if k else set())
    return _Truth(ids=ids, vectors=queries, acceptable=acceptable, k=k)


def _tune(index: Any, truth: _Truth, settings: IndexSettings) -> float:
    """Search ever wider until the target is met or there is nothing wider; returns the recall reached."""
    lists = _ivf(index)
    space, name, widest = faiss.ParameterSpace(), None, 1
    if lists is not None:
        name, widest = "nprobe", lists.nlist
    elif "HNSW" in settings.factory:
        name, widest = "efSearch", MAX_EF_SEARCH
    width = 1 if name == "nprobe" else 16
    while True:
        if name is not None:
            space.set_index_parameter(index, name, min(width, widest))
        recall = _recall(index, truth)
        if recall >= settings.target_recall or name is None or width >= widest:
            return recall
        width *= 2


def _recall(index: Any, truth: _Truth) -> float:
    if truth.k == 0:
        return 1.0
    _, found = index.search(truth.vectors, truth.k + 1)
    hits = 0
    for own, row, acceptable in zip(truth.ids.tolist(), found.tolist(), truth.acceptable, strict=True):
        others = [i for i in row if i != own][: truth.k]
        hits += len(acceptable.intersection(others))
    return hits / (truth.k * len(truth.ids))


def _read(storage: Storage, release: Release) -> Any:
    file = release.index_files[0]
    if problem := check_file(storage, release.index_uri, file):
        raise CorruptFile(problem)
    return faiss.deserialize_index(np.frombuffer(storage.read(join(release.index_uri, file.path)), np.uint8))


def _store(index: Any, storage: Storage, uri: str) -> PublishedFile:
    with storage.staged(join(uri, "index")) as staged:
        faiss.write_index(index, str(staged))
        described = describe_file(staged, path="", rows=index.ntotal)
        path = f"index-{described.sha256[:16]}.faiss"
        storage.publish(staged, join(uri, path))
    return described.model_copy(update={"path": path})


def _reason(error: RuntimeError) -> str:
    """FAISS's own words without the C++ location in front."""
    return re.sub(r"^.*\.(?:cpp|h):\d+: (?:Error: )?", "", str(error), flags=re.DOTALL).strip().splitlines()[0]

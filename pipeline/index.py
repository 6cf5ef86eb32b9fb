"""The index stage: a FAISS index over a plan's files, with its recall measured against exact search."""

import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline import feature_table
from pipeline.config import IndexSettings
from pipeline.errors import GateRefused, UserError
from pipeline.integrity import check_file, describe_file
from pipeline.storage import Storage, join
from schemas.files import PublishedFile
from schemas.receipt import IndexReceipt, Receipt

EXACT_BELOW = 20_000
TRAIN_POINTS_PER_LIST = 64
TRAIN_POINTS_MIN = 20_000
MAX_EF_SEARCH = 1024
TIES = 32
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


def build_index(
    receipts: Sequence[Receipt],
    *,
    storage: Storage,
    table_uri: str,
    index_uri: str,
    plan_id: str,
    digest: str,
    dim: int,
    settings: IndexSettings,
) -> IndexReceipt:
    """Build, tune, measure and store the index of one plan.

    Args:
        receipts: the plan's files, all of them.
        storage: access to every uri.
        table_uri: root of the receipts' files.
        index_uri: folder of all indexes.
        plan_id: the plan that the receipts belong to.
        digest: names the exact set of receipts.
        dim: length of the vectors.
        settings: factory, k and the recall to reach.

    Raises:
        UserError: FAISS does not understand the factory string, or cannot train it on so few vectors.
        GateRefused: the measured recall stays below the target.
    """
    started = time.monotonic()
    files = [receipt.file for receipt in receipts if receipt.file is not None]
    items = sum(file.rows for file in files)
    factory = choose_factory(items, settings)

    def chunks() -> Iterator[tuple[Ids, Matrix]]:
        for file in files:
            rows = feature_table.read_rows(storage, table_uri, file, columns=["row_id", "vector"])
            vectors = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)
            yield rows["row_id"].to_numpy(), vectors

    index = _new_index(factory, dim)
    if not index.is_trained:
        lists = _ivf(index)
        wanted = max(TRAIN_POINTS_MIN, TRAIN_POINTS_PER_LIST * (lists.nlist if lists else 1))
        try:
            index.train(_sample(chunks(), items, wanted=wanted)[1])
        except RuntimeError as error:
            raise UserError(
                f"index.factory {factory!r} cannot be trained on {items:,} vectors: {_reason(error)}"
            ) from None
    try:
        for ids, vectors in chunks():
            index.add_with_ids(vectors, ids)
    except RuntimeError as error:
        raise UserError(f"index.factory {factory!r} takes no vectors with ids: {_reason(error)}") from None
    truth = _exact(chunks, items, settings)
    recall = _tune(index, truth, settings)
    if recall < settings.target_recall:
        raise GateRefused(
            f"recall@{settings.k} of {factory} is {recall:.4f} over {len(truth.ids):,} queries, "
            f"index.target_recall asks for {settings.target_recall}; choose another factory. Nothing was published"
        )
    uri = join(index_uri, plan_id)
    file = _store(index, storage, uri)
    return IndexReceipt(
        plan_id=plan_id,
        receipts_digest=digest,
        uri=uri,
        files=(file,),
        factory=factory,
        nprobe=lists.nprobe if (lists := _ivf(index)) else None,
        k=settings.k,
        recall=recall,
        queries=len(truth.ids),
        seconds=time.monotonic() - started,
    )


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


def _sample(chunks: Iterator[tuple[Ids, Matrix]], items: int, *, wanted: int) -> tuple[Ids, Matrix]:
    """A seeded sample of ids [n] and vectors [n, d], n = min(items, wanted)."""
    chosen = np.sort(np.random.default_rng(SEED).choice(items, size=min(items, wanted), replace=False))
    ids, vectors, start = [], [], 0
    for chunk_ids, chunk in chunks:
        inside = chosen[(chosen >= start) & (chosen < start + len(chunk_ids))] - start
        ids.append(chunk_ids[inside])
        vectors.append(chunk[inside])
        start += len(chunk_ids)
    return np.concatenate(ids), np.concatenate(vectors)


def _exact(chunks: Callable[[], Iterator[tuple[Ids, Matrix]]], items: int, settings: IndexSettings) -> _Truth:
    """Exact neighbours of sampled items, themselves left out; neighbours that tie with the k-th all count."""
    ids, queries = _sample(chunks(), items, wanted=settings.recall_queries)
    k = min(settings.k, items - 1)
    depth = min(items, k + 1 + TIES)
    scores = np.full((len(ids), depth), -np.inf, np.float32)
    found = np.full((len(ids), depth), -1, np.int64)
    for chunk_ids, chunk in chunks():
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

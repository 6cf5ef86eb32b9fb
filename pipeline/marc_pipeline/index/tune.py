"""Tuning: the narrowest search that reaches the target recall, with measured recall and latency."""

import statistics
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.index.job import DraftIndex, IndexJob
from marc_pipeline.index.recall import Recall, estimate_recall, recall_per_query
from marc_pipeline.index.search import hnsw_graph, inverted_lists, search_width, set_search_width, width_range
from marc_pipeline.index.vectors import Matrix

# After doubling found an upper bound, the width is refined in steps of one eighth.
FINE = 8
LATENCY_QUERIES = 100


@dataclass(frozen=True)
class IndexMeasurement:
    """Recall, search width and speed of a tuned index; ``queries_per_second`` is that of one large batch."""

    recall: Recall
    nprobe: int | None
    ef_search: int | None
    latency_ms: float
    queries_per_second: float


def tune_and_measure(draft: DraftIndex, job: IndexJob) -> IndexMeasurement:
    """Set the narrowest search width that reaches the target recall, and measure the index with it."""
    _tune(draft, job)
    shares = _recall(draft, job, held=True)
    held, width = draft.queries.vectors[: draft.queries.held], search_width(draft.indexes[0])
    alone = [_seconds(draft, held[n : n + 1], job.settings.k) for n in range(min(LATENCY_QUERIES, len(held)))]
    return IndexMeasurement(
        recall=estimate_recall(shares, job.items),
        nprobe=width if inverted_lists(draft.indexes[0]) is not None else None,
        ef_search=width if hnsw_graph(draft.indexes[0]) is not None else None,
        latency_ms=1000 * statistics.median(alone),
        queries_per_second=len(held) / max(_seconds(draft, held, job.settings.k), 1e-9),
    )


def _recall(draft: DraftIndex, job: IndexJob, *, held: bool) -> NDArray[np.float64]:
    """Recall of each held-out query, or of each tuning query."""
    return recall_per_query(draft.queries, draft.search, job.source.take, job.settings.k, job.items, held=held)


def _seconds(draft: DraftIndex, vectors: Matrix, k: int) -> float:
    started = time.perf_counter()
    draft.search(vectors, k)
    return time.perf_counter() - started


def _tune(draft: DraftIndex, job: IndexJob) -> None:
    """Widen the search until the tuning queries reach the target recall, then until the held-out queries do."""
    span = width_range(draft.indexes[0])
    if span is None:
        return
    # Without tuning queries of their own, small indexes are tuned on the held-out queries.
    held_out_only = draft.queries.held == len(draft.queries.ids)

    def reaches(width: int, *, held: bool) -> bool:
        for index in draft.indexes:
            set_search_width(index, width)
        return float(_recall(draft, job, held=held).mean()) >= job.settings.target_recall

    narrowest, widest = span
    # A patched index starts at its present width and is only widened.
    width = (search_width(draft.indexes[0]) or narrowest) if draft.build.changed else narrowest
    below = width if draft.build.changed else 0
    while not reaches(width, held=held_out_only) and width < widest:
        below, width = width, min(2 * width, widest)
    while width - below > max(1, width // FINE) and width > narrowest:
        middle = (below + width) // 2
        below, width = (below, middle) if reaches(middle, held=held_out_only) else (middle, width)
    while not reaches(width, held=True) and width < widest:
        width = min(widest, width + max(1, width // FINE))

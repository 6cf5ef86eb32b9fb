"""Recall and speed of a FAISS index, measured the same way for every builder."""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
from rows import Ids, Matrix

SLICE = 50_000
MAX_EF_SEARCH = 4096
TIE_TOLERANCE = 1e-6
SPAN_S, SPANS = 0.5, 3


@dataclass(frozen=True)
class SearchFigures:
    """Search parameter (nprobe or efSearch), recall, and queries per second one by one and together."""

    parameter: int | None
    recall: float
    one_by_one: float
    together: float


@dataclass(frozen=True)
class Truth:
    """Queries [q, d], the indexed vectors [n, d], and the k-th best score of every query [q]."""

    queries: Matrix
    vectors: Matrix
    limits: Matrix
    k: int

    @classmethod
    def of(cls, vectors: Matrix, queries: Matrix, k: int) -> "Truth":
        """Exact search, slice by slice."""
        best = np.full((len(queries), k), -np.inf, np.float32)
        for start in range(0, len(vectors), SLICE):
            scores = queries @ vectors[start : start + SLICE].T
            best = np.partition(np.concatenate([best, scores], axis=1), -k, axis=1)[:, -k:]
        return cls(queries, vectors, best.min(axis=1), k)


@dataclass(frozen=True)
class MeasuredIndex:
    """An index whose ids are row ids if ``order`` is given, else positions in the vectors."""

    index: Any
    truth: Truth
    row_ids: Ids
    order: Ids | None

    @classmethod
    def of(cls, path: Path, truth: Truth, row_ids: Ids, *, by_row_id: bool) -> "MeasuredIndex":
        return cls(faiss.read_index(str(path)), truth, row_ids, np.argsort(row_ids) if by_row_id else None)

    def recall(self) -> float:
        """Share of the k best vectors that are found; ties with the k-th count as found."""
        truth = self.truth
        _, found = self.index.search(truth.queries, truth.k)
        places = found if self.order is None else self.order[np.searchsorted(self.row_ids, found, sorter=self.order)]
        hits = 0
        for query, limit, ids, numbers in zip(truth.queries, truth.limits, found, places, strict=True):
            once = np.unique(numbers[ids >= 0])
            hits += int(np.sum(truth.vectors[once] @ query >= limit - TIE_TOLERANCE))
        return hits / (truth.k * len(truth.queries))

    @property
    def parameter(self) -> tuple[str, Any, int] | None:
        """Name of the search parameter, the object that holds it, and its largest value."""
        lists = faiss.try_extract_index_ivf(self.index)
        if lists is not None:
            return "nprobe", lists, lists.nlist
        inner = self.index
        while isinstance(inner, faiss.IndexIDMap | faiss.IndexPreTransform | faiss.IndexRefine):
            inner = faiss.downcast_index(inner.base_index if isinstance(inner, faiss.IndexRefine) else inner.index)
        return ("efSearch", inner.hnsw, MAX_EF_SEARCH) if hasattr(inner, "hnsw") else None

    def figures(self) -> SearchFigures:
        """Figures at the current value of the search parameter."""
        found = self.parameter
        value = getattr(found[1], found[0]) if found else None
        return SearchFigures(value, self.recall(), self.rate(1), self.rate(len(self.truth.queries)))

    def tuned(self, target: float) -> SearchFigures:
        """Figures at the smallest value that reaches the recall; at the largest value if none does."""
        found = self.parameter
        if found:
            name, holder, widest = found
            low, high = 0, 1 if name == "nprobe" else self.truth.k

            def reaches(value: int) -> bool:
                setattr(holder, name, value)
                return self.recall() >= target

            while not reaches(high) and high < widest:
                low, high = high, min(2 * high, widest)
            while high - low > max(1, high // 64):
                middle = (low + high) // 2
                low, high = (low, middle) if reaches(middle) else (middle, high)
            setattr(holder, name, high)
        return self.figures()

    def rate(self, batch: int) -> float:
        """Queries per second in batches: the median of three spans of time."""
        queries, rates = self.truth.queries, []
        self.index.search(queries[:batch], self.truth.k)
        for _ in range(SPANS):
            count, started = 0, time.perf_counter()
            while time.perf_counter() - started < SPAN_S:
                place = count % len(queries)
                self.index.search(queries[place : place + batch], self.truth.k)
                count += batch
            rates.append(count / (time.perf_counter() - started))
        return median(rates)

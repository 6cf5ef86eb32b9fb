"""Choice of the index type from the number of vectors, the target recall and the memory limit."""

import math
from dataclasses import dataclass
from typing import Any

import faiss

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import UserError
from marc_pipeline.index.faiss_index import new_index, vectors_for_training
from marc_pipeline.index.search import hnsw_graph, inverted_lists

EXACT_BELOW = 20_000
# With fewer training points lists are less even: for the same recall, 64 points scan 3 to 18 % more, 32 scan 25 % more.
TRAIN_POINTS_PER_LIST, LEAST_POINTS_PER_LIST = 128, 32
TRAIN_POINTS_MIN = 20_000
# Twice as many lists cost four times the training and save 5 % of a query's work. Half as many cost 33 % more work.
LISTS_PER_ROOT, MOST_LISTS = 2, 65_536
# Codes in the lists, the most precise first, with the recall@10 that each reaches on MARC vectors of 200,000 and
# 1,000,000 items. Graphs need four times the build time for the recall of lists. A rotation before the product
# quantiser (OPQ) adds .005 recall and takes six times the training.
CODES = {"Flat": 1.0, "SQfp16": 0.995, "SQ8": 0.97, "PQ": 0.9}
# Codes that are chosen only if no other fits into the memory limit.
SPARING = ("SQ8", "PQ")
# From this number of lists on, the nearest lists are found by an HNSW graph.
GRAPH_FROM_LISTS = 16_384
MEBIBYTE = 1 << 20
# Memory beyond the index or training sample: row groups, queries with their neighbours, FAISS buffers and allocator
# overhead. Measured with 64 dimensions: 130 to 145 MiB.
WORKING_BYTES = 150 * MEBIBYTE
# Per list: headers of three C++ vectors, and allocator rounding.
LIST_BYTES = 96
ID_BYTES = 8
# A growing C++ vector allocates up to twice its size.
GROWTH = 2


@dataclass(frozen=True)
class IndexChoice:
    """An index type with its predicted size and memory.

    Attributes:
        factory: FAISS factory string.
        index_bytes: size in memory and in files.
        memory_bytes: peak memory of a process that builds the whole index, without imported libraries.
        training: number of training vectors.
    """

    factory: str
    index_bytes: int
    memory_bytes: int
    training: int


def choose(items: int, dim: int, settings: IndexSettings) -> tuple[IndexChoice, ...]:
    """The index types to try, the cheapest sufficient one first, then more precise ones.

    Below 20,000 vectors the index is exact. Above, it has inverted lists of half-precision floats, which reach the
    recall of float32 at half the size. If ``index.memory_mib`` is too small, the codes are one byte, or half a byte,
    per dimension. A target recall that only float32 reaches gets float32.

    Raises:
        UserError: FAISS rejects the factory string, or no index of that recall fits into the memory.
    """
    cap = math.inf if settings.memory_mib is None else settings.memory_mib * MEBIBYTE
    if settings.factory != "auto":
        found = [predict(settings.factory, items, dim, cap=cap)]
    elif items < EXACT_BELOW:
        found = [predict("Flat", items, dim, cap=cap)]
    else:
        reaching = [_code(name, dim) for name, ceiling in CODES.items() if ceiling >= settings.target_recall]
        found = [predict(f"{_lists(items)},{code}", items, dim, cap=cap) for code in reaching if code]
    fitting = [choice for choice in found if choice.memory_bytes <= cap]
    if not fitting:
        least = min(found, key=lambda choice: choice.memory_bytes)
        shown = ", ".join(f"{one.factory} {_mebibytes(one.memory_bytes)}" for one in found)
        raise UserError(
            f"index.memory_mib {settings.memory_mib:g} is too small for an index of {items:,} × {dim} with recall "
            f"{settings.target_recall}; set it to at least {_mebibytes(least.memory_bytes)} ({shown})"
        )
    # Try the cheapest sufficient index first, then more precise ones. SPARING codes are used only if no other fits.
    usual = [choice for choice in fitting if not choice.factory.rsplit(",", 1)[-1].startswith(SPARING)]
    return tuple(reversed(usual)) if usual else (fitting[0],)


def predict(factory: str, items: int, dim: int, *, cap: float = math.inf) -> IndexChoice:
    """Predict size, memory and training sample of an index.

    ``cap`` limits the memory for training, in bytes. A smaller sample makes the lists slightly less even.

    Raises:
        UserError: FAISS rejects the factory string.
    """
    index = new_index(factory, dim)
    most, least = (
        min(items, vectors_for_training(index, at_least=TRAIN_POINTS_MIN, per_list=points))
        for points in (TRAIN_POINTS_PER_LIST, LEAST_POINTS_PER_LIST)
    )
    size, bytes_each = _index_bytes(index, items, dim), dim * 4
    training = max(least, int(min(most, max(0, cap - WORKING_BYTES) / bytes_each)))
    learning = training * bytes_each
    # Inverted lists are allocated once, at their final size. Other indexes grow.
    filling = size + 4 * items if inverted_lists(index) is not None else GROWTH * size
    return IndexChoice(factory, size, WORKING_BYTES + max(learning, filling), training)


def _lists(items: int) -> str:
    count = int(min(MOST_LISTS, 2 ** round(math.log2(LISTS_PER_ROOT * math.sqrt(items)))))
    return f"IVF{count}" if count < GRAPH_FROM_LISTS else f"IVF{count}_HNSW32"


def _code(name: str, dim: int) -> str | None:
    """The factory name of a code; None if the number of dimensions cannot be divided."""
    if name != "PQ":
        return name
    return f"PQ{dim // 2}x8" if dim > 1 and dim % 2 == 0 else None


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / MEBIBYTE):,} MiB"


def _index_bytes(index: Any, items: int, dim: int) -> int:
    lists = inverted_lists(index)
    if lists is not None:
        quantizer = faiss.downcast_index(lists.quantizer)
        per_list = dim * 4 + LIST_BYTES + _graph_bytes(quantizer)
        return int(items * (lists.code_size + ID_BYTES) + lists.nlist * per_list)
    return int(items * (_code_bytes(index, dim) + _graph_bytes(hnsw_graph(index)) + ID_BYTES))


def _code_bytes(index: Any, dim: int) -> int:
    """Bytes of one vector's code; those of float32 if FAISS does not tell."""
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    if isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    try:
        return int(index.sa_code_size())
    except RuntimeError:
        return dim * 4


def _graph_bytes(index: Any) -> int:
    """Bytes per vector for a graph's links, offsets and levels; 0 without a graph."""
    if not isinstance(index, faiss.IndexHNSW):
        return 0
    graph: Any = index.hnsw
    # 2 × M links on the lowest level, M on every level above. One in M vectors reaches the next level.
    links = graph.nb_neighbors(0)
    return int(4 * links * (1 + 1 / max(1, links - 2)) + ID_BYTES + 4)

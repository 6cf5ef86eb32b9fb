"""Which index suits so many vectors: the most faithful one that the memory allows, predicted beforehand."""

import math
from dataclasses import dataclass
from typing import Any

import faiss

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import UserError
from marc_pipeline.index.faiss_index import new_index, vectors_for_training
from marc_pipeline.index.search import graph_of, lists_of

EXACT_BELOW = 20_000
# Fewer points make lists less even: 64 scan 3 to 18 % more for the same recall, 32 a quarter more.
TRAIN_POINTS_PER_LIST, LEAST_POINTS_PER_LIST = 128, 32
TRAIN_POINTS_MIN = 20_000
# Twice as many cost four times the training and save a twentieth of a query's work, half as many a third more work.
LISTS_PER_ROOT, MOST_LISTS = 2, 65_536
# What the lists hold, the most faithful first, and the recall@10 that each can be expected to reach: measured on MARC
# vectors of 200,000 and 1,000,000 items. Graphs reach what lists do with four times the work to build them; a rotation
# before the product quantiser (OPQ) adds .005 for six times its training.
CODES = {"Flat": 1.0, "SQfp16": 0.995, "SQ8": 0.97, "PQ": 0.9}
# What is taken only where nothing else fits.
SPARING = ("SQ8", "PQ")
# So many lists are themselves found through a graph.
GRAPH_FROM_LISTS = 16_384
MEBIBYTE = 1 << 20
# Beside index or training sample: row groups as they are read, queries with their neighbours, what FAISS computes with,
# and what the allocator keeps of all that. Measured with 64 dimensions: 130 to 145.
WORKING_BYTES = 150 * MEBIBYTE
# Per list: three vectors' headers, and what the allocator rounds up.
LIST_BYTES = 96
ID_BYTES = 8
# A vector that grows holds room for as much again.
GROWTH = 2


@dataclass(frozen=True)
class Choice:
    """An index, and what it is predicted to take.

    Attributes:
        factory: FAISS factory string.
        index_bytes: its size, in memory as in files.
        memory_bytes: most that a process holds while it builds the whole of it, beyond what it imports.
        training: vectors that it learns from.
    """

    factory: str
    index_bytes: int
    memory_bytes: int
    training: int


def choose(items: int, dim: int, settings: IndexSettings) -> tuple[Choice, ...]:
    """The indexes that suit so many vectors; the first is to be tried first, those behind it are more faithful.

    Exact below 20,000. Beyond, inverted lists: of half-precision floats, which find what whole ones do at half the
    size; of bytes, or of two dimensions a byte, where ``index.memory_mib`` allows no more; of whole floats for a recall
    that only those reach.

    Args:
        items: vectors.
        dim: their length d.
        settings: a factory string instead, the recall that is asked for, and the most memory.

    Raises:
        UserError: FAISS makes none of the factory string, or no index of that recall fits into the memory.
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
            f"index.memory_mib {settings.memory_mib:g} cannot hold an index of {items:,} × {dim} with recall "
            f"{settings.target_recall}; {_mebibytes(least.memory_bytes)} would do ({shown})"
        )
    # The largest that is no larger than need be, then the larger ones; the smaller ones only where nothing else fits.
    usual = [choice for choice in fitting if not choice.factory.rsplit(",", 1)[-1].startswith(SPARING)]
    return tuple(reversed(usual)) if usual else (fitting[0],)


def predict(factory: str, items: int, dim: int, *, cap: float = math.inf) -> Choice:
    """What an index of so many vectors takes.

    Args:
        factory: FAISS factory string.
        items: vectors.
        dim: their length d.
        cap: bytes that training should not go beyond; lists that learn from fewer vectors are a little less even.

    Raises:
        UserError: FAISS makes none of the factory string.
    """
    index = new_index(factory, dim)
    most, least = (
        min(items, vectors_for_training(index, at_least=TRAIN_POINTS_MIN, per_list=points))
        for points in (TRAIN_POINTS_PER_LIST, LEAST_POINTS_PER_LIST)
    )
    size, bytes_each = _index_bytes(index, items, dim), dim * 4
    training = max(least, int(min(most, max(0, cap - WORKING_BYTES) / bytes_each)))
    learning = training * bytes_each
    # Inverted lists are filled to measure; anything else grows.
    filling = size + 4 * items if lists_of(index) is not None else GROWTH * size
    return Choice(factory, size, WORKING_BYTES + max(learning, filling), training)


def _lists(items: int) -> str:
    count = int(min(MOST_LISTS, 2 ** round(math.log2(LISTS_PER_ROOT * math.sqrt(items)))))
    return f"IVF{count}" if count < GRAPH_FROM_LISTS else f"IVF{count}_HNSW32"


def _code(name: str, dim: int) -> str | None:
    """What the factory calls it; None where the dimensions cannot be shared out."""
    if name != "PQ":
        return name
    return f"PQ{dim // 2}x8" if dim > 1 and dim % 2 == 0 else None


def _mebibytes(size: int) -> str:
    return f"{math.ceil(size / MEBIBYTE):,} MiB"


def _index_bytes(index: Any, items: int, dim: int) -> int:
    lists = lists_of(index)
    if lists is not None:
        quantizer = faiss.downcast_index(lists.quantizer)
        per_list = dim * 4 + LIST_BYTES + _graph_bytes(quantizer)
        return int(items * (lists.code_size + ID_BYTES) + lists.nlist * per_list)
    return int(items * (_code_bytes(index, dim) + _graph_bytes(graph_of(index)) + ID_BYTES))


def _code_bytes(index: Any, dim: int) -> int:
    """Bytes of one vector's code; of a whole vector where FAISS does not say."""
    while isinstance(index, faiss.IndexIDMap | faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    if isinstance(index, faiss.IndexHNSW):
        index = faiss.downcast_index(index.storage)
    try:
        return int(index.sa_code_size())
    except RuntimeError:
        return dim * 4


def _graph_bytes(index: Any) -> int:
    """Bytes per vector of a graph's links, offsets and levels; 0 without a graph."""
    if not isinstance(index, faiss.IndexHNSW):
        return 0
    graph: Any = index.hnsw
    # Twice M links on the ground, M on every level above, which one of M vectors reaches.
    links = graph.nb_neighbors(0)
    return int(4 * links * (1 + 1 / max(1, links - 2)) + ID_BYTES + 4)

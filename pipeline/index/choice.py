"""Which index suits so many vectors: the most faithful one that the memory allows, predicted beforehand."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import faiss

from pipeline.config import IndexSettings
from pipeline.errors import UserError
from pipeline.index.faiss_index import new_index, vectors_for_training
from pipeline.index_search import graph_of, lists_of

EXACT_BELOW = 20_000
TRAIN_POINTS_PER_LIST = 40
TRAIN_POINTS_MIN = 20_000
LISTS_PER_ROOT, MOST_LISTS = 4, 65_536
# So many lists are themselves found through a graph.
GRAPH_FROM_LISTS = 16_384
MEBIBYTE = 1 << 20
# Beside index and training sample: a row group as it is read, queries with their neighbours, what FAISS computes with.
WORKING_BYTES = 80 * MEBIBYTE
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


def choose(items: int, dim: int, settings: IndexSettings) -> Choice:
    """The index for so many vectors.

    Exact below 20,000; beyond, inverted lists of whole vectors, or of the least compressed ones that
    ``index.memory_mib`` allows.

    Args:
        items: vectors.
        dim: their length d.
        settings: a factory string instead, and the most memory.

    Raises:
        UserError: FAISS makes none of the factory string, or no index fits into the memory.
    """
    cap = None if settings.memory_mib is None else int(settings.memory_mib * MEBIBYTE)
    found: list[Choice] = []
    for factory in [settings.factory] if settings.factory != "auto" else _candidates(items, dim):
        found.append(predict(factory, items, dim))
        if cap is None or found[-1].memory_bytes <= cap:
            return found[-1]
    least = min(found, key=lambda choice: choice.memory_bytes)
    shown = ", ".join(f"{one.factory} {math.ceil(one.memory_bytes / MEBIBYTE):,} MiB" for one in found)
    raise UserError(
        f"index.memory_mib {settings.memory_mib:g} cannot hold an index of {items:,} × {dim}; what would fit: "
        f"{math.ceil(least.memory_bytes / MEBIBYTE):,} MiB at least ({shown})"
    )


def predict(factory: str, items: int, dim: int) -> Choice:
    """What an index of so many vectors takes.

    Raises:
        UserError: FAISS makes none of the factory string.
    """
    index = new_index(factory, dim)
    training = min(items, vectors_for_training(index, at_least=TRAIN_POINTS_MIN, per_list=TRAIN_POINTS_PER_LIST))
    size = _index_bytes(index, items, dim)
    learning = 2 * training * dim * 4
    # Inverted lists are filled to measure; anything else grows.
    filling = size + 4 * items if lists_of(index) is not None else GROWTH * size
    return Choice(factory, size, WORKING_BYTES + max(learning, filling), training)


def _candidates(items: int, dim: int) -> Iterator[str]:
    """From the most faithful to the smallest."""
    lists = f"IVF{_lists(items)}"
    if items < EXACT_BELOW:
        yield "Flat"
        return
    if _lists(items) >= GRAPH_FROM_LISTS:
        lists += "_HNSW32"
    yield f"{lists},Flat"
    yield f"{lists},SQfp16"
    yield f"{lists},SQ8"
    yield f"{lists},SQ6"
    half = dim // 2
    if dim % 2 == 0 and half:
        yield f"OPQ{half}_{dim},{lists},PQ{half}x8"


def _lists(items: int) -> int:
    return int(min(MOST_LISTS, 2 ** round(math.log2(max(1.0, LISTS_PER_ROOT * math.sqrt(items))))))


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

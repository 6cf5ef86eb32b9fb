"""FAISS operations: create an index from a factory string, fill, patch and merge it, always with row ids as ids."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import UserError
from marc_pipeline.index.search import inverted_lists
from marc_pipeline.index.vectors import Ids, Matrix

TRAIN_ITERATIONS = 4
REMOVED = -1

# Batches of row ids [n] and vectors [n, d]; every call starts from the beginning.
Batches = Callable[[], Iterable[tuple[Ids, Matrix]]]


def new_index(factory: str, dim: int) -> Any:
    """An empty inner-product index that stores row ids.

    Raises:
        UserError: FAISS rejects the factory string.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if inverted_lists(index) is None and not factory.startswith("IDMap"):
            # An index without inverted lists has no ids of its own; IDMap adds them.
            index = faiss.index_factory(dim, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(
            f"index.factory {factory!r} is not valid for {dim} dimensions: {faiss_message(error)}"
        ) from None
    if (lists := inverted_lists(index)) is not None:
        # A larger sample improves recall more than further iterations do.
        lists.cp.niter = TRAIN_ITERATIONS
        lists.cp.min_points_per_centroid = 1
    return index


def vectors_for_training(index: Any, *, at_least: int, per_list: int) -> int:
    """Number of training vectors; 0 for an index that needs no training."""
    if index.is_trained:
        return 0
    lists = inverted_lists(index)
    return max(at_least, per_list * (lists.nlist if lists else 1))


def fill(index: Any, batches: Batches) -> None:
    """Add all vectors to a trained, empty index. Inverted lists are allocated at their final size first.

    This halves the peak memory. ``batches`` is called twice and yields the same vectors in the same order.
    """
    lists = inverted_lists(index)
    if not mergeable(index):
        for ids, vectors in batches():
            index.add_with_ids(vectors, ids)
        return
    assigned = [_assign(lists, _transformed(index, vectors)).astype(np.int32) for _, vectors in batches()]
    sizes = np.bincount(np.concatenate([*assigned, np.empty(0, np.int32)]), minlength=lists.nlist)
    for number in np.flatnonzero(sizes).tolist():
        lists.invlists.resize(number, int(sizes[number]))
        lists.invlists.resize(number, 0)
    for (ids, vectors), where in zip(batches(), assigned, strict=True):
        x, rows, to = _transformed(index, vectors), np.ascontiguousarray(ids), where.astype(np.int64)
        lists.add_core(len(rows), faiss.swig_ptr(x), faiss.swig_ptr(rows), faiss.swig_ptr(to))
    index.ntotal = lists.ntotal


def patch(index: Any, removed: Ids, added: Ids, vectors: Matrix) -> int:
    """Remove vectors from an index and add others.

    Args:
        index: changed in place; memory-mapped lists are copied.
        removed: row ids [r] to remove, all of them in the index.
        added: row ids [n] to add.
        vectors: vectors [n, d] to add.

    Returns:
        Number of new tombstones: removed vectors that an index type without deletion keeps and search skips.

    Raises:
        RuntimeError: FAISS cannot patch this index type.
    """
    lists = inverted_lists(index)
    if mergeable(index):
        _patch_lists(index, lists, removed, added, vectors)
        return 0
    if lists is not None and isinstance(index, faiss.IndexIDMap):
        raise RuntimeError("IDMap over inverted lists returns wrong ids after a deletion")
    marked = 0
    if len(removed):
        try:
            index.remove_ids(removed)
        except RuntimeError:
            if not isinstance(index, faiss.IndexIDMap):
                raise
            marked = _mark_removed(index, removed)
    if len(added):
        index.add_with_ids(vectors, added)
    return marked


def merge(index: Any, parts: Sequence[Any]) -> None:
    """Copy the vectors of several indexes into an empty one; all share the same trained inverted lists."""
    lists = inverted_lists(index)
    inside = [inverted_lists(part) for part in parts]
    merged = faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
    for number in range(lists.nlist):
        found = [(_ids(part, number), _codes(part, number)) for part in inside]
        _append(merged, number, [ids for ids, _ in found], [codes for _, codes in found])
    _exchange(index, lists, merged, sum(part.ntotal for part in inside))


def mergeable(index: Any) -> bool:
    """Whether an index has inverted lists with contiguous codes, with or without a vector transform."""
    if index is None:
        return False
    inside: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if not isinstance(inside, faiss.IndexIVF):
        return False
    kept: Any = inside.invlists
    # Fast-scan indexes pack their codes in blocks.
    return isinstance(faiss.downcast_InvertedLists(kept), faiss.ArrayInvertedLists)


def faiss_message(error: RuntimeError) -> str:
    """The message of a FAISS error, without the C++ location."""
    return re.sub(r"^.*\.(?:cpp|h):\d+: (?:Error: )?", "", str(error), flags=re.DOTALL).strip().splitlines()[0]


def _transformed(index: Any, vectors: Matrix) -> Matrix:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            vectors = faiss.downcast_VectorTransform(chain.at(number)).apply(vectors)
    return vectors


def _assign(lists: Any, x: Matrix) -> Ids:
    """The list number [n] of each transformed vector."""
    found: Ids = lists.quantizer.search(x, 1)[1][:, 0]
    return found


def _patch_lists(index: Any, lists: Any, removed: Ids, added: Ids, vectors: Matrix) -> None:
    where, codes = _encoded(index, lists, vectors)
    order = np.argsort(where, kind="stable")
    starts = np.searchsorted(where[order], np.arange(lists.nlist + 1))
    gone = np.sort(removed)
    patched: Any = faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
    for number in range(lists.nlist):
        ids, kept = _ids(lists, number), _codes(lists, number)
        if len(gone) and len(ids):
            stays = gone[np.minimum(np.searchsorted(gone, ids), len(gone) - 1)] != ids
            if not stays.all():
                ids, kept = ids[stays], kept[stays]
        fresh = order[starts[number] : starts[number + 1]]
        _append(patched, number, [ids, added[fresh]], [kept, codes[fresh]])
    total = int(patched.compute_ntotal())
    _exchange(index, lists, patched, total)


def _encoded(index: Any, lists: Any, vectors: Matrix) -> tuple[Ids, NDArray[np.uint8]]:
    """List numbers [n] and codes [n, bytes] of vectors."""
    codes = np.empty((len(vectors), lists.code_size), np.uint8)
    if not len(vectors):
        return np.empty(0, np.int64), codes
    x = _transformed(index, vectors)
    where = np.ascontiguousarray(_assign(lists, x))
    lists.encode_vectors(len(x), faiss.swig_ptr(x), faiss.swig_ptr(where), faiss.swig_ptr(codes))
    return where, codes


def _ids(lists: Any, number: int) -> Ids:
    """Row ids of a list, without a copy."""
    size = lists.invlists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    found: Ids = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)
    return found


def _codes(lists: Any, number: int) -> NDArray[np.uint8]:
    """Codes [n, bytes] of a list, without a copy."""
    size, width = lists.invlists.list_size(number), lists.code_size
    if not size:
        return np.empty((0, width), np.uint8)
    found: NDArray[np.uint8] = faiss.rev_swig_ptr(lists.invlists.get_codes(number), size * width).reshape(size, width)
    return found


def _append(lists: Any, number: int, ids: Sequence[Ids], codes: Sequence[NDArray[np.uint8]]) -> None:
    """Fill an empty list in one call. A list that grows in steps allocates up to twice its size."""
    if not sum(map(len, ids)):
        return
    rows, bytes_of = np.concatenate(ids), np.concatenate(codes)
    lists.add_entries(number, len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(bytes_of))


def _exchange(index: Any, lists: Any, new: Any, total: int) -> None:
    lists.replace_invlists(new, True)
    if new.this.own():
        new.this.disown()
    lists.ntotal = index.ntotal = total


def _mark_removed(index: Any, removed: Ids) -> int:
    known: Ids = faiss.vector_to_array(index.id_map)
    gone = np.isin(known, removed)
    known[gone] = REMOVED
    faiss.copy_array_to_vector(known, index.id_map)
    return int(gone.sum())

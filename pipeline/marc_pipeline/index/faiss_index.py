"""FAISS indexes by factory string: made, filled, patched, merged, searched; row ids are theirs throughout."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import UserError
from marc_pipeline.index.search import lists_of

TRAIN_ITERATIONS = 4
REMOVED = -1

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]
# Batches of row ids [n] and vectors [n, d]; every call begins anew.
Batches = Callable[[], Iterable[tuple[Ids, Matrix]]]


def new_index(factory: str, dim: int) -> Any:
    """An empty index of inner products whose vectors carry row ids.

    Raises:
        UserError: FAISS makes none of the factory string.
    """
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
        if lists_of(index) is None and not factory.startswith("IDMap"):
            # Without inverted lists an index numbers its vectors itself; the map gives them our row ids.
            index = faiss.index_factory(dim, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise UserError(f"index.factory {factory!r} makes no index of {dim} dimensions: {reason(error)}") from None
    if (lists := lists_of(index)) is not None:
        # Time is better spent on a larger sample than on more iterations.
        lists.cp.niter = TRAIN_ITERATIONS
        lists.cp.min_points_per_centroid = 1
    return index


def vectors_for_training(index: Any, *, at_least: int, per_list: int) -> int:
    """How many vectors an untrained index learns from; 0 for one that learns nothing."""
    if index.is_trained:
        return 0
    lists = lists_of(index)
    return max(at_least, per_list * (lists.nlist if lists else 1))


def fill(index: Any, batches: Batches) -> None:
    """Add all vectors. Lists are made as long as they will be first, so that they never hold room for twice as many.

    Args:
        index: trained and empty.
        batches: gives the same vectors in the same order at every call.
    """
    lists = lists_of(index)
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
    """Take vectors out of an index and put others in.

    Args:
        index: changed in place; what it had mapped into memory is copied.
        removed: row ids [r] to take out, all of them in the index.
        added: row ids [n] to put in.
        vectors: theirs [n, d].

    Returns:
        How many vectors were marked as removed because their place could not be freed.

    Raises:
        RuntimeError: FAISS cannot do it.
    """
    lists = lists_of(index)
    if mergeable(index):
        _patch_lists(index, lists, removed, added, vectors)
        return 0
    if lists is not None and isinstance(index, faiss.IndexIDMap):
        raise RuntimeError("a map over inverted lists confuses its ids once vectors leave")
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
    """Fill an empty index with what others hold that were trained as it was.

    Args:
        index: trained and empty, with inverted lists.
        parts: indexes of the same lists.
    """
    lists = lists_of(index)
    inside = [lists_of(part) for part in parts]
    merged = faiss.ArrayInvertedLists(lists.nlist, lists.code_size)
    for number in range(lists.nlist):
        found = [(_ids(part, number), _codes(part, number)) for part in inside]
        _append(merged, number, [ids for ids, _ in found], [codes for _, codes in found])
    _exchange(index, lists, merged, sum(part.ntotal for part in inside))


def mergeable(index: Any) -> bool:
    """Whether an index is inverted lists, vectors transformed or not, in which codes lie one after the other."""
    if index is None:
        return False
    inside: Any = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    if not isinstance(inside, faiss.IndexIVF):
        return False
    kept: Any = inside.invlists
    # Fast-scan packs its codes in blocks.
    return isinstance(faiss.downcast_InvertedLists(kept), faiss.ArrayInvertedLists)


def reason(error: RuntimeError) -> str:
    """FAISS's own words without the C++ location in front."""
    return re.sub(r"^.*\.(?:cpp|h):\d+: (?:Error: )?", "", str(error), flags=re.DOTALL).strip().splitlines()[0]


def _transformed(index: Any, vectors: Matrix) -> Matrix:
    vectors = np.ascontiguousarray(vectors, np.float32)
    if isinstance(index, faiss.IndexPreTransform):
        chain: Any = index.chain
        for number in range(chain.size()):
            vectors = faiss.downcast_VectorTransform(chain.at(number)).apply(vectors)
    return vectors


def _assign(lists: Any, x: Matrix) -> Ids:
    """Numbers [n] of the lists that transformed vectors belong in."""
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
    """Row ids of a list, not copied."""
    size = lists.invlists.list_size(number)
    if not size:
        return np.empty(0, np.int64)
    found: Ids = faiss.rev_swig_ptr(lists.invlists.get_ids(number), size)
    return found


def _codes(lists: Any, number: int) -> NDArray[np.uint8]:
    """Codes [n, bytes] of a list, not copied."""
    size, width = lists.invlists.list_size(number), lists.code_size
    if not size:
        return np.empty((0, width), np.uint8)
    found: NDArray[np.uint8] = faiss.rev_swig_ptr(lists.invlists.get_codes(number), size * width).reshape(size, width)
    return found


def _append(lists: Any, number: int, ids: Sequence[Ids], codes: Sequence[NDArray[np.uint8]]) -> None:
    """Fill an empty list once: a list that grows by steps keeps room for twice as many."""
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

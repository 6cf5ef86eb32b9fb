"""The FAISS index of one release: verified, mapped into memory, searched as one whatever files it has."""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from pipeline.errors import MissingFile
from pipeline.integrity import require_blocks
from pipeline.storage import Storage, is_s3, join
from schemas.files import PublishedFile
from schemas.release import Release

Matrix = NDArray[np.float32]


class IndexReader:
    """The index of one release.

    Args:
        facts: the release's row in the log.
        storage: access to it.
    """

    def __init__(self, facts: Release, *, storage: Storage) -> None:
        self._facts = facts
        self._storage = storage

    def search(self, queries: Matrix, k: int) -> tuple[Matrix, NDArray[np.int64]]:
        """Scores and row ids [n, ≥ k], best first, -1 where there are no more.

        At least k neighbours, and as many more as tie with the k-th: which of them count is not FAISS's to say.

        Raises:
            CorruptFile: a file is missing or differs from its checksum.
        """
        depth = k
        while True:
            depth = min(depth + 1, self._facts.items)
            scores, rows = self._index.search(queries, depth)
            # An index that finds fewer says -1: there is nothing more to come.
            if depth == self._facts.items or np.all((rows[:, -1] < 0) | (scores[:, -1] < scores[:, k - 1])):
                return scores, rows
            depth *= 2

    def row_ids(self) -> NDArray[np.int64]:
        """Row ids in the index, in no particular order."""
        return np.concatenate([_shard_ids(shard) for shard in self._shards])

    @cached_property
    def _shards(self) -> list[Any]:
        root = self._facts.index_uri
        return [mapped(self._storage, root, file) for file in self._facts.index_files]

    @cached_property
    def _index(self) -> Any:
        shards = self._shards
        if len(shards) == 1:
            return shards[0]
        merged: Any = faiss.IndexShards(self._facts.dim)
        # The shards bring our row ids: they must not be numbered one after the other.
        merged.successive_ids = False
        for shard in shards:
            merged.add_shard(shard)
        return merged


def mapped(storage: Storage, root: str, file: PublishedFile) -> Any:
    """One index file, every block verified, then mapped into memory: FAISS reads the pages that it needs.

    FAISS aborts the process where a mapped index is to grow; see :func:`loaded`.

    Raises:
        CorruptFile: it is missing or differs from its checksum.
    """
    return _opened(storage, root, file, faiss.IO_FLAG_MMAP_IFC)


def loaded(storage: Storage, root: str, file: PublishedFile) -> Any:
    """One index file, every block verified, read into memory: it may be changed.

    Raises:
        CorruptFile: it is missing or differs from its checksum.
    """
    return _opened(storage, root, file, 0)


def _opened(storage: Storage, root: str, file: PublishedFile, flags: int) -> Any:
    if not is_s3(root):
        require_blocks(storage, root, file)
        return faiss.read_index(join(root, file.path), flags)
    with tempfile.TemporaryDirectory(prefix="marc-index-") as folder:
        path = Path(folder) / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.fetch(join(root, file.path), path)
        except FileNotFoundError:
            raise MissingFile(f"{join(root, file.path)} is missing; run `marc verify` and restore it") from None
        require_blocks(Storage(), folder, file)
        # What is mapped stays when its name goes.
        return faiss.read_index(str(path), flags)


def _shard_ids(shard: Any) -> NDArray[np.int64]:
    if hasattr(shard, "id_map"):
        return np.array(faiss.vector_to_array(shard.id_map), dtype=np.int64)
    lists: Any = faiss.try_extract_index_ivf(shard)
    inverted = lists.invlists
    sizes = [inverted.list_size(number) for number in range(lists.nlist)]
    ids = [faiss.rev_swig_ptr(inverted.get_ids(n), size).copy() for n, size in enumerate(sizes) if size]
    return np.concatenate(ids)

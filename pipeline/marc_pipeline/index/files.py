"""Index files of a release: verify, memory-map or load them, and search all of them as one index."""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import MissingFile, UserError
from marc_pipeline.index.search import IndexSearch, set_search_width
from marc_pipeline.storage import Storage, is_s3, join
from marc_pipeline.storage.checksums import require_blocks
from marc_schemas.files import PublishedFile
from marc_schemas.release import Release


class IndexReader:
    """The FAISS index of one release. It is opened on first use."""

    def __init__(self, facts: Release, *, storage: Storage) -> None:
        self._facts = facts
        self._storage = storage

    def row_ids(self) -> NDArray[np.int64]:
        """Row ids of all vectors except tombstones, in no particular order."""
        found = np.concatenate([_shard_ids(shard) for shard in self._shards])
        return found[found >= 0]

    def close(self) -> None:
        """Release the FAISS index and its memory map."""
        for name in ("searcher", "_shards", "sorted_row_ids"):
            vars(self).pop(name, None)

    @cached_property
    def sorted_row_ids(self) -> NDArray[np.int64]:
        """Row ids of all vectors except tombstones, sorted."""
        return np.sort(self.row_ids())

    @cached_property
    def searcher(self) -> IndexSearch:
        """The search over all files.

        Raises:
            UserError: the installed FAISS is older than the one that wrote the index.
            CorruptFile: a file is missing or differs from its checksum.
        """
        facts = self._facts
        return IndexSearch(self._shards, items=facts.counts.items, tombstones=facts.index.build.tombstones)

    @cached_property
    def _shards(self) -> list[Any]:
        facts = self._facts
        _require_faiss(facts)
        shards = [map_index(self._storage, facts.index.uri, file) for file in facts.index.files]
        for shard in shards:
            # A shard that an older release shares may store another search width.
            set_search_width(shard, facts.index.width)
        return shards


def map_index(storage: Storage, root: str, file: PublishedFile) -> Any:
    """Verify one index file and map it into memory. FAISS reads the pages that it needs.

    FAISS aborts the process if vectors are added to a mapped index; use :func:`load_index` for that.

    Raises:
        CorruptFile: the file is missing or differs from its checksum.
    """
    return _opened(storage, root, file, faiss.IO_FLAG_MMAP_IFC)


def load_index(storage: Storage, root: str, file: PublishedFile) -> Any:
    """Verify one index file and read it into memory. The index can be changed.

    Raises:
        CorruptFile: the file is missing or differs from its checksum.
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
        # The mapping stays valid after the file is deleted.
        return faiss.read_index(str(path), flags)


def _require_faiss(facts: Release) -> None:
    """Refuse an index of a newer FAISS, whose format may differ. Patch releases keep the format."""
    if facts.index.faiss and _major_minor(faiss.__version__) < _major_minor(facts.index.faiss):
        wanted = ".".join(map(str, _major_minor(facts.index.faiss)))
        raise UserError(
            f"the index of release {facts.release_id} was written by FAISS {facts.index.faiss}, installed is "
            f"{faiss.__version__}; pip install 'faiss-cpu>={wanted}'"
        )


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _shard_ids(shard: Any) -> NDArray[np.int64]:
    if hasattr(shard, "id_map"):
        return np.array(faiss.vector_to_array(shard.id_map), dtype=np.int64)
    lists: Any = faiss.try_extract_index_ivf(shard)
    inverted = lists.invlists
    sizes = [inverted.list_size(number) for number in range(lists.nlist)]
    ids = [faiss.rev_swig_ptr(inverted.get_ids(n), size).copy() for n, size in enumerate(sizes) if size]
    return np.concatenate([np.empty(0, np.int64), *ids])

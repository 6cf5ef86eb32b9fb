"""The FAISS index of one release: verified, mapped into memory, searched as one whatever files it has."""

import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import MissingFile, UserError
from marc_pipeline.index.search import Choice, Found, IndexSearch, set_width
from marc_pipeline.storage import Storage, is_s3, join
from marc_pipeline.storage.checksums import require_blocks
from marc_schemas.files import PublishedFile
from marc_schemas.release import Release

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

    def search(self, queries: Matrix, k: int, choice: Choice | None = None, *, widest: bool = False) -> Iterator[Found]:
        """The best k of each query, and all that tie with the k-th; see :meth:`IndexSearch.search`.

        Raises:
            UserError: this FAISS is older than the one that wrote the index.
            CorruptFile: a file is missing or differs from its checksum.
        """
        return self._search.search(queries, k, choice, widest=widest)

    @property
    def scans_exactly(self) -> bool:
        """Whether a search that is wide enough is an exact one."""
        return self._search.scans_exactly

    def row_ids(self) -> NDArray[np.int64]:
        """Row ids of the vectors that are alive, in no particular order."""
        found = np.concatenate([_shard_ids(shard) for shard in self._shards])
        return found[found >= 0]

    def close(self) -> None:
        """Drop the FAISS index, and with it its memory map."""
        for name in ("_search", "_shards", "sorted_row_ids"):
            vars(self).pop(name, None)

    @cached_property
    def sorted_row_ids(self) -> NDArray[np.int64]:
        """Row ids of the vectors that are alive."""
        return np.sort(self.row_ids())

    @cached_property
    def _search(self) -> IndexSearch:
        facts = self._facts
        return IndexSearch(self._shards, items=facts.counts.items, tombstones=facts.index.build.tombstones)

    @cached_property
    def _shards(self) -> list[Any]:
        facts = self._facts
        _require_faiss(facts)
        shards = [mapped(self._storage, facts.index.uri, file) for file in facts.index.files]
        for shard in shards:
            # An unchanged shard may have been stored with another search width.
            set_width(shard, facts.index.width)
        return shards


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


def _require_faiss(facts: Release) -> None:
    """Files of a newer FAISS may be read wrongly by an older one; patch releases leave the format alone."""
    if facts.index.faiss and _major_minor(faiss.__version__) < _major_minor(facts.index.faiss):
        wanted = ".".join(map(str, _major_minor(facts.index.faiss)))
        raise UserError(
            f"the index of release {facts.release_id} was written by FAISS {facts.index.faiss}, this is "
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

"""Windows of a bucket: its planned items in pieces of bounded size, and the texts of each piece to encode."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.storage import Storage
from marc_schemas.catalogue import ITEMS, Change

# A window ends at the first of these limits: texts to encode, items, bytes.
WINDOW_TEXTS = 8192
WINDOW_ROWS = 65_536
WINDOW_BYTES = 64 * 1024 * 1024
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Window:
    """Consecutive items of a bucket.

    Attributes:
        items: n rows of :data:`marc_schemas.catalogue.ITEMS`.
        fresh: mask [n] of the items that need a new vector.
        rows: numbers of the rows whose texts are encoded; items with equal texts are encoded once per bucket.
        shared: numbers of the fresh rows whose text occurs more than once in the bucket.
    """

    items: pa.Table
    fresh: NDArray[np.bool_]
    rows: NDArray[np.int64]
    shared: NDArray[np.int64]


def read_windows(storage: Storage, uri: str, *, whole: bool) -> Iterator[Window]:
    """Read a bucket's file of planned items. Memory grows only with the texts that occur more than once.

    Args:
        storage: access to the file.
        uri: the file, sorted by item_id.
        whole: encode all texts, including those whose vectors could be carried over.
    """
    repeated, seen = _repeated(storage, uri, whole=whole), set[str]()
    for items in _pieces(_batches(storage, uri, ITEMS.names), whole=whole):
        fresh = _fresh(items, whole=whole)
        rows = np.flatnonzero(fresh)
        shared = rows[np.isin(_keys(items["content_hash"].take(rows)), repeated)]
        later = []
        for row, content in zip(shared.tolist(), items["content_hash"].take(shared).to_pylist(), strict=True):
            if content in seen:
                later.append(row)
            seen.add(content)
        yield Window(items, fresh, np.setdiff1d(rows, later), shared)


def _batches(storage: Storage, uri: str, columns: Sequence[str]) -> Iterator[pa.Table]:
    filesystem, path = storage.filesystem(uri)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def _pieces(batches: Iterable[pa.Table], *, whole: bool) -> Iterator[pa.Table]:
    """Concatenate batches until a limit of the window is reached."""
    held: list[pa.Table] = []
    fresh = rows = size = 0
    for batch in batches:
        held.append(batch)
        fresh += int(_fresh(batch, whole=whole).sum())
        rows += batch.num_rows
        size += batch.nbytes
        if fresh >= WINDOW_TEXTS or rows >= WINDOW_ROWS or size >= WINDOW_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held, fresh, rows, size = [], 0, 0, 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _fresh(items: pa.Table, *, whole: bool) -> NDArray[np.bool_]:
    if whole:
        return np.ones(items.num_rows, bool)
    fresh: NDArray[np.bool_] = pc.not_equal(items["change"], Change.UNCHANGED.value).to_numpy()
    return fresh


def _repeated(storage: Storage, uri: str, *, whole: bool) -> NDArray[np.uint64]:
    """Keys of the texts that more than one fresh item has."""
    keys = [
        _keys(batch["content_hash"].filter(pa.array(_fresh(batch, whole=whole))))
        for batch in _batches(storage, uri, ["content_hash", "change"])
    ]
    ordered = np.sort(np.concatenate(keys)) if keys else np.empty(0, np.uint64)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _keys(hashes: pa.ChunkedArray) -> NDArray[np.uint64]:
    """The first 64 bits of each content hash. They find candidates for equal texts in a quarter of the memory."""
    return np.array([int(content[:16], 16) for content in hashes.to_pylist()], np.uint64)

"""Vectors of unchanged items, read from the base release instead of being encoded again."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.errors import CorruptFile
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import open_verified
from marc_pipeline.table.rows import empty_rows
from marc_schemas.files import PublishedFile

CARRIED = ["item_id", "vector", "content_hash", "bundle", "encoded_at"]


class CarriedVectors:
    """Reads vectors of the base release by row group; sorted by item_id, a window needs only few of them.

    Args:
        storage: access to ``table_uri``.
        table_uri: the feature table.
        files: files of the base release that can hold items of the bucket.
        bucket: number of the bucket.
        bundle: version of the bundle that must have made the vectors.
        dim: length d of the vectors.
    """

    def __init__(
        self, storage: Storage, table_uri: str, files: Sequence[PublishedFile], *, bucket: int, bundle: str, dim: int
    ) -> None:
        self._storage, self._table_uri, self._named = storage, table_uri, files
        self._bucket, self._bundle, self._dim = bucket, bundle, dim
        self._files: list[pq.ParquetFile] | None = None

    def of(self, items: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.datetime64]]:
        """Return the vectors [n, d] of unchanged items, which are sorted by item_id, and their encoding times [n].

        Raises:
            CorruptFile: a file of the base release is damaged or missing, or it does not contain the vectors.
        """
        ids = items["item_id"]
        previous = self._between(ids[0].as_py(), ids[-1].as_py())
        previous = previous.take(pc.index_in(ids, value_set=previous["item_id"].combine_chunks()))
        same = pc.and_(
            pc.equal(previous["content_hash"], items["content_hash"]), pc.equal(previous["bundle"], self._bundle)
        )
        if not pc.all(pc.fill_null(same, fill_value=False)).as_py():
            raise CorruptFile(
                f"bucket {self._bucket}: the base release does not contain the vectors that the plan carries over"
            )
        vectors = previous["vector"].combine_chunks().flatten().to_numpy().reshape(-1, self._dim)
        return vectors, previous["encoded_at"].to_numpy()

    def close(self) -> None:
        """Close the files."""
        for file in self._files or ():
            file.close(force=True)

    def _between(self, first: str, last: str) -> pa.Table:
        if self._files is None:
            self._files = [pq.ParquetFile(open_verified(self._storage, self._table_uri, file)) for file in self._named]
        tables = [empty_rows(self._dim).select(CARRIED).replace_schema_metadata()]
        for file in self._files:
            groups = [n for n in range(file.num_row_groups) if _overlaps(file.metadata.row_group(n), first, last)]
            tables.append(file.read_row_groups(groups, columns=CARRIED).replace_schema_metadata())
        return pa.concat_tables(tables).combine_chunks()


def _overlaps(group: pq.RowGroupMetaData, first: str, last: str) -> bool:
    """Whether a row group may contain ids from first to last. Python and Parquet order text by code point."""
    known = group.column(0).statistics
    return known is None or not known.has_min_max or (known.min <= last and known.max >= first)

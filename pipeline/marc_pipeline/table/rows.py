"""Rows of single Parquet files of the feature table, verified as they are read."""

from collections.abc import Sequence
from contextlib import closing

import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import open_verified
from marc_pipeline.storage.mapped_file import MappedFile
from marc_pipeline.table.write import PLAN_FOOTER
from marc_schemas.feature_table import file_schema
from marc_schemas.files import PublishedFile


def read_rows(
    storage: Storage, table_uri: str, file: PublishedFile, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Return rows of one published file; every byte that is read is verified.

    Raises:
        CorruptFile: the file is missing, or a byte differs from the checksum.
    """
    with open_verified(storage, table_uri, file) as source:
        return pq.ParquetFile(source).read(columns=list(columns) if columns else None)


def read_whole(storage: Storage, table_uri: str, file: PublishedFile, *, columns: Sequence[str]) -> pa.Table:
    """Return columns of one published file. Every byte of the file, other columns included, is verified once.

    Raises:
        CorruptFile: the file is missing, or a byte differs from the checksum.
    """
    with closing(MappedFile(storage, table_uri, file)) as mapped:
        mapped.require(0, mapped.bytes)
        return pq.ParquetFile(mapped.open()).read(columns=list(columns))


def plan_id_of(storage: Storage, table_uri: str, file: PublishedFile) -> str:
    """Return the id of the plan in a file's footer; empty if the footer has none.

    Raises:
        CorruptFile: the file is missing, or a byte differs from the checksum.
    """
    with open_verified(storage, table_uri, file) as source:
        metadata = pq.ParquetFile(source).schema_arrow.metadata or {}
    found: str = metadata.get(PLAN_FOOTER.encode(), b"").decode()
    return found


def empty_rows(dim: int) -> pa.Table:
    """Return the rows of a bucket without items."""
    return file_schema(dim).empty_table()

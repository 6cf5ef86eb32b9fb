"""Columns and types of the feature table: float32 vectors, one row per item and ds, partitioned by ds and bucket."""

import pyarrow as pa

PARTITION_COLUMNS = ("ds", "bucket")
# This footer entry marks files whose PLAIN_COLUMNS are uncompressed, plain-encoded and one page per row group. A row
# of these columns can be read by its number. Other readers read the file as ordinary Parquet.
LAYOUT_FOOTER, PLAIN_LAYOUT = "marc.layout", "plain-pages"
ROW_ID_COLUMN, VECTOR_COLUMN = PLAIN_COLUMNS = ("row_id", "vector.list.element")
MANTISSA_BITS = 23
"""Explicit mantissa bits of a float32, the full precision."""


def file_schema(dim: int) -> pa.Schema:
    """Return the columns of one Parquet file with vectors of length ``dim``; ``ds`` and ``bucket`` are in its path."""
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("row_id", pa.int64(), nullable=False),
            pa.field("vector", pa.list_(pa.field("element", pa.float32(), nullable=False), dim), nullable=False),
            pa.field("content_hash", pa.string(), nullable=False),
            pa.field("bundle", pa.string(), nullable=False),
            pa.field("encoded_at", pa.timestamp("us", tz="UTC"), nullable=False),
        ]
    )


def table_schema(dim: int) -> pa.Schema:
    """Return the columns of the table: those of a file, then ``ds`` and ``bucket``."""
    return file_schema(dim).append(pa.field("ds", pa.string())).append(pa.field("bucket", pa.int32()))


def partition_path(ds: str, bucket: int) -> str:
    """Return the Hive-style folder of one partition, relative to the table."""
    return f"ds={ds}/bucket={bucket}"


def partition_ds(path: str) -> str:
    """Return the date in a file's path relative to the table."""
    return path.split("ds=", 1)[1].split("/", 1)[0]


def bucket_number(path: str) -> int:
    """Return the bucket in a file's path relative to the table."""
    return int(path.split("bucket=", 1)[1].split("/", 1)[0])

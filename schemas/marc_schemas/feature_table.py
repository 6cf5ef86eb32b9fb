"""The feature table: one row per item and ds, partitioned by ds and bucket."""

import pyarrow as pa

PARTITION_COLUMNS = ("ds", "bucket")
# A footer with this entry says that these columns lie bare in the file, so that rows are found by their number: plain,
# not compressed, one page a row group. To any other reader it is Parquet like all.
LAYOUT_FOOTER, PLAIN_LAYOUT = "marc.layout", "plain-pages"
ROW_ID_COLUMN, VECTOR_COLUMN = PLAIN_COLUMNS = ("row_id", "vector.list.element")
MANTISSA_BITS = 23
"""Explicit mantissa bits of a float32: all that a vector is computed with."""


def file_schema(dim: int) -> pa.Schema:
    """Columns inside one Parquet file; ``ds`` and ``bucket`` are in its path.

    Args:
        dim: length d of every vector.
    """
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
    """Columns as a reader sees them: those of the file, then ``ds`` and ``bucket``."""
    return file_schema(dim).append(pa.field("ds", pa.string())).append(pa.field("bucket", pa.int32()))


def partition_path(ds: str, bucket: int) -> str:
    """Hive-style folder of one partition, relative to the table."""
    return f"ds={ds}/bucket={bucket}"


def partition_ds(path: str) -> str:
    """Date of a file, from its path relative to the table."""
    return path.split("ds=", 1)[1].split("/", 1)[0]


def bucket_number(path: str) -> int:
    """Bucket of a file, from its path relative to the table."""
    return int(path.split("bucket=", 1)[1].split("/", 1)[0])

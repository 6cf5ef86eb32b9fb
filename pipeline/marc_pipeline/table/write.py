"""Writer of one bucket's Parquet file in the feature table's folder. Readers see the file after the commit."""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import describe_file
from marc_pipeline.table.precision import round_vectors
from marc_schemas.feature_table import (
    LAYOUT_FOOTER,
    MANTISSA_BITS,
    PLAIN_COLUMNS,
    PLAIN_LAYOUT,
    ROW_ID_COLUMN,
    VECTOR_COLUMN,
    file_schema,
    partition_path,
)
from marc_schemas.files import PublishedFile
from marc_schemas.identity import plan_key

# A row group is one page of vectors. Pages have at most this size, and this many rows, a limit of pyarrow.
PAGE_BYTES = 4 << 20
ROW_GROUP_ROWS = 16_384
PLAN_FOOTER = "marc.plan_id"
PRECISION_FOOTER = "marc.mantissa_bits"

log = logging.getLogger(__name__)


def write_bucket_file(
    storage: Storage,
    table_uri: str,
    tables: Iterable[pa.Table],
    *,
    dim: int,
    ds: str,
    bucket: int,
    plan_id: str,
    footer: dict[str, str],
    mantissa_bits: int = MANTISSA_BITS,
) -> PublishedFile | None:
    """Write the file of one partition. Each table is written while the caller computes the next one.

    The file name contains the hash of the content. A retry that computes other bytes therefore never replaces a file
    that a receipt or a release refers to.

    Args:
        storage: access to ``table_uri``.
        table_uri: root of the feature table.
        tables: rows with the columns of :func:`marc_schemas.feature_table.file_schema`, sorted by item_id across all.
        dim: length of the vectors.
        ds: date of the partition.
        bucket: number of the partition.
        plan_id: the plan of the rows.
        footer: facts for the file's metadata (bundle, layer, dim, normalised, template).
        mantissa_bits: precision of the stored vectors; 23 does not round.

    Returns:
        The written file; None without rows.
    """
    folder = partition_path(ds, bucket)
    schema, group = file_schema(dim), row_group_rows(dim)
    # Full-precision vectors are stored uncompressed; rounded vectors are compressed, which makes them small.
    plain = PLAIN_COLUMNS if mantissa_bits == MANTISSA_BITS else (ROW_ID_COLUMN,)
    with storage.staged(join(table_uri, folder, "part")) as staged:
        with (
            pq.ParquetWriter(
                staged,
                schema.with_metadata({**footer, LAYOUT_FOOTER: PLAIN_LAYOUT, PRECISION_FOOTER: str(mantissa_bits)}),
                # On full-precision vectors zstd would save only 7 %.
                compression=dict.fromkeys((*schema.names, VECTOR_COLUMN), "zstd") | dict.fromkeys(plain, "none"),
                use_dictionary=False,
                # BYTE_STREAM_SPLIT would save 5 % more on them, but Spark's default Parquet reader refuses it.
                use_byte_stream_split=False if plain == PLAIN_COLUMNS else [VECTOR_COLUMN],
                data_page_size=2 * PAGE_BYTES,
                write_page_checksum=True,
                store_schema=True,
            ) as writer,
            ThreadPoolExecutor(1, thread_name_prefix="write") as pool,
        ):
            rows, written = 0, None
            for table in _whole_groups(tables, group):
                if written is not None:
                    written.result()
                rows += table.num_rows
                written = pool.submit(writer.write_table, round_vectors(table, mantissa_bits), group)
            if written is not None:
                written.result()
        if not rows:
            return None
        described = describe_file(staged, path="", rows=rows)
        path = f"{folder}/part-{plan_key(plan_id)}-{described.sha256[:16]}.parquet"
        storage.publish(staged, join(table_uri, path))
    return described.model_copy(update={"path": path})


def row_group_rows(dim: int) -> int:
    """Return the number of rows per row group for vectors of length ``dim``."""
    return max(1, min(ROW_GROUP_ROWS, PAGE_BYTES // (4 * dim)))


def _whole_groups(tables: Iterable[pa.Table], group: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of whole row groups; only the last table may end within one."""
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        if rows >= group:
            whole = pa.concat_tables(pending)
            rows %= group
            yield whole.slice(0, whole.num_rows - rows)
            pending = [whole.slice(whole.num_rows - rows)]
    if rows:
        yield pa.concat_tables(pending)

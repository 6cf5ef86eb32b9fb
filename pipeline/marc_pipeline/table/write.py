"""Write the Parquet file of one bucket into the feature table's folder. Readers see it after the commit."""

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

# A row group is one page of vectors: of this size, or of so many rows, beyond which pyarrow begins another page.
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
    """Write one partition's file, not yet visible to anybody. A table is written while the next one is made.

    The name carries the content's hash: a retry that computes other bytes never replaces a file that a
    receipt or a release already trusts.

    Args:
        storage: access to ``table_uri``.
        table_uri: root of the feature table.
        tables: rows with the columns of :func:`marc_schemas.feature_table.file_schema`, sorted by item_id across all.
        dim: length of the vectors.
        ds: date of the partition.
        bucket: number of the partition.
        plan_id: the plan that the rows belong to.
        footer: facts for the file's metadata (bundle, layer, dim, normalised, template).
        mantissa_bits: that the vectors are rounded to; 23 leaves them as they are.

    Returns:
        What was written; None for no rows, which need no file.
    """
    folder = partition_path(ds, bucket)
    schema, group = file_schema(dim), row_group_rows(dim)
    # Of rounded vectors only compressed ones are small.
    plain = PLAIN_COLUMNS if mantissa_bits == MANTISSA_BITS else (ROW_ID_COLUMN,)
    with storage.staged(join(table_uri, folder, "part")) as staged:
        with (
            pq.ParquetWriter(
                staged,
                schema.with_metadata({**footer, LAYOUT_FOOTER: PLAIN_LAYOUT, PRECISION_FOOTER: str(mantissa_bits)}),
                # zstd on whole floats saves 7 %.
                compression=dict.fromkeys((*schema.names, VECTOR_COLUMN), "zstd") | dict.fromkeys(plain, "none"),
                use_dictionary=False,
                # Spark's default Parquet reader refuses it; of whole floats it would save 5 % more.
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
    """Rows of a row group, of vectors of length ``dim``."""
    return max(1, min(ROW_GROUP_ROWS, PAGE_BYTES // (4 * dim)))


def _whole_groups(tables: Iterable[pa.Table], group: int) -> Iterator[pa.Table]:
    """The same rows in tables of whole row groups, the last one aside."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        if rows >= group:
            whole = pa.concat_tables(held)
            rows %= group
            yield whole.slice(0, whole.num_rows - rows)
            held = [whole.slice(whole.num_rows - rows)]
    if rows:
        yield pa.concat_tables(held)

"""The feature table on disk: how a bucket's Parquet file is written, and the commit that makes it part of Delta."""

import json
import logging
import time
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction

from pipeline.delta import open_or_create
from pipeline.errors import Superseded
from pipeline.integrity import describe_file, open_verified
from pipeline.storage import Storage, join
from schemas.feature_table import PARTITION_COLUMNS, bucket_number, file_schema, partition_path, table_schema
from schemas.files import PublishedFile

# Small enough that a look-up of a few ids reads little, large enough that the footer stays small.
ROW_GROUP_ROWS = 1024
APP = "marc-pipeline"
LOG_FOLDER = "_delta_log"
COMMIT_TRIES = 5

log = logging.getLogger(__name__)


def write_bucket_file(
    storage: Storage,
    table_uri: str,
    rows: pa.Table,
    *,
    ds: str,
    bucket: int,
    plan_id: str,
    footer: dict[str, str],
) -> PublishedFile:
    """Write one partition's file, not yet visible to anybody.

    The name carries the content's hash: a retry that computes other bytes never replaces a file that a
    receipt or a release already trusts.

    Args:
        storage: access to ``table_uri``.
        table_uri: root of the feature table.
        rows: columns of :func:`schemas.feature_table.file_schema`, sorted by item_id.
        ds: date of the partition.
        bucket: number of the partition.
        plan_id: the plan that the rows belong to.
        footer: facts for the file's metadata (bundle, layer, dim, normalised, template).
    """
    folder = partition_path(ds, bucket)
    with storage.staged(join(table_uri, folder, "part")) as staged:
        pq.write_table(
            rows.replace_schema_metadata(footer),
            staged,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            use_dictionary=False,
            # Plain floats: Spark's default Parquet reader refuses BYTE_STREAM_SPLIT, which would save 5 %.
            write_page_checksum=True,
            store_schema=True,
        )
        described = describe_file(staged, path="", rows=rows.num_rows)
        path = f"{folder}/part-{plan_id[:16]}-{described.sha256[:16]}.parquet"
        storage.publish(staged, join(table_uri, path))
    return described.model_copy(update={"path": path})


def commit_partitions(
    storage: Storage,
    table_uri: str,
    files: Sequence[PublishedFile],
    *,
    dim: int,
    ds: str,
    key: str,
) -> int:
    """Replace the files of one ds in a single transaction; a repeated call with the same key is a no-op.

    Args:
        storage: access to ``table_uri``.
        table_uri: root of the feature table.
        files: the whole ds.
        dim: length of the vectors.
        ds: date whose partitions are replaced.
        key: names the transaction: the same plan, files and attempt give the same key.

    Returns:
        The table version that holds exactly these files for ``ds``.
    """
    # Two overwrites of a day that holds nothing yet touch no common file: this makes them conflict all the same.
    day = f"ds={ds}"
    turn = None
    for remaining in reversed(range(COMMIT_TRIES)):
        table = _open(storage, table_uri, dim)
        if table.transaction_version(key) is not None:
            break
        now = table.transaction_version(day) or 0
        if turn is not None and now >= turn:
            raise Superseded(f"another run committed {ds} at the same moment; run again to publish on top of it")
        turn = now + 1
        properties = CommitProperties(
            app_transactions=[Transaction(key, 1), Transaction(day, turn)],
            custom_metadata={"app": APP, "commit": key},
        )
        try:
            table.create_write_transaction(
                [_add(file, ds=ds) for file in files],
                mode="overwrite",
                schema=Schema.from_arrow(table_schema(dim)),
                partition_by=list(PARTITION_COLUMNS),
                partition_filters=[("ds", "=", ds)],
                commit_properties=properties,
            )
        except CommitFailedError as error:
            if not remaining:
                raise
            log.info("commit of %s met another one: %s", key, error)
    return _version_of(storage, table_uri, key)


def _open(storage: Storage, table_uri: str, dim: int) -> DeltaTable:
    schema = table_schema(dim)
    return open_or_create(storage, table_uri, schema, name="item_vectors", partition_by=PARTITION_COLUMNS)


def _version_of(storage: Storage, table_uri: str, key: str) -> int:
    """The version that a commit made, from the log's own files: ``history()`` miscounts while others commit."""
    mark = f'"commit":{json.dumps(key)}'.encode()
    entries = [entry.uri for entry in storage.list(join(table_uri, LOG_FOLDER)) if entry.uri.endswith(".json")]
    for uri in reversed(entries):
        if mark in storage.read(uri):
            return int(uri.rsplit("/", 1)[1].removesuffix(".json"))
    raise Superseded(f"commit {key} is no longer in the log of {table_uri}; run again to publish anew")


def _add(file: PublishedFile, *, ds: str) -> AddAction:
    return AddAction(
        path=file.path,
        size=file.bytes,
        partition_values={"ds": ds, "bucket": str(bucket_number(file.path))},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps({"numRecords": file.rows}),
    )


def read_rows(
    storage: Storage, table_uri: str, file: PublishedFile, *, columns: Sequence[str] | None = None
) -> pa.Table:
    """Rows of one published file, every byte verified.

    Raises:
        CorruptFile: missing, or a byte differs from the checksum.
    """
    with open_verified(storage, table_uri, file) as source:
        return pq.ParquetFile(source).read(columns=list(columns) if columns else None)


def empty_rows(dim: int) -> pa.Table:
    """A bucket without items."""
    return file_schema(dim).empty_table()

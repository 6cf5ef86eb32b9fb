"""The feature table on disk: how a bucket's Parquet file is written, and the commit that makes it part of Delta."""

import json
import logging
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.transaction import AddAction, RemoveAction

from pipeline.delta import COMMIT_ERRORS, open_or_create
from pipeline.errors import Superseded
from pipeline.integrity import describe_file, open_verified
from pipeline.mapped_file import MappedFile
from pipeline.precision import round_vectors
from pipeline.storage import STAGED_PREFIX, Storage, join
from schemas.feature_table import (
    LAYOUT_FOOTER,
    MANTISSA_BITS,
    PARTITION_COLUMNS,
    PLAIN_COLUMNS,
    PLAIN_LAYOUT,
    ROW_ID_COLUMN,
    VECTOR_COLUMN,
    bucket_number,
    file_schema,
    partition_path,
    table_schema,
)
from schemas.files import PublishedFile
from schemas.identity import PLAN_KEY_CHARS, plan_key
from schemas.plan import Plan
from schemas.receipt import Receipt
from schemas.release import Release

# A row group is one page of vectors: of this size, or of so many rows, beyond which pyarrow begins another page.
PAGE_BYTES = 4 << 20
ROW_GROUP_ROWS = 16_384
APP = "marc-pipeline"
LOG_FOLDER = "_delta_log"
PLAN_FOOTER = "marc.plan_id"
PRECISION_FOOTER = "marc.mantissa_bits"
NAME = re.compile(rf"part-([0-9a-f]{{{PLAN_KEY_CHARS}}})-[0-9a-f]{{16}}\.parquet")

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
        tables: rows with the columns of :func:`schemas.feature_table.file_schema`, sorted by item_id across all.
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


def commit_day(storage: Storage, table_uri: str, files: Sequence[PublishedFile], *, dim: int, ds: str) -> int:
    """Make these files the whole of one ds, in a single transaction that touches no other file.

    Args:
        storage: access to ``table_uri``.
        table_uri: root of the feature table.
        files: the whole ds; those that are there already stay as they are.
        dim: length of the vectors.
        ds: date of the files.

    Returns:
        A table version that holds exactly these files for ``ds``.
    """
    wanted = {file.path: file for file in files}

    def commit() -> int:
        table = _open(storage, table_uri, dim)
        held = committed_files(table, ds=ds)
        if held == wanted.keys():
            return table.version()
        key = uuid.uuid4().hex
        # Two runs that fill an empty day touch no common file: the day's turn makes them conflict all the same.
        turn = Transaction(f"ds={ds}", (table.transaction_version(f"ds={ds}") or 0) + 1)
        added = [_add(wanted[path], ds=ds) for path in sorted(wanted.keys() - held)]
        removed = [_remove(path, ds=ds) for path in sorted(held - wanted.keys())]
        table.create_write_transaction(
            [*added, *removed],
            mode="append",
            schema=Schema.from_arrow(table_schema(dim)),
            partition_by=list(PARTITION_COLUMNS),
            commit_properties=CommitProperties(app_transactions=[turn], custom_metadata={"app": APP, "commit": key}),
        )
        return _version_of(storage, table_uri, key)

    return storage.repeated(table_uri, commit, on=COMMIT_ERRORS)


def plan_of(path: str) -> str | None:
    """Key of the plan that a file was written for; empty for what a killed writer left; None for a file not ours."""
    name = path.rsplit("/", 1)[1]
    if name.startswith(STAGED_PREFIX):
        return ""
    found = NAME.fullmatch(name)
    return found[1] if found else None


def day_files(plan: Plan, receipts: Sequence[Receipt], live: Release | None) -> tuple[PublishedFile, ...]:
    """The files of a whole ds, by bucket: those of the receipts, beside what a plan of some buckets leaves alone.

    Args:
        plan: the day's plan.
        receipts: of every bucket of the plan.
        live: the day's release, which a plan of some buckets changes.
    """
    made = [receipt.file for receipt in receipts if receipt.file is not None]
    if plan.chosen and live:
        made += [file for file in live.table.files if bucket_number(file.path) not in plan.chosen]
    return tuple(sorted(made, key=lambda file: bucket_number(file.path)))


def committed_files(table: DeltaTable, *, ds: str | None = None) -> set[str]:
    """Paths of the files that a version of the table holds, of one ds or of all."""
    actions = pa.table(table.get_add_actions(flatten=True))
    if ds is not None:
        actions = actions.filter(pc.equal(actions["partition.ds"], ds))
    return {unquote(path) for path in actions["path"].to_pylist()}


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


def _remove(path: str, *, ds: str) -> RemoveAction:
    return RemoveAction(
        path=path,
        data_change=True,
        deletion_timestamp=int(time.time() * 1000),
        partition_values={"ds": ds, "bucket": str(bucket_number(path))},
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


def read_whole(storage: Storage, table_uri: str, file: PublishedFile, *, columns: Sequence[str]) -> pa.Table:
    """Return columns of one published file. Every byte of the file, other columns included, is verified once.

    Raises:
        CorruptFile: the file is missing, or a byte differs from the checksum.
    """
    with closing(MappedFile(storage, table_uri, file)) as mapped:
        mapped.require(0, mapped.bytes)
        return pq.ParquetFile(mapped.open()).read(columns=list(columns))


def plan_id_of(storage: Storage, table_uri: str, file: PublishedFile) -> str:
    """The plan that made a file, from its footer; empty where it does not say.

    Raises:
        CorruptFile: missing, or a byte differs from the checksum.
    """
    with open_verified(storage, table_uri, file) as source:
        metadata = pq.ParquetFile(source).schema_arrow.metadata or {}
    found: str = metadata.get(PLAN_FOOTER.encode(), b"").decode()
    return found


def empty_rows(dim: int) -> pa.Table:
    """A bucket without items."""
    return file_schema(dim).empty_table()

"""Commits of the feature table: one transaction replaces the files of a date."""

import json
import re
import time
import uuid
from collections.abc import Sequence
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Schema, Transaction
from deltalake.transaction import AddAction, RemoveAction

from marc_pipeline.errors import Superseded
from marc_pipeline.storage import STAGED_PREFIX, Storage, join
from marc_pipeline.storage.delta import COMMIT_ERRORS, LOG_FOLDER, NO_HOOKS, open_or_create
from marc_schemas.feature_table import PARTITION_COLUMNS, bucket_number, table_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import PLAN_KEY_CHARS
from marc_schemas.plan import Plan
from marc_schemas.receipt import Receipt
from marc_schemas.release import Release

APP = "marc-pipeline"
NAME = re.compile(rf"part-([0-9a-f]{{{PLAN_KEY_CHARS}}})-[0-9a-f]{{16}}\.parquet")


def commit_day(storage: Storage, table_uri: str, files: Sequence[PublishedFile], *, dim: int, ds: str) -> int:
    """Replace the files of the date ``ds`` in one transaction; other dates keep their files.

    ``files`` are all files of the date with vectors of length ``dim``. Committed files among them are not touched.

    Returns:
        A table version with exactly these files for ``ds``.
    """
    wanted = {file.path: file for file in files}

    def commit() -> int:
        table = _open(storage, table_uri, dim)
        committed = committed_files(table, ds=ds)
        if committed == wanted.keys():
            storage.flush(join(table_uri, LOG_FOLDER))
            return table.version()
        key = uuid.uuid4().hex
        # Two runs for an empty date touch no common file; a transaction id of the date makes them conflict.
        turn = Transaction(f"ds={ds}", (table.transaction_version(f"ds={ds}") or 0) + 1)
        added = [_add(wanted[path], ds=ds) for path in sorted(wanted.keys() - committed)]
        removed = [_remove(path, ds=ds) for path in sorted(committed - wanted.keys())]
        table.create_write_transaction(
            [*added, *removed],
            mode="append",
            schema=Schema.from_arrow(table_schema(dim)),
            partition_by=list(PARTITION_COLUMNS),
            commit_properties=CommitProperties(app_transactions=[turn], custom_metadata={"app": APP, "commit": key}),
            post_commithook_properties=NO_HOOKS,
        )
        storage.flush(join(table_uri, LOG_FOLDER))
        return _version_of(storage, table_uri, key)

    return storage.repeated(table_uri, commit, on=COMMIT_ERRORS)


def plan_of(path: str) -> str | None:
    """Return the plan key in a file's name: empty for a staged file of a killed writer, None for a foreign file."""
    name = path.rsplit("/", 1)[1]
    if name.startswith(STAGED_PREFIX):
        return ""
    found = NAME.fullmatch(name)
    return found[1] if found else None


def day_files(plan: Plan, receipts: Sequence[Receipt], live: Release | None) -> tuple[PublishedFile, ...]:
    """Return all files of a date, by bucket: those of the receipts and those of buckets that the plan leaves out.

    ``live`` is the current release of the date. A plan of some buckets keeps its other files.
    """
    files = [receipt.file for receipt in receipts if receipt.file is not None]
    if plan.chosen and live:
        files += [file for file in live.table.files if bucket_number(file.path) not in plan.chosen]
    return tuple(sorted(files, key=lambda file: bucket_number(file.path)))


def committed_files(table: DeltaTable, *, ds: str | None = None) -> set[str]:
    """Return the paths of the files in a version of the table, of one date or of all."""
    actions = pa.table(table.get_add_actions(flatten=True))
    if ds is not None:
        actions = actions.filter(pc.equal(actions["partition.ds"], ds))
    return {unquote(path) for path in actions["path"].to_pylist()}


def _open(storage: Storage, table_uri: str, dim: int) -> DeltaTable:
    schema = table_schema(dim)
    return open_or_create(storage, table_uri, schema, name="item_vectors", partition_by=PARTITION_COLUMNS)


def _version_of(storage: Storage, table_uri: str, key: str) -> int:
    """Return the version of a commit, from the log's files, because ``history()`` miscounts concurrent commits."""
    mark = f'"commit":{json.dumps(key)}'.encode()
    entries = [entry.uri for entry in storage.list(join(table_uri, LOG_FOLDER)) if entry.uri.endswith(".json")]
    for uri in reversed(entries):
        if mark in storage.read(uri):
            return int(uri.rsplit("/", 1)[1].removesuffix(".json"))
    raise Superseded(f"commit {key} is no longer in the log of {table_uri}; run again to publish")


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

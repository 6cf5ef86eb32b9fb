"""Delta tables: open one, or create it, also when several runs create it at the same time, and after a power cut."""

import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
from deltalake import DeltaTable, PostCommitHookProperties
from deltalake.exceptions import DeltaError, TableNotFoundError

from marc_pipeline.storage import Storage, is_s3, join, require_no_credentials

# Errors of a commit: a conflict (CommitFailedError is a DeltaError) or a failure of the store, which delta-rs does not
# retry. The commit may have succeeded although its response was lost: reopen the table and check before a retry.
COMMIT_ERRORS = (DeltaError, OSError)
STORE_FAILED = "S3 error"
REFUSED = re.compile(r"status code\W.*?\b4\d\d\b", re.DOTALL)
LOG_FOLDER = "_delta_log"
COMMIT = re.compile(r"(\d{20})\.json")
KEPT = re.compile(r"\d{20}\.[\w.]+")
LAST_CHECKPOINT = "_last_checkpoint"
PARQUET_END = b"PAR1"
# delta-rs would write a checkpoint and delete old commits without flushing either; :func:`shorten_log` does so safely.
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)

log = logging.getLogger(__name__)


def open_table(storage: Storage, uri: str) -> DeltaTable | None:
    """Return the table, or None if it does not exist.

    A table on a local disk is returned without the commits that a power cut left incomplete. No run has acknowledged
    them, because a commit is flushed before.
    """
    require_no_credentials(uri)
    torn = torn_commits(storage, uri)
    if torn:
        _warn_once(uri, torn[-1])
    if torn and not torn[-1]:
        return None

    def opened() -> DeltaTable | None:
        with _store_errors():
            try:
                version = torn[-1] - 1 if torn else None
                return DeltaTable(uri, version=version, storage_options=storage.delta_options())
            except TableNotFoundError:
                return None

    # delta-rs retries requests, but not a response that is cut off.
    return storage.repeated(uri, opened, on=(_StoreError,))


def open_or_create(
    storage: Storage, uri: str, schema: pa.Schema, *, name: str, partition_by: Sequence[str] = ()
) -> DeltaTable:
    """Return the table without incomplete commits, which are set aside; create an empty one if it does not exist."""
    storage.require_conditional_writes(uri)
    set_aside(storage, uri)
    table = open_table(storage, uri)
    if table is not None:
        return table
    options = storage.delta_options()

    def created() -> DeltaTable:
        # If another run was faster, or the response was lost, the table exists. Opening it raises every other error.
        with suppress(DeltaError, OSError):
            DeltaTable.create(
                uri, schema=schema, name=name, partition_by=list(partition_by), storage_options=options,
                post_commithook_properties=NO_HOOKS,
            )  # fmt: skip
        with _store_errors():
            try:
                return DeltaTable(uri, storage_options=options)
            except TableNotFoundError as error:
                raise _StoreError(f"the table could not be created: {error}") from error

    return storage.repeated(uri, created, on=(_StoreError,))


def torn_commits(storage: Storage, uri: str) -> list[int]:
    """Return the versions of the newest commits that are incomplete, newest first. A store has no such commits.

    A commit is incomplete if it is not whole JSON, or if a file that delta-rs wrote for it lacks bytes.
    """
    if is_s3(uri):
        return []
    commits = {
        int(found[1]): stored.uri
        for stored in storage.list(join(uri, LOG_FOLDER))
        if (found := COMMIT.fullmatch(stored.uri.rsplit("/", 1)[1]))
    }
    torn = []
    for version in sorted(commits, reverse=True):
        with suppress(FileNotFoundError):
            if _is_whole(uri, storage.read(commits[version])):
                break
            torn.append(version)
    return torn


def set_aside(storage: Storage, uri: str) -> list[str]:
    """Rename the incomplete commits of a table on a local disk, so that the next commit takes their place.

    Returns:
        The uris under their new names, which Delta ignores.
    """
    if not torn_commits(storage, uri):
        return []
    moved = []
    folder = Path(uri, LOG_FOLDER)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Another process may have set a commit aside and committed in its place meanwhile.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for version in torn_commits(storage, uri):
            name = f"{version:020}.json"
            place = folder / f".torn-{name}-{uuid.uuid4().hex}"
            (folder / name).rename(place)
            log.warning("%s: commit %d, which a power cut left incomplete, is set aside as %s", uri, version, place)
            moved.append(str(place))
        storage.flush(str(folder))
    finally:
        os.close(descriptor)
    return moved


@lru_cache
def _warn_once(uri: str, version: int) -> None:
    log.warning(
        "%s: a power cut left commit %d incomplete; the version before it is read; `marc repair` or the next "
        "publication sets it aside", uri, version,
    )  # fmt: skip


def _is_whole(uri: str, commit: bytes) -> bool:
    try:
        actions = [json.loads(line) for line in commit.splitlines()]
    except ValueError:
        return False
    if not actions:
        return False
    # The pipeline flushes the files of the feature table itself; those of the release log are written by delta-rs.
    written = [action["add"] for action in actions if "add" in action and not action["add"]["partitionValues"]]
    return all(_has_bytes(Path(uri, unquote(added["path"])), added["size"]) for added in written)


def _has_bytes(path: Path, size: int) -> bool:
    """Return whether a Parquet file has its size and its last bytes; a disk may keep the size alone."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, size - len(PARQUET_END)))
        return file.read() == PARQUET_END
    return False


def shorten_log(storage: Storage, table: DeltaTable, uri: str) -> None:
    """Write a checkpoint of the table, and delete commits that it makes unnecessary."""
    if is_s3(uri):
        table.create_checkpoint()
    else:
        _write_checkpoint(storage, uri)
    table.cleanup_metadata()


def _write_checkpoint(storage: Storage, uri: str) -> None:
    """Write a checkpoint that is whole whenever its name exists: delta-rs makes it from a copy of the log."""
    storage.flush(join(uri, LOG_FOLDER))
    with tempfile.TemporaryDirectory(prefix="marc-checkpoint-") as temporary:
        copy = Path(temporary, LOG_FOLDER)
        copy.mkdir()
        for stored in storage.list(join(uri, LOG_FOLDER)):
            # Not the files that other processes are writing.
            if KEPT.fullmatch(stored.uri.rsplit("/", 1)[1]):
                shutil.copy(stored.uri, copy)
        before = {path.name for path in copy.iterdir()}
        DeltaTable(temporary).create_checkpoint()
        made = [path for path in copy.iterdir() if path.name not in before]
        # The hint comes last, because it names the checkpoint.
        for path in sorted(made, key=lambda path: path.name == LAST_CHECKPOINT):
            storage.write(join(uri, LOG_FOLDER, path.name), path.read_bytes())


class _StoreError(OSError):
    """A temporary failure of the store."""


@contextmanager
def _store_errors() -> Iterator[None]:
    """Raise _StoreError for a failure of the store; let errors of the table and refusals (HTTP 4xx) pass."""
    try:
        yield
    except (DeltaError, OSError) as error:
        if STORE_FAILED not in str(error) or REFUSED.search(str(error)):
            raise
        raise _StoreError(str(error)) from error

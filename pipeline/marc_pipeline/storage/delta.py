"""Delta tables: open one, or create it, also when several runs create it at the same time."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from marc_pipeline.storage import Storage, require_no_credentials

# Errors of a commit: a conflict (CommitFailedError is a DeltaError) or a failure of the store, which delta-rs does not
# retry. The commit may have succeeded although its response was lost: reopen the table and check before a retry.
COMMIT_ERRORS = (DeltaError, OSError)
STORE_FAILED = "S3 error"
REFUSED = re.compile(r"status code\W.*?\b4\d\d\b", re.DOTALL)


def open_table(storage: Storage, uri: str) -> DeltaTable | None:
    """Return the table, or None if it does not exist."""
    require_no_credentials(uri)

    def opened() -> DeltaTable | None:
        with _store_errors():
            try:
                return DeltaTable(uri, storage_options=storage.delta_options())
            except TableNotFoundError:
                return None

    # delta-rs retries requests, but not a response that is cut off.
    return storage.repeated(uri, opened, on=(_StoreError,))


def open_or_create(
    storage: Storage, uri: str, schema: pa.Schema, *, name: str, partition_by: Sequence[str] = ()
) -> DeltaTable:
    """Return the table; create an empty one if it does not exist."""
    table = open_table(storage, uri)
    if table is not None:
        return table
    options = storage.delta_options()

    def created() -> DeltaTable:
        # If another run was faster, or the response was lost, the table exists. Opening it raises every other error.
        with suppress(DeltaError, OSError):
            DeltaTable.create(uri, schema=schema, name=name, partition_by=list(partition_by), storage_options=options)
        with _store_errors():
            try:
                return DeltaTable(uri, storage_options=options)
            except TableNotFoundError as error:
                raise _StoreError(f"the table could not be created: {error}") from error

    return storage.repeated(uri, created, on=(_StoreError,))


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

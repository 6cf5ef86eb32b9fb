"""Opening a Delta table, and making it where there is none, also when several runs do so at once."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from marc_pipeline.storage import Storage, require_bare

# What a commit may fail with: a rival (CommitFailedError is a DeltaError) or the store. It may have been made
# nevertheless, its answer being lost; delta-rs does not repeat it. Open the table anew and look before repeating it.
COMMIT_ERRORS = (DeltaError, OSError)
STORE_FAILED = "S3 error"
REFUSED = re.compile(r"status code\W.*?\b4\d\d\b", re.DOTALL)


def open_table(storage: Storage, uri: str) -> DeltaTable | None:
    """The table, or None where there is none."""
    require_bare(uri)

    def opened() -> DeltaTable | None:
        with _store_errors():
            try:
                return DeltaTable(uri, storage_options=storage.delta_options())
            except TableNotFoundError:
                return None

    # delta-rs repeats requests, not what breaks off after the answer has begun.
    return storage.repeated(uri, opened, on=(_StoreError,))


def open_or_create(
    storage: Storage, uri: str, schema: pa.Schema, *, name: str, partition_by: Sequence[str] = ()
) -> DeltaTable:
    """The table; an empty one is made first where there is none."""
    table = open_table(storage, uri)
    if table is not None:
        return table
    options = storage.delta_options()

    def made() -> DeltaTable:
        # A rival may be faster, or the answer be lost: then the table is there. Anything else is raised by opening it.
        with suppress(DeltaError, OSError):
            DeltaTable.create(uri, schema=schema, name=name, partition_by=list(partition_by), storage_options=options)
        with _store_errors():
            try:
                return DeltaTable(uri, storage_options=options)
            except TableNotFoundError as error:
                raise _StoreError(f"the table could not be made: {error}") from error

    return storage.repeated(uri, made, on=(_StoreError,))


class _StoreError(OSError):
    """The store's error, which may pass."""


@contextmanager
def _store_errors() -> Iterator[None]:
    """Tell the store's errors, which delta-rs raises as OSError or DeltaError, from those of the table and refusals."""
    try:
        yield
    except (DeltaError, OSError) as error:
        if STORE_FAILED not in str(error) or REFUSED.search(str(error)):
            raise
        raise _StoreError(str(error)) from error

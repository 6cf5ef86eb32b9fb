"""Opening a Delta table, and making it where there is none, also when several runs do so at once."""

from collections.abc import Sequence
from contextlib import suppress

import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from pipeline.storage import Storage


def open_table(storage: Storage, uri: str) -> DeltaTable | None:
    """The table, or None where there is none."""
    try:
        return DeltaTable(uri, storage_options=storage.delta_options())
    except TableNotFoundError:
        return None


def open_or_create(
    storage: Storage, uri: str, schema: pa.Schema, *, name: str, partition_by: Sequence[str] = ()
) -> DeltaTable:
    """The table; an empty one is made first where there is none."""
    table = open_table(storage, uri)
    if table is not None:
        return table
    options = storage.delta_options()
    # A rival may be faster: then its table is there. Anything else is raised by opening it.
    with suppress(CommitFailedError, DeltaError):
        DeltaTable.create(uri, schema=schema, name=name, partition_by=list(partition_by), storage_options=options)
    return DeltaTable(uri, storage_options=options)

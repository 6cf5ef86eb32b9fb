"""What the plan makes of a catalogue: planned items per bucket, and the quarantine."""

from enum import StrEnum

import pyarrow as pa


class Change(StrEnum):
    """How an item stands against the release that a plan was compared with."""

    NEW = "new"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


class Reason(StrEnum):
    """Why a catalogue row is not in the table."""

    MALFORMED = "malformed"  # the record itself cannot be parsed
    NULL_ID = "null_id"  # no id, or a blank one
    UNDECODABLE = "undecodable"  # bytes that are no UTF-8 in the id or the text
    EMPTY_TEXT = "empty_text"  # every column of the template is null or blank
    OLDER_DUPLICATE = "older_duplicate"  # another row of the same id is newer
    ROW_ID_COLLISION = "row_id_collision"  # a different id hashes to the same 63 bits
    UNENCODABLE = "unencodable"  # the tokenizer or the model fails on the text, also alone; or gives NaN


ITEMS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("row_id", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("change", pa.string(), nullable=False),
    ]
)
"""Items of one planned bucket, sorted by item_id."""

QUARANTINE = pa.schema(
    [
        pa.field("item_id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),  # the row as JSON, or the raw record
        pa.field("source", pa.string(), nullable=False),  # file it came from
    ]
)
"""Rows that could not be used, each with its reason."""

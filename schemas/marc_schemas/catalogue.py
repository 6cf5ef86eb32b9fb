"""Result of planning a catalogue: items of each bucket, and quarantined rows."""

from enum import StrEnum

import pyarrow as pa

CLEANING_RULES = 1
"""Version of the rules that clean a catalogue's texts. Increase it when any text gets another result."""


class Change(StrEnum):
    """State of an item compared with the base release."""

    NEW = "new"
    CHANGED = "changed"
    UNCHANGED = "unchanged"


class Reason(StrEnum):
    """Reason for which a catalogue row is quarantined."""

    MALFORMED = "malformed"  # the record cannot be parsed
    NULL_ID = "null_id"  # the id is missing or blank
    UNDECODABLE = "undecodable"  # the id or the text is not valid UTF-8
    EMPTY_TEXT = "empty_text"  # every column of the template is null, blank, or only markup
    OLDER_DUPLICATE = "older_duplicate"  # a newer row has the same id
    ROW_ID_COLLISION = "row_id_collision"  # a different id has the same 63-bit hash
    UNENCODABLE = "unencodable"  # tokenizer or model fails on the text alone, or returns NaN


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
        pa.field("source", pa.string(), nullable=False),  # name of the file
    ]
)
"""Quarantined rows, each with its reason."""

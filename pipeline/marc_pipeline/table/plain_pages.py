"""Offsets of uncompressed values in a Parquet file, so that one row can be read by its number.

pyarrow can only read whole row groups. A column chunk with one plain, uncompressed page ends with its values in row
order, after the page header and the levels (Parquet's specification). This module therefore computes the offsets.
"""

from collections.abc import Callable

import pyarrow.parquet as pq

HEADER_BYTES = 1024
LEVELS_PREFIX = 4
DATA_PAGE, PLAIN = 0, 0
# Thrift's compact protocol: types of fields.
TRUE, FALSE, BYTE, I16, I64, BINARY, STRUCT = 1, 2, 3, 4, 6, 8, 12

Read = Callable[[int, int], memoryview]
Fields = dict[int, "int | Fields"]


def values_start(metadata: pq.FileMetaData, group: int, column: int, *, row_bytes: int, read: Read) -> int | None:
    """Return the file offset of a column's first value in a row group; None for any other layout.

    The layout is checked: one uncompressed page fills the chunk, its values are plain, none is missing, and their size
    is ``row_bytes`` per row. ``column`` is the number of a leaf; ``read`` returns the bytes between two offsets.
    """
    chunk, leaf = metadata.row_group(group).column(column), metadata.schema.column(column)
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
        return None
    start, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    try:
        header, size = _fields(bytes(read(start, min(start + HEADER_BYTES, end))), 0)
    except (IndexError, ValueError):
        return None
    page = header.get(5)
    if not isinstance(page, dict) or (header.get(1), page.get(1), page.get(2)) != (DATA_PAGE, chunk.num_values, PLAIN):
        return None
    values = start + size
    for levels in (leaf.max_repetition_level, leaf.max_definition_level):
        if levels and values + LEVELS_PREFIX <= end:
            values += LEVELS_PREFIX + int.from_bytes(read(values, values + LEVELS_PREFIX), "little")
    # A missing value, an empty list or a second page would change the size.
    return values if end - values == metadata.row_group(group).num_rows * row_bytes else None


def _fields(data: bytes, at: int) -> tuple[Fields, int]:
    """Parse a struct in Thrift's compact protocol: return its integers by field number, and the offset of its end.

    Raises:
        ValueError: a field has a type that page headers do not use.
        IndexError: the struct is cut off.
    """
    found: Fields = {}
    number = 0
    while head := data[at]:
        at += 1
        if step := head >> 4:
            number += step
        else:
            number, at = _signed(data, at)
        kind = head & 0x0F
        if kind in {TRUE, FALSE}:
            found[number] = int(kind == TRUE)
        elif kind == BYTE:
            found[number], at = data[at], at + 1
        elif I16 <= kind <= I64:
            found[number], at = _signed(data, at)
        elif kind == BINARY:
            length, at = _unsigned(data, at)
            at += length
        elif kind == STRUCT:
            found[number], at = _fields(data, at)
        else:
            raise ValueError(f"a field of type {kind}")
    return found, at + 1


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _signed(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at

"""CSV and JSON lines, record by record: no byte of a file is dropped, what is no record is malformed.

Values stay bytes. Whether they are UTF-8 is asked where the rows of all formats are, and nothing is altered before.
"""

import gzip
import io
import json
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import IO, Literal

import pyarrow as pa

from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage

HEAD_BYTES = 1024 * 1024
SAMPLED_LINES = 1000
BUFFER_BYTES = 4 * 1024 * 1024
PIECE_BYTES = 16 * 1024 * 1024
BATCH_BYTES = 16 * 1024 * 1024
BATCH_RECORDS = 2000
QUOTED_BYTES = 64 * 1024 * 1024
"""A quoted CSV field that goes on for longer was not closed."""

BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
INSIDE_QUOTES = re.compile(rb'(?:[^"]++|""|"(?![ \t]*+(?:,|\r?\n?\Z)))*+')
# The same where a doubled quote may be one of text and the one that ends the field: exporters write such lines.
INSIDE_ODD_QUOTES = re.compile(rb'(?:[^"]++|"(?![ \t]*+(?:,|\r?\n?\Z)))*+')
CLOSING_QUOTE = re.compile(rb'"[ \t]*+')
BLANK_LINE = b" \t\r\n"
# What follows the columns in a batch; no catalogue has columns of these names.
MALFORMED, RECORD, SOURCE = "_malformed_", "_record_", "_source_"

LineEnd = Literal["\n", "\r"]
Values = Sequence[bytes | None]
Record = tuple[Values | None, bytes | None]
"""Values of a record, None where it is malformed, and its bytes where the values do not tell all of them."""


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin at one of the bytes from ``start`` to before ``end``."""

    uri: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class TextFormat:
    """How the files of a group are read: their columns in order, and what ends a line."""

    form: Literal["csv", "jsonl"]
    columns: tuple[str, ...]
    line_end: LineEnd

    def pieces(self, uri: str, size: int) -> list[Piece]:
        """What of a file can be read on its own: JSON lines can be cut anywhere, a quoted CSV field may hold lines."""
        if self.form == "csv" or self.line_end == "\r" or _is_gzipped(uri):
            return [Piece(uri)]
        return [Piece(uri, start, start + PIECE_BYTES) for start in range(0, size, PIECE_BYTES)]

    def records(self, lines: Iterator[bytes]) -> Iterator[Record]:
        """Every record of a file's lines."""
        if self.form == "csv":
            found = csv_records(lines)
            next(found, None)  # the header
            for fields, record in found:
                good = fields is not None and len(fields) == len(self.columns)
                yield (fields, None) if good else (None, record)
            return
        for line in lines:
            record = _without_end(line).removeprefix(BOM)
            if record.strip(BLANK_LINE):
                yield _json_values(record, self.columns), record


def find_format(form: Literal["csv", "jsonl"], uri: str, storage: Storage) -> TextFormat:
    """What the beginning of a file says: the columns of its header, or of its first JSON objects.

    Raises:
        UserError: the file is UTF-16 or no gzip file, a name is there twice, a quote in the header is not closed.
    """
    with _opened(uri, storage) as stream:
        head = read = stream.read(HEAD_BYTES)
        # The first record may be longer than the rest of them.
        while read and not re.search(rb"[\r\n]", read):
            read = stream.read(HEAD_BYTES)
            head += read
    if head.startswith(UTF16_MARKS):
        raise UserError(f"{uri} is UTF-16; only UTF-8 is read")
    line_end: LineEnd = "\r" if b"\r" in head[:-1] and b"\n" not in head else "\n"
    lines = _lines(io.BytesIO(head), line_end)
    names = _csv_columns(lines, uri) if form == "csv" else _json_columns(lines)
    return TextFormat(form, tuple(names), line_end)


def refuse_doubled(names: Sequence[str], uri: str) -> None:
    """Raise UserError where a name is there more than once."""
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(f"{uri} has column {doubled[0]!r} more than once")


def _csv_columns(lines: Iterator[bytes], uri: str) -> list[str]:
    fields, record = next(csv_records(lines), ([], b""))
    if fields is None:
        raise UserError(f"{uri} has a header with a quote that is never closed: {record[:80]!a}")
    names = [field.decode(errors="replace") for field in fields]
    refuse_doubled(names, uri)
    return names


def _json_columns(lines: Iterator[bytes]) -> list[str]:
    records = (_json_record(line) for line in islice(lines, SAMPLED_LINES))
    return list(dict.fromkeys(name for record in records for name in record or ()))


def _is_gzipped(uri: str) -> bool:
    """Whether the name of a file says that it is compressed."""
    return uri.lower().endswith(".gz")


@contextmanager
def _opened(uri: str, storage: Storage) -> Iterator[IO[bytes]]:
    """The content of a file, decompressed.

    Raises:
        UserError: the file is gone, or no gzip file although its name says so.
    """
    filesystem, path = storage.filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            content = gzip.GzipFile(fileobj=file) if _is_gzipped(uri) else file
            yield io.BufferedReader(content, BUFFER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{uri} is gone, or cannot be seen from every machine") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{uri} is no gzip file, or a damaged one: {error}") from None


def _lines(stream: IO[bytes], line_end: str) -> Iterator[bytes]:
    """Lines with what ends them, a byte order mark at the front left out."""
    if line_end == "\r":
        # One character per byte and back: the only reader of the standard library that can end lines there.
        wrapped = io.TextIOWrapper(stream, "latin-1", newline=line_end)
        lines: Iterator[bytes] = (line.encode("latin-1") for line in wrapped)
    else:
        lines = iter(stream)
    first = next(lines, b"").removeprefix(BOM)
    if first:
        yield first
    yield from lines


def batch_reader(
    text: TextFormat, pieces: Sequence[Piece], storage: Storage
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """A function for Spark's Python workers: numbers of pieces in, their records out.

    The columns that come out are those of the format, whether the record is malformed, its bytes, name of the file.
    """

    def read(numbers: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in numbers:
            for number in batch.column(0).to_pylist():
                yield from _batches(text, pieces[number], storage)

    return read


def _batches(text: TextFormat, piece: Piece, storage: Storage) -> Iterator[pa.RecordBatch]:
    source = piece.uri.rsplit("/", 1)[1]
    rows: list[Record] = []
    size = 0
    with _opened(piece.uri, storage) as stream:
        for values, record in text.records(_piece_lines(stream, piece, text.line_end)):
            rows.append((values, record))
            size += len(record or b"") + sum(map(len, filter(None, values or ())))
            if len(rows) == BATCH_RECORDS or size > BATCH_BYTES:
                yield _batch(rows, text, source)
                rows, size = [], 0
    if rows:
        yield _batch(rows, text, source)


def _piece_lines(stream: IO[bytes], piece: Piece, line_end: str) -> Iterator[bytes]:
    if piece.end is None:
        yield from _lines(stream, line_end)
        return
    position = piece.start
    if position:
        # The line that the byte before belongs to is the previous piece's.
        stream.seek(position - 1)
        position += len(stream.readline()) - 1
    for line in stream:
        if position >= piece.end:
            return
        position += len(line)
        yield line


def _batch(rows: Sequence[Record], text: TextFormat, source: str) -> pa.RecordBatch:
    nothing = (None,) * len(text.columns)
    values = zip(*(nothing if found is None else found for found, _ in rows), strict=True)
    arrays = [pa.array(column, pa.binary()) for column in values]
    arrays.append(pa.array([found is None for found, _ in rows]))
    arrays.append(pa.array([record for _, record in rows], pa.binary()))
    arrays.append(pa.array([source] * len(rows)))
    # Spark goes by place; a name of the catalogue may be any.
    return pa.RecordBatch.from_arrays(arrays, names=[*text.columns, MALFORMED, RECORD, SOURCE])


def _object(members: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("a name is there twice")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=str, parse_float=str, parse_constant=str)


def _json_record(line: bytes) -> dict[str, object] | None:
    """The JSON object that the bytes are, and nothing else, every name in it once; numbers as they are written.

    What is no UTF-8, in bytes or as half of an escaped surrogate pair, stays a lone surrogate.
    """
    try:
        found = JSON.decode(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _json_values(line: bytes, columns: Sequence[str]) -> Values | None:
    found = _json_record(line)
    try:
        return None if found is None else [_json_text(found.get(name)) for name in columns]
    except TypeError:
        return None


def _json_text(value: object) -> bytes | None:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    if value is None:
        return None
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, list) and not any(isinstance(item, list | dict) for item in value):
        return b", ".join(text for item in value if (text := _json_text(item)) is not None)
    raise TypeError("an object, or a list of more than texts and numbers, is no text")


def csv_records(lines: Iterator[bytes]) -> Iterator[tuple[list[bytes] | None, bytes]]:
    """Fields of every record and its bytes; no fields where a quote was not closed.

    A quote ends a field only before a comma or the end of a line: any other is text, doubled or not. But a field of
    several lines with a quote that is not doubled shows, as the end of the file does, that a quote was never closed:
    then the first line alone is a record, malformed unless a doubled quote in it was meant to end a field, and what
    follows is read as if the line were not there.
    """
    again: deque[bytes] = deque()

    def next_line() -> bytes:
        return again.popleft() if again else next(lines, b"")

    while line := next_line():
        if b'"' not in line:
            if record := _without_end(line):
                yield record.split(b","), record
            continue
        taken = [line]
        fields = _quoted_fields(taken, next_line)
        if fields is None:
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            fields = _quoted_fields(taken, lambda: b"", inside_quotes=INSIDE_ODD_QUOTES)
        yield fields, _without_end(b"".join(taken))


def _quoted_fields(
    taken: list[bytes], next_line: Callable[[], bytes], *, inside_quotes: re.Pattern[bytes] = INSIDE_QUOTES
) -> list[bytes] | None:
    """Fields of a record that begins with the line taken; lines that it goes on with are taken, too."""
    fields = []
    position = 0
    while True:
        if taken[-1].startswith(b'"', position):
            field = _quoted_field(taken, position + 1, next_line, inside_quotes)
            if field is None:
                return None
            text, position = field
        else:
            comma = taken[-1].find(b",", position)
            text = taken[-1][position:comma] if comma >= 0 else _without_end(taken[-1][position:])
            position += len(text)
        fields.append(text)
        if not taken[-1].startswith(b",", position):
            return fields
        position += 1


def _quoted_field(
    taken: list[bytes], position: int, next_line: Callable[[], bytes], inside_quotes: re.Pattern[bytes]
) -> tuple[bytes, int] | None:
    """Text of a quoted field and the place behind it, in the last of the lines taken; None if it is not closed."""
    parts: list[bytes] = []
    size, is_stray = 0, False
    while inside := inside_quotes.match(taken[-1], position):
        parts.append(inside[0])
        size += len(inside[0])
        is_stray = is_stray or b'"' in inside[0].replace(b'""', b"")
        if is_stray and len(parts) > 1:
            break
        if closing := CLOSING_QUOTE.match(taken[-1], inside.end()):
            return b"".join(parts).replace(b'""', b'"'), closing.end()
        if size > QUOTED_BYTES or not (line := next_line()):
            break
        taken.append(line)
        position = 0
    return None


def _without_end(line: bytes) -> bytes:
    return line.removesuffix(b"\n").removesuffix(b"\r")

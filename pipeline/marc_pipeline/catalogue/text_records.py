"""Parser of CSV and JSON lines. Every byte of a file belongs to a record; an unparsable record is malformed.

Values stay bytes, unchanged; :mod:`marc_pipeline.catalogue.rows` checks the UTF-8 of all formats. The parser is our
own, because library parsers drop or repair malformed records, and the quarantine needs their exact bytes.
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
"""Longest quoted CSV field in bytes; a longer field counts as unclosed."""

BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
INSIDE_QUOTES = re.compile(rb'(?:[^"]++|""|"(?![ \t]*+(?:,|\r?\n?\Z)))*+')
# The same for exporters that do not double quotes: a doubled quote may be a quote of the text and the closing quote.
INSIDE_ODD_QUOTES = re.compile(rb'(?:[^"]++|"(?![ \t]*+(?:,|\r?\n?\Z)))*+')
CLOSING_QUOTE = re.compile(rb'"[ \t]*+')
BLANK_LINE = b" \t\r\n"

LineEnd = Literal["\n", "\r"]
Values = Sequence[bytes | None]
Record = tuple[Values | None, bytes | None]
"""Values of a record, None if it is malformed; and its bytes, None if the values contain all of them."""


@dataclass(frozen=True)
class Piece:
    """The lines of a file that begin at a byte in [``start``, ``end``)."""

    uri: str
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class TextFormat:
    """Format of the files of a group: columns in order, and the line end."""

    form: Literal["csv", "jsonl"]
    columns: tuple[str, ...]
    line_end: LineEnd

    def pieces(self, uri: str, size: int) -> list[Piece]:
        """Split a file into pieces for tasks. CSV is not split, because a quoted field may contain line ends."""
        if self.form == "csv" or self.line_end == "\r" or _is_gzipped(uri):
            return [Piece(uri)]
        return [Piece(uri, start, start + PIECE_BYTES) for start in range(0, size, PIECE_BYTES)]

    def records(self, lines: Iterator[bytes]) -> Iterator[Record]:
        """Parse the lines of a file into records."""
        if self.form == "csv":
            for fields, record in islice(csv_records(lines), 1, None):  # without the header
                good = fields is not None and len(fields) == len(self.columns)
                yield (fields, None) if good else (None, record)
            return
        for line in lines:
            record = _without_end(line).removeprefix(BOM)
            if record.strip(BLANK_LINE):
                yield _json_values(record, self.columns), record


def find_format(form: Literal["csv", "jsonl"], uri: str, storage: Storage) -> TextFormat:
    """Read the format from the beginning of a file: the columns of its header, or of its first JSON objects.

    Raises:
        UserError: the file is UTF-16, gzip is damaged, a column is duplicated or a quote of the header is unclosed.
    """
    with _opened(uri, storage) as stream:
        head = read = stream.read(HEAD_BYTES)
        # The first record may be longer than HEAD_BYTES.
        while read and not re.search(rb"[\r\n]", read):
            read = stream.read(HEAD_BYTES)
            head += read
    if head.startswith(UTF16_MARKS):
        raise UserError(f"{uri} is UTF-16; export it as UTF-8")
    line_end: LineEnd = "\r" if b"\r" in head[:-1] and b"\n" not in head else "\n"
    lines = _lines(io.BytesIO(head), line_end)
    names = _csv_columns(lines, uri) if form == "csv" else _json_columns(lines)
    return TextFormat(form, tuple(names), line_end)


def refuse_doubled(names: Sequence[str], uri: str) -> None:
    """Raise UserError if a column name occurs more than once."""
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
    return uri.lower().endswith(".gz")


@contextmanager
def _opened(uri: str, storage: Storage) -> Iterator[IO[bytes]]:
    """Open a file, decompressed if its name ends in ``.gz``; a missing or damaged file is a UserError."""
    filesystem, path = storage.filesystem(uri)
    try:
        with filesystem.open_input_file(path) as file:
            content = gzip.GzipFile(fileobj=file) if _is_gzipped(uri) else file
            yield io.BufferedReader(content, BUFFER_BYTES)
    except FileNotFoundError:
        raise UserError(f"{uri} is missing, or not every machine can read it; use a shared path or S3") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{uri} is not a gzip file, or is damaged: {error}") from None


def _lines(stream: IO[bytes], line_end: str) -> Iterator[bytes]:
    """Yield lines with their line ends, without a byte order mark at the front."""
    if line_end == "\r":
        # Only text streams can end lines at \r; Latin-1 maps every byte to one character and back.
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
    """Return a function for ``mapInArrow``: batches of piece numbers in, batches of records out.

    Columns of the output: the values, whether the record is malformed, its bytes, and the name of the file.
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
        # The line with the byte before belongs to the previous piece.
        stream.seek(position - 1)
        position += len(stream.readline()) - 1
    for line in stream:
        if position >= piece.end:
            return
        position += len(line)
        yield line


def _batch(rows: Sequence[Record], text: TextFormat, source: str) -> pa.RecordBatch:
    empty = (None,) * len(text.columns)
    values = zip(*(empty if found is None else found for found, _ in rows), strict=True)
    arrays = [pa.array(column, pa.binary()) for column in values]
    arrays.append(pa.array([found is None for found, _ in rows]))
    arrays.append(pa.array([record for _, record in rows], pa.binary()))
    arrays.append(pa.array([source] * len(rows)))
    # Spark matches the columns by position, and fails if a name of the catalogue is one of ours.
    return pa.RecordBatch.from_arrays(arrays, names=[str(number) for number in range(len(arrays))])


def _object(members: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(members)
    if len(found) < len(members):
        raise ValueError("duplicate name")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_object, parse_int=str, parse_float=str, parse_constant=str)


def _json_record(line: bytes) -> dict[str, object] | None:
    """Parse a line that is one JSON object without duplicate names; None for any other line.

    Numbers stay as they are written. Bytes that are not UTF-8, and unpaired escapes, become lone surrogates.
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
    raise TypeError("an object or a nested list cannot become text")


def csv_records(lines: Iterator[bytes]) -> Iterator[tuple[list[bytes] | None, bytes]]:
    """Yield the fields of every record and its bytes; the fields are None if a quote is unclosed.

    A quote closes a field only before a comma or a line end; any other quote is text. A quote counts as unclosed when
    the file ends first, or when a field of several lines contains a quote that is not doubled. Then the first line
    alone is the record, and parsing continues with the next line. That record is malformed, unless its doubled quotes
    can also be read as a quote of the text and the closing quote.
    """
    pushed_back: deque[bytes] = deque()

    def next_line() -> bytes:
        return pushed_back.popleft() if pushed_back else next(lines, b"")

    while line := next_line():
        if b'"' not in line:
            if record := _without_end(line):
                yield record.split(b","), record
            continue
        taken = [line]
        fields = _quoted_fields(taken, next_line)
        if fields is None:
            pushed_back.extendleft(reversed(taken[1:]))
            del taken[1:]
            fields = _quoted_fields(taken, lambda: b"", inside_quotes=INSIDE_ODD_QUOTES)
        yield fields, _without_end(b"".join(taken))


def _quoted_fields(
    taken: list[bytes], next_line: Callable[[], bytes], *, inside_quotes: re.Pattern[bytes] = INSIDE_QUOTES
) -> list[bytes] | None:
    """Return the fields of the record that begins with the only line of ``taken``; append its other lines to it."""
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
    """Return the text of a quoted field and the position after it in the last line taken; None if unclosed."""
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

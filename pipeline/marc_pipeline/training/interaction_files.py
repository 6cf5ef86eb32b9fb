"""Files of interactions: find them, tell their format and columns, and read Parquet or CSV in batches."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.catalogue.source import ENDINGS, matching_files
from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, StoredObject
from marc_pipeline.training.interaction_columns import MESSAGE_CHARS, TEXT, InteractionColumn, decoded, one_line

Format = Literal["parquet", "csv"]
BROKEN_GZIP = ("zlib", "Truncated compressed stream")
RATING = "rating"
"""Column that counts as the rating if no column is configured."""
# Rows of Parquet and bytes of CSV per batch. A row of CSV must fit into one batch; Arrow reads up to 32 batches ahead.
BATCH_ROWS, BATCH_BYTES = 1 << 17, 1 << 21
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class InteractionFiles:
    """The files of interactions, none with 0 bytes.

    Attributes:
        uri: where they were found.
        form: format of all files.
        files: the files.
        columns: name of the column by setting, for the columns to read; without ``rating_column``, every row is a
            positive.
    """

    uri: str
    form: Format
    files: tuple[StoredObject, ...]
    columns: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """Return the size of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True)
class InteractionBatch:
    """Consecutive rows of one file, checked.

    Attributes:
        before: number of rows of the file before these.
        users, items: ids as text.
        times: int64 [n], microseconds since 1970, or numbers of a unit that the whole file tells.
        numeric: whether ``times`` are such numbers.
        ratings: numbers or booleans [n]; None if every row is a positive.
        kinds: kinds of events; None without ``event_column``.
        texts: texts about users; None without ``user_text_column``.
    """

    before: int
    users: pa.ChunkedArray
    items: pa.ChunkedArray
    times: NDArray[np.int64]
    numeric: bool
    ratings: NDArray[Any] | None
    kinds: pa.ChunkedArray | None
    texts: pa.ChunkedArray | None


def find_interactions(storage: Storage, settings: InteractionSettings) -> InteractionFiles:
    """Return the files of interactions and their columns. Reads the header of every file, and no row.

    Raises:
        UserError: ``interactions.uri`` is not set, names no file or only empty ones; or a column is missing.
    """
    if settings.uri is None:
        raise UserError("interactions.uri is not set; name Parquet or CSV files of user, item and timestamp")
    found = matching_files(settings.uri, storage)
    if not found:
        raise UserError(f"interactions.uri: there is no file at {settings.uri}; name a file, a folder or a glob")
    form = _format(settings.format, found)
    files = tuple(stored for stored in found if stored.bytes)
    if not files:
        raise no_rows(settings.uri)
    headers = {file.uri: _header(form, file.uri, storage) for file in files}
    columns = _columns(settings, headers)
    for uri, header in headers.items():
        _require_columns(columns, header, uri)
    if settings.feedback == "positives":
        columns.pop("rating_column", None)
    return InteractionFiles(settings.uri, form, files, columns)


def no_rows(uri: str) -> UserError:
    """Return the error for files without a row."""
    return UserError(f"the interactions at {uri} are empty: no file has a row; at least one is needed")


def read_batches(files: InteractionFiles, uri: str, storage: Storage) -> Iterator[InteractionBatch]:
    """Yield the rows of one file in batches, so that memory does not depend on the size of the file.

    Raises:
        UserError: the file or a value cannot be read.
    """
    names, before = files.columns, 0
    for table in (_parquet_tables if files.form == "parquet" else _csv_tables)(uri, names, storage):
        if table.num_rows:
            yield _batch(table, names, uri, before)
            before += table.num_rows


def _batch(table: pa.Table, names: Mapping[str, str], uri: str, before: int) -> InteractionBatch:
    columns = {key: InteractionColumn(key, name, uri, decoded(table[name]), before) for key, name in names.items()}
    users, items = columns["user_column"].ids(), columns["item_column"].ids()
    ratings = columns["rating_column"].ratings() if "rating_column" in columns else None
    times, numeric = columns["timestamp_column"].moments()
    kinds = columns["event_column"].kinds() if "event_column" in columns else None
    texts = columns["user_text_column"].values.cast(TEXT) if "user_text_column" in columns else None
    return InteractionBatch(before, users, items, times, numeric, ratings, kinds, texts)


def _columns(settings: InteractionSettings, headers: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the configured columns, and the column ``rating`` if it was not configured and the files have it."""
    keys = ("user_column", "item_column", "rating_column", "timestamp_column", "event_column", "user_text_column")
    names = {key: getattr(settings, key) for key in keys if getattr(settings, key)}
    if settings.rating_column or settings.event_column or settings.feedback == "positives":
        return names
    rated = [uri for uri, header in headers.items() if RATING in header]
    if settings.feedback == "ratings" or len(rated) == len(headers):
        return {**names, "rating_column": RATING}
    if rated:
        other = next(uri for uri in headers if uri not in rated)
        raise UserError(
            f"{rated[0]} has a column {RATING!r} and {other} has none; add it, or set interactions.feedback: positives "
            "to count every row as a positive"
        )
    return names


def _format(wanted: str, found: Sequence[StoredObject]) -> Format:
    forms = {next((f for end, f in ENDINGS.items() if o.uri.lower().endswith(end)), None) for o in found}
    for form in ("parquet", "csv"):
        if wanted == form or (wanted not in {"parquet", "csv"} and forms == {form}):
            return form
    raise UserError(f"cannot tell the format of {found[0].uri}; set interactions.format to parquet or csv")


def _header(form: Format, uri: str, storage: Storage) -> list[str]:
    filesystem, path = storage.filesystem(uri)
    if form == "parquet":
        with _reported(uri, "a readable Parquet file"), pq.ParquetFile(path, filesystem=filesystem) as file:
            names: list[str] = file.schema_arrow.names
            return names
    with (
        _reported(uri, "a readable CSV file in UTF-8"),
        filesystem.open_input_stream(path, compression=_compression(uri)) as stream,
    ):
        records = csv.reader(line.decode("utf-8-sig") for line in io.BufferedReader(stream))
        return next(filter(None, records), [])


def _parquet_tables(uri: str, names: Mapping[str, str], storage: Storage) -> Iterator[pa.Table]:
    filesystem, path = storage.filesystem(uri)
    with (
        _reported(uri, "a readable Parquet file"),
        # Buffered, because a column of a row group may be larger than memory. A dataset would add columns for folders
        # such as ds=2026-11-20.
        pq.ParquetFile(path, filesystem=filesystem, buffer_size=BUFFER_BYTES, pre_buffer=False) as file,
    ):
        for batch in file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(names.values()))):
            yield pa.Table.from_batches([batch])


def _csv_tables(uri: str, names: Mapping[str, str], storage: Storage) -> Iterator[pa.Table]:
    filesystem, path = storage.filesystem(uri)
    # Every column is read as text: a type guessed from the values would turn the id 01 into 1.
    wanted = dict.fromkeys(names.values(), TEXT)
    with _reported(uri, "a readable CSV file in UTF-8"):
        reader = pacsv.open_csv(
            # Arrow closes this stream: its thread reads on after an error, and would read from the next file that is
            # opened with the same number.
            filesystem.open_input_stream(path, compression=_compression(uri)),
            read_options=pacsv.ReadOptions(block_size=BATCH_BYTES, use_threads=False),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(include_columns=list(wanted), column_types=wanted),
        )
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _compression(uri: str) -> str | None:
    return "gzip" if uri.lower().endswith(".gz") else None


@contextmanager
def _reported(uri: str, wanted: str) -> Iterator[None]:
    """Turn errors of Arrow and Python about the content of a file into errors of the user."""
    try:
        yield
    except (pa.ArrowInvalid, UnicodeError, csv.Error) as error:
        raise UserError(f"{uri} is not {wanted}: {one_line(str(error))[:MESSAGE_CHARS]}") from None
    except OSError as error:
        # A retry may cure any other error of the file system.
        if not str(error).startswith(BROKEN_GZIP):
            raise
        raise UserError(f"{uri} is not a complete gzip file: {one_line(str(error))[:MESSAGE_CHARS]}") from None


def _require_columns(names: Mapping[str, str], have: Sequence[str], uri: str) -> None:
    for setting, name in names.items():
        if name not in have:
            listed = one_line(", ".join(have)) or "no columns"
            raise UserError(
                f"interactions.{setting} names column {name!r}, which {uri} does not have (it has: {listed})"
            )
        if have.count(name) > 1:
            raise UserError(f"interactions.{setting} names column {name!r}, which {uri} has more than once")

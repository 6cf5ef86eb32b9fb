"""Files of interactions: find them, tell their format, and read Parquet or CSV into one table."""

import csv
import io
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from marc_pipeline.catalogue.source import ENDINGS, matching_files
from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, StoredObject
from marc_pipeline.training.interaction_columns import MESSAGE_CHARS, TEXT, InteractionColumn, decoded, one_line

Format = Literal["parquet", "csv"]
BROKEN_GZIP = ("zlib", "Truncated compressed stream")
EMPTY = pa.schema(
    {"user": TEXT, "item": TEXT, "label": pa.float32(), "time": pa.int64(), "profile": TEXT}
).empty_table()
"""The columns of every table of interactions."""


def find_interactions(storage: Storage, settings: InteractionSettings) -> list[StoredObject]:
    """Return the files of interactions.

    Raises:
        UserError: ``interactions.uri`` is not set, or names no file.
    """
    if settings.uri is None:
        raise UserError("interactions.uri is not set; name Parquet or CSV files of user, item, rating and timestamp")
    found = matching_files(settings.uri, storage)
    if not found:
        raise UserError(f"interactions.uri: there is no file at {settings.uri}; name a file, a folder or a glob")
    return found


def read_files(storage: Storage, settings: InteractionSettings) -> pa.Table:
    """Return the interactions of all files, in the columns of ``EMPTY``.

    Raises:
        UserError: a file or a value cannot be read, or there is no row.
    """
    found = find_interactions(storage, settings)
    form = _format(settings.format, found)
    tables = [_read_file(form, stored.uri, settings, storage) for stored in found if stored.bytes]
    table = pa.concat_tables([EMPTY, *tables])
    if not table.num_rows:
        raise UserError(f"the interactions at {settings.uri} are empty: no file has a row; at least one is needed")
    return table


def _format(wanted: str, found: Sequence[StoredObject]) -> Format:
    forms = {next((f for end, f in ENDINGS.items() if o.uri.lower().endswith(end)), None) for o in found}
    for form in ("parquet", "csv"):
        if wanted == form or (wanted not in {"parquet", "csv"} and forms == {form}):
            return form
    raise UserError(f"cannot tell the format of {found[0].uri}; set interactions.format to parquet or csv")


def _read_file(form: Format, uri: str, settings: InteractionSettings, storage: Storage) -> pa.Table:
    names = {
        setting: getattr(settings, setting)
        for setting in ("user_column", "item_column", "rating_column", "timestamp_column", "user_text_column")
        if getattr(settings, setting)
    }
    table = _read_parquet(uri, names, storage) if form == "parquet" else _read_csv(uri, names, storage)
    if not table.num_rows:
        return EMPTY
    user, item, rating, time, *text = (
        InteractionColumn(key, name, uri, decoded(table[name])) for key, name in names.items()
    )
    return pa.table(
        {
            "user": user.ids(),
            "item": item.ids(),
            "label": rating.labels(settings.positive_rating),
            "time": time.micros(),
            "profile": text[0].values.cast(TEXT) if text else pa.nulls(table.num_rows, TEXT),
        }
    )


def _read_parquet(uri: str, names: dict[str, str], storage: Storage) -> pa.Table:
    filesystem, path = storage.filesystem(uri)
    try:
        # read_table would add columns for folders such as ds=2026-11-20.
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            _require_columns(names, file.schema_arrow.names, uri)
            return file.read(columns=list(dict.fromkeys(names.values())))
    except pa.ArrowInvalid as error:
        raise _unreadable(uri, "a readable Parquet file", error) from None


def _read_csv(uri: str, names: dict[str, str], storage: Storage) -> pa.Table:
    filesystem, path = storage.filesystem(uri)
    compression = "gzip" if uri.lower().endswith(".gz") else None
    try:
        with filesystem.open_input_stream(path, compression=compression) as stream:
            # open_csv has a thread that would read on after the file is closed, from the next file with its number.
            records = csv.reader(line.decode("utf-8-sig") for line in io.BufferedReader(stream))
            _require_columns(names, next(filter(None, records), []), uri)
        # Every column is read as text: a type guessed from the values would turn the id 01 into 1.
        wanted = dict.fromkeys(names.values(), TEXT)
        return pacsv.read_csv(
            # Arrow closes this stream, for the same reason.
            filesystem.open_input_stream(path, compression=compression),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(include_columns=list(wanted), column_types=wanted),
        )
    except (pa.ArrowInvalid, UnicodeError, csv.Error) as error:
        raise _unreadable(uri, "a readable CSV file in UTF-8", error) from None
    except OSError as error:
        # A retry may cure any other error of the file system.
        if not str(error).startswith(BROKEN_GZIP):
            raise
        raise _unreadable(uri, "a complete gzip file", error) from None


def _unreadable(uri: str, wanted: str, error: Exception) -> UserError:
    return UserError(f"{uri} is not {wanted}: {one_line(str(error))[:MESSAGE_CHARS]}")


def _require_columns(names: dict[str, str], have: Sequence[str], uri: str) -> None:
    for setting, name in names.items():
        if name not in have:
            listed = one_line(", ".join(have)) or "no columns"
            raise UserError(
                f"interactions.{setting} names column {name!r}, which {uri} does not have (it has: {listed})"
            )
        if have.count(name) > 1:
            raise UserError(f"interactions.{setting} names column {name!r}, which {uri} has more than once")

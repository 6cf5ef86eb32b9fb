"""Who clicked what and when: ratings read from files, cut by time, and what a user had clicked before each moment."""

import csv
import io
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.catalogue.source import ENDINGS, matching_files
from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, StoredObject

log = logging.getLogger(__name__)

Format = Literal["parquet", "csv"]
TEXT = pa.large_string()
TIME = pa.timestamp("us")
# Tried in this order on text.
TIMES_AS_TEXT = (pa.int64(), TIME, pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("ns", "UTC"))
NO_VALUE = pa.array(pacsv.ConvertOptions().null_values, TEXT)
# From here up a number counts in the next finer unit, as in the catalogue: seconds reach 1e11 in the year 5138.
MICROS_PER_UNIT = ((10**11, 1_000_000), (10**14, 1000), (10**17, 1))
A_TIME = "a time (whole seconds since 1970, a timestamp or an ISO date)"
NO_RATING = "no rating (null or NaN)"
BROKEN_GZIP = ("zlib", "Truncated compressed stream")
MESSAGE_CHARS = 200
# What every file is read into.
EMPTY = pa.schema(
    {"user": TEXT, "item": TEXT, "label": pa.float32(), "time": pa.int64(), "profile": TEXT}
).empty_table()


@dataclass(frozen=True, eq=False)
class Interactions:
    """Ratings in the order of time; rows of one time keep the order of the files.

    Attributes:
        users: int64 [n], numbered from 0 by first appearance.
        items: int64 [n], positions in the item ids that they were read with.
        labels: float32 [n], 1 for a click, else 0.
        times: int64 [n], microseconds since 1970 (UTC), never falling.
        profiles: int64 [n], places in ``profile_texts`` of what is known of the user at that moment, -1 for nothing;
            None where users have no texts.
        profile_texts: each once.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    labels: NDArray[np.float32]
    times: NDArray[np.int64]
    profiles: NDArray[np.int64] | None = None
    profile_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Split and histories rely on it, and would let the future leak without a word.
        if (np.diff(self.times) < 0).any():
            raise ValueError("interactions must be sorted by time")

    def __len__(self) -> int:
        return len(self.users)

    @property
    def n_users(self) -> int:
        """Users are numbered below this."""
        return int(self.users.max(initial=-1)) + 1

    def take(self, rows: slice | NDArray[np.int64]) -> "Interactions":
        """Some of the rows, ascending; users keep their numbers."""
        profiles = None if self.profiles is None else self.profiles[rows]
        return Interactions(
            self.users[rows], self.items[rows], self.labels[rows], self.times[rows], profiles, self.profile_texts
        )


@dataclass(frozen=True)
class Split:
    """Contiguous rows: in the order of time each part strictly later than the one before; or each of other users."""

    train: slice
    validation: slice
    test: slice


@dataclass(frozen=True)
class _Column:
    """One column of one file and the setting that names it, for the errors. Rows count from 1 below the header."""

    setting: str
    name: str
    uri: str
    values: pa.ChunkedArray

    def error(self, problem: str) -> UserError:
        return UserError(f"interactions.{self.setting}: column {self.name!r} of {self.uri} {problem}")

    def refuse(self, bad: pa.ChunkedArray, problem: str) -> None:
        """Raise if any row is bad."""
        if count := pc.sum(bad).as_py():
            first = pc.index(bad, True).as_py() + 1
            raise self.error(f"has {problem} in {count:,} of {len(bad):,} rows, first in row {first:,}; remove them")

    def parsed(self, texts: pa.ChunkedArray, kinds: Sequence[pa.DataType], *, wanted: str) -> pa.ChunkedArray:
        """Texts as the first of the types that all of them can be read as."""
        for kind in kinds:
            with suppress(pa.ArrowInvalid):
                return texts.cast(kind)
        # The first row says how the column is written.
        values = texts.unique()
        kind = next((kind for kind in kinds if _is_readable(values[0], kind)), kinds[0])
        wrong = next(value for value in values if not _is_readable(value, kind))
        row = pc.index(texts, wrong).as_py() + 1
        problem = f"has {_shown(wrong)} in row {row:,}, which is not {wanted}"
        raise self.error(problem + (f" written like {_shown(values[0])} in row 1" if row > 1 else ""))


def find_interactions(storage: Storage, settings: InteractionSettings) -> list[StoredObject]:
    """The files that hold the ratings.

    Raises:
        UserError: none are named, or there are none.
    """
    if settings.uri is None:
        raise UserError("interactions.uri is not set; name Parquet or CSV files of user, item, rating and timestamp")
    found = matching_files(settings.uri, storage)
    if not found:
        raise UserError(f"interactions.uri: nothing at {settings.uri}; name a file, a folder or a glob")
    return found


def named_items(storage: Storage, settings: InteractionSettings) -> list[str]:
    """Ids of the items that ratings name, each once.

    Raises:
        UserError: the ratings cannot be read.
    """
    names: list[str] = pc.unique(_read(storage, settings)["item"]).to_pylist()
    return names


def read_interactions(storage: Storage, settings: InteractionSettings, item_ids: Sequence[str]) -> Interactions:
    """Read ratings; ids are compared as text, and an item is where ``item_ids`` has it.

    Raises:
        UserError: there are none, something in them cannot be used, or nothing can be learned from them.
    """
    table = _of_known_items(_read(storage, settings), settings, item_ids)
    table = table.take(np.argsort(table["time"].to_numpy(), kind="stable"))
    # astype copies: what Arrow shares is read-only, and torch warns of that.
    interactions = Interactions(
        users=table["user"].combine_chunks().dictionary_encode().indices.to_numpy().astype(np.int64),
        items=table["position"].to_numpy().astype(np.int64),
        labels=table["label"].to_numpy().astype(np.float32),
        times=table["time"].to_numpy().astype(np.int64),
        **(_profiles(table) if settings.user_text_column else {}),
    )
    _require_variety(interactions, settings)
    return interactions


def _read(storage: Storage, settings: InteractionSettings) -> pa.Table:
    """All ratings, in the columns of ``EMPTY``."""
    found = find_interactions(storage, settings)
    form = _format(settings.format, found)
    tables = [_read_file(form, stored.uri, settings, storage) for stored in found if stored.bytes]
    table = pa.concat_tables([EMPTY, *tables])
    if not table.num_rows:
        raise UserError(f"the interactions at {settings.uri} are empty: no file has a row; at least one is needed")
    return table


def _profiles(table: pa.Table) -> dict[str, Any]:
    """Fields ``profiles`` and ``profile_texts``; a text of blanks says nothing."""
    texts = table["profile"].combine_chunks()
    texts = pc.if_else(pc.equal(pc.utf8_trim_whitespace(texts), ""), pa.scalar(None, TEXT), texts)
    encoded = texts.dictionary_encode()
    profiles = encoded.indices.fill_null(-1).to_numpy().astype(np.int64)
    return {"profiles": profiles, "profile_texts": tuple(encoded.dictionary.to_pylist())}


def _format(wanted: str, found: Sequence[StoredObject]) -> Format:
    for form in ("parquet", "csv"):
        if wanted == form:
            return form
    forms = {next((f for end, f in ENDINGS.items() if o.uri.lower().endswith(end)), None) for o in found}
    if forms == {"parquet"}:
        return "parquet"
    if forms == {"csv"}:
        return "csv"
    raise UserError(f"cannot tell the format of {found[0].uri}; set interactions.format to parquet or csv")


def _read_file(form: Format, uri: str, settings: InteractionSettings, storage: Storage) -> pa.Table:
    """The ratings of one file, in the columns of ``EMPTY``."""
    names = {
        setting: getattr(settings, setting)
        for setting in ("user_column", "item_column", "rating_column", "timestamp_column", "user_text_column")
        if getattr(settings, setting)
    }
    table = _read_parquet(uri, names, storage) if form == "parquet" else _read_csv(uri, names, storage)
    if not table.num_rows:
        return EMPTY
    user, item, rating, time, *text = (_Column(key, name, uri, _decoded(table[name])) for key, name in names.items())
    return pa.table(
        {
            "user": _ids(user, "user"),
            "item": _ids(item, "item"),
            "label": _labels(rating, settings.positive_rating),
            "time": _micros(time),
            "profile": text[0].values.cast(TEXT) if text else pa.nulls(table.num_rows, TEXT),
        }
    )


def _read_parquet(uri: str, names: dict[str, str], storage: Storage) -> pa.Table:
    filesystem, path = storage.filesystem(uri)
    try:
        # Not read_table: that takes folders like ds=2026-11-20 for columns.
        with pq.ParquetFile(path, filesystem=filesystem) as file:
            _require_columns(names, file.schema_arrow.names, uri)
            return file.read(columns=list(dict.fromkeys(names.values())))
    except pa.ArrowInvalid as error:
        raise UserError(f"{uri} is no readable Parquet file: {_one_line(str(error))[:MESSAGE_CHARS]}") from None


def _read_csv(uri: str, names: dict[str, str], storage: Storage) -> pa.Table:
    filesystem, path = storage.filesystem(uri)
    compression = "gzip" if uri.lower().endswith(".gz") else None
    try:
        with filesystem.open_input_stream(path, compression=compression) as stream:
            # Not open_csv: its thread reads on after the file is closed, from whatever file has the number next.
            records = csv.reader(line.decode("utf-8-sig") for line in io.BufferedReader(stream))
            _require_columns(names, next(filter(None, records), []), uri)
        # As text: types guessed from the values would make 1 of an id 01.
        wanted = dict.fromkeys(names.values(), TEXT)
        return pacsv.read_csv(
            # Left to Arrow to close, for the same reason.
            filesystem.open_input_stream(path, compression=compression),
            parse_options=pacsv.ParseOptions(newlines_in_values=True),
            convert_options=pacsv.ConvertOptions(include_columns=list(wanted), column_types=wanted),
        )
    except (pa.ArrowInvalid, UnicodeError, csv.Error) as error:
        raise UserError(f"{uri} is no readable CSV file in UTF-8: {_one_line(str(error))[:MESSAGE_CHARS]}") from None
    except OSError as error:
        # Whatever else fails on the way may be mended by a retry.
        if not str(error).startswith(BROKEN_GZIP):
            raise
        raise UserError(f"{uri} is no whole gzip file: {_one_line(str(error))[:MESSAGE_CHARS]}") from None


def _require_columns(names: dict[str, str], have: Sequence[str], uri: str) -> None:
    for setting, name in names.items():
        if name not in have:
            listed = _one_line(", ".join(have)) or "no columns"
            raise UserError(
                f"interactions.{setting} names column {name!r}, which {uri} does not have (it has: {listed})"
            )
        if have.count(name) > 1:
            raise UserError(f"interactions.{setting} names column {name!r}, which {uri} has more than once")


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def _decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text of every kind as one type, dictionaries as their values."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(TEXT) if pa.types.is_string(values.type) or pa.types.is_string_view(values.type) else values


def _shown(value: pa.Scalar) -> str:
    return repr(value.as_py()[:MESSAGE_CHARS])


def _without_blanks(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Trimmed; null where nothing is left or the word says so, as NA does."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.is_in(trimmed, NO_VALUE), pa.scalar(None, TEXT), trimmed)


def _is_readable(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _ids(column: _Column, who: str) -> pa.ChunkedArray:
    column.refuse(column.values.is_null(), f"no {who}")
    kind = column.values.type
    # A float may be meant as 1 or as 1.0: whoever writes the file must say.
    if not (kind == TEXT or pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)):
        raise column.error(f"is {kind}; an id must be text or a whole number: convert the column")
    texts = column.values.cast(TEXT)
    column.refuse(pc.equal(pc.utf8_trim_whitespace(texts), ""), f"no {who}")
    return texts


def _labels(column: _Column, positive: float) -> NDArray[np.float32]:
    values = column.values
    if pa.types.is_decimal(values.type):
        # Arrow's own cast makes 4.1000000000000005 of 4.1.
        values = values.cast(TEXT)
    if values.type == TEXT:
        values = _without_blanks(values)
        column.refuse(values.is_null(), NO_RATING)
        values = column.parsed(values, [pa.float64()], wanted="a number")
    column.refuse(values.is_null(nan_is_null=True), NO_RATING)
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise column.error(f"is {kind}; a rating must be a number: convert the column")
    ratings: NDArray[Any] = values.to_numpy()
    column.refuse(pa.chunked_array([np.isinf(ratings)]), "an infinite rating")
    # In the column's own precision: the float32 4.1 reaches 4.1.
    return (ratings >= positive).astype(np.float32)


def _micros(column: _Column) -> NDArray[np.int64]:
    values = column.values
    if values.type == TEXT:
        values = _without_blanks(values)
    column.refuse(values.is_null(), "no timestamp")
    if values.type == TEXT:
        values = column.parsed(values, TIMES_AS_TEXT, wanted=A_TIME)
    kind = values.type
    try:
        if pa.types.is_integer(kind):
            return _from_epoch(values.cast(pa.int64()).to_numpy())
        if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
            values = values.cast(options=pc.CastOptions(target_type=TIME, allow_time_truncate=True))
            return np.array(values.cast(pa.int64()), np.int64)
    except pa.ArrowInvalid as error:
        raise column.error(f"holds a time out of range: {_one_line(str(error))[:MESSAGE_CHARS]}") from None
    raise column.error(f"is {kind}, not {A_TIME}")


def _from_epoch(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    # One unit for the whole column, or a count that passes a limit would run backwards.
    largest = max(abs(int(numbers.min())), abs(int(numbers.max())))
    for limit, factor in MICROS_PER_UNIT:
        if largest < limit:
            return numbers * factor
    return numbers // 1000


def _of_known_items(table: pa.Table, settings: InteractionSettings, item_ids: Sequence[str]) -> pa.Table:
    """The rows whose item there is, with its ``position``."""
    positions = pc.index_in(table["item"], value_set=pa.array(item_ids, TEXT))
    n, unknown = table.num_rows, positions.null_count
    if unknown:
        example = _shown(table["item"].filter(positions.is_null())[0])
        what = f"of the {n:,} rows at {settings.uri} name items that the catalogue lacks, for example {example}"
        if unknown == n:
            raise UserError(f"all {what}; is interactions.item_column {settings.item_column!r} the catalogue's id?")
        share = f"{unknown:,} ({unknown / n:.2%}) {what}"
        if unknown / n > settings.max_unknown_fraction:
            raise UserError(
                f"{share}; at most {settings.max_unknown_fraction:.2%} may: mend the ids, or raise "
                "interactions.max_unknown_fraction to leave these rows out"
            )
        log.warning("%s: left out", share)
    return table.append_column("position", positions).filter(positions.is_valid()).combine_chunks()


def _require_variety(interactions: Interactions, settings: InteractionSettings) -> None:
    n, where = len(interactions), f"interactions at {settings.uri}"
    clicks = int(interactions.labels.sum(dtype=np.int64))
    threshold = f"interactions.positive_rating {settings.positive_rating:g}"
    if clicks == n:
        raise UserError(f"all {n:,} {where} are clicks: no rating is below {threshold}; raise it")
    if clicks == 0:
        raise UserError(f"none of the {n:,} {where} is a click: no rating reaches {threshold}; lower it")
    if interactions.n_users == 1:
        raise UserError(
            f"all {n:,} {where} are of one user, and at least 2 are needed; "
            f"does interactions.user_column {settings.user_column!r} name the users?"
        )


def split_by_time(interactions: Interactions, *, train: float = 0.8, validation: float = 0.1) -> Split:
    """Cut at two moments; where rows share the moment of a cut, all of them go to the later part.

    Raises:
        UserError: a part would be empty or hold clicks only or none; the line names it.
    """
    if not (train > 0 and validation > 0 and train + validation < 1):
        raise UserError(
            f"train {train:g} and validation {validation:g} are no shares of a split; "
            "both must be above 0 and their sum below 1, the rest is for test"
        )
    n = len(interactions)
    first, second = (_start_of_moment(interactions.times, round(n * share)) for share in (train, train + validation))
    split = Split(train=slice(0, first), validation=slice(first, second), test=slice(second, n))
    for name, rows in vars(split).items():
        labels = interactions.labels[rows]
        if not len(labels):
            raise UserError(
                f"the split of {n:,} interactions by time leaves {name} with 0 rows, and 1 of each label is the "
                "least; give more interactions, or finer timestamps if many rows share one"
            )
        if labels.min() == labels.max():
            kind = "clicks" if labels[0] else "rows without a click"
            raise UserError(
                f"the split of {n:,} interactions by time leaves {name} with {kind} only ({len(labels):,} rows); "
                "give more interactions, or set interactions.positive_rating so that both kinds occur in every part"
            )
    return split


def split_by_user(interactions: Interactions, *, folds: int, fold: int) -> tuple[NDArray[np.int64], Split]:
    """Deal users into folds: those of one are the test part, those of the next the validation part, all others train.

    Returns:
        Rows in the order of the parts, each part in the order of time; and the parts of that order.

    Raises:
        UserError: there are fewer users than folds, or a fold's rows are of one label.
    """
    users = np.unique(interactions.users)
    dealt = np.full(interactions.n_users, -1)
    dealt[users] = np.random.default_rng(0).permutation(len(users)) % folds
    of_rows = dealt[interactions.users]
    for number in range(folds):
        labels = interactions.labels[of_rows == number]
        if not len(labels) or labels.min() == labels.max():
            raise UserError(
                f"layers are compared on users held out, and of {len(users):,} users, dealt into {folds} groups, one "
                "group has no rating or those of one label only; set train.layers, or give interactions of more users"
            )
    part = np.select([of_rows == fold, of_rows == (fold + 1) % folds], [2, 1], 0)
    first, second, _ = np.cumsum(np.bincount(part, minlength=3)).tolist()
    split = Split(train=slice(0, first), validation=slice(first, second), test=slice(second, len(part)))
    return np.argsort(part, kind="stable"), split


def _start_of_moment(times: NDArray[np.int64], row: int) -> int:
    return int(np.searchsorted(times, times[row])) if row < len(times) else row


def histories(interactions: Interactions, *, length: int, label: int) -> NDArray[np.int64]:
    """What each row's user had with ``label`` strictly before the row's time.

    Returns:
        int64 [n, length]: positions of items, newest first (of one time, the later row first); -1 where there
        are no more.
    """
    users, times = interactions.users, interactions.times
    # A moment's number among the distinct ones: user and moment together fit in 64 bits, user and time do not.
    moments = np.cumsum(np.diff(times, prepend=times[:1]) > 0)
    keys = users * (len(times) + 1) + moments
    rows = np.flatnonzero(interactions.labels == label)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    items = interactions.items[rows]
    starts = np.searchsorted(users[rows], users)
    ends = np.searchsorted(keys[rows], keys)
    found = np.full((len(users), length), -1, np.int64)
    # Column by column: whole matrices of places would take several times the memory of the result.
    for column in range(length):
        places = ends - 1 - column
        has = places >= starts
        found[has, column] = items[places[has]]
    return found


def training_counts(interactions: Interactions, rows: slice | NDArray[np.int64], n_items: int) -> NDArray[np.int64]:
    """How many ratings each item has among the rows: int64 [n_items]."""
    return np.bincount(interactions.items[rows], minlength=n_items).astype(np.int64)

"""Columns of an interaction file, checked and converted: ids, event kinds, ratings, and times in any unit."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from marc_pipeline.errors import UserError

TEXT = pa.large_string()
TIME = pa.timestamp("us")
# Timestamps written as text are parsed as the first of these types that fits.
TIMES_AS_TEXT = (pa.int64(), TIME, pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("ns", "UTC"))
NO_VALUE = pa.array(pacsv.ConvertOptions().null_values, TEXT)
# From each limit on, a number counts in the next finer unit, as in the catalogue. Seconds reach 1e11 in the year 5138.
UNITS = {"seconds": 10**11, "milliseconds": 10**14, "microseconds": 10**17, "nanoseconds": 2**64}
MICROS_PER_UNIT = {"seconds": 1_000_000, "milliseconds": 1000, "microseconds": 1}
# Seconds of the years 1990 to 2100. Numbers of two units that are both in these years show a mixed column.
PLAUSIBLE_SECONDS = (631_152_000, 4_102_444_800)
YES, NO = ("true", "t", "yes", "y"), ("false", "f", "no", "n")
A_TIME = "a time (whole seconds since 1970, a timestamp or an ISO date)"
NO_RATING = "no rating (null or NaN)"
MESSAGE_CHARS = 200


@dataclass(frozen=True)
class InteractionColumn:
    """Some rows of one column of a file, and the setting that names it.

    Attributes:
        setting: key of the configuration.
        name: name of the column.
        uri: the file.
        values: the rows.
        before: number of rows of the file before these. Errors count rows from 1, below the header.
    """

    setting: str
    name: str
    uri: str
    values: pa.ChunkedArray
    before: int = 0

    def error(self, problem: str) -> UserError:
        """Return an error that names the setting, the column and the file."""
        return UserError(f"interactions.{self.setting}: column {self.name!r} of {self.uri} {problem}")

    def ids(self) -> pa.ChunkedArray:
        """Return ids as text.

        Raises:
            UserError: an id is missing, or could be written in several ways.
        """
        missing = f"no {self.setting.removesuffix('_column')}"
        self._refuse(self.values.is_null(), missing)
        kind = self.values.type
        # A float could be written as 1 or as 1.0, so the author of the file must choose.
        if not (kind == TEXT or pa.types.is_integer(kind) or (pa.types.is_decimal(kind) and kind.scale == 0)):
            raise self.error(f"is {kind}; an id must be text or a whole number: convert the column")
        texts = self.values.cast(TEXT)
        self._refuse(pc.equal(pc.utf8_trim_whitespace(texts), ""), missing)
        return texts

    def kinds(self) -> pa.ChunkedArray:
        """Return the kinds of events as trimmed text.

        Raises:
            UserError: a kind is missing.
        """
        self._refuse(self.values.is_null(), "no event")
        kinds = pc.utf8_trim_whitespace(self.values.cast(TEXT))
        self._refuse(pc.equal(kinds, ""), "no event")
        return kinds

    def ratings(self) -> NDArray[Any]:
        """Return numbers in the precision of the column, or booleans; words such as yes and no are booleans.

        Raises:
            UserError: a rating is missing, infinite, or neither a number nor a boolean.
        """
        values = self.values
        if pa.types.is_decimal(values.type):
            # Arrow casts the decimal 4.1 to the float 4.1000000000000005.
            values = values.cast(TEXT)
        if values.type == TEXT:
            values = _without_blanks(values)
            self._refuse(values.is_null(), NO_RATING)
            words = _booleans(values)
            values = self._parsed(values, [pa.float64()], wanted="a number") if words is None else words
        self._refuse(values.is_null(nan_is_null=True), NO_RATING)
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise self.error(f"is {kind}; a rating must be a number: convert the column")
        ratings: NDArray[Any] = values.to_numpy()
        self._refuse(pa.chunked_array([np.isinf(ratings)]), "an infinite rating")
        return ratings

    def moments(self) -> tuple[NDArray[np.int64], bool]:
        """Return times since 1970 (UTC), and whether they are numbers of an unknown unit; else they are microseconds.

        Raises:
            UserError: a time is missing, out of range or cannot be parsed.
        """
        values = _without_blanks(self.values) if self.values.type == TEXT else self.values
        self._refuse(values.is_null(), "no timestamp")
        if values.type == TEXT:
            values = self._parsed(values, TIMES_AS_TEXT, wanted=A_TIME)
        kind = values.type
        try:
            if pa.types.is_integer(kind):
                return values.cast(pa.int64()).to_numpy(), True
            if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
                values = values.cast(options=pc.CastOptions(target_type=TIME, allow_time_truncate=True))
                return np.array(values.cast(pa.int64()), np.int64), False
        except pa.ArrowInvalid as error:
            raise self.error(f"contains a time out of range: {one_line(str(error))[:MESSAGE_CHARS]}") from None
        raise self.error(f"is {kind}, not {A_TIME}")

    def _refuse(self, bad: pa.ChunkedArray, problem: str) -> None:
        if count := pc.sum(bad).as_py():
            first, rows = self.before + pc.index(bad, True).as_py() + 1, self.before + len(bad)
            raise self.error(
                f"has {problem} in {count:,} of the first {rows:,} rows, first in row {first:,}; remove them"
            )

    def _parsed(self, texts: pa.ChunkedArray, kinds: Sequence[pa.DataType], *, wanted: str) -> pa.ChunkedArray:
        """Return texts as the first of the types that fits all of them."""
        for kind in kinds:
            with suppress(pa.ArrowInvalid):
                return texts.cast(kind)
        # The error assumes that the first row is written correctly.
        values = texts.unique()
        kind = next((kind for kind in kinds if _is_readable(values[0], kind)), kinds[0])
        wrong = next(value for value in values if not _is_readable(value, kind))
        first, row = self.before + 1, self.before + pc.index(texts, wrong).as_py() + 1
        problem = f"has {shown(wrong)} in row {row:,}, which is not {wanted}"
        raise self.error(problem + (f" written like {shown(values[0])} in row {first:,}" if row > first else ""))


def decoded(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return dictionaries as their values, and text of every kind as one type."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(TEXT) if pa.types.is_string(values.type) or pa.types.is_string_view(values.type) else values


def one_line(text: str) -> str:
    """Return a text for an error message, without line breaks and control characters."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


def shown(value: pa.Scalar) -> str:
    """Return a value for an error message, quoted and cut."""
    return repr(value.as_py()[:MESSAGE_CHARS])


def _without_blanks(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return trimmed texts; blanks and words for a missing value, such as NA, become null."""
    trimmed = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.is_in(trimmed, NO_VALUE), pa.scalar(None, TEXT), trimmed)


def _is_readable(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _booleans(texts: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """Return words such as yes and no as booleans; None for any other text, and for digits, which are numbers."""
    lower = pc.utf8_lower(texts)
    if not pc.any(pc.is_in(lower, pa.array((*YES, *NO), TEXT))).as_py():
        return None
    known = pc.is_in(lower, pa.array((*YES, *NO, "0", "1"), TEXT))
    return pc.is_in(lower, pa.array((*YES, "1"), TEXT)) if pc.all(known).as_py() else None


def unit_of(largest: int) -> str:
    """Return the unit of times, by the largest absolute number."""
    return next(unit for unit, limit in UNITS.items() if largest < limit)


def to_micros(numbers: NDArray[np.int64], unit: str) -> NDArray[np.int64]:
    """Return times of a unit in microseconds."""
    return numbers // 1000 if unit == "nanoseconds" else numbers * MICROS_PER_UNIT[unit]


def plausible_rows(numbers: NDArray[np.int64]) -> dict[str, int]:
    """Return the units in which some numbers are times of the years 1990 to 2100, each with the first such row."""
    found = {}
    for place, unit in enumerate(UNITS):
        low, high = (second * 1000**place for second in PLAUSIBLE_SECONDS)
        if (inside := (numbers >= low) & (numbers < high)).any():
            found[unit] = int(inside.argmax())
    return found

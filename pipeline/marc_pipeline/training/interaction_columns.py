"""Columns of an interaction file, checked and converted: ids, timestamps, and ratings to clicks by a threshold."""

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
MICROS_PER_UNIT = ((10**11, 1_000_000), (10**14, 1000), (10**17, 1))
A_TIME = "a time (whole seconds since 1970, a timestamp or an ISO date)"
NO_RATING = "no rating (null or NaN)"
MESSAGE_CHARS = 200


@dataclass(frozen=True)
class InteractionColumn:
    """One column of one file, and the setting that names it. Errors count rows from 1, below the header."""

    setting: str
    name: str
    uri: str
    values: pa.ChunkedArray

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

    def labels(self, positive: float) -> NDArray[np.float32]:
        """Return 1 for every rating from ``positive`` on, else 0.

        Raises:
            UserError: a rating is missing, infinite or not a number.
        """
        values = self.values
        if pa.types.is_decimal(values.type):
            # Arrow casts the decimal 4.1 to the float 4.1000000000000005.
            values = values.cast(TEXT)
        if values.type == TEXT:
            values = _without_blanks(values)
            self._refuse(values.is_null(), NO_RATING)
            values = self._parsed(values, [pa.float64()], wanted="a number")
        self._refuse(values.is_null(nan_is_null=True), NO_RATING)
        kind = values.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise self.error(f"is {kind}; a rating must be a number: convert the column")
        ratings: NDArray[Any] = values.to_numpy()
        self._refuse(pa.chunked_array([np.isinf(ratings)]), "an infinite rating")
        # Compared in the precision of the column, so that the float32 4.1 reaches 4.1.
        return (ratings >= positive).astype(np.float32)

    def micros(self) -> NDArray[np.int64]:
        """Return times in microseconds since 1970 (UTC).

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
                return _from_epoch(values.cast(pa.int64()).to_numpy())
            if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
                values = values.cast(options=pc.CastOptions(target_type=TIME, allow_time_truncate=True))
                return np.array(values.cast(pa.int64()), np.int64)
        except pa.ArrowInvalid as error:
            raise self.error(f"contains a time out of range: {one_line(str(error))[:MESSAGE_CHARS]}") from None
        raise self.error(f"is {kind}, not {A_TIME}")

    def _refuse(self, bad: pa.ChunkedArray, problem: str) -> None:
        if count := pc.sum(bad).as_py():
            first = pc.index(bad, True).as_py() + 1
            raise self.error(f"has {problem} in {count:,} of {len(bad):,} rows, first in row {first:,}; remove them")

    def _parsed(self, texts: pa.ChunkedArray, kinds: Sequence[pa.DataType], *, wanted: str) -> pa.ChunkedArray:
        """Return texts as the first of the types that fits all of them."""
        for kind in kinds:
            with suppress(pa.ArrowInvalid):
                return texts.cast(kind)
        # The error assumes that the first row is written correctly.
        values = texts.unique()
        kind = next((kind for kind in kinds if _is_readable(values[0], kind)), kinds[0])
        wrong = next(value for value in values if not _is_readable(value, kind))
        row = pc.index(texts, wrong).as_py() + 1
        problem = f"has {shown(wrong)} in row {row:,}, which is not {wanted}"
        raise self.error(problem + (f" written like {shown(values[0])} in row 1" if row > 1 else ""))


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


def _from_epoch(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    # The whole column has one unit, because times that pass a limit must stay in order.
    largest = max(abs(int(numbers.min())), abs(int(numbers.max())))
    for limit, factor in MICROS_PER_UNIT:
        if largest < limit:
            return numbers * factor
    return numbers // 1000

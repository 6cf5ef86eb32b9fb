"""Survey of interactions: counts and extremes of every batch, and the checks that need nothing but these."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.training.interaction_columns import TEXT, plausible_rows, shown, to_micros, unit_of
from marc_pipeline.training.interaction_files import InteractionBatch, no_rows

Range = tuple[float, float]
MOST_KINDS = 100
NAMED_KINDS = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """Facts about some interactions. Two surveys are added with :meth:`merged`.

    Attributes:
        rows: number of rows, without those of events with weight 0.
        left_out: number of rows of events with weight 0.
        unknown_kinds: rows by kind of event without a weight; at most ``MOST_KINDS`` kinds.
        users: at most two user ids, which tell whether there is more than one.
        ratings: lowest and highest rating; None if there are none.
        clicks: number of rows from ``positive_rating`` on, or of true booleans.
        ones: number of ratings that are 1 or true.
        binary: whether every rating is 0, 1 or a boolean.
        numbers: lowest and highest time that is a number of an unknown unit; None if there are none.
        dates: lowest and highest other time in microseconds since 1970; None if there are none.
        units: for each unit in which some number is a plausible time, an example of such a number.
    """

    rows: int = 0
    left_out: int = 0
    unknown_kinds: Mapping[str, int] = field(default_factory=dict)
    users: tuple[str, ...] = ()
    ratings: Range | None = None
    clicks: int = 0
    ones: int = 0
    binary: bool = True
    numbers: tuple[int, int] | None = None
    dates: tuple[int, int] | None = None
    units: Mapping[str, str] = field(default_factory=dict)

    def merged(self, other: "Survey") -> "Survey":
        """Return the facts about the rows of both surveys."""
        kinds = Counter(self.unknown_kinds) + Counter(other.unknown_kinds)
        return Survey(
            rows=self.rows + other.rows,
            left_out=self.left_out + other.left_out,
            unknown_kinds=dict(kinds.most_common(MOST_KINDS)),
            users=tuple(dict.fromkeys(self.users + other.users))[:2],
            ratings=_span(self.ratings, other.ratings),
            clicks=self.clicks + other.clicks,
            ones=self.ones + other.ones,
            binary=self.binary and other.binary,
            numbers=_span(self.numbers, other.numbers),
            dates=_span(self.dates, other.dates),
            units={**self.units, **{unit: at for unit, at in other.units.items() if unit not in self.units}},
        )

    @property
    def unit(self) -> str:
        """Return the unit of times that are numbers. All have one unit, so that times near a limit stay in order."""
        return unit_of(max(map(abs, self.numbers or (0,))))

    @property
    def span(self) -> tuple[int, int]:
        """Return the first and the last time in microseconds since 1970."""
        numbers = self.numbers and tuple(to_micros(np.array(self.numbers, np.int64), self.unit).tolist())
        found: tuple[int, int] | None = _span(numbers, self.dates)
        if found is None:
            raise ValueError("a survey of 0 rows has no times")
        return found


@dataclass(frozen=True)
class Feedback:
    """How rows count: ``implicit``: every row is a positive; else a rating from ``positive`` on is a click."""

    implicit: bool
    positive: float = 0.0


def survey_batch(batch: InteractionBatch, settings: InteractionSettings, uri: str) -> Survey:
    """Return the facts about one batch of the file ``uri``."""
    weights, unknown = event_weights(batch, settings)
    rows = np.flatnonzero(weights) if batch.kinds is not None else np.arange(len(weights))
    left_out = len(weights) - len(rows)
    times = batch.times[rows]
    if not len(rows):
        return Survey(left_out=left_out, unknown_kinds=unknown)
    span = (int(times.min()), int(times.max()))
    plausible = plausible_rows(times) if batch.numeric else {}
    first = batch.before + 1
    units = {unit: f"{times[row]} in row {first + rows[row]:,} of {uri}" for unit, row in plausible.items()}
    return Survey(
        rows=len(rows),
        left_out=left_out,
        unknown_kinds=unknown,
        users=_two(batch.users.take(rows)),
        numbers=span if batch.numeric else None,
        dates=None if batch.numeric else span,
        units=units,
        **_rating_facts(batch.ratings, settings.positive_rating),
    )


def merge(surveys: Sequence[Survey]) -> Survey:
    """Return the facts about the rows of all surveys."""
    return reduce(Survey.merged, surveys, Survey())


def event_weights(batch: InteractionBatch, settings: InteractionSettings) -> tuple[NDArray[np.float32], dict[str, int]]:
    """Return the weight of each row, and the number of rows by kind of event without a weight."""
    if batch.kinds is None:
        return np.ones(len(batch.times), np.float32), {}
    names = list(settings.event_weights)
    places = pc.index_in(batch.kinds, value_set=pa.array(names, TEXT))
    unknown: dict[str, int] = {}
    if places.null_count:
        for pair in batch.kinds.filter(places.is_null()).value_counts()[:MOST_KINDS]:
            unknown[pair["values"].as_py()] = pair["counts"].as_py()
    weights = np.array([*settings.event_weights.values(), 0], np.float32)
    return weights[places.fill_null(len(names)).to_numpy()], unknown


def require_usable(survey: Survey, settings: InteractionSettings, column: str | None) -> Feedback:
    """Check what the survey tells, and return how rows count. ``column`` is the name of the column of the rating.

    Raises:
        UserError: there is no row, one user, one time, an unknown kind of event, times of several units, or ratings
            that do not tell clicks from others.
    """
    where = f"interactions at {settings.uri}"
    if survey.unknown_kinds:
        raise UserError(_unknown_kinds(survey, settings))
    if not survey.rows:
        if survey.left_out:
            raise UserError(
                f"all {survey.left_out:,} {where} have events of weight 0; raise one in interactions.event_weights"
            )
        raise no_rows(str(settings.uri))
    if len(survey.units) > 1:
        (one, first), (other, second) = list(survey.units.items())[:2]
        raise UserError(
            f"interactions.timestamp_column {settings.timestamp_column!r} has times in {one} ({first}) and in {other} "
            f"({second}); write all times in one unit"
        )
    if len(survey.users) < 2:
        raise UserError(one_user(survey.rows, settings))
    start, end = survey.span
    if start == end:
        raise UserError(
            f"all {survey.rows:,} {where} have the same time, {np.datetime64(start, 'us')}, and a split by time needs "
            f"several; does interactions.timestamp_column {settings.timestamp_column!r} name the times?"
        )
    return _feedback(survey, settings, column)


def one_user(rows: int, settings: InteractionSettings) -> str:
    """Return the error for interactions of one user."""
    return (
        f"all {rows:,} interactions at {settings.uri} are of one user, and at least 2 are needed; "
        f"does interactions.user_column {settings.user_column!r} name the users?"
    )


def _feedback(survey: Survey, settings: InteractionSettings, column: str | None) -> Feedback:
    if survey.ratings is None:
        log.info("interactions: every row is a positive, and negatives are sampled")
        return Feedback(implicit=True)
    low, high = survey.ratings
    positive, clicks = (1.0, survey.ones) if survey.binary else (settings.positive_rating, survey.clicks)
    if 0 < clicks < survey.rows:
        return Feedback(implicit=False, positive=positive)
    values = f"{low:g} only" if low == high else f"{low:g} to {high:g}"
    why = f"column {column!r} has {values}, and a click is {positive:g} or more"
    if settings.feedback == "auto" and (clicks or low == high > 0):
        log.info("interactions: every row is a positive, and negatives are sampled: %s", why)
        return Feedback(implicit=True)
    share, are = ("all", "are clicks") if clicks else ("none", "is a click")
    raise UserError(
        f"{share} of the {survey.rows:,} interactions at {settings.uri} {are}: {why}; if every row is a purchase or a "
        "view, set interactions.feedback: positives, else correct interactions.positive_rating"
    )


def _unknown_kinds(survey: Survey, settings: InteractionSettings) -> str:
    kinds = sorted(survey.unknown_kinds.items(), key=lambda pair: -pair[1])
    named = ", ".join(f"{shown(pa.scalar(kind))} ({rows:,})" for kind, rows in kinds[:NAMED_KINDS])
    more = f" and {len(kinds) - NAMED_KINDS} more" if len(kinds) > NAMED_KINDS else ""
    return (
        f"interactions.event_column {settings.event_column!r} has kinds without a weight (rows): {named}{more}; "
        "add them to interactions.event_weights, where 0 leaves a kind out"
    )


def _rating_facts(ratings: NDArray[Any] | None, positive: float) -> dict[str, Any]:
    if ratings is None:
        return {}
    # Compared in the precision of the column, so that the float32 4.1 reaches 4.1.
    clicks, ones, zeros = clicked(ratings, positive), ratings == 1, ratings == 0
    return {
        "ratings": (float(ratings.min()), float(ratings.max())),
        "clicks": int(clicks.sum()),
        "ones": int(ones.sum()),
        "binary": bool((ones | zeros).all()),
    }


def clicked(ratings: NDArray[Any], positive: float) -> NDArray[np.bool_]:
    """Return whether each rating is a click: from ``positive`` on in the precision of the ratings, or true."""
    return ratings if ratings.dtype == bool else ratings >= positive


def _two(users: pa.ChunkedArray) -> tuple[str, ...]:
    first = users[0]
    place = pc.index(pc.equal(users, first), False).as_py()
    return (first.as_py(),) if place < 0 else (first.as_py(), users[place].as_py())


def _span(one: Any, other: Any) -> Any:  # noqa: ANN401 - a range of whole or other numbers, or None
    ranges = [found for found in (one, other) if found is not None]
    return (min(low for low, _ in ranges), max(high for _, high in ranges)) if ranges else None

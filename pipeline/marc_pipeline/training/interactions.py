"""Interactions of users with items, in the order of time, as arrays; read from files of ratings or purchases."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.training.interaction_columns import TEXT, shown
from marc_pipeline.training.interaction_survey import one_user

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Interactions:
    """Interactions in the order of time; rows with the same time keep the order of the files.

    Attributes:
        users: int64 [n], numbered from 0 by first appearance.
        items: int64 [n], positions in the list of item ids.
        labels: float32 [n], 1 for a click, else 0.
        times: int64 [n], microseconds since 1970 (UTC), ascending.
        profiles: int64 [n], rows of ``profile_texts`` with the text about the user at that time, −1 if there is none;
            None if users have no texts.
        profile_texts: distinct texts.
        weights: float32 [n], weight of the event of each row; 1 if not given, and for ratings.
        implicit: whether the files have positives only: all ``labels`` are 1, and negatives must be sampled.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    labels: NDArray[np.float32]
    times: NDArray[np.int64]
    profiles: NDArray[np.int64] | None = None
    profile_texts: tuple[str, ...] = ()
    weights: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    implicit: bool = False

    def __post_init__(self) -> None:
        if not len(self.weights):
            object.__setattr__(self, "weights", np.ones(len(self.times), np.float32))
        if len(self.weights) != len(self.times):
            raise ValueError(f"interactions need one weight per row: {len(self.weights)} for {len(self.times)} rows")
        # Splits and histories rely on the order; without it the future would leak into them.
        if (np.diff(self.times) < 0).any():
            raise ValueError("interactions must be sorted by time")

    def __len__(self) -> int:
        return len(self.users)

    @property
    def n_users(self) -> int:
        """Return the highest user number plus 1."""
        return int(self.users.max(initial=-1)) + 1

    def take(self, rows: slice | NDArray[np.int64]) -> "Interactions":
        """Return some of the rows, which must be ascending; users keep their numbers."""
        columns: dict[str, Any] = {
            name: values[rows] for name, values in vars(self).items() if isinstance(values, np.ndarray)
        }
        return replace(self, **columns)


def make_interactions(
    table: pa.Table, settings: InteractionSettings, item_ids: Sequence[str], *, implicit: bool
) -> Interactions:
    """Return rows (columns ``ROWS``) with the items of ``item_ids`` as interactions. Ids are compared as text.

    Of positives only, a repeat is left out: the same item of the same user, after an event of at least this weight.

    Raises:
        UserError: too many rows name an unknown item, or all rows have the same label or user, or every user took
            every item.
    """
    positions, known = _of_known_items(table, settings, item_ids)
    times = table["time"].to_numpy()
    rows = known[np.argsort(times[known], kind="stable")]
    users = _codes(table["user"])
    if implicit:
        weights = table["weight"].to_numpy()
        first = _is_new(users[rows], positions[rows], weights[rows])
        if not first.all():
            log.info("interactions: %s repeats are left out: the user had the item before", f"{(~first).sum():,}")
            rows = rows[first]
    columns = {name: table[name].to_numpy()[rows] for name in ("label", "weight", "time")}
    interactions = Interactions(
        users=_by_appearance(users[rows])[0],
        items=positions[rows],
        labels=columns["label"],
        times=columns["time"],
        **(_profiles(table["profile"], rows) if settings.user_text_column else {}),
        weights=columns["weight"],
        implicit=implicit,
    )
    _require_variety(interactions, settings, n_items=len(item_ids))
    return interactions


def _codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return the place of each row's value in the dictionary of a column; −1 for no value."""
    return np.array(column.combine_chunks().indices.fill_null(-1), np.int64)


def _by_appearance(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return codes numbered from 0 by first appearance, where −1 stays −1, and the code of each number."""
    encoded = pa.array(codes, mask=codes < 0).dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy().astype(np.int64), encoded.dictionary.to_numpy()


def _is_new(users: NDArray[np.int64], items: NDArray[np.int64], weights: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return whether each row has a larger weight than all earlier rows of its user and item; rows are in order."""
    pairs = users * (items.max(initial=0) + 1) + items
    order = np.argsort(pairs, kind="stable")
    levels = np.unique(weights)
    # Numbered in ascending order, so that the highest level so far never comes from another pair.
    number = np.cumsum(np.diff(pairs[order], prepend=-1) > 0)
    highest = np.maximum.accumulate(number * len(levels) + np.searchsorted(levels, weights[order]))
    new = np.empty(len(pairs), bool)
    new[order] = np.diff(highest, prepend=-1) > 0
    return new


def _profiles(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> dict[str, Any]:
    """Return the fields ``profiles`` and ``profile_texts``; a blank text counts as no text."""
    texts = column.combine_chunks().dictionary
    blank = pc.equal(pc.utf8_trim_whitespace(texts), "").to_numpy(zero_copy_only=False)
    codes = _codes(column)[rows]
    # The last value of ``blank`` stands for the code −1.
    profiles, distinct = _by_appearance(np.where(np.append(blank, True)[codes], -1, codes))
    return {"profiles": profiles, "profile_texts": tuple(texts.take(distinct).to_pylist())}


def _of_known_items(
    table: pa.Table, settings: InteractionSettings, item_ids: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the place of each row's item in ``item_ids``, −1 for an unknown one, and the rows of known items."""
    column = table["item"].combine_chunks()
    places = pc.index_in(column.dictionary, value_set=pa.array(item_ids, TEXT)).fill_null(-1).to_numpy()
    positions = places.astype(np.int64)[column.indices.to_numpy()]
    known = np.flatnonzero(positions >= 0)
    n, unknown = len(positions), len(positions) - len(known)
    if unknown:
        example = shown(column.dictionary[column.indices[int((positions < 0).argmax())].as_py()])
        what = f"of the {n:,} rows at {settings.uri} name items that the catalogue lacks, for example {example}"
        if unknown == n:
            raise UserError(f"all {what}; is interactions.item_column {settings.item_column!r} the catalogue's id?")
        share = f"{unknown:,} ({unknown / n:.2%}) {what}"
        if unknown / n > settings.max_unknown_fraction:
            raise UserError(
                f"{share}; the limit is {settings.max_unknown_fraction:.2%}: correct the ids, or raise "
                "interactions.max_unknown_fraction to skip these rows"
            )
        log.warning("interactions: %s: skipped", share)
    return positions, known


def _require_variety(interactions: Interactions, settings: InteractionSettings, *, n_items: int) -> None:
    """Check again what :func:`.interaction_survey.require_usable` checked, for the rows that are left."""
    n = len(interactions)
    if interactions.n_users == 1:
        raise UserError(one_user(n, settings))
    if interactions.implicit:
        # Counted only if every user has enough rows, because it takes long.
        full = (np.bincount(interactions.users) >= n_items).all()
        if full and len(np.unique(interactions.users * n_items + interactions.items)) == interactions.n_users * n_items:
            raise UserError(
                f"every user of the interactions at {settings.uri} took all {n_items:,} items of the catalogue, so "
                "that no negative is left to sample; provide a larger catalogue, or ratings"
            )
        return
    clicks = int(interactions.labels.sum(dtype=np.int64))
    if clicks in {0, n}:
        raise UserError(
            f"{'all' if clicks else 'none'} of the {n:,} interactions at {settings.uri} with known items, within "
            f"interactions.days and max_rows, {'are clicks' if clicks else 'is a click'}; provide more ratings, or "
            "set interactions.feedback: positives"
        )

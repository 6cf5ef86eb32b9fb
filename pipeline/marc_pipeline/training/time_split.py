"""Splits of interactions by time or by user, and the history of each user before each interaction."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.errors import UserError
from marc_pipeline.training.interactions import Interactions


@dataclass(frozen=True)
class Split:
    """Contiguous rows of three parts: each strictly later than the one before, or each with other users."""

    train: slice
    validation: slice
    test: slice


def split_by_time(interactions: Interactions, *, train: float = 0.8, validation: float = 0.1) -> Split:
    """Split at two moments. Rows with the same time as a boundary all go to the later part.

    Raises:
        UserError: the shares are not valid, or a part is empty, or a part of ratings has one label only.
    """
    if not (train > 0 and validation > 0 and train + validation < 1):
        raise UserError(
            f"train {train:g} and validation {validation:g} are not valid shares of a split; "
            "both must be above 0 and their sum below 1, the rest is for test"
        )
    n = len(interactions)
    first, second = (_start_of_moment(interactions.times, round(n * share)) for share in (train, train + validation))
    split = Split(train=slice(0, first), validation=slice(first, second), test=slice(second, n))
    for name, rows in vars(split).items():
        labels = interactions.labels[rows]
        if not len(labels):
            raise UserError(
                f"the split of {n:,} interactions by time leaves {name} with 0 rows; "
                "provide more interactions, or finer timestamps if many rows share one"
            )
        if not interactions.implicit and labels.min() == labels.max():
            kind = "clicks" if labels[0] else "rows without a click"
            raise UserError(
                f"the split of {n:,} interactions by time leaves {name} with {kind} only ({len(labels):,} rows); "
                "provide more interactions, or set interactions.positive_rating so that every part has both labels"
            )
    return split


def split_times(interactions: Interactions) -> tuple[int, int]:
    """Return the times of the first row of the validation part and of the test part of :func:`split_by_time`."""
    split = split_by_time(interactions)
    return int(interactions.times[split.validation.start]), int(interactions.times[split.test.start])


def split_at(interactions: Interactions, boundaries: tuple[int, int]) -> Split:
    """Split at the times of the first row of the validation part and of the test part (microseconds since 1970)."""
    first, second = np.searchsorted(interactions.times, boundaries).tolist()
    return Split(train=slice(0, first), validation=slice(first, second), test=slice(second, len(interactions)))


def split_by_user(interactions: Interactions, *, folds: int, fold: int) -> tuple[NDArray[np.int64], Split]:
    """Assign users to folds: one fold is the test part, the next the validation part, all others the training part.

    Returns:
        Rows sorted by part and by time within each part, and the split of this order.

    Raises:
        UserError: there are fewer users than folds, or a fold has one label only.
    """
    users = np.unique(interactions.users)
    dealt = np.full(interactions.n_users, -1)
    dealt[users] = np.random.default_rng(0).permutation(len(users)) % folds
    of_rows = dealt[interactions.users]
    for number in range(folds):
        labels = interactions.labels[of_rows == number]
        if not len(labels) or (labels.min() == labels.max() and not interactions.implicit):
            raise UserError(
                f"cannot evaluate layers on held-out users: of {len(users):,} users in {folds} groups, one has no "
                "rating or one label only; set train.layers, or provide interactions of more users"
            )
    part = np.select([of_rows == fold, of_rows == (fold + 1) % folds], [2, 1], 0)
    first, second, _ = np.cumsum(np.bincount(part, minlength=3)).tolist()
    split = Split(train=slice(0, first), validation=slice(first, second), test=slice(second, len(part)))
    return np.argsort(part, kind="stable"), split


def _start_of_moment(times: NDArray[np.int64], row: int) -> int:
    return int(np.searchsorted(times, times[row])) if row < len(times) else row


def histories(interactions: Interactions, *, length: int, label: int) -> NDArray[np.int32]:
    """Return the items that each row's user had with ``label`` strictly before the row's time.

    Returns:
        int32 [n, length], newest first, and the later row first at equal times; −1 is padding.
    """
    users, times = interactions.users, interactions.times
    # Distinct times are numbered, because a user and a number fit into 64 bits together, but a user and a time do not.
    moments = np.cumsum(np.diff(times, prepend=times[:1]) > 0)
    keys = users * (len(times) + 1) + moments
    rows = np.flatnonzero(interactions.labels == label)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    items = interactions.items[rows]
    starts = np.searchsorted(users[rows], users)
    ends = np.searchsorted(keys[rows], keys)
    found = np.full((len(users), length), -1, np.int32)
    # Column by column, because a matrix of all positions would take several times the memory of the result.
    for column in range(length):
        places = ends - 1 - column
        has = places >= starts
        found[has, column] = items[places[has]]
    return found

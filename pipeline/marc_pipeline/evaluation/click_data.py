"""Interactions for the click model: parts of a split, histories, cold items, and negatives if there are no ratings."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.negatives import with_negatives
from marc_pipeline.training.time_split import Split, histories, split_at, split_by_user

COLD_RATINGS = 5
EVALUATED_ROWS = 400_000
"""Most rows of a click model, negatives included; of more rows, a sample of users is kept."""
SAMPLE_SEED = 0


@dataclass(frozen=True, eq=False)
class ClickData:
    """Interactions and histories for the click model, sorted by time within each part.

    Attributes:
        users, items: int64 [n].
        labels: float32 [n], 1 for a click, else 0.
        clicks: int32 [n, k], items that the row's user had clicked strictly before; −1 is padding.
        split: rows of the three parts.
        n_users, n_items: numbers of users and items.
        cold: bool [test rows], whether the item has fewer than ``COLD_RATINGS`` ratings in the training part.
        weights: float32 [n], weights of the rows.
        taken: int64, sorted distinct keys ``user · n_items + item`` of all clicks before the test part.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    labels: NDArray[np.float32]
    clicks: NDArray[np.int32]
    split: Split
    n_users: int
    n_items: int
    cold: NDArray[np.bool_]
    weights: NDArray[np.float32]
    taken: NDArray[np.int64]


def click_data(
    interactions: Interactions,
    split: Split,
    *,
    n_items: int,
    history: int,
    order: NDArray[np.int64] | None = None,
    implicit: bool = False,
) -> ClickData:
    """Add histories of at most ``history`` clicks to interactions, and mark cold items.

    ``n_items`` is the number of items in the catalogue. ``order`` are row numbers in the order of ``split``; None if
    the split has the order of time. ``implicit`` tells that the rows without a click are sampled negatives.
    """
    rows = np.arange(len(interactions)) if order is None else order
    users, items, labels = interactions.users[rows], interactions.items[rows], interactions.labels[rows]
    learned = split.train
    # Sampled negatives say nothing about how often an item was rated.
    rated = items[learned][labels[learned] > 0] if implicit else items[learned]
    earlier = np.flatnonzero(labels[: split.test.start] > 0)
    return ClickData(
        users=users,
        items=items,
        labels=labels,
        clicks=histories(interactions, length=history, label=1)[rows],
        split=split,
        n_users=interactions.n_users,
        n_items=n_items,
        cold=np.bincount(rated, minlength=n_items)[items[split.test]] < COLD_RATINGS,
        weights=interactions.weights[rows],
        taken=np.unique(users[earlier] * n_items + items[earlier]),
    )


def time_split_data(
    interactions: Interactions, boundaries: tuple[int, int], *, items: int, settings: InteractionSettings
) -> ClickData:
    """Return the data of the split by time; positives get negatives that are drawn once.

    Of more than ``EVALUATED_ROWS`` rows, a sample of users is kept. ``boundaries`` are the times of the first row of
    the validation part and of the test part; ``items`` is the number of items in the catalogue.
    """
    kept = sample_users(interactions, rows_within(interactions, EVALUATED_ROWS, settings))
    known = int(np.searchsorted(kept.times, boundaries[0]))
    rows = with_negatives(kept, known=known, items=items, settings=settings)
    return click_data(
        rows, split_at(rows, boundaries), n_items=items, history=settings.history, implicit=interactions.implicit
    )


def user_fold_data(
    interactions: Interactions, *, folds: int, fold: int, items: int, settings: InteractionSettings
) -> tuple[ClickData, Interactions]:
    """Return the data of a split by user, and the interactions of its training users.

    Most users of a test part are new, too. A period of time would contain few users, so that the AUC would depend on
    them more than on the vectors.

    Raises:
        UserError: there are too few users, or a fold has one label only.
    """
    order, split = split_by_user(interactions, folds=folds, fold=fold)
    learned = interactions.take(np.sort(order[split.train]))
    rows = with_negatives(interactions, known=len(interactions), items=items, settings=settings)
    order, split = split_by_user(rows, folds=folds, fold=fold)
    data = click_data(rows, split, n_items=items, history=settings.history, order=order, implicit=interactions.implicit)
    return data, learned


def sample_users(interactions: Interactions, most: int) -> Interactions:
    """Return a repeatable sample of users with all their interactions, about ``most`` rows, or all of fewer rows.

    The users of a sample are numbered anew.
    """
    if len(interactions) <= most:
        return interactions
    counts = np.bincount(interactions.users)
    order = np.random.default_rng(SAMPLE_SEED).permutation(len(counts))
    kept = np.zeros(len(counts), bool)
    kept[order[: max(1, int(np.searchsorted(np.cumsum(counts[order]), most, side="right")))]] = True
    found = interactions.take(np.flatnonzero(kept[interactions.users]))
    return replace(found, users=np.unique(found.users, return_inverse=True)[1])


def rows_within(interactions: Interactions, most: int, settings: InteractionSettings) -> int:
    """Return the number of interactions that are at most ``most`` rows together with their negatives."""
    return most // (1 + settings.negatives) if interactions.implicit else most

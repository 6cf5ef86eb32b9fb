"""Generated clicks: users with tastes, and item states that contain the relevant qualities and much noise."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import TrainSettings
from pipeline.interactions import Interactions
from pipeline.model.learning import LearningData, learning_data

USERS, ITEMS, WIDTH, ROWS, QUALITIES = 60, 120, 24, 3000, 3
NEW = 10
HISTORY = 5


def clicks(
    *, users: int = USERS, items: int = ITEMS, rows: int = ROWS, seed: int = 0
) -> tuple[Interactions, NDArray[np.float32]]:
    """Interactions and states [items, WIDTH]; items 0 to NEW − 1 have no row in the first four fifths.

    A user clicks items with the qualities they like. The states contain the qualities linearly, in directions of low
    variance compared with the noise. Some rows have the same time.
    """
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    hidden = 3 * rng.normal(size=(items, WIDTH))
    hidden[:, :QUALITIES] = qualities(items=items, seed=seed) + hidden[:, :QUALITIES] / 15
    drawn = rng.integers(users, size=rows)
    rated = rng.integers(np.where(np.arange(rows) < rows * 4 // 5, NEW, 0), items)
    liking = 2 * rng.normal(size=(users, QUALITIES))
    wish = (liking[drawn] * qualities(items=items, seed=seed)[rated]).sum(axis=1) + rng.logistic(size=rows)
    _, first, inverse = np.unique(drawn, return_index=True, return_inverse=True)
    interactions = Interactions(
        users=np.argsort(np.argsort(first))[inverse],
        items=rated,
        labels=(wish > 0).astype(np.float32),
        times=np.cumsum(rng.integers(0, 4, size=rows)),
    )
    return interactions, (hidden @ mixing + rng.normal(size=WIDTH)).astype(np.float32)


def qualities(*, items: int = ITEMS, seed: int = 0) -> NDArray[np.float64]:
    """Qualities that users like or dislike [items, QUALITIES]."""
    return np.random.default_rng([seed, 1]).normal(size=(items, QUALITIES))


def before_boundary(interactions: Interactions) -> slice:
    """About the first four fifths of the rows; all other rows have a later time."""
    return slice(0, int(np.searchsorted(interactions.times, interactions.times[len(interactions) * 4 // 5])))


def learnable(*, holdout: float = 0.1, **shape: int) -> tuple[LearningData, NDArray[np.float32]]:
    """Training data of generated clicks, and the states of all items."""
    interactions, states = clicks(**shape)
    part = interactions.take(before_boundary(interactions))
    return learning_data(part, history=HISTORY, holdout=holdout), states


def train_settings(**changes: Any) -> TrainSettings:
    """Settings that train on generated clicks in a fraction of a second."""
    small: dict[str, Any] = {"dim": 6, "hidden": 16, "batch": 128, "warm_up": 5, "epochs": 2, "dropout": 0.2}
    return TrainSettings(**{**small, **changes})

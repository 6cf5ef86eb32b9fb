"""User texts: their states follow those of the items, and they improve the AUC of users without a history."""

import numpy as np
import torch

from marc_pipeline.config import InteractionSettings, TrainSettings
from marc_pipeline.evaluation.factory import new_objective
from marc_pipeline.training.fit import fit
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import LearningData, learning_data

USERS, ITEMS, WIDTH, DIM = 80, 60, 12, 4
TRAIN = TrainSettings(hidden=8, dropout=0.0, batch=128, epochs=12, warm_up=0.1, patience=12, holdout=0.2)


def data(*, texts: bool) -> tuple[np.ndarray, LearningData]:
    """Clicks that follow a taste, which the user's text describes; no user has a history."""
    rng = np.random.default_rng(0)
    tastes, kinds = rng.standard_normal((USERS, 2)), rng.standard_normal((ITEMS, 2))
    n = 4000
    # Users arrive one after the other: those of the holdout are not in the training part.
    users = np.sort(rng.integers(0, USERS, n))
    items = rng.integers(0, ITEMS, n)
    labels = ((tastes[users] * kinds[items]).sum(axis=1) > 0).astype(np.float32)
    spread = rng.standard_normal((2, WIDTH))
    states = np.concatenate([kinds, tastes]) @ spread + 0.1 * rng.standard_normal((ITEMS + USERS, WIDTH))
    interactions = Interactions(
        users=users,
        items=items,
        labels=labels,
        # One time per user, so that no user has a history.
        times=users.astype(np.int64),
        profiles=users.astype(np.int64) if texts else None,
        profile_texts=tuple(f"user {number}" for number in range(USERS)) if texts else (),
    )
    learned = learning_data(interactions, settings=InteractionSettings(history=3), holdout=0.2, items=ITEMS)
    return states.astype(np.float32), learned


def auc(*, texts: bool) -> float:
    states, learned = data(texts=texts)
    objective = new_objective("marc", states=states, data=learned, dim=DIM, seed=0, train=TRAIN)
    return fit(objective, training=learned.training, validation=learned.holdout, settings=TRAIN, seed=0, label="").best


def test_user_texts_raise_the_auc_of_users_without_a_history() -> None:
    assert auc(texts=False) < 0.65
    assert auc(texts=True) > 0.75


def test_profile_rows_follow_the_items_and_missing_profiles_are_padding() -> None:
    users = np.array([0, 1, 0, 1])
    interactions = Interactions(
        users=users,
        items=np.array([0, 1, 1, 0]),
        labels=np.array([0, 1, 1, 0], dtype=np.float32),
        times=np.arange(4),
        profiles=np.array([0, -1, 1, -1]),
        profile_texts=("likes trains", "likes ships"),
    )
    learned = learning_data(interactions, settings=InteractionSettings(history=2), holdout=0.25, items=10)
    assert learned.rows.profiles is not None
    assert learned.rows.profiles.tolist() == [[10], [-1], [11], [-1]]
    assert torch.equal(learned.known, torch.tensor([0, 1]))
    assert interactions.take(slice(1, 3)).profiles is not None

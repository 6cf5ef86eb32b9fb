"""Sampled negatives: never an item that the user took, by popularity, reproducible, and without a look ahead."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.config import InteractionSettings
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.negatives import NegativeSampler, with_negatives

WANTED = InteractionSettings(history=3, negatives=3)


def purchases(pairs: list[tuple[int, int]]) -> Interactions:
    """Positives in this order, one per moment."""
    users, items = np.array(pairs, np.int64).reshape(-1, 2).T
    numbers = np.unique(users, return_inverse=True)[1]
    n = len(pairs)
    return Interactions(numbers, items.copy(), np.ones(n, np.float32), np.arange(n), implicit=True)


def shop(users: int = 30, items: int = 40, rows: int = 400, seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    liked = np.minimum(rng.geometric(0.1, rows) - 1, items - 1)
    return purchases(list(dict.fromkeys(zip(rng.integers(users, size=rows).tolist(), liked.tolist(), strict=True))))


def pairs_of(interactions: Interactions) -> set[tuple[int, int]]:
    return set(zip(interactions.users.tolist(), interactions.items.tolist(), strict=True))


PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=2, max_size=30, unique=True)


@given(PAIRS, st.integers(0, 2**32 - 1), st.floats(0, 2))
@settings(max_examples=150, deadline=None)
def test_no_negative_is_an_item_that_its_user_took(pairs: list[tuple[int, int]], seed: int, popularity: float) -> None:
    positives, items = purchases(pairs), 7
    sampler = NegativeSampler.of(positives, items=items, popularity=popularity, known=len(positives))
    users = np.repeat(np.arange(positives.n_users), 20)
    drawn = sampler.draw(users, np.random.default_rng(seed))
    taken = pairs_of(positives)
    for user, item in zip(users.tolist(), drawn.tolist(), strict=True):
        left = [other for other in range(items) if (user, other) not in taken]
        assert item in left if left else item == -1


def test_negatives_follow_the_popularity() -> None:
    positives, items = shop(), 40
    sampler = NegativeSampler.of(positives, items=items, popularity=0.75, known=300)
    user = positives.n_users  # a new user, who took nothing
    drawn = sampler.draw(np.full(200_000, user), np.random.default_rng(0))
    weights = (1 + np.bincount(positives.items[:300], minlength=items)) ** 0.75
    np.testing.assert_allclose(np.bincount(drawn, minlength=items) / len(drawn), weights / weights.sum(), atol=3e-3)


@given(PAIRS, st.floats(0.2, 0.9))
@settings(max_examples=100, deadline=None)
def test_an_evaluation_has_each_positive_and_its_negatives(pairs: list[tuple[int, int]], share: float) -> None:
    positives, items = purchases(pairs), 7
    known = max(1, round(len(positives) * share))
    found = with_negatives(positives, known=known, items=items, settings=WANTED)
    before, ever = pairs_of(positives.take(slice(0, known))), pairs_of(positives)
    boundary = positives.times[known] if known < len(positives) else len(positives)
    assert not found.implicit
    assert [*found.items[found.labels == 1]] == [*positives.items]
    for user, item, label, time in zip(found.users, found.items, found.labels, found.times, strict=True):
        if label == 0:
            assert (user, item) not in (before if time < boundary else ever)
    for user, time in zip(positives.users, positives.times, strict=True):
        own = before if time < boundary else ever
        some_left = any((user, item) not in own for item in range(items))
        assert (found.times == time).sum() == 1 + (WANTED.negatives if some_left else 0)
    again = with_negatives(positives, known=known, items=items, settings=WANTED)
    assert again.items.tobytes() == found.items.tobytes()


def test_negatives_of_the_training_part_do_not_depend_on_later_rows() -> None:
    positives, known = shop(), 250
    later = len(positives) - known
    users = np.append(positives.users[:known], np.random.default_rng(1).integers(30, size=later))
    other = Interactions(users, positives.items, positives.labels, positives.times, implicit=True)
    one, two = (with_negatives(rows, known=known, items=40, settings=WANTED) for rows in (positives, other))
    part = one.times < positives.times[known]
    assert one.items[part].tobytes() == two.items[part].tobytes()


def test_batches_draw_anew_and_repeatably() -> None:
    data = learning_data(shop(), settings=WANTED, holdout=0.2, items=40)
    rows = torch.arange(10, 30)
    batch = data.training.batch(rows, (1, 2))
    assert len(batch) == 20 * (1 + WANTED.negatives)
    assert batch.labels.tolist() == [1.0] * 20 + [0.0] * 60
    assert torch.equal(batch.items[:20], data.rows.items[rows])
    assert torch.equal(batch.clicked[20:40], batch.clicked[:20]), "a negative has the history of its positive"
    assert (batch.skipped == -1).all(), "a sampled negative is no history"
    assert torch.equal(batch.items, data.training.batch(rows, (1, 2)).items)
    assert not torch.equal(batch.items, data.training.batch(rows, (1, 3)).items)
    assert torch.equal(data.holdout.items, data.holdout.items)
    assert data.holdout.labels.mean() == pytest.approx(1 / (1 + WANTED.negatives))


def test_event_weights_scale_the_loss() -> None:
    positives = shop()
    weights = np.where(np.arange(len(positives)) % 2, 0.25, 1).astype(np.float32)
    weighted = Interactions(
        positives.users, positives.items, positives.labels, positives.times, weights=weights, implicit=True
    )
    batch = learning_data(weighted, settings=WANTED, holdout=0.2, items=40).training.batch(torch.arange(40), (0,))
    logits = torch.linspace(-2, 2, len(batch))
    assert batch.weights is not None
    each = [
        float(w) * float(torch.log1p(torch.exp(-x if label else x)))
        for w, x, label in zip(batch.weights, logits, batch.labels, strict=True)
    ]
    assert float(batch.click_loss(logits)) == pytest.approx(sum(each) / float(batch.weights.sum()), rel=1e-5)

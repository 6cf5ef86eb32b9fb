"""Training data row by row against loops over the interactions: histories, holdout, and no leaks from later rows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clicks import HISTORY, ITEMS, NEW, before_boundary, clicks, learnable
from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import LearningData, known_states, learning_data
from marc_pipeline.training.objective import Clicks


def learned(interactions: Interactions, *, history: int, holdout: float) -> LearningData:
    settings = InteractionSettings(history=history)
    return learning_data(interactions, settings=settings, holdout=holdout, items=ITEMS)


def naive_history(interactions: Interactions, row: int, *, label: int, length: int) -> list[int]:
    """Items of the row's user with an earlier time, newest first; at equal times, the later row first."""
    earlier = [
        (int(interactions.times[other]), other)
        for other in range(len(interactions))
        if interactions.users[other] == interactions.users[row]
        and interactions.times[other] < interactions.times[row]
        and interactions.labels[other] == label
    ]
    items = [int(interactions.items[other]) for _, other in sorted(earlier, reverse=True)][:length]
    return items + [-1] * (length - len(items))


def require_rows(found: Clicks, interactions: Interactions, first: int, *, length: int) -> None:
    for place in range(len(found)):
        row = first + place
        assert found.items[place] == interactions.items[row]
        assert found.labels[place] == interactions.labels[row]
        assert found.clicked[place].tolist() == naive_history(interactions, row, label=1, length=length)
        assert found.skipped[place].tolist() == naive_history(interactions, row, label=0, length=length)


@st.composite
def ratings(draw: st.DrawFn) -> Interactions:
    n = draw(st.integers(2, 40))
    users = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    numbers = {user: number for number, user in enumerate(dict.fromkeys(users))}
    return Interactions(
        users=np.array([numbers[user] for user in users], np.int64),
        items=np.array(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), np.int64),
        labels=np.array(draw(st.lists(st.sampled_from([0, 1]), min_size=n, max_size=n)), np.float32),
        times=np.cumsum(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))).astype(np.int64),
    )


@given(ratings(), st.integers(1, 4), st.floats(0.05, 0.95))
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_training_or_holdout_with_its_earlier_history(
    interactions: Interactions, length: int, share: float
) -> None:
    n = len(interactions)
    assume(round(n * (1 - share)) < n)
    wanted = interactions.times[round(n * (1 - share))]
    assume(wanted > interactions.times[0])
    data = learned(interactions, history=length, holdout=share)
    cut = len(data.training)
    assert cut + len(data.holdout) == n
    require_rows(data.training, interactions, 0, length=length)
    require_rows(data.holdout, interactions, cut, length=length)
    assert data.fitted[1].tolist() == interactions.users[:cut].tolist()
    assert data.known.tolist() == sorted(set(interactions.items[:cut].tolist()))
    # All rows of one time are on the same side: in the holdout.
    assert interactions.times[:cut].max() < interactions.times[cut:].min() == wanted


def arrays(data: LearningData) -> list[bytes]:
    parts = (data.training, data.holdout)
    tensors = [part for clicks in parts for part in (clicks.items, clicks.clicked, clicks.skipped, clicks.labels)]
    return [tensor.numpy().tobytes() for tensor in (*tensors, data.fitted[1], data.known)]


@given(ratings(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_later_rows_do_not_change_the_training_data(interactions: Interactions, seed: int) -> None:
    part = slice(0, len(interactions) * 2 // 3)
    assume(part.stop >= 2)
    assume(interactions.times[round(part.stop / 2)] > interactions.times[0])
    rng, later = np.random.default_rng(seed), len(interactions) - part.stop
    scrambled = replace(
        interactions,
        users=np.append(interactions.users[part], rng.integers(0, 9, size=later)),
        items=np.append(interactions.items[part], rng.integers(0, 99, size=later)),
        labels=np.append(interactions.labels[part], rng.integers(0, 2, size=later).astype(np.float32)),
    )
    one, other = (learned(rows.take(part), history=3, holdout=0.5) for rows in (interactions, scrambled))
    assert arrays(one) == arrays(other)


def test_training_histories_do_not_contain_held_out_rows() -> None:
    interactions, _ = clicks()
    part = interactions.take(before_boundary(interactions))
    data = learned(part, history=HISTORY, holdout=0.1)
    cut = len(data.training)
    scrambled = replace(
        part,
        labels=np.append(part.labels[:cut], 1 - part.labels[cut:]),
        items=np.append(part.items[:cut], part.items[cut:][::-1]),
    )
    other = learned(scrambled, history=HISTORY, holdout=0.1)
    assert torch.equal(data.training.clicked, other.training.clicked)
    assert torch.equal(data.training.skipped, other.training.skipped)
    assert torch.equal(data.known, other.known)


def test_known_states_are_those_of_training_items() -> None:
    data, states = learnable()
    assert not set(data.known.tolist()) & set(range(NEW))
    found = known_states(states, data)
    assert found.shape == (len(data.known), states.shape[1])
    assert all(np.array_equal(row, states[item]) for row, item in zip(found, data.known.tolist(), strict=True))


def test_the_holdout_has_the_configured_share_and_whole_trains_on_every_row() -> None:
    for share in (0.1, 0.25, 0.5):
        data, _ = learnable(holdout=share)
        assert len(data.holdout) / (len(data.training) + len(data.holdout)) == pytest.approx(share, abs=0.01)
    whole = data.whole()
    assert torch.equal(whole.training.items, torch.cat([data.training.items, data.holdout.items]))
    assert torch.equal(whole.training.clicked, torch.cat([data.training.clicked, data.holdout.clicked]))
    assert len(whole.fitted[1]) == len(whole.training)
    assert whole.known.tolist() == sorted(set(whole.training.items.tolist()))
    assert len(data.training) < len(whole.training)  # the original is unchanged


def test_training_rows_share_the_memory_of_all_rows_and_fits_have_no_histories() -> None:
    data, _ = learnable()
    for rows, training in ((data.rows, data.training), (data.rows, data.whole().training)):
        assert isinstance(training, Clicks)
        assert training.clicked.data_ptr() == rows.clicked.data_ptr()
    assert data.fitted[0].clicked.numel() == data.fitted[0].skipped.numel() == 0


def test_an_empty_holdout_or_training_part_is_refused() -> None:
    interactions, _ = clicks()
    with pytest.raises(UserError, match="splits 100 interactions into 100 for training and 0 for early stopping"):
        learned(interactions.take(slice(0, 100)), history=HISTORY, holdout=0.001)
    with pytest.raises(UserError, match=r"splits 3,000 interactions into 0 for training"):
        learned(replace(interactions, times=np.zeros(len(interactions), np.int64)), history=2, holdout=0.1)

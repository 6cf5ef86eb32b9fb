"""The choice of a layer from scores, and the data of evaluations within the training part."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clicks import clicks as made_up_clicks
from marc_pipeline.evaluation import tasks as evaluation
from marc_pipeline.evaluation.layer_choice import choose_layer
from marc_pipeline.evaluation.tasks import FOLDS
from marc_pipeline.training.time_split import histories, split_by_time


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        pytest.param({1: [0.6, 0.6], 2: [0.7, 0.7], 3: [0.6, 0.6]}, 2, id="one is best in every fold"),
        pytest.param({1: [0.9, 0.5], 2: [0.7, 0.8], 3: [0.6, 0.6]}, 2, id="the mean decides, not one fold"),
        pytest.param({n: [auc] for n, auc in enumerate([6, 8, 9, 8, 9.1, 2], 1)}, 3, id="a lucky layer at the edge"),
        pytest.param({n: [auc] for n, auc in enumerate([1, 2, 4, 8, 9], 1)}, 5, id="rising to the end"),
        pytest.param({n: [auc] for n, auc in enumerate([9, 8, 4, 2, 1], 1)}, 1, id="falling from the start"),
        pytest.param({3: [0.7], 1: [0.7], 2: [0.7]}, 1, id="of equals the lowest"),
        pytest.param({1: [0.7], 2: [0.8]}, 2, id="two layers"),
        pytest.param({1: [0.7, 0.7]}, 1, id="one layer"),
    ],
)
def test_the_layer_with_the_highest_curve_is_chosen(scores: dict[int, list[float]], chosen: int) -> None:
    assert choose_layer(scores) == chosen


@given(st.lists(st.lists(st.integers(500, 900), min_size=5, max_size=5), min_size=1, max_size=8), st.integers(-200, 90))
def test_a_constant_added_to_all_scores_does_not_change_the_choice(scores: list[list[int]], shift: int) -> None:
    plain = {layer: [auc / 1000 for auc in aucs] for layer, aucs in enumerate(scores, start=1)}
    moved = {layer: [auc + shift / 1000 for auc in aucs] for layer, aucs in plain.items()}
    assert choose_layer(plain) == choose_layer(moved)


@given(st.integers(3, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_choice_is_close_to_the_best_layer_under_noise(layers: int, place: float, seed: int) -> None:
    depth = np.arange(1, layers + 1) / layers
    curve = -((depth - place) ** 2)
    noisy = curve + np.random.default_rng(seed).normal(0, 0.02, layers)
    chosen = choose_layer({layer: [auc] for layer, auc in enumerate(noisy, start=1)})
    assert curve.max() - curve[chosen - 1] < 0.1


@pytest.mark.parametrize("fold", [*range(FOLDS), None])
def test_a_choice_within_the_training_part_learns_from_other_users(fold: int | None) -> None:
    interactions, states = made_up_clicks()
    part = split_by_time(interactions)
    training_set = SimpleNamespace(interactions=interactions, split=part, item_ids=["i"] * len(states))
    data, learned = evaluation._data(training_set, 3, fold=fold)  # type: ignore[arg-type]
    if fold is None:
        assert (data.split, len(learned), len(data.labels)) == (part, part.train.stop, len(interactions))
        return
    held_out = {*data.users[data.split.validation].tolist(), *data.users[data.split.test].tolist()}
    assert held_out
    assert not held_out & set(learned.users.tolist())
    assert set(learned.users.tolist()) == set(data.users[data.split.train].tolist())
    assert learned.times[-1] <= interactions.times[part.train.stop - 1]
    # The rows are those of the training part, each with its own history.
    wanted, shown = histories(interactions.take(part.train), length=3, label=1), interactions.take(part.train)
    rows = zip(shown.users.tolist(), shown.items.tolist(), shown.labels.tolist(), wanted.tolist(), strict=True)
    found = zip(data.users.tolist(), data.items.tolist(), data.labels.tolist(), data.clicks.tolist(), strict=True)
    assert sorted(found) == sorted(rows)

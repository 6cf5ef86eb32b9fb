"""The choice of a layer from scores, the search for it, and the data of evaluations within the training part."""

from collections.abc import Callable
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from clicks import clicks as made_up_clicks
from marc_pipeline.config import InteractionSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation import layer_search
from marc_pipeline.evaluation.click_data import user_fold_data
from marc_pipeline.evaluation.layer_choice import choose_layer, final_scores
from marc_pipeline.evaluation.layer_search import FINALISTS, FOLDS, RANDOM, SampledShop, beats_random, search_layers
from marc_pipeline.evaluation.recipe_search import WEIGHTS, Recipe, choose_recipe, weights
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.time_split import histories, split_by_time

pytestmark = pytest.mark.usefixtures("one_thread")

WANTED = InteractionSettings(history=3)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        pytest.param({0: [0.6, 0.6], 1: [0.7, 0.7], 2: [0.6, 0.6]}, 1, id="one is best in every fold"),
        pytest.param({0: [0.6, 0.75, 0.5], 1: [0.7, 0.72, 0.7], 2: [0.6, 0.6, 0.6]}, 1, id="the mean decides"),
        pytest.param({3: [0.7], 1: [0.7], 2: [0.7]}, 1, id="of equals the lowest"),
        pytest.param({0: [0.70, 0.72, 0.74], 5: [0.72, 0.71, 0.74]}, 0, id="the difference is within its error"),
        pytest.param({0: [0.70, 0.72, 0.74], 5: [0.71, 0.73, 0.75]}, 5, id="folds differ more than layers"),
        pytest.param({0: [0.99], 4: [0.7, 0.7], 5: [0.8, 0.8]}, 5, id="a layer that left the search"),
        pytest.param({1: [0.7, 0.7]}, 1, id="one layer"),
    ],
)
def test_the_cheapest_layer_within_one_standard_error_is_chosen(scores: dict[int, list[float]], chosen: int) -> None:
    assert choose_layer(scores) == chosen


AUCS = st.lists(st.lists(st.integers(500, 900), min_size=5, max_size=5), min_size=1, max_size=8)


@given(AUCS, st.integers(-200, 90))
def test_a_constant_added_to_all_scores_does_not_change_the_choice(scores: list[list[int]], shift: int) -> None:
    plain = {layer: [auc / 1000 for auc in aucs] for layer, aucs in enumerate(scores)}
    moved = {layer: [auc + shift / 1000 for auc in aucs] for layer, aucs in plain.items()}
    assert choose_layer(plain) == choose_layer(moved)


@given(AUCS)
def test_no_cheaper_layer_is_as_good_as_the_choice_in_every_fold(scores: list[list[int]]) -> None:
    given_scores = {layer: [auc / 1000 for auc in aucs] for layer, aucs in enumerate(scores)}
    chosen = choose_layer(given_scores)
    best = max(map(fmean, given_scores.values()))
    for layer, aucs in given_scores.items():
        if fmean(aucs) == best:
            assert chosen <= layer
        if layer < chosen:
            assert fmean(aucs) < best


def test_ten_seeds_of_noise_seldom_miss_a_good_layer() -> None:
    """The choice costs at most a little more than the standard error, over many draws."""
    rng = np.random.default_rng(0)
    curve = np.array([0.60, 0.64, 0.68, 0.70, 0.705, 0.70, 0.69])
    chosen = [
        choose_layer(dict(enumerate((curve[:, None] + rng.normal(0, 0.01, (7, 5))).tolist()))) for _ in range(200)
    ]
    assert np.mean(curve[chosen] >= 0.69) > 0.95


def shop(layers: int, told: int, *, rows: int = 6000, users: int = 80) -> tuple[Interactions, Callable[..., NDArray]]:
    """Clicks that only the states of one layer tell, and a function that returns the states of a layer."""
    interactions, states = made_up_clicks(rows=rows, users=users)
    part = split_by_time(interactions).train

    def of(layer: int, items: NDArray[np.int64]) -> NDArray[np.float32]:
        assert 0 <= layer < layers
        noise = np.random.default_rng(layer).normal(size=states.shape).astype(np.float32)
        return np.asarray((states if layer == told else noise)[items])

    return interactions.take(part), of


@pytest.mark.parametrize(("layers", "told"), [(4, 2), (4, 0), (21, 17)])
def test_the_search_finds_the_layer_that_tells_the_clicks(
    layers: int, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_search, "ROUND_ROWS", 2000)
    interactions, states = shop(layers, told)
    items = 120
    asked = []

    def counted(layer: int, wanted: NDArray[np.int64]) -> NDArray[np.float32]:
        asked.append(layer)
        return states(layer, wanted)

    scores = search_layers(
        interactions, counted, layers=range(layers), items=items, dim=6, settings=WANTED, holdout=0.1
    )
    layer_scores = {layer: aucs for layer, aucs in scores.items() if layer != RANDOM}
    assert layer_scores.keys() == set(range(layers))
    finalists = final_scores(layer_scores)
    assert len(finalists) == min(layers, FINALISTS)
    assert {len(aucs) for aucs in finalists.values()} == {len(scores[RANDOM])} == {FOLDS}
    assert choose_layer(layer_scores) == told
    assert beats_random(scores)
    # Halving reads each layer twice, and the finalists once per fold and round.
    assert len(asked) <= 3 * layers + FINALISTS * (FOLDS + 1)


def test_layers_that_say_nothing_do_not_beat_random_vectors() -> None:
    interactions, states = shop(3, told=-1)
    scores = search_layers(interactions, states, layers=range(3), items=120, dim=6, settings=WANTED, holdout=0.1)
    assert not beats_random(scores)


def test_a_sampled_shop_has_the_items_of_its_users_only() -> None:
    interactions, _ = made_up_clicks()
    found = SampledShop.of(interactions, rows=500, items=120, settings=WANTED)
    assert len(found.interactions) <= 500
    names = found.items[found.interactions.items]
    assert set(names.tolist()) == set(found.items.tolist())
    rows = set(zip(interactions.items.tolist(), interactions.times.tolist(), interactions.labels.tolist(), strict=True))
    assert (
        set(zip(names.tolist(), found.interactions.times.tolist(), found.interactions.labels.tolist(), strict=True))
        <= rows
    )
    whole = SampledShop.of(interactions, rows=10**6, items=120, settings=WANTED)
    assert whole.interactions is interactions
    assert whole.items.tolist() == list(range(120))


@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_choice_within_the_training_part_learns_from_other_users(fold: int) -> None:
    interactions, states = made_up_clicks()
    shown = interactions.take(split_by_time(interactions).train)
    data, learned = user_fold_data(shown, folds=FOLDS, fold=fold, items=len(states), settings=WANTED)
    held_out = {*data.users[data.split.validation].tolist(), *data.users[data.split.test].tolist()}
    assert held_out
    assert not held_out & set(learned.users.tolist())
    assert set(learned.users.tolist()) == set(data.users[data.split.train].tolist())
    # The rows are those of the training part, each with its own history.
    wanted = histories(shown, length=3, label=1)
    rows = zip(shown.users.tolist(), shown.items.tolist(), shown.labels.tolist(), wanted.tolist(), strict=True)
    found = zip(data.users.tolist(), data.items.tolist(), data.labels.tolist(), data.clicks.tolist(), strict=True)
    assert sorted(found) == sorted(rows)


def test_configured_weights_are_not_searched() -> None:
    assert weights(TrainSettings()) == list(WEIGHTS)
    assert weights(TrainSettings(keep=0.3)) == [(0.3, beta) for beta in dict.fromkeys(beta for _, beta in WEIGHTS)]
    assert weights(TrainSettings(keep=0.3, decouple=0.0)) == [(0.3, 0.0)]


def test_the_recipe_with_the_highest_auc_is_chosen_of_equals_the_shorter() -> None:
    scores = {Recipe(0.0, 0.1, 1): 0.6, Recipe(0.0, 0.1, 2): 0.7, Recipe(0.0, 0.1): 0.7, Recipe(0.5, 0.1, 1): 0.65}
    assert choose_recipe(scores) == Recipe(0.0, 0.1, 2)


def test_a_layer_whose_states_are_equal_is_left_out() -> None:
    """With cls pooling, the embeddings of all texts are equal except for rounding."""
    interactions, states = shop(4, told=2)

    def of(layer: int, items: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.full((len(items), 24), 0.1, np.float32) if layer == 0 else states(layer, items)

    scores = search_layers(interactions, of, layers=range(4), items=120, dim=6, settings=WANTED, holdout=0.1)
    assert scores.keys() == {RANDOM, 1, 2, 3}
    with pytest.raises(UserError, match=r"train.dim is 6: the states of no layer span so many directions"):
        search_layers(interactions, of, layers=[0], items=120, dim=6, settings=WANTED, holdout=0.1)

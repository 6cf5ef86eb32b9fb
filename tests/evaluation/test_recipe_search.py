"""The choice of a training's recipe on held-out users of the training part."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clicks import SHORT, clicks, train_settings
from marc_pipeline.config import TrainSettings
from marc_pipeline.evaluation import recipe_search
from marc_pipeline.evaluation.click_data import user_fold_data
from marc_pipeline.evaluation.layer_search import SampledShop
from marc_pipeline.evaluation.recipe_search import Recipe, choose_recipe, lengths, search_recipes, train_recipe, weights
from marc_pipeline.resources import TaskResources

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (32, [1, 2, 4, 8, 16, 32]), (40, [1, 2, 4, 8, 16, 32, 40])],
)
def test_lengths(epochs: int, expected: list[int]) -> None:
    assert lengths(TrainSettings(epochs=epochs)) == expected


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ({}, [(0.0, 0.1), (0.5, 0.1), (0.0, 0.0)]),
        ({"keep": 0.2}, [(0.2, 0.1), (0.2, 0.0)]),
        ({"keep": 0.2, "decouple": 0.3}, [(0.2, 0.3)]),
    ],
)
def test_configured_weights_are_kept(configured: dict[str, float], expected: list[tuple[float, float]]) -> None:
    assert weights(TrainSettings(**configured)) == expected


def test_of_equal_recipes_the_shorter_one() -> None:
    scores = {Recipe(0, 0.1, 1): 0.6, Recipe(0, 0.1, 2): 0.7, Recipe(0, 0.1, 4): 0.7, Recipe(0.5, 0.1, 2): 0.65}
    assert choose_recipe(scores) == Recipe(0, 0.1, 2)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training set of generated clicks, and a deployment whose tasks run in this process, without files."""
    interactions, states = clicks()
    train = train_settings(epochs=3, learning_rate=0.01)
    settings = SimpleNamespace(train=train, interactions=SHORT, work_uri="")
    training_set = SimpleNamespace(
        interactions=interactions,
        split=SimpleNamespace(train=slice(0, len(interactions))),
        item_ids=[str(number) for number in range(len(states))],
        card=SimpleNamespace(training_id="made up"),
        states=lambda layer, items: states[items],
    )
    progress = SimpleNamespace(clear=lambda _: None, write=lambda *_: None, total=lambda: 0)
    monkeypatch.setattr(recipe_search, "cached_training_set", lambda *_: training_set)
    monkeypatch.setattr(recipe_search, "progress_files", lambda *_: progress)
    run = lambda spark, task, tasks, **_: [task(one, TaskResources(cpus=1)) for one in tasks]  # noqa: E731
    monkeypatch.setattr(recipe_search, "run_buckets", run)
    return SimpleNamespace(
        deployment=SimpleNamespace(settings=settings, storage=None), training_set=training_set, train=train
    )


def test_every_length_is_scored_then_the_other_weights_at_the_best_one(world: Any) -> None:
    scores = search_recipes(None, world.deployment, world.training_set, layer=1)
    first = {recipe: auc for recipe, auc in scores.items() if (recipe.keep, recipe.decouple) == (0.0, 0.1)}
    assert [recipe.epochs for recipe in first] == [1, 2, 3]
    best = choose_recipe(first).epochs
    assert set(scores) - set(first) == {Recipe(0.5, 0.1, best), Recipe(0.0, 0.0, best)}
    assert all(0 < auc < 1 for auc in scores.values())


def test_a_length_has_the_vectors_of_a_training_of_this_length_without_the_held_out_users(world: Any) -> None:
    def made(epochs: int, **changes: Any) -> dict[Recipe, np.ndarray]:
        world.deployment.settings.train = world.train.model_copy(update=changes)
        task = recipe_search.RecipeTask(0, world.deployment, "made up", 1, Recipe(0.0, 0.1, epochs), 1)
        fold, found = train_recipe(task, TaskResources(cpus=1))
        assert fold == 1
        return found

    found = made(3)
    assert {recipe.epochs for recipe in found} == {1, 2, 3}
    np.testing.assert_array_equal(found[Recipe(0.0, 0.1, 2)], made(2)[Recipe(0.0, 0.1, 2)])
    # A cap ends this training as it ends the final one.
    assert {recipe.epochs for recipe in made(3, max_steps=1)} == {3}
    interactions = world.training_set.interactions
    shop = SampledShop.of(interactions, rows=10**9, items=len(world.training_set.item_ids), settings=SHORT)
    items = len(shop.items)
    _, learned = user_fold_data(shop.interactions, folds=recipe_search.FOLDS, fold=1, items=items, settings=SHORT)
    held_out = ~np.isin(interactions.users, learned.users)
    assert 0 < held_out.sum() < len(interactions)
    # Other labels of held-out users change nothing.
    labels = np.where(held_out, 1 - interactions.labels, interactions.labels)
    world.training_set.interactions = replace(interactions, labels=labels)
    np.testing.assert_array_equal(made(3)[Recipe(0.0, 0.1, 2)], found[Recipe(0.0, 0.1, 2)])

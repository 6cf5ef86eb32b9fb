"""Every system of the yardstick: finite vectors, the same every time, and nothing of what lies behind the boundary."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clicks import HISTORY, ITEMS, NEW, WIDTH, before_boundary, clicks, train_settings
from marc_pipeline.evaluation import systems as module
from marc_pipeline.evaluation.systems import KEEP, System, build, make_vectors, sweep_systems, systems, tuned_systems
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import LearningData, learning_data
from marc_pipeline.training.marc import Marc
from marc_pipeline.training.matching import CrossingNetwork, ResidualNetwork

pytestmark = pytest.mark.usefixtures("one_thread")

Vectors = NDArray[np.float32]
Learn = Callable[[Interactions, slice], LearningData]

DIM = 6
TRAIN = train_settings(epochs=1, batch=256)
SYSTEMS = [*systems(1), *sweep_systems(1), *tuned_systems()]
WITHOUT_FIT = {"ids", "random"}
SEEDED = {"autoencoder", "mrl", "contrastive"} | {s.name for s in SYSTEMS if s.name.startswith("marc")} | {"random"}

every_system = pytest.mark.parametrize("system", [s for s in SYSTEMS if s.name != "ids"], ids=lambda s: s.name)
every_fitted_system = pytest.mark.parametrize(
    "system", [s for s in SYSTEMS if s.name not in WITHOUT_FIT], ids=lambda s: s.name
)


def of_the_training_part(interactions: Interactions, part: slice) -> LearningData:
    return learning_data(interactions.take(part), history=HISTORY, holdout=TRAIN.holdout)


def vectors(
    system: System,
    interactions: Interactions,
    states: Vectors,
    *,
    part: slice,
    learn: Learn = of_the_training_part,
    seed: int = 0,
) -> Vectors:
    found = make_vectors(system, states=states, data=learn(interactions, part), dim=DIM, seed=seed, train=TRAIN)
    assert found is not None
    return found


@lru_cache(maxsize=1)
def made_up() -> tuple[Interactions, Vectors, slice]:
    interactions, states = clicks()
    return interactions, states, before_boundary(interactions)


def own(system: System, *, seed: int = 0) -> Vectors:
    interactions, states, part = made_up()
    return vectors(system, interactions, states, part=part, seed=seed)


# All of them


def test_every_layer_and_every_family_is_compared() -> None:
    found = systems(4)
    names = [system.name for system in found]
    assert len(set(names)) == len(names)
    assert [s.layer for s in found if s.family == "layer"] == [0, 1, 2, 3, 4]
    assert {s.family for s in found} == {"reference", "layer", "baseline", "ablation", "marc"}
    assert {"ids", "random", "final-full", "regression", "autoencoder", "mrl", "contrastive", "marc"} <= set(names)


def test_ids_are_no_vectors() -> None:
    interactions, states, part = made_up()
    data = of_the_training_part(interactions, part)
    found = make_vectors(System("ids", "reference", None), states=states, data=data, dim=DIM, seed=0, train=TRAIN)
    assert found is None


@every_system
def test_a_system_gives_every_item_a_finite_vector_of_its_own(system: System) -> None:
    found = own(system)
    assert found.shape == (ITEMS, WIDTH if system.name == "final-full" else DIM)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.linalg.matrix_rank(found - found.mean(axis=0)) == found.shape[1]
    assert len({row.tobytes() for row in found}) == ITEMS


@every_system
def test_the_same_seed_gives_the_same_bits(system: System) -> None:
    first = own(system)
    torch.rand(3)
    np.random.default_rng().random()
    assert own(system).tobytes() == first.tobytes()
    assert (own(system, seed=1).tobytes() != first.tobytes()) == (system.name in SEEDED)


@pytest.mark.parametrize(
    ("name", "begins_as"),
    [
        ("autoencoder", System("pca-layer-1", "layer", 1)),
        ("mrl", System("pca-layer-1", "layer", 1)),
        ("contrastive", System("pca-layer-1", "layer", 1)),
        ("marc-pca-start", System("pca-layer-1", "layer", 1)),
        ("marc", System("regression", "baseline", "chosen")),
        ("marc-crossing", System("regression", "baseline", "chosen")),
    ],
)
def test_a_trained_system_begins_as_a_fitted_one_and_moves_on(name: str, begins_as: System) -> None:
    interactions, states, part = made_up()
    data = of_the_training_part(interactions, part)
    start = build(name, states=states, data=data.whole(), dim=DIM, seed=0, train=TRAIN).vectors().numpy()
    np.testing.assert_allclose(start, own(begins_as), atol=1e-4)
    start = build(name, states=states, data=data, dim=DIM, seed=0, train=TRAIN).vectors().numpy()
    assert np.abs(own(System(name, "marc", "chosen")) - start).max() > 0.01


def test_building_leaves_the_global_generator_as_it_was() -> None:
    interactions, states, part = made_up()
    before = torch.get_rng_state()
    build("marc", states=states, data=of_the_training_part(interactions, part), dim=DIM, seed=0, train=TRAIN)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "keep", "decouple", "network"),
    [
        ("marc", 0.0, 0.1, ResidualNetwork),
        ("marc-no-constraints", 0.0, 0.0, ResidualNetwork),
        ("marc-keep", KEEP, 0.1, ResidualNetwork),
        ("marc-pca-start", 0.0, 0.1, ResidualNetwork),
        ("marc-final", 0.0, 0.1, ResidualNetwork),
        ("marc-crossing", 0.0, 0.1, CrossingNetwork),
    ],
)
def test_an_ablation_differs_in_what_its_name_says(name: str, keep: float, decouple: float, network: type) -> None:
    interactions, states, part = made_up()
    data = of_the_training_part(interactions, part)
    objective = build(name, states=states, data=data, dim=DIM, seed=0, train=train_settings())
    assert isinstance(objective, Marc)
    assert (objective.constraints.keep, objective.constraints.decouple) == (keep, decouple)
    assert type(objective.matching) is network
    assert set(objective(data.training[torch.arange(50)])) == {
        "loss", "click", *(["keep"] if keep else []), *(["decouple"] if decouple else [])
    }  # fmt: skip


# What lies behind the boundary


def scrambled() -> tuple[Interactions, Vectors]:
    """Other users, items and labels behind the boundary, and other states of items that only occur there."""
    interactions, states, part = made_up()
    later, rng = len(interactions) - part.stop, np.random.default_rng(7)
    assert not set(interactions.items[part].tolist()) & set(range(NEW))
    changed = replace(
        interactions,
        users=np.append(interactions.users[part], rng.integers(interactions.n_users, size=later)),
        items=np.append(interactions.items[part], rng.integers(ITEMS, size=later)),
        labels=np.append(interactions.labels[part], rng.integers(0, 2, size=later).astype(np.float32)),
    )
    other = states.copy()
    other[:NEW] = 5 * rng.normal(size=(NEW, WIDTH))
    return changed, other


def leaks(system: System, *, learn: Learn = of_the_training_part) -> bool:
    """Whether vectors of items from before the boundary change with what lies behind it."""
    interactions, states, part = made_up()
    one = vectors(system, interactions, states, part=part, learn=learn)
    other = vectors(system, *scrambled(), part=part, learn=learn)
    return one[NEW:].tobytes() != other[NEW:].tobytes()


@every_fitted_system
def test_nothing_behind_the_boundary_has_a_say(system: System) -> None:
    assert not leaks(system)


@every_fitted_system
def test_a_training_that_sees_all_interactions_is_caught(system: System) -> None:
    def peeking(interactions: Interactions, _: slice) -> LearningData:
        return learning_data(interactions, history=HISTORY, holdout=TRAIN.holdout)

    assert leaks(system, learn=peeking)


@pytest.mark.parametrize(
    "system", [s for s in SYSTEMS if s.name in {"mrl", "contrastive", "marc", "regression"}], ids=lambda s: s.name
)
def test_a_training_that_sees_labels_alone_is_caught(system: System) -> None:
    def peeking(interactions: Interactions, part: slice) -> LearningData:
        """The training part's rows, a few of them with labels from behind the boundary."""
        seen = interactions.take(part)
        labels = np.append(interactions.labels[part.stop :][:100], seen.labels[100:])
        return learning_data(replace(seen, labels=labels), history=HISTORY, holdout=TRAIN.holdout)

    assert leaks(system, learn=peeking)


@pytest.mark.parametrize(
    "system", [s for s in SYSTEMS if "pca" in s.name or s.name in {"final-full", "autoencoder", "mrl", "contrastive"}],
    ids=lambda s: s.name,
)  # fmt: skip
def test_a_transform_that_is_fitted_on_all_items_is_caught(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "known_states", lambda states, _: states)
    assert leaks(system)

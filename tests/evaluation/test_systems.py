"""Systems: finite and reproducible vectors, the intended ablations, and no information from after the boundary."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clicks import ITEMS, NEW, SHORT, WIDTH, before_boundary, clicks, train_settings
from marc_pipeline.evaluation.factory import KEEP, make_vectors, new_objective
from marc_pipeline.evaluation.systems import System, systems, tuned_systems
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import LearningData, learning_data
from marc_pipeline.training.marc import Marc
from marc_pipeline.training.matching import CrossingNetwork, ResidualNetwork

pytestmark = pytest.mark.usefixtures("one_thread")

Vectors = NDArray[np.float32]

DIM = 6
TRAIN = train_settings(epochs=1, batch=256)
SYSTEMS = {system.name: system for system in [*systems(1), *tuned_systems()]}
BASELINES = {"autoencoder", "mrl", "contrastive"}
SEEDED = {"random", *BASELINES} | {name for name in SYSTEMS if name.startswith("marc")}

every_system = pytest.mark.parametrize("name", sorted(SYSTEMS.keys() - {"ids"}))
every_fitted_system = pytest.mark.parametrize("name", sorted(SYSTEMS.keys() - {"ids", "random"}))


@cache
def made_up() -> tuple[Interactions, Vectors, slice]:
    """Interactions, states, and the rows before the boundary."""
    interactions, states = clicks()
    return interactions, states, before_boundary(interactions)


def learning(interactions: Interactions) -> LearningData:
    return learning_data(interactions, settings=SHORT, holdout=TRAIN.holdout, items=ITEMS)


@cache
def training_part() -> LearningData:
    interactions, _, part = made_up()
    return learning(interactions.take(part))


def vectors(name: str, *, data: LearningData | None = None, states: Vectors | None = None, seed: int = 0) -> Vectors:
    data, states = data or training_part(), made_up()[1] if states is None else states
    found = make_vectors(SYSTEMS[name], states=states, data=data, dim=DIM, seed=seed, train=TRAIN)
    assert found is not None
    return found


def test_every_layer_and_family_is_a_system() -> None:
    found = systems(4)
    names = [system.name for system in found]
    assert len(set(names)) == len(names)
    assert [s.layer for s in found if s.family == "layer"] == [0, 1, 2, 3, 4]
    assert {s.family for s in found} == {"reference", "layer", "baseline", "ablation", "marc"}
    assert {"ids", "random", "final-full", "regression", "marc"} | BASELINES <= set(names)
    ids = System("ids", "reference", None)
    assert make_vectors(ids, states=made_up()[1], data=training_part(), dim=DIM, seed=0, train=TRAIN) is None


@every_system
def test_a_system_gives_every_item_a_finite_vector_that_the_seed_decides(name: str) -> None:
    found = vectors(name)
    assert found.shape == (ITEMS, WIDTH if name == "final-full" else DIM)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.linalg.matrix_rank(found - found.mean(axis=0)) == found.shape[1]
    assert len({row.tobytes() for row in found}) == ITEMS
    torch.rand(3)
    assert vectors(name).tobytes() == found.tobytes()
    assert (vectors(name, seed=1).tobytes() != found.tobytes()) == (name in SEEDED)


@pytest.mark.parametrize(
    ("name", "initial"),
    [
        *((name, "pca-layer-1") for name in (*sorted(BASELINES), "marc-pca-start")),
        ("marc", "regression"),
        ("marc-crossing", "regression"),
    ],
)
def test_a_trained_system_starts_from_a_fitted_one_and_changes(name: str, initial: str) -> None:
    def start(data: LearningData) -> Vectors:
        states, generator = made_up()[1], torch.get_rng_state()
        objective = new_objective(name, states=states, data=data, dim=DIM, seed=0, train=TRAIN)
        assert torch.equal(torch.get_rng_state(), generator), "the global generator does not change"
        return np.asarray(objective.vectors().numpy())

    np.testing.assert_allclose(start(training_part().whole()), vectors(initial), atol=1e-4)
    assert np.abs(vectors(name) - start(training_part())).max() > 0.01


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
def test_an_ablation_has_the_intended_constraints_and_network(
    name: str, keep: float, decouple: float, network: type
) -> None:
    data = training_part()
    objective = new_objective(name, states=made_up()[1], data=data, dim=DIM, seed=0, train=train_settings())
    assert isinstance(objective, Marc)
    assert (objective.constraints.keep, objective.constraints.decouple) == (keep, decouple)
    assert type(objective.matching) is network
    terms = {"loss", "click"} | ({"keep"} if keep else set()) | ({"decouple"} if decouple else set())
    assert set(objective(data.rows[torch.arange(50)])) == terms


# Leaks from after the boundary


@cache
def scrambled() -> tuple[Interactions, Vectors]:
    """Other users, items and labels after the boundary, and other states of items that occur only there."""
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


def leaks(name: str, learned: tuple[Interactions, Interactions] | None = None) -> bool:
    """Whether vectors of known items change with rows after the boundary; ``learned`` replaces the training parts."""
    (interactions, _, part), (changed, states) = made_up(), scrambled()
    one, other = learned or (interactions.take(part), changed.take(part))
    found, after = vectors(name, data=learning(one)), vectors(name, data=learning(other), states=states)
    return found[NEW:].tobytes() != after[NEW:].tobytes()


@every_fitted_system
def test_vectors_do_not_depend_on_rows_after_the_boundary(name: str) -> None:
    assert not leaks(name)
    assert leaks(name, (made_up()[0], scrambled()[0])), "the check detects a training on all interactions"


@pytest.mark.parametrize("name", ["mrl", "contrastive", "marc", "regression"])
def test_the_check_detects_a_training_on_later_labels(name: str) -> None:
    part = made_up()[2]

    def peeking(interactions: Interactions) -> Interactions:
        """The training part, in which 100 rows have later labels."""
        seen = interactions.take(part)
        return replace(seen, labels=np.append(interactions.labels[part.stop :][:100], seen.labels[100:]))

    assert leaks(name, (peeking(made_up()[0]), peeking(scrambled()[0])))


@pytest.mark.parametrize("name", sorted({name for name in SYSTEMS if "pca" in name} | {"final-full"} | BASELINES))
def test_the_check_detects_a_transform_fitted_on_all_items(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LearningData, "known", property(lambda _: torch.arange(ITEMS)))
    assert leaks(name)

"""The systems that the yardstick compares: each one a way from hidden states to vectors of d numbers."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from marc_pipeline.config import TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.compressor import Bottleneck, WhitenedPCA, fit_pca
from marc_pipeline.training.baselines import Autoencoder, Contrastive, Matryoshka
from marc_pipeline.training.fit import learn
from marc_pipeline.training.learning import LearningData, known_states
from marc_pipeline.training.marc import Constraints, Marc
from marc_pipeline.training.matching import NETWORKS
from marc_pipeline.training.objective import FrozenStates, ItemStates, Objective
from marc_pipeline.training.regression import fit_regression
from marc_schemas.evaluation import Family

MATCHING_HIDDEN = 64
KEEP = 0.5
"""α of the variant with the constraint that the defaults may leave out."""


@dataclass(frozen=True)
class System:
    """One way to make vectors.

    Attributes:
        name: identifier.
        family: what it is compared as.
        layer: ``chosen`` by the training part, ``final``, or a number.
    """

    name: str
    family: Family
    layer: str | int | None


def systems(layers: int) -> list[System]:
    """All systems of the yardstick for a backbone of so many blocks, with frozen states."""
    return [
        System("ids", "reference", None),
        System("random", "reference", None),
        System("final-full", "reference", "final"),
        *(System(f"pca-layer-{layer}", "layer", layer) for layer in range(layers + 1)),
        System("regression", "baseline", "chosen"),
        System("autoencoder", "baseline", "chosen"),
        System("mrl", "baseline", "final"),
        System("contrastive", "baseline", "final"),
        System("marc-no-constraints", "ablation", "chosen"),
        System("marc-keep", "ablation", "chosen"),
        System("marc-pca-start", "ablation", "chosen"),
        System("marc-crossing", "ablation", "chosen"),
        System("marc-final", "ablation", "final"),
        System("marc", "marc", "chosen"),
    ]


def sweep_systems(layers: int) -> list[System]:
    """What the choice of layer compares: of every block, the regression that MARC would start from.

    It needs no training, varies less between seeds than a trained compressor, and unlike a PCA it asks what clicks can
    be predicted from.
    """
    return [System(f"regression-layer-{layer}", "layer", layer) for layer in range(1, layers + 1)]


def tuned_systems() -> list[System]:
    """What is judged on the final layer of a backbone that was tuned: its PCA, and MARC."""
    return [System("pca-tuned", "marc", "tuned"), System("marc-tuned", "marc", "tuned")]


def require_known(wanted: Iterable[str]) -> None:
    """Refuse names that no backbone has a system of.

    Raises:
        UserError: there is no such system.
    """
    known = {system.name for system in [*systems(0), *tuned_systems()]}
    for name in wanted:
        if name not in known and not re.fullmatch(r"pca-layer-\d+", name):
            raise UserError(
                f"there is no system {name!r}; there are {', '.join(sorted(known))} and so on for each layer"
            )


def make_vectors(
    system: System, *, states: NDArray[np.float32], data: LearningData, dim: int, seed: int, train: TrainSettings
) -> NDArray[np.float32] | None:
    """Vectors [items, d] of a system; None for no vectors at all.

    Args:
        system: which.
        states: pooled hidden states [items, D] of its layer.
        data: all that may be learned from.
        dim: d.
        seed: of what is random.
        train: settings of the training.
    """
    if system.name == "ids":
        return None
    if system.name == "random":
        return np.random.default_rng(seed).standard_normal((len(states), dim), dtype=np.float32)
    if system.name == "final-full":
        return np.asarray(states - known_states(states, data).mean(axis=0))
    # What needs no early stopping takes every row.
    whole = data.whole()
    if system.name.startswith("regression"):
        with torch.no_grad():
            return np.asarray(fit_regression(states, whole, dim=dim)(torch.from_numpy(states)).numpy())
    if system.family == "layer" or system.name == "pca-tuned":
        with torch.no_grad():
            pca, _ = fit_pca(known_states(states, whole), dim=dim)
            return np.asarray(pca(torch.from_numpy(states)).numpy())

    def made(rows: LearningData) -> Objective:
        return build(system.name, states=states, data=rows, dim=dim, seed=seed, train=train)

    objective, _ = learn(made, data, settings=train, seed=seed, label="")
    return np.asarray(objective.vectors().numpy())


def build(
    name: str, *, states: NDArray[np.float32], data: LearningData, dim: int, seed: int, train: TrainSettings
) -> Objective:
    """The objective of a trained system, over frozen states [items, D], with its first weights."""
    known = known_states(states, data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("marc") and name != "marc-pca-start":
            start = fit_regression(states, data, dim=dim)
        else:
            start, _ = fit_pca(known, dim=dim)
        source = FrozenStates(torch.from_numpy(states))
        compressor = new_compressor(start, train)
        if name == "autoencoder":
            return Autoencoder(source, compressor, states=torch.from_numpy(known), dim=dim, hidden=train.hidden)
        if name == "mrl":
            return Matryoshka(source, compressor, dim=dim)
        if name == "contrastive":
            return Contrastive(source, compressor)
        profiles = data.rows.profiles is not None
        return new_marc(source, compressor, dim=dim, train=train, variant=name, profiles=profiles)


def new_compressor(start: WhitenedPCA, train: TrainSettings) -> Bottleneck:
    """A compressor whose linear path begins as a whitened projection."""
    dim, width = start.directions.shape
    return Bottleneck(width=width, dim=dim, hidden=train.hidden, dropout=train.dropout).start_from(start)


def new_marc(
    source: ItemStates,
    compressor: torch.nn.Module,
    *,
    dim: int,
    train: TrainSettings,
    profiles: bool = False,
    variant: str = "marc",
) -> Marc:
    """MARC, or one of its ablations: without constraints, with both, with different structures, from a PCA."""
    keep, decouple = train.keep, train.decouple
    if variant == "marc-no-constraints":
        keep, decouple = 0.0, 0.0
    if variant == "marc-keep":
        keep = keep or KEEP
    network = NETWORKS["crossing" if variant == "marc-crossing" else train.matching]
    matching = network(dim=dim, users=Marc.USERS + profiles, hidden=MATCHING_HIDDEN, dropout=train.dropout)
    constraints = Constraints(keep, decouple, train.kernel, train.estimator, train.constraint_rows)
    return Marc(source, compressor, matching, dim=dim, constraints=constraints, profiles=profiles)

"""The factory of systems: the vectors of each system, and the objectives and networks that are trained for them."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from marc_pipeline.config import TrainSettings
from marc_pipeline.evaluation.systems import System
from marc_pipeline.model.compressor import Bottleneck, WhitenedPCA, fit_pca
from marc_pipeline.training.baselines import Autoencoder, Contrastive, Matryoshka
from marc_pipeline.training.fit import learn
from marc_pipeline.training.learning import LearningData, known_states
from marc_pipeline.training.marc import Constraints, Marc
from marc_pipeline.training.matching import NETWORKS
from marc_pipeline.training.objective import FrozenStates, ItemStates, Objective
from marc_pipeline.training.regression import fit_regression

MATCHING_HIDDEN = 64
DEFAULT_WEIGHTS = (0.0, 0.1)
"""α and β of a system whose weights were neither configured nor chosen."""
KEEP = 0.5
"""α of the system with the keep constraint, unless its settings have one."""


def make_vectors(
    system: System,
    *,
    states: NDArray[np.float32],
    data: LearningData,
    dim: int,
    seed: int,
    train: TrainSettings,
    tick: Callable[[float], None] = lambda _: None,
) -> NDArray[np.float32] | None:
    """Return vectors [items, d] of a system, or None for the system without vectors.

    They are made from the pooled states [items, D] of its layer, and from the interactions of the training part.
    A training calls ``tick`` with the share of its most steps that is done.
    """
    if system.name == "ids":
        return None
    if system.name == "random":
        return np.random.default_rng(seed).standard_normal((len(states), dim), dtype=np.float32)
    if system.name == "final-full":
        return np.asarray(states - known_states(states, data).mean(axis=0))
    # Fits without early stopping use every row.
    whole = data.whole()
    if system.name.startswith("regression"):
        with torch.no_grad():
            return np.asarray(fit_regression(states, whole, dim=dim)(torch.from_numpy(states)).numpy())
    if system.family == "layer" or system.name == "pca-tuned":
        return pca_vectors(states, whole.known.numpy(), dim=dim)

    return train_vectors(system.name, states=states, data=data, dim=dim, seed=seed, train=train, tick=tick)


@torch.no_grad()
def pca_vectors(states: NDArray[np.float32], known: NDArray[np.int64], *, dim: int) -> NDArray[np.float32]:
    """Return the vectors [n, d] of the whitened PCA of states [n, D] that is fitted on the known rows."""
    pca, _ = fit_pca(states[known], dim=dim)
    return np.asarray(pca(torch.from_numpy(states)).numpy())


def train_vectors(
    name: str,
    *,
    states: NDArray[np.float32],
    data: LearningData,
    dim: int,
    seed: int,
    train: TrainSettings,
    tick: Callable[[float], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Train a system over frozen states [items, D], and return its vectors [items, d].

    The baselines end by early stopping, because their number of epochs was not chosen by evaluation.
    """
    if not name.startswith("marc"):
        given = TrainSettings()
        train = train.model_copy(update={"epochs": given.epochs, "patience": given.patience})

    def made(rows: LearningData) -> Objective:
        return new_objective(name, states=states, data=rows, dim=dim, seed=seed, train=train)

    objective, _ = learn(made, data, settings=train, seed=seed, label="", tick=tick)
    return np.asarray(objective.vectors().numpy())


def new_objective(
    name: str, *, states: NDArray[np.float32], data: LearningData, dim: int, seed: int, train: TrainSettings
) -> Objective:
    """Return the objective of a trained system over frozen states [items, D], with its initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("marc") and name != "marc-pca-start":
            start = fit_regression(states, data, dim=dim)
        else:
            start, _ = fit_pca(known_states(states, data), dim=dim)
        source = FrozenStates(torch.from_numpy(states))
        compressor = new_compressor(start, train)
        if name == "autoencoder":
            known = torch.from_numpy(known_states(states, data))
            return Autoencoder(source, compressor, states=known, dim=dim, hidden=train.hidden)
        if name == "mrl":
            return Matryoshka(source, compressor, dim=dim)
        if name == "contrastive":
            return Contrastive(source, compressor)
        profiles = data.rows.profiles is not None
        return new_marc(source, compressor, dim=dim, train=train, variant=name, profiles=profiles)


def new_compressor(start: WhitenedPCA, train: TrainSettings) -> Bottleneck:
    """Return a compressor whose linear path is initialised with a whitened projection."""
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
    """Return MARC, or the ablation of it that ``variant`` names."""
    keep, decouple = (
        default if given is None else given
        for given, default in zip((train.keep, train.decouple), DEFAULT_WEIGHTS, strict=True)
    )
    if variant == "marc-no-constraints":
        keep, decouple = 0.0, 0.0
    if variant == "marc-keep":
        keep = keep or KEEP
    network = NETWORKS["crossing" if variant == "marc-crossing" else train.matching]
    matching = network(dim=dim, users=Marc.USERS + profiles, hidden=MATCHING_HIDDEN, dropout=train.dropout)
    constraints = Constraints(keep, decouple, train.kernel, train.estimator, train.constraint_rows)
    return Marc(source, compressor, matching, dim=dim, constraints=constraints, profiles=profiles)

"""The AUC of layers within the training part, by successive halving over samples of users.

Every layer is represented by the regression that initialises MARC. It is not trained, and therefore varies less between
seeds than a trained compressor. Unlike a PCA, it finds the directions that predict clicks.

Jamieson and Talwalkar 2016, Non-stochastic Best Arm Identification and Hyperparameter Optimization (AISTATS).
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from marc_pipeline.config import InteractionSettings, Settings
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.click_data import rows_within, sample_users, user_fold_data
from marc_pipeline.evaluation.click_model import score_together
from marc_pipeline.evaluation.factory import pca_vectors
from marc_pipeline.evaluation.layer_choice import final_scores
from marc_pipeline.evaluation.tasks import evaluation_data
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import return_memory
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import learning_data, training_part
from marc_pipeline.training.regression import fit_regression
from marc_pipeline.training.training_set import TrainingSet

FOLDS = 5
"""Number of groups of users in the last round."""
FINALISTS = 8
"""Most layers of the last round."""
ROUND_ROWS, FINAL_ROWS = 50_000, 200_000
"""Most rows of a round with one fold, and of the last round, negatives included."""
ERROR = 0.05
SPAN_ROWS = 4
RANDOM = -1
"""Key of the random vectors, which are scored beside the layers."""

States = Callable[[int, NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True)
class SampledShop:
    """Interactions of a sample of users and the items that they touch, numbered anew.

    Attributes:
        interactions: of the sampled users, with the new numbers.
        items: places [m] of the items among all items.
    """

    interactions: Interactions
    items: NDArray[np.int64]

    @classmethod
    def of(cls, interactions: Interactions, *, rows: int, items: int, settings: InteractionSettings) -> "SampledShop":
        """Return a sample of at most about ``rows`` rows with negatives; a shop with fewer rows keeps all items."""
        kept = sample_users(interactions, rows_within(interactions, rows, settings))
        if kept is interactions:
            return cls(interactions, np.arange(items))
        touched, numbers = np.unique(kept.items, return_inverse=True)
        return cls(replace(kept, items=numbers), touched)


def search_layers(
    interactions: Interactions,
    states: States,
    *,
    layers: Sequence[int],
    items: int,
    dim: int,
    settings: InteractionSettings,
    holdout: float,
) -> dict[int, list[float]]:
    """Return the AUC of every layer on held-out users, one per fold, and of random vectors (``RANDOM``).

    Rounds with one fold halve the layers until ``FINALISTS`` are left, each on more users. These are scored on every
    fold. A layer that left earlier has the AUC of its last round only.

    Args:
        interactions: those of the training part.
        states: returns the pooled hidden states [m, D] of a layer for some items [m].
        layers: the layers to compare.
        items: number of items in the catalogue.
        dim: dimension of the vectors.
        settings: histories and negatives.
        holdout: share of the latest rows, as for a training.

    Raises:
        UserError: there are too few users, or the states span too few directions.
    """
    scores: dict[int, list[float]] = {}
    left, rows = [layer for layer in sorted(layers) if spans(states, layer, items=items, dim=dim)], ROUND_ROWS
    if not left:
        raise UserError(f"train.dim is {dim}: the states of no layer span so many directions; lower train.dim")
    rounds = _rounds(len(left))
    for number in range(rounds):
        last = number == rounds - 1
        size = FINAL_ROWS if last else min(rows, FINAL_ROWS)
        shop = SampledShop.of(interactions, rows=size, items=items, settings=settings)
        wanted = list(range(FOLDS)) if last else [0]
        found: dict[int, list[float]] = {layer: [] for layer in ([*left, RANDOM] if last else left)}
        for fold in wanted:
            label = f"layers: round {number + 1} of {rounds}, group {fold + 1} of {len(wanted)}"
            for layer, auc in _fold(shop, states, left, fold, label, dim, settings, holdout, random=last):
                found[layer].append(auc)
            return_memory()
        scores |= found
        ranked = sorted(left, key=lambda layer: -fmean(scores[layer]))
        left, rows = sorted(ranked[: max(FINALISTS, len(left) // 2)]), 2 * rows
    return scores


def spans(states: States, layer: int, *, items: int, dim: int) -> bool:
    """Return whether the states of a layer vary in at least ``dim`` directions.

    With cls pooling, layer 0 does not: the first token is the same in every text.
    """
    some = states(layer, np.arange(0, items, max(1, items // (SPAN_ROWS * dim)))).astype(np.float64)
    return bool(np.linalg.matrix_rank(some - some.mean(axis=0)) >= min(dim, len(some) - 1))


def beats_random(scores: Mapping[int, Sequence[float]]) -> bool:
    """Return whether the best layer is demonstrably above random vectors: a paired t-test over folds, one-sided.

    The error of 5 % is shared among the layers, because the best of many is above random vectors by chance.
    """
    layers = {layer: aucs for layer, aucs in scores.items() if layer != RANDOM}
    best = max(final_scores(layers).values(), key=fmean)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # All differences may be nearly equal.
        warnings.filterwarnings("ignore", "Precision loss occurred", RuntimeWarning)
        test = stats.ttest_rel(best, scores[RANDOM], alternative="greater")
    return bool(test.pvalue < ERROR / len(layers))


def pca_test_scores(training_set: TrainingSet, settings: Settings, *, seeds: int) -> dict[int, list[float]]:
    """Return the test AUC of the whitened PCA of every layer, one per seed. Reports show it; it decides nothing."""
    items, dim = len(training_set.item_ids), settings.train.dim
    data = evaluation_data(training_set, settings)
    learned = training_part(training_set, settings=settings.interactions, holdout=settings.train.holdout)
    known = learned.whole().known.numpy()
    layers = [n for n in range(training_set.card.layers + 1) if spans(training_set.states, n, items=items, dim=dim)]
    vectors, progress = [], ProgressLog("layers: test part", seeds, "seeds")
    for layer in layers:
        states = training_set.states(layer, np.arange(items))
        vectors.append(pca_vectors(states, known, dim=dim))
    found: dict[int, list[float]] = {layer: [] for layer in layers}
    for seed in range(seeds):
        scored = score_together(vectors, data, seed=seed, done=progress.part(seed))
        for layer, score in zip(layers, scored, strict=True):
            found[layer].append(score.auc)
    return found


def _rounds(layers: int) -> int:
    """Return the number of rounds, the last one included."""
    rounds = 1
    while layers > FINALISTS:
        layers, rounds = max(FINALISTS, layers // 2), rounds + 1
    return rounds


def _fold(
    shop: SampledShop,
    states: States,
    layers: Sequence[int],
    fold: int,
    label: str,
    dim: int,
    settings: InteractionSettings,
    holdout: float,
    *,
    random: bool,
) -> Iterator[tuple[int, float]]:
    """Yield layers with their AUC on the users of a fold."""
    items = len(shop.items)
    data, learned = user_fold_data(shop.interactions, folds=FOLDS, fold=fold, items=items, settings=settings)
    learning = learning_data(learned, settings=settings, holdout=holdout, items=items).whole()
    progress = ProgressLog(label, 100, "%")
    vectors = []
    for number, layer in enumerate(layers):
        own = states(layer, shop.items)
        with torch.no_grad():
            vectors.append(fit_regression(own, learning, dim=dim)(torch.from_numpy(own)).numpy())
        progress.at(50 * (number + 1) / len(layers), f"layer {layer} is fitted")
    if random:
        vectors.append(np.random.default_rng(fold).standard_normal((items, dim), dtype=np.float32))
    scored = score_together(vectors, data, seed=fold, done=progress.part(50, 50))
    yield from zip([*layers, *([RANDOM] if random else [])], (score.auc for score in scored), strict=True)

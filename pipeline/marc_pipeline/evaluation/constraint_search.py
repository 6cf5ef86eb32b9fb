"""The choice of the weights of MARC's constraints within the training part, by cross-validation over users."""

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import TrainSettings
from marc_pipeline.deployment import Deployment
from marc_pipeline.evaluation.click_data import user_fold_data
from marc_pipeline.evaluation.click_model import score_together
from marc_pipeline.evaluation.factory import train_vectors
from marc_pipeline.evaluation.layer_search import FOLDS, SampledShop
from marc_pipeline.evaluation.tasks import progress_files
from marc_pipeline.model.device import use_threads
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.tasks import run_buckets
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.training_set import TrainingSet, cached_training_set
from marc_pipeline.work_area import ProgressFiles

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

WEIGHTS = ((0.0, 0.1), (0.5, 0.1), (0.1, 0.1), (0.0, 0.0))
"""Pairs of α and β to compare; of equal AUC, the first one wins."""
SEARCH_FOLDS = 2
"""Number of groups of users that the pairs are scored on: each takes one training per pair."""
TICKS = 100
SEARCH_ROWS = 100_000
"""Most rows of a sample of users, negatives included."""


@dataclass(frozen=True)
class WeightTask:
    """The training of one pair of weights without one group of users. It is pickled for Spark's Python workers.

    Attributes:
        number: number of the task, for its progress.
        keep, decouple: α and β.
        fold: number of the group.
    """

    number: int
    deployment: Deployment
    training_id: str
    layer: int
    keep: float
    decouple: float
    fold: int

    @property
    def progress(self) -> ProgressFiles:
        """Return the place of the progress of all tasks."""
        return progress_files(self.deployment, self.training_id, "weights")


def candidates(train: TrainSettings) -> list[tuple[float, float]]:
    """Return the pairs of α and β to compare; configured weights are kept."""
    pairs = (
        (alpha if train.keep is None else train.keep, beta if train.decouple is None else train.decouple)
        for alpha, beta in WEIGHTS
    )
    return list(dict.fromkeys(pairs))


def search_weights(
    spark: "SparkSession", deployment: Deployment, training_set: TrainingSet, *, layer: int
) -> dict[tuple[float, float], float]:
    """Return the mean AUC of every pair of α and β on held-out users of the training part.

    Raises:
        UserError: there are too few users or interactions.
    """
    settings = deployment.settings
    each = [(fold, pair) for fold in range(SEARCH_FOLDS) for pair in candidates(settings.train)]
    tasks = [
        WeightTask(number, deployment, training_set.card.training_id, layer, *pair, fold=fold)
        for number, (fold, pair) in enumerate(each)
    ]
    progress = tasks[0].progress
    progress.clear(task.number for task in tasks)
    made = run_buckets(
        spark,
        train_weights,
        tasks,
        label="weights",
        weight=lambda _: TICKS,
        unit="% of the most steps of a training",
        each="trainings",
        running=progress.total,
    )
    scores: dict[tuple[float, float], list[float]] = {}
    clock = ProgressLog("weights: click models", SEARCH_FOLDS, "groups of users")
    for fold in range(SEARCH_FOLDS):
        own = [(task, vectors) for task, vectors in made if task.fold == fold]
        shop = _shop(training_set, deployment)
        data, _ = user_fold_data(
            shop.interactions, folds=FOLDS, fold=fold, items=len(shop.items), settings=settings.interactions
        )
        scored = score_together([vectors for _, vectors in own], data, seed=fold, done=clock.part(fold))
        for (task, _), score in zip(own, scored, strict=True):
            scores.setdefault((task.keep, task.decouple), []).append(score.auc)
    return {pair: fmean(scores[pair]) for pair in candidates(settings.train)}


def choose_weights(scores: dict[tuple[float, float], float]) -> tuple[float, float]:
    """Return the pair with the highest AUC; the first of equal ones."""
    return max(scores, key=lambda pair: scores[pair])


def train_weights(task: WeightTask, resources: TaskResources) -> tuple[WeightTask, NDArray[np.float32]]:
    """Train MARC with one pair of weights, and return the vectors [items, d] of the sampled items."""
    use_threads(resources.cpus)
    settings = task.deployment.settings
    training_set = cached_training_set(task.deployment.storage, settings.work_uri, task.training_id)
    shop = _shop(training_set, task.deployment)
    items = len(shop.items)
    _, learned = user_fold_data(
        shop.interactions, folds=FOLDS, fold=task.fold, items=items, settings=settings.interactions
    )
    train = settings.train.model_copy(update={"keep": task.keep, "decouple": task.decouple, "refit": False})
    data = learning_data(learned, settings=settings.interactions, holdout=train.holdout, items=items)
    states = training_set.states(task.layer, shop.items)
    vectors = train_vectors(
        "marc", states=states, data=data, dim=train.dim, seed=train.seed, train=train,
        tick=lambda share: task.progress.write(task.number, TICKS * share),
    )  # fmt: skip
    task.progress.clear([task.number])
    return task, vectors


def _shop(training_set: TrainingSet, deployment: Deployment) -> SampledShop:
    interactions = training_set.interactions.take(training_set.split.train)
    interactions = replace(interactions, profiles=None, profile_texts=())
    settings = deployment.settings.interactions
    return SampledShop.of(interactions, rows=SEARCH_ROWS, items=len(training_set.item_ids), settings=settings)

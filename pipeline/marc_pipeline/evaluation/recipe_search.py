"""The choice of a training's recipe within the training part: weights of the constraints, and number of epochs.

The click model learns from the same clicks that the vectors were trained on. The longer the training, the more the
vectors tell about these clicks, and the less about others. The AUC of MARC's own matching network does not show this.
So the number of epochs is chosen like the layer: by the click model, on users without a part in the training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings, TrainSettings
from marc_pipeline.deployment import Deployment
from marc_pipeline.evaluation.click_data import user_fold_data
from marc_pipeline.evaluation.click_model import score_together
from marc_pipeline.evaluation.factory import new_objective
from marc_pipeline.evaluation.layer_search import FOLDS, SampledShop
from marc_pipeline.evaluation.tasks import progress_files
from marc_pipeline.model.device import use_threads
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.tasks import run_buckets
from marc_pipeline.training.fit import fit
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.training_set import TrainingSet, cached_training_set
from marc_pipeline.work_area import ProgressFiles

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

WEIGHTS = ((0.0, 0.1), (0.5, 0.1), (0.0, 0.0))
"""Pairs of α and β to compare."""
SEARCH_FOLDS = 2
"""Number of groups of users that recipes are scored on: each takes one training per pair of weights."""
SEARCH_ROWS = 100_000
"""Most rows of a sample of users, negatives included."""
TICKS = 100


@dataclass(frozen=True, order=True)
class Recipe:
    """Settings of a training that are chosen by evaluation.

    Attributes:
        keep, decouple: α and β, the weights of the constraints.
        epochs: number of passes over the training part, without early stopping; None to end by early stopping.
    """

    keep: float
    decouple: float
    epochs: int | None = None


Vectors = dict[Recipe, NDArray[np.float32]]
"""Vectors [items, d] by recipe."""


@dataclass(frozen=True)
class RecipeTask:
    """The training of a recipe without one group of users. It is pickled for Spark's Python workers.

    Attributes:
        number: number of the task, for its progress.
        recipe: weights, and the number of epochs.
        fold: number of the group.
    """

    number: int
    deployment: Deployment
    training_id: str
    layer: int
    recipe: Recipe
    fold: int

    @property
    def progress(self) -> ProgressFiles:
        """Return the place of the progress of all tasks."""
        return progress_files(self.deployment, self.training_id, "recipes")


def weights(train: TrainSettings) -> list[tuple[float, float]]:
    """Return the pairs of α and β to compare; configured weights are kept."""
    pairs = (
        (alpha if train.keep is None else train.keep, beta if train.decouple is None else train.decouple)
        for alpha, beta in WEIGHTS
    )
    return list(dict.fromkeys(pairs))


def lengths(train: TrainSettings) -> list[int]:
    """Return the numbers of epochs to compare: powers of two, and the most epochs."""
    return [2**n for n in range(train.epochs.bit_length()) if 2**n < train.epochs] + [train.epochs]


def search_recipes(
    spark: "SparkSession", deployment: Deployment, training_set: TrainingSet, *, layer: int
) -> dict[Recipe, float]:
    """Return the mean AUC of recipes on held-out users of the training part: all lengths, then all weights.

    Raises:
        UserError: there are too few users or interactions.
    """
    settings = deployment.settings
    shop = _shop(training_set, deployment)
    first, *others = weights(settings.train)
    made = _trained(spark, deployment, training_set, [Recipe(*first, settings.train.epochs)], layer=layer)
    scores = _scored(shop, made, settings.interactions, label="recipes: epochs")
    # The other weights are compared at the best length only.
    rivals = [Recipe(*pair, choose_recipe(scores).epochs) for pair in others]
    if not rivals:
        return scores
    made = _trained(spark, deployment, training_set, rivals, layer=layer)
    made = [{rival: vectors[rival] for rival in rivals} for vectors in made]
    return scores | _scored(shop, made, settings.interactions, label="recipes: weights")


def _trained(
    spark: "SparkSession",
    deployment: Deployment,
    training_set: TrainingSet,
    recipes: Sequence[Recipe],
    *,
    layer: int,
) -> list[Vectors]:
    """Train each recipe without each group of users; return the vectors by recipe, for each group."""
    each = [(fold, recipe) for fold in range(SEARCH_FOLDS) for recipe in recipes]
    tasks = [
        RecipeTask(number, deployment, training_set.card.training_id, layer, recipe, fold)
        for number, (fold, recipe) in enumerate(each)
    ]
    progress = tasks[0].progress
    progress.clear(task.number for task in tasks)
    made = run_buckets(
        spark,
        train_recipe,
        tasks,
        label="recipes",
        weight=lambda _: TICKS,
        unit="% of the most steps of a training",
        each="trainings",
        running=progress.total,
    )
    return [_of_fold(made, fold) for fold in range(SEARCH_FOLDS)]


def _of_fold(made: Sequence[tuple[int, Vectors]], fold: int) -> Vectors:
    return {recipe: vectors for number, found in made if number == fold for recipe, vectors in found.items()}


def _scored(
    shop: SampledShop, vectors: Sequence[Vectors], settings: InteractionSettings, *, label: str
) -> dict[Recipe, float]:
    """Return the mean AUC over the folds of each recipe; ``vectors`` are those of each fold."""
    shared = [recipe for recipe in vectors[0] if all(recipe in made for made in vectors)]
    scores: dict[Recipe, list[float]] = {recipe: [] for recipe in shared}
    progress = ProgressLog(label, len(vectors), "groups of users")
    for fold, made in enumerate(vectors):
        data, _ = user_fold_data(shop.interactions, folds=FOLDS, fold=fold, items=len(shop.items), settings=settings)
        found = score_together([made[recipe] for recipe in shared], data, seed=fold, done=progress.part(fold))
        for recipe, score in zip(shared, found, strict=True):
            scores[recipe].append(score.auc)
    return {recipe: fmean(aucs) for recipe, aucs in scores.items()}


def choose_recipe(scores: Mapping[Recipe, float]) -> Recipe:
    """Return the recipe with the highest AUC; of equal ones the first, so the shorter training."""
    return max(scores, key=lambda recipe: scores[recipe])


def train_recipe(task: RecipeTask, resources: TaskResources) -> tuple[int, Vectors]:
    """Train MARC by a recipe; return the fold, and the vectors [items, d] after each number of epochs on the way."""
    use_threads(resources.cpus)
    settings = task.deployment.settings
    training_set = cached_training_set(task.deployment.storage, settings.work_uri, task.training_id)
    shop = _shop(training_set, task.deployment)
    items = len(shop.items)
    _, learned = user_fold_data(
        shop.interactions, folds=FOLDS, fold=task.fold, items=items, settings=settings.interactions
    )
    wanted = task.recipe
    update = {"keep": wanted.keep, "decouple": wanted.decouple, "epochs": wanted.epochs, "patience": None}
    train = settings.train.model_copy(update=update)
    snapshots = lengths(train)
    data = learning_data(learned, settings=settings.interactions, holdout=train.holdout, items=items).whole()
    objective = new_objective(
        "marc",
        states=training_set.states(task.layer, shop.items),
        data=data,
        dim=train.dim,
        seed=train.seed,
        train=train,
    )
    found: Vectors = {}

    def keep(epoch: int) -> None:
        if epoch in snapshots:
            found[replace(wanted, epochs=epoch)] = objective.vectors().numpy()

    fit(
        objective,
        training=data.training,
        validation=None,
        settings=train,
        seed=train.seed,
        label="",
        tick=lambda share: task.progress.write(task.number, TICKS * share),
        epoch_ended=keep,
    )
    # train.max_steps may end the training before; so it would end the final one.
    found.setdefault(wanted, objective.vectors().numpy())
    task.progress.clear([task.number])
    return task.fold, found


def _shop(training_set: TrainingSet, deployment: Deployment) -> SampledShop:
    interactions = training_set.interactions.take(training_set.split.train)
    interactions = replace(interactions, profiles=None, profile_texts=())
    settings = deployment.settings.interactions
    return SampledShop.of(interactions, rows=SEARCH_ROWS, items=len(training_set.item_ids), settings=settings)

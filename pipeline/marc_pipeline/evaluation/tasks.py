"""Evaluation tasks for Spark: each makes a system's vectors and evaluates them with the click model."""

import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.click_model import ClickData, click_data, score_vectors
from marc_pipeline.evaluation.factory import make_vectors
from marc_pipeline.evaluation.findings import findings
from marc_pipeline.evaluation.statistics import summarise
from marc_pipeline.evaluation.systems import System, layer_systems, systems, tuned_systems
from marc_pipeline.model.bundle import open_bundle
from marc_pipeline.model.device import use_threads
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.tasks import run_buckets
from marc_pipeline.storage import Storage, join
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.time_split import split_by_user
from marc_pipeline.training.training_set import TrainingSet, open_training_set
from marc_schemas.evaluation import Evaluation, SystemScore
from marc_schemas.layers import Decision

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMPARISON = "marc"
FOLDS = 5
"""Number of groups of users for the choice of a layer."""
TRAINED = {"autoencoder", "mrl", "contrastive"}
FIGURES = ("auc", "cold_auc", "warm_auc", "log_loss", "validation_auc", "epoch")


@dataclass(frozen=True)
class EvaluateTask:
    """The evaluation of one system at one dimension. It is pickled for Spark's Python workers.

    Attributes:
        training_id: id of the training set in the work area.
        system: the system; layer: the layer that it reads, or None.
        seeds: seeds of the click model and of the training.
        fold: evaluate within the training part, on this group of its users; None to evaluate on the test part.
        bundle: version, if the system is a bundle.
        tuned_uri: states of the tuned backbone's final layer [items, D], for the systems that read them.
    """

    deployment: Deployment
    training_id: str
    system: System
    layer: int | None
    dim: int
    seeds: tuple[int, ...]
    fold: int | None = None
    bundle: str = ""
    tuned_uri: str = ""

    @property
    def trained(self) -> bool:
        """Return whether the vectors are trained, and therefore differ between seeds."""
        return self.system.name.startswith("marc") or self.system.name in TRAINED

    @property
    def cost(self) -> int:
        """Return the approximate cost in trainings of a click model; training the system costs four more."""
        return len(self.seeds) * (5 if self.trained else 1)


@dataclass(frozen=True)
class Scored:
    """The result of a task: one score per seed, and predictions [test rows] by system, dimension and seed."""

    scores: list[SystemScore]
    predictions: dict[tuple[str, int, int], NDArray[np.float32]]


def evaluate_task(task: EvaluateTask, resources: TaskResources) -> Scored:
    """Make a system's vectors from the training part, and evaluate them with every seed."""
    use_threads(resources.cpus)
    storage, settings = task.deployment.storage, task.deployment.settings
    training_set = _training_set(storage, settings.work_uri, task.training_id)
    data, rows = _data(training_set, settings.interactions.history, fold=task.fold)
    scores, predictions = [], {}
    vectors, spent = None, 0.0
    for seed in task.seeds:
        if seed == task.seeds[0] or task.trained or task.system.name == "random":
            started = time.monotonic()
            vectors = _vectors(task, training_set, rows, seed, resources)
            spent = time.monotonic() - started
        found = score_vectors(vectors, data, seed=seed)
        dim = 0 if vectors is None else vectors.shape[1]
        predictions[task.system.name, dim, seed] = found.predictions
        scores.append(
            SystemScore(
                system=task.system.name,
                family=task.system.family,
                layer=task.layer,
                dim=dim,
                seed=seed,
                **{name: getattr(found, name) for name in FIGURES},
                train_seconds=spent,
                score_seconds=found.seconds,
            )
        )
    return Scored(scores, predictions)


def run_tasks(spark: "SparkSession", tasks: Sequence[EvaluateTask], *, label: str) -> list[Scored]:
    """Run all tasks in parallel on Spark, costly ones first, and return the results in any order."""
    return run_buckets(
        spark, evaluate_task, tasks, label=label, weight=lambda task: task.cost, unit="fits", each="tasks"
    )


def layer_tasks(deployment: Deployment, training_set: TrainingSet) -> list[EvaluateTask]:
    """Return tasks that evaluate every layer within the training part, by cross-validation over users.

    Most users of the test part are new, too. A period of time would contain few users, so that the AUC would depend on
    them more than on the layer.

    Raises:
        UserError: there are too few users to hold some out.
    """
    split_by_user(training_set.interactions.take(training_set.split.train), folds=FOLDS, fold=0)
    training_id, dim = training_set.card.training_id, deployment.settings.train.dim
    return [
        EvaluateTask(deployment, training_id, system, layer, dim, seeds=(fold,), fold=fold)
        for layer, system in enumerate(layer_systems(training_set.card.layers), start=1)
        for fold in range(FOLDS)
    ]


def layer_scores(found: Iterable[Scored]) -> dict[int, list[float]]:
    """Return the AUC of every layer, sorted by layer, with one value per fold, sorted by fold."""
    by_layer: dict[int, dict[int, float]] = {}
    for score in (score for scored in found for score in scored.scores):
        by_layer.setdefault(score.layer or 0, {})[score.seed] = score.auc
    return {layer: [auc for _, auc in sorted(aucs.items())] for layer, aucs in sorted(by_layer.items())}


def evaluation_tasks(
    deployment: Deployment, training_set: TrainingSet, *, chosen: int, tuned_uri: str = "", wanted: Sequence[str] = ()
) -> list[EvaluateTask]:
    """Return tasks for all systems at all dimensions, with one task per seed for systems that are trained.

    ``chosen`` is the layer that the training part chose. Without ``wanted`` names, all systems are evaluated; tuned
    systems only with ``tuned_uri``, the states of the tuned backbone's final layer.

    Raises:
        UserError: the backbone has no system of a name.
    """
    card, wants = training_set.card, deployment.settings.evaluate
    layers, seeds = card.layers, tuple(range(wants.seeds))
    everything = systems(layers) + (tuned_systems() if tuned_uri else [])
    unknown = set(wanted) - {system.name for system in everything}
    if unknown:
        names = ", ".join(system.name for system in everything)
        raise UserError(f"there is no system {sorted(unknown)[0]!r}; choose from {names}")
    tasks = []
    for system in everything:
        if wanted and system.name not in wanted:
            continue
        named = {"chosen": chosen, "final": layers, "tuned": layers}
        layer = named[system.layer] if isinstance(system.layer, str) else system.layer
        for dim in {"ids": (0,), "final-full": (card.width,)}.get(system.name, wants.dims):
            task = EvaluateTask(deployment, card.training_id, system, layer, dim, seeds, tuned_uri=tuned_uri)
            tasks += [replace(task, seeds=(seed,)) for seed in task.seeds] if task.trained else [task]
    return tasks


def bundle_task(deployment: Deployment, training_set: TrainingSet, *, version: str) -> EvaluateTask:
    """Return the task of a bundle, whose vectors come from the encoder of the nightly run."""
    settings, system = deployment.settings, System(f"bundle:{version}", "bundle", None)
    card = open_bundle(deployment.storage, join(settings.bundle_uri, version)).card
    return EvaluateTask(
        deployment,
        training_set.card.training_id,
        system,
        card.layers_kept,
        card.dim,
        seeds=tuple(range(settings.evaluate.seeds)),
        bundle=version,
    )


def evaluation_result(
    settings: Settings,
    training_set: TrainingSet,
    found: Sequence[Scored],
    *,
    chosen: int,
    decision: Decision = "clicks",
) -> Evaluation:
    """Return means, intervals and findings from the results of all tasks.

    ``chosen`` is the layer that systems read, and ``decision`` is the basis of that choice.
    """
    data, _ = _data(training_set, settings.interactions.history, fold=None)
    scores = sorted((s for one in found for s in one.scores), key=lambda s: (s.dim, s.system, s.seed))
    predictions = {key: value for one in found for key, value in one.predictions.items()}
    summaries = summarise(scores, predictions, data, comparison=COMPARISON)
    card, split = training_set.card, data.split
    return Evaluation(
        training_id=card.training_id,
        backbone=card.backbone,
        layers=card.layers,
        width=card.width,
        users=card.users,
        items=card.items,
        rows=(len(data.labels[split.train]), len(data.labels[split.validation]), len(data.labels[split.test])),
        cold_rows=int(data.cold.sum()),
        chosen_layer=chosen,
        decision=decision,
        scores=scores,
        summaries=summaries,
        findings=findings(summaries, scores, layers=card.layers, comparison=COMPARISON),
    )


def _vectors(
    task: EvaluateTask, training_set: TrainingSet, rows: Interactions, seed: int, resources: TaskResources
) -> NDArray[np.float32] | None:
    storage, settings = task.deployment.storage, task.deployment.settings
    if task.bundle:
        uri = join(settings.bundle_uri, task.bundle)
        encoder = load_encoder(storage, uri, task.bundle, settings.encode, resources)
        return encoder.encode(training_set.texts).vectors
    if task.system.layer == "tuned":
        states = np.load(io.BytesIO(storage.read(task.tuned_uri)))
    else:
        states = training_set.states(task.layer or 0)
    items, train = len(training_set.texts), settings.train
    learned = learning_data(rows, history=settings.interactions.history, holdout=train.holdout, items=items)
    vectors = make_vectors(task.system, states=states, data=learned, dim=task.dim, seed=seed, train=train)
    return None if vectors is None else vectors[:items]


@lru_cache(maxsize=1)
def _training_set(storage: Storage, work_uri: str, training_id: str) -> TrainingSet:
    return open_training_set(storage, work_uri, training_id)


def _data(training_set: TrainingSet, history: int, *, fold: int | None) -> tuple[ClickData, Interactions]:
    """Return the data of the click model, and the interactions of its training part, for fits and trainings."""
    interactions, split, order = training_set.interactions, training_set.split, None
    if fold is None:
        learned = interactions.take(split.train)
    else:
        interactions = interactions.take(split.train)
        order, split = split_by_user(interactions, folds=FOLDS, fold=fold)
        learned = interactions.take(order[split.train])
    data = click_data(interactions, split, n_items=len(training_set.item_ids), history=history, order=order)
    return data, learned

"""The yardstick: every system's vectors judged by the same click model; tasks for Spark, and what follows from them."""

import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import EncodeSettings, Settings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.click_model import ClickData, click_data, score_vectors
from marc_pipeline.evaluation.findings import findings
from marc_pipeline.evaluation.statistics import summarise
from marc_pipeline.evaluation.systems import System, make_vectors, sweep_systems, systems, tuned_systems
from marc_pipeline.model.bundle import open_bundle
from marc_pipeline.model.device import use_threads
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.session import run_buckets
from marc_pipeline.storage import Storage, join
from marc_pipeline.training.interactions import Interactions, split_by_user
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.training_set import TrainingSet, open_training_set
from marc_schemas.evaluation import Evaluation, SystemScore
from marc_schemas.layers import Decision

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMPARISON = "marc"
FOLDS = 5
"""Groups of users that layers are judged on."""
TRAINED = {"autoencoder", "mrl", "contrastive"}


@dataclass(frozen=True)
class EvaluateTask:
    """One system at one dimension; travels to Spark's Python workers.

    Attributes:
        training_id: the training set, in the work area.
        system: what to judge; layer: the block that it reads, None where it reads none.
        bundle_uri, bundle: of a system that is a bundle.
        tuned_uri: states of the tuned backbone's final layer [items, D], for the systems that read them.
        seeds: of the click model and of the training.
        fold: judge within the training part, on this group of its users, for choices that must not see what lies
            behind it; None: on everything.
    """

    storage: Storage
    work_uri: str
    training_id: str
    system: System
    layer: int | None
    dim: int
    seeds: tuple[int, ...]
    train: TrainSettings
    encode: EncodeSettings
    history: int
    fold: int | None = None
    bundle_uri: str = ""
    bundle: str = ""
    tuned_uri: str = ""

    @property
    def trained(self) -> bool:
        """Whether the system's vectors come from a training, which differs from seed to seed."""
        return self.system.name.startswith("marc") or self.system.name in TRAINED

    @property
    def cost(self) -> int:
        """Rough cost in click models trained: a system that is itself trained counts five times."""
        return len(self.seeds) * (5 if self.trained else 1)


@dataclass(frozen=True)
class Scored:
    """What a task found: one score per seed, and the predictions [test rows] behind it."""

    scores: list[SystemScore]
    predictions: dict[tuple[str, int, int], NDArray[np.float32]]


def evaluate_task(task: EvaluateTask, resources: TaskResources) -> Scored:
    """Make a system's vectors from the training part, and judge them with every seed."""
    use_threads(resources.cpus)
    training_set = _training_set(task.storage, task.work_uri, task.training_id)
    data, rows = _data(training_set, task.history, fold=task.fold)
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
                auc=found.auc,
                cold_auc=found.cold_auc,
                warm_auc=found.warm_auc,
                log_loss=found.log_loss,
                validation_auc=found.validation_auc,
                epoch=found.epoch,
                train_seconds=spent,
                score_seconds=found.seconds,
            )
        )
    return Scored(scores, predictions)


def run_tasks(spark: "SparkSession", tasks: Sequence[EvaluateTask], *, label: str) -> list[Scored]:
    """All tasks side by side on Spark, costly ones first; in no particular order."""
    return run_buckets(
        spark, evaluate_task, tasks, label=label, weight=lambda task: task.cost, unit="fits", each="tasks"
    )


def sweep_tasks(settings: Settings, training_set: TrainingSet, *, storage: Storage) -> list[EvaluateTask]:
    """Every layer, judged within the training part: the choice of layer sees nothing behind the boundary.

    By cross-validation over users. Most users of the test part are new as well; and a stretch of time holds few users,
    of whom the AUC says more than of the layer.

    Raises:
        UserError: there are too few users to hold some out.
    """
    split_by_user(training_set.interactions.take(training_set.split.train), folds=FOLDS, fold=0)
    return [
        _task(
            settings,
            training_set,
            storage,
            system,
            layer=system.layer,
            dim=settings.train.dim,
            seeds=(fold,),
            fold=fold,
        )
        for system in sweep_systems(training_set.card.layers)
        for fold in range(FOLDS)
    ]


def layer_scores(found: Iterable[Scored]) -> dict[int, list[float]]:
    """AUC of every layer of a sweep, one per fold in the order of the folds; the first layer first."""
    by_layer: dict[int, dict[int, float]] = {}
    for score in (score for scored in found for score in scored.scores):
        by_layer.setdefault(score.layer or 0, {})[score.seed] = score.auc
    return {layer: [auc for _, auc in sorted(aucs.items())] for layer, aucs in sorted(by_layer.items())}


def evaluation_tasks(
    settings: Settings,
    training_set: TrainingSet,
    *,
    storage: Storage,
    chosen: int,
    tuned_uri: str = "",
    wanted: Sequence[str] = (),
) -> list[EvaluateTask]:
    """All systems at all dimensions; those that are trained, seed by seed.

    Args:
        settings: dimensions, seeds, training.
        training_set: what to judge on.
        storage: access to the work area.
        chosen: the layer that the training part chose.
        tuned_uri: states of the tuned backbone's final layer; empty where none was tuned.
        wanted: names of systems; empty for all.
    """
    layers = training_set.card.layers
    everything = systems(layers) + (tuned_systems() if tuned_uri else [])
    unknown = set(wanted) - {system.name for system in everything}
    if unknown:
        names = ", ".join(system.name for system in everything)
        raise UserError(f"there is no system {sorted(unknown)[0]!r}; there are {names}")
    tasks = []
    for system in everything:
        if wanted and system.name not in wanted:
            continue
        layer = {"chosen": chosen, "final": layers, "tuned": layers}.get(str(system.layer), system.layer)
        dims = {"ids": (0,), "final-full": (training_set.card.width,)}.get(system.name, settings.evaluate.dims)
        for dim in dims:
            task = _task(
                settings, training_set, storage, system, layer=layer, dim=dim, seeds=range(settings.evaluate.seeds)
            )
            task = replace(task, tuned_uri=tuned_uri)
            tasks += [replace(task, seeds=(seed,)) for seed in task.seeds] if task.trained else [task]
    return tasks


def bundle_task(settings: Settings, training_set: TrainingSet, *, storage: Storage, version: str) -> EvaluateTask:
    """A bundle of the bundle folder, whose vectors come from the ordinary encoder."""
    system = System(f"bundle:{version}", "bundle", None)
    bundle = open_bundle(storage, join(settings.bundle_uri, version))
    task = _task(
        settings, training_set, storage, system, layer=bundle.card.layers_kept, dim=bundle.card.dim,
        seeds=range(settings.evaluate.seeds),
    )  # fmt: skip
    return replace(task, bundle_uri=bundle.uri, bundle=version)


def judge(
    settings: Settings,
    training_set: TrainingSet,
    found: Sequence[Scored],
    *,
    chosen: int,
    decision: Decision = "clicks",
) -> Evaluation:
    """Means, intervals and findings of an evaluation.

    Args:
        settings: the configuration.
        training_set: what was judged on.
        found: results of all tasks.
        chosen: the layer that systems read.
        decision: what chose it.
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


def _task(
    settings: Settings,
    training_set: TrainingSet,
    storage: Storage,
    system: System,
    *,
    layer: int | str | None,
    dim: int,
    seeds: Iterable[int],
    fold: int | None = None,
) -> EvaluateTask:
    return EvaluateTask(
        storage=storage,
        work_uri=settings.work_uri,
        training_id=training_set.card.training_id,
        system=system,
        layer=None if layer is None else int(layer),
        dim=dim,
        seeds=tuple(seeds),
        train=settings.train,
        encode=settings.encode,
        history=settings.interactions.history,
        fold=fold,
    )


def _vectors(
    task: EvaluateTask, training_set: TrainingSet, rows: Interactions, seed: int, resources: TaskResources
) -> NDArray[np.float32] | None:
    if task.bundle:
        encoder = load_encoder(task.storage, task.bundle_uri, task.bundle, task.encode, resources)
        return encoder.encode(training_set.texts).vectors
    if task.system.layer == "tuned":
        states = np.load(io.BytesIO(task.storage.read(task.tuned_uri)))
    else:
        states = training_set.states(task.layer or 0)
    items = len(training_set.texts)
    learned = learning_data(rows, history=task.history, holdout=task.train.holdout, items=items)
    vectors = make_vectors(task.system, states=states, data=learned, dim=task.dim, seed=seed, train=task.train)
    return None if vectors is None else vectors[:items]


@lru_cache(maxsize=1)
def _training_set(storage: Storage, work_uri: str, training_id: str) -> TrainingSet:
    return open_training_set(storage, work_uri, training_id)


def _data(training_set: TrainingSet, history: int, *, fold: int | None) -> tuple[ClickData, Interactions]:
    """What the click model sees; and all that a fit may see, nothing of what is validated and tested on."""
    interactions, split, order = training_set.interactions, training_set.split, None
    if fold is None:
        learned = interactions.take(split.train)
    else:
        interactions = interactions.take(split.train)
        order, split = split_by_user(interactions, folds=FOLDS, fold=fold)
        learned = interactions.take(order[split.train])
    data = click_data(interactions, split, n_items=len(training_set.item_ids), history=history, order=order)
    return data, learned

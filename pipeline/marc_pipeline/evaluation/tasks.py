"""Evaluation tasks for Spark: each makes the vectors of several systems, and evaluates them in one pass."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.click_data import ClickData, time_split_data
from marc_pipeline.evaluation.click_model import ClickScore, Vectors, score_together
from marc_pipeline.evaluation.factory import make_vectors
from marc_pipeline.evaluation.findings import findings
from marc_pipeline.evaluation.statistics import beats_random, summarise
from marc_pipeline.evaluation.systems import System, systems, tuned_systems
from marc_pipeline.model.device import use_threads
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.tasks import run_buckets
from marc_pipeline.storage import join
from marc_pipeline.training.learning import LearningData, training_part
from marc_pipeline.training.training_set import TrainingSet, cached_training_set, training_uri
from marc_pipeline.work_area import ProgressFiles
from marc_schemas.evaluation import Evaluation, SystemScore
from marc_schemas.layers import Decision

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMPARISON = "marc"
TRAINED = {"autoencoder", "mrl", "contrastive"}
TRAINING_COST = 5
"""Cost of a trained system in fits of a click model."""
FIGURES = ("auc", "cold_auc", "warm_auc", "log_loss", "validation_auc", "epoch")
RANKS = ("recall", "ndcg", "lookup_recall")


@dataclass(frozen=True)
class EvaluateTask:
    """The evaluation of systems at one dimension with one seed. It is pickled for Spark's Python workers.

    Attributes:
        number: number of the task, for its progress.
        training_id: id of the training set in the work area.
        systems: the systems, each with the layer that it reads, or None.
        seed: seed of the click model and of the training.
        tuned_uri: states of the tuned backbone's final layer [items, D], for the systems that read them.
    """

    number: int
    deployment: Deployment
    training_id: str
    systems: tuple[tuple[System, int | None], ...]
    dim: int
    seed: int
    tuned_uri: str = ""

    @property
    def cost(self) -> int:
        """Return the approximate cost in fits of a click model."""
        return sum(_cost(system) for system, _ in self.systems)

    @property
    def progress(self) -> ProgressFiles:
        """Return the place of the progress of all tasks."""
        return progress_files(self.deployment, self.training_id, "evaluate")


@dataclass(frozen=True)
class Scored:
    """Scores of systems, and their predictions [test rows] by system, dimension and seed."""

    scores: list[SystemScore]
    predictions: dict[tuple[str, int, int], NDArray[np.float32]]


def progress_files(deployment: Deployment, training_id: str, stage: str) -> ProgressFiles:
    """Return the place where the tasks of a stage of a training record their progress."""
    uri = training_uri(deployment.settings.work_uri, training_id)
    return ProgressFiles(deployment.storage, join(uri, "progress", stage))


def evaluate_task(task: EvaluateTask, resources: TaskResources) -> Scored:
    """Make the systems' vectors from the training part, and evaluate them in one pass."""
    use_threads(resources.cpus)
    settings = task.deployment.settings
    training_set = cached_training_set(task.deployment.storage, settings.work_uri, task.training_id)
    # Once for all systems, because histories of many rows take time.
    learned = training_part(training_set, settings=settings.interactions, holdout=settings.train.holdout)
    made, seconds, done = [], [], 0

    def tick(before: int, size: int) -> Callable[[float], None]:
        return lambda share: task.progress.write(task.number, before + share * size)

    for system, layer in task.systems:
        started, cost = time.monotonic(), _cost(system) - 1
        made.append(_vectors(task, training_set, learned, system, layer, tick(done, cost)))
        seconds.append(time.monotonic() - started)
        done += cost
    data = evaluation_data(training_set, settings)
    scored = score_together(
        made,
        data,
        seed=task.seed,
        ranked=training_set.interactions.implicit,
        done=tick(done, len(task.systems)),
    )
    task.progress.clear([task.number])
    return as_scores(task.systems, scored, dim=task.dim, seed=task.seed, seconds=seconds)


def evaluation_data(training_set: TrainingSet, settings: Settings) -> ClickData:
    """Return the data of the split by time for click models."""
    return time_split_data(
        training_set.interactions,
        training_set.card.boundaries,
        items=len(training_set.item_ids),
        settings=settings.interactions,
    )


def as_scores(
    evaluated: Sequence[tuple[System, int | None]],
    scored: Sequence[ClickScore],
    *,
    dim: int,
    seed: int,
    seconds: Sequence[float],
) -> Scored:
    """Return the records of systems of one pass; ``seconds`` is the time that each took to make its vectors."""
    scores = [
        SystemScore(
            system=system.name,
            family=system.family,
            layer=layer,
            dim=dim,
            seed=seed,
            **{name: getattr(found, name) for name in FIGURES},
            **{name: getattr(found.ranking, name) for name in RANKS},
            train_seconds=spent,
            score_seconds=found.seconds,
        )
        for (system, layer), found, spent in zip(evaluated, scored, seconds, strict=True)
    ]
    predictions = {
        (system.name, dim, seed): found.predictions for (system, _), found in zip(evaluated, scored, strict=True)
    }
    return Scored(scores, predictions)


def run_tasks(spark: "SparkSession", tasks: Sequence[EvaluateTask]) -> list[Scored]:
    """Run all tasks in parallel on Spark, costly ones first, and return the results in any order."""
    if not tasks:
        return []
    progress = tasks[0].progress
    progress.clear(task.number for task in tasks)
    return run_buckets(
        spark,
        evaluate_task,
        tasks,
        label="evaluate",
        weight=lambda task: task.cost,
        unit="fits",
        each="tasks",
        running=progress.total,
    )


def evaluation_tasks(
    deployment: Deployment, training_set: TrainingSet, *, chosen: int, tuned_uri: str = "", wanted: Sequence[str] = ()
) -> list[EvaluateTask]:
    """Return one task per dimension and seed, with all systems of this dimension.

    ``chosen`` is the layer that the training part chose. Without ``wanted`` names, all systems are evaluated; tuned
    systems only with ``tuned_uri``, the states of the tuned backbone's final layer.

    Raises:
        UserError: the backbone has no system of a name.
    """
    card, wants = training_set.card, deployment.settings.evaluate
    everything = systems(card.layers) + (tuned_systems() if tuned_uri else [])
    unknown = set(wanted) - {system.name for system in everything}
    if unknown:
        names = ", ".join(system.name for system in everything)
        raise UserError(f"there is no system {sorted(unknown)[0]!r}; choose from {names}")
    by_dim: dict[int, list[tuple[System, int | None]]] = {}
    for system in everything:
        if wanted and system.name not in wanted:
            continue
        named = {"chosen": chosen, "final": card.layers, "tuned": card.layers}
        layer = named[system.layer] if isinstance(system.layer, str) else system.layer
        for dim in {"ids": (0,), "final-full": (card.width,)}.get(system.name, wants.dims):
            by_dim.setdefault(dim, []).append((system, layer))
    each = [(dim, seed) for dim in by_dim for seed in range(wants.seeds)]
    return [
        EvaluateTask(number, deployment, card.training_id, tuple(by_dim[dim]), dim, seed, tuned_uri)
        for number, (dim, seed) in enumerate(each)
    ]


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
    data = evaluation_data(training_set, settings)
    scores = sorted((s for one in found for s in one.scores), key=lambda s: (s.dim, s.system, s.seed))
    predictions = {key: value for one in found for key, value in one.predictions.items()}
    summaries = summarise(scores, predictions, data, comparison=COMPARISON)
    card, split = training_set.card, data.split
    told = beats_random(summaries, predictions, data)
    return Evaluation(
        training_id=card.training_id,
        backbone=card.backbone,
        layers=card.layers,
        width=card.width,
        users=card.users,
        items=card.items,
        rows=(len(data.labels[split.train]), len(data.labels[split.validation]), len(data.labels[split.test])),
        cold_rows=int(data.cold.sum()),
        negatives=negatives_text(training_set, settings),
        chosen_layer=chosen,
        decision=decision,
        scores=scores,
        summaries=summaries,
        findings=findings(summaries, scores, layers=card.layers, comparison=COMPARISON, beats_random=told),
    )


def negatives_text(training_set: TrainingSet, settings: Settings) -> str:
    """Return where the rows without a click come from, for reports."""
    wanted = settings.interactions
    if not training_set.interactions.implicit:
        return f"ratings below {wanted.positive_rating:g}"
    return (
        f"{wanted.negatives} sampled items per positive, which the user never took, drawn with probability "
        f"proportional to (1 + count)^{wanted.negative_popularity:g}"
    )


def _cost(system: System) -> int:
    trained = system.name.startswith("marc") or system.name in TRAINED
    return 1 + (TRAINING_COST if trained else 0)


def _vectors(
    task: EvaluateTask,
    training_set: TrainingSet,
    learned: LearningData,
    system: System,
    layer: int | None,
    tick: Callable[[float], None],
) -> Vectors:
    settings, items = task.deployment.settings, len(training_set.texts)
    if system.layer == "tuned":
        states = np.load(io.BytesIO(task.deployment.storage.read(task.tuned_uri)))
    else:
        states = training_set.states(layer or 0)
    vectors = make_vectors(
        system, states=states, data=learned, dim=task.dim, seed=task.seed, train=settings.train, tick=tick
    )
    return None if vectors is None else vectors[:items]

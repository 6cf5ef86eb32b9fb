"""The model's side of a run: training set, layer, bundle, evaluation, promotion; each hands over by the work area."""

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import ValidationError

from pipeline.config import Settings, TrainSettings, default_config, describe, load_settings, parse_ds
from pipeline.errors import GateRefused, UserError
from pipeline.resources import TaskResources
from pipeline.run import storage_of
from pipeline.storage import Storage, join
from pipeline.training_set import (
    StatesFacts,
    TrainingIdentity,
    TrainingSet,
    identify_training,
    make_training_set,
    open_training_set,
    read_card,
    training_uri,
)
from schemas.evaluation import Evaluation
from schemas.files import Contract
from schemas.promotion import Comparison, TrainingRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.evaluation import EvaluateTask, Scored
    from pipeline.model.bundle import Bundle

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
CURVES = "curves.png"
LAYERS = "layers.json"

C = TypeVar("C", bound=Contract)
log = logging.getLogger(__name__)


def with_train(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """Settings with keys of ``train`` replaced; None means as configured.

    Raises:
        UserError: a value is out of range.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        train = TrainSettings.model_validate({**settings.train.model_dump(), **given})
    except ValidationError as error:
        raise UserError(f"train: {describe(error)}") from None
    return settings.model_copy(update={"train": train})


def run_id(settings: Settings, training_id: str) -> str:
    """Names a training run: same data, same settings, same run, which a retry goes on with."""
    parts = [training_id, settings.interactions.history, settings.train.model_dump(exclude={"checkpoint_every"})]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def run_uri(settings: Settings, training_id: str) -> str:
    """Folder of a training run."""
    return join(training_uri(settings.work_uri, training_id), "runs", run_id(settings, training_id))


def identify(settings: Settings, *, ds: str) -> TrainingIdentity:
    """The training set that a training of this date would use. Needs no Spark."""
    return identify_training(settings, ds=ds, storage=storage_of(settings))


def identify_for_scheduler(*, ds: str, config: str) -> dict[str, str]:
    """What a scheduler hands from task to task: ds, configuration and training_id.

    Args:
        ds: date of the catalogue.
        config: configuration file; empty for the default.

    Raises:
        UserError: bad date or configuration, no catalogue, no interactions.
    """
    path = default_config(config)
    identity = identify(load_settings(path), ds=parse_ds(ds))
    return {"ds": ds, "config": os.path.abspath(path), "training_id": identity.training_id}  # noqa: PTH100 - as load_settings does


def promote_for_scheduler(*, config: str, training_id: str) -> dict[str, Any]:
    """Promote the bundle that a training made; what was compared, without the single scores."""
    settings = load_settings(config)
    comparison = promote_stage(settings, training_id, trained_bundle(settings, training_id))
    return comparison.model_dump(exclude={"scores"})


def states_stage(
    spark: "SparkSession", settings: Settings, identity: TrainingIdentity, *, expected: str | None = None
) -> TrainingSet:
    """Make the training set: items, interactions, hidden states of every layer; once.

    Args:
        spark: reads the catalogue.
        settings: the configuration.
        identity: from :func:`identify`.
        expected: training_id that an earlier task of the same run announced.

    Raises:
        UserError: catalogue or interactions cannot be used, or changed since the id was announced.
    """
    if expected is not None and identity.training_id != expected:
        raise UserError(
            f"the catalogue, the interactions or the settings changed while the training was under way: {expected} is "
            f"now {identity.training_id}; start it again"
        )
    from pipeline.model.states import write_states

    def write(texts: list[str], path: Path) -> StatesFacts:
        return write_states(texts, path, train=settings.train, encode=settings.encode, resources=_machine())

    return make_training_set(spark, settings, identity, storage=storage_of(settings), write_states=write)


def layer_stage(spark: "SparkSession", settings: Settings, training_id: str) -> int:
    """The layer to keep: as configured, or as the training part chooses."""
    from pipeline import evaluation

    storage = storage_of(settings)
    if (wanted := settings.train.layers) is not None:
        available = read_card(storage, settings.work_uri, training_id).layers
        if wanted > available:
            raise UserError(
                f"train.layers is {wanted}, the backbone has {available} layers; choose at most {available}"
            )
        return wanted
    uri = join(run_uri(settings, training_id), LAYERS)
    try:
        scores = {int(layer): aucs for layer, aucs in json.loads(storage.read(uri)).items()}
    except FileNotFoundError:
        training_set = open_training_set(storage, settings.work_uri, training_id)
        tasks = evaluation.sweep_tasks(settings, training_set, storage=storage)
        scores = evaluation.layer_scores(_evaluate(spark, tasks, label="layers"))
        storage.write(uri, json.dumps(scores).encode())
    chosen = evaluation.choose_layer(scores)
    means = ", ".join(f"{layer} {fmean(aucs):.4f}" for layer, aucs in scores.items())
    log.info("layers: %s; kept: %d", means, chosen)
    return chosen


def train_stage(spark: "SparkSession", settings: Settings, training_id: str) -> TrainingRun:
    """Choose the layer, train, and save the bundle; a run that is finished is left as it is.

    Raises:
        UserError: there is too little to learn from, or the loss is not finite.
    """
    from pipeline.evaluation_report import training_curves
    from pipeline.model.bundle import CARD

    storage, uri = storage_of(settings), run_uri(settings, training_id)
    done = _read(storage, join(uri, RUN), TrainingRun)
    if done is not None and storage.stat(join(settings.bundle_uri, done.bundle, CARD)):
        log.info("train: bundle %s stands already", done.bundle)
        return done
    # Here, in one line: a Spark task would find it later and say it at length.
    width, dim = read_card(storage, settings.work_uri, training_id).width, settings.train.dim
    if dim > width:
        raise UserError(f"train.dim is {dim}, the backbone's hidden state has {width} numbers; choose at most {width}")
    layers = layer_stage(spark, settings, training_id)
    if settings.train.processes > 1:
        from pipeline.session import distribute

        bundle, history = distribute(
            spark, train_member, settings, training_id, layers, processes=settings.train.processes
        )
    else:
        bundle, history = train_process(settings, training_id, layers)
    chosen = settings.train.layers is None
    scores = json.loads(storage.read(join(uri, LAYERS))) if chosen else {}
    run = TrainingRun(
        training_id=training_id,
        run_id=run_id(settings, training_id),
        bundle=bundle,
        layers=layers,
        layer_auc={int(layer): fmean(aucs) for layer, aucs in scores.items()},
        history=history,
    )
    with storage.staged(join(uri, CURVES)) as staged:
        training_curves(history, staged)
        storage.publish(staged, join(uri, CURVES))
    storage.write(join(uri, RUN), run.model_dump_json(indent=1).encode())
    log.info("train: bundle %s; curves: %s", bundle, join(uri, CURVES))
    return run


def trained_bundle(settings: Settings, training_id: str) -> str:
    """Version of the bundle that the training with these settings made.

    Raises:
        UserError: it has not finished.
    """
    run = _read(storage_of(settings), join(run_uri(settings, training_id), RUN), TrainingRun)
    if run is None:
        raise UserError(f"training {training_id} has made no bundle with these settings yet; train first")
    return run.bundle


def train_process(settings: Settings, training_id: str, layers: int) -> tuple[str, list[dict[str, float]]]:
    """One process of a training; with several, each takes its share and the first one writes.

    Returns:
        Version of the bundle, and the history of the training.
    """
    from pipeline.model.distributed import place
    from pipeline.model.fit import Checkpoint
    from pipeline.model.training import save_marc, train_marc

    storage = storage_of(settings)
    training_set = open_training_set(storage, settings.work_uri, training_id)
    checkpoint = Checkpoint(
        storage, join(run_uri(settings, training_id), CHECKPOINT), key=f"{run_id(settings, training_id)}-{layers}"
    )
    trained = train_marc(
        training_set,
        layers=layers,
        train=settings.train,
        encode=settings.encode,
        history=settings.interactions.history,
        resources=_machine(),
        checkpoint=checkpoint,
    )
    if place()[0] > 0:
        return "", []
    bundle = save_marc(trained, training_set, train=settings.train, storage=storage, bundle_uri=settings.bundle_uri)
    return bundle.version, trained.progress.history


def train_member(settings: Settings, training_id: str, layers: int) -> tuple[str, list[dict[str, float]]]:
    """:func:`train_process` as a member of a process group."""
    from pipeline.model.distributed import process_group

    with process_group():
        return train_process(settings, training_id, layers)


def compare_stage(spark: "SparkSession", settings: Settings, training_id: str, candidate: str) -> Comparison:
    """Judge a bundle: beside the current one on the same split, by an audit of its vectors, and by its checksums."""
    from pipeline import evaluation, promotion
    from pipeline.model.bundle import current_version

    storage = storage_of(settings)
    current = current_version(storage, settings.bundle_uri)
    training_set = open_training_set(storage, settings.work_uri, training_id)
    resources = _machine()
    # First: what is damaged or not finite has no vectors to judge.
    problems = promotion.problems(settings, training_set.texts, candidate, storage=storage, resources=resources)
    rival = current if current != candidate else None
    damage = promotion.damage(settings, rival, storage=storage) if rival else []
    if damage:
        log.warning("compare: the current bundle is no rival: %s", "; ".join(damage))
    versions = [] if problems else [candidate, *([rival] if rival and not damage else [])]
    tasks = [evaluation.bundle_task(settings, training_set, storage=storage, version=version) for version in versions]
    scores = [score for found in _evaluate(spark, tasks, label="compare") for score in found.scores]
    means = {version: fmean(s.auc for s in scores if s.system == f"bundle:{version}") for version in versions}
    auc, current_auc = means.get(candidate, math.nan), means.get(current) if current else None
    if current_auc is not None and auc < current_auc - settings.evaluate.tolerance:
        problems.append(
            f"its mean test AUC over {settings.evaluate.seeds} seeds is {auc:.4f}, that of the current "
            f"bundle {current} is {current_auc:.4f}; evaluate.tolerance is {settings.evaluate.tolerance:g}"
        )
    comparison = Comparison(
        training_id=training_id,
        candidate=candidate,
        current=current,
        auc=auc,
        current_auc=current_auc,
        tolerance=settings.evaluate.tolerance,
        scores=scores,
        problems=problems,
    )
    storage.write(_comparison_uri(settings, training_id, candidate), comparison.model_dump_json(indent=1).encode())
    beside = "there is no rival" if current_auc is None else f"the current one, {current}, {current_auc:.4f}"
    log.info("compare: bundle %s has AUC %.4f, %s", candidate, comparison.auc, beside)
    return comparison


def promote_stage(settings: Settings, training_id: str, candidate: str) -> Comparison:
    """Make a bundle the current one: one atomic write, behind the gate.

    Raises:
        GateRefused: the comparison found a reason against it.
        UserError: it was not compared, or not with what is current now.
    """
    from pipeline.model.bundle import current_version, promote

    storage = storage_of(settings)
    comparison = _read(storage, _comparison_uri(settings, training_id, candidate), Comparison)
    if comparison is None:
        raise UserError(f"bundle {candidate} was not evaluated on training set {training_id}; evaluate it first")
    if comparison.problems:
        raise GateRefused(f"bundle {candidate} is not promoted: " + "; ".join(comparison.problems))
    current = current_version(storage, settings.bundle_uri)
    if current not in {comparison.current, candidate}:
        raise UserError(f"bundle {current} became current since {candidate} was evaluated; evaluate again")
    promote(storage, settings.bundle_uri, candidate)
    log.info("promote: bundle %s is current; the next night re-encodes every item", candidate)
    return comparison


def tuned_stage(settings: Settings, training_id: str) -> str:
    """Tune the whole backbone for a bounded number of steps, once, and leave its final layer's states [items, D].

    Returns:
        Uri of the states, a ``.npy`` file.
    """
    from pipeline.model.fit import Checkpoint
    from pipeline.model.training import train_marc

    storage = storage_of(settings)
    training_set = open_training_set(storage, settings.work_uri, training_id)
    wanted = settings.evaluate
    steps = {"regime": "tuned", "max_steps": wanted.tuned_steps, "batch": wanted.tuned_batch}
    settings = with_train(settings, {**steps, "layers": training_set.card.layers, "validate_every": wanted.tuned_steps})
    uri = join(run_uri(settings, training_id), "states.npy")
    if storage.stat(uri) is None:
        log.info("tune: at most %d steps of %d interactions on all layers", wanted.tuned_steps, wanted.tuned_batch)
        trained = train_marc(
            training_set,
            layers=training_set.card.layers,
            train=settings.train,
            encode=settings.encode,
            history=settings.interactions.history,
            resources=_machine(),
            checkpoint=Checkpoint(
                storage, join(run_uri(settings, training_id), CHECKPOINT), key=run_id(settings, training_id)
            ),
        )
        buffer = io.BytesIO()
        np.save(buffer, trained.objective.source.all_states().numpy(force=True))
        storage.write(uri, buffer.getvalue())
    return uri


def evaluate_stage(
    spark: "SparkSession", settings: Settings, training_id: str, *, wanted: Sequence[str] = ()
) -> Evaluation:
    """Judge all systems of the yardstick, and write tables and plots into the work area.

    Args:
        spark: runs the systems side by side.
        settings: dimensions and seeds.
        training_id: the training set.
        wanted: names of systems; empty for all.
    """
    from pipeline import evaluation
    from pipeline.model.systems import tuned_systems

    storage = storage_of(settings)
    training_set = open_training_set(storage, settings.work_uri, training_id)
    chosen = layer_stage(spark, settings, training_id)
    names = {system.name for system in tuned_systems()}
    tuned = settings.evaluate.tuned_steps > 0 and (not wanted or not names.isdisjoint(wanted))
    tuned_uri = tuned_stage(settings, training_id) if tuned else ""
    tasks = evaluation.evaluation_tasks(
        settings, training_set, storage=storage, chosen=chosen, tuned_uri=tuned_uri, wanted=wanted
    )
    found = _evaluate(spark, tasks, label="evaluate")
    return evaluation.judge(settings, training_set, found, chosen=chosen)


def train_bundle(settings: Settings, *, ds: str, promote: bool = True) -> "Bundle":
    """Train a bundle on the catalogue of a date: MARC where there are interactions, else a whitened PCA.

    Args:
        settings: the configuration; see :func:`with_train`.
        ds: date of the catalogue.
        promote: make it current; a MARC only behind the gate.

    Raises:
        UserError: catalogue, interactions or settings cannot be used.
        GateRefused: the new bundle is worse than the current one, or its vectors are not sound.
    """
    from pipeline.model.bundle import open_bundle
    from pipeline.session import spark_session

    train = settings.train
    if train.compressor == "pca" or (train.compressor == "auto" and settings.interactions.uri is None):
        return _train_pca(settings, ds=ds, promote=promote)
    identity = identify(settings, ds=ds)
    with spark_session(settings.spark, name=f"marc train {ds}") as spark:
        states_stage(spark, settings, identity)
        run = train_stage(spark, settings, identity.training_id)
        if promote:
            compare_stage(spark, settings, identity.training_id, run.bundle)
    if promote:
        promote_stage(settings, identity.training_id, run.bundle)
    return open_bundle(storage_of(settings), join(settings.bundle_uri, run.bundle))


def _train_pca(settings: Settings, *, ds: str, promote: bool) -> "Bundle":
    from pipeline import catalogue
    from pipeline.model import bundle
    from pipeline.model.training import train_pca
    from pipeline.session import spark_session

    storage, train = storage_of(settings), settings.train
    source = catalogue.find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    with spark_session(settings.spark, name=f"marc train {ds}") as spark:
        texts = catalogue.sample_texts(spark, source, settings.catalogue, storage=storage, limit=train.sample)
    made = train_pca(
        texts,
        template=settings.catalogue.template,
        train=train,
        encode=settings.encode,
        storage=storage,
        bundle_uri=settings.bundle_uri,
        resources=_machine(),
    )
    if promote:
        bundle.promote(storage, settings.bundle_uri, made.version)
    return made


def evaluate(settings: Settings, *, ds: str, wanted: Sequence[str] = ()) -> Evaluation:
    """The whole yardstick on the catalogue and the interactions of a date; names of systems, or all."""
    from pipeline.session import spark_session

    identity = identify(settings, ds=ds)
    with spark_session(settings.spark, name=f"marc evaluate {ds}") as spark:
        states_stage(spark, settings, identity)
        return evaluate_stage(spark, settings, identity.training_id, wanted=wanted)


def evaluate_and_promote(settings: Settings, version: str, *, ds: str) -> Comparison:
    """Compare a bundle with the current one on the interactions of a date, and make it current behind the gate."""
    from pipeline.session import spark_session

    identity = identify(settings, ds=ds)
    with spark_session(settings.spark, name=f"marc promote {version}") as spark:
        states_stage(spark, settings, identity)
        compare_stage(spark, settings, identity.training_id, version)
    return promote_stage(settings, identity.training_id, version)


def _evaluate(spark: "SparkSession", tasks: "Sequence[EvaluateTask]", *, label: str) -> "list[Scored]":
    from pipeline.evaluation import evaluate_task
    from pipeline.session import run_buckets

    return run_buckets(spark, evaluate_task, tasks, label=label, weight=lambda task: task.cost, unit="fits")


def _comparison_uri(settings: Settings, training_id: str, candidate: str) -> str:
    return join(training_uri(settings.work_uri, training_id), "comparisons", f"{candidate}.json")


def _read(storage: Storage, uri: str, model: type[C]) -> C | None:
    try:
        return model.model_validate_json(storage.read(uri))
    except (FileNotFoundError, ValidationError):
        return None


def _machine() -> TaskResources:
    return TaskResources(cpus=os.cpu_count() or 1)

"""The stages of a training: the training set, the layer to keep, the bundle; each hands over by the work area."""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from pipeline.config import Settings, TrainSettings, describe
from pipeline.entry import Job
from pipeline.errors import UserError
from pipeline.resources import machine
from pipeline.run import storage_of
from pipeline.storage import join
from pipeline.training_set import (
    StatesFacts,
    TrainingIdentity,
    TrainingSet,
    identify_training,
    make_training_set,
    open_training_set,
    read_card,
    require_announced,
    require_shape,
    training_uri,
)
from pipeline.workspace import read_contract
from schemas.layers import Adopted, Decision
from schemas.promotion import TrainingRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.evaluation import EvaluateTask
    from pipeline.model.training import Trained

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
CURVES = "curves.png"
LAYERS = "layers.json"
TUNED = "states.npy"

log = logging.getLogger(__name__)


def with_train(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """Settings with keys of ``train`` replaced; None means as configured.

    Raises:
        UserError: a value is out of range.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        # What was not set stays open: an adopted recommendation may fill it.
        train = TrainSettings.model_validate({**settings.train.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        raise UserError(f"train: {describe(error)}") from None
    return settings.model_copy(update={"train": train})


def adopted_uri(settings: Settings) -> str:
    """Where the recommendation is that somebody adopted for the configured backbone."""
    name = hashlib.sha256(settings.train.backbone.encode()).hexdigest()[:16]
    return join(settings.bundle_uri, "adopted", f"{name}.json")


def adopted(settings: Settings) -> Adopted | None:
    """The recommendation that somebody adopted for the configured backbone."""
    return read_contract(storage_of(settings), adopted_uri(settings), Adopted)


def reviewed(settings: Settings) -> tuple[Settings, Decision]:
    """Settings with layers and pooling as adopted, where the configuration leaves them open; and what decided.

    A run asks once and hands on the answer: what is adopted while it is under way is for the next one.
    """
    train = settings.train
    if train.layers is not None:
        return settings, "configuration"
    found = adopted(settings)
    if found is not None:
        advised = found.recommendation
        if "pooling" not in train.model_fields_set or train.pooling == advised.pooling:
            update = {"layers": advised.layers, "pooling": advised.pooling}
            return settings.model_copy(update={"train": train.model_copy(update=update)}), "adopted"
        log.warning(
            "train.pooling is %s; the adopted %d layers are for %s pooling and have no say",
            *(train.pooling, advised.layers, advised.pooling),
        )
    return settings, "all" if trains_pca(settings) else "clicks"


def trains_pca(settings: Settings) -> bool:
    """Whether a training fits a PCA: asked for, or for want of interactions."""
    kind = settings.train.compressor
    return kind == "pca" or (kind == "auto" and settings.interactions.uri is None)


def as_decided(called: Job) -> tuple[Settings, Decision]:
    """Settings of a job: as the run decided when it began, or, of a job on its own, :func:`reviewed`."""
    if called.decided is None:
        return reviewed(called.settings)
    layers, pooling, decision = called.decided
    return with_train(called.settings, {"layers": layers, "pooling": pooling}), decision


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


def states_stage(
    spark: "SparkSession",
    settings: Settings,
    identity: TrainingIdentity,
    *,
    dims: Sequence[int] = (),
    expected: str | None = None,
) -> TrainingSet:
    """Make the training set: items, interactions, hidden states of every layer; once.

    Args:
        spark: reads the catalogue.
        settings: the configuration.
        identity: from :func:`identify`.
        dims: lengths of vectors that will be wanted.
        expected: training_id that an earlier task of the same run announced.

    Raises:
        UserError: catalogue or interactions cannot be used or changed since the id was announced, or the backbone has
            too few layers or numbers.
    """
    if expected is not None:
        require_announced(identity, expected)
    from pipeline.model.states import write_states

    def write(texts: list[str], path: Path) -> StatesFacts:
        return write_states(texts, path, train=settings.train, encode=settings.encode, resources=machine(), dims=dims)

    made = make_training_set(spark, settings, identity, storage=storage_of(settings), write_states=write)
    require_shape(settings.train, dims, layers=made.card.layers, width=made.card.width)
    return made


def fold_scores(spark: "SparkSession", settings: Settings, training_id: str) -> dict[int, list[float]]:
    """AUC of every layer within the training part, one per group of users; computed once."""
    from pipeline import evaluation

    def tasks(training_set: TrainingSet) -> "list[EvaluateTask]":
        return evaluation.sweep_tasks(settings, training_set, storage=storage_of(settings))

    return _layer_scores(spark, settings, training_id, LAYERS, tasks)


def tested_layers(spark: "SparkSession", settings: Settings, training_id: str) -> dict[int, list[float]]:
    """Test AUC of every layer's PCA at the dimensions of a training, one per seed; computed once."""
    from pipeline import evaluation

    dims, seeds = (settings.train.dim,), settings.evaluate.seeds
    asked = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"dims": dims})})

    def tasks(training_set: TrainingSet) -> "list[EvaluateTask]":
        wanted = [f"pca-layer-{layer}" for layer in range(training_set.card.layers + 1)]
        return evaluation.evaluation_tasks(asked, training_set, storage=storage_of(settings), chosen=0, wanted=wanted)

    return _layer_scores(spark, settings, training_id, f"layers_tested_{seeds}.json", tasks)


def _layer_scores(
    spark: "SparkSession",
    settings: Settings,
    training_id: str,
    name: str,
    tasks: "Callable[[TrainingSet], list[EvaluateTask]]",
) -> dict[int, list[float]]:
    """AUC of every layer, which a file of the training run remembers."""
    from pipeline import evaluation

    storage = storage_of(settings)
    uri = join(run_uri(settings, training_id), name)
    with suppress(FileNotFoundError):
        return {int(layer): aucs for layer, aucs in json.loads(storage.read(uri)).items()}
    training_set = open_training_set(storage, settings.work_uri, training_id)
    scores = evaluation.layer_scores(evaluation.run_tasks(spark, tasks(training_set), label="layers"))
    storage.write(uri, json.dumps(scores).encode())
    return scores


def layer_stage(spark: "SparkSession", settings: Settings, training_id: str) -> int:
    """The layer to keep: as configured, or as the training part chooses."""
    from pipeline.layer_findings import choose_layer

    if settings.train.layers is not None:
        return settings.train.layers
    scores = fold_scores(spark, settings, training_id)
    chosen = choose_layer(scores)
    means = ", ".join(f"{layer} {fmean(aucs):.4f}" for layer, aucs in scores.items())
    log.info("layers: %s; kept: %d", means, chosen)
    return chosen


def train_stage(
    spark: "SparkSession", settings: Settings, training_id: str, *, decision: Decision = "configuration"
) -> TrainingRun:
    """Choose the layer, train, and save the bundle; a run that is finished is left as it is.

    Args:
        spark: runs click models side by side, and several processes of the training.
        settings: the configuration, as :func:`reviewed`.
        training_id: the training set.
        decision: what decides the layers, for the bundle's card.

    Raises:
        UserError: there is too little to learn from, or the loss is not finite.
    """
    from pipeline.model.bundle import CARD
    from pipeline.report.training_curves import training_curves

    storage, uri = storage_of(settings), run_uri(settings, training_id)
    done = read_contract(storage, join(uri, RUN), TrainingRun)
    if done is not None and storage.stat(join(settings.bundle_uri, done.bundle, CARD)):
        log.info("train: bundle %s stands already", done.bundle)
        return done
    # Here, in one line: a Spark task would find it later and say it at length.
    card = read_card(storage, settings.work_uri, training_id)
    require_shape(settings.train, (settings.train.dim,), layers=card.layers, width=card.width)
    layers = layer_stage(spark, settings, training_id)
    if settings.train.processes > 1:
        from pipeline.session import distribute

        bundle, history = distribute(
            spark, train_member, settings, training_id, layers, decision, processes=settings.train.processes
        )
    else:
        bundle, history = train_process(settings, training_id, layers, decision)
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
    run = read_contract(storage_of(settings), join(run_uri(settings, training_id), RUN), TrainingRun)
    if run is None:
        raise UserError(f"training {training_id} has made no bundle with these settings yet; train first")
    return run.bundle


def train_process(
    settings: Settings, training_id: str, layers: int, decision: Decision
) -> tuple[str, list[dict[str, float]]]:
    """One process of a training; with several, each takes its share and the first one writes.

    Returns:
        Version of the bundle, and the history of the training.
    """
    from pipeline.model.distributed import place
    from pipeline.model.training import save_marc

    trained, training_set = _train(settings, training_id, layers)
    if place()[0] > 0:
        return "", []
    bundle = save_marc(
        trained,
        training_set,
        train=settings.train,
        storage=storage_of(settings),
        bundle_uri=settings.bundle_uri,
        layers_from=decision,
    )
    return bundle.version, trained.progress.history


def train_member(
    settings: Settings, training_id: str, layers: int, decision: Decision
) -> tuple[str, list[dict[str, float]]]:
    """:func:`train_process` as a member of a process group."""
    from pipeline.model.distributed import process_group

    with process_group():
        return train_process(settings, training_id, layers, decision)


def tuned_stage(settings: Settings, training_id: str) -> str:
    """Tune the whole backbone for a bounded number of steps, once, and leave its final layer's states [items, D].

    Returns:
        Uri of the states, a ``.npy`` file.
    """
    storage, wanted = storage_of(settings), settings.evaluate
    layers = read_card(storage, settings.work_uri, training_id).layers
    steps = {"max_steps": wanted.tuned_steps, "validate_every": wanted.tuned_steps, "batch": wanted.tuned_batch}
    settings = with_train(settings, {"regime": "tuned", "layers": layers, **steps})
    uri = join(run_uri(settings, training_id), TUNED)
    if storage.stat(uri) is None:
        log.info("tune: at most %d steps of %d interactions on all layers", wanted.tuned_steps, wanted.tuned_batch)
        trained, _ = _train(settings, training_id, layers)
        buffer = io.BytesIO()
        np.save(buffer, trained.objective.source.all_states().numpy(force=True))
        storage.write(uri, buffer.getvalue())
    return uri


def _train(settings: Settings, training_id: str, layers: int) -> "tuple[Trained, TrainingSet]":
    from pipeline.model.fit import Checkpoint
    from pipeline.model.training import train_marc

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
        resources=machine(),
        checkpoint=checkpoint,
    )
    return trained, training_set

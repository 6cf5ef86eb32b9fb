"""The stages of a training: training set, number of layers, bundle. Each reads and writes the work area."""

import io
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from marc_pipeline.bundles.choices import Chosen, with_train
from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.model.device import use_threads
from marc_pipeline.resources import machine
from marc_pipeline.storage import join
from marc_pipeline.training.training_set import (
    StatesFacts,
    TrainingIdentity,
    TrainingSet,
    make_training_set,
    open_training_set,
    read_card,
    require_announced,
    require_shape,
    training_uri,
)
from marc_pipeline.work_area import read_contract
from marc_schemas.identity import digest
from marc_schemas.layers import Decision
from marc_schemas.training import TrainingRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from marc_pipeline.bundles.making import Trained
    from marc_pipeline.evaluation.recipe_search import Recipe

RUN = "run.json"
CHECKPOINT = "checkpoint.pt"
CURVES = "curves.png"
LAYERS = "layers.json"
TUNED = "states.npy"

log = logging.getLogger(__name__)


def run_id(settings: Settings, training_id: str) -> str:
    """Return the id of a training run. It depends on data and settings only, so that a retry resumes the same run."""
    wanted = settings.interactions
    parts = [
        training_id, wanted.history, wanted.negatives, wanted.negative_popularity,
        settings.train.model_dump(exclude={"checkpoint_every"}),
    ]  # fmt: skip
    return digest(parts, chars=16)


def run_uri(settings: Settings, training_id: str) -> str:
    """Return the uri of a training run's folder."""
    return join(training_uri(settings.work_uri, training_id), "runs", run_id(settings, training_id))


def states_stage(
    spark: "SparkSession",
    deployment: Deployment,
    identity: TrainingIdentity,
    *,
    dims: Sequence[int] = (),
    expected: str | None = None,
) -> TrainingSet:
    """Write the training set to the work area, unless it exists: items, interactions, hidden states of every layer.

    ``dims`` are the dimensions of vectors that will be made; ``expected`` is the id that an earlier task found.

    Raises:
        UserError: the catalogue or the interactions cannot be used or changed since then, or the backbone has too few
            layers or too small a width.
    """
    if expected is not None:
        require_announced(identity, expected)
    from marc_pipeline.training.states import write_states

    settings = deployment.settings

    def write(texts: list[str], path: Path) -> StatesFacts:
        return write_states(texts, path, train=settings.train, encode=settings.encode, resources=machine(), dims=dims)

    made = make_training_set(spark, settings, identity, storage=deployment.storage, write_states=write)
    require_shape(settings.train, dims, layers=made.card.layers, width=made.card.width)
    return made


def fold_scores(deployment: Deployment, training_id: str) -> dict[int, list[float]]:
    """Return the AUC of every layer within the training part, one per group of users; computed once.

    The key ``layer_search.RANDOM`` has the AUC of random vectors.
    """
    from marc_pipeline.evaluation.layer_search import search_layers

    def found(training_set: TrainingSet) -> dict[int, list[float]]:
        settings = deployment.settings
        return search_layers(
            training_set.interactions.take(training_set.split.train),
            training_set.states,
            layers=range(training_set.card.layers + 1),
            items=len(training_set.item_ids),
            dim=settings.train.dim,
            settings=settings.interactions,
            holdout=settings.train.holdout,
        )

    return _layer_scores(deployment, training_id, LAYERS, found)


def tested_layers(deployment: Deployment, training_id: str) -> dict[int, list[float]]:
    """Return the test AUC of every layer's PCA at the dimension of a training, one per seed; computed once."""
    from marc_pipeline.evaluation.layer_search import pca_test_scores

    settings, seeds = deployment.settings, deployment.settings.evaluate.seeds

    def found(training_set: TrainingSet) -> dict[int, list[float]]:
        return pca_test_scores(training_set, settings, seeds=seeds)

    return _layer_scores(deployment, training_id, f"layers_tested_{seeds}.json", found)


def _layer_scores(
    deployment: Deployment, training_id: str, name: str, found: Callable[[TrainingSet], dict[int, list[float]]]
) -> dict[int, list[float]]:
    """Return the AUC of every layer from a file of the training run, which the first call writes."""
    settings, storage = deployment.settings, deployment.storage
    uri = join(run_uri(settings, training_id), name)
    with suppress(FileNotFoundError):
        return {int(layer): aucs for layer, aucs in json.loads(storage.read(uri)).items()}
    use_threads(machine().cpus)
    scores = found(open_training_set(storage, settings.work_uri, training_id))
    storage.write(uri, json.dumps(scores).encode())
    return scores


def layer_stage(deployment: Deployment, training_id: str) -> int:
    """Return the number of layers to keep, from the configuration or chosen on the training part."""
    from marc_pipeline.evaluation.layer_choice import choose_layer, final_scores
    from marc_pipeline.evaluation.layer_search import RANDOM, beats_random

    train = deployment.settings.train
    if train.layers is not None:
        return train.layers
    scores = fold_scores(deployment, training_id)
    layers = {layer: aucs for layer, aucs in scores.items() if layer != RANDOM and (layer or train.regime == "frozen")}
    chosen = choose_layer(layers)
    means = ", ".join(f"{layer} {fmean(aucs):.4f}" for layer, aucs in sorted(final_scores(layers).items()))
    log.info(
        "layers: mean AUC by layer: %s; random vectors %.4f; %d layers are kept, the fewest within one standard error",
        *(means, fmean(scores[RANDOM]), chosen),
    )
    if not beats_random(scores):
        log.warning(
            "layers: no layer is demonstrably better than random vectors; the texts may not tell what users take"
        )
    return chosen


def recipe_stage(spark: "SparkSession", deployment: Deployment, training_id: str, *, layer: int) -> "Recipe":
    """Return the weights of the constraints and the number of epochs, chosen on the training part; computed once.

    Configured weights are kept. A tuned backbone trains for too long to be tried several times: it ends by early
    stopping, with the first pair of weights.
    """
    from marc_pipeline.evaluation.recipe_search import Recipe, choose_recipe, search_recipes, weights

    settings, storage = deployment.settings, deployment.storage
    if settings.train.regime == "tuned":
        return Recipe(*weights(settings.train)[0])
    uri = join(run_uri(settings, training_id), f"recipes_{layer}.json")
    try:
        scores = {Recipe(**recipe): auc for recipe, auc in json.loads(storage.read(uri))}
    except FileNotFoundError:
        training_set = open_training_set(storage, settings.work_uri, training_id)
        scores = search_recipes(spark, deployment, training_set, layer=layer)
        storage.write(uri, json.dumps([(vars(recipe), auc) for recipe, auc in scores.items()]).encode())
    chosen, most = choose_recipe(scores), settings.train.epochs
    for keep, decouple in dict.fromkeys((recipe.keep, recipe.decouple) for recipe in scores):
        own = {
            recipe.epochs: auc for recipe, auc in scores.items() if (recipe.keep, recipe.decouple) == (keep, decouple)
        }
        shown = ", ".join(f"{epochs} {auc:.4f}" for epochs, auc in own.items())
        log.info("recipes: keep %g, decouple %g: mean AUC by epochs: %s", keep, decouple, shown)
    log.info("recipes: keep %g, decouple %g and %d epochs are taken", chosen.keep, chosen.decouple, chosen.epochs)
    if chosen.epochs == most:
        log.info("recipes: the longest training is the best; a higher train.epochs than %d may be better still", most)
    return chosen


def train_stage(
    spark: "SparkSession", deployment: Deployment, training_id: str, *, decision: Decision = "configuration"
) -> TrainingRun:
    """Choose the number of layers, train, and save the bundle. A finished run is not repeated.

    ``decision`` is the basis for the layers, for the bundle's card. The settings are those of ``choices.reviewed``.

    Raises:
        UserError: there are too few interactions, or the loss is not finite.
    """
    from marc_pipeline.model.bundle import CARD
    from marc_pipeline.report.training_curves import training_curves

    settings, storage = deployment.settings, deployment.storage
    uri = run_uri(settings, training_id)
    done = read_contract(storage, join(uri, RUN), TrainingRun)
    if done is not None and storage.stat(join(settings.bundle_uri, done.bundle, CARD)):
        log.info("train: bundle %s exists already", done.bundle)
        return done
    # Checked before Spark, which would report the same error in many lines.
    card = read_card(storage, settings.work_uri, training_id)
    require_shape(settings.train, (settings.train.dim,), layers=card.layers, width=card.width)
    layers = layer_stage(deployment, training_id)
    recipe = recipe_stage(spark, deployment, training_id, layer=layers)
    chosen = Chosen(layers, recipe.keep, recipe.decouple, recipe.epochs, decision)
    if settings.train.processes > 1:
        from marc_pipeline.spark.tasks import distribute

        bundle, history = distribute(
            spark, train_member, deployment, training_id, chosen, processes=settings.train.processes
        )
    else:
        bundle, history = train_process(deployment, training_id, chosen)
    scores = fold_scores(deployment, training_id) if settings.train.layers is None else {}
    run = TrainingRun(
        training_id=training_id,
        run_id=run_id(settings, training_id),
        bundle=bundle,
        layers=layers,
        keep=recipe.keep,
        decouple=recipe.decouple,
        epochs=recipe.epochs,
        layer_auc={layer: fmean(aucs) for layer, aucs in scores.items() if layer >= 0},
        history=history,
    )
    with storage.staged(join(uri, CURVES)) as staged:
        training_curves(history, staged)
        storage.publish(staged, join(uri, CURVES))
    storage.write(join(uri, RUN), run.model_dump_json(indent=1).encode())
    log.info("train: bundle %s; curves: %s", bundle, join(uri, CURVES))
    return run


def trained_bundle(deployment: Deployment, training_id: str) -> str:
    """Return the version of the bundle that the training with these settings made.

    Raises:
        UserError: the training has not finished.
    """
    run = read_contract(deployment.storage, join(run_uri(deployment.settings, training_id), RUN), TrainingRun)
    if run is None:
        raise UserError(f"training {training_id} has made no bundle with these settings yet; train first")
    return run.bundle


def train_process(deployment: Deployment, training_id: str, chosen: Chosen) -> tuple[str, list[dict[str, float]]]:
    """Train in one process, or as one of several processes, of which the first one writes the bundle.

    Returns:
        Version of the bundle, and history of the training; empty in all other processes.
    """
    from marc_pipeline.bundles.making import save_marc
    from marc_pipeline.training.distributed import place

    settings = deployment.settings
    trained, training_set = _train(deployment, training_id, chosen)
    if trained.progress.capped:
        log.warning("train: stopped at a cap while still improving; raise train.epochs or train.max_steps")
    if place()[0] > 0:
        return "", []
    bundle = save_marc(
        trained,
        training_set,
        train=chosen.applied(settings.train),
        storage=deployment.storage,
        bundle_uri=settings.bundle_uri,
        layers_from=chosen.decision,
    )
    return bundle.version, trained.progress.history


def train_member(deployment: Deployment, training_id: str, chosen: Chosen) -> tuple[str, list[dict[str, float]]]:
    """Run :func:`train_process` as a member of a process group."""
    from marc_pipeline.training.distributed import process_group

    with process_group():
        return train_process(deployment, training_id, chosen)


def tuned_stage(deployment: Deployment, training_id: str) -> str:
    """Tune the whole backbone for ``evaluate.tuned_steps``, unless this was done before.

    Returns:
        Uri of a ``.npy`` file with the states of its final layer [items, D].
    """
    from marc_pipeline.evaluation.recipe_search import weights

    storage, settings, wanted = deployment.storage, deployment.settings, deployment.settings.evaluate
    layers = read_card(storage, settings.work_uri, training_id).layers
    steps = {"max_steps": wanted.tuned_steps, "validate_every": wanted.tuned_steps, "batch": wanted.tuned_batch}
    settings = with_train(settings, {"regime": "tuned", "layers": layers, **steps})
    uri = join(run_uri(settings, training_id), TUNED)
    if storage.stat(uri) is None:
        log.info("tune: at most %d steps of %d interactions on all layers", wanted.tuned_steps, wanted.tuned_batch)
        chosen = Chosen(layers, *weights(settings.train)[0], None, "configuration")
        trained, _ = _train(deployment.with_settings(settings), training_id, chosen)
        buffer = io.BytesIO()
        np.save(buffer, trained.objective.source.all_states().numpy(force=True))
        storage.write(uri, buffer.getvalue())
    return uri


def _train(deployment: Deployment, training_id: str, chosen: Chosen) -> "tuple[Trained, TrainingSet]":
    from marc_pipeline.bundles.making import train_marc
    from marc_pipeline.training.fit import Checkpoint

    settings, storage = deployment.settings, deployment.storage
    training_set = open_training_set(storage, settings.work_uri, training_id)
    key = f"{run_id(settings, training_id)}-{chosen}"
    checkpoint = Checkpoint(storage, join(run_uri(settings, training_id), CHECKPOINT), key=key)
    trained = train_marc(
        training_set,
        layers=chosen.layers,
        train=chosen.applied(settings.train),
        encode=settings.encode,
        interactions=settings.interactions,
        resources=machine(),
        checkpoint=checkpoint,
    )
    return trained, training_set

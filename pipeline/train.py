"""Drivers of the model's side: train, evaluate, promote; each opens its Spark session and runs the stages."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings, default_config, load_settings, parse_ds
from pipeline.entry import parse_decided
from pipeline.promotion import compare_stage, promote_stage
from pipeline.resources import machine
from pipeline.run import storage_of
from pipeline.storage import join
from pipeline.training_run import (
    identify,
    layer_stage,
    reviewed,
    states_stage,
    train_stage,
    trained_bundle,
    trains_pca,
    tuned_stage,
    with_train,
)
from schemas.evaluation import Evaluation
from schemas.layers import Decision
from schemas.promotion import Comparison

if TYPE_CHECKING:
    from pipeline.model.bundle import Bundle


def identify_for_scheduler(*, ds: str, config: str) -> dict[str, str]:
    """What a scheduler hands from task to task: ds, configuration, training_id, and what was decided about layers.

    Args:
        ds: date of the catalogue.
        config: configuration file; empty for the default.

    Raises:
        UserError: bad date or configuration, no catalogue, no interactions.
    """
    path = default_config(config)
    settings, decision = reviewed(load_settings(path))
    decided = f"{settings.train.layers or 0}:{settings.train.pooling}:{decision}"
    training_id = identify(settings, ds=parse_ds(ds)).training_id
    return {"ds": ds, "config": os.path.abspath(path), "training_id": training_id, "decided": decided}  # noqa: PTH100 - as load_settings does


def promote_for_scheduler(*, config: str, training_id: str, decided: str) -> dict[str, Any]:
    """Promote the bundle that a training made; what was compared, without the single scores."""
    layers, pooling, _ = parse_decided(decided)
    settings = with_train(load_settings(config), {"layers": layers, "pooling": pooling})
    comparison = promote_stage(settings, training_id, trained_bundle(settings, training_id))
    return comparison.model_dump(exclude={"scores"})


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

    settings, decision = reviewed(settings)
    train = settings.train
    if trains_pca(settings):
        return _train_pca(settings, ds=ds, promote=promote, decision=decision)
    identity = identify(settings, ds=ds)
    with spark_session(settings.spark, storage=settings.storage, name=f"marc train {ds}") as spark:
        states_stage(spark, settings, identity, dims=(train.dim,))
        run = train_stage(spark, settings, identity.training_id, decision=decision)
        if promote:
            compare_stage(spark, settings, identity.training_id, run.bundle)
    if promote:
        promote_stage(settings, identity.training_id, run.bundle)
    return open_bundle(storage_of(settings), join(settings.bundle_uri, run.bundle))


def _train_pca(settings: Settings, *, ds: str, promote: bool, decision: Decision) -> "Bundle":
    from pipeline import catalogue
    from pipeline.model import bundle
    from pipeline.model.training import train_pca
    from pipeline.session import spark_session

    storage, train = storage_of(settings), settings.train
    source = catalogue.find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    with spark_session(settings.spark, storage=settings.storage, name=f"marc train {ds}") as spark:
        texts = catalogue.sample_texts(spark, source, settings.catalogue, storage=storage, limit=train.sample)
    made = train_pca(
        texts,
        template=settings.catalogue.template,
        train=train,
        encode=settings.encode,
        storage=storage,
        bundle_uri=settings.bundle_uri,
        resources=machine(),
        layers_from=decision,
    )
    if promote:
        bundle.promote(storage, settings.bundle_uri, made.version)
    return made


def evaluate(settings: Settings, *, ds: str, wanted: Sequence[str] = ()) -> Evaluation:
    """The whole yardstick on the catalogue and the interactions of a date.

    Args:
        settings: dimensions, seeds, training.
        ds: date of the catalogue.
        wanted: names of systems; empty for all.

    Raises:
        UserError: catalogue, interactions or settings cannot be used, or there is no such system.
    """
    from pipeline import evaluation
    from pipeline.model.systems import require_known, tuned_systems
    from pipeline.session import spark_session

    require_known(wanted)
    settings, decision = reviewed(settings)
    identity, storage = identify(settings, ds=ds), storage_of(settings)
    with spark_session(settings.spark, storage=settings.storage, name=f"marc evaluate {ds}") as spark:
        training_set = states_stage(spark, settings, identity, dims=(settings.train.dim, *settings.evaluate.dims))
        chosen = layer_stage(spark, settings, identity.training_id)
        names = {system.name for system in tuned_systems()}
        tuned = settings.evaluate.tuned_steps > 0 and (not wanted or not names.isdisjoint(wanted))
        tuned_uri = tuned_stage(settings, identity.training_id) if tuned else ""
        tasks = evaluation.evaluation_tasks(
            settings, training_set, storage=storage, chosen=chosen, tuned_uri=tuned_uri, wanted=wanted
        )
        found = evaluation.run_tasks(spark, tasks, label="evaluate")
        return evaluation.judge(settings, training_set, found, chosen=chosen, decision=decision)


def evaluate_and_promote(settings: Settings, version: str, *, ds: str) -> Comparison:
    """Compare a bundle with the current one on the interactions of a date, and make it current behind the gate."""
    from pipeline.session import spark_session

    settings, _ = reviewed(settings)
    identity = identify(settings, ds=ds)
    with spark_session(settings.spark, storage=settings.storage, name=f"marc promote {version}") as spark:
        states_stage(spark, settings, identity)
        compare_stage(spark, settings, identity.training_id, version)
    return promote_stage(settings, identity.training_id, version)

"""Whole trainings, evaluations and promotions: each opens one Spark session and runs its stages in one process."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from marc_pipeline.bundles.choices import reviewed, trains_pca
from marc_pipeline.bundles.promotion import compare_stage, promote_stage
from marc_pipeline.bundles.stages import layer_stage, states_stage, train_stage, tuned_stage
from marc_pipeline.deployment import Deployment
from marc_pipeline.resources import machine
from marc_pipeline.storage import join
from marc_pipeline.training.training_set import identify_training
from marc_schemas.evaluation import Evaluation
from marc_schemas.layers import Decision
from marc_schemas.promotion import BundleComparison

if TYPE_CHECKING:
    from marc_pipeline.model.bundle import Bundle


def train_bundle(deployment: Deployment, *, ds: str, promote: bool = True) -> "Bundle":
    """Train a bundle on the catalogue of a date: MARC if there are interactions, else a whitened PCA.

    ``promote`` makes the bundle current; a MARC bundle must pass the gate.

    Raises:
        UserError: the catalogue, the interactions or the settings cannot be used.
        GateRefused: the new bundle is worse than the current one, or its vectors are not usable.
    """
    from marc_pipeline.model.bundle import open_bundle
    from marc_pipeline.spark.session import configured_session

    deployment, decision = reviewed(deployment)
    settings = deployment.settings
    if trains_pca(settings):
        return _train_pca(deployment, ds=ds, promote=promote, decision=decision)
    identity = identify_training(deployment, ds=ds)
    with configured_session(settings, name=f"marc train {ds}") as spark:
        states_stage(spark, deployment, identity, dims=(settings.train.dim,))
        run = train_stage(spark, deployment, identity.training_id, decision=decision)
        if promote:
            compare_stage(spark, deployment, identity.training_id, run.bundle)
    if promote:
        promote_stage(deployment, identity.training_id, run.bundle)
    return open_bundle(deployment.storage, join(settings.bundle_uri, run.bundle))


def _train_pca(deployment: Deployment, *, ds: str, promote: bool, decision: Decision) -> "Bundle":
    from marc_pipeline.bundles.making import train_pca
    from marc_pipeline.catalogue.rows import sample_texts
    from marc_pipeline.catalogue.source import find_source
    from marc_pipeline.model import bundle
    from marc_pipeline.spark.session import configured_session

    settings, storage = deployment.settings, deployment.storage
    source = find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    with configured_session(settings, name=f"marc train {ds}") as spark:
        texts = sample_texts(spark, source, settings.catalogue, storage=storage, limit=settings.train.sample)
    made = train_pca(
        texts,
        template=settings.catalogue.rendering,
        train=settings.train,
        encode=settings.encode,
        storage=storage,
        bundle_uri=settings.bundle_uri,
        resources=machine(),
        layers_from=decision,
    )
    if promote:
        bundle.promote(storage, settings.bundle_uri, made.version)
    return made


def evaluate(deployment: Deployment, *, ds: str, wanted: Sequence[str] = ()) -> Evaluation:
    """Evaluate MARC and all baselines, or the ``wanted`` systems, on the catalogue and the interactions of a date.

    Raises:
        UserError: the catalogue, the interactions or the settings cannot be used, or a system is unknown.
    """
    from marc_pipeline.evaluation import tasks as evaluation
    from marc_pipeline.evaluation.systems import require_known, tuned_systems
    from marc_pipeline.spark.session import configured_session

    require_known(wanted)
    deployment, decision = reviewed(deployment)
    settings = deployment.settings
    identity = identify_training(deployment, ds=ds)
    with configured_session(settings, name=f"marc evaluate {ds}") as spark:
        training_set = states_stage(spark, deployment, identity, dims=(settings.train.dim, *settings.evaluate.dims))
        chosen = layer_stage(spark, deployment, identity.training_id)
        names = {system.name for system in tuned_systems()}
        tuned = settings.evaluate.tuned_steps > 0 and (not wanted or not names.isdisjoint(wanted))
        tuned_uri = tuned_stage(deployment, identity.training_id) if tuned else ""
        tasks = evaluation.evaluation_tasks(deployment, training_set, chosen=chosen, tuned_uri=tuned_uri, wanted=wanted)
        found = evaluation.run_tasks(spark, tasks, label="evaluate")
        return evaluation.evaluation_result(settings, training_set, found, chosen=chosen, decision=decision)


def evaluate_and_promote(deployment: Deployment, version: str, *, ds: str) -> BundleComparison:
    """Evaluate a bundle on the interactions of a date, and make it current if the gate passes it."""
    from marc_pipeline.spark.session import configured_session

    deployment, _ = reviewed(deployment)
    identity = identify_training(deployment, ds=ds)
    with configured_session(deployment.settings, name=f"marc promote {version}") as spark:
        states_stage(spark, deployment, identity)
        compare_stage(spark, deployment, identity.training_id, version)
    return promote_stage(deployment, identity.training_id, version)

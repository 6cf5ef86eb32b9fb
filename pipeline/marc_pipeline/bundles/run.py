"""Whole trainings, evaluations and promotions: each opens one Spark session and runs its stages in one process."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marc_pipeline.bundles.choices import Chosen, reviewed, trains_pca
from marc_pipeline.bundles.stages import layer_stage, recipe_stage, states_stage, train_stage, tuned_stage
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.resources import machine
from marc_pipeline.storage import join
from marc_pipeline.training.training_set import identify_training, require_interactions
from marc_schemas.evaluation import Evaluation
from marc_schemas.layers import Decision
from marc_schemas.promotion import BundleComparison

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from marc_pipeline.model.bundle import Bundle


@dataclass(frozen=True)
class TrainingResult:
    """The bundle that is current after a training, or the trained one if it was not promoted; and the comparison."""

    bundle: "Bundle"
    comparison: BundleComparison | None = None


def train_bundle(
    deployment: Deployment, *, ds: str, promote: bool = True, replace_marc: bool = False
) -> TrainingResult:
    """Train a bundle on the catalogue of a date: MARC if there are interactions, else a whitened PCA.

    With ``promote``, the bundle becomes current if it passes the gate. With interactions the gate compares it with its
    rivals, and a PCA that is better becomes current instead. Without interactions there is no AUC: a PCA must pass the
    audit of its vectors, and replaces a MARC bundle only with ``replace_marc``.

    Raises:
        UserError: the catalogue, the interactions or the settings cannot be used.
        GateRefused: the new bundle is worse than the current one, or its vectors are not usable.
    """
    from marc_pipeline.bundles.promotion import compare_stage, promote_stage
    from marc_pipeline.model.bundle import current_version, open_bundle
    from marc_pipeline.spark.session import configured_session

    deployment, decision = reviewed(deployment)
    settings, storage = deployment.settings, deployment.storage
    if settings.interactions.uri is None:
        made = _train_without_clicks(deployment, ds=ds, promote=promote, decision=decision, replace_marc=replace_marc)
        return TrainingResult(made)
    identity = identify_training(deployment, ds=ds)
    require_interactions(deployment, identity)
    comparison = None
    with configured_session(settings, name=f"marc train {ds}") as spark:
        if trains_pca(settings):
            version = _pca(spark, deployment, ds=ds, decision=decision)[0].version
        else:
            states_stage(spark, deployment, identity, dims=(settings.train.dim,))
            version = train_stage(spark, deployment, identity.training_id, decision=decision).bundle
        if promote:
            states_stage(spark, deployment, identity, dims=(settings.train.dim,))
    if promote:
        compare_stage(deployment, identity.training_id, version)
        comparison = promote_stage(deployment, identity.training_id, version)
        version = current_version(storage, settings.bundle_uri) or version
    return TrainingResult(open_bundle(storage, join(settings.bundle_uri, version)), comparison)


def _train_without_clicks(
    deployment: Deployment, *, ds: str, promote: bool, decision: Decision, replace_marc: bool
) -> "Bundle":
    from marc_pipeline.bundles import gate
    from marc_pipeline.model import bundle
    from marc_pipeline.spark.session import configured_session

    settings, storage = deployment.settings, deployment.storage
    if not trains_pca(settings):
        raise UserError("train.compressor is marc, but interactions.uri is not set; set it, or train.compressor to pca")
    if promote:
        _require_no_marc(deployment, replace_marc=replace_marc)
    with configured_session(settings, name=f"marc train {ds}") as spark:
        made, texts = _pca(spark, deployment, ds=ds, decision=decision)
    if promote:
        problems = gate.problems(settings, texts, made.version, storage=storage, resources=machine())
        if problems:
            raise GateRefused(f"bundle {made.version} is not promoted: " + "; ".join(problems))
        _require_no_marc(deployment, replace_marc=replace_marc)
        bundle.promote(storage, settings.bundle_uri, made.version)
    return made


def _require_no_marc(deployment: Deployment, *, replace_marc: bool) -> None:
    """Refuse to replace a MARC bundle by a PCA that nothing compares it with.

    Raises:
        GateRefused: the current bundle is a MARC bundle.
    """
    from marc_pipeline.model import bundle

    storage, uri = deployment.storage, deployment.settings.bundle_uri
    current = bundle.current_version(storage, uri)
    if current is None or replace_marc:
        return
    try:
        kind = bundle.open_bundle(storage, join(uri, current)).card.compressor.kind
    except UserError:
        # A bundle that cannot be read cannot be used by the nightly run either.
        return
    if kind != "pca":
        raise GateRefused(
            f"the current bundle {current} is a MARC bundle, and without interactions nothing shows that a PCA is "
            "better; set interactions.uri, or pass --replace-marc"
        )


def _pca(spark: "SparkSession", deployment: Deployment, *, ds: str, decision: Decision) -> "tuple[Bundle, list[str]]":
    """Train a whitened PCA on texts of the catalogue, and return its bundle and the texts."""
    from marc_pipeline.bundles.making import train_pca
    from marc_pipeline.catalogue.rows import sample_texts
    from marc_pipeline.catalogue.source import find_source

    settings, storage = deployment.settings, deployment.storage
    source = find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
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
    return made, texts


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
    require_interactions(deployment, identity)
    with configured_session(settings, name=f"marc evaluate {ds}") as spark:
        training_set = states_stage(spark, deployment, identity, dims=(settings.train.dim, *settings.evaluate.dims))
        chosen = layer_stage(deployment, identity.training_id)
        recipe = recipe_stage(spark, deployment, identity.training_id, layer=chosen)
        train = Chosen(chosen, recipe.keep, recipe.decouple, recipe.epochs, decision).applied(settings.train)
        deployment = deployment.with_settings(settings.model_copy(update={"train": train}))
        names = {system.name for system in tuned_systems()}
        tuned = settings.evaluate.tuned_steps > 0 and (not wanted or not names.isdisjoint(wanted))
        tuned_uri = tuned_stage(deployment, identity.training_id) if tuned else ""
        tasks = evaluation.evaluation_tasks(deployment, training_set, chosen=chosen, tuned_uri=tuned_uri, wanted=wanted)
        found = evaluation.run_tasks(spark, tasks)
        return evaluation.evaluation_result(settings, training_set, found, chosen=chosen, decision=decision)


def evaluate_and_promote(deployment: Deployment, version: str, *, ds: str) -> BundleComparison:
    """Evaluate a bundle on the interactions of a date, and make it current if the gate passes it."""
    from marc_pipeline.bundles.promotion import compare_stage, promote_stage
    from marc_pipeline.spark.session import configured_session

    deployment, _ = reviewed(deployment)
    identity = identify_training(deployment, ds=ds)
    require_interactions(deployment, identity)
    with configured_session(deployment.settings, name=f"marc promote {version}") as spark:
        states_stage(spark, deployment, identity)
    compare_stage(deployment, identity.training_id, version)
    return promote_stage(deployment, identity.training_id, version, replace=False)

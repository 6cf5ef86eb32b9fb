"""Promotion: compare a bundle with the current one; if the gate passes it, make it current in one atomic write."""

import logging
import math
from statistics import fmean
from typing import TYPE_CHECKING

from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.resources import machine
from marc_pipeline.storage import join
from marc_pipeline.training.training_set import open_training_set, training_uri
from marc_pipeline.work_area import read_contract
from marc_schemas.promotion import BundleComparison

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)


def compare_stage(spark: "SparkSession", deployment: Deployment, training_id: str, candidate: str) -> BundleComparison:
    """Evaluate a bundle and the current one on the same split, verify its checksums and audit its vectors."""
    from marc_pipeline.bundles import gate
    from marc_pipeline.evaluation.tasks import bundle_task, run_tasks
    from marc_pipeline.model.bundle import current_version

    settings, storage = deployment.settings, deployment.storage
    current = current_version(storage, settings.bundle_uri)
    training_set = open_training_set(storage, settings.work_uri, training_id)
    # The gate runs first, because a damaged bundle, or one with infinite weights, has no vectors to evaluate.
    problems = gate.problems(settings, training_set.texts, candidate, storage=storage, resources=machine())
    rival = current if current != candidate else None
    damage = gate.damage(settings, rival, storage=storage) if rival else []
    if damage:
        log.warning("promote: the current bundle is damaged and not evaluated: %s", "; ".join(damage))
    versions = [] if problems else [candidate, *([rival] if rival and not damage else [])]
    tasks = [bundle_task(deployment, training_set, version=version) for version in versions]
    scores = [score for found in run_tasks(spark, tasks, label="promote") for score in found.scores]
    means = {version: fmean(s.auc for s in scores if s.system == f"bundle:{version}") for version in versions}
    auc, current_auc = means.get(candidate, math.nan), means.get(current) if current else None
    if current_auc is not None and auc < current_auc - settings.evaluate.tolerance:
        problems.append(
            f"its mean test AUC over {settings.evaluate.seeds} seeds is {auc:.4f}, that of the current "
            f"bundle {current} is {current_auc:.4f}; evaluate.tolerance is {settings.evaluate.tolerance:g}"
        )
    comparison = BundleComparison(
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
    beside = "there is no current bundle" if current_auc is None else f"the current {current} has {current_auc:.4f}"
    log.info("promote: bundle %s has AUC %.4f; %s", candidate, comparison.auc, beside)
    return comparison


def promote_stage(deployment: Deployment, training_id: str, candidate: str) -> BundleComparison:
    """Make a bundle the current one by one atomic write, if the gate passes it.

    Raises:
        GateRefused: the comparison found a reason against the bundle.
        UserError: the bundle was not evaluated, or another bundle became current since then.
    """
    from marc_pipeline.model.bundle import current_version, promote

    settings, storage = deployment.settings, deployment.storage
    comparison = read_contract(storage, _comparison_uri(settings, training_id, candidate), BundleComparison)
    if comparison is None:
        raise UserError(f"bundle {candidate} was not evaluated on training set {training_id}; evaluate it first")
    if comparison.problems:
        raise GateRefused(f"bundle {candidate} is not promoted: " + "; ".join(comparison.problems))
    current = current_version(storage, settings.bundle_uri)
    if current not in {comparison.current, candidate}:
        raise UserError(f"bundle {current} became current since {candidate} was evaluated; evaluate again")
    promote(storage, settings.bundle_uri, candidate)
    log.info("promote: bundle %s is current; the next nightly run re-encodes every item", candidate)
    return comparison


def _comparison_uri(settings: Settings, training_id: str, candidate: str) -> str:
    return join(training_uri(settings.work_uri, training_id), "comparisons", f"{candidate}.json")

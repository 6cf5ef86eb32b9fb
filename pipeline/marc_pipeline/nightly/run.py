"""All stages of a date in one process, for a new date or for a backfill."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from marc_pipeline.deployment import Deployment
from marc_pipeline.nightly.stages import audit_stage, encode_stage, index_stage, plan_stage, release_stage
from marc_schemas.release import Release

if TYPE_CHECKING:
    from marc_pipeline.nightly.plan_identity import PlanIdentity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The release of a finished run, and whether this run published it."""

    release: Release
    fresh: bool


def run_all(deployment: Deployment, *, ds: str) -> Outcome:
    """Run all stages in order. A plan that is already published is not run again.

    Raises:
        UserError: the catalogue, the bundle or the configuration cannot be used.
        GateRefused: the audit refuses the snapshot, or the recall is below its target.
        Superseded: another run published the date since this one began.
    """
    from marc_pipeline.nightly.plan_identity import identify_plan

    identity = identify_plan(deployment, ds=ds)
    return _run_stages(deployment, identity, already_published(deployment, identity))


def backfill(
    deployment: Deployment,
    *,
    ds: str,
    buckets: Sequence[int] = (),
    recompute: bool = False,
    expected: str | None = None,
) -> Outcome:
    """Run all stages for a date, or for some of its buckets. An existing release may be damaged.

    Args:
        deployment: settings and storage.
        ds: date of the snapshot.
        buckets: the buckets to replace; empty for the whole date. A date without a release is run whole.
        recompute: re-encode unchanged items as well.
        expected: plan_id that an earlier task of the same run announced.

    Raises:
        UserError, GateRefused: see :func:`run_all`.
        Superseded: another run published the same buckets since this one began.
    """
    from marc_pipeline.nightly.plan_identity import identify_plan, require_expected
    from marc_pipeline.releases import log as release_log
    from marc_pipeline.releases.standing import made_by

    found = release_log.read_log(deployment.storage, deployment.settings.table_uri)
    identity = identify_plan(deployment, ds=ds, chosen=buckets, recompute=recompute)
    if expected and expected != identity.plan_id and (made := made_by(found, ds, expected)):
        # An earlier attempt published the announced plan, which changed the files to recompute and thus the plan_id.
        return Outcome(release=made, fresh=False)
    require_expected(identity, expected)
    return _run_stages(deployment, identity, already_published(deployment, identity, whole=True))


def already_published(deployment: Deployment, identity: "PlanIdentity", *, whole: bool = False) -> Release | None:
    """Return the release that the plan published; with ``whole``, only if every byte of the release is intact."""
    from marc_pipeline.releases.standing import is_whole, published

    storage, table_uri, chosen = deployment.storage, deployment.settings.table_uri, identity.chosen
    found = published(storage, table_uri, ds=identity.ds, plan_id=identity.plan_id, chosen=chosen)
    if found and whole and not is_whole(storage, found, table_uri=table_uri, chosen=chosen):
        return None
    return found


def _run_stages(deployment: Deployment, identity: "PlanIdentity", already: Release | None) -> Outcome:
    from marc_pipeline.spark.session import configured_session

    plan_id = identity.plan_id
    if already is not None:
        log.info("run: plan %s is already published as release %s; nothing to do", plan_id, already.release_id)
        return Outcome(release=already, fresh=False)
    with configured_session(deployment.settings, name=f"marc run {identity.ds}", gpu_tasks=True) as spark:
        plan_stage(spark, deployment, identity)
        encode_stage(spark, deployment, plan_id)
        audit_stage(spark, deployment, plan_id)
        index_stage(deployment, plan_id)
    return Outcome(release=release_stage(deployment, plan_id), fresh=True)

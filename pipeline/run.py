"""The stages as a run goes through them: each takes what the one before handed over, and leaves its own.

Every stage imports what it needs when it is called, so that a job pays for its own stage only.
"""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import Settings, default_config, load_settings, parse_ds
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.workspace import Workspace, receipts_digest
from schemas.plan import Plan
from schemas.receipt import AuditReport, IndexReceipt, Receipt
from schemas.release import Release

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.plan import PlanIdentity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The release that a run ended in, and whether this run made it."""

    release: Release
    fresh: bool


def storage_of(settings: Settings) -> Storage:
    """Access to the uris of a configuration."""
    return Storage(endpoint_url=settings.storage.endpoint_url, region=settings.storage.region)


def workspace_of(settings: Settings, plan_id: str) -> Workspace:
    """Work area of a plan."""
    return Workspace(storage_of(settings), settings.work_uri, plan_id)


def identify(settings: Settings, *, ds: str) -> "PlanIdentity":
    """The plan that a run of this date would work on. Needs no Spark.

    Raises:
        UserError: no catalogue for the date, no bundle.
    """
    from pipeline import plan

    return plan.identify(settings, ds=ds, storage=storage_of(settings))


def published(settings: Settings, identity: "PlanIdentity") -> Release | None:
    """The release of a date, if it is this very plan's."""
    from pipeline import release

    return release.published(storage_of(settings), settings.table_uri, ds=identity.ds, plan_id=identity.plan_id)


def plan_stage(
    spark: "SparkSession", settings: Settings, identity: "PlanIdentity", *, expected: str | None = None
) -> Plan:
    """Plan a date.

    Args:
        spark: the session.
        settings: the configuration.
        identity: from :func:`identify`.
        expected: plan_id that an earlier task of the same run announced.

    Raises:
        UserError: the catalogue cannot be used, or catalogue, bundle or settings changed since the id was announced.
    """
    from pipeline import plan

    if expected is not None and identity.plan_id != expected:
        raise UserError(
            f"the catalogue, the bundle or the settings of {identity.ds} changed while the run was under way: plan "
            f"{expected} is now {identity.plan_id}; start the run again"
        )
    with _timed(workspace_of(settings, identity.plan_id), "plan"):
        made = plan.make_plan(spark, settings, identity, storage=storage_of(settings))
    counts = ", ".join(f"{getattr(made, name):,} {name}" for name in ("new", "changed", "unchanged", "deleted"))
    quarantined = sum(made.quarantined.values())
    log.info("plan %s of %s: %s items (%s)", made.plan_id, made.ds, f"{made.items:,}", counts)
    log.info("plan: %s rows quarantined, %s tokens to encode", f"{quarantined:,}", f"{made.tokens:,}")
    return made


def encode_stage(spark: "SparkSession", settings: Settings, plan_id: str) -> list[Receipt]:
    """Encode what no trustworthy receipt covers yet; one Spark task per bucket."""
    from pipeline import encode
    from pipeline.session import run_buckets

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    with _timed(workspace, "encode"):
        tasks = encode.pending_tasks(workspace, plan, table_uri=settings.table_uri, settings=settings.encode)
        log.info("encode: %d of %d buckets to do", len(tasks), len(plan.work))
        run_buckets(
            spark, encode.encode_bucket, tasks, label="encode", weight=lambda task: task.work.tokens, unit="tokens"
        )
    receipts = workspace.require_receipts(plan)
    log.info(
        "encode: %s texts, %s tokens; %s vectors carried over",
        *(f"{sum(n):,}" for n in zip(*((r.encoded, r.tokens, r.reused) for r in receipts), strict=True)),
    )
    return receipts


def audit_stage(spark: "SparkSession", settings: Settings, plan_id: str) -> AuditReport:
    """Apply the gates.

    Raises:
        GateRefused: a gate says no; the report is kept in the work area.
    """
    from pipeline import audit, release_log
    from pipeline.model.bundle import open_bundle
    from pipeline.session import run_buckets

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    with _timed(workspace, "audit"):
        receipts = workspace.require_receipts(plan)
        card = open_bundle(workspace.storage, plan.bundle_uri).card
        tasks = audit.audit_tasks(workspace, plan, receipts, table_uri=settings.table_uri, normalised=card.normalised)
        found = run_buckets(
            spark, audit.audit_bucket, tasks, label="audit", weight=lambda task: task.work.items, unit="items"
        )
        base = None
        if plan.base_release is not None:
            base = release_log.find_release(workspace.storage, settings.table_uri, release_id=plan.base_release)
        report = audit.judge(plan, found, receipts, base=base, settings=settings.audit)
        workspace.write_audit(report)
    audit.require_passed(report)
    drift = "no base to compare" if report.drift is None else f"drift {report.drift:.4f}"
    log.info(
        "audit: passed, %s rows, %.2f %% quarantined, %s", f"{report.rows:,}", 100 * report.quarantined_fraction, drift
    )
    return report


def index_stage(settings: Settings, plan_id: str) -> IndexReceipt:
    """Build the index and measure its recall, unless it was built from these very files.

    Raises:
        GateRefused: recall below the target, or no passed audit.
    """
    from pipeline import audit, index

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    receipts = workspace.require_receipts(plan)
    report = workspace.read_audit()
    if report is not None:
        audit.require_passed(report)
    digest = receipts_digest(receipts)
    built = workspace.read_index()
    if built and built.receipts_digest == digest and index.satisfies(built, settings.index, storage=workspace.storage):
        log.info("index: stands already")
        return built
    with _timed(workspace, "index"):
        built = index.build_index(
            receipts,
            storage=workspace.storage,
            table_uri=settings.table_uri,
            index_uri=settings.index_uri,
            plan_id=plan_id,
            digest=digest,
            dim=plan.dim,
            settings=settings.index,
        )
        workspace.write_index(built)
    log.info("index: %s, recall@%d %.4f over %s queries", built.factory, built.k, built.recall, f"{built.queries:,}")
    return built


def release_stage(settings: Settings, plan_id: str) -> Release:
    """Publish."""
    from pipeline import release

    workspace = workspace_of(settings, plan_id)
    made = release.publish(workspace, workspace.require_plan(), table_uri=settings.table_uri)
    log.info("release %s of %s: table version %d", made.release_id, made.ds, made.table_version)
    return made


def run_all(settings: Settings, *, ds: str) -> Outcome:
    """All stages in order, in one process. A plan that is published already is left as it is.

    Raises:
        UserError: the catalogue, the bundle or the configuration cannot be used.
        GateRefused: audit or recall say no.
    """
    from pipeline.session import spark_session

    identity = identify(settings, ds=ds)
    already = published(settings, identity)
    if already is not None:
        log.info("plan %s is release %s already: nothing to do", identity.plan_id, already.release_id)
        return Outcome(release=already, fresh=False)
    with spark_session(settings.spark, name=f"marc run {ds}", gpu_tasks=True) as spark:
        plan_stage(spark, settings, identity)
        encode_stage(spark, settings, identity.plan_id)
        audit_stage(spark, settings, identity.plan_id)
    index_stage(settings, identity.plan_id)
    return Outcome(release=release_stage(settings, identity.plan_id), fresh=True)


@contextmanager
def _timed(workspace: Workspace, stage: str) -> Iterator[None]:
    started = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - started
        workspace.write_seconds(stage, seconds)
        log.info("%s: %.1f s", stage, seconds)


def identify_for_scheduler(*, ds: str, config: str) -> dict[str, str]:
    """What a scheduler hands from task to task: ds, configuration, plan_id, and the release if there is one.

    Args:
        ds: date of the snapshot.
        config: configuration file; empty for the default.

    Raises:
        UserError: bad date or configuration, no catalogue, no bundle.
    """
    path = default_config(config)
    settings = load_settings(path)
    identity = identify(settings, ds=parse_ds(ds))
    release = published(settings, identity)
    return {
        "ds": ds,
        "config": os.path.abspath(path),  # noqa: PTH100 - as load_settings does,
        "plan_id": identity.plan_id,
        "published": release.release_id if release else "",
    }


def release_facts(*, ds: str, config: str) -> dict[str, Any]:
    """Facts of the newest release of a date, as ``marc run --json`` gives them."""
    from pipeline import release_log

    settings = load_settings(config)
    return release_log.find_release(storage_of(settings), settings.table_uri, ds=ds).facts()

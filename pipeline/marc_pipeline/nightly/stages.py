"""The five stages of a night. Each reads what the stage before left in the work area, and writes its own result there.

A stage imports its own packages when it is called, so that a Spark job loads no more than it needs.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import Superseded, UserError
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import join
from marc_pipeline.work_area import Workspace
from marc_schemas.identity import files_digest
from marc_schemas.plan import Plan
from marc_schemas.receipt import AuditReport, IndexReceipt, Receipt, day_moments
from marc_schemas.release import Release

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from marc_pipeline.index.job import TaskRunner
    from marc_pipeline.nightly.plan_identity import PlanIdentity

# In every round one of the competing runs publishes: so many runs may publish buckets of one date at once.
PUBLISH_TRIES = 32
PUBLISH_PAUSE_SECONDS = 0.5

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


def plan_stage(
    spark: "SparkSession", deployment: Deployment, identity: "PlanIdentity", *, expected: str | None = None
) -> Plan:
    """Plan a date.

    Args:
        spark: the session.
        deployment: settings and storage.
        identity: from :func:`marc_pipeline.nightly.plan_identity.identify_plan`.
        expected: plan_id that an earlier task of the same run announced.

    Raises:
        UserError: the catalogue cannot be used, or catalogue, bundle or settings changed since the id was announced.
    """
    from marc_pipeline.nightly.plan import make_plan
    from marc_pipeline.nightly.plan_identity import require_expected
    from marc_pipeline.spark.session import parallel_tasks

    require_expected(identity, expected)
    with Workspace.of(deployment, identity.plan_id).timed("plan"):
        made = make_plan(spark, deployment, identity, parallel=parallel_tasks(spark))
    counts = ", ".join(f"{getattr(made, name):,} {name}" for name in ("new", "changed", "unchanged", "deleted"))
    quarantined = sum(made.quarantined.values())
    log.info("plan %s of %s: %s items (%s)", made.plan_id, made.ds, f"{made.items:,}", counts)
    log.info("plan: %s rows quarantined, %s tokens to encode", f"{quarantined:,}", f"{made.tokens:,}")
    return made


def encode_stage(spark: "SparkSession", deployment: Deployment, plan_id: str) -> list[Receipt]:
    """Encode every bucket that has no valid receipt yet; one Spark task per bucket."""
    from marc_pipeline.nightly import encode
    from marc_pipeline.spark.session import run_buckets

    settings, workspace = deployment.settings, Workspace.of(deployment, plan_id)
    plan = workspace.require_plan()
    started = time.monotonic()
    with workspace.timed("encode"):
        tasks = encode.pending_tasks(workspace, plan, table_uri=settings.table_uri, settings=settings.encode)
        log.info("encode: %d of %d buckets to do", len(tasks), len(plan.work))
        workspace.clear_progress(workspace.read_progress())
        run_buckets(
            spark,
            encode.encode_bucket,
            tasks,
            label="encode",
            weight=lambda task: task.work.tokens,
            unit="tokens",
            under_way=lambda: sum(workspace.read_progress().values()),
        )
    receipts = workspace.require_receipts(plan)
    log.info(
        "encode: %s texts, %s tokens; %s vectors carried over",
        *(f"{sum(getattr(r, name) for r in receipts):,}" for name in ("encoded", "tokens", "reused")),
    )
    done = {task.work.bucket for task in tasks}
    made = [receipt for receipt in receipts if receipt.bucket in done]
    if tokens := sum(receipt.tokens for receipt in made):
        todo = plan.model_copy(update={"work": tuple(task.work for task in tasks)})
        log.info("encode: %s", planned_and_actual(todo, tokens=tokens, seconds=time.monotonic() - started))
        worked = sum(receipt.seconds - receipt.load_seconds for receipt in made)
        log.info(
            "encode: the model was busy for %.0f %% of the workers' time, %.1f %% of its tokens were padding",
            100 * sum(receipt.model_seconds for receipt in made) / max(worked, 1e-9),
            100 * (1 - tokens / max(1, sum(receipt.padded_tokens for receipt in made))),
        )
    return receipts


def planned_and_actual(plan: Plan, *, tokens: int, seconds: float) -> str:
    """Planned and actual tokens and seconds of an encode stage, as one sentence."""
    planned = f"planned {plan.tokens:,} tokens"
    if plan.seconds is not None:
        planned += f" in {plan.seconds:,.1f} s"
    return f"{planned}; it took {tokens:,} tokens and {seconds:,.1f} s"


def audit_stage(spark: "SparkSession", deployment: Deployment, plan_id: str) -> AuditReport:
    """Apply the gates.

    Raises:
        GateRefused: a gate refuses the snapshot; the report stays in the work area.
        Superseded: retention deleted the release that the plan was compared with.
    """
    from marc_pipeline.model.bundle import open_bundle
    from marc_pipeline.nightly import audit, encode
    from marc_pipeline.releases import log as release_log
    from marc_pipeline.spark.session import run_buckets

    settings, workspace = deployment.settings, Workspace.of(deployment, plan_id)
    plan = workspace.require_plan()
    with workspace.timed("audit"):
        receipts = workspace.require_receipts(plan)
        encode.tidy_quarantine(workspace, receipts)
        card = open_bundle(workspace.storage, plan.bundle_uri).card
        base = release_log.read_log(workspace.storage, settings.table_uri).find(plan.base_release)
        if plan.base_release and base is None:
            raise Superseded(
                f"superseded: retention deleted release {plan.base_release}, which plan {plan_id} was compared with; "
                "run again"
            )
        tasks = audit.audit_tasks(
            workspace, plan, receipts, table_uri=settings.table_uri, normalised=card.normalised, base=base
        )
        found = run_buckets(
            spark, audit.audit_bucket, tasks, label="audit", weight=lambda task: task.work.items, unit="items"
        )
        report = audit.judge(plan, found, receipts, base=base, settings=settings.audit)
        workspace.write_audit(report)
    audit.require_passed(report)
    drift = "no base to compare" if report.figures.drift is None else f"drift {report.figures.drift:.4f}"
    log.info(
        "audit: passed, %s rows, %.2f %% quarantined, %s",
        f"{report.gained.rows:,}",
        100 * report.figures.quarantined_fraction,
        drift,
    )
    return report


def index_stage(deployment: Deployment, plan_id: str) -> IndexReceipt:
    """Patch or build the index and measure its recall. An index that was made of the same files is kept.

    Raises:
        UserError: the audit has not finished.
        GateRefused: the audit refused the snapshot, or the recall is below the target.
        Superseded: another run published the same buckets of the date since the plan was made.
    """
    from marc_pipeline.index.make import make_index, satisfies
    from marc_pipeline.nightly import audit
    from marc_pipeline.releases import log as release_log
    from marc_pipeline.releases.standing import require_unmoved
    from marc_pipeline.table.commit import day_files

    settings, workspace = deployment.settings, Workspace.of(deployment, plan_id)
    plan = workspace.require_plan()
    receipts = workspace.require_receipts(plan)
    report = workspace.read_audit()
    if report is None:
        raise UserError(f"plan {plan_id}: run the audit stage first")
    audit.require_passed(report)
    found = release_log.read_log(workspace.storage, settings.table_uri)
    live = require_unmoved(found, plan) if plan.chosen else None
    files = day_files(plan, receipts, live)
    built = workspace.read_index()
    if (
        built
        and built.files_digest == files_digest(files)
        and satisfies(built, settings.index, dim=plan.dim, storage=workspace.storage)
    ):
        log.info("index: stands already")
        return built
    with workspace.timed("index"), _on_spark(settings) as shared_out:
        built = make_index(
            files,
            base=live or found.find(plan.base_release),
            storage=workspace.storage,
            table_uri=settings.table_uri,
            index_uri=settings.index_uri,
            work_uri=join(workspace.uri, "index"),
            plan_id=plan_id,
            bundle=plan.bundle,
            buckets=plan.buckets,
            moments=day_moments(report.gained, report.lost, live),
            dim=plan.dim,
            mantissa_bits=plan.mantissa_bits,
            settings=settings.index,
            run=shared_out,
        )
        workspace.write_index(built)
    made, figures = built.index, built.index.figures
    log.info(
        "index: %s, recall@%d %.4f over %s queries (of all %.4f to %.4f), %.2f ms a query, %s together in a second",
        made.factory, made.k, made.recall, f"{made.recall_queries:,}", figures.recall_low, figures.recall_high,
        figures.latency_ms, f"{figures.queries_per_second:,.0f}",
    )  # fmt: skip
    return built


@contextmanager
def _on_spark(settings: Settings) -> "Iterator[TaskRunner]":
    """Runs the shards of an index as Spark tasks. One session, which starts with the first task."""
    with ExitStack() as held:
        sessions: list[SparkSession] = []

        def run(
            function: Callable[[T, TaskResources], R], tasks: Sequence[T], *, weight: Callable[[T], int]
        ) -> list[R]:
            from marc_pipeline.spark.session import configured_session, run_buckets

            if not sessions:
                sessions.append(held.enter_context(configured_session(settings, name="marc index")))
            (spark,) = sessions
            return run_buckets(spark, function, tasks, label="index", weight=weight, unit="vectors", each="shards")

        yield run


def release_stage(deployment: Deployment, plan_id: str) -> Release:
    """Publish. If another run published other buckets of the date meanwhile, publish on top of its release.

    Raises:
        GateRefused, CorruptFile, UserError: see :func:`marc_pipeline.nightly.publish.publish`.
        Superseded: another run published the same buckets of the date since the plan was made.
    """
    from marc_pipeline.nightly.publish import DayMoved, publish
    from marc_pipeline.releases import log as release_log

    workspace, table_uri = Workspace.of(deployment, plan_id), deployment.settings.table_uri
    plan = workspace.require_plan()
    try:
        for _ in range(PUBLISH_TRIES - 1):
            try:
                return publish(workspace, plan, table_uri=table_uri)
            except DayMoved as moved:
                log.info("%s: trying again on top of the newest release", moved)
                # A random pause, so that two runs that collided once do not collide again.
                time.sleep(random.uniform(0, PUBLISH_PAUSE_SECONDS))  # noqa: S311 - not for secrets
                index_stage(deployment, plan_id)
        return publish(workspace, plan, table_uri=table_uri)
    except Superseded:
        # Files that were committed to the Delta table and will not be released must not stay its newest version.
        release_log.settle(workspace.storage, table_uri, plan.ds)
        raise

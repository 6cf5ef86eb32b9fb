"""The five stages of a run. Each stage reads the results of earlier stages from the work area and writes its own.

A stage imports its packages when it is called, so that a Spark job loads only the packages of its stage.
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
from marc_pipeline.releases.ownership import claim
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import join
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import Reason
from marc_schemas.identity import files_digest
from marc_schemas.plan import Plan
from marc_schemas.receipt import AuditReport, IndexReceipt, Receipt, day_moments
from marc_schemas.release import Counts, Release

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from marc_pipeline.index.job import TaskRunner
    from marc_pipeline.nightly.plan_identity import PlanIdentity

# One competing run publishes per round, so this many runs may publish buckets of one date at once.
PUBLISH_TRIES = 32
PUBLISH_PAUSE_SECONDS = 0.5

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


def plan_stage(
    spark: "SparkSession", deployment: Deployment, identity: "PlanIdentity", *, expected: str | None = None
) -> Plan:
    """Plan a date; ``expected`` is the plan_id that an earlier task of the same run announced.

    Raises:
        UserError: the catalogue cannot be used, or catalogue, bundle or settings changed since the id was announced, or
            the store has no conditional writes, or index_uri or work_uri belongs to another table.
    """
    from marc_pipeline.nightly.plan import make_plan
    from marc_pipeline.nightly.plan_identity import require_expected
    from marc_pipeline.spark.tasks import parallel_tasks

    require_expected(identity, expected)
    # Before any work, because a store that fails here cannot publish.
    for uri in (deployment.settings.work_uri, deployment.settings.table_uri):
        deployment.storage.require_conditional_writes(uri)
    claim(deployment)
    with Workspace.of(deployment, identity.plan_id).timed("plan"):
        made = make_plan(spark, deployment, identity, parallel=parallel_tasks(spark))
    counts = ", ".join(f"{getattr(made, name):,} {name}" for name in ("new", "changed", "unchanged", "deleted"))
    quarantined = sum(made.quarantined.values())
    log.info("plan: %s of %s has %s items (%s)", made.plan_id, made.ds, f"{made.items:,}", counts)
    log.info("plan: %s rows quarantined, %s tokens to encode", f"{quarantined:,}", f"{made.tokens:,}")
    if collided := made.quarantined.get(Reason.ROW_ID_COLLISION, 0):
        log.warning(
            "plan: %s items are quarantined: another item has their row id, which chance hardly does; somebody may "
            "have made these ids", f"{collided:,}",
        )  # fmt: skip
    if made.cut_texts:
        log.info("plan: max_tokens cuts %s; encode.long_texts pool encodes them whole", cut_and_lost(made))
    return made


def encode_stage(spark: "SparkSession", deployment: Deployment, plan_id: str) -> list[Receipt]:
    """Encode every bucket that has no valid receipt yet; one Spark task per bucket."""
    from marc_pipeline.nightly import encode
    from marc_pipeline.spark.tasks import run_buckets

    settings, workspace = deployment.settings, Workspace.of(deployment, plan_id)
    plan = workspace.require_plan()
    started = time.monotonic()
    with workspace.timed("encode"):
        tasks = encode.pending_tasks(workspace, plan, table_uri=settings.table_uri, settings=settings.encode)
        log.info("encode: %d of %d buckets to encode", len(tasks), len(plan.work))
        workspace.progress.clear()
        run_buckets(
            spark,
            encode.encode_bucket,
            tasks,
            label="encode",
            weight=lambda task: task.work.tokens,
            unit="tokens",
            running=workspace.progress.total,
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
            "encode: the model computed for %.0f %% of the workers' time; %.1f %% of its tokens were padding",
            100 * sum(receipt.model_seconds for receipt in made) / max(worked, 1e-9),
            100 * (1 - tokens / max(1, sum(receipt.padded_tokens for receipt in made))),
        )
    return receipts


def cut_and_lost(counted: Plan | Counts) -> str:
    """Return one phrase with the number of texts that ``max_tokens`` cuts, and the share of all tokens that is lost."""
    lost = counted.lost_tokens or 0
    share = 100 * lost / max(1, counted.tokens + lost)
    return f"{counted.cut_texts or 0:,} texts; {share:.1f} % of all tokens are lost"


def planned_and_actual(plan: Plan, *, tokens: int, seconds: float) -> str:
    """Return one sentence with the planned and the actual tokens and seconds of an encode stage."""
    planned = f"planned {plan.tokens:,} tokens"
    if plan.seconds is not None:
        planned += f" in {plan.seconds:,.1f} s"
    return f"{planned}; encoded {tokens:,} tokens in {seconds:,.1f} s"


def audit_stage(spark: "SparkSession", deployment: Deployment, plan_id: str) -> AuditReport:
    """Audit every bucket and apply the gates.

    Raises:
        GateRefused: a gate refuses the snapshot; the report is kept in the work area.
        Superseded: retention deleted the release that the plan was compared with.
    """
    from marc_pipeline.model.bundle import open_bundle
    from marc_pipeline.nightly import audit, encode
    from marc_pipeline.releases import log as release_log
    from marc_pipeline.spark.tasks import run_buckets

    settings, workspace = deployment.settings, Workspace.of(deployment, plan_id)
    plan = workspace.require_plan()
    with workspace.timed("audit"):
        receipts = workspace.require_receipts(plan)
        encode.delete_stale_quarantine(workspace, receipts)
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
        report = audit.apply_gates(plan, found, receipts, base=base, settings=settings.audit)
        workspace.write_audit(report)
    audit.require_passed(report)
    drift = "no base to compare with" if report.figures.drift is None else f"drift {report.figures.drift:.4f}"
    quarantined = 100 * report.figures.quarantined_fraction
    log.info("audit: passed, %s rows, %.2f %% quarantined, %s", f"{report.gained.rows:,}", quarantined, drift)
    if report.figures.space:
        log.info("audit: shape of the space: %s", report.figures.space.described(plan.dim))
    return report


def index_stage(deployment: Deployment, plan_id: str) -> IndexReceipt:
    """Patch or build the index and measure its recall. An index that was built from the same files is kept.

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
        log.info("index: exists already")
        return built
    with workspace.timed("index"), _shard_runner(settings) as run:
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
            run=run,
        )
        workspace.write_index(built)
    made, figures = built.index, built.index.figures
    log.info(
        "index: %s, recall@%d %.4f over %s queries (99 %% interval %.4f to %.4f), %.2f ms per query, %s queries/s",
        *(made.factory, made.k, made.recall, f"{made.recall_queries:,}", figures.recall_low, figures.recall_high),
        *(figures.latency_ms, f"{figures.queries_per_second:,.0f}"),
    )
    return built


@contextmanager
def _shard_runner(settings: Settings) -> "Iterator[TaskRunner]":
    """A function that runs shards of an index as Spark tasks. Its first call starts the session."""
    with ExitStack() as stack:
        sessions: list[SparkSession] = []

        def run(
            function: Callable[[T, TaskResources], R], tasks: Sequence[T], *, weight: Callable[[T], int]
        ) -> list[R]:
            from marc_pipeline.spark.session import configured_session
            from marc_pipeline.spark.tasks import run_buckets

            if not sessions:
                sessions.append(stack.enter_context(configured_session(settings, name="marc index")))
            (spark,) = sessions
            return run_buckets(spark, function, tasks, label="index", weight=weight, unit="vectors", each="shards")

        yield run


def release_stage(deployment: Deployment, plan_id: str) -> Release:
    """Publish the release. If another run publishes other buckets of the date first, publish on top of its release.

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
                log.info("release: %s; trying again on top of the newest release", moved)
                # A random pause keeps two runs from colliding again.
                time.sleep(random.uniform(0, PUBLISH_PAUSE_SECONDS))  # noqa: S311 - not for secrets
                index_stage(deployment, plan_id)
        return publish(workspace, plan, table_uri=table_uri)
    except Superseded:
        # Committed files without a release must not stay the newest version of the Delta table.
        release_log.settle(workspace.storage, table_uri, plan.ds)
        raise

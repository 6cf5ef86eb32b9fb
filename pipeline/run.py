"""The stages as a run goes through them: each takes what the one before handed over, and leaves its own.

Every stage imports what it needs when it is called, so that a job pays for its own stage only.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.config import Settings, default_config, load_settings, parse_ds
from pipeline.errors import Superseded, UserError
from pipeline.resources import TaskResources
from pipeline.storage import Storage, join
from pipeline.workspace import Workspace, files_digest
from schemas.plan import Plan
from schemas.receipt import AuditReport, IndexReceipt, Receipt, day_moments
from schemas.release import Release

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.index.make import Run
    from pipeline.plan import PlanIdentity
    from pipeline.retention import Removal

# Every round that meets a rival, one of the rivals has published: so many may publish one day at once.
PUBLISH_TRIES = 32
PUBLISH_PAUSE_SECONDS = 0.5

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """The release that a run ended in, and whether this run made it."""

    release: Release
    fresh: bool


def storage_of(settings: Settings) -> Storage:
    """Access to the uris of a configuration."""
    return Storage(**settings.storage.model_dump())


def workspace_of(settings: Settings, plan_id: str) -> Workspace:
    """Work area of a plan."""
    return Workspace(storage_of(settings), settings.work_uri, plan_id)


def identify(settings: Settings, *, ds: str, buckets: Sequence[int] = (), recompute: bool = False) -> "PlanIdentity":
    """The plan that a run of this date would work on. Needs no Spark.

    Args:
        settings: the configuration.
        ds: date of the snapshot.
        buckets: those to replace in the day's release; empty for the whole day.
        recompute: compute vectors of unchanged texts as well.

    Raises:
        UserError: no catalogue for the date, no bundle, buckets that there are not.
    """
    from pipeline import plan

    return plan.identify(settings, ds=ds, storage=storage_of(settings), chosen=buckets, recompute=recompute)


def published(settings: Settings, identity: "PlanIdentity", *, whole: bool = False) -> Release | None:
    """The release of a date, if it is this very plan's; with ``whole``, only if every byte of it is in place."""
    from pipeline import release

    storage, table_uri = storage_of(settings), settings.table_uri
    chosen = identity.chosen
    found = release.published(storage, table_uri, ds=identity.ds, plan_id=identity.plan_id, chosen=chosen)
    if found and whole and not release.is_whole(storage, found, table_uri=table_uri, chosen=chosen):
        return None
    return found


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
    from pipeline.session import parallel_tasks

    require_expected(identity, expected)
    with _timed(workspace_of(settings, identity.plan_id), "plan"):
        made = plan.make_plan(spark, settings, identity, storage=storage_of(settings), parallel=parallel_tasks(spark))
    counts = ", ".join(f"{getattr(made, name):,} {name}" for name in ("new", "changed", "unchanged", "deleted"))
    quarantined = sum(made.quarantined.values())
    log.info("plan %s of %s: %s items (%s)", made.plan_id, made.ds, f"{made.items:,}", counts)
    log.info("plan: %s rows quarantined, %s tokens to encode", f"{quarantined:,}", f"{made.tokens:,}")
    return made


def require_expected(identity: "PlanIdentity", expected: str | None) -> None:
    """Stop where catalogue, bundle or settings changed since an earlier task of the run announced its plan.

    Raises:
        UserError: they did.
    """
    if expected is not None and identity.plan_id != expected:
        raise UserError(
            f"the catalogue, the bundle or the settings of {identity.ds} changed while the run was under way: plan "
            f"{expected} is now {identity.plan_id}; start the run again"
        )


def encode_stage(spark: "SparkSession", settings: Settings, plan_id: str) -> list[Receipt]:
    """Encode what no trustworthy receipt covers yet; one Spark task per bucket."""
    from pipeline import encode
    from pipeline.session import run_buckets

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    started = time.monotonic()
    with _timed(workspace, "encode"):
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
    """What an encode stage was planned to take, and what it took."""
    planned = f"planned {plan.tokens:,} tokens"
    if plan.seconds is not None:
        planned += f" in {plan.seconds:,.1f} s"
    return f"{planned}; it took {tokens:,} tokens and {seconds:,.1f} s"


def audit_stage(spark: "SparkSession", settings: Settings, plan_id: str) -> AuditReport:
    """Apply the gates.

    Raises:
        GateRefused: a gate says no; the report is kept in the work area.
        Superseded: the release that it was compared with is gone.
    """
    from pipeline import audit, encode, release_log
    from pipeline.model.bundle import open_bundle
    from pipeline.session import run_buckets

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    with _timed(workspace, "audit"):
        receipts = workspace.require_receipts(plan)
        encode.tidy_quarantine(workspace, receipts)
        card = open_bundle(workspace.storage, plan.bundle_uri).card
        base = release_log.read_log(workspace.storage, settings.table_uri).find(plan.base_release)
        if plan.base_release and base is None:
            raise Superseded(
                f"superseded: release {plan.base_release}, which plan {plan_id} was compared with, was given up by "
                "retention since; run again"
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


def index_stage(settings: Settings, plan_id: str) -> IndexReceipt:
    """Patch or build the index and measure its recall, unless it was made of these very files.

    Raises:
        UserError: the audit has not finished.
        GateRefused: the audit refused, or recall below the target.
        Superseded: another run published the same buckets of the date since the plan was made.
    """
    from pipeline import audit, feature_table, index, release, release_log

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    receipts = workspace.require_receipts(plan)
    report = workspace.read_audit()
    if report is None:
        raise UserError(f"plan {plan_id}: run the audit stage first")
    audit.require_passed(report)
    found = release_log.read_log(workspace.storage, settings.table_uri)
    live = release.require_unmoved(found, plan) if plan.chosen else None
    files = feature_table.day_files(plan, receipts, live)
    built = workspace.read_index()
    if (
        built
        and built.files_digest == files_digest(files)
        and index.satisfies(built, settings.index, dim=plan.dim, storage=workspace.storage)
    ):
        log.info("index: stands already")
        return built
    with _timed(workspace, "index"), _on_spark(settings) as shared_out:
        built = index.make_index(
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
def _on_spark(settings: Settings) -> "Iterator[Run]":
    """Shards of an index as Spark tasks; one session, which starts when there are some."""
    with ExitStack() as held:
        sessions: list[SparkSession] = []

        def run(
            function: Callable[[T, TaskResources], R], tasks: Sequence[T], *, weight: Callable[[T], int]
        ) -> list[R]:
            from pipeline.session import run_buckets, spark_session

            if not sessions:
                named = spark_session(settings.spark, storage=settings.storage, name="marc index")
                sessions.append(held.enter_context(named))
            (spark,) = sessions
            return run_buckets(spark, function, tasks, label="index", weight=weight, unit="vectors", each="shards")

        yield run


def release_stage(settings: Settings, plan_id: str) -> Release:
    """Publish; where other runs publish other buckets of the day meanwhile, on top of them.

    Raises:
        GateRefused, CorruptFile, UserError: see :func:`pipeline.release.publish`.
        Superseded: another run published the same buckets of the date since the plan was made.
    """
    from pipeline import release, release_log

    workspace = workspace_of(settings, plan_id)
    plan = workspace.require_plan()
    try:
        for _ in range(PUBLISH_TRIES - 1):
            try:
                return release.publish(workspace, plan, table_uri=settings.table_uri)
            except release.DayMoved as moved:
                log.info("%s: once more, on top of what is there now", moved)
                # Rivals that met once should not meet again.
                time.sleep(random.uniform(0, PUBLISH_PAUSE_SECONDS))  # noqa: S311 - not for secrets
                index_stage(settings, plan_id)
        return release.publish(workspace, plan, table_uri=settings.table_uri)
    except Superseded:
        # What was committed to the Delta table, and will not be released, must not stay its newest version.
        release_log.settle(workspace.storage, settings.table_uri, plan.ds)
        raise


def run_all(settings: Settings, *, ds: str) -> Outcome:
    """All stages in order, in one process. A plan that is published already is left as it is.

    Raises:
        UserError: the catalogue, the bundle or the configuration cannot be used.
        GateRefused: audit or recall say no.
        Superseded: another run published the date since this one began.
    """
    identity = identify(settings, ds=ds)
    return _go_through(settings, identity, published(settings, identity))


def backfill(
    settings: Settings,
    *,
    ds: str,
    buckets: Sequence[int] = (),
    recompute: bool = False,
    expected: str | None = None,
) -> Outcome:
    """The same for a date, or some buckets of one, that may be released already and may be damaged.

    Args:
        settings: the configuration.
        ds: date of the snapshot.
        buckets: those to replace, and no other file; empty for the whole day. A date without a release is run whole.
        recompute: compute vectors of unchanged texts as well.
        expected: plan_id that an earlier task of the same run announced.

    Raises:
        UserError, GateRefused: see :func:`run_all`.
        Superseded: another run published the same buckets since this one began.
    """
    from pipeline import release, release_log

    found = release_log.read_log(storage_of(settings), settings.table_uri)
    identity = identify(settings, ds=ds, buckets=buckets, recompute=recompute)
    if expected and expected != identity.plan_id and (made := release.made_by(found, ds, expected)):
        # An earlier attempt published it: what is there now is no longer what was to be computed anew.
        return Outcome(release=made, fresh=False)
    require_expected(identity, expected)
    return _go_through(settings, identity, published(settings, identity, whole=True))


def _go_through(settings: Settings, identity: "PlanIdentity", already: Release | None) -> Outcome:
    from pipeline.session import spark_session

    if already is not None:
        log.info("plan %s is release %s already: nothing to do", identity.plan_id, already.release_id)
        return Outcome(release=already, fresh=False)
    with spark_session(
        settings.spark, storage=settings.storage, name=f"marc run {identity.ds}", gpu_tasks=True
    ) as spark:
        plan_stage(spark, settings, identity)
        encode_stage(spark, settings, identity.plan_id)
        audit_stage(spark, settings, identity.plan_id)
        index_stage(settings, identity.plan_id)
    return Outcome(release=release_stage(settings, identity.plan_id), fresh=True)


def roll_back(settings: Settings, release_id: str) -> list[Release]:
    """Make a release what readers see again; see :func:`pipeline.release.roll_back`."""
    from pipeline import release

    return release.roll_back(storage_of(settings), settings.table_uri, release_id)


def vacuum(settings: Settings, *, dry_run: bool = False) -> "Removal":
    """Retire and remove what retention gives up; see :func:`pipeline.retention.vacuum`."""
    from pipeline import retention

    site = retention.Site(storage_of(settings), settings.table_uri, settings.index_uri, settings.work_uri)
    return retention.vacuum(site, settings.retention, dry_run=dry_run)


@contextmanager
def _timed(workspace: Workspace, stage: str) -> Iterator[None]:
    started = time.monotonic()
    workspace.sign_of_life()
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


def identify_backfills(
    *, first: str, last: str, buckets: Sequence[int], recompute: bool, config: str
) -> list[dict[str, Any]]:
    """What a scheduler hands to the backfill of each date, first to last: ds, configuration, plan_id and buckets.

    Raises:
        UserError: bad dates or configuration, no bundle, or dates without a catalogue: all of them are named.
    """
    path = default_config(config)
    settings = load_settings(path)
    start, end = date.fromisoformat(parse_ds(first)), date.fromisoformat(parse_ds(last))
    if end < start:
        raise UserError(f"the last date, {last}, is before the first, {first}")
    found, problems = [], []
    for day in ((start + timedelta(days=n)).isoformat() for n in range((end - start).days + 1)):
        try:
            identity = identify(settings, ds=day, buckets=buckets, recompute=recompute)
        except UserError as error:
            problems.append(f"{day}: {error}")
            continue
        facts = {"ds": day, "config": os.path.abspath(path), "plan_id": identity.plan_id}  # noqa: PTH100 - see above
        # Of a date without a release the whole day, also when the job is tried again and there is one.
        found.append({**facts, "buckets": list(identity.chosen or ()), "recompute": recompute})
    if problems:
        raise UserError(f"nothing was started: {'; '.join(problems)}")
    return found


def vacuum_for_scheduler(*, config: str) -> dict[str, Any]:
    """Vacuum, and the figures of it that a scheduler keeps."""
    done = vacuum(load_settings(default_config(config)))
    log.info(
        "vacuum: %d releases retired, %d forgotten, %d files removed",
        *map(len, (done.retired, done.forgotten, done.files)),
    )
    return {
        "retired": list(done.retired),
        "forgotten": list(done.forgotten),
        "files": len(done.files),
        "bytes": done.bytes,
    }


def release_facts(*, ds: str, config: str) -> dict[str, Any]:
    """Facts of the newest release of a date, as ``marc run --json`` gives them."""
    from pipeline import release_log

    settings = load_settings(config)
    return release_log.find_release(storage_of(settings), settings.table_uri, ds=ds).facts()

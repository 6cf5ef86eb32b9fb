"""The plan stage: compare the catalogue of a date with the base release, and list the work of every bucket."""

import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pyarrow as pa

from marc_pipeline.catalogue.cleaning import text_cleaner
from marc_pipeline.catalogue.rows import CONTENT_HASH, read_uncleaned
from marc_pipeline.catalogue.source import require_unchanged
from marc_pipeline.config import Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import Superseded, UserError
from marc_pipeline.nightly.plan_bucket import PLANNED_ROWS, BucketContext, BucketSummary, by_bucket, plan_bucket
from marc_pipeline.nightly.plan_identity import PlanIdentity
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.log import ReleaseLog
from marc_pipeline.work_area import Workspace
from marc_schemas.plan import Plan
from marc_schemas.release import Release

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PARTITIONS_PER_CORE = 4
# Sorting a catalogue takes Spark several times its size in memory. A partition of this size fits into a small heap.
PARTITION_BYTES = 16 * 1024 * 1024
# Number of encode stages whose start-up times are averaged.
STARTS = 7

log = logging.getLogger(__name__)


def make_plan(spark: "SparkSession", deployment: Deployment, identity: PlanIdentity, *, parallel: int = 1) -> Plan:
    """Plan a date: quarantine, latest row per id, changes against the base release, tokens. Publishes nothing.

    An existing plan is returned as it is. If another release was published since, the plan is made again on top of
    that release; receipts of the earlier plan stay valid unless they carry over vectors.

    Args:
        spark: the session.
        deployment: settings and storage.
        identity: inputs and id of the plan.
        parallel: number of buckets that are encoded at a time.

    Raises:
        UserError: missing columns, no rows at all, or the catalogue changed while it was read.
        Superseded: the release whose buckets the plan replaces was itself replaced.
    """
    settings, storage = deployment.settings, deployment.storage
    workspace = Workspace.of(deployment, identity.plan_id)
    found = release_log.read_log(storage, settings.table_uri)
    live, last = found.live(identity.ds), found.last(identity.ds)
    base = base_release(found.releases, ds=identity.ds)
    bundle = identity.bundle
    wanted = (
        bundle.version,
        identity.buckets,
        settings.catalogue.rendering,
        identity.mantissa_bits,
        identity.long_texts,
    )
    if identity.chosen and (live is None or live.made_with != wanted):
        raise Superseded(f"the release of {identity.ds} was replaced a moment ago; run again to start from the new one")
    earlier = workspace.read_plan()
    names = (base and base.release_id, last and last.release_id)
    if earlier and (earlier.base_release, earlier.live_release) == names:
        log.info("plan: %s exists already", identity.plan_id)
        return earlier
    if bundle.card.template != settings.catalogue.rendering:
        log.warning(
            "plan: bundle %s was trained with template %r, the configuration has %r",
            *(bundle.version, bundle.card.template, settings.catalogue.rendering),
        )
    if bundle.card.long_texts != identity.long_texts:
        log.warning(
            "plan: bundle %s was trained with encode.long_texts %s, the configuration has %s: train again",
            *(bundle.version, bundle.card.long_texts, identity.long_texts),
        )
    if base and base.table.mantissa_bits < identity.mantissa_bits:
        log.warning(
            "plan: release %s stores %d mantissa bits, the configuration has %d: every item is re-encoded",
            *(base.release_id, base.table.mantissa_bits, identity.mantissa_bits),
        )
    if base and base.table.long_texts != identity.long_texts:
        log.warning(
            "plan: release %s was made with encode.long_texts %s, the configuration has %s: every item is re-encoded",
            *(base.release_id, base.table.long_texts, identity.long_texts),
        )
    context = BucketContext(
        workspace=workspace,
        table_uri=settings.table_uri,
        buckets=identity.buckets,
        bundle=bundle.version,
        bundle_uri=bundle.uri,
        max_tokens=bundle.card.max_tokens,
        base=base,
        mantissa_bits=identity.mantissa_bits,
        long_texts=identity.long_texts,
        recompute=identity.recompute,
        clean=text_cleaner(settings.catalogue) if settings.catalogue.clean else None,
    )
    rows = read_uncleaned(spark, identity.source, settings.catalogue, storage=storage)
    source_bytes = sum(file.bytes for file in identity.source.files)
    summaries = _plan_buckets(spark, rows, context, chosen=identity.chosen, source_bytes=source_bytes)
    require_unchanged(identity.source, storage=storage)
    plan = _assemble(settings, identity, context, summaries, found, parallel=parallel)
    if plan.rows_read == 0 and not identity.chosen:
        raise UserError(f"the catalogue at {identity.source.uri} is empty: it has no rows")
    return workspace.write_plan(plan, replacing=earlier)


def base_release(releases: Sequence[Release], *, ds: str) -> Release | None:
    """Return the release that a date is compared with: the latest up to that date, else the earliest after it."""
    live = release_log.live_releases(releases)
    before = [date for date in live if date <= ds]
    return live[max(before)] if before else live[min(live)] if live else None


def _plan_buckets(
    spark: "SparkSession",
    rows: "DataFrame",
    context: BucketContext,
    *,
    chosen: tuple[int, ...] | None,
    source_bytes: int,
) -> list[BucketSummary]:
    buckets = context.buckets
    numbers = chosen or tuple(range(buckets))
    wanted = max(PARTITIONS_PER_CORE * spark.sparkContext.defaultParallelism, source_bytes // PARTITION_BYTES)
    partitions = min(len(numbers), wanted)
    place = "bucket"
    if chosen:
        listed = ", ".join(map(str, chosen))
        # Rows without an id have no bucket: only a plan of the whole date quarantines them.
        rows = rows.where(f"item_id IS NOT NULL AND row_id % {buckets} IN ({listed})")
        # Chosen numbers may all be multiples of the number of partitions, so rows are partitioned by place in the list.
        place = f"CAST(array_position(array({listed}), bucket) AS INT)"
    # Unusable rows get negative buckets, so that one pass over the catalogue is enough.
    rejected = f"-1 - pmod(xxhash64(row), {buckets})"
    # Spark sorts by bucket number only; the planner of a bucket sorts its ids faster than Spark.
    ordered = (
        rows.selectExpr(
            "item_id",
            f"CASE WHEN reason IS NULL THEN row_id ELSE {rejected} END AS row_id",
            "coalesce(row, text) AS text",
            "unix_micros(updated_at) AS updated_at",
            "source",
            "reason",
        )
        .selectExpr("*", f"CAST(IF(row_id < 0, row_id, row_id % {buckets}) AS INT) AS bucket")
        .selectExpr("*", f"{place} AS place")
        .repartitionById(partitions, "place")
        .sortWithinPartitions("bucket")
        # Hashes are computed after the shuffle, because they do not compress.
        .selectExpr(
            *("item_id", "row_id", "text", f"coalesce(reason, {CONTENT_HASH}) AS content_hash"),
            *("updated_at", "source"),
        )
    )

    def plan_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number, table in by_bucket(batches, buckets):
            summary = plan_bucket(context, number, table).model_dump_json()
            yield pa.RecordBatch.from_pydict({"summary": [summary]})

    found = ordered.mapInArrow(plan_partition, "summary STRING").collect()
    done = [BucketSummary.model_validate_json(row.summary) for row in found]
    if context.base is not None:
        # A bucket that is absent from the catalogue still has items to delete.
        seen = {summary.bucket for summary in done}
        done += [plan_bucket(context, number, PLANNED_ROWS.empty_table()) for number in sorted(set(numbers) - seen)]
    return done


def _assemble(
    settings: Settings,
    identity: PlanIdentity,
    context: BucketContext,
    summaries: Sequence[BucketSummary],
    found: ReleaseLog,
    *,
    parallel: int,
) -> Plan:
    last = found.last(identity.ds)
    quarantined: Counter[str] = Counter()
    for summary in summaries:
        quarantined.update(summary.quarantined)
    work = sorted((s.work for s in summaries if s.work), key=lambda b: b.bucket)
    # The largest run gives the best estimate: in a small run, loading the model takes longer than encoding.
    of_bundle = (release for release in found.releases if release.bundle.version == context.bundle)
    measured = max(of_bundle, key=lambda release: release.counts.tokens, default=None)
    return Plan(
        plan_id=identity.plan_id,
        ds=identity.ds,
        created_at=datetime.now(UTC),
        catalogue=identity.source.files,
        bundle=context.bundle,
        bundle_uri=context.bundle_uri,
        dim=identity.bundle.card.dim,
        template=settings.catalogue.rendering,
        buckets=context.buckets,
        mantissa_bits=context.mantissa_bits,
        long_texts=context.long_texts,
        chosen=identity.chosen,
        base_release=context.base.release_id if context.base else None,
        live_release=last.release_id if last else None,
        rows_read=sum(b.items for b in work) + quarantined.total(),
        quarantined=dict(sorted(quarantined.items())),
        work=tuple(b for b in work if b.items or b.deleted),
        tokens_exact=all(summary.exact for summary in summaries),
        tokens_per_second=measured.tokens_per_second if measured else None,
        start_seconds=_start_seconds(found.releases, measured) if measured else 0.0,
        parallel=parallel,
    )


def _start_seconds(releases: Sequence[Release], measured: Release) -> float:
    """Median start-up time of the latest encode stages: their duration minus the time of their tokens."""
    speed = measured.tokens_per_second
    beyond = [
        max(0.0, release.seconds.get("encode", 0.0) - release.counts.tokens / speed)
        for release in releases
        if speed and release.bundle.version == measured.bundle.version and release.tokens_per_second
    ]
    return statistics.median(beyond[-STARTS:]) if beyond else 0.0

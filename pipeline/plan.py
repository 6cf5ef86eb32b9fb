"""The plan stage: compare the day's catalogue with the previous release and write down the work, bucket by bucket."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import catalogue, feature_table, release_log
from pipeline.catalogue import CatalogueSource
from pipeline.config import Settings
from pipeline.errors import CorruptFile, Superseded, UserError
from pipeline.model.bundle import Bundle, open_bundle
from pipeline.model.tokens import count_tokens, load_tokenizer
from pipeline.release_log import ReleaseLog
from pipeline.storage import Storage, join
from pipeline.workspace import Workspace
from schemas.catalogue import ITEMS, QUARANTINE, Change, Reason
from schemas.feature_table import bucket_number
from schemas.files import PublishedFile
from schemas.plan import FORMAT_VERSION, BucketPlan, Plan
from schemas.release import Release

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

TOKEN_SAMPLE = 1000
PARTITIONS_PER_CORE = 4
PLANNED_ROWS = pa.schema(
    [
        ("bucket", pa.int32()),
        *((f.name, f.type) for f in ITEMS if f.name != "change"),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("row", pa.string()),
    ]
)
"""Rows as they arrive at the planner of a bucket."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanIdentity:
    """What a run of one date would work on; known before Spark starts.

    Attributes:
        plan_id: hash of everything below.
        ds: date of the snapshot.
        source: the day's catalogue.
        bundle: what encodes: the current one; that of the day's release where only some buckets are chosen.
        buckets: number of buckets; that of the day's release where only some are chosen.
        chosen: buckets of a backfill; None for the whole day.
        recompute: whether vectors of unchanged texts are computed anew as well.
    """

    plan_id: str
    ds: str
    source: CatalogueSource
    bundle: Bundle
    buckets: int
    chosen: tuple[int, ...] | None = None
    recompute: bool = False


@dataclass(frozen=True)
class BucketContext:
    """What the planner of a bucket must know; travels to Spark's Python workers."""

    workspace: Workspace
    table_uri: str
    buckets: int
    bundle: str
    bundle_uri: str
    max_tokens: int
    base: Release | None
    recompute: bool = False


@dataclass(frozen=True)
class BucketSummary:
    """What the planner of one bucket reports back; ``work`` is None where rows belong to no bucket."""

    SPARK_SCHEMA: ClassVar[str] = "bucket INT, work STRING, quarantined STRING, exact BOOLEAN"

    bucket: int
    work: BucketPlan | None
    quarantined: dict[str, int]
    exact: bool

    def to_arrow(self) -> pa.RecordBatch:
        """One row of :attr:`SPARK_SCHEMA`."""
        work = self.work.model_dump_json() if self.work else None
        columns = {
            "bucket": pa.array([self.bucket], pa.int32()),
            "work": pa.array([work], pa.string()),
            "quarantined": pa.array([json.dumps(self.quarantined)], pa.string()),
            "exact": pa.array([self.exact], pa.bool_()),
        }
        return pa.RecordBatch.from_pydict(columns)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "BucketSummary":
        """The summary in a row of :attr:`SPARK_SCHEMA`."""
        work = BucketPlan.model_validate_json(row["work"]) if row["work"] else None
        return cls(bucket=row["bucket"], work=work, quarantined=json.loads(row["quarantined"]), exact=row["exact"])


def identify(
    settings: Settings, *, ds: str, storage: Storage, chosen: Sequence[int] = (), recompute: bool = False
) -> PlanIdentity:
    """Find the catalogue and the bundle of a date and name the plan they make.

    Args:
        settings: the configuration.
        ds: date of the snapshot.
        storage: access to every uri.
        chosen: buckets to replace in the release of that date; empty for the whole day. A date without a release is
            always planned whole: a release never holds a part of a day.
        recompute: compute vectors of unchanged texts as well.

    Raises:
        UserError: no catalogue for the date, no bundle, or buckets that the day's release cannot take.
    """
    seen = release_log.read_log(storage, settings.table_uri).live(ds) if chosen or recompute else None
    live = seen if chosen else None
    if chosen and live is None:
        log.warning("%s has no release: the whole day is planned, not buckets %s alone", ds, list(chosen))
    if live is not None:
        _require_replaceable(settings, live, chosen)
    bundle = open_bundle(storage, live.bundle_uri if live else settings.bundle_uri)
    buckets = live.buckets if live else settings.buckets
    some = tuple(sorted(set(chosen))) if live else None
    source = catalogue.find_source(settings.catalogue, settings.catalogue_uri(ds), ds=ds, storage=storage)
    files = sorted((file.uri.rsplit("/", 1)[1], file.digest) for file in source.files)
    wanted = settings.catalogue
    parts = [
        FORMAT_VERSION, ds, files, source.format, wanted.id_column, wanted.updated_at_column, wanted.template,
        bundle.version, buckets, some, _recomputed(seen, some) if recompute else None,
    ]  # fmt: skip
    plan_id = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return PlanIdentity(
        plan_id=plan_id, ds=ds, source=source, bundle=bundle, buckets=buckets, chosen=some, recompute=recompute
    )


def _recomputed(live: Release | None, chosen: tuple[int, ...] | None) -> list[str]:
    """What is computed anew: doing so once more is another plan."""
    files = live.table_files if live else ()
    return [file.path for file in files if chosen is None or bucket_number(file.path) in chosen]


def _require_replaceable(settings: Settings, live: Release, chosen: Sequence[int]) -> None:
    unknown = sorted(set(chosen) - set(range(live.buckets)))
    if unknown:
        raise UserError(f"no bucket {unknown[0]}: release {live.release_id} has buckets 0 to {live.buckets - 1}")
    if live.template != settings.catalogue.template:
        raise UserError(
            f"release {live.release_id} of {live.ds} was made with template {live.template!r}, the configuration says "
            f"{settings.catalogue.template!r}: backfill the whole day"
        )


def make_plan(spark: "SparkSession", settings: Settings, identity: PlanIdentity, *, storage: Storage) -> Plan:
    """Plan a date: quarantine, latest row per id, changes against the base release, tokens. Publishes nothing.

    A plan that was made before is returned as it stands, unless another release came in between: then it is made anew
    on top of that one. What was encoded for it still counts where nothing is carried over.

    Raises:
        UserError: missing columns, no rows at all, or the catalogue changed while it was read.
        Superseded: the release whose buckets were to be replaced is no longer what it was.
    """
    workspace = Workspace(storage, settings.work_uri, identity.plan_id)
    found = release_log.read_log(storage, settings.table_uri)
    live, last = found.live(identity.ds), found.last(identity.ds)
    base = base_release(found.releases, ds=identity.ds)
    wanted = (identity.bundle.version, identity.buckets, settings.catalogue.template)
    if identity.chosen and (live is None or (live.bundle, live.buckets, live.template) != wanted):
        raise Superseded(f"the release of {identity.ds} was replaced a moment ago; run again to start from the new one")
    earlier = workspace.read_plan()
    names = (base and base.release_id, last and last.release_id)
    if earlier and (earlier.base_release, earlier.live_release) == names:
        log.info("plan %s stands already", identity.plan_id)
        return earlier
    bundle = identity.bundle
    if bundle.card.template != settings.catalogue.template:
        log.warning(
            "bundle %s was trained on template %r, the catalogue uses %r", bundle.version, bundle.card.template,
            settings.catalogue.template,
        )  # fmt: skip
    context = BucketContext(
        workspace=workspace,
        table_uri=settings.table_uri,
        buckets=identity.buckets,
        bundle=bundle.version,
        bundle_uri=bundle.uri,
        max_tokens=bundle.card.max_tokens,
        base=base,
        recompute=identity.recompute,
    )
    rows = catalogue.read_rows(spark, identity.source, settings.catalogue, storage=storage)
    summaries = _plan_buckets(spark, rows, context, chosen=identity.chosen)
    catalogue.require_unchanged(identity.source, storage=storage)
    plan = _assemble(settings, identity, context, summaries, found)
    if plan.rows_read == 0 and not identity.chosen:
        raise UserError(f"the catalogue at {identity.source.uri} is empty: it has no rows")
    return workspace.write_plan(plan, replacing=earlier)


def base_release(releases: Sequence[Release], *, ds: str) -> Release | None:
    """The release that a date is compared with: the latest of that date or before, else the earliest after."""
    live = release_log.live_releases(releases)
    before = [day for day in live if day <= ds]
    return live[max(before)] if before else live[min(live)] if live else None


def _plan_buckets(
    spark: "SparkSession", rows: "DataFrame", context: BucketContext, *, chosen: tuple[int, ...] | None
) -> list[BucketSummary]:
    buckets = context.buckets
    numbers = chosen or tuple(range(buckets))
    partitions = min(len(numbers), PARTITIONS_PER_CORE * spark.sparkContext.defaultParallelism)
    if chosen:
        # Rows without an id belong to no bucket: they are in the quarantine of the whole day.
        rows = rows.where(f"item_id IS NOT NULL AND row_id % {buckets} IN ({', '.join(map(str, chosen))})")
    # Rows that cannot be used go to negative buckets, so that one pass over the catalogue writes everything.
    bucket = f"CASE WHEN reason IS NULL THEN row_id % {buckets} ELSE -1 - pmod(xxhash64(row), {buckets}) END"
    latest = f"PARTITION BY bucket, item_id ORDER BY {catalogue.NEWEST_FIRST}"
    ordered = (
        rows.selectExpr("*", f"CAST({bucket} AS INT) AS bucket")
        .repartition(partitions, "bucket")
        .selectExpr(
            "*",
            f"reason IS NULL AND row_number() OVER ({latest}) > 1 AS older",
        )
        .selectExpr(
            "bucket",
            "item_id",
            "row_id",
            "text",
            "content_hash",
            "source",
            f"CASE WHEN older THEN '{Reason.OLDER_DUPLICATE}' ELSE reason END AS reason",
            "CASE WHEN older THEN to_json(struct(item_id, text, updated_at)) ELSE row END AS row",
        )
        .sortWithinPartitions("bucket", "item_id")
    )

    def plan_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number, table in by_bucket(batches):
            yield plan_bucket(context, number, table).to_arrow()

    found = ordered.mapInArrow(plan_partition, BucketSummary.SPARK_SCHEMA).collect()
    done = [BucketSummary.from_row(row.asDict()) for row in found]
    if context.base is not None:
        # A bucket whose items are all gone has no row in the catalogue, but deletions to plan.
        seen = {summary.bucket for summary in done}
        done += [plan_bucket(context, number, PLANNED_ROWS.empty_table()) for number in sorted(set(numbers) - seen)]
    return done


def by_bucket(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Cut a stream of batches that is sorted by ``bucket`` into one table per bucket."""
    current: int | None = None
    pieces: list[pa.RecordBatch] = []
    for batch in batches:
        numbers = batch.column("bucket").to_numpy(zero_copy_only=False)
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, end in pairwise(edges):
            if start == end:
                continue
            if current is not None and numbers[start] != current:
                yield current, pa.Table.from_batches(pieces)
                pieces = []
            current = int(numbers[start])
            pieces.append(batch.slice(start, end - start))
    if current is not None:
        yield current, pa.Table.from_batches(pieces)


def plan_bucket(context: BucketContext, bucket: int, rows: pa.Table) -> BucketSummary:
    """Plan one bucket: quarantine what cannot be used, compare the rest, write the items to encode.

    Args:
        context: the plan's settings and base release.
        bucket: its number; negative for rows that belong to no bucket because they cannot be used.
        rows: columns of :data:`PLANNED_ROWS`, sorted by item_id.
    """
    rows = _mark_collisions(rows)
    rejected = rows.filter(pc.is_valid(rows["reason"]))
    reasons = Counter(rejected["reason"].to_pylist())
    if rejected.num_rows:
        name = f"bucket-{bucket:05d}.parquet" if bucket >= 0 else f"rejected-{-1 - bucket:05d}.parquet"
        _write(context.workspace.storage, join(context.workspace.quarantine_uri, name), rejected, QUARANTINE)
    if bucket < 0:
        return BucketSummary(bucket=bucket, work=None, quarantined=dict(reasons), exact=True)
    items = rows.filter(pc.is_null(rows["reason"]))
    files = previous_files(context, bucket)
    lost: tuple[PublishedFile, ...] = ()
    try:
        previous = _previous_rows(context, bucket, files)
    except CorruptFile as error:
        # Last night's damage must not stop tonight: without something to carry over, the bucket is encoded whole.
        log.warning("bucket %d is encoded whole: %s", bucket, error)
        lost, files, previous = files, (), _previous_rows(context, bucket, ())
    change, deleted = compare(items, previous, bundle=None if context.recompute else context.bundle)
    if context.base and context.base.buckets == context.buckets:
        # Of files that cannot be read the log still says how many items they held: a gate must not be blind to that.
        deleted += max(0, sum(file.rows for file in lost) - items.num_rows)
    items = items.append_column("change", change)
    if items.num_rows:
        base = context.base.release_id if context.base else None
        _write(context.workspace.storage, context.workspace.items_uri(bucket, base), items, ITEMS)
    tokens, characters, exact = _cost(context, items)
    counts = Counter(change.to_pylist())
    work = BucketPlan(
        bucket=bucket,
        items=items.num_rows,
        new=counts[Change.NEW],
        changed=counts[Change.CHANGED],
        unchanged=counts[Change.UNCHANGED],
        deleted=deleted,
        tokens=tokens,
        characters=characters,
        previous=files,
    )
    return BucketSummary(bucket=bucket, work=work, quarantined=dict(reasons), exact=exact)


def compare(items: pa.Table, previous: pa.Table, *, bundle: str | None) -> tuple[pa.Array, int]:
    """How each item stands against the base release, and how many items of the base are gone.

    Args:
        items: ``item_id`` and ``content_hash`` of today, ids unique.
        previous: ``item_id``, ``content_hash`` and ``bundle`` of the base release, ids unique.
        bundle: version that encodes today; a vector of another bundle is never carried over. None: no vector is.
    """
    where = pc.index_in(items["item_id"], value_set=previous["item_id"].combine_chunks())
    same_text = pc.equal(items["content_hash"], previous["content_hash"].take(where))
    same_bundle = pc.equal(previous["bundle"].take(where), pa.scalar(bundle, pa.string()))
    kept = pc.fill_null(pc.and_(same_text, same_bundle), fill_value=False)
    change = pc.if_else(
        pc.is_null(where), Change.NEW.value, pc.if_else(kept, Change.UNCHANGED.value, Change.CHANGED.value)
    )
    found = items.num_rows - where.null_count
    return pa.chunked_array(change, type=pa.string()).combine_chunks(), previous.num_rows - found


def previous_files(context: BucketContext, bucket: int) -> tuple[PublishedFile, ...]:
    """Files of the base release that can hold items of a bucket, also when the number of buckets changed."""
    base = context.base
    if base is None:
        return ()
    shared = math.gcd(base.buckets, context.buckets)
    return tuple(file for file in base.table_files if bucket_number(file.path) % shared == bucket % shared)


def _previous_rows(context: BucketContext, bucket: int, files: Sequence[PublishedFile]) -> pa.Table:
    columns = ["item_id", "row_id", "content_hash", "bundle"]
    storage = context.workspace.storage
    tables = [feature_table.read_rows(storage, context.table_uri, file, columns=columns) for file in files]
    if not tables:
        return feature_table.empty_rows(1).select(columns)
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    return rows.filter(pa.array(rows["row_id"].to_numpy() % context.buckets == bucket))


def _mark_collisions(rows: pa.Table) -> pa.Table:
    good = pc.is_null(rows["reason"]).to_numpy(zero_copy_only=False)
    ids = rows["row_id"].to_numpy()
    taken, first = np.unique(ids[good], return_index=True)
    if len(taken) == good.sum():
        return rows
    collided = np.flatnonzero(good)
    collided = np.delete(collided, first)
    reasons, records = rows["reason"].to_pylist(), rows["row"].to_pylist()
    for row in collided.tolist():
        reasons[row] = Reason.ROW_ID_COLLISION.value
        records[row] = json.dumps({name: rows[name][row].as_py() for name in ("item_id", "row_id", "text")})
    rows = rows.set_column(rows.schema.get_field_index("reason"), "reason", pa.array(reasons, pa.string()))
    return rows.set_column(rows.schema.get_field_index("row"), "row", pa.array(records, pa.string()))


def _cost(context: BucketContext, items: pa.Table) -> tuple[int, int, bool]:
    """Tokens and characters of the distinct texts that must be encoded, and whether the tokens are exact."""
    wanted = items.filter(pc.not_equal(items["change"], Change.UNCHANGED.value))
    texts = list(dict.fromkeys(wanted["text"].to_pylist()))
    if not texts:
        return 0, 0, True
    tokenizer = load_tokenizer(context.workspace.storage, context.bundle_uri, context.max_tokens)
    tokens, exact = count_tokens(tokenizer, texts, sample=TOKEN_SAMPLE)
    return tokens, sum(map(len, texts)), exact


def _write(storage: Storage, uri: str, rows: pa.Table, schema: pa.Schema) -> None:
    with storage.staged(uri) as staged:
        pq.write_table(rows.select(schema.names).cast(schema), staged, compression="zstd")
        storage.publish(staged, uri)


def _assemble(
    settings: Settings,
    identity: PlanIdentity,
    context: BucketContext,
    summaries: Sequence[BucketSummary],
    found: ReleaseLog,
) -> Plan:
    last = found.last(identity.ds)
    quarantined: Counter[str] = Counter()
    for summary in summaries:
        quarantined.update(summary.quarantined)
    work = sorted((s.work for s in summaries if s.work), key=lambda b: b.bucket)
    # The largest run says most: in a small one, loading the model outweighs the tokens.
    measured = max((r for r in found.releases if r.bundle == context.bundle), key=lambda r: r.tokens, default=None)
    return Plan(
        plan_id=identity.plan_id,
        ds=identity.ds,
        created_at=datetime.now(UTC),
        catalogue=identity.source.files,
        bundle=context.bundle,
        bundle_uri=context.bundle_uri,
        dim=identity.bundle.card.dim,
        template=settings.catalogue.template,
        buckets=context.buckets,
        chosen=identity.chosen,
        base_release=context.base.release_id if context.base else None,
        live_release=last.release_id if last else None,
        rows_read=sum(b.items for b in work) + quarantined.total(),
        quarantined=dict(sorted(quarantined.items())),
        work=tuple(b for b in work if b.items or b.deleted),
        tokens_exact=all(summary.exact for summary in summaries),
        tokens_per_second=measured.tokens_per_second if measured else None,
    )

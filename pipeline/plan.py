"""The plan stage: compare the day's catalogue with the previous release and write down the work, bucket by bucket."""

import hashlib
import json
import logging
import math
import statistics
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
from numpy.typing import NDArray

from pipeline import catalogue, feature_table, release_log
from pipeline.catalogue import CatalogueSource
from pipeline.config import Settings
from pipeline.errors import CorruptFile, Superseded, UserError
from pipeline.model.bundle import Bundle, open_bundle
from pipeline.model.tokens import TokenCount, count_tokens, load_tokenizer, sample_of
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

TOKEN_SAMPLE = 10_000
"""Texts of the whole catalogue that are tokenized where counting all would take long."""
BUCKET_SAMPLE = 25
"""At least so many of a bucket: its variance is asked from them."""
PARTITIONS_PER_CORE = 4
# As Spark sorts it a catalogue is several times larger than its files: a partition of so much fits into a small heap.
PARTITION_BYTES = 16 * 1024 * 1024
# Encode stages whose start-up is looked at.
STARTS = 7
PIECE_BYTES = 16 * 1024 * 1024
PLANNED_ROWS = pa.schema(
    [
        *((f.name, f.type) for f in ITEMS if f.name != "change"),
        ("updated_at", pa.int64()),  # microseconds since 1970
        ("source", pa.string()),
    ]
)
"""Rows as they arrive at the planner of a bucket.

A row that cannot be used has its negative bucket for a ``row_id``, its reason for a ``content_hash`` and its record for
a ``text``: every column more costs Spark time with every row.
"""
NEWEST_FIRST = [
    ("item_id", "ascending"), ("updated_at", "descending"), ("content_hash", "descending"), ("source", "ascending")
]  # fmt: skip
"""Of several rows of an id the first one counts: the order of :data:`pipeline.catalogue.NEWEST_FIRST`."""
# As Spark's to_json writes texts: what Python escapes in lower case it escapes in upper case.
JSON_ESCAPES = {code: f"\\u{code:04X}" for code in range(32)} | {
    ord(raw): f"\\{letter}" for raw, letter in ('""', "\\\\", "\bb", "\ff", "\nn", "\rr", "\tt")
}

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
        mantissa_bits: that vectors are stored with.
        chosen: buckets of a backfill; None for the whole day.
        recompute: whether vectors of unchanged texts are computed anew as well.
    """

    plan_id: str
    ds: str
    source: CatalogueSource
    bundle: Bundle
    buckets: int
    mantissa_bits: int
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
    mantissa_bits: int
    recompute: bool = False

    @property
    def carries_over(self) -> bool:
        """Whether a vector of the base release can stand for the one that would be computed."""
        # Bits that were not stored do not come back.
        too_coarse = self.base is not None and self.base.mantissa_bits < self.mantissa_bits
        return not (self.recompute or too_coarse)


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
        bundle.version, buckets, settings.mantissa_bits, some, _recomputed(seen, some) if recompute else None,
    ]  # fmt: skip
    plan_id = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return PlanIdentity(
        plan_id=plan_id,
        ds=ds,
        source=source,
        bundle=bundle,
        buckets=buckets,
        mantissa_bits=settings.mantissa_bits,
        chosen=some,
        recompute=recompute,
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
    if live.mantissa_bits != settings.mantissa_bits:
        raise UserError(
            f"release {live.release_id} of {live.ds} stores {live.mantissa_bits} mantissa bits, the configuration says "
            f"{settings.mantissa_bits}: backfill the whole day"
        )


def make_plan(
    spark: "SparkSession", settings: Settings, identity: PlanIdentity, *, storage: Storage, parallel: int = 1
) -> Plan:
    """Plan a date: quarantine, latest row per id, changes against the base release, tokens. Publishes nothing.

    A plan that was made before is returned as it stands, unless another release came in between: then it is made anew
    on top of that one. What was encoded for it still counts where nothing is carried over.

    Args:
        spark: the session.
        settings: the configuration.
        identity: from :func:`identify`.
        storage: access to every uri.
        parallel: buckets that will be encoded at a time.

    Raises:
        UserError: missing columns, no rows at all, or the catalogue changed while it was read.
        Superseded: the release whose buckets were to be replaced is no longer what it was.
    """
    workspace = Workspace(storage, settings.work_uri, identity.plan_id)
    found = release_log.read_log(storage, settings.table_uri)
    live, last = found.live(identity.ds), found.last(identity.ds)
    base = base_release(found.releases, ds=identity.ds)
    wanted = (identity.bundle.version, identity.buckets, settings.catalogue.template, identity.mantissa_bits)
    if identity.chosen and (live is None or (live.bundle, live.buckets, live.template, live.mantissa_bits) != wanted):
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
    if base and base.mantissa_bits < identity.mantissa_bits:
        log.warning(
            "release %s stores %d mantissa bits, %d are wanted: every text is encoded anew", base.release_id,
            base.mantissa_bits, identity.mantissa_bits,
        )  # fmt: skip
    context = BucketContext(
        workspace=workspace,
        table_uri=settings.table_uri,
        buckets=identity.buckets,
        bundle=bundle.version,
        bundle_uri=bundle.uri,
        max_tokens=bundle.card.max_tokens,
        base=base,
        mantissa_bits=identity.mantissa_bits,
        recompute=identity.recompute,
    )
    rows = catalogue.read_rows(spark, identity.source, settings.catalogue, storage=storage)
    source_bytes = sum(file.bytes for file in identity.source.files)
    summaries = _plan_buckets(spark, rows, context, chosen=identity.chosen, source_bytes=source_bytes)
    catalogue.require_unchanged(identity.source, storage=storage)
    plan = _assemble(settings, identity, context, summaries, found, parallel=parallel)
    if plan.rows_read == 0 and not identity.chosen:
        raise UserError(f"the catalogue at {identity.source.uri} is empty: it has no rows")
    return workspace.write_plan(plan, replacing=earlier)


def base_release(releases: Sequence[Release], *, ds: str) -> Release | None:
    """The release that a date is compared with: the latest of that date or before, else the earliest after."""
    live = release_log.live_releases(releases)
    before = [day for day in live if day <= ds]
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
    # In proportion to the rows, so that none of them is too large to be sorted in memory.
    wanted = max(PARTITIONS_PER_CORE * spark.sparkContext.defaultParallelism, source_bytes // PARTITION_BYTES)
    partitions = min(len(numbers), wanted)
    if chosen:
        # Rows without an id belong to no bucket: they are in the quarantine of the whole day.
        rows = rows.where(f"item_id IS NOT NULL AND row_id % {buckets} IN ({', '.join(map(str, chosen))})")
    # Chosen buckets may all be multiples of the number of partitions: it is their places that are dealt out.
    place = f"CAST(array_position(array({', '.join(map(str, chosen))}), bucket) AS INT)" if chosen else "bucket"
    # Rows that cannot be used go to negative buckets, so that one pass over the catalogue writes everything.
    rejected = f"-1 - pmod(xxhash64(row), {buckets})"
    # Only by bucket: a number costs Spark next to nothing to sort by, and ids are sorted faster where they are planned.
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
        # Hashed after the shuffle: a hash is a quarter as long as a text, and does not compress.
        .selectExpr(
            "item_id",
            "row_id",
            "text",
            f"coalesce(reason, {catalogue.CONTENT_HASH}) AS content_hash",
            "updated_at",
            "source",
        )
    )

    def plan_partition(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for number, table in by_bucket(batches, buckets):
            yield plan_bucket(context, number, table).to_arrow()

    found = ordered.mapInArrow(plan_partition, BucketSummary.SPARK_SCHEMA).collect()
    done = [BucketSummary.from_row(row.asDict()) for row in found]
    if context.base is not None:
        # A bucket whose items are all gone has no row in the catalogue, but deletions to plan.
        seen = {summary.bucket for summary in done}
        done += [plan_bucket(context, number, PLANNED_ROWS.empty_table()) for number in sorted(set(numbers) - seen)]
    return done


def by_bucket(batches: Iterator[pa.RecordBatch], buckets: int) -> Iterator[tuple[int, pa.Table]]:
    """Cut a stream of batches of :data:`PLANNED_ROWS` that is sorted by bucket into one table per bucket."""
    current: int | None = None
    pieces: list[pa.RecordBatch] = []
    for batch in batches:
        ids = batch.column("row_id").to_numpy(zero_copy_only=False)
        numbers = np.where(ids < 0, ids, ids % buckets)
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
        rows: columns of :data:`PLANNED_ROWS`, in any order.
    """
    # One chunk with long offsets: rows are picked out of it one piece at a time, also where texts exceed 2 GiB.
    wide = [f.with_type(pa.large_string()) if f.type == pa.string() else f for f in PLANNED_ROWS]
    rows = rows.select(PLANNED_ROWS.names).cast(pa.schema(wide)).combine_chunks()
    quarantine_uri = context.workspace.quarantine_uri
    if bucket < 0:
        # Rows without an id come first.
        by_id = np.roll(pc.sort_indices(rows["item_id"]).to_numpy(), rows["item_id"].null_count)
        uri = join(quarantine_uri, f"rejected-{-1 - bucket:05d}.parquet")
        named = rows.rename_columns({"content_hash": "reason", "text": "row"})
        pieces = (piece for _, piece in _pieces(named, by_id))
        _write(context.workspace.storage, uri, pieces, QUARANTINE)
        return BucketSummary(bucket=bucket, work=None, quarantined=_counts(named["reason"]), exact=True)
    order, older, collided = _in_order(rows)
    rejected = older | collided
    if rejected.any():
        is_older = older[rejected]
        pieces = (_with_reasons(piece, is_older[where]) for where, piece in _pieces(rows, order[rejected]))
        _write(context.workspace.storage, join(quarantine_uri, f"bucket-{bucket:05d}.parquet"), pieces, QUARANTINE)
    kept = order[~rejected]
    items = rows.select(["item_id", "content_hash"]).take(kept)
    files = previous_files(context, bucket)
    lost: tuple[PublishedFile, ...] = ()
    try:
        previous = _previous_rows(context, bucket, files)
    except CorruptFile as error:
        # Last night's damage must not stop tonight: without something to carry over, the bucket is encoded whole.
        log.warning("bucket %d is encoded whole: %s", bucket, error)
        lost, files, previous = files, (), _previous_rows(context, bucket, ())
    change, deleted = compare(items, previous, bundle=context.bundle if context.carries_over else None)
    if context.base and context.base.buckets == context.buckets:
        # Of files that cannot be read the log still says how many items they held: a gate must not be blind to that.
        deleted += max(0, sum(file.rows for file in lost) - items.num_rows)
    if items.num_rows:
        uri = context.workspace.items_uri(bucket, context.base.release_id if context.base else None)
        pieces = (piece.append_column("change", change[where]) for where, piece in _pieces(rows, kept))
        _write(context.workspace.storage, uri, pieces, ITEMS)
    fresh = pc.not_equal(change, Change.UNCHANGED.value).to_numpy(zero_copy_only=False)
    tokens = _cost(context, rows, kept[fresh])
    counts = _counts(change)
    work = BucketPlan(
        bucket=bucket,
        items=items.num_rows,
        new=counts[Change.NEW],
        changed=counts[Change.CHANGED],
        unchanged=counts[Change.UNCHANGED],
        deleted=deleted,
        tokens=tokens.tokens,
        tokens_error=tokens.error,
        previous=files,
    )
    unusable = {Reason.OLDER_DUPLICATE.value: int(older.sum()), Reason.ROW_ID_COLLISION.value: int(collided.sum())}
    quarantined = {reason: count for reason, count in unusable.items() if count}
    return BucketSummary(bucket=bucket, work=work, quarantined=quarantined, exact=tokens.exact)


def compare(items: pa.Table, previous: pa.Table, *, bundle: str | None) -> tuple[pa.Array, int]:
    """How each item stands against the base release, and how many items of the base are gone.

    Args:
        items: ``item_id`` and ``content_hash`` of today, ids unique.
        previous: ``item_id``, ``content_hash`` and ``bundle`` of the base release, ids unique.
        bundle: version that encodes today; a vector of another bundle is never carried over. None: no vector is.
    """
    hashes = items["content_hash"]
    previous_ids = previous["item_id"].cast(items["item_id"].type).combine_chunks()
    where = pc.index_in(items["item_id"], value_set=previous_ids)
    same_text = pc.equal(hashes, previous["content_hash"].cast(hashes.type).take(where))
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


def _in_order(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """The rows of a bucket by id, the latest of an id first; which are older duplicates, and which collide."""
    order = pc.sort_indices(rows["item_id"]).to_numpy().astype(np.int64)
    names = rows["item_id"].take(order)
    again = pc.equal(names[1:], names[:-1]).to_numpy()
    if again.any():
        # Few rows need the long comparison.
        shared = np.r_[again, False] | np.r_[False, again]
        several = order[shared]
        found = rows.select([name for name, _ in NEWEST_FIRST]).take(several)
        # Nulls are last.
        order[shared] = several[pc.sort_indices(found, NEWEST_FIRST).to_numpy()]
    older = np.r_[np.zeros(min(1, len(order)), bool), again]
    latest = np.flatnonzero(~older)
    _, first = np.unique(rows["row_id"].to_numpy()[order[latest]], return_index=True)
    collided = ~older
    collided[latest[first]] = False
    return order, older, collided


def _pieces(rows: pa.Table, order: NDArray[np.int64]) -> Iterator[tuple[slice, pa.Table]]:
    """Rows in an order, in pieces of bounded size, and which part of the order each is."""
    texts = [field.name for field in rows.schema if field.type == pa.large_string()]
    sizes = sum(pc.fill_null(pc.binary_length(rows[name]), 0).to_numpy() for name in texts)
    ends = np.cumsum(sizes[order])
    start = 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(ends, before + PIECE_BYTES, side="right")))
        yield slice(start, end), rows.take(order[start:end])
        start = end


def _with_reasons(rows: pa.Table, is_older: NDArray[np.bool_]) -> pa.Table:
    """Rows that were good until they were seen beside others, with reason and record."""
    records = [
        _older_record(row["item_id"], row["text"], row["updated_at"])
        if older
        else json.dumps({name: row[name] for name in ("item_id", "row_id", "text")})
        for older, row in zip(is_older.tolist(), rows.to_pylist(), strict=True)
    ]
    reasons = np.where(is_older, Reason.OLDER_DUPLICATE.value, Reason.ROW_ID_COLLISION.value)
    found = rows.append_column("reason", pa.array(reasons, pa.string()))
    return found.append_column("row", pa.array(records, pa.large_string()))


def _older_record(item_id: str, text: str, updated_at: int | None) -> str:
    """A row as JSON, in the form that all other rows of the quarantine have: that of Spark's ``to_json``."""
    values = {"item_id": item_id, "text": text}
    if updated_at is not None:
        moment = str(np.datetime64(updated_at // 1000, "ms"))
        # Only years beyond 9999 have a sign.
        values["updated_at"] = f"{moment if len(moment) == 23 or moment[0] == '-' else '+' + moment}Z"
    members = (f'"{name}":"{value.translate(JSON_ESCAPES)}"' for name, value in values.items())
    return f"{{{','.join(members)}}}"


def _counts(values: pa.ChunkedArray) -> Counter[str]:
    """How often each value is there."""
    return Counter({found["values"]: found["counts"] for found in pc.value_counts(values).to_pylist()})


def _cost(context: BucketContext, rows: pa.Table, fresh: NDArray[np.int64]) -> TokenCount:
    """Tokens of the distinct texts among the rows that must be encoded."""
    hashes = rows["content_hash"].take(fresh).combine_chunks().dictionary_encode()
    _, first = np.unique(hashes.indices.to_numpy(), return_index=True)
    if not len(first):
        return TokenCount(0)
    distinct = fresh[first]
    chosen = sample_of(len(distinct), max(BUCKET_SAMPLE, -(-TOKEN_SAMPLE // context.buckets)))
    tokenizer = load_tokenizer(context.workspace.storage, context.bundle_uri, context.max_tokens)
    return count_tokens(tokenizer, rows["text"].take(distinct[chosen]).to_pylist(), of=len(distinct))


def _write(storage: Storage, uri: str, pieces: Iterator[pa.Table], schema: pa.Schema) -> None:
    repeated = [name for name in ("change", "reason", "source") if name in schema.names]
    with storage.staged(uri) as staged:
        # Ids, hashes and texts hardly repeat: looking each up in a dictionary takes longer than writing it.
        with pq.ParquetWriter(staged, schema, compression="zstd", use_dictionary=repeated) as writer:
            for piece in pieces:
                writer.write_table(piece.select(schema.names).cast(schema))
        storage.publish(staged, uri)


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
        mantissa_bits=context.mantissa_bits,
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
    """What encode stages took beyond their tokens: the middle one of the latest, for one may have been tried again."""
    speed = measured.tokens_per_second
    beyond = [
        max(0.0, release.seconds.get("encode", 0.0) - release.tokens / speed)
        for release in releases
        if speed and release.bundle == measured.bundle and release.tokens_per_second
    ]
    return statistics.median(beyond[-STARTS:]) if beyond else 0.0

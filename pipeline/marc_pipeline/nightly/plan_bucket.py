"""The planner of one bucket: quarantine, latest row per id, changes against the base release, tokens to encode."""

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.catalogue.cleaning import UNCLEANED
from marc_pipeline.errors import CorruptFile
from marc_pipeline.model.tokens import TokenCount, count_tokens, load_tokenizer, sample_of
from marc_pipeline.storage import Storage, join
from marc_pipeline.table.rows import empty_rows, read_rows
from marc_pipeline.work_area import Workspace
from marc_schemas.bundle import LongTexts
from marc_schemas.catalogue import ITEMS, QUARANTINE, Change, Reason
from marc_schemas.feature_table import bucket_number
from marc_schemas.files import Contract, PublishedFile
from marc_schemas.identity import content_hash
from marc_schemas.plan import BucketPlan
from marc_schemas.release import Release

TOKEN_SAMPLE = 10_000
"""Number of texts of the whole catalogue that are tokenized for the estimate of the tokens."""
BUCKET_SAMPLE = 25
"""Smallest sample of a bucket; it must be large enough to estimate the variance."""
PIECE_BYTES = 16 * 1024 * 1024
PLANNED_ROWS = pa.schema(
    [
        *((f.name, f.type) for f in ITEMS if f.name != "change"),
        ("updated_at", pa.int64()),  # microseconds since 1970
        ("source", pa.string()),
    ]
)
"""Input rows of the planner of a bucket.

An unusable row has its negative bucket in ``row_id``, the reason in ``content_hash`` and the record in ``text``,
because every additional column costs Spark time for every row.
"""
NEWEST_FIRST = [
    ("item_id", "ascending"), ("updated_at", "descending"), ("content_hash", "descending"), ("source", "ascending")
]  # fmt: skip
"""Sort order; the first row per id is kept. Same as :data:`marc_pipeline.catalogue.rows.NEWEST_FIRST`."""
# Spark's to_json writes hexadecimal escapes in upper case; Python writes them in lower case.
JSON_ESCAPES = {code: f"\\u{code:04X}" for code in range(32)} | {
    ord(raw): f"\\{letter}" for raw, letter in ('""', "\\\\", "\bb", "\ff", "\nn", "\rr", "\tt")
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BucketContext:
    """Inputs of a bucket's planner; sent to Spark's Python workers."""

    workspace: Workspace
    table_uri: str
    buckets: int
    bundle: str
    bundle_uri: str
    max_tokens: int
    base: Release | None
    mantissa_bits: int
    long_texts: LongTexts = "cut"
    recompute: bool = False
    clean: Callable[[str], str] | None = None

    @property
    def carries_over(self) -> bool:
        """Whether vectors of the base release may be carried over.

        They may not if they have too few mantissa bits, or if long texts were treated differently.
        """
        table = self.base.table if self.base else None
        if table and (table.mantissa_bits < self.mantissa_bits or table.long_texts != self.long_texts):
            return False
        return not self.recompute


class BucketSummary(Contract):
    """Result of the planner of one bucket; ``work`` is None for unusable rows, which have no bucket."""

    bucket: int
    work: BucketPlan | None
    quarantined: dict[str, int]
    exact: bool


def by_bucket(batches: Iterator[pa.RecordBatch], buckets: int) -> Iterator[tuple[int, pa.Table]]:
    """Split batches of :data:`PLANNED_ROWS`, which are sorted by bucket, into one table per bucket."""
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
    """Plan one bucket: quarantine unusable rows, compare the others with the base release, write the planned items.

    Args:
        context: settings and base release of the plan.
        bucket: number of the bucket; negative for unusable rows, which have no bucket.
        rows: columns of :data:`PLANNED_ROWS`, in any order.
    """
    # One chunk with 64-bit offsets, because the texts of a bucket may exceed 2 GiB.
    wide = [f.with_type(pa.large_string()) if f.type == pa.string() else f for f in PLANNED_ROWS]
    rows = rows.select(PLANNED_ROWS.names).cast(pa.schema(wide)).combine_chunks()
    quarantine_uri = context.workspace.quarantine_uri
    if bucket < 0:
        # Sorted by id, rows without an id first.
        by_id = np.roll(pc.sort_indices(rows["item_id"]).to_numpy(), rows["item_id"].null_count)
        uri = join(quarantine_uri, f"rejected-{-1 - bucket:05d}.parquet")
        named = rows.rename_columns({"content_hash": "reason", "text": "row"})
        pieces = (piece for _, piece in _pieces(named, by_id))
        _write(context.workspace.storage, uri, pieces, QUARANTINE)
        return BucketSummary(bucket=bucket, work=None, quarantined=_counts(named["reason"]), exact=True)
    rows, emptied = _cleaned(context, rows)
    files = previous_files(context, bucket)
    lost: tuple[PublishedFile, ...] = ()
    try:
        previous = _previous_rows(context, bucket, files)
    except CorruptFile as error:
        # A damaged base release does not stop the run: the whole bucket is encoded.
        log.warning("plan: bucket %d is encoded whole: %s", bucket, error)
        lost, files, previous = files, (), _previous_rows(context, bucket, ())
    order, older, collided = _in_order(rows, previous["item_id"])
    rejected = older | collided
    if rejected.any() or emptied.num_rows:
        is_older = older[rejected]
        refused = (_with_reasons(piece, is_older[where]) for where, piece in _pieces(rows, order[rejected]))
        rejects = chain(refused, [emptied.rename_columns({"content_hash": "reason", "text": "row"})])
        _write(context.workspace.storage, join(quarantine_uri, f"bucket-{bucket:05d}.parquet"), rejects, QUARANTINE)
    kept = order[~rejected]
    items = rows.select(["item_id", "content_hash"]).take(kept)
    change, deleted = compare(items, previous, bundle=context.bundle if context.carries_over else None)
    if context.base and context.base.table.buckets == context.buckets:
        # The gate on deletions also counts the items of unreadable files; the release log has their number.
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
        cut_texts=tokens.cut_texts,
        lost_tokens=tokens.lost_tokens,
        previous=files,
    )
    unusable = {
        Reason.EMPTY_TEXT.value: emptied.num_rows,
        Reason.OLDER_DUPLICATE.value: int(older.sum()),
        Reason.ROW_ID_COLLISION.value: int(collided.sum()),
    }
    quarantined = {reason: count for reason, count in unusable.items() if count}
    return BucketSummary(bucket=bucket, work=work, quarantined=quarantined, exact=tokens.exact)


def compare(items: pa.Table, previous: pa.Table, *, bundle: str | None) -> tuple[pa.Array, int]:
    """Return the change of each item against the base release, and the number of deleted items.

    Args:
        items: ``item_id`` and ``content_hash`` of the planned items, ids unique.
        previous: ``item_id``, ``content_hash`` and ``bundle`` of the base release, ids unique.
        bundle: version whose vectors are carried over; None to carry over no vectors.
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
    """Return the files of the base release that can contain items of a bucket, whatever its number of buckets."""
    base = context.base
    if base is None:
        return ()
    shared = math.gcd(base.table.buckets, context.buckets)
    return tuple(file for file in base.table.files if bucket_number(file.path) % shared == bucket % shared)


def _previous_rows(context: BucketContext, bucket: int, files: Sequence[PublishedFile]) -> pa.Table:
    columns = ["item_id", "row_id", "content_hash", "bundle"]
    storage = context.workspace.storage
    tables = [read_rows(storage, context.table_uri, file, columns=columns) for file in files]
    if not tables:
        return empty_rows(1).select(columns)
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    return rows.filter(pa.array(rows["row_id"].to_numpy() % context.buckets == bucket))


def _cleaned(context: BucketContext, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Clean the marked texts; return the rows with a text, and the rows that have none left, as unusable rows."""
    marked = pc.starts_with(rows["text"], UNCLEANED)
    where = np.flatnonzero(marked.to_numpy())
    if context.clean is None or not len(where):
        return rows, rows.slice(0, 0)
    ids, given = (rows[name].take(where).to_pylist() for name in ("item_id", "text"))
    texts = [context.clean(text) for text in given]
    records = [
        text
        or json.dumps({"item_id": item_id, "fields": json.loads(fields.removeprefix(UNCLEANED))}, ensure_ascii=False)
        for item_id, text, fields in zip(ids, texts, given, strict=True)
    ]
    hashes = [content_hash(text) if text else Reason.EMPTY_TEXT.value for text in texts]
    for name, values in (("text", records), ("content_hash", hashes)):
        new = pc.replace_with_mask(
            rows[name].combine_chunks(), marked.combine_chunks(), pa.array(values, pa.large_string())
        )
        rows = rows.set_column(rows.schema.get_field_index(name), name, new)
    empty = np.zeros(rows.num_rows, bool)
    empty[where] = [not text for text in texts]
    return rows.filter(pa.array(~empty)).combine_chunks(), rows.filter(pa.array(empty))


def _in_order(
    rows: pa.Table, incumbents: pa.ChunkedArray
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Order [n] of the rows by id, latest row of an id first; masks [n] of older duplicates and of collisions.

    Of items with one row id, an item of the base release (``incumbents``) stays, else the first by id. Otherwise a
    new item could take the place of another one: its id can be made so that the hashes are equal.
    """
    order = pc.sort_indices(rows["item_id"]).to_numpy().astype(np.int64)
    names = rows["item_id"].take(order)
    again = pc.equal(names[1:], names[:-1]).to_numpy()
    if again.any():
        # Only rows with duplicates need the comparison of all columns.
        shared = np.r_[again, False] | np.r_[False, again]
        several = order[shared]
        found = rows.select([name for name, _ in NEWEST_FIRST]).take(several)
        # Nulls are sorted last.
        order[shared] = several[pc.sort_indices(found, NEWEST_FIRST).to_numpy()]
    older = np.r_[np.zeros(min(1, len(order)), bool), again]
    latest = np.flatnonzero(~older)
    row_ids = rows["row_id"].to_numpy()[order[latest]]
    distinct, first = np.unique(row_ids, return_index=True)
    if len(distinct) < len(latest):
        known = pc.is_in(names.take(latest), value_set=incumbents.cast(names.type).combine_chunks())
        ranked = np.argsort(~known.to_numpy(zero_copy_only=False), kind="stable")
        first = ranked[np.unique(row_ids[ranked], return_index=True)[1]]
    collided = ~older
    collided[latest[first]] = False
    return order, older, collided


def _pieces(rows: pa.Table, order: NDArray[np.int64]) -> Iterator[tuple[slice, pa.Table]]:
    """Rows in the given order, in pieces of bounded size, each with its slice of the order."""
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
    """Add the columns ``reason`` and ``row`` to rejected duplicates and collisions."""
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
    """A row as JSON, formatted like Spark's ``to_json``, which writes the other rows of the quarantine."""
    values = {"item_id": item_id, "text": text}
    if updated_at is not None:
        moment = str(np.datetime64(updated_at // 1000, "ms"))
        # Spark writes a sign before years after 9999.
        values["updated_at"] = f"{moment if len(moment) == 23 or moment[0] == '-' else '+' + moment}Z"
    members = (f'"{name}":"{value.translate(JSON_ESCAPES)}"' for name, value in values.items())
    return f"{{{','.join(members)}}}"


def _counts(values: pa.ChunkedArray) -> Counter[str]:
    return Counter({found["values"]: found["counts"] for found in pc.value_counts(values).to_pylist()})


def _cost(context: BucketContext, rows: pa.Table, fresh: NDArray[np.int64]) -> TokenCount:
    """Count the tokens of the distinct texts among the rows to encode; large buckets are sampled."""
    hashes = rows["content_hash"].take(fresh).combine_chunks().dictionary_encode()
    _, first = np.unique(hashes.indices.to_numpy(), return_index=True)
    if not len(first):
        return TokenCount(0)
    distinct = fresh[first]
    chosen = sample_of(len(distinct), max(BUCKET_SAMPLE, -(-TOKEN_SAMPLE // context.buckets)))
    tokenizer = load_tokenizer(context.workspace.storage, context.bundle_uri, context.max_tokens)
    return count_tokens(
        tokenizer, rows["text"].take(distinct[chosen]).to_pylist(), of=len(distinct), long_texts=context.long_texts
    )


def _write(storage: Storage, uri: str, pieces: Iterable[pa.Table], schema: pa.Schema) -> None:
    repeated = [name for name in ("change", "reason", "source") if name in schema.names]
    with storage.staged(uri) as staged:
        # Ids, hashes and texts rarely repeat, so dictionaries would only cost time.
        with pq.ParquetWriter(staged, schema, compression="zstd", use_dictionary=repeated) as writer:
            for piece in pieces:
                writer.write_table(piece.select(schema.names).cast(schema))
        storage.publish(staged, uri)

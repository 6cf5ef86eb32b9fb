"""The encode stage: one bucket in, one Parquet file and a receipt out."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import CorruptFile
from marc_pipeline.model.bundle import local_bundle
from marc_pipeline.nightly.carried_vectors import CarriedVectors
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import join
from marc_pipeline.storage.checksums import check_file, describe_file
from marc_pipeline.table.write import PLAN_FOOTER, write_bucket_file
from marc_pipeline.work_area import Workspace
from marc_schemas.bundle import BundleCard
from marc_schemas.catalogue import ITEMS, QUARANTINE, Change, Reason
from marc_schemas.feature_table import file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import Receipt

if TYPE_CHECKING:
    from marc_pipeline.model.encoder import Encoded

# A window ends with so many texts to encode, items, or bytes of them, whichever comes first.
WINDOW_TEXTS = 8192
WINDOW_ROWS = 65_536
WINDOW_BYTES = 64 * 1024 * 1024
BATCH_ROWS = 1024
PROGRESS_SECONDS = 10.0
ENCODE_PREFIX = "encode-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeTask:
    """Everything that the worker of one bucket needs; travels to Spark's Python workers."""

    workspace: Workspace
    table_uri: str
    settings: EncodeSettings
    ds: str
    bundle: str
    bundle_uri: str
    base: str | None
    planned_at: datetime
    mantissa_bits: int
    work: BucketPlan

    def counts(self, receipt: Receipt) -> bool:
        """Whether a receipt is valid for this task: same plan and bundle, and its file matches the checksum.

        After a replan, receipts with carried-over vectors are stale: the plan now carries over newer ones.
        """
        if (receipt.plan_id, receipt.bundle) != (self.workspace.plan_id, self.bundle):
            return False
        if receipt.finished_at < self.planned_at and self.work.unchanged:
            return False
        problem = receipt.file and check_file(self.workspace.storage, self.table_uri, receipt.file)
        if problem:
            log.warning("bucket %d is encoded again: %s", self.work.bucket, problem)
        return not problem


def pending_tasks(workspace: Workspace, plan: Plan, *, table_uri: str, settings: EncodeSettings) -> list[EncodeTask]:
    """Tasks of the buckets that have no valid receipt yet."""
    receipts = workspace.read_receipts(plan)
    tasks = [
        EncodeTask(
            workspace=workspace,
            table_uri=table_uri,
            settings=settings,
            ds=plan.ds,
            bundle=plan.bundle,
            bundle_uri=plan.bundle_uri,
            base=plan.base_release,
            planned_at=plan.created_at,
            mantissa_bits=plan.mantissa_bits,
            work=work,
        )
        for work in plan.work
    ]
    return [task for task in tasks if not ((receipt := receipts.get(task.work.bucket)) and task.counts(receipt))]


def encode_bucket(task: EncodeTask, resources: TaskResources) -> Receipt:
    """Encode new and changed texts, carry unchanged vectors over, write the file, then the receipt.

    Window by window, so that memory grows with the bucket only by texts that come more than once in it. Where the
    vectors to carry over are damaged or gone, the whole bucket is encoded. A text that cannot be encoded even alone
    goes to the quarantine.

    Raises:
        CorruptFile: the bundle differs from its checksum.
    """
    started = time.monotonic()
    card = local_bundle(task.workspace.storage, task.bundle_uri, task.bundle)[1].card
    run = _Run(task, card, resources)
    try:
        file = _write(run)
    except CorruptFile as error:
        if run.whole or not task.work.unchanged:
            raise
        log.warning("bucket %d is encoded whole: %s", task.work.bucket, error)
        run = _Run(task, card, resources, whole=True)
        file = _write(run)
    quarantine = _write_quarantine(task, run.quarantined) if run.quarantined else None
    with suppress(OSError):
        task.workspace.clear_progress([task.work.bucket])
    receipt = Receipt(
        plan_id=task.workspace.plan_id,
        bucket=task.work.bucket,
        bundle=task.bundle,
        file=file,
        encoded=run.texts,
        reused=(file.rows if file else 0) - run.texts,
        quarantined={row["item_id"]: row["change"] for row in run.quarantined},
        quarantine=quarantine,
        tokens=run.tokens,
        padded_tokens=run.padded_tokens,
        seconds=time.monotonic() - started,
        load_seconds=run.load_seconds,
        model_seconds=run.model_seconds,
        device=run.device,
        dtype=run.dtype,
        finished_at=datetime.now(UTC),
    )
    return task.workspace.write_receipt(receipt, stands=task.counts)


@dataclass(frozen=True)
class _Window:
    """Some of a bucket's items, in order.

    Attributes:
        items: rows of :data:`marc_schemas.catalogue.ITEMS`.
        fresh: which of them need a vector that is computed here.
        rows: those whose texts go through the model: of items that share a text the first.
        twins: rows whose text comes more than once in the bucket.
    """

    items: pa.Table
    fresh: NDArray[np.bool_]
    rows: NDArray[np.int64]
    twins: NDArray[np.int64]


class _Run:
    """One pass over a bucket: tables to write, and what the model did for them.

    Args:
        task: the bucket.
        card: of the bundle.
        resources: of the task.
        whole: encode every text, also those whose vectors could be carried over.
    """

    def __init__(self, task: EncodeTask, card: BundleCard, resources: TaskResources, *, whole: bool = False) -> None:
        self.task, self.card, self.resources, self.whole = task, card, resources, whole
        self.texts = self.tokens = self.padded_tokens = 0
        self.model_seconds = self.load_seconds = 0.0
        self.device = self.dtype = "none"
        self.quarantined: list[dict[str, Any]] = []
        self._shared: dict[str, NDArray[np.float32] | str] = {}
        self._reported = time.monotonic()

    def tables(self) -> Iterator[pa.Table]:
        """Rows of the bucket's file, in the order of the items.

        Raises:
            CorruptFile: files of the base release, or the bundle, are damaged or missing.
        """
        task = self.task
        base_vectors = CarriedVectors(
            task.workspace.storage,
            task.table_uri,
            task.work.previous,
            bucket=task.work.bucket,
            bundle=task.bundle,
            dim=self.card.dim,
        )
        with closing(base_vectors) as carried:
            for window, encoded in self._encoded():
                yield self._rows(window, encoded, carried)

    def _encoded(self) -> Iterator[tuple[_Window, "Encoded | None"]]:
        windows = self._windows()
        first = next(windows, None)
        while first is not None and not len(first.rows):
            yield first, None
            first = next(windows, None)
        if first is None:
            return
        task, started = self.task, time.monotonic()
        # Torch takes seconds to load, in every worker: a night without changes needs none.
        from marc_pipeline.model.encoder import load_encoder

        encoder = load_encoder(task.workspace.storage, task.bundle_uri, task.bundle, task.settings, self.resources)
        self.load_seconds = time.monotonic() - started
        self.device, self.dtype = str(encoder.device), str(encoder.dtype).removeprefix("torch.")
        texts = ((window, window.items["text"].take(window.rows).to_pylist()) for window in chain([first], windows))
        for window, encoded in encoder.stream(texts, stuck_after_s=task.settings.stuck_after_s):
            self.texts += len(window.rows) - len(encoded.failed)
            self.tokens += encoded.tokens
            self.padded_tokens += encoded.padded_tokens
            self.model_seconds += encoded.model_seconds
            if time.monotonic() - self._reported > PROGRESS_SECONDS:
                self._reported = time.monotonic()
                # A line in a log is not worth a bucket.
                with suppress(OSError):
                    task.workspace.write_progress(task.work.bucket, self.tokens)
            yield window, encoded

    def _windows(self) -> Iterator[_Window]:
        if not self.task.work.items:
            return
        repeated, seen = self._repeated(), set[str]()
        for items in _pieces(_batches(self.task), whole=self.whole):
            fresh = _fresh(items, whole=self.whole)
            rows = np.flatnonzero(fresh)
            twins = rows[np.isin(_keys(items["content_hash"].take(rows)), repeated)]
            later = []
            for row, content in zip(twins.tolist(), items["content_hash"].take(twins).to_pylist(), strict=True):
                if content in seen:
                    later.append(row)
                seen.add(content)
            yield _Window(items, fresh, np.setdiff1d(rows, later), twins)

    def _repeated(self) -> NDArray[np.uint64]:
        """Keys of the texts that more than one item to encode has."""
        keys = [
            _keys(batch["content_hash"].filter(pa.array(_fresh(batch, whole=self.whole))))
            for batch in _batches(self.task, columns=["content_hash", "change"])
        ]
        ordered = np.sort(np.concatenate(keys)) if keys else np.empty(0, np.uint64)
        return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])

    def _rows(self, window: _Window, encoded: "Encoded | None", carried: CarriedVectors) -> pa.Table:
        items, kept = window.items, np.ones(window.items.num_rows, bool)
        vectors = np.zeros((items.num_rows, self.card.dim), np.float32)
        encoded_at = np.full(items.num_rows, np.datetime64(datetime.now(UTC).replace(tzinfo=None), "us"))
        failed: dict[int, str] = {}
        if encoded is not None:
            if good := [place for place in range(len(window.rows)) if place not in encoded.failed]:
                vectors[window.rows[good]] = encoded.vectors[good]
            failed = {int(window.rows[place]): reason for place, reason in encoded.failed.items()}
        for row, content in zip(
            window.twins.tolist(), items["content_hash"].take(window.twins).to_pylist(), strict=True
        ):
            known = self._shared.setdefault(content, failed.get(row, vectors[row].copy()))
            if isinstance(known, str):
                failed[row] = known
            else:
                vectors[row] = known
        unchanged = ~window.fresh
        if unchanged.any():
            vectors[unchanged], encoded_at[unchanged] = carried.of(items.filter(pa.array(unchanged)))
        for row, reason in failed.items():
            kept[row] = False
            item = items.slice(row, 1).to_pylist()[0]
            self.quarantined.append({**item, "error": reason})
        schema = file_schema(self.card.dim)
        rows = pa.table(
            {
                "item_id": items["item_id"],
                "row_id": items["row_id"],
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors.reshape(-1)), type=schema.field("vector").type
                ),
                "content_hash": items["content_hash"],
                "bundle": pa.repeat(self.task.bundle, items.num_rows),
                "encoded_at": pa.array(encoded_at, pa.timestamp("us", tz="UTC")),
            },
            schema=schema,
        )
        return rows if kept.all() else rows.filter(pa.array(kept))


def _write(run: _Run) -> PublishedFile | None:
    """The bucket's file; None where no item is left."""
    task = run.task
    if not task.work.items:
        return None
    return write_bucket_file(
        task.workspace.storage,
        task.table_uri,
        run.tables(),
        dim=run.card.dim,
        ds=task.ds,
        bucket=task.work.bucket,
        plan_id=task.workspace.plan_id,
        footer=_footer(task, run.card),
        mantissa_bits=task.mantissa_bits,
    )


def _write_quarantine(task: EncodeTask, rows: Sequence[dict[str, Any]]) -> str:
    """Write what cannot be encoded; the file's name tells its content, so that no other attempt replaces it."""
    storage = task.workspace.storage
    items_uri = task.workspace.items_uri(task.work.bucket, task.base)
    table = pa.table(
        {
            "item_id": [row["item_id"] for row in rows],
            "reason": [Reason.UNENCODABLE.value] * len(rows),
            "row": [json.dumps({name: row[name] for name in ("item_id", "text", "error")}) for row in rows],
            "source": [items_uri] * len(rows),
        },
        schema=QUARANTINE,
    )
    folder = task.workspace.quarantine_uri
    with storage.staged(join(folder, "part")) as staged:
        pq.write_table(table, staged, compression="zstd")
        name = f"{ENCODE_PREFIX}{task.work.bucket:05d}-{describe_file(staged, path='').sha256[:16]}.parquet"
        storage.publish(staged, join(folder, name))
    log.warning(
        "bucket %d: %d texts cannot be encoded, the first says %s", task.work.bucket, len(rows), rows[0]["error"]
    )
    return name


def tidy_quarantine(workspace: Workspace, receipts: Sequence[Receipt]) -> None:
    """Remove what attempts put into the quarantine whose receipts do not stand: their items may have been encoded."""
    named = {receipt.quarantine for receipt in receipts}
    found = [stored.uri for stored in workspace.storage.list(workspace.quarantine_uri)]
    names = {uri.rsplit("/", 1)[1]: uri for uri in found}
    workspace.storage.remove(uri for name, uri in names.items() if name.startswith(ENCODE_PREFIX) and name not in named)


def _batches(task: EncodeTask, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The bucket's planned items, some at a time."""
    filesystem, path = task.workspace.storage.filesystem(task.workspace.items_uri(task.work.bucket, task.base))
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns or ITEMS.names)):
            yield pa.Table.from_batches([batch])


def _pieces(batches: Iterable[pa.Table], *, whole: bool) -> Iterator[pa.Table]:
    """Batches put together until there is enough to encode, or enough to hold."""
    held: list[pa.Table] = []
    fresh = rows = size = 0
    for batch in batches:
        held.append(batch)
        fresh += int(_fresh(batch, whole=whole).sum())
        rows += batch.num_rows
        size += batch.nbytes
        if fresh >= WINDOW_TEXTS or rows >= WINDOW_ROWS or size >= WINDOW_BYTES:
            yield pa.concat_tables(held).combine_chunks()
            held, fresh, rows, size = [], 0, 0, 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _fresh(items: pa.Table, *, whole: bool) -> NDArray[np.bool_]:
    if whole:
        return np.ones(items.num_rows, bool)
    fresh: NDArray[np.bool_] = pc.not_equal(items["change"], Change.UNCHANGED.value).to_numpy()
    return fresh


def _keys(hashes: pa.ChunkedArray) -> NDArray[np.uint64]:
    """64 bits of each content hash: enough to tell which may be there twice, in a quarter of the room."""
    return np.array([int(content[:16], 16) for content in hashes.to_pylist()], np.uint64)


def _footer(task: EncodeTask, card: BundleCard) -> dict[str, str]:
    return {
        "marc.bundle": task.bundle,
        "marc.layer": str(card.layers_kept),
        "marc.dim": str(card.dim),
        "marc.normalised": str(card.normalised).lower(),
        "marc.template": card.template,
        PLAN_FOOTER: task.workspace.plan_id,
        "marc.ds": task.ds,
    }

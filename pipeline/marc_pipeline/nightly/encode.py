"""The encode stage: encode one bucket of planned items into one Parquet file and a receipt."""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import CorruptFile
from marc_pipeline.model.bundle import local_bundle
from marc_pipeline.nightly.carried_vectors import CarriedVectors
from marc_pipeline.nightly.windows import Window, read_windows
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import join
from marc_pipeline.storage.checksums import check_file, describe_file
from marc_pipeline.table.write import PLAN_FOOTER, write_bucket_file
from marc_pipeline.work_area import Workspace
from marc_schemas.bundle import BundleCard
from marc_schemas.catalogue import QUARANTINE, Reason
from marc_schemas.feature_table import file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import Receipt

if TYPE_CHECKING:
    from marc_pipeline.model.encoded import Encoded

QUARANTINE_PREFIX = "encode-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeTask:
    """Inputs of encoding one bucket; sent to Spark's Python workers. ``base`` is the id of the base release."""

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

    @property
    def items_uri(self) -> str:
        """Parquet file of the planned items."""
        return self.workspace.items_uri(self.work.bucket, self.base)

    def accepts(self, receipt: Receipt) -> bool:
        """Whether a receipt is valid for this task: same plan and bundle, and its file matches the checksum.

        After a replan, receipts with carried-over vectors are stale: the plan now carries over newer ones.
        """
        if (receipt.plan_id, receipt.bundle) != (self.workspace.plan_id, self.bundle):
            return False
        if receipt.finished_at < self.planned_at and self.work.unchanged:
            return False
        problem = receipt.file and check_file(self.workspace.storage, self.table_uri, receipt.file)
        if problem:
            log.warning("encode: bucket %d is encoded again: %s", self.work.bucket, problem)
        return not problem


def pending_tasks(workspace: Workspace, plan: Plan, *, table_uri: str, settings: EncodeSettings) -> list[EncodeTask]:
    """Return the tasks of the buckets that have no valid receipt yet."""
    receipts = workspace.read_receipts(plan)
    tasks = [
        EncodeTask(
            workspace=workspace,
            table_uri=table_uri,
            # The plan was made and counted with its own setting.
            settings=settings.model_copy(update={"long_texts": plan.long_texts}),
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
    return [task for task in tasks if not ((receipt := receipts.get(task.work.bucket)) and task.accepts(receipt))]


def encode_bucket(task: EncodeTask, resources: TaskResources) -> Receipt:
    """Encode new and changed texts, carry over unchanged vectors, write the file, then the receipt.

    If the vectors to carry over are damaged or missing, the whole bucket is encoded. Texts that cannot be encoded even
    alone go to the quarantine.

    Raises:
        CorruptFile: the bundle differs from its checksum.
    """
    started = time.monotonic()
    card = local_bundle(task.workspace.storage, task.bundle_uri, task.bundle)[1].card
    attempt = _Attempt(task, card, resources)
    try:
        file = attempt.write()
    except CorruptFile as error:
        if not task.work.unchanged:
            raise
        log.warning("encode: bucket %d is encoded whole: %s", task.work.bucket, error)
        attempt = _Attempt(task, card, resources, whole=True)
        file = attempt.write()
    quarantine = _write_quarantine(task, attempt.quarantined) if attempt.quarantined else None
    with suppress(OSError):
        task.workspace.progress.clear([task.work.bucket])
    receipt = Receipt(
        plan_id=task.workspace.plan_id,
        bucket=task.work.bucket,
        bundle=task.bundle,
        file=file,
        encoded=attempt.texts,
        reused=(file.rows if file else 0) - attempt.texts,
        quarantined={row["item_id"]: row["change"] for row in attempt.quarantined},
        quarantine=quarantine,
        tokens=attempt.tokens,
        padded_tokens=attempt.padded_tokens,
        cut_texts=attempt.cut_texts,
        lost_tokens=attempt.lost_tokens,
        seconds=time.monotonic() - started,
        load_seconds=attempt.load_seconds,
        model_seconds=attempt.model_seconds,
        device=attempt.device,
        dtype=attempt.dtype,
        finished_at=datetime.now(UTC),
    )
    return task.workspace.write_receipt(receipt, accepts=task.accepts)


class _Attempt:
    """One attempt to encode a bucket: it makes the rows to write and sums up the figures of the receipt.

    With ``whole``, all texts are encoded, including those whose vectors could be carried over.
    """

    def __init__(self, task: EncodeTask, card: BundleCard, resources: TaskResources, *, whole: bool = False) -> None:
        self.task, self.card, self.resources, self.whole = task, card, resources, whole
        self.texts = self.tokens = self.padded_tokens = self.cut_texts = self.lost_tokens = self._started_tokens = 0
        self.model_seconds = self.load_seconds = 0.0
        self.device = self.dtype = "none"
        self.quarantined: list[dict[str, Any]] = []
        self._shared: dict[str, NDArray[np.float32] | str] = {}

    def write(self) -> PublishedFile | None:
        """Write the bucket's file; None if no item is left.

        Raises:
            CorruptFile: files of the base release, or the bundle, are damaged or missing.
        """
        task, card = self.task, self.card
        if not task.work.items:
            return None
        footer = {
            "marc.bundle": task.bundle,
            "marc.layer": str(card.layers_kept),
            "marc.dim": str(card.dim),
            "marc.normalised": str(card.normalised).lower(),
            "marc.template": card.template,
            PLAN_FOOTER: task.workspace.plan_id,
            "marc.ds": task.ds,
        }
        return write_bucket_file(
            task.workspace.storage,
            task.table_uri,
            self._tables(),
            dim=card.dim,
            ds=task.ds,
            bucket=task.work.bucket,
            plan_id=task.workspace.plan_id,
            footer=footer,
            mantissa_bits=task.mantissa_bits,
        )

    def _tables(self) -> Iterator[pa.Table]:
        """Rows of the bucket's file, in the order of the items."""
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

    def _encoded(self) -> Iterator[tuple[Window, "Encoded | None"]]:
        task = self.task
        windows = read_windows(task.workspace.storage, task.items_uri, whole=self.whole)
        first = next(windows, None)
        while first is not None and not len(first.rows):
            yield first, None
            first = next(windows, None)
        if first is None:
            return
        started = time.monotonic()
        # Every worker loads torch for seconds; a bucket without texts to encode needs no torch.
        from marc_pipeline.model.encoder import load_encoder

        encoder = load_encoder(task.workspace.storage, task.bundle_uri, task.bundle, task.settings, self.resources)
        self.load_seconds = time.monotonic() - started
        self.device, self.dtype = str(encoder.device), str(encoder.dtype).removeprefix("torch.")
        encoder.on_batch = self._report
        texts = ((window, window.items["text"].take(window.rows).to_pylist()) for window in chain([first], windows))
        for window, encoded in encoder.stream(texts, stuck_after_s=task.settings.stuck_after_s):
            self.texts += len(window.rows) - len(encoded.failed)
            self.tokens += encoded.tokens
            self.padded_tokens += encoded.padded_tokens
            self.cut_texts += encoded.cut_texts
            self.lost_tokens += encoded.lost_tokens
            self.model_seconds += encoded.model_seconds
            yield window, encoded

    def _report(self, _texts: int, tokens: int) -> None:
        self._started_tokens += tokens
        self.task.workspace.progress.write(self.task.work.bucket, self._started_tokens)

    def _rows(self, window: Window, encoded: "Encoded | None", carried: CarriedVectors) -> pa.Table:
        items, count = window.items, window.items.num_rows
        vectors = np.zeros((count, self.card.dim), np.float32)  # [n, d]
        encoded_at = np.full(count, np.datetime64(datetime.now(UTC).replace(tzinfo=None), "us"))
        failed = self._fill(vectors, window, encoded)
        unchanged = ~window.fresh
        if unchanged.any():
            vectors[unchanged], encoded_at[unchanged] = carried.of(items.filter(pa.array(unchanged)))
        schema = file_schema(self.card.dim)
        flat = pa.array(vectors.reshape(-1))
        columns = {
            "item_id": items["item_id"],
            "row_id": items["row_id"],
            "vector": pa.FixedSizeListArray.from_arrays(flat, type=schema.field("vector").type),
            "content_hash": items["content_hash"],
            "bundle": pa.repeat(self.task.bundle, count),
            "encoded_at": pa.array(encoded_at, pa.timestamp("us", tz="UTC")),
        }
        rows = pa.table(columns, schema=schema)
        if not failed:
            return rows
        self.quarantined += [{**items.slice(row, 1).to_pylist()[0], "error": reason} for row, reason in failed.items()]
        return rows.filter(pa.array(~np.isin(np.arange(count), list(failed))))

    def _fill(self, vectors: NDArray[np.float32], window: Window, encoded: "Encoded | None") -> dict[int, str]:
        """Set the encoded vectors [n, d], also for items that share a text. Return the errors by row."""
        failed: dict[int, str] = {}
        if encoded is not None:
            if good := [place for place in range(len(window.rows)) if place not in encoded.failed]:
                vectors[window.rows[good]] = encoded.vectors[good]
            failed = {int(window.rows[place]): reason for place, reason in encoded.failed.items()}
        hashes = window.items["content_hash"].take(window.shared).to_pylist()
        for row, content in zip(window.shared.tolist(), hashes, strict=True):
            known = self._shared.setdefault(content, failed.get(row, vectors[row].copy()))
            if isinstance(known, str):
                failed[row] = known
            else:
                vectors[row] = known
        return failed


def _write_quarantine(task: EncodeTask, rows: Sequence[dict[str, Any]]) -> str:
    """Write the items that cannot be encoded; return the file's name, which has the hash of the content.

    Another attempt therefore never replaces the file.
    """
    storage, folder = task.workspace.storage, task.workspace.quarantine_uri
    table = pa.table(
        {
            "item_id": [row["item_id"] for row in rows],
            "reason": [Reason.UNENCODABLE.value] * len(rows),
            "row": [json.dumps({name: row[name] for name in ("item_id", "text", "error")}) for row in rows],
            "source": [task.items_uri] * len(rows),
        },
        schema=QUARANTINE,
    )
    with storage.staged(join(folder, "part")) as staged:
        pq.write_table(table, staged, compression="zstd")
        name = f"{QUARANTINE_PREFIX}{task.work.bucket:05d}-{describe_file(staged, path='').sha256[:16]}.parquet"
        storage.publish(staged, join(folder, name))
    log.warning(
        "encode: bucket %d: %d texts cannot be encoded; first error: %s", task.work.bucket, len(rows), rows[0]["error"]
    )
    return name


def delete_stale_quarantine(workspace: Workspace, receipts: Sequence[Receipt]) -> None:
    """Delete quarantine files of attempts without a receipt; a later attempt may have encoded their items."""
    named = {receipt.quarantine for receipt in receipts}
    found = [stored.uri for stored in workspace.storage.list(workspace.quarantine_uri)]
    names = {uri.rsplit("/", 1)[1]: uri for uri in found}
    workspace.storage.remove(
        uri for name, uri in names.items() if name.startswith(QUARANTINE_PREFIX) and name not in named
    )

"""The encode stage: one bucket in, one Parquet file and a receipt out."""

import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import feature_table
from pipeline.config import EncodeSettings
from pipeline.errors import CorruptFile
from pipeline.integrity import check_file
from pipeline.model.bundle import local_bundle
from pipeline.resources import TaskResources
from pipeline.workspace import Workspace
from schemas.bundle import BundleCard
from schemas.catalogue import ITEMS, Change
from schemas.feature_table import file_schema
from schemas.plan import BucketPlan, Plan
from schemas.receipt import Receipt

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
    work: BucketPlan

    def counts(self, receipt: Receipt) -> bool:
        """Whether a receipt stands for this task: of the same plan and bundle, its file there with the right checksum.

        A plan that was made anew carries over what another release holds now: what was carried over for it before is
        not that.
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
    """The buckets that no trustworthy receipt covers yet."""
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
            work=work,
        )
        for work in plan.work
    ]
    return [task for task in tasks if not ((receipt := receipts.get(task.work.bucket)) and task.counts(receipt))]


def encode_bucket(task: EncodeTask, resources: TaskResources) -> Receipt:
    """Encode new and changed texts, carry unchanged vectors over, write the file, then the receipt.

    Where the vectors to carry over are damaged or gone, the whole bucket is encoded.

    Raises:
        CorruptFile: the bundle differs from its checksum.
    """
    started = time.monotonic()
    storage = task.workspace.storage
    card = local_bundle(storage, task.bundle_uri, task.bundle)[1].card
    items = _read_items(task)
    fresh = pc.not_equal(items["change"], Change.UNCHANGED.value).to_numpy(zero_copy_only=False)
    try:
        carried = _carried(task, card, items.filter(pa.array(~fresh)))
    except CorruptFile as error:
        log.warning("bucket %d is encoded whole: %s", task.work.bucket, error)
        fresh, carried = np.ones(items.num_rows, bool), _carried(task, card, items.slice(0, 0))
    run = _encode(task, items.filter(pa.array(fresh)), resources, dim=card.dim)
    file = None
    if items.num_rows:
        file = feature_table.write_bucket_file(
            storage,
            task.table_uri,
            _rows(task, card, items, fresh, run.vectors, carried),
            ds=task.ds,
            bucket=task.work.bucket,
            plan_id=task.workspace.plan_id,
            footer=_footer(task, card),
        )
    receipt = Receipt(
        plan_id=task.workspace.plan_id,
        bucket=task.work.bucket,
        bundle=task.bundle,
        file=file,
        encoded=run.texts,
        reused=items.num_rows - run.texts,
        tokens=run.tokens,
        padded_tokens=run.padded_tokens,
        seconds=time.monotonic() - started,
        model_seconds=run.model_seconds,
        device=run.device,
        dtype=run.dtype,
        gpu=resources.gpu,
        finished_at=datetime.now(UTC),
    )
    return task.workspace.write_receipt(receipt, stands=task.counts)


@dataclass(frozen=True)
class _Run:
    """Vectors [n, d] of the fresh items, and what the model did for them."""

    vectors: NDArray[np.float32]
    texts: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    model_seconds: float = 0.0
    device: str = "none"
    dtype: str = "none"


def _read_items(task: EncodeTask) -> pa.Table:
    if not task.work.items:
        return ITEMS.empty_table()
    filesystem, path = task.workspace.storage.filesystem(task.workspace.items_uri(task.work.bucket, task.base))
    return pq.read_table(path, filesystem=filesystem, schema=ITEMS)


def _encode(task: EncodeTask, items: pa.Table, resources: TaskResources, *, dim: int) -> _Run:
    if not items.num_rows:
        return _Run(np.empty((0, dim), np.float32))
    # Torch takes seconds to load, in every worker: a night without changes needs none.
    from pipeline.model.encoder import load_encoder  # noqa: PLC0415

    hashes = items["content_hash"].to_pylist()
    first = {content: row for row, content in reversed(list(enumerate(hashes)))}
    rows = sorted(first.values())
    encoder = load_encoder(task.workspace.storage, task.bundle_uri, task.bundle, task.settings, resources)
    encoded = encoder.encode(items["text"].take(rows).to_pylist())
    # Items that share a text share its vector.
    place = {hashes[row]: number for number, row in enumerate(rows)}
    return _Run(
        vectors=encoded.vectors[[place[content] for content in hashes]],
        texts=len(rows),
        tokens=encoded.tokens,
        padded_tokens=encoded.padded_tokens,
        model_seconds=encoded.model_seconds,
        device=str(encoder.device),
        dtype=str(encoder.dtype).removeprefix("torch."),
    )


def _rows(
    task: EncodeTask,
    card: BundleCard,
    items: pa.Table,
    fresh: NDArray[np.bool_],
    vectors: NDArray[np.float32],
    carried: tuple[NDArray[np.float32], NDArray[np.datetime64]],
) -> pa.Table:
    """The bucket's table: fresh vectors and carried ones, in the order of the items."""
    out = np.empty((items.num_rows, card.dim), np.float32)
    encoded_at = np.full(items.num_rows, np.datetime64(datetime.now(UTC).replace(tzinfo=None), "us"))
    out[fresh] = vectors
    out[~fresh], encoded_at[~fresh] = carried
    schema = file_schema(card.dim)
    return pa.table(
        {
            "item_id": items["item_id"],
            "row_id": items["row_id"],
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(out.reshape(-1)), type=schema.field("vector").type),
            "content_hash": items["content_hash"],
            "bundle": pa.repeat(task.bundle, items.num_rows),
            "encoded_at": pa.array(encoded_at, pa.timestamp("us", tz="UTC")),
        },
        schema=schema,
    )


def _carried(task: EncodeTask, card: BundleCard, items: pa.Table) -> tuple[NDArray[np.float32], NDArray[np.datetime64]]:
    """Vectors [n, d] of unchanged items, and when they were encoded.

    Raises:
        CorruptFile: the base's files are damaged or gone, or do not hold them.
    """
    if not items.num_rows:
        return np.empty((0, card.dim), np.float32), np.empty(0, "datetime64[us]")
    columns = ["item_id", "vector", "content_hash", "bundle", "encoded_at"]
    tables = [
        feature_table.read_rows(task.workspace.storage, task.table_uri, file, columns=columns)
        for file in task.work.previous
    ]
    previous = pa.concat_tables([table.replace_schema_metadata() for table in tables]).combine_chunks()
    previous = previous.take(pc.index_in(items["item_id"], value_set=previous["item_id"].combine_chunks()))
    same = pc.and_(pc.equal(previous["content_hash"], items["content_hash"]), pc.equal(previous["bundle"], task.bundle))
    if not pc.all(pc.fill_null(same, fill_value=False)).as_py():
        raise CorruptFile(
            f"bucket {task.work.bucket}: the base release does not hold the vectors that the plan carries over"
        )
    vectors = previous["vector"].combine_chunks().flatten().to_numpy().reshape(-1, card.dim)
    return vectors, previous["encoded_at"].to_numpy()


def _footer(task: EncodeTask, card: BundleCard) -> dict[str, str]:
    return {
        "marc.bundle": task.bundle,
        "marc.layer": str(card.layers_kept),
        "marc.dim": str(card.dim),
        "marc.normalised": str(card.normalised).lower(),
        "marc.template": card.template,
        feature_table.PLAN_FOOTER: task.workspace.plan_id,
        "marc.ds": task.ds,
    }

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
from pipeline.model.encoder import load_encoder
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
    work: BucketPlan


def pending_tasks(workspace: Workspace, plan: Plan, *, table_uri: str, settings: EncodeSettings) -> list[EncodeTask]:
    """The buckets that no trustworthy receipt covers yet.

    A receipt counts when plan and bundle match and its file is there with the right checksum.
    """
    receipts = workspace.read_receipts(plan)
    tasks = []
    for work in plan.work:
        receipt = receipts.get(work.bucket)
        if receipt is not None:
            problem = receipt.file and check_file(workspace.storage, table_uri, receipt.file)
            if not problem:
                continue
            log.warning("bucket %d is encoded again: %s", work.bucket, problem)
        tasks.append(
            EncodeTask(
                workspace=workspace,
                table_uri=table_uri,
                settings=settings,
                ds=plan.ds,
                bundle=plan.bundle,
                bundle_uri=plan.bundle_uri,
                base=plan.base_release,
                work=work,
            )
        )
    return tasks


def encode_bucket(task: EncodeTask, resources: TaskResources) -> Receipt:
    """Encode new and changed texts, carry unchanged vectors over, write the file, then the receipt.

    Raises:
        CorruptFile: a carried file or the bundle differs from its checksum.
    """
    started = time.monotonic()
    storage = task.workspace.storage
    card = local_bundle(storage, task.bundle_uri, task.bundle)[1].card
    items = _read_items(task)
    fresh = pc.not_equal(items["change"], Change.UNCHANGED.value).to_numpy()
    run = _encode(task, items.filter(pa.array(fresh)), resources, dim=card.dim)
    file = None
    if items.num_rows:
        file = feature_table.write_bucket_file(
            storage,
            task.table_uri,
            _rows(task, card, items, fresh, run.vectors),
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
    task.workspace.write_receipt(receipt)
    return receipt


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
) -> pa.Table:
    """The bucket's table: fresh vectors and carried ones, in the order of the items."""
    out = np.empty((items.num_rows, card.dim), np.float32)
    encoded_at = np.full(items.num_rows, np.datetime64(datetime.now(UTC).replace(tzinfo=None), "us"))
    out[fresh] = vectors
    if not fresh.all():
        out[~fresh], encoded_at[~fresh] = _carried(task, card, items.filter(pa.array(~fresh)))
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

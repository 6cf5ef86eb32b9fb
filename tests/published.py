"""Publishes small releases without Spark, torch or a model: random unit vectors go the way of the real ones."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import audit, index, release
from pipeline.config import AuditSettings, IndexSettings
from pipeline.feature_table import write_bucket_file
from pipeline.model.bundle import Bundle, save_bundle
from pipeline.resources import TaskResources
from pipeline.storage import Storage
from pipeline.workspace import Workspace, receipts_digest
from schemas.bundle import BundleCard, CompressorCard
from schemas.catalogue import ITEMS, Change
from schemas.feature_table import file_schema
from schemas.files import PublishedFile
from schemas.identity import content_hash, row_id
from schemas.plan import BucketPlan, Plan
from schemas.receipt import AuditReport, IndexReceipt, Receipt
from schemas.release import Release

Vector = NDArray[np.float32]
Vectors = Mapping[str, Vector]
Alter = Callable[[int, pa.Table], pa.Table]

DS = "2026-11-20"
DIM = 8
BUCKETS = 4
TEMPLATE = "{title}"
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)

# Beside other work on the same few cores, threads that spin for one another take ten times as long as one alone.
faiss.omp_set_num_threads(1)


def unit_vectors(ids: Sequence[str], *, dim: int = DIM, seed: int = 0) -> dict[str, Vector]:
    """A random vector of unit length per id."""
    drawn = np.random.default_rng(seed).standard_normal((len(ids), dim))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return dict(zip(ids, drawn.astype(np.float32), strict=True))


def items(count: int, *, dim: int = DIM, seed: int = 0, prefix: str = "item-") -> dict[str, Vector]:
    """Random unit vectors of ``item-0``, ``item-1``, …"""
    return unit_vectors([f"{prefix}{number}" for number in range(count)], dim=dim, seed=seed)


def bucket_rows(vectors: Vectors, *, bundle: str, dim: int = DIM) -> pa.Table:
    """Rows of the feature table, in the order of a bucket's file."""
    ids = sorted(vectors, key=str.encode)
    flat = np.concatenate([vectors[i] for i in ids]) if ids else np.empty(0, np.float32)
    schema = file_schema(dim)
    columns = {
        "item_id": pa.array(ids, pa.string()),
        "row_id": pa.array([row_id(i) for i in ids], pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), type=schema.field("vector").type),
        "content_hash": pa.array([content_hash(f"text of {i}") for i in ids], pa.string()),
        "bundle": pa.array([bundle] * len(ids), pa.string()),
        "encoded_at": pa.array([NOON] * len(ids), pa.timestamp("us", tz="UTC")),
    }
    return pa.table(columns, schema=schema)


def tiny_bundle(uri: str, *, dim: int = DIM, normalised: bool = True, weights: str = "weights") -> Bundle:
    """A bundle folder whose weights are a line of text."""

    def write(folder: Path) -> BundleCard:
        (folder / "backbone").mkdir()
        (folder / "backbone" / "weights.txt").write_text(weights)
        return BundleCard(
            backbone="none",
            layers_kept=1,
            backbone_layers=2,
            pooling="mean",
            max_tokens=16,
            width=2 * dim,
            dim=dim,
            normalised=normalised,
            template=TEMPLATE,
            compressor=CompressorCard(kind="pca"),
            training={"seed": 0},
            metrics={"explained": 0.5},
            files={},
        )

    return save_bundle(Storage(), uri, write)


@dataclass(frozen=True)
class Site:
    """One feature table with its indexes, work area and a bundle, below a folder."""

    root: Path
    dim: int = DIM
    normalised: bool = True
    storage: Storage = field(default_factory=Storage)

    @property
    def table_uri(self) -> str:
        return str(self.root / "item_vectors")

    @property
    def index_uri(self) -> str:
        return str(self.root / "indexes")

    @property
    def bundles_uri(self) -> str:
        return str(self.root / "bundles")

    def bundle(self, weights: str = "weights") -> Bundle:
        return tiny_bundle(self.bundles_uri, dim=self.dim, normalised=self.normalised, weights=weights)

    def workspace(self, plan_id: str) -> Workspace:
        return Workspace(self.storage, str(self.root / "work"), plan_id)

    def encoded(
        self,
        vectors: Vectors,
        *,
        ds: str = DS,
        plan_id: str = "",
        buckets: int = BUCKETS,
        base: Release | None = None,
        deleted: int = 0,
        quarantined: Mapping[str, int] | None = None,
        weights: str = "weights",
        alter: Alter = lambda _bucket, rows: rows,
    ) -> "Encoded":
        """What plan and encode leave behind for these items: plan, planned items, files and receipts.

        Args:
            vectors: by item id.
            ds: date of the snapshot.
            plan_id: any name; a date's own by default.
            buckets: of the table.
            base: release that the plan was compared with.
            deleted: items of the base that the plan says are gone.
            quarantined: rows by reason.
            weights: content of the bundle.
            alter: what goes wrong: changes the rows of a bucket before they are written.
        """
        bundle = self.bundle(weights)
        workspace = self.workspace(plan_id or content_hash(f"plan of {ds}"))
        by_bucket: dict[int, dict[str, Vector]] = {}
        for item, vector in vectors.items():
            by_bucket.setdefault(row_id(item) % buckets, {})[item] = vector
        numbers = sorted(by_bucket)
        quarantined = dict(quarantined or {})
        plan = Plan(
            plan_id=workspace.plan_id,
            ds=ds,
            created_at=NOON,
            catalogue=(),
            bundle=bundle.version,
            bundle_uri=bundle.uri,
            dim=self.dim,
            template=TEMPLATE,
            buckets=buckets,
            base_release=base.release_id if base else None,
            rows_read=len(vectors) + sum(quarantined.values()),
            quarantined=quarantined,
            work=tuple(
                _work(number, len(by_bucket[number]), deleted if number == numbers[0] else 0) for number in numbers
            ),
            tokens_exact=True,
            tokens_per_second=None,
        )
        for number in numbers:
            rows = bucket_rows(by_bucket[number], bundle=bundle.version, dim=self.dim)
            _write_items(workspace, number, rows)
            file = write_bucket_file(
                self.storage,
                self.table_uri,
                alter(number, rows),
                ds=ds,
                bucket=number,
                plan_id=plan.plan_id,
                footer={"marc.bundle": bundle.version, "marc.dim": str(self.dim)},
            )
            workspace.write_receipt(receipt_for(plan, number, file))
        return Encoded(self, workspace, workspace.write_plan(plan))

    def publish(
        self,
        vectors: Vectors,
        *,
        ds: str = DS,
        plan_id: str = "",
        buckets: int = BUCKETS,
        index: IndexSettings | None = None,
    ) -> Release:
        """All stages."""
        encoded = self.encoded(vectors, ds=ds, plan_id=plan_id, buckets=buckets)
        encoded.audit()
        encoded.index(index)
        return encoded.release()


@dataclass(frozen=True)
class Encoded:
    """A plan whose files are written and visible to nobody; the later stages, one method each."""

    site: Site
    workspace: Workspace
    plan: Plan

    @property
    def receipts(self) -> list[Receipt]:
        return self.workspace.require_receipts(self.plan)

    @property
    def digest(self) -> str:
        return receipts_digest(self.receipts)

    def audit(self, settings: AuditSettings | None = None, *, base: Release | None = None) -> AuditReport:
        tasks = audit.audit_tasks(
            self.workspace,
            self.plan,
            self.receipts,
            table_uri=self.site.table_uri,
            normalised=self.site.normalised,
        )
        found = [audit.audit_bucket(task, TaskResources()) for task in tasks]
        report = audit.judge(self.plan, found, self.receipts, base=base, settings=settings or AuditSettings())
        self.workspace.write_audit(report)
        return report

    def index(self, settings: IndexSettings | None = None) -> IndexReceipt:
        built = index.build_index(
            self.receipts,
            storage=self.site.storage,
            table_uri=self.site.table_uri,
            index_uri=self.site.index_uri,
            plan_id=self.plan.plan_id,
            digest=self.digest,
            dim=self.site.dim,
            settings=settings or IndexSettings(),
        )
        self.workspace.write_index(built)
        return built

    def release(self) -> Release:
        return release.publish(self.workspace, self.plan, table_uri=self.site.table_uri)


def receipt_for(plan: Plan, bucket: int, file: PublishedFile | None) -> Receipt:
    """The receipt of a bucket that was encoded on nothing at all."""
    rows = file.rows if file else 0
    return Receipt(
        plan_id=plan.plan_id,
        bucket=bucket,
        bundle=plan.bundle,
        file=file,
        encoded=rows,
        reused=0,
        tokens=3 * rows,
        padded_tokens=4 * rows,
        seconds=0.5,
        model_seconds=0.25,
        device="none",
        dtype="float32",
        gpu=None,
        finished_at=NOON,
    )


class Meeting:
    """Where threads wait for one another once: the first time that each comes by."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties)
        self._met = threading.local()

    def wait(self) -> None:
        if not getattr(self._met, "before", False):
            self._met.before = True
            self._barrier.wait(timeout=20)


def flip(path: str | Path, offset: int, mask: int = 0xFF) -> None:
    """Alter one byte of a file in place; the same call again restores it."""
    with Path(path).open("rb+") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ mask]))


def _work(bucket: int, count: int, deleted: int) -> BucketPlan:
    return BucketPlan(
        bucket=bucket,
        items=count,
        new=count,
        changed=0,
        unchanged=0,
        deleted=deleted,
        tokens=3 * count,
        characters=9 * count,
    )


def _write_items(workspace: Workspace, bucket: int, rows: pa.Table) -> None:
    ids = rows["item_id"].to_pylist()
    planned = pa.table(
        {
            "item_id": rows["item_id"],
            "row_id": rows["row_id"],
            "text": [f"text of {i}" for i in ids],
            "content_hash": rows["content_hash"],
            "change": [Change.NEW.value] * len(ids),
        },
        schema=ITEMS,
    )
    uri = workspace.items_uri(bucket)
    with workspace.storage.staged(uri) as staged:
        pq.write_table(planned, staged)
        workspace.storage.publish(staged, uri)

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

from pipeline import audit, index, release, release_log, stages
from pipeline.config import AuditSettings, CatalogueSettings, IndexSettings, Settings
from pipeline.deployment import Deployment
from pipeline.errors import CorruptFile
from pipeline.feature_table import PLAN_FOOTER, day_files, read_rows, write_bucket_file
from pipeline.model.bundle import Bundle, save_bundle
from pipeline.resources import TaskResources
from pipeline.storage import Storage, join
from pipeline.workspace import Workspace
from schemas.bundle import BundleCard, CompressorCard
from schemas.catalogue import ITEMS, Change
from schemas.feature_table import MANTISSA_BITS, file_schema
from schemas.files import PublishedFile
from schemas.identity import content_hash, receipts_digest, row_id
from schemas.plan import BucketPlan, Plan
from schemas.receipt import AuditReport, IndexReceipt, Receipt, day_moments
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


def in_buckets(vectors: Vectors, *numbers: int, buckets: int = BUCKETS) -> dict[str, Vector]:
    """Those of some buckets."""
    return {item: vector for item, vector in vectors.items() if row_id(item) % buckets in numbers}


def unit_vectors(ids: Sequence[str], *, dim: int = DIM, seed: int = 0) -> dict[str, Vector]:
    """A random vector of unit length per id."""
    drawn = np.random.default_rng(seed).standard_normal((len(ids), dim))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return dict(zip(ids, drawn.astype(np.float32), strict=True))


def items(count: int, *, dim: int = DIM, seed: int = 0, prefix: str = "item-") -> dict[str, Vector]:
    """Random unit vectors of ``item-0``, ``item-1``, …"""
    return unit_vectors([f"{prefix}{number}" for number in range(count)], dim=dim, seed=seed)


def text_of(item: str, vector: Vector) -> str:
    """The text that an item is said to have: another vector is of another text."""
    return f"text of {item}: {vector.tobytes().hex()}"


def bucket_rows(vectors: Vectors, *, bundle: str, dim: int = DIM) -> pa.Table:
    """Rows of the feature table, in the order of a bucket's file."""
    ids = sorted(vectors, key=str.encode)
    flat = np.concatenate([vectors[i] for i in ids]) if ids else np.empty(0, np.float32)
    schema = file_schema(dim)
    columns = {
        "item_id": pa.array(ids, pa.string()),
        "row_id": pa.array([row_id(i) for i in ids], pa.int64()),
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()), type=schema.field("vector").type),
        "content_hash": pa.array([content_hash(text_of(i, vectors[i])) for i in ids], pa.string()),
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

    @property
    def settings(self) -> Settings:
        return Settings(
            catalogue=CatalogueSettings(uri=str(self.root / "no-catalogue"), template=TEMPLATE),
            root=str(self.root),
            buckets=BUCKETS,
        )

    @property
    def deployment(self) -> Deployment:
        return Deployment(self.settings, self.storage)

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
        quarantined: Mapping[str, int] | None = None,
        weights: str = "weights",
        chosen: tuple[int, ...] | None = None,
        mantissa_bits: int = MANTISSA_BITS,
        alter: Alter = lambda _bucket, rows: rows,
    ) -> "Encoded":
        """What plan and encode leave behind for these items: plan, planned items, files and receipts.

        Args:
            vectors: by item id.
            ds: date of the snapshot.
            plan_id: any name; a date's own by default.
            buckets: of the table.
            base: release that the plan is compared with; the day's own for a plan of some buckets.
            quarantined: rows by reason.
            weights: content of the bundle.
            chosen: buckets that are replaced in the day's release; items of others are left out. None: the whole day.
            mantissa_bits: that vectors are stored with.
            alter: what goes wrong: changes the rows of a bucket before they are written.
        """
        bundle = self.bundle(weights)
        # File names say which plan they are of, by the id that a real plan has.
        workspace = self.workspace(content_hash(f"plan {plan_id or ds}"))
        log = release_log.read_log(self.storage, self.table_uri)
        live, last = log.live(ds), log.last(ds)
        base = base or (live if chosen else None)
        numbers = range(buckets) if chosen is None else chosen
        by_bucket: dict[int, dict[str, Vector]] = {number: {} for number in numbers}
        for item, vector in vectors.items():
            if row_id(item) % buckets in by_bucket:
                by_bucket[row_id(item) % buckets][item] = vector
        planned = {
            number: _planned(self, number, bucket_rows(rows, bundle=bundle.version, dim=self.dim), base, buckets)
            for number, rows in by_bucket.items()
        }
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
            mantissa_bits=mantissa_bits,
            chosen=chosen,
            base_release=base.release_id if base else None,
            live_release=last.release_id if last else None,
            rows_read=sum(map(len, by_bucket.values())) + sum(quarantined.values()),
            quarantined=quarantined,
            work=tuple(work for work, _ in planned.values() if work.items or work.deleted),
            tokens_exact=True,
            tokens_per_second=None,
        )
        for work in plan.work:
            number = work.bucket
            if not work.items:
                workspace.write_receipt(receipt_for(plan, number, None))
                continue
            rows = alter(number, bucket_rows(by_bucket[number], bundle=bundle.version, dim=self.dim))
            _write_items(workspace, number, plan.base_release, by_bucket[number], planned[number][1])
            file = write_bucket_file(
                self.storage,
                self.table_uri,
                [rows],
                dim=rows.schema.field("vector").type.list_size,
                ds=ds,
                bucket=number,
                plan_id=plan.plan_id,
                footer={"marc.bundle": bundle.version, "marc.dim": str(self.dim), PLAN_FOOTER: plan.plan_id},
                mantissa_bits=mantissa_bits,
            )
            workspace.write_receipt(receipt_for(plan, number, file))
        return Encoded(self, workspace, workspace.write_plan(plan, replacing=workspace.read_plan()))

    def publish(
        self,
        vectors: Vectors,
        *,
        ds: str = DS,
        plan_id: str = "",
        buckets: int = BUCKETS,
        index: IndexSettings | None = None,
        base: Release | None = None,
        chosen: tuple[int, ...] | None = None,
        mantissa_bits: int = MANTISSA_BITS,
    ) -> Release:
        """All stages."""
        encoded = self.encoded(
            vectors,
            ds=ds,
            plan_id=plan_id,
            buckets=buckets,
            base=base,
            chosen=chosen,
            mantissa_bits=mantissa_bits,
        )
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

    @property
    def base(self) -> Release | None:
        return release_log.read_log(self.site.storage, self.site.table_uri).find(self.plan.base_release)

    def audit(self, settings: AuditSettings | None = None) -> AuditReport:
        base = self.base
        tasks = audit.audit_tasks(
            self.workspace,
            self.plan,
            self.receipts,
            table_uri=self.site.table_uri,
            normalised=self.site.normalised,
            base=base,
        )
        found = [audit.audit_bucket(task, TaskResources()) for task in tasks]
        report = audit.judge(self.plan, found, self.receipts, base=base, settings=settings or AuditSettings())
        self.workspace.write_audit(report)
        return report

    def index(self, settings: IndexSettings | None = None, *, run: index.Run = index.in_turn) -> IndexReceipt:
        log = release_log.read_log(self.site.storage, self.site.table_uri)
        live = log.live(self.plan.ds) if self.plan.chosen else None
        report = self.workspace.read_audit() or self.audit()
        built = index.make_index(
            day_files(self.plan, self.receipts, live),
            base=live or log.find(self.plan.base_release),
            storage=self.site.storage,
            table_uri=self.site.table_uri,
            index_uri=self.site.index_uri,
            work_uri=join(self.workspace.uri, "index"),
            plan_id=self.plan.plan_id,
            bundle=self.plan.bundle,
            buckets=self.plan.buckets,
            moments=day_moments(report.gained, report.lost, live),
            dim=self.site.dim,
            mantissa_bits=self.plan.mantissa_bits,
            settings=settings or IndexSettings(),
            run=run,
        )
        self.workspace.write_index(built)
        return built

    def release(self) -> Release:
        return release.publish(self.workspace, self.plan, table_uri=self.site.table_uri)

    def release_on_top(self) -> Release:
        """As a run publishes: where others did so meanwhile, with an index of what is there now."""
        return stages.release_stage(self.site.deployment, self.plan.plan_id)


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


def _planned(
    site: Site, bucket: int, rows: pa.Table, base: Release | None, buckets: int
) -> tuple[BucketPlan, list[str]]:
    """The plan of one bucket, and how each of its rows stands against the base."""
    before: dict[str, tuple[str, str]] = {}
    for file in base.table.files if base else ():
        try:
            held = read_rows(site.storage, site.table_uri, file)
        except CorruptFile:
            continue
        before |= {
            row["item_id"]: (row["content_hash"], row["bundle"])
            for row in held.to_pylist()
            if row["row_id"] % buckets == bucket
        }
    today = zip(*(rows[name].to_pylist() for name in ("item_id", "content_hash", "bundle")), strict=True)
    changes = [
        Change.NEW if i not in before else Change.UNCHANGED if before[i] == (content, bundle) else Change.CHANGED
        for i, content, bundle in today
    ]
    fresh = rows.num_rows - changes.count(Change.UNCHANGED)
    work = BucketPlan(
        bucket=bucket,
        items=rows.num_rows,
        new=changes.count(Change.NEW),
        changed=changes.count(Change.CHANGED),
        unchanged=changes.count(Change.UNCHANGED),
        deleted=len(before.keys() - set(rows["item_id"].to_pylist())),
        tokens=3 * fresh,
    )
    return work, [change.value for change in changes]


def _write_items(workspace: Workspace, bucket: int, base: str | None, vectors: Vectors, changes: list[str]) -> None:
    ids = sorted(vectors, key=str.encode)
    texts = [text_of(i, vectors[i]) for i in ids]
    planned = pa.table(
        {
            "item_id": ids,
            "row_id": [row_id(i) for i in ids],
            "text": texts,
            "content_hash": [content_hash(text) for text in texts],
            "change": changes,
        },
        schema=ITEMS,
    )
    uri = workspace.items_uri(bucket, base)
    with workspace.storage.staged(uri) as staged:
        pq.write_table(planned, staged)
        workspace.storage.publish(staged, uri)

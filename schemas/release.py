"""A release: one published generation of table, index and bundle."""

from datetime import datetime
from typing import Any

import pyarrow as pa

from schemas.files import Contract, PublishedFile

FORMAT_VERSION = 3


class IndexBuild(Contract):
    """The last time that an index was built from scratch; what came after are patches.

    Attributes:
        items: vectors that it was built of.
        nprobe: inverted lists that the recall asked for then; None for an index without lists.
        mean: of those vectors, length d.
        changed: vectors removed and added since.
        tombstones: of the removed, those that the index cannot let go of: they are marked, and never found.
    """

    items: int
    nprobe: int | None
    mean: tuple[float, ...]
    changed: int = 0
    tombstones: int = 0


class IndexFigures(Contract):
    """What was predicted of an index, and measured.

    Attributes:
        memory_bytes: most that a process was predicted to hold while it builds all of it, beyond what it imports.
        recall_low, recall_high: where the recall over all items lies, at 99 % confidence.
        latency_ms: of one query alone, median.
        queries_per_second: of many queries together.
    """

    memory_bytes: int
    recall_low: float
    recall_high: float
    latency_ms: float
    queries_per_second: float


class Release(Contract):
    """One row of the release log; everything a reader needs to open the generation and to trust it.

    Attributes:
        release_id: sorts by time of publication.
        ds: date of the snapshot.
        turn: place among the releases of the same ds; the highest one is what readers see.
        withdrawn: the date has no release any more: a roll-back to an earlier date. It has no items and no files;
            the other facts are those of what was withdrawn.
        retired_at: when retention gave it up; readers that have it open keep it for the grace period.
        restores: release that a roll-back points back to.
        created_at: when it was published.
        plan_id: the plan that made it.
        supersedes: release that readers of the same ds saw before; None for the first.
        table_uri, table_version: Delta table and the version that made the files visible.
        table_files: Parquet files of the snapshot, relative to ``table_uri``.
        dim, buckets, template, mantissa_bits: table settings.
        bytes_per_item: size of the table's files divided by the items; 0 for none.
        bundle, bundle_uri, bundle_file: version and folder of the bundle; its ``bundle.json``, whose
            checksum covers every other file of the folder.
        index_uri, index_files, index_factory: FAISS index; several files are its shards, of buckets in order.
        index_nprobe, index_ef_search: how widely it is searched: inverted lists visited, or efSearch of a graph.
        index_faiss: version of FAISS that wrote it.
        index_build: when it was last built from scratch.
        index_figures: what was predicted of it, and measured.
        index_queries: queries of the recall, with their exact neighbours.
        k, recall, recall_queries: recall@k against exact search, measured on so many held-out items.
        items, new, changed, reused, deleted: counts of the day; ``reused`` are vectors that were there before.
        quarantined: rows of the plan: after a backfill of some buckets, those of these buckets.
        encoded, tokens: texts and tokens that went through the model.
        quarantine_uri: folder of the quarantine's Parquet files; None when it is empty.
        mean, variance, drift: of the day's vectors, by the audit.
        quarantined_fraction: of the rows of the plan.
        seconds: wall time by stage.
        tokens_per_second: throughput of the encode stage; None when nothing was encoded.
    """

    format_version: int = FORMAT_VERSION
    release_id: str
    ds: str
    turn: int
    withdrawn: bool = False
    retired_at: datetime | None = None
    restores: str | None = None
    created_at: datetime
    plan_id: str
    supersedes: str | None
    table_uri: str
    table_version: int
    table_files: tuple[PublishedFile, ...]
    dim: int
    buckets: int
    template: str
    mantissa_bits: int
    bytes_per_item: float
    bundle: str
    bundle_uri: str
    bundle_file: PublishedFile
    index_uri: str
    index_files: tuple[PublishedFile, ...]
    index_factory: str
    index_nprobe: int | None
    index_ef_search: int | None
    index_faiss: str
    index_build: IndexBuild
    index_figures: IndexFigures
    index_queries: PublishedFile
    k: int
    recall: float
    recall_queries: int
    items: int
    new: int
    changed: int
    reused: int
    deleted: int
    quarantined: int
    encoded: int
    tokens: int
    quarantine_uri: str | None
    mean: tuple[float, ...]
    variance: float
    drift: float | None
    quarantined_fraction: float
    seconds: dict[str, float]
    tokens_per_second: float | None

    def facts(self) -> dict[str, Any]:
        """What a scheduler or a script wants to know of a release: the fields of ``marc run --json``."""
        names = (
            "release_id", "ds", "table_version", "bundle", "items", "new", "changed", "reused", "deleted",
            "quarantined", "encoded", "tokens", "mantissa_bits", "bytes_per_item", "recall", "seconds", "table_uri",
            "index_uri", "index_factory", "index_bytes_per_item",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | self.index_figures.model_dump()

    @property
    def index_bytes_per_item(self) -> float:
        """Size of the index's files divided by the items; 0 for none."""
        return sum(file.bytes for file in self.index_files) / max(1, self.items)


_FILE = pa.struct(
    [
        ("path", pa.string()),
        ("bytes", pa.int64()),
        ("rows", pa.int64()),
        ("sha256", pa.string()),
        ("blocks", pa.string()),
    ]
)

_BUILD = pa.struct(
    [
        ("items", pa.int64()),
        ("nprobe", pa.int32()),
        ("mean", pa.list_(pa.float64())),
        ("changed", pa.int64()),
        ("tombstones", pa.int64()),
    ]
)

_FIGURES = pa.struct(
    [
        ("memory_bytes", pa.int64()),
        ("recall_low", pa.float64()),
        ("recall_high", pa.float64()),
        ("latency_ms", pa.float64()),
        ("queries_per_second", pa.float64()),
    ]
)

RELEASES = pa.schema(
    [
        ("format_version", pa.int32()),
        ("release_id", pa.string()),
        ("ds", pa.string()),
        ("turn", pa.int64()),
        ("withdrawn", pa.bool_()),
        ("retired_at", pa.timestamp("us", tz="UTC")),
        ("restores", pa.string()),
        ("created_at", pa.timestamp("us", tz="UTC")),
        ("plan_id", pa.string()),
        ("supersedes", pa.string()),
        ("table_uri", pa.string()),
        ("table_version", pa.int64()),
        ("table_files", pa.list_(_FILE)),
        ("dim", pa.int32()),
        ("buckets", pa.int32()),
        ("template", pa.string()),
        ("mantissa_bits", pa.int32()),
        ("bytes_per_item", pa.float64()),
        ("bundle", pa.string()),
        ("bundle_uri", pa.string()),
        ("bundle_file", _FILE),
        ("index_uri", pa.string()),
        ("index_files", pa.list_(_FILE)),
        ("index_factory", pa.string()),
        ("index_nprobe", pa.int32()),
        ("index_ef_search", pa.int32()),
        ("index_faiss", pa.string()),
        ("index_build", _BUILD),
        ("index_figures", _FIGURES),
        ("index_queries", _FILE),
        ("k", pa.int32()),
        ("recall", pa.float64()),
        ("recall_queries", pa.int32()),
        ("items", pa.int64()),
        ("new", pa.int64()),
        ("changed", pa.int64()),
        ("reused", pa.int64()),
        ("deleted", pa.int64()),
        ("quarantined", pa.int64()),
        ("encoded", pa.int64()),
        ("tokens", pa.int64()),
        ("quarantine_uri", pa.string()),
        ("mean", pa.list_(pa.float64())),
        ("variance", pa.float64()),
        ("drift", pa.float64()),
        ("quarantined_fraction", pa.float64()),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("tokens_per_second", pa.float64()),
    ]
)
"""The release log: a small Delta table beside the feature table."""

"""A release: one record of the release log, and its facts as ``marc run --json`` and the Airflow event give them."""

from datetime import datetime
from typing import Any

from marc_schemas.arrow import arrow_schema
from marc_schemas.bundle import LongTexts
from marc_schemas.files import Contract, PublishedFile
from marc_schemas.moments import Moments
from marc_schemas.space import SpaceShape

FORMAT_VERSION = 5
# Increase FORMAT_VERSION when a field is added, and give the field a default: records of every format from
# OLDEST_FORMAT on are read. Do not rename, remove or retype a field.
OLDEST_FORMAT = 4


class TableFacts(Contract):
    """The feature table of a release.

    Attributes:
        uri: the Delta table.
        version: version of the Delta table that made the files visible.
        files: Parquet files of the snapshot, relative to ``uri``; empty for a withdrawn date.
        dim: length d of the vectors.
        buckets: number of buckets.
        template: text template of the items, with the version of the cleaning rules.
        mantissa_bits: explicit mantissa bits that vectors are rounded to.
        long_texts: whether texts beyond the bundle's maximum were cut or pooled.
    """

    uri: str
    version: int
    files: tuple[PublishedFile, ...]
    dim: int
    buckets: int
    template: str
    mantissa_bits: int
    long_texts: LongTexts = "cut"

    @property
    def items(self) -> int:
        """Rows in all files."""
        return sum(file.rows for file in self.files)

    @property
    def bytes_per_item(self) -> float:
        """Size of the files divided by the items; 0 for an empty table."""
        return sum(file.bytes for file in self.files) / max(1, self.items)


class BundleFacts(Contract):
    """The bundle that made the vectors of a release.

    Attributes:
        version: hash of the bundle's content.
        uri: folder of the bundle.
        card_file: its ``bundle.json``, which contains the checksums of all other files.
    """

    version: str
    uri: str
    card_file: PublishedFile


class IndexBuild(Contract):
    """The last full build of an index. Later releases patch it until it is built again.

    Attributes:
        items: number of vectors at the full build.
        nprobe: inverted lists per query that reached the target recall then; None for an index without lists.
        mean: mean of those vectors, length d.
        changed: vectors removed and added since.
        tombstones: removed vectors that are still in the index, because its type cannot delete; search skips them.
    """

    items: int
    nprobe: int | None
    mean: tuple[float, ...]
    changed: int = 0
    tombstones: int = 0


class IndexFigures(Contract):
    """Predicted memory, measured recall and measured speed of an index.

    Attributes:
        memory_bytes: predicted peak memory of a process that builds the whole index, imported libraries excluded.
        recall_low, recall_high: 99 % confidence interval of the recall over all items.
        latency_ms: median time of one query alone, in milliseconds.
        queries_per_second: throughput of one large batch of queries.
    """

    memory_bytes: int
    recall_low: float
    recall_high: float
    latency_ms: float
    queries_per_second: float


class IndexFacts(Contract):
    """The FAISS index of a release.

    Attributes:
        uri: folder of all indexes; file paths are relative to it.
        files: index files with checksums. Several files are shards, in the order of their buckets.
        queries_file: queries of the recall measurement, with their exact neighbours.
        factory: FAISS factory string.
        nprobe: inverted lists visited per query; None for an index without lists.
        ef_search: efSearch of a graph; None for an index without a graph.
        faiss: version of FAISS that wrote the files.
        build: the last full build.
        k: number of neighbours that recall was measured at.
        recall: recall@k against exact search.
        recall_queries: number of held-out items that measured it.
        figures: memory, confidence interval and speed.
    """

    uri: str
    files: tuple[PublishedFile, ...]
    queries_file: PublishedFile
    factory: str
    nprobe: int | None
    ef_search: int | None
    faiss: str
    build: IndexBuild
    k: int
    recall: float
    recall_queries: int
    figures: IndexFigures

    @property
    def all_files(self) -> tuple[PublishedFile, ...]:
        """Index files and the queries' file."""
        return *self.files, self.queries_file

    @property
    def items(self) -> int:
        """Vectors that search can find: those in the files without the tombstones."""
        return max(0, sum(file.rows for file in self.files) - self.build.tombstones)

    @property
    def bytes_per_item(self) -> float:
        """Size of the files divided by the items; 0 for an empty index."""
        return sum(file.bytes for file in self.files) / max(1, self.items)

    @property
    def width(self) -> int | None:
        """How widely the index is searched: nprobe, or efSearch of a graph; None where neither applies."""
        return self.nprobe or self.ef_search


class Counts(Contract):
    """Counts of the day's items and of the work done for them.

    Attributes:
        items: items in the table; 0 for a withdrawn date.
        new, changed, deleted: items, compared with the base release.
        reused: items whose vector was carried over.
        quarantined: quarantined rows of the plan; after a backfill of some buckets, those of these buckets.
        encoded, tokens: texts and tokens that the model encoded.
        cut_texts, lost_tokens: encoded texts that the limit of the tokens cuts, and estimate of their tokens beyond the
            limit; None in records of format 4.
    """

    items: int
    new: int
    changed: int
    reused: int
    deleted: int
    quarantined: int
    encoded: int
    tokens: int
    cut_texts: int | None = None
    lost_tokens: int | None = None


class AuditFigures(Contract):
    """Measurements of the audit.

    Attributes:
        quarantined_fraction: quarantined rows divided by the rows that the plan read.
        drift: distance between the mean vectors of this and the base release, divided by the base release's standard
            deviation; None without a base release of the same bundle.
        space: shape of the space of the plan's vectors; after a backfill of some buckets, of the vectors in these
            buckets. None for fewer than two vectors, and in records of format 4.
    """

    quarantined_fraction: float
    drift: float | None
    space: SpaceShape | None = None


class Release(Contract):
    """One record of the release log: everything that a reader needs to open a release and to verify it.

    Attributes:
        format_version: format of the record; a record that is read has the current one.
        release_id: ids sort by time of publication.
        ds: date of the snapshot.
        turn: place among the releases of the same ds; readers see the highest turn.
        withdrawn: a roll-back to an earlier date withdrew this date. The record has no items and no files; its other
            fields are those of the withdrawn release.
        retired_at: when retention retired the release; its files stay for the grace period.
        restores: release that a roll-back restored.
        created_at: when the release was published.
        plan_id: the plan that made it.
        supersedes: release of the same ds that readers saw before; None for the first.
        table, index, bundle: the three parts that are published together.
        counts: items and work.
        moments: moments of the day's vectors.
        audit: measurements of the audit.
        quarantine_uri: folder of the quarantine's Parquet files; None when the quarantine is empty.
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
    table: TableFacts
    index: IndexFacts
    bundle: BundleFacts
    counts: Counts
    moments: Moments
    audit: AuditFigures
    quarantine_uri: str | None
    seconds: dict[str, float]
    tokens_per_second: float | None

    @property
    def made_with(self) -> tuple[str, int, str, int, LongTexts]:
        """Bundle, buckets, template, mantissa bits, treatment of long texts: a backfill of some buckets keeps all."""
        table = self.table
        return self.bundle.version, table.buckets, table.template, table.mantissa_bits, table.long_texts

    def facts(self) -> dict[str, Any]:
        """The release as one flat object for schedulers and scripts: the fields of ``marc run --json``."""
        return {
            "release_id": self.release_id,
            "ds": self.ds,
            "table_version": self.table.version,
            "bundle": self.bundle.version,
            **self.counts.model_dump(),
            "mantissa_bits": self.table.mantissa_bits,
            "long_texts": self.table.long_texts,
            "bytes_per_item": self.table.bytes_per_item,
            "recall": self.index.recall,
            "seconds": self.seconds,
            "table_uri": self.table.uri,
            "index_uri": self.index.uri,
            "index_factory": self.index.factory,
            "index_bytes_per_item": self.index.bytes_per_item,
            **self.index.figures.model_dump(),
            **(self.audit.space.model_dump() if self.audit.space else dict.fromkeys(SpaceShape.model_fields)),
        }

    def without_files(self) -> "Release":
        """The same release without items and files, for the record that withdraws its date."""
        return self.model_copy(
            update={
                "table": self.table.model_copy(update={"files": ()}),
                "index": self.index.model_copy(update={"files": ()}),
                "counts": self.counts.model_copy(update={"items": 0}),
            }
        )

    def at_version(self, version: int) -> "Release":
        """The same release, visible in another version of the Delta table."""
        return self.model_copy(update={"table": self.table.model_copy(update={"version": version})})


RELEASES = arrow_schema(Release)
"""Columns of the release log, a small Delta table beside the feature table."""

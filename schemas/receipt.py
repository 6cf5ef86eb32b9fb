"""Receipts: what a worker did, written last, so that a receipt proves its file."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import Field

from schemas.catalogue import Change, Reason
from schemas.files import Contract, PublishedFile
from schemas.release import IndexBuild, IndexFigures, Release


class Receipt(Contract):
    """What one bucket's encode worker did.

    Attributes:
        plan_id, bucket, bundle: the plan, partition and model that it belongs to.
        file: the Parquet file, relative to the table; None for a bucket that became empty.
        encoded: texts that went through the model (identical texts count once).
        reused: vectors carried over from the base release, or shared with an identical text.
        quarantined: items whose texts cannot be encoded, each with its change; they are not in the file.
        quarantine: name of the quarantine's file that holds them; None where there are none.
        tokens: tokens encoded; padded_tokens: those plus padding.
        seconds: wall time of the bucket.
        load_seconds: what loading the model took of it; next to nothing where an earlier bucket had loaded it.
        model_seconds: the model's own time on its device.
        device, dtype: where and how the model ran.
        finished_at: when the receipt was written.
    """

    plan_id: str
    bucket: int
    bundle: str
    file: PublishedFile | None
    encoded: int
    reused: int
    quarantined: dict[str, Change] = Field(default_factory=dict)
    quarantine: str | None = None
    tokens: int
    padded_tokens: int
    seconds: float
    load_seconds: float = 0.0
    model_seconds: float
    device: str
    dtype: str
    finished_at: datetime


class Moments(Contract):
    """What mean and variance of a set of vectors are computed from; sets add up.

    Attributes:
        rows: vectors.
        vector_sum: their sum, length d.
        square_sum: sum of their squared norms.
    """

    rows: int
    vector_sum: tuple[float, ...]
    square_sum: float

    @classmethod
    def of(cls, rows: int, mean: Sequence[float], variance: float) -> "Moments":
        """The moments that a mean (length d) and the trace of a covariance were computed from."""
        square = variance + sum(x * x for x in mean)
        return cls(rows=rows, vector_sum=tuple(rows * x for x in mean), square_sum=rows * square)

    def __add__(self, other: "Moments") -> "Moments":
        """Moments of both sets together."""
        return self._combined(other, 1)

    def __sub__(self, other: "Moments") -> "Moments":
        """Moments of what is left when a subset leaves."""
        return self._combined(other, -1)

    def _combined(self, other: "Moments", sign: int) -> "Moments":
        pairs = zip(self.vector_sum, other.vector_sum, strict=True)
        return Moments(
            rows=self.rows + sign * other.rows,
            vector_sum=tuple(mine + sign * theirs for mine, theirs in pairs),
            square_sum=self.square_sum + sign * other.square_sum,
        )

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean vector, length d; zeros for no vectors."""
        return tuple(x / max(1, self.rows) for x in self.vector_sum)

    @property
    def variance(self) -> float:
        """Trace of the covariance."""
        return max(0.0, self.square_sum / max(1, self.rows) - sum(x * x for x in self.mean))


def day_moments(gained: Moments, lost: Moments, live: Release | None) -> Moments:
    """Moments of the day's vectors: the plan's own, or, for a plan of some buckets, those of the release it changes."""
    return gained if live is None else Moments.of(live.items, live.mean, live.variance) - lost + gained


def quarantined_rows(planned: Mapping[str, int], receipts: Sequence[Receipt]) -> dict[str, int]:
    """Rows in the quarantine by reason: those that the plan put there, and those that could not be encoded."""
    unencodable = sum(len(receipt.quarantined) for receipt in receipts)
    return {**planned, **({Reason.UNENCODABLE.value: unencodable} if unencodable else {})}


class BucketAudit(Contract):
    """What the audit found in one bucket's file.

    ``problems`` are sentences with the value and the limit; empty when the bucket is good. ``moments`` are those of
    the file, ``replaced`` those of the files whose place it takes.
    """

    bucket: int
    problems: tuple[str, ...]
    moments: Moments
    replaced: Moments


class AuditReport(Contract):
    """The gates of one plan and how they went.

    Attributes:
        plan_id: the plan that was audited.
        receipts_digest: names the exact set of receipts that was audited.
        gained, lost: moments of the plan's files, and of the files whose place they take in the day's release.
        quarantined_fraction: quarantined rows / rows read.
        drift: distance of the means over the base release's standard deviation; None without a base
            release of the same bundle.
        problems: why the audit refuses; empty when it passed.
    """

    plan_id: str
    receipts_digest: str
    gained: Moments
    lost: Moments
    quarantined_fraction: float
    drift: float | None
    problems: tuple[str, ...] = ()


class IndexReceipt(Contract):
    """A built index.

    Attributes:
        plan_id: the plan that it was made for.
        files_digest: names the exact set of table files that it holds.
        uri: folder of all indexes, which the files' paths are relative to.
        files: index files with checksums.
        queries_file: queries of the recall, with their exact neighbours.
        factory: FAISS factory string.
        nprobe: inverted lists visited per query; None for an index without lists.
        ef_search: how widely a graph is searched; None without a graph.
        faiss: version that wrote it.
        build: when it was last built from scratch.
        k: neighbours that recall was measured at.
        recall: measured recall@k against exact search.
        queries: how many held-out items measured it.
        figures: what was predicted of it, and measured.
        seconds: wall time of build and measurement.
    """

    plan_id: str
    files_digest: str
    uri: str
    files: tuple[PublishedFile, ...] = Field(min_length=1)
    queries_file: PublishedFile
    factory: str
    nprobe: int | None
    ef_search: int | None
    faiss: str
    build: IndexBuild
    k: int
    recall: float
    queries: int
    figures: IndexFigures
    seconds: float


class TrainedIndex(Contract):
    """A trained, empty index, of which the shards of a plan are made.

    Attributes:
        digest: names what it was trained on, and as what.
        file: where it is in the work area.
    """

    digest: str
    file: PublishedFile

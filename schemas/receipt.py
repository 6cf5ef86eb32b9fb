"""Receipts: what a worker did, written last, so that a receipt proves its file."""

from datetime import datetime

from pydantic import Field

from schemas.files import Contract, PublishedFile


class Receipt(Contract):
    """What one bucket's encode worker did.

    Attributes:
        plan_id, bucket, bundle: the plan, partition and model that it belongs to.
        file: the Parquet file, relative to the table; None for a bucket that became empty.
        encoded: texts that went through the model (identical texts count once).
        reused: vectors carried over from the base release, or shared with an identical text.
        tokens: tokens encoded; padded_tokens: those plus padding.
        seconds: wall time of the bucket; model_seconds: of the model alone.
        device, dtype: where and how the model ran.
        gpu: address that Spark's resource scheduling handed to the task.
        finished_at: when the receipt was written.
    """

    plan_id: str
    bucket: int
    bundle: str
    file: PublishedFile | None
    encoded: int
    reused: int
    tokens: int
    padded_tokens: int
    seconds: float
    model_seconds: float
    device: str
    dtype: str
    gpu: str | None
    finished_at: datetime


class BucketAudit(Contract):
    """What the audit found in one bucket's file.

    ``problems`` are sentences with the value and the limit; empty when the bucket is good.
    ``vector_sum`` (length d) and ``square_sum`` are the moments that drift is computed from.
    """

    bucket: int
    rows: int
    problems: tuple[str, ...]
    vector_sum: tuple[float, ...]
    square_sum: float


class AuditReport(Contract):
    """The gates of one plan and how they went.

    Attributes:
        plan_id: the plan that was audited.
        receipts_digest: names the exact set of receipts that was audited.
        rows: rows in all files.
        quarantined_fraction: quarantined rows / rows read.
        mean: mean vector, length d.
        variance: trace of the covariance.
        drift: distance of the means over the base release's standard deviation; None without a base
            release of the same bundle.
        problems: why the audit refuses; empty when it passed.
    """

    plan_id: str
    receipts_digest: str
    rows: int
    quarantined_fraction: float
    mean: tuple[float, ...]
    variance: float
    drift: float | None
    problems: tuple[str, ...] = ()


class IndexReceipt(Contract):
    """A built index.

    Attributes:
        plan_id, receipts_digest: the plan and the exact files it was built from.
        uri: folder of the files.
        files: index files with checksums.
        factory: FAISS factory string.
        nprobe: inverted lists visited per query; None for an index without lists.
        k: neighbours that recall was measured at.
        recall: measured recall@k against exact search.
        queries: how many queries measured it.
        seconds: wall time of build and measurement.
    """

    plan_id: str
    receipts_digest: str
    uri: str
    files: tuple[PublishedFile, ...] = Field(min_length=1)
    factory: str
    nprobe: int | None
    k: int
    recall: float
    queries: int
    seconds: float

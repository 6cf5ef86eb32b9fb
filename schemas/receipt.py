"""Receipts: what a worker did, written last, so that a receipt proves its file."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

from schemas.catalogue import Change, Reason
from schemas.files import Contract, PublishedFile
from schemas.moments import Moments
from schemas.release import AuditFigures, IndexFacts, Release


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
        waited_seconds: how long the model waited for tokens.
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
    quarantined: dict[str, Change] = Field(default_factory=dict)
    quarantine: str | None = None
    tokens: int
    padded_tokens: int
    seconds: float
    load_seconds: float = 0.0
    model_seconds: float
    waited_seconds: float = 0.0
    device: str
    dtype: str
    gpu: str | None
    finished_at: datetime


def day_moments(gained: Moments, lost: Moments, live: Release | None) -> Moments:
    """Moments of the day's vectors: those of the plan, or, for a plan of some buckets, the live release's updated."""
    return gained if live is None else live.moments - lost + gained


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
    """Result of the gates of one plan.

    Attributes:
        plan_id: the plan that was audited.
        receipts_digest: identifies the set of receipts that was audited.
        gained, lost: moments of the plan's files, and of the files that they replace in the day's release.
        figures: measurements, as the release repeats them.
        problems: why the audit refuses the plan; empty when it passed.
    """

    plan_id: str
    receipts_digest: str
    gained: Moments
    lost: Moments
    figures: AuditFigures
    problems: tuple[str, ...] = ()


def _has_files(index: IndexFacts) -> IndexFacts:
    if not index.files:
        raise ValueError("an index has at least one file")
    return index


class IndexReceipt(Contract):
    """An index that was built and measured.

    Attributes:
        plan_id: the plan that it was made for.
        files_digest: identifies the set of table files that it holds.
        index: the index, as the release repeats it.
        seconds: wall time of build and measurement.
    """

    plan_id: str
    files_digest: str
    index: Annotated[IndexFacts, AfterValidator(_has_files)]
    seconds: float


class TrainedIndex(Contract):
    """A trained, empty index, of which the shards of a plan are made.

    Attributes:
        digest: names what it was trained on, and as what.
        file: where it is in the work area.
    """

    digest: str
    file: PublishedFile

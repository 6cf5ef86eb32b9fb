"""Receipts and reports that stages pass on. A receipt is written after its file: it shows that the file is complete."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated

from pydantic import AfterValidator, Field

from marc_schemas.catalogue import Change, Reason
from marc_schemas.files import Contract, PublishedFile
from marc_schemas.moments import Moments
from marc_schemas.release import AuditFigures, IndexFacts, Release


class Receipt(Contract):
    """Result of encoding one bucket.

    Attributes:
        plan_id, bucket, bundle: the plan, partition and model of the bucket.
        file: the Parquet file, relative to the table; None for a bucket that became empty.
        encoded: texts that the model encoded; identical texts count once.
        reused: vectors carried over from the base release, or shared with an identical text.
        quarantined: change of each item whose text cannot be encoded; the file does not contain these items.
        quarantine: name of their quarantine file; None without such items.
        tokens: encoded tokens.
        padded_tokens: encoded tokens and padding.
        cut_texts, lost_tokens: texts that the limit of the tokens cuts, and estimate of their tokens beyond the limit.
        seconds: wall time of the bucket.
        load_seconds: part of it spent on loading the model; close to 0 when an earlier bucket loaded the model.
        model_seconds: computing time of the model on its device.
        device, dtype: device and number format of the model.
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
    cut_texts: int = 0
    lost_tokens: int = 0
    seconds: float
    load_seconds: float = 0.0
    model_seconds: float
    device: str
    dtype: str
    finished_at: datetime


def day_moments(gained: Moments, lost: Moments, live: Release | None) -> Moments:
    """Moments of the day's vectors.

    Args:
        gained: moments of the plan's files.
        lost: moments of the files that they replace.
        live: the day's release that a plan of some buckets changes; None for a plan of the whole date.
    """
    return gained if live is None else live.moments - lost + gained


def quarantined_rows(planned: Mapping[str, int], receipts: Sequence[Receipt]) -> dict[str, int]:
    """Number of quarantined rows by reason: rows that the plan refused, and texts that could not be encoded."""
    unencodable = sum(len(receipt.quarantined) for receipt in receipts)
    return {**planned, **({Reason.UNENCODABLE.value: unencodable} if unencodable else {})}


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
        files_digest: identifies the set of table files in the index.
        index: the index, as the release repeats it.
        seconds: wall time of build and measurement.
    """

    plan_id: str
    files_digest: str
    index: Annotated[IndexFacts, AfterValidator(_has_files)]
    seconds: float


class TrainedIndex(Contract):
    """A trained, empty index; every shard of the plan starts as a copy of it.

    Attributes:
        digest: identifies the training vectors and the settings.
        file: the index in the work area.
    """

    digest: str
    file: PublishedFile

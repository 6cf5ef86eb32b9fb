"""Releases that no run published, and copies of records with nested fields changed."""

from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import BaseModel

from schemas.files import PublishedFile
from schemas.moments import Moments
from schemas.release import (
    AuditFigures,
    BundleFacts,
    Counts,
    IndexBuild,
    IndexFacts,
    IndexFigures,
    Release,
    TableFacts,
)

Record = TypeVar("Record", bound=BaseModel)


def altered(record: Record, **changes: Any) -> Record:
    """A copy with fields changed; ``index__build__changed=2`` changes a field of a nested model."""
    update: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        field, _, rest = name.partition("__")
        assert field in type(record).model_fields, f"{type(record).__name__} has no field {field}"
        if rest:
            nested.setdefault(field, {})[rest] = value
        else:
            update[field] = value
    update |= {field: altered(getattr(record, field), **some) for field, some in nested.items()}
    return record.model_copy(update=update)


def unpublished(*, dim: int = 8, **changes: Any) -> Release:
    """A release without files or items; ``changes`` as for :func:`altered`."""
    file = PublishedFile(path="none", bytes=0, sha256="")
    nothing = (0.0,) * dim
    release = Release(
        release_id="none",
        ds="2026-11-20",
        turn=1,
        created_at=datetime(2026, 11, 20, 12, tzinfo=UTC),
        plan_id="none",
        supersedes=None,
        table=TableFacts(uri="", version=1, files=(), dim=dim, buckets=4, template="{title}", mantissa_bits=23),
        index=IndexFacts(
            uri="",
            files=(),
            queries_file=file,
            factory="Flat",
            nprobe=None,
            ef_search=None,
            faiss="",
            build=IndexBuild(items=0, nprobe=None, mean=nothing),
            k=10,
            recall=1.0,
            recall_queries=1,
            figures=IndexFigures(memory_bytes=0, recall_low=1, recall_high=1, latency_ms=0, queries_per_second=0),
        ),
        bundle=BundleFacts(version="b", uri="", card_file=file),
        counts=Counts(**dict.fromkeys(Counts.model_fields, 0)),
        moments=Moments(rows=0, vector_sum=nothing, square_sum=0.0),
        audit=AuditFigures(quarantined_fraction=0.0, drift=None),
        quarantine_uri=None,
        seconds={"encode": 1.0},
        tokens_per_second=100.0,
    )
    return altered(release, **changes)

"""A plan: what one run will do, bucket by bucket."""

import math
from datetime import datetime

from marc_schemas.files import Contract, PublishedFile

FORMAT_VERSION = 4


class SourceFile(Contract):
    """One file of the day's catalogue; ``digest`` is its SHA-256, or the store's ETag."""

    uri: str
    bytes: int
    digest: str


class BucketPlan(Contract):
    """The work of one bucket.

    Attributes:
        bucket: number, ``0 <= bucket < plan.buckets``.
        items: rows that the bucket's file will hold = new + changed + unchanged.
        new, changed, unchanged, deleted: against the base release.
        tokens: tokens that the new and changed texts cost, special tokens included, truncated at the
            bundle's maximum; estimated from a sample in large buckets.
        tokens_error: half-width of the estimate's 95 % interval, in tokens; 0 where ``tokens`` is exact.
        previous: files of the base release that unchanged vectors are carried over from.
    """

    bucket: int
    items: int
    new: int
    changed: int
    unchanged: int
    deleted: int
    tokens: int
    tokens_error: float = 0.0
    previous: tuple[PublishedFile, ...] = ()


class Plan(Contract):
    """What a run will do; everything written before the release is keyed by its ``plan_id``.

    Attributes:
        plan_id: hash of ds, catalogue, bundle, template, table settings, chosen buckets, and of the release that is to
            be computed anew.
        ds: date of the snapshot, ``YYYY-MM-DD``.
        created_at: when the plan was made.
        catalogue: files that were read, with digests.
        bundle: version of the bundle that encodes.
        bundle_uri: folder of that bundle.
        dim: length d of the vectors.
        template: text template that was rendered.
        buckets: number of buckets of the table.
        mantissa_bits: that vectors are rounded to when they are written.
        chosen: buckets of a backfill, which leaves all others as they are; None for the whole day.
        base_release: release that the catalogue was compared with; None on the first night.
        live_release: the last release of this ds when the plan was made, also one that withdrew it: what it will
            supersede.
        rows_read: rows in the catalogue, good or not.
        quarantined: rows in the quarantine, by reason.
        work: one entry per bucket that holds or held items.
        tokens_exact: False where ``tokens`` is estimated from a sample.
        tokens_per_second: measured by the largest run that encoded with this bundle; None before the first.
        start_seconds: what starting the encode stage took in the latest runs, loading the model in its workers
            included.
        parallel: buckets that are encoded at a time.
    """

    format_version: int = FORMAT_VERSION
    plan_id: str
    ds: str
    created_at: datetime
    catalogue: tuple[SourceFile, ...]
    bundle: str
    bundle_uri: str
    dim: int
    template: str
    buckets: int
    mantissa_bits: int
    chosen: tuple[int, ...] | None
    base_release: str | None
    live_release: str | None
    rows_read: int
    quarantined: dict[str, int]
    work: tuple[BucketPlan, ...]
    tokens_exact: bool
    tokens_per_second: float | None
    start_seconds: float = 0.0
    parallel: int = 1

    @property
    def header(self) -> "Plan":
        """The plan without catalogue files and buckets, small enough for every Spark task to carry."""
        return self.model_copy(update={"catalogue": (), "work": ()})

    @property
    def items(self) -> int:
        """Items that the planned buckets will hold."""
        return sum(b.items for b in self.work)

    @property
    def new(self) -> int:
        """Items that the base release does not hold."""
        return sum(b.new for b in self.work)

    @property
    def changed(self) -> int:
        """Items whose text or bundle changed, or whose vector is not precise enough to be carried over."""
        return sum(b.changed for b in self.work)

    @property
    def unchanged(self) -> int:
        """Items whose vector is carried over."""
        return sum(b.unchanged for b in self.work)

    @property
    def deleted(self) -> int:
        """Items of the base release that are gone from the catalogue."""
        return sum(b.deleted for b in self.work)

    @property
    def tokens(self) -> int:
        """Tokens that will be encoded."""
        return sum(b.tokens for b in self.work)

    @property
    def tokens_error(self) -> float:
        """Half-width of the 95 % interval of ``tokens``; buckets are sampled independently: their variances add up."""
        return math.hypot(*(b.tokens_error for b in self.work))

    @property
    def seconds(self) -> float | None:
        """Estimated time of the encode stage from measured throughput; None before the first measurement."""
        if not self.tokens_per_second:
            return None
        # The largest bucket takes its time, also where nothing else is left to do.
        tokens = max(self.tokens, self.parallel * max((b.tokens for b in self.work), default=0))
        return self.start_seconds + tokens / self.tokens_per_second if tokens else 0.0

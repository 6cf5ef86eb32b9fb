"""A plan: the work of one run, bucket by bucket."""

import math
from datetime import datetime

from marc_schemas.bundle import LongTexts
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
        bucket: number of the bucket, ``0 <= bucket < plan.buckets``.
        items: rows of the new file = new + changed + unchanged.
        new, changed, unchanged, deleted: items, compared with the base release.
        tokens: tokens of the new and changed texts, special tokens included, without those beyond the bundle's
            maximum if long texts are cut; estimated from a sample in large buckets.
        tokens_error: half-width of the estimate's 95 % interval, in tokens; 0 if ``tokens`` is exact.
        cut_texts: new and changed texts that are cut at the bundle's maximum; estimated if ``tokens`` is.
        lost_tokens: estimate of their tokens beyond the maximum.
        previous: files of the base release with the vectors to carry over.
    """

    bucket: int
    items: int
    new: int
    changed: int
    unchanged: int
    deleted: int
    tokens: int
    tokens_error: float = 0.0
    cut_texts: int = 0
    lost_tokens: int = 0
    previous: tuple[PublishedFile, ...] = ()


class Plan(Contract):
    """The work of a run; all files written before the release are keyed by its ``plan_id``.

    Attributes:
        plan_id: hash of ds, catalogue, bundle, template, table settings, chosen buckets, and of the release to
            recompute.
        ds: date of the snapshot, ``YYYY-MM-DD``.
        created_at: time of the plan.
        catalogue: files of the catalogue, with digests.
        bundle: version of the bundle that encodes.
        bundle_uri: folder of that bundle.
        dim: length d of the vectors.
        template: text template, with the version of the cleaning rules.
        buckets: number of buckets of the table.
        mantissa_bits: precision of the stored vectors.
        long_texts: whether texts beyond the bundle's maximum are cut or pooled.
        chosen: buckets of a backfill, which keeps all others; None for the whole date.
        base_release: release that the catalogue was compared with; None in the first run.
        live_release: last release of this date when the plan was made, possibly a withdrawal; the run supersedes it.
        rows_read: rows of the catalogue, usable or not.
        quarantined: quarantined rows by reason.
        work: one entry per bucket that has or had items.
        tokens_exact: False if ``tokens`` is estimated from a sample.
        tokens_per_second: throughput of the largest run with this bundle; None before the first run.
        start_seconds: start-up time of the encode stage in the latest runs, including loading the model.
        parallel: number of buckets that are encoded at the same time.
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
    long_texts: LongTexts = "cut"
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
        """Items in the planned buckets."""
        return sum(b.items for b in self.work)

    @property
    def new(self) -> int:
        """Items that the base release lacks."""
        return sum(b.new for b in self.work)

    @property
    def changed(self) -> int:
        """Items whose text or bundle changed, or whose stored vector is not precise enough."""
        return sum(b.changed for b in self.work)

    @property
    def unchanged(self) -> int:
        """Items whose vector is carried over."""
        return sum(b.unchanged for b in self.work)

    @property
    def deleted(self) -> int:
        """Items of the base release that the catalogue lacks."""
        return sum(b.deleted for b in self.work)

    @property
    def tokens(self) -> int:
        """Tokens to encode."""
        return sum(b.tokens for b in self.work)

    @property
    def tokens_error(self) -> float:
        """Half-width of the 95 % interval of ``tokens``, whose variances add up over buckets."""
        return math.hypot(*(b.tokens_error for b in self.work))

    @property
    def cut_texts(self) -> int:
        """Texts to encode that are cut at the bundle's maximum."""
        return sum(b.cut_texts for b in self.work)

    @property
    def lost_tokens(self) -> int:
        """Estimate of their tokens beyond the maximum."""
        return sum(b.lost_tokens for b in self.work)

    @property
    def seconds(self) -> float | None:
        """Estimated time of the encode stage from measured throughput; None before the first measurement."""
        if not self.tokens_per_second:
            return None
        # The stage takes at least as long as its largest bucket.
        tokens = max(self.tokens, self.parallel * max((b.tokens for b in self.work), default=0))
        return self.start_seconds + tokens / self.tokens_per_second if tokens else 0.0

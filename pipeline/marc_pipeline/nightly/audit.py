"""The audit stage: verify every file of a plan and refuse a snapshot that fails a gate."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings
from marc_pipeline.errors import CorruptFile, GateRefused
from marc_pipeline.model.space import degenerate, sample_rows, space_shape
from marc_pipeline.resources import TaskResources
from marc_pipeline.table.precision import round_mantissas, rounding_error
from marc_pipeline.table.rows import read_rows, read_whole
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import ITEMS, Reason
from marc_schemas.feature_table import bucket_number, file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import ROW_ID_MASK, receipts_digest, row_id
from marc_schemas.moments import Moments
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import AuditReport, Receipt, day_moments, quarantined_rows
from marc_schemas.release import AuditFigures, Release

UNIT_TOLERANCE = 1e-3
# The index computes inner products in float32, whose range is 1.4e-45 to 3.4e38.
LONGEST, SMALLEST_SQUARE = 1e19, 2.0**-149
# A run with few texts to encode would exceed any fraction with a handful of failures.
ALLOWED_FAILURES = 10
COLUMNS = ["item_id", "row_id", "vector", "content_hash", "bundle"]
REPORTED_PROBLEMS = 10

Matrix = NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditTask:
    """Inputs of the audit of one bucket; sent to Spark's Python workers.

    Attributes:
        plan: without its buckets.
        normalised: whether the bundle makes vectors of unit length.
        replaced: files that the bucket's file replaces in the day's release.
        share: share of the rows in the sample for the shape of the space, from 0 to 1.
    """

    workspace: Workspace
    table_uri: str
    plan: Plan
    normalised: bool
    work: BucketPlan
    receipt: Receipt
    replaced: tuple[PublishedFile, ...]
    share: float


@dataclass(frozen=True, eq=False)
class BucketAudit:
    """Result of the audit of one bucket's file; sent back by Spark's Python workers.

    Attributes:
        bucket: number of the bucket.
        problems: sentences with the value and the limit; empty when the bucket passed.
        moments: moments of the file.
        replaced: moments of the files that it replaces.
        sample: random vectors of the file [n, d]. Rows travel, not the d × d matrices of the buckets: 1,024 matrices
            of d = 1,024 have 8 GiB, the samples of all buckets together have :func:`sample_rows` vectors.
    """

    bucket: int
    problems: tuple[str, ...]
    moments: Moments
    replaced: Moments
    sample: Matrix


def audit_tasks(
    workspace: Workspace,
    plan: Plan,
    receipts: Sequence[Receipt],
    *,
    table_uri: str,
    normalised: bool,
    base: Release | None = None,
) -> list[AuditTask]:
    """Return one task per bucket; ``base`` is the release that the plan was compared with."""
    # A plan of a whole date replaces no files.
    old = base.table.files if plan.chosen and base else ()
    share = min(1.0, sample_rows(plan.dim) / max(1, plan.items))
    return [
        AuditTask(
            workspace=workspace,
            table_uri=table_uri,
            plan=plan.header,
            normalised=normalised,
            work=work,
            receipt=receipt,
            replaced=tuple(file for file in old if bucket_number(file.path) == work.bucket),
            share=share,
        )
        for work, receipt in zip(plan.work, receipts, strict=True)
    ]


def audit_bucket(task: AuditTask, _resources: TaskResources) -> BucketAudit:
    """Verify every byte of a bucket's file, and compare its rows with the items of the plan."""
    rows = empty = file_schema(task.plan.dim).empty_table().select(COLUMNS)
    problems: list[str] = []
    if task.receipt.file is not None:
        try:
            rows = read_whole(task.workspace.storage, task.table_uri, task.receipt.file, columns=COLUMNS)
        except CorruptFile as error:
            problems.append(str(error))
    elif missing := task.work.items - len(task.receipt.quarantined):
        problems.append(f"{missing} planned items, but no file")
    if rows.num_rows:
        problems += [*_identity_problems(task, rows), *_vector_problems(task, rows)]
    sound = empty if problems else rows
    moments = _moments(sound, task.plan.dim)
    return BucketAudit(
        bucket=task.work.bucket,
        problems=tuple(f"bucket {task.work.bucket}: {problem}" for problem in problems),
        moments=moments,
        replaced=_replaced(task, moments),
        sample=_sample(sound, task.share),
    )


def apply_gates(
    plan: Plan,
    audits: Sequence[BucketAudit],
    receipts: Sequence[Receipt],
    *,
    base: Release | None,
    settings: AuditSettings,
) -> AuditReport:
    """Combine the audits of the buckets, and compare the whole snapshot with the thresholds.

    The shape of the space is that of the plan's files. A backfill of some buckets measures these buckets alone: the
    other buckets of the date passed an audit before.

    Args:
        plan: the plan that the receipts belong to.
        audits: one per bucket.
        receipts: receipts of the audited files.
        base: the release that the plan was compared with.
        settings: the thresholds.
    """
    none = Moments(rows=0, vector_sum=(0.0,) * plan.dim, square_sum=0.0)
    gained, lost = sum((a.moments for a in audits), start=none), sum((a.replaced for a in audits), start=none)
    day = day_moments(gained, lost, base if plan.chosen else None)
    problems = [problem for audit in audits for problem in audit.problems]
    # A bucket with problems has no moments, so its rows are missing from the sum.
    if not problems:
        expected = plan.items - sum(len(receipt.quarantined) for receipt in receipts)
        if gained.rows != expected:
            problems.append(f"the files contain {gained.rows:,} rows, the plan has {expected:,} items")
        elif day.rows == 0:
            problems.append("the snapshot is empty: no row of the catalogue could be used")
    quarantined = quarantined_rows(plan.quarantined, receipts)
    fraction = sum(quarantined.values()) / max(1, plan.rows_read)
    drift = _drift(plan, day, base)
    problems += _quarantine_problems(plan, receipts, quarantined, fraction, limit=settings.max_quarantined_fraction)
    collided = quarantined.get(Reason.ROW_ID_COLLISION, 0)
    if collided > settings.max_collisions:
        problems.append(
            f"{collided:,} items have the row id of another item, "
            f"audit.max_collisions allows {settings.max_collisions:,}"
        )
    problems += _deletion_problems(plan, lost, base, limit=settings.max_deleted_fraction)
    if base and drift is not None and drift > settings.max_drift:
        problems.append(
            f"the mean vector moved by {drift:.3f} standard deviations since release {base.release_id}, "
            f"audit.max_drift allows {settings.max_drift}"
        )
    sample = np.concatenate([np.zeros((0, plan.dim), np.float32), *(audit.sample for audit in audits)])
    space = space_shape(sample) if len(sample) > 1 else None
    if space is not None:
        problems += degenerate(space, settings, rows=len(sample), dim=plan.dim)
    return AuditReport(
        plan_id=plan.plan_id,
        receipts_digest=receipts_digest(receipts),
        gained=gained,
        lost=lost,
        figures=AuditFigures(quarantined_fraction=fraction, drift=drift, space=space),
        problems=tuple(problems),
    )


def require_passed(report: AuditReport) -> None:
    """Refuse the plan unless every gate passed.

    Raises:
        GateRefused: a gate failed; the message names the first ten problems.
    """
    if report.problems:
        shown = "; ".join(report.problems[:REPORTED_PROBLEMS])
        left = len(report.problems) - REPORTED_PROBLEMS
        more = f"; and {left} more" if left > 0 else ""
        raise GateRefused(f"the audit refuses plan {report.plan_id}: {shown}{more}. Nothing was published")


def _quarantine_problems(
    plan: Plan, receipts: Sequence[Receipt], quarantined: dict[str, int], fraction: float, *, limit: float
) -> list[str]:
    problems = []
    if fraction > limit:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in quarantined.items())
        problems.append(
            f"{fraction:.1%} of {plan.rows_read:,} rows are quarantined ({reasons}), "
            f"audit.max_quarantined_fraction allows {limit:.1%}"
        )
    unencodable = quarantined.get(Reason.UNENCODABLE, 0)
    tried = unencodable + sum(receipt.encoded for receipt in receipts)
    if unencodable > max(ALLOWED_FAILURES, limit * tried):
        problems.append(
            f"{unencodable:,} of {tried:,} texts cannot be encoded, audit.max_quarantined_fraction allows "
            f"{limit:.1%} of them, and {ALLOWED_FAILURES} in any case"
        )
    return problems


def _deletion_problems(plan: Plan, lost: Moments, base: Release | None, *, limit: float) -> list[str]:
    before = lost.rows if plan.chosen else base.counts.items if base else 0
    if not before or plan.deleted / before <= limit:
        return []
    where = f" in buckets {list(plan.chosen)}" if plan.chosen else ""
    return [
        f"{plan.deleted:,} of the base release's {before:,} items{where} would be deleted, "
        f"audit.max_deleted_fraction allows {limit:.1%}"
    ]


def _drift(plan: Plan, day: Moments, base: Release | None) -> float | None:
    """Distance of the mean vectors in standard deviations of the base; None for a base of another bundle."""
    if base is None or base.bundle.version != plan.bundle:
        return None
    return math.dist(day.mean, base.moments.mean) / math.sqrt(base.moments.variance or 1.0)


def _identity_problems(task: AuditTask, rows: pa.Table) -> list[str]:
    plan, bucket = task.plan, task.work.bucket
    filesystem, path = task.workspace.storage.filesystem(task.workspace.items_uri(bucket, plan.base_release))
    planned = pq.read_table(path, filesystem=filesystem, columns=["item_id", "content_hash"], schema=ITEMS)
    if task.receipt.quarantined:
        gone = pa.array(list(task.receipt.quarantined), pa.string())
        planned = planned.filter(pc.invert(pc.is_in(planned["item_id"], value_set=gone)))
    ids, stored = rows["item_id"], rows["row_id"].to_numpy()
    hashed = np.fromiter((row_id(i) for i in ids.to_pylist()), np.int64, rows.num_rows)
    same_ids, same_row_ids = ids.equals(planned["item_id"]), np.array_equal(hashed, stored)
    duplicates = rows.num_rows - pc.count_distinct(ids).as_py()
    others = set(rows["bundle"].unique().to_pylist()) - {plan.bundle}
    faults = [
        (duplicates, f"{duplicates} duplicate item ids"),
        (not same_ids, f"its {rows.num_rows} item ids or their order differ from the {planned.num_rows} planned ids"),
        (
            same_ids and not rows["content_hash"].equals(planned["content_hash"]),
            "content hashes differ from the plan's",
        ),
        (not same_row_ids, "row ids are not the hashes of their item ids"),
        (same_row_ids and len(np.unique(stored)) != len(stored), "two items share a row id"),
        (np.any(stored % plan.buckets != bucket), "items of another bucket"),
        (others, f"vectors of bundle {sorted(others)} instead of {plan.bundle}"),
    ]
    return [problem for found, problem in faults if found]


def _vector_problems(task: AuditTask, rows: pa.Table) -> list[str]:
    size, bits = rows.schema.field("vector").type.list_size, task.plan.mantissa_bits
    if size != task.plan.dim:
        return [f"vectors have {size} dimensions, the bundle makes {task.plan.dim}"]
    vectors = _vectors(rows)  # [n, d]
    finite = np.isfinite(vectors.sum(axis=1, dtype=np.float64))
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    norms, zero = np.sqrt(squares), squares < SMALLEST_SQUARE
    skewed = finite & ~zero & (np.abs(norms - 1) > UNIT_TOLERANCE + rounding_error(bits))
    faults = [
        (~finite, "contain NaN or infinity"),
        (zero, "are zero"),
        (finite & (norms > LONGEST), "are too long for inner products in float32"),
        (skewed & task.normalised, "are not normalised"),
        (finite & (round_mantissas(vectors, bits) != vectors).any(axis=1), f"have more than {bits} mantissa bits"),
    ]
    return [
        f"{int(rows_at_fault.sum())} vectors {fault}, "
        f"the first is of item {rows['item_id'][int(np.argmax(rows_at_fault))].as_py()!r}"
        for rows_at_fault, fault in faults
        if rows_at_fault.any()
    ]


def _vectors(rows: pa.Table) -> Matrix:
    column = rows["vector"].combine_chunks()
    flat: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(rows.num_rows, column.type.list_size)


def _sample(rows: pa.Table, share: float) -> Matrix:
    """Return the vectors of a random share of the rows. Row ids are hashes: each night draws nearly the same items."""
    chosen: Matrix = _vectors(rows)[rows["row_id"].to_numpy() / ROW_ID_MASK <= share]
    return chosen


def _moments(rows: pa.Table, dim: int) -> Moments:
    vectors = _vectors(rows).astype(np.float64) if rows.num_rows else np.zeros((0, dim))
    square = float(np.square(vectors).sum())
    return Moments(rows=rows.num_rows, vector_sum=tuple(vectors.sum(axis=0).tolist()), square_sum=square)


def _replaced(task: AuditTask, new: Moments) -> Moments:
    """Moments of the files that the bucket's file replaces.

    A damaged file counts with its number of rows and with the mean and the variance of the new file.
    """
    try:
        tables = [read_rows(task.workspace.storage, task.table_uri, file, columns=["vector"]) for file in task.replaced]
    except CorruptFile as error:
        log.warning("audit: bucket %d replaces a damaged file: %s", task.work.bucket, error)
        return Moments.of(sum(file.rows for file in task.replaced), new.mean, new.variance)
    return sum((_moments(table, task.plan.dim) for table in tables), start=_moments(pa.table({}), task.plan.dim))

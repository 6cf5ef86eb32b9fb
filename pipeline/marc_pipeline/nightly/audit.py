"""The audit stage: what a snapshot must satisfy before anybody sees it."""

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
from marc_pipeline.resources import TaskResources
from marc_pipeline.table.precision import round_mantissas, rounding_error
from marc_pipeline.table.rows import read_rows, read_whole
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import ITEMS, Reason
from marc_schemas.feature_table import bucket_number, file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import receipts_digest, row_id
from marc_schemas.moments import Moments
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import AuditReport, BucketAudit, Receipt, day_moments, quarantined_rows
from marc_schemas.release import AuditFigures, Release

UNIT_TOLERANCE = 1e-3
# The index multiplies in float32, which ends at 3.4e38 and begins at 1.4e-45.
LONGEST, SMALLEST_SQUARE = 1e19, 2.0**-149
# So many texts may fail whatever share they are: a quiet night has few to encode.
FEW = 10
COLUMNS = ["item_id", "row_id", "vector", "content_hash", "bundle"]

Matrix = NDArray[np.float32]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditTask:
    """Everything that the auditor of one bucket needs; travels to Spark's Python workers."""

    workspace: Workspace
    table_uri: str
    bundle: str
    dim: int
    buckets: int
    normalised: bool
    mantissa_bits: int
    base: str | None
    work: BucketPlan
    receipt: Receipt
    replaced: tuple[PublishedFile, ...]


def audit_tasks(
    workspace: Workspace,
    plan: Plan,
    receipts: Sequence[Receipt],
    *,
    table_uri: str,
    normalised: bool,
    base: Release | None = None,
) -> list[AuditTask]:
    """One task per bucket; ``base`` is the release that the plan was compared with."""
    # A whole day takes nobody's place: its moments are its own.
    old = base.table.files if plan.chosen and base else ()
    return [
        AuditTask(
            workspace=workspace,
            table_uri=table_uri,
            bundle=plan.bundle,
            dim=plan.dim,
            buckets=plan.buckets,
            normalised=normalised,
            mantissa_bits=plan.mantissa_bits,
            base=plan.base_release,
            work=work,
            receipt=receipt,
            replaced=tuple(file for file in old if bucket_number(file.path) == work.bucket),
        )
        for work, receipt in zip(plan.work, receipts, strict=True)
    ]


def audit_bucket(task: AuditTask, _resources: TaskResources) -> BucketAudit:
    """Verify every byte of a bucket's file, and compare its rows with the items of the plan."""
    rows = file_schema(task.dim).empty_table().select(COLUMNS)
    problems: list[str] = []
    if task.receipt.file is not None:
        try:
            rows = read_whole(task.workspace.storage, task.table_uri, task.receipt.file, columns=COLUMNS)
        except CorruptFile as error:
            problems.append(str(error))
    elif missing := task.work.items - len(task.receipt.quarantined):
        problems.append(f"{missing} items and no file")
    if rows.num_rows:
        problems += [*_identity_problems(task, rows), *_vector_problems(task, rows)]
    moments = _moments(rows, task.dim) if not problems else _moments(rows.slice(0, 0), task.dim)
    return BucketAudit(
        bucket=task.work.bucket,
        problems=tuple(f"bucket {task.work.bucket}: {problem}" for problem in problems),
        moments=moments,
        replaced=_replaced(task, moments),
    )


def judge(
    plan: Plan,
    audits: Sequence[BucketAudit],
    receipts: Sequence[Receipt],
    *,
    base: Release | None,
    settings: AuditSettings,
) -> AuditReport:
    """Combine the buckets and apply the gates of the whole snapshot.

    Args:
        plan: what was planned.
        audits: one per bucket.
        receipts: what was audited.
        base: the release the plan was compared with.
        settings: thresholds.
    """
    none = Moments(rows=0, vector_sum=(0.0,) * plan.dim, square_sum=0.0)
    gained, lost = sum((a.moments for a in audits), start=none), sum((a.replaced for a in audits), start=none)
    rows = gained.rows
    problems = [problem for audit in audits for problem in audit.problems]
    day = day_moments(gained, lost, base if plan.chosen else None)
    # Of a bad bucket, the rows do not count.
    expected = plan.items - sum(len(receipt.quarantined) for receipt in receipts)
    if rows != expected and not problems:
        problems.append(f"the files hold {rows:,} rows, the plan has {expected:,} items")
    if day.rows == 0 and not problems:
        problems.append("the snapshot is empty: no row of the catalogue could be used")
    quarantined = quarantined_rows(plan.quarantined, receipts)
    fraction = sum(quarantined.values()) / max(1, plan.rows_read)
    if fraction > settings.max_quarantined_fraction:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in quarantined.items())
        problems.append(
            f"{fraction:.1%} of {plan.rows_read:,} rows are quarantined ({reasons}), "
            f"audit.max_quarantined_fraction allows {settings.max_quarantined_fraction:.1%}"
        )
    unencodable = quarantined.get(Reason.UNENCODABLE, 0)
    tried = unencodable + sum(receipt.encoded for receipt in receipts)
    if unencodable > max(FEW, settings.max_quarantined_fraction * tried):
        problems.append(
            f"{unencodable:,} of {tried:,} texts cannot be encoded, audit.max_quarantined_fraction allows "
            f"{settings.max_quarantined_fraction:.1%} of them, and {FEW} in any case"
        )
    before = lost.rows if plan.chosen else base.counts.items if base else 0
    if before and plan.deleted / before > settings.max_deleted_fraction:
        where = f" in buckets {list(plan.chosen)}" if plan.chosen else ""
        problems.append(
            f"{plan.deleted:,} of the base release's {before:,} items{where} are gone, "
            f"audit.max_deleted_fraction allows {settings.max_deleted_fraction:.1%}"
        )
    drift = None
    if base is not None and base.bundle.version == plan.bundle:
        drift = math.dist(day.mean, base.moments.mean) / math.sqrt(base.moments.variance or 1.0)
        if drift > settings.max_drift:
            problems.append(
                f"the mean vector moved by {drift:.3f} standard deviations since release {base.release_id}, "
                f"audit.max_drift allows {settings.max_drift}"
            )
    return AuditReport(
        plan_id=plan.plan_id,
        receipts_digest=receipts_digest(receipts),
        gained=gained,
        lost=lost,
        figures=AuditFigures(quarantined_fraction=fraction, drift=drift),
        problems=tuple(problems),
    )


def require_passed(report: AuditReport) -> None:
    """Stop here unless every gate passed.

    Raises:
        GateRefused: with every problem, ten at most.
    """
    if report.problems:
        shown = "; ".join(report.problems[:10])
        more = f"; and {len(report.problems) - 10} more" if len(report.problems) > 10 else ""
        raise GateRefused(f"the audit refuses plan {report.plan_id}: {shown}{more}. Nothing was published")


def _identity_problems(task: AuditTask, rows: pa.Table) -> list[str]:
    filesystem, path = task.workspace.storage.filesystem(task.workspace.items_uri(task.work.bucket, task.base))
    planned = pq.read_table(path, filesystem=filesystem, columns=["item_id", "content_hash"], schema=ITEMS)
    if task.receipt.quarantined:
        gone = pa.array(list(task.receipt.quarantined), pa.string())
        planned = planned.filter(pc.invert(pc.is_in(planned["item_id"], value_set=gone)))
    problems = []
    ids = rows["item_id"]
    unique = pc.count_distinct(ids).as_py()
    if unique != rows.num_rows:
        problems.append(f"{rows.num_rows - unique} duplicate item ids")
    if not ids.equals(planned["item_id"]):
        problems.append(f"its {rows.num_rows} ids are not the {planned.num_rows} planned ones in order")
    elif not rows["content_hash"].equals(planned["content_hash"]):
        problems.append("content hashes differ from the plan's")
    hashed = np.fromiter((row_id(i) for i in ids.to_pylist()), np.int64, rows.num_rows)
    stored = rows["row_id"].to_numpy()
    if not np.array_equal(hashed, stored):
        problems.append("row ids are not the hashes of their item ids")
    elif len(np.unique(stored)) != len(stored):
        problems.append("two items share a row id")
    if np.any(stored % task.buckets != task.work.bucket):
        problems.append("items of another bucket")
    others = set(rows["bundle"].unique().to_pylist()) - {task.bundle}
    if others:
        problems.append(f"vectors of bundle {sorted(others)}, the plan says {task.bundle}")
    return problems


def _vector_problems(task: AuditTask, rows: pa.Table) -> list[str]:
    kind = rows.schema.field("vector").type
    if kind.list_size != task.dim:
        return [f"vectors have {kind.list_size} dimensions, the bundle makes {task.dim}"]
    vectors = _vectors(rows)
    finite: NDArray[np.bool_] = np.isfinite(vectors.sum(axis=1, dtype=np.float64))
    problems: list[str] = []
    if not finite.all():
        broken = int((~finite).sum())
        problems.append(f"{broken} vectors hold NaN or infinity, the first is of item {_first(rows, ~finite)}")
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    norms: NDArray[np.float64] = np.sqrt(squares)
    zero: NDArray[np.bool_] = squares < SMALLEST_SQUARE
    if zero.any():
        problems.append(f"{int(zero.sum())} vectors are zero, the first is of item {_first(rows, zero)}")
    long: NDArray[np.bool_] = finite & (norms > LONGEST)
    if long.any():
        problems.append(
            f"{int(long.sum())} vectors are too long for inner products in float32, the first is of item "
            f"{_first(rows, long)}"
        )
    skewed: NDArray[np.bool_] = (
        finite & ~zero & (np.abs(norms - 1) > UNIT_TOLERANCE + rounding_error(task.mantissa_bits))
    )
    if task.normalised and skewed.any():
        problems.append(f"{int(skewed.sum())} vectors have no unit length, the first is of item {_first(rows, skewed)}")
    finer: NDArray[np.bool_] = finite & (round_mantissas(vectors, task.mantissa_bits) != vectors).any(axis=1)
    if finer.any():
        problems.append(
            f"{int(finer.sum())} vectors have more than {task.mantissa_bits} mantissa bits, the first is of item "
            f"{_first(rows, finer)}"
        )
    return problems


def _vectors(rows: pa.Table) -> NDArray[np.float32]:
    column = rows["vector"].combine_chunks()
    vectors: NDArray[np.float32] = (
        column.flatten().to_numpy(zero_copy_only=False).reshape(rows.num_rows, column.type.list_size)
    )
    return vectors


def _first(rows: pa.Table, where: NDArray[np.bool_]) -> str:
    return repr(rows["item_id"][int(np.argmax(where))].as_py())


def _moments(rows: pa.Table, dim: int) -> Moments:
    vectors = _vectors(rows).astype(np.float64) if rows.num_rows else np.zeros((0, dim))
    square = float(np.square(vectors).sum())
    return Moments(rows=rows.num_rows, vector_sum=tuple(vectors.sum(axis=0).tolist()), square_sum=square)


def _replaced(task: AuditTask, new: Moments) -> Moments:
    """Moments of the files whose place the bucket's file takes; of a damaged one as if it were like the new one."""
    try:
        tables = [read_rows(task.workspace.storage, task.table_uri, file, columns=["vector"]) for file in task.replaced]
    except CorruptFile as error:
        log.warning("bucket %d replaces a damaged file: %s", task.work.bucket, error)
        return Moments.of(sum(file.rows for file in task.replaced), new.mean, new.variance)
    return sum((_moments(table, task.dim) for table in tables), start=_moments(pa.table({}), task.dim))

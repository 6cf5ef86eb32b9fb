"""The audit: every gate says no to exactly what it is for, and names it."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from published import DIM, DS, TEMPLATE, Encoded, Site, Vector, items

from pipeline.audit import judge, require_passed
from pipeline.config import AuditSettings
from pipeline.errors import GateRefused
from schemas.identity import row_id
from schemas.receipt import AuditReport, BucketAudit
from schemas.release import Release

VECTORS = items(60)
HIT = 1  # the bucket that things go wrong in

Rows = Callable[[pa.Table], pa.Table]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def with_column(name: str, change: Callable[[list[object]], list[object]]) -> Rows:
    """Rows whose column ``name`` went through ``change``."""

    def alter(rows: pa.Table) -> pa.Table:
        place = rows.schema.get_field_index(name)
        return rows.set_column(
            place, rows.schema.field(name), pa.array(change(rows[name].to_pylist()), rows[name].type)
        )

    return alter


def first(value: object) -> Callable[[list[object]], list[object]]:
    return lambda values: [value, *values[1:]]


def vector(change: Callable[[Vector], Vector]) -> Rows:
    return with_column("vector", lambda values: [change(np.array(values[0], np.float32)).tolist(), *values[1:]])


def with_value(number: float) -> Callable[[Vector], Vector]:
    return lambda found: np.array([number, *found[1:]], np.float32)


def wider(rows: pa.Table) -> pa.Table:
    place = rows.schema.get_field_index("vector")
    flat = pa.array(np.zeros(rows.num_rows * (DIM + 1), np.float32))
    return rows.set_column(place, "vector", pa.FixedSizeListArray.from_arrays(flat, DIM + 1))


def appended(rows: pa.Table) -> pa.Table:
    return pa.concat_tables([rows, rows.slice(rows.num_rows - 1)])


def another_buckets_item(rows: pa.Table) -> pa.Table:
    stranger = next(f"other-{n}" for n in range(100) if row_id(f"other-{n}") % 4 != HIT)
    renamed = with_column("item_id", first(stranger))(rows)
    return with_column("row_id", first(row_id(stranger)))(renamed)


@pytest.mark.parametrize(
    ("alter", "problems"),
    [
        pytest.param(lambda rows: rows.slice(1), [r"its 19 ids are not the 20 planned ones in order"], id="missing"),
        pytest.param(
            appended,
            [
                r"1 duplicate item ids",
                r"its 21 ids are not the 20 planned ones in order",
                r"two items share a row id",
            ],
            id="duplicate",
        ),
        pytest.param(
            lambda rows: rows.take(list(range(rows.num_rows))[::-1]),
            [r"its 20 ids are not the 20 planned ones in order"],
            id="unsorted",
        ),
        pytest.param(
            another_buckets_item,
            [r"its 20 ids are not the 20 planned ones in order", r"items of another bucket"],
            id="foreign item",
        ),
        pytest.param(with_column("row_id", first(HIT)), [r"row ids are not the hashes of their item ids"], id="row id"),
        pytest.param(
            with_column("content_hash", first("0" * 32)), [r"content hashes differ from the plan's"], id="content"
        ),
        pytest.param(
            with_column("bundle", first("another")),
            [r"vectors of bundle \['another'\], the plan says [0-9a-f]{16}"],
            id="bundle",
        ),
        pytest.param(
            vector(with_value(math.nan)), [r"1 vectors hold NaN or infinity, the first is of item '{first}'"], id="NaN"
        ),
        pytest.param(
            vector(with_value(math.inf)), [r"1 vectors hold NaN or infinity, the first is of item '{first}'"], id="inf"
        ),
        pytest.param(vector(np.zeros_like), [r"1 vectors are zero, the first is of item '{first}'"], id="zero"),
        pytest.param(
            vector(lambda found: found * np.float32(1.01)),
            [r"1 vectors have no unit length, the first is of item '{first}'"],
            id="length",
        ),
        pytest.param(wider, [r"vectors have 9 dimensions, the bundle makes 8"], id="dimension"),
    ],
)
def test_a_bad_bucket_is_refused_and_named(site: Site, alter: Rows, problems: list[str]) -> None:
    encoded = site.encoded(VECTORS, alter=lambda bucket, rows: alter(rows) if bucket == HIT else rows)
    bucket = sorted((item for item in VECTORS if row_id(item) % 4 == HIT), key=str.encode)
    assert len(bucket) == 20
    report = encoded.audit()
    for found, expected in zip(report.problems, problems, strict=True):
        assert re.fullmatch(f"bucket {HIT}: {expected}".replace("{first}", bucket[0]), found)
    with pytest.raises(GateRefused, match=f"the audit refuses plan {encoded.plan.plan_id}: bucket {HIT}: "):
        require_passed(report)
    assert encoded.workspace.read_audit() == report


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_lengths_count_only_where_the_bundle_says_unit_length(tmp_path: Path, scale: float) -> None:
    vectors = {item: found * np.float32(scale) for item, found in VECTORS.items()}
    assert Site(tmp_path / "free", normalised=False).encoded(vectors).audit().problems == ()
    report = Site(tmp_path / "unit").encoded(vectors).audit()
    assert len(report.problems) == 4
    assert all("have no unit length" in problem for problem in report.problems)


def test_a_good_snapshot_passes_with_its_moments(site: Site) -> None:
    encoded = site.encoded(VECTORS, quarantined={"null_id": 2, "empty_text": 1})
    report = encoded.audit()
    require_passed(report)
    rows = np.stack(list(VECTORS.values())).astype(np.float64)
    assert report.rows == 60
    assert report.quarantined_fraction == pytest.approx(3 / 63)
    np.testing.assert_allclose(report.mean, rows.mean(axis=0), atol=1e-12)
    assert report.variance == pytest.approx(np.trace(np.cov(rows.T, bias=True)))
    assert report.drift is None
    assert report.receipts_digest == encoded.digest


def test_a_damaged_file_is_refused(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    file = encoded.receipts[HIT].file
    assert file is not None
    (Path(site.table_uri) / file.path).write_bytes(b"PAR1")
    (problem,) = encoded.audit().problems
    assert f"bucket {HIT}: {site.table_uri}/{file.path} has 4 bytes" in problem


def test_a_bucket_without_a_file_is_refused_when_items_were_planned(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    encoded.workspace.write_receipt(encoded.receipts[HIT].model_copy(update={"file": None}))
    assert encoded.audit().problems == (f"bucket {HIT}: 20 items and no file",)


@pytest.mark.parametrize(
    ("quarantined", "limit", "refused"),
    [
        ({"null_id": 3}, 0.05, False),
        ({"null_id": 3, "malformed": 1}, 0.05, True),
        ({}, 0.0, False),
        ({"x": 1}, 0, True),
    ],
)
def test_too_many_quarantined_rows_are_refused_by_reason(
    site: Site, quarantined: Mapping[str, int], limit: float, refused: bool
) -> None:
    count = sum(quarantined.values())
    encoded = site.encoded(items(60 - count), quarantined=quarantined)  # 60 rows were read
    report = encoded.audit(AuditSettings(max_quarantined_fraction=limit))
    assert report.quarantined_fraction == pytest.approx(count / 60)
    expected = []
    if refused:
        reasons = ", ".join(f"{n} {reason}" for reason, n in quarantined.items())
        expected = [
            f"{count / 60:.1%} of 60 rows are quarantined ({reasons}), "
            f"audit.max_quarantined_fraction allows {limit:.1%}"
        ]
    assert list(report.problems) == expected


@pytest.mark.parametrize(("deleted", "refused"), [(0, False), (30, False), (31, True)])
def test_too_many_deleted_items_are_refused(site: Site, deleted: int, refused: bool) -> None:
    base = site.publish(VECTORS, ds="2026-11-19")
    vectors = dict(list(VECTORS.items())[: 60 - deleted])
    report = site.encoded(vectors, base=base, deleted=deleted).audit(AuditSettings(max_drift=10), base=base)
    message = f"{deleted} of the base release's 60 items are gone, audit.max_deleted_fraction allows 50.0%"
    assert list(report.problems) == ([message] if refused else [])


def axes(**counts: int) -> dict[str, Vector]:
    """So many copies of the unit vectors e0, e1, …, by name of the axis."""
    return {
        f"{name}-{n}": np.eye(DIM, dtype=np.float32)[int(name[1:])]
        for name, count in counts.items()
        for n in range(count)
    }


def test_drift_is_the_way_of_the_mean_in_standard_deviations_of_the_base(site: Site) -> None:
    # Base: half e0, half e1. Mean (1/2, 1/2), mean square 1, variance 1 - 1/2 = 1/2.
    base = site.publish(axes(e0=4, e1=4), ds="2026-11-19")
    assert base.mean[:3] == pytest.approx((0.5, 0.5, 0.0))
    assert base.variance == pytest.approx(0.5)
    # Now three quarters e0: the mean moved by (1/4, -1/4), √(1/8) long; over √(1/2) that is 1/2.
    encoded = site.encoded(axes(e0=6, e1=2), base=base)
    report = encoded.audit(AuditSettings(max_drift=0.51), base=base)
    assert report.drift == pytest.approx(0.5)
    assert report.problems == ()
    report = encoded.audit(AuditSettings(max_drift=0.49), base=base)
    assert report.problems == (
        f"the mean vector moved by 0.500 standard deviations since release {base.release_id}, "
        "audit.max_drift allows 0.49",
    )


def test_the_same_vectors_do_not_drift_even_without_variance(site: Site) -> None:
    base = site.publish(axes(e0=5), ds="2026-11-19")
    assert base.variance == pytest.approx(0.0, abs=1e-12)
    assert site.encoded(axes(e0=5), base=base).audit(base=base).drift == pytest.approx(0.0, abs=1e-12)


def test_vectors_of_another_bundle_have_no_drift_to_measure(site: Site) -> None:
    base = site.publish(axes(e0=8), ds="2026-11-19")
    report = site.encoded(axes(e1=8), base=base, weights="others").audit(AuditSettings(max_drift=0), base=base)
    assert (report.drift, report.problems) == (None, ())


def bare(encoded: Encoded, audits: list[BucketAudit], base: Release | None = None) -> AuditReport:
    return judge(encoded.plan, audits, encoded.receipts, base=base, settings=AuditSettings())


def test_rows_that_are_missing_over_all_buckets_are_counted(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    few = [BucketAudit(bucket=0, rows=7, problems=(), vector_sum=(0.0,) * DIM, square_sum=7.0)]
    assert bare(encoded, few).problems == ("the files hold 7 rows, the plan has 60 items",)


def test_an_empty_snapshot_is_refused(site: Site) -> None:
    plan = site.encoded({}).plan
    report = judge(plan, [], [], base=None, settings=AuditSettings())
    assert report.problems == ("the snapshot is empty: no row of the catalogue could be used",)
    assert (plan.ds, plan.template, report.mean) == (DS, TEMPLATE, (0.0,) * DIM)


def test_of_many_problems_ten_are_said_and_the_others_counted(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    sentences = tuple(f"problem {n:02d}." for n in range(13))
    audits = [BucketAudit(bucket=0, rows=60, problems=sentences, vector_sum=(0.0,) * DIM, square_sum=0.0)]
    with pytest.raises(GateRefused) as refused:
        require_passed(bare(encoded, audits))
    assert "problem 09." in str(refused.value)
    assert "problem 10." not in str(refused.value)
    assert str(refused.value).endswith("; and 3 more. Nothing was published")

"""The audit: every gate says no to exactly what it is for, and names it."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.config import AuditSettings
from marc_pipeline.errors import GateRefused
from marc_pipeline.nightly.audit import judge, require_passed
from marc_pipeline.storage import checksums as integrity
from marc_pipeline.storage import mapped_file
from marc_schemas.catalogue import Change
from marc_schemas.feature_table import file_schema
from marc_schemas.files import BLOCK_DIGEST_CHARS
from marc_schemas.identity import row_id
from marc_schemas.moments import Moments
from marc_schemas.receipt import AuditReport, BucketAudit, day_moments
from marc_schemas.release import Release
from published import DIM, DS, TEMPLATE, Encoded, Site, Vector, Vectors, flip, in_buckets, items

VECTORS = items(60)
NOTHING = Moments(rows=0, vector_sum=(0.0,) * DIM, square_sum=0.0)
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
    flat, field = pa.array(np.zeros(rows.num_rows * (DIM + 1), np.float32)), file_schema(DIM + 1).field("vector")
    return rows.set_column(place, field, pa.FixedSizeListArray.from_arrays(flat, type=field.type))


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
    assert all("have no unit length" in problem for problem in report.problems[:4])


def test_where_every_bucket_is_bad_nothing_else_is_said(site: Site) -> None:
    report = site.encoded({item: found * np.float32(2) for item, found in VECTORS.items()}).audit()
    assert len(report.problems) == 4


def test_a_good_snapshot_passes_with_its_moments(site: Site) -> None:
    encoded = site.encoded(VECTORS, quarantined={"null_id": 2, "empty_text": 1})
    report = encoded.audit()
    require_passed(report)
    rows = np.stack(list(VECTORS.values())).astype(np.float64)
    assert report.gained.rows == 60
    assert report.figures.quarantined_fraction == pytest.approx(3 / 63)
    np.testing.assert_allclose(report.gained.mean, rows.mean(axis=0), atol=1e-12)
    assert report.gained.variance == pytest.approx(np.trace(np.cov(rows.T, bias=True)))
    assert report.lost == NOTHING
    assert report.figures.drift is None
    assert report.receipts_digest == encoded.digest


def test_a_damaged_file_is_refused(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    file = encoded.receipts[HIT].file
    assert file is not None
    (Path(site.table_uri) / file.path).write_bytes(b"PAR1")
    (problem,) = encoded.audit().problems
    assert f"bucket {HIT}: {site.table_uri}/{file.path} has 4 bytes" in problem


def test_every_block_of_every_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = items(6000, dim=32)
    encoded = Site(tmp_path, dim=32).encoded(vectors, buckets=2)
    hashed: list[tuple[str, int]] = []
    require = integrity.require_block

    def note(data: memoryview, block: int, uri: str, *rest: Any) -> None:
        hashed.append((uri, block))
        require(data, block, uri, *rest)

    for module in (integrity, mapped_file):
        monkeypatch.setattr(module, "require_block", note)
    assert encoded.audit().problems == ()
    blocks = [len(receipt.file.blocks) // BLOCK_DIGEST_CHARS for receipt in encoded.receipts if receipt.file]
    assert min(blocks) > 1
    assert len(set(hashed)) == len(hashed) == sum(blocks)


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
    assert report.figures.quarantined_fraction == pytest.approx(count / 60)
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
    report = site.encoded(vectors, base=base).audit(AuditSettings(max_drift=10))
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
    assert base.moments.mean[:3] == pytest.approx((0.5, 0.5, 0.0))
    assert base.moments.variance == pytest.approx(0.5)
    # Now three quarters e0: the mean moved by (1/4, -1/4), √(1/8) long; over √(1/2) that is 1/2.
    encoded = site.encoded(axes(e0=6, e1=2), base=base)
    report = encoded.audit(AuditSettings(max_drift=0.51))
    assert report.figures.drift == pytest.approx(0.5)
    assert report.problems == ()
    report = encoded.audit(AuditSettings(max_drift=0.49))
    assert report.problems == (
        f"the mean vector moved by 0.500 standard deviations since release {base.release_id}, "
        "audit.max_drift allows 0.49",
    )


def test_the_same_vectors_do_not_drift_even_without_variance(site: Site) -> None:
    base = site.publish(axes(e0=5), ds="2026-11-19")
    assert base.moments.variance == pytest.approx(0.0, abs=1e-12)
    assert site.encoded(axes(e0=5), base=base).audit().figures.drift == pytest.approx(0.0, abs=1e-12)


def test_vectors_of_another_bundle_have_no_drift_to_measure(site: Site) -> None:
    base = site.publish(axes(e0=8), ds="2026-11-19")
    lax = AuditSettings(max_drift=0, max_deleted_fraction=1)
    report = site.encoded(axes(e1=8), base=base, weights="others").audit(lax)
    assert (report.figures.drift, report.problems) == (None, ())


def bare(encoded: Encoded, audits: list[BucketAudit], base: Release | None = None) -> AuditReport:
    return judge(encoded.plan, audits, encoded.receipts, base=base, settings=AuditSettings())


def test_rows_that_are_missing_over_all_buckets_are_counted(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    seven = Moments(rows=7, vector_sum=(0.0,) * DIM, square_sum=7.0)
    few = [BucketAudit(bucket=0, problems=(), moments=seven, replaced=NOTHING)]
    assert bare(encoded, few).problems == ("the files hold 7 rows, the plan has 60 items",)


def test_an_empty_snapshot_is_refused(site: Site) -> None:
    plan = site.encoded({}).plan
    report = judge(plan, [], [], base=None, settings=AuditSettings())
    assert report.problems == ("the snapshot is empty: no row of the catalogue could be used",)
    assert (plan.ds, plan.template, report.gained) == (DS, TEMPLATE, NOTHING)


def test_of_many_problems_ten_are_said_and_the_others_counted(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    sentences = tuple(f"problem {n:02d}." for n in range(13))
    sixty = Moments(rows=60, vector_sum=(0.0,) * DIM, square_sum=0.0)
    audits = [BucketAudit(bucket=0, problems=sentences, moments=sixty, replaced=NOTHING)]
    with pytest.raises(GateRefused) as refused:
        require_passed(bare(encoded, audits))
    assert "problem 09." in str(refused.value)
    assert "problem 10." not in str(refused.value)
    assert str(refused.value).endswith("; and 3 more. Nothing was published")


# --- moments


def plainly(vectors: Vectors) -> tuple[int, Vector, float]:
    """Rows, mean and trace of the covariance, by numpy."""
    rows = np.array(list(vectors.values()), np.float64).reshape(-1, DIM)
    return len(rows), rows.mean(axis=0), float(rows.var(axis=0).sum())


def assert_moments(found: Moments, vectors: Vectors) -> None:
    rows, mean, variance = plainly(vectors)
    assert found.rows == rows
    np.testing.assert_allclose(found.mean, mean, rtol=0, atol=1e-9)
    assert found.variance == pytest.approx(variance, abs=1e-9)


@given(cut=st.integers(0, 60), stays=st.integers(0, 60))
def test_moments_of_sets_add_up_and_a_subset_can_leave(cut: int, stays: int) -> None:
    def moments(vectors: Vectors) -> Moments:
        return Moments.of(*plainly(vectors)) if vectors else NOTHING

    every = list(VECTORS.items())
    parts = dict(every[:cut]), dict(every[cut:])
    assert_moments(moments(parts[0]) + moments(parts[1]), VECTORS)
    if stays:
        assert_moments(moments(VECTORS) - moments(dict(every[stays:])), dict(every[:stays]))


def test_nothing_has_moments_of_zero() -> None:
    assert (NOTHING.mean, NOTHING.variance) == ((0.0,) * DIM, 0.0)
    assert Moments.of(5, (0.5,) * DIM, 0.0) - Moments.of(5, (0.5,) * DIM, 0.0) == NOTHING


# --- some buckets of a day


@pytest.fixture
def live(site: Site) -> Release:
    return site.publish(VECTORS)


def stirred() -> dict[str, Vector]:
    """The bucket's items but for two, three of them with other vectors."""
    mine = sorted(in_buckets(VECTORS, HIT).items())[2:]
    return dict(mine) | dict(zip([item for item, _ in mine[:3]], items(3, seed=9).values(), strict=True))


def test_the_moments_of_some_buckets_are_what_they_gain_and_what_they_lose(site: Site, live: Release) -> None:
    encoded = site.encoded(stirred(), plan_id="some", chosen=(HIT,))
    report = encoded.audit(AuditSettings(max_drift=10))
    assert report.problems == ()
    assert_moments(report.gained, stirred())
    assert_moments(report.lost, in_buckets(VECTORS, HIT))
    day = in_buckets(VECTORS, 0, 2, 3) | stirred()
    assert_moments(day_moments(report.gained, report.lost, live), day)
    # Drift is that of the whole day.
    _, mean, _ = plainly(day)
    assert report.figures.drift == pytest.approx(
        math.dist(mean, live.moments.mean) / math.sqrt(live.moments.variance), abs=1e-9
    )
    narrow = encoded.audit(AuditSettings(max_drift=0.0))
    assert "the mean vector moved by" in narrow.problems[0]


def test_a_whole_day_takes_nobodys_place(site: Site, live: Release) -> None:
    report = site.encoded(VECTORS, plan_id="again", base=live).audit()
    assert report.lost == NOTHING
    assert_moments(report.gained, VECTORS)


def test_a_damaged_file_that_is_replaced_counts_as_if_it_were_like_the_new_one(site: Site, live: Release) -> None:
    encoded = site.encoded(stirred(), plan_id="some", chosen=(HIT,))
    path = Path(site.table_uri) / live.table.files[HIT].path
    for harm in (lambda: flip(path, path.stat().st_size // 2), path.unlink):
        harm()
        report = encoded.audit(AuditSettings(max_drift=10))
        assert report.problems == ()
        assert_moments(report.gained, stirred())
        assert report.lost.rows == live.table.files[HIT].rows == 20
        np.testing.assert_allclose(report.lost.mean, report.gained.mean, rtol=0, atol=1e-9)
        assert report.lost.variance == pytest.approx(report.gained.variance, abs=1e-9)
        assert day_moments(report.gained, report.lost, live).rows == 58


def test_damage_in_a_bucket_that_stays_is_not_the_business_of_some_others(site: Site, live: Release) -> None:
    encoded = site.encoded(stirred(), plan_id="some", chosen=(HIT,))
    (Path(site.table_uri) / live.table.files[0].path).unlink()
    assert encoded.audit(AuditSettings(max_drift=10)).problems == ()


def test_a_bad_file_of_a_chosen_bucket_is_refused(site: Site, live: Release) -> None:
    encoded = site.encoded(
        stirred(), plan_id="some", chosen=(HIT,), alter=lambda _, rows: vector(with_value(math.nan))(rows)
    )
    report = encoded.audit(AuditSettings(max_drift=10))
    assert report.problems[0].startswith(f"bucket {HIT}: 1 vectors hold NaN")
    assert live.table.files[HIT] != encoded.receipts[0].file


@pytest.mark.parametrize(("gone", "refused"), [(10, False), (11, True)])
def test_deleted_items_are_judged_by_the_chosen_buckets_alone(
    site: Site, live: Release, gone: int, refused: bool
) -> None:
    assert live.table.files[HIT].rows == 20
    kept = dict(sorted(in_buckets(VECTORS, HIT).items())[gone:])
    report = site.encoded(kept, plan_id="some", chosen=(HIT,)).audit(AuditSettings(max_drift=10))
    message = (
        f"{gone} of the base release's 20 items in buckets [{HIT}] are gone, audit.max_deleted_fraction allows 50.0%"
    )
    assert list(report.problems) == ([message] if refused else [])


@pytest.mark.parametrize(
    ("unencodable", "encoded", "refused"), [(10, 0, False), (11, 0, True), (11, 209, False), (11, 208, True)]
)
def test_many_texts_that_cannot_be_encoded_refuse_the_snapshot(
    site: Site, unencodable: int, encoded: int, refused: bool
) -> None:
    plan = site.encoded(VECTORS).plan
    (first, *_) = site.encoded(VECTORS).receipts
    gone = {f"gone-{number}": Change.NEW for number in range(unencodable)}
    receipt = first.model_copy(update={"quarantined": gone, "encoded": encoded})
    planned = plan.model_copy(update={"rows_read": 1_000_000})
    rows = Moments(rows=planned.items - unencodable, vector_sum=(0.0,) * DIM, square_sum=1.0)
    audits = [BucketAudit(bucket=0, problems=(), moments=rows, replaced=NOTHING)]
    report = judge(planned, audits, [receipt], base=None, settings=AuditSettings())
    assert bool(report.problems) == refused, report.problems
    assert report.figures.quarantined_fraction == unencodable / 1_000_000
    if refused:
        assert report.problems[0].startswith(f"{unencodable} of {unencodable + encoded} texts cannot be encoded")

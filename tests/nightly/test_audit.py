"""The audit: each gate refuses a bad snapshot, and its message says why."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.config import AuditSettings
from marc_pipeline.errors import GateRefused
from marc_pipeline.nightly.audit import BucketAudit, apply_gates, require_passed
from marc_pipeline.storage import checksums, mapped_file
from marc_schemas.catalogue import Change
from marc_schemas.feature_table import file_schema
from marc_schemas.files import BLOCK_DIGEST_CHARS
from marc_schemas.identity import row_id
from marc_schemas.moments import Moments
from marc_schemas.receipt import AuditReport, day_moments
from marc_schemas.release import Release
from published import DIM, Encoded, Site, Vector, Vectors, flip, in_buckets, items

VECTORS = items(60)
NOTHING = Moments(rows=0, vector_sum=(0.0,) * DIM, square_sum=0.0)
BUCKET = 1  # the bucket with the fault
NO_VECTORS = np.zeros((0, DIM), np.float32)
LAX = AuditSettings(max_drift=10)

Alter = Callable[[pa.Table], pa.Table]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def with_first(name: str, value: Any) -> Alter:
    """Replace the first value of a column."""

    def alter(rows: pa.Table) -> pa.Table:
        place, column = rows.schema.get_field_index(name), rows[name]
        first = value(np.array(column[0].as_py(), np.float32)).tolist() if callable(value) else value
        return rows.set_column(place, rows.schema.field(name), pa.array([first, *column[1:].to_pylist()], column.type))

    return alter


def with_number(number: float) -> Alter:
    return with_first("vector", lambda vector: np.array([number, *vector[1:]], np.float32))


def wider(rows: pa.Table) -> pa.Table:
    place = rows.schema.get_field_index("vector")
    flat, field = pa.array(np.zeros(rows.num_rows * (DIM + 1), np.float32)), file_schema(DIM + 1).field("vector")
    return rows.set_column(place, field, pa.FixedSizeListArray.from_arrays(flat, type=field.type))


def with_item_of_another_bucket(rows: pa.Table) -> pa.Table:
    other = next(f"other-{n}" for n in range(100) if row_id(f"other-{n}") % 4 != BUCKET)
    return with_first("row_id", row_id(other))(with_first("item_id", other)(rows))


IN_ORDER = "item ids or their order differ from the 20 planned ids"
IS_FIRST = ", the first is of item '{first}'"


@pytest.mark.parametrize(
    ("alter", "problems"),
    [
        (lambda rows: rows.slice(1), [f"its 19 {IN_ORDER}"]),
        (
            lambda rows: pa.concat_tables([rows, rows.slice(rows.num_rows - 1)]),
            ["1 duplicate item ids", f"its 21 {IN_ORDER}", "two items share a row id"],
        ),
        (lambda rows: rows.take(list(range(rows.num_rows))[::-1]), [f"its 20 {IN_ORDER}"]),
        (with_item_of_another_bucket, [f"its 20 {IN_ORDER}", "items of another bucket"]),
        (with_first("row_id", BUCKET), ["row ids are not the hashes of their item ids"]),
        (with_first("content_hash", "0" * 32), ["content hashes differ from the plan's"]),
        (with_first("bundle", "another"), [r"vectors of bundle \['another'\] instead of [0-9a-f]{16}"]),
        (with_number(math.nan), [f"1 vectors contain NaN or infinity{IS_FIRST}"]),
        (with_number(math.inf), [f"1 vectors contain NaN or infinity{IS_FIRST}"]),
        (with_first("vector", np.zeros_like), [f"1 vectors are zero{IS_FIRST}"]),
        (with_first("vector", lambda vector: vector * np.float32(1.01)), [f"1 vectors are not normalised{IS_FIRST}"]),
        (wider, ["vectors have 9 dimensions, the bundle makes 8"]),
    ],
    ids=[
        *("missing", "duplicate", "unsorted", "foreign", "row id", "content", "bundle"),
        *("NaN", "inf", "zero", "length", "dimension"),
    ],
)
def test_a_bad_bucket_is_refused_and_named(site: Site, alter: Alter, problems: list[str]) -> None:
    encoded = site.encoded(VECTORS, alter=lambda bucket, rows: alter(rows) if bucket == BUCKET else rows)
    bucket = sorted((item for item in VECTORS if row_id(item) % 4 == BUCKET), key=str.encode)
    assert len(bucket) == 20
    report = encoded.audit()
    for found, expected in zip(report.problems, problems, strict=True):
        assert re.fullmatch(f"bucket {BUCKET}: {expected}".replace("{first}", bucket[0]), found)
    with pytest.raises(GateRefused, match=f"the audit refuses plan {encoded.plan.plan_id}: bucket {BUCKET}: "):
        require_passed(report)
    assert encoded.workspace.read_audit() == report


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_vectors_need_unit_length_only_if_the_bundle_normalises(tmp_path: Path, scale: float) -> None:
    vectors = {item: found * np.float32(scale) for item, found in VECTORS.items()}
    assert Site(tmp_path / "free", normalised=False).encoded(vectors).audit().problems == ()
    problems = Site(tmp_path / "unit").encoded(vectors).audit().problems
    # One problem per bucket, and none about the rows that are therefore missing.
    assert len(problems) == 4
    assert all("are not normalised" in problem for problem in problems)


def test_a_good_snapshot_passes_with_its_moments(site: Site) -> None:
    encoded = site.encoded(VECTORS, quarantined={"null_id": 2, "empty_text": 1})
    report = encoded.audit()
    require_passed(report)
    assert_moments(report.gained, VECTORS)
    assert report.figures.quarantined_fraction == pytest.approx(3 / 63)
    assert (report.lost, report.figures.drift, report.receipts_digest) == (NOTHING, None, encoded.digest)


def test_a_damaged_or_missing_file_is_refused(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    receipt = encoded.receipts[BUCKET]
    assert receipt.file is not None
    (Path(site.table_uri) / receipt.file.path).write_bytes(b"PAR1")
    (problem,) = encoded.audit().problems
    assert f"bucket {BUCKET}: {site.table_uri}/{receipt.file.path} has 4 bytes" in problem
    encoded.workspace.write_receipt(receipt.model_copy(update={"file": None}))
    assert encoded.audit().problems == (f"bucket {BUCKET}: 20 planned items, but no file",)


def test_every_block_of_every_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = Site(tmp_path, dim=32).encoded(items(6000, dim=32), buckets=2)
    hashed: list[tuple[str, int]] = []
    require = checksums.require_block

    def note(data: memoryview, block: int, uri: str, *rest: Any) -> None:
        hashed.append((uri, block))
        require(data, block, uri, *rest)

    for module in (checksums, mapped_file):
        monkeypatch.setattr(module, "require_block", note)
    assert encoded.audit().problems == ()
    blocks = [len(receipt.file.blocks) // BLOCK_DIGEST_CHARS for receipt in encoded.receipts if receipt.file]
    assert min(blocks) > 1
    assert len(set(hashed)) == len(hashed) == sum(blocks)


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
    encoded = site.encoded(items(60 - count), quarantined=quarantined)  # the catalogue has 60 rows
    report = encoded.audit(AuditSettings(max_quarantined_fraction=limit))
    assert report.figures.quarantined_fraction == pytest.approx(count / 60)
    reasons = ", ".join(f"{n} {reason}" for reason, n in quarantined.items())
    message = (
        f"{count / 60:.1%} of 60 rows are quarantined ({reasons}), audit.max_quarantined_fraction allows {limit:.1%}"
    )
    assert list(report.problems) == ([message] if refused else [])


def test_more_collisions_than_allowed_are_refused(site: Site) -> None:
    encoded = site.encoded(items(60), quarantined={"row_id_collision": 2})
    assert encoded.audit(AuditSettings(max_collisions=2)).problems == ()
    assert encoded.audit(AuditSettings(max_collisions=1)).problems == (
        "2 items have the row id of another item, audit.max_collisions allows 1",
    )


@pytest.mark.parametrize(
    ("chosen", "deleted", "refused"),
    [(None, 0, 0), (None, 30, 0), (None, 31, 1), ((BUCKET,), 10, 0), ((BUCKET,), 11, 1)],
)
def test_too_many_deleted_items_of_the_planned_buckets_are_refused(
    site: Site, chosen: tuple[int, ...] | None, deleted: int, refused: int
) -> None:
    base = site.publish(VECTORS)
    before = in_buckets(VECTORS, *(chosen or range(4)))
    kept = dict(list(before.items())[deleted:])
    report = site.encoded(kept, plan_id="next", base=base, chosen=chosen).audit(LAX)
    where = f" in buckets [{BUCKET}]" if chosen else ""
    message = f"{deleted} of the base release's {len(before)} items{where} would be deleted, "
    message += "audit.max_deleted_fraction allows 50.0%"
    assert list(report.problems) == [message] * refused
    assert len(before) == (20 if chosen else 60)


def axes(**counts: int) -> dict[str, Vector]:
    """Return copies of the unit vectors e0, e1, …; the keywords give their numbers."""
    unit = np.eye(DIM, dtype=np.float32)
    return {f"{name}-{n}": unit[int(name[1:])] for name, count in counts.items() for n in range(count)}


def test_drift_is_the_distance_of_the_means_in_standard_deviations_of_the_base(site: Site) -> None:
    # Base: half e0, half e1. Mean (1/2, 1/2), mean square 1, variance 1 - 1/2 = 1/2.
    base = site.publish(axes(e0=4, e1=4), ds="2026-11-19")
    assert base.moments.mean[:3] == pytest.approx((0.5, 0.5, 0.0))
    assert base.moments.variance == pytest.approx(0.5)
    # Now three quarters e0: the mean moved by (1/4, -1/4), √(1/8) long; over √(1/2) that is 1/2.
    encoded = site.encoded(axes(e0=6, e1=2), base=base)
    report = encoded.audit(AuditSettings(max_drift=0.51))
    assert report.figures.drift == pytest.approx(0.5)
    assert report.problems == ()
    assert encoded.audit(AuditSettings(max_drift=0.49)).problems == (
        f"the mean vector moved by 0.500 standard deviations since release {base.release_id}, "
        "audit.max_drift allows 0.49",
    )


def test_a_base_without_variance_or_of_another_bundle_does_not_refuse_by_drift(site: Site) -> None:
    base = site.publish(axes(e0=8), ds="2026-11-19")
    assert base.moments.variance == pytest.approx(0.0, abs=1e-12)
    assert site.encoded(axes(e0=8), base=base).audit().figures.drift == pytest.approx(0.0, abs=1e-12)
    strict = AuditSettings(max_drift=0, max_deleted_fraction=1)
    report = site.encoded(axes(e1=8), base=base, weights="others").audit(strict)
    assert (report.figures.drift, report.problems) == (None, ())


def gates(encoded: Encoded, *, rows: int, problems: tuple[str, ...] = ()) -> AuditReport:
    """Apply the gates to one bucket audit with so many rows."""
    moments = Moments(rows=rows, vector_sum=(0.0,) * DIM, square_sum=float(rows))
    audits = [BucketAudit(bucket=0, problems=problems, moments=moments, replaced=NOTHING, sample=NO_VECTORS)]
    return apply_gates(encoded.plan, audits, encoded.receipts, base=None, settings=AuditSettings())


def test_missing_rows_and_an_empty_snapshot_are_refused(site: Site) -> None:
    found = gates(site.encoded(VECTORS), rows=7)
    assert found.problems == ("the files contain 7 rows, the plan has 60 items",)
    found = gates(site.encoded({}), rows=0)
    assert found.problems == ("the snapshot is empty: no row of the catalogue could be used",)
    assert found.gained == NOTHING


def test_the_error_names_ten_problems_and_counts_the_others(site: Site) -> None:
    report = gates(site.encoded(VECTORS), rows=60, problems=tuple(f"problem {n:02d}." for n in range(13)))
    with pytest.raises(GateRefused, match=r"problem 09\.; and 3 more\. Nothing was published$"):
        require_passed(report)


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


@settings(deadline=None)
@given(cut=st.integers(0, 60), stays=st.integers(0, 60))
def test_moments_of_disjoint_sets_add_and_subtract(cut: int, stays: int) -> None:
    def moments(vectors: Vectors) -> Moments:
        return Moments.of(*plainly(vectors)) if vectors else NOTHING

    every = list(VECTORS.items())
    assert_moments(moments(dict(every[:cut])) + moments(dict(every[cut:])), VECTORS)
    if stays:
        assert_moments(moments(VECTORS) - moments(dict(every[stays:])), dict(every[:stays]))


def test_an_empty_set_has_moments_of_zero() -> None:
    assert (NOTHING.mean, NOTHING.variance) == ((0.0,) * DIM, 0.0)
    assert Moments.of(5, (0.5,) * DIM, 0.0) - Moments.of(5, (0.5,) * DIM, 0.0) == NOTHING


# --- some buckets of a day


@pytest.fixture
def live(site: Site) -> Release:
    return site.publish(VECTORS)


def changed() -> dict[str, Vector]:
    """The bucket's items without two of them, three of them with other vectors."""
    mine = sorted(in_buckets(VECTORS, BUCKET).items())[2:]
    return dict(mine) | dict(zip([item for item, _ in mine[:3]], items(3, seed=9).values(), strict=True))


def test_a_plan_of_some_buckets_gains_and_loses_their_moments(site: Site, live: Release) -> None:
    encoded = site.encoded(changed(), plan_id="some", chosen=(BUCKET,))
    report = encoded.audit(LAX)
    assert report.problems == ()
    assert_moments(report.gained, changed())
    assert_moments(report.lost, in_buckets(VECTORS, BUCKET))
    day = in_buckets(VECTORS, 0, 2, 3) | changed()
    assert_moments(day_moments(report.gained, report.lost, live), day)
    # Drift is measured over the whole date.
    drift = math.dist(plainly(day)[1], live.moments.mean) / math.sqrt(live.moments.variance)
    assert report.figures.drift == pytest.approx(drift, abs=1e-9)
    assert "the mean vector moved by" in encoded.audit(AuditSettings(max_drift=0.0)).problems[0]


def test_a_plan_of_a_whole_day_loses_no_moments(site: Site, live: Release) -> None:
    report = site.encoded(VECTORS, plan_id="again", base=live).audit()
    assert report.lost == NOTHING
    assert_moments(report.gained, VECTORS)


def test_a_damaged_replaced_file_counts_with_the_moments_of_the_new_file(site: Site, live: Release) -> None:
    encoded = site.encoded(changed(), plan_id="some", chosen=(BUCKET,))
    path = Path(site.table_uri) / live.table.files[BUCKET].path
    for damage in (lambda: flip(path, path.stat().st_size // 2), path.unlink):
        damage()
        report = encoded.audit(LAX)
        assert report.problems == ()
        assert_moments(report.gained, changed())
        assert report.lost.rows == live.table.files[BUCKET].rows == 20
        np.testing.assert_allclose(report.lost.mean, report.gained.mean, rtol=0, atol=1e-9)
        assert report.lost.variance == pytest.approx(report.gained.variance, abs=1e-9)
        assert day_moments(report.gained, report.lost, live).rows == 58


def test_a_plan_of_some_buckets_is_audited_without_the_other_buckets(site: Site, live: Release) -> None:
    encoded = site.encoded(changed(), plan_id="some", chosen=(BUCKET,))
    (Path(site.table_uri) / live.table.files[0].path).unlink()
    assert encoded.audit(LAX).problems == ()
    bad = site.encoded(changed(), plan_id="bad", chosen=(BUCKET,), alter=lambda _, rows: with_number(math.nan)(rows))
    assert bad.audit(LAX).problems[0].startswith(f"bucket {BUCKET}: 1 vectors contain NaN")
    assert live.table.files[BUCKET] != bad.receipts[0].file


@pytest.mark.parametrize(
    ("unencodable", "encoded", "refused"), [(10, 0, False), (11, 0, True), (11, 209, False), (11, 208, True)]
)
def test_many_texts_that_cannot_be_encoded_refuse_the_snapshot(
    site: Site, unencodable: int, encoded: int, refused: bool
) -> None:
    made = site.encoded(VECTORS)
    gone = {f"gone-{number}": Change.NEW for number in range(unencodable)}
    receipt = made.receipts[0].model_copy(update={"quarantined": gone, "encoded": encoded})
    planned = made.plan.model_copy(update={"rows_read": 1_000_000})
    rows = Moments(rows=planned.items - unencodable, vector_sum=(0.0,) * DIM, square_sum=1.0)
    audits = [BucketAudit(bucket=0, problems=(), moments=rows, replaced=NOTHING, sample=NO_VECTORS)]
    report = apply_gates(planned, audits, [receipt], base=None, settings=AuditSettings())
    assert bool(report.problems) == refused, report.problems
    assert report.figures.quarantined_fraction == unencodable / 1_000_000
    if refused:
        assert report.problems[0].startswith(f"{unencodable} of {unencodable + encoded} texts cannot be encoded")

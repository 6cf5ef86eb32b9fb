"""Vectors with fewer mantissa bits: rounding of numbers, contents and size of files, and other readers."""

import math
import struct
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import Superseded
from marc_pipeline.reader.release import open_release
from marc_pipeline.releases import log as release_log
from marc_pipeline.storage import Storage
from marc_pipeline.table.precision import round_mantissas, round_vectors, rounding_error
from marc_pipeline.table.rows import read_rows
from marc_pipeline.table.write import write_bucket_file
from marc_schemas.feature_table import MANTISSA_BITS
from published import BUCKETS, DIM, DS, Site, bucket_rows, in_buckets, items

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

YESTERDAY = "2026-11-19"
LARGEST = float(np.finfo(np.float32).max)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
NORMAL = float(np.finfo(np.float32).smallest_normal)
FLOATS = st.integers(0, 2**32 - 1).map(lambda pattern: struct.unpack("<f", struct.pack("<I", pattern))[0])
FINITE = FLOATS.filter(math.isfinite)
BITS = st.integers(1, MANTISSA_BITS)


def rounded(number: float, bits: int) -> float:
    return float(round_mantissas(np.array([number], np.float32), bits)[0])


def unit(number: float, bits: int) -> Fraction:
    """Unit in the last place of a number with this many mantissa bits."""
    return Fraction(2) ** (max(math.frexp(number)[1] - 1, -126) - bits)


def naive(number: float, bits: int) -> float:
    """Rounded in exact arithmetic, ties to even."""
    step = unit(number, bits)
    found = round(Fraction(number) / step) * step
    largest = (2 - Fraction(1, 2**bits)) * Fraction(2) ** 127
    return math.copysign(float(min(abs(found), largest)), number)


# --- numbers


@given(number=FINITE, bits=BITS)
def test_numbers_are_rounded_as_in_exact_arithmetic_within_the_error_bound(number: float, bits: int) -> None:
    found, expected = rounded(number, bits), naive(number, bits)
    assert (found, math.copysign(1, found)) == (expected, math.copysign(1, expected))
    error = abs(Fraction(found) - Fraction(number))
    if abs(found) < 2.0**127:
        assert error <= unit(number, bits) / 2
    # At the end of the range the next number would be infinity.
    assert error < unit(number, bits)
    if NORMAL <= abs(number) < 2.0**127:
        assert error <= Fraction(rounding_error(bits)) * abs(Fraction(number))


@given(numbers=st.lists(FLOATS, max_size=20), bits=BITS, fewer=BITS)
def test_rounding_again_to_as_many_or_more_bits_changes_nothing(numbers: list[float], bits: int, fewer: int) -> None:
    bits, fewer = max(bits, fewer), min(bits, fewer)
    once = round_mantissas(np.array(numbers, np.float32), fewer)
    for again in (fewer, bits, MANTISSA_BITS):
        assert round_mantissas(once, again).tobytes() == once.tobytes()


@given(numbers=st.lists(FINITE, min_size=2, max_size=20), bits=BITS)
def test_rounding_keeps_order_and_signs(numbers: list[float], bits: int) -> None:
    found = round_mantissas(np.array(sorted(numbers), np.float32), bits)
    assert np.all(np.diff(found.astype(np.float64)) >= 0)
    assert np.array_equal(np.signbit(found), np.signbit(np.array(sorted(numbers), np.float32)))
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("number", "bits", "expected"),
    [
        (1.25, 1, 1.0),  # half-way, to the even one below
        (1.75, 1, 2.0),  # half-way, to the even one above: into the next binade
        (np.nextafter(np.float32(1.25), np.float32(2)), 1, 1.5),
        (-1.25, 1, -1.0),
        (1 / 3, 2, 0.3125),
        (0.0, 1, 0.0),
        (-0.0, 1, -0.0),
        (SMALLEST, 22, 0.0),  # half a unit: to the even one
        (3 * SMALLEST, 22, 4 * SMALLEST),
        (-SMALLEST, 1, -0.0),
        (NORMAL - SMALLEST, 1, NORMAL),
        (LARGEST, 1, 1.5 * 2.0**127),
        (-LARGEST, 10, -(2 - 2.0**-10) * 2.0**127),
        (LARGEST, 23, LARGEST),
        (math.inf, 1, math.inf),
        (-math.inf, 10, -math.inf),
    ],
)
def test_ties_zeros_denormals_and_the_largest_numbers_are_rounded(number: float, bits: int, expected: float) -> None:
    found = rounded(number, bits)
    assert found == expected
    assert math.copysign(1, found) == math.copysign(1, expected)


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001])
@pytest.mark.parametrize("bits", [1, 10, 22, 23])
def test_nan_keeps_its_bits(pattern: int, bits: int) -> None:
    values = np.array([pattern], np.uint32).view(np.float32)
    assert round_mantissas(values, bits).view(np.uint32)[0] == pattern


@pytest.mark.parametrize("bits", [0, 24, -1])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 23 mantissa bits, not {bits}"):
        round_mantissas(np.ones(1, np.float32), bits)


def test_arrays_of_any_shape_are_rounded_into_a_copy() -> None:
    values = np.random.default_rng(0).standard_normal((7, 6)).astype(np.float32)
    before = values.copy()
    for view in (values, values[::2, 1:4], values.T, values[:0]):
        found = round_mantissas(view, 5)
        assert found.shape == view.shape
        assert found.tolist() == [[naive(number, 5) for number in row] for row in view.tolist()]
    assert not np.shares_memory(round_mantissas(values, MANTISSA_BITS), values)
    assert np.array_equal(values, before)


# --- rows and files


def rounded_items(count: int, bits: int, *, dim: int = DIM, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    return {item: round_mantissas(vector, bits) for item, vector in items(count, dim=dim, seed=seed).items()}


def vectors_of(rows: pa.Table) -> dict[str, list[float]]:
    return dict(zip(rows["item_id"].to_pylist(), rows["vector"].to_pylist(), strict=True))


def test_only_the_vectors_of_rows_and_of_slices_are_rounded() -> None:
    rows = bucket_rows(items(30), bundle="b")
    for part in (rows, rows.slice(7, 11), rows.filter(pa.array([n % 3 == 0 for n in range(30)])), rows.slice(0, 0)):
        found = round_vectors(part, 4)
        assert found.schema == part.schema
        assert found.drop_columns("vector") == part.drop_columns("vector")
        assert vectors_of(found) == {item: [naive(x, 4) for x in vector] for item, vector in vectors_of(part).items()}
    assert round_vectors(rows, MANTISSA_BITS) is rows


def written(folder: Path, count: int, bits: int, *, dim: int = DIM) -> Path:
    rows = bucket_rows(items(count, dim=dim), bundle="b", dim=dim)
    facts: dict[str, Any] = {"dim": dim, "ds": DS, "bucket": 1, "plan_id": "0" * 32, "footer": {}}
    file = write_bucket_file(Storage(), str(folder), [rows], **facts, mantissa_bits=bits)
    assert file is not None
    return folder / file.path


def test_a_file_of_fewer_bits_records_them_and_is_smaller(tmp_path: Path) -> None:
    size = {}
    for bits in (MANTISSA_BITS, 12, 10, 7):
        metadata = pq.read_metadata(written(tmp_path, 4000, bits, dim=64))
        assert metadata.metadata[b"marc.mantissa_bits"] == str(bits).encode()
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        columns = [groups[0].column(number) for number in range(metadata.num_columns)]
        split = {column.path_in_schema for column in columns if "BYTE_STREAM_SPLIT" in column.encodings}
        assert split == ({"vector.list.element"} if bits < MANTISSA_BITS else set())
        packed = {column.path_in_schema for column in columns if column.compression == "ZSTD"}
        assert "vector.list.element" in packed or bits == MANTISSA_BITS
        size[bits] = sum(group.column(2).total_compressed_size for group in groups) / (4000 * 64 * 4)
    assert 0.9 < size[MANTISSA_BITS] < 1.05
    assert 0.3 < size[7] < size[10] < size[12] < 0.56


def test_other_engines_read_the_stored_vectors(tmp_path: Path) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    path = str(written(tmp_path, 1500, 10))
    wanted = {item: vector.tolist() for item, vector in rounded_items(1500, 10).items()}
    answers: dict[str, list[dict[str, Any]]] = {
        "pyarrow": pads.dataset(path).to_table().to_pylist(),
        "pandas": pd.read_parquet(path).to_dict("records"),
        "polars": pl.read_parquet(path).to_dicts(),
        "duckdb": duckdb.sql("SELECT * FROM read_parquet($p)", params={"p": path}).arrow().read_all().to_pylist(),
    }
    for engine, rows in answers.items():
        assert {row["item_id"]: list(row["vector"]) for row in rows} == wanted, engine


@pytest.mark.spark
def test_spark_reads_the_vectors_with_an_option(tmp_path: Path, spark: "SparkSession") -> None:
    path = str(written(tmp_path, 1500, 10))
    option = "spark.sql.parquet.enableNestedColumnVectorizedReader"
    assert spark.read.parquet(path).select("item_id", "row_id").count() == 1500
    with pytest.raises(Exception, match="Unsupported encoding: BYTE_STREAM_SPLIT"):
        spark.read.parquet(path).collect()
    before = spark.conf.get(option)
    spark.conf.set(option, "false")
    try:
        rows = spark.read.parquet(path).collect()
    finally:
        spark.conf.set(option, str(before))
    wanted = {item: vector.tolist() for item, vector in rounded_items(1500, 10).items()}
    assert {row["item_id"]: row["vector"] for row in rows} == wanted


# --- releases


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, dim=64)


def test_a_release_of_fewer_bits_has_rounded_vectors_in_table_and_index_and_records_their_size(site: Site) -> None:
    count = 2000
    whole = site.publish(items(count, dim=64), ds=YESTERDAY)
    made = site.publish(items(count, dim=64), mantissa_bits=10)
    expected = rounded_items(count, 10, dim=64)
    release = open_release(site.table_uri)
    assert release.facts == made
    ids = list(expected)[:50]
    assert np.array_equal(release.vectors(ids), [expected[item] for item in ids])
    names, scores = release.search(release.vectors(ids), k=3)
    assert names[:, 0].tolist() == ids
    everything = np.stack(list(expected.values()))
    best = -np.sort(-(everything[:50] @ everything.T), axis=1)[:, :3]
    np.testing.assert_allclose(scores, best, atol=1e-6)
    for facts, bits in ((whole, MANTISSA_BITS), (made, 10)):
        assert facts.table.mantissa_bits == facts.facts()["mantissa_bits"] == bits
        size = sum((Path(site.table_uri) / file.path).stat().st_size for file in facts.table.files)
        assert facts.table.bytes_per_item == facts.facts()["bytes_per_item"] == size / count
    assert made.table.bytes_per_item < whole.table.bytes_per_item - 0.3 * 64 * 4


def test_the_log_keeps_precision_and_size(site: Site) -> None:
    made = site.publish(items(40, dim=64), mantissa_bits=7)
    read = release_log.read_releases(site.storage, site.table_uri)
    assert [(r.table.mantissa_bits, r.table.bytes_per_item) for r in read] == [(7, made.table.bytes_per_item)]


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 7, 10, 15])
@pytest.mark.parametrize("seed", range(3))
def test_unit_vectors_pass_the_audit_at_every_precision(tmp_path: Path, bits: int, seed: int) -> None:
    for dim in (2, 8, 64):
        site = Site(tmp_path / str(dim), dim=dim)
        report = site.encoded(items(200, dim=dim, seed=seed), mantissa_bits=bits).audit()
        assert report.problems == ()


@pytest.mark.parametrize(
    ("bits", "length", "refused"),
    [
        (23, 1 - 2 * 2.0**-11, False),
        (23, 1 - 3 * 2.0**-11, True),
        (11, 1 - 3 * 2.0**-11, True),
        (10, 1 - 3 * 2.0**-11, False),
        (10, 1 - 4 * 2.0**-11, True),
        (5, 1 - 2.0**-6, False),
        (5, 1 + 2.0**-5, True),
        (1, 0.75, False),
        (1, 0.5, True),
        (1, 1.5, True),
    ],
)
def test_the_audit_allows_lengths_within_the_rounding_error(
    tmp_path: Path, bits: int, length: float, refused: bool
) -> None:
    # The only non-zero number has no more bits than are stored.
    vectors = {"a": np.array([0, 0, length, 0], np.float32)}
    report = Site(tmp_path, dim=4).encoded(vectors, mantissa_bits=bits).audit()
    assert ["not normalised" in problem for problem in report.problems] == [True] * refused


def test_vectors_with_more_bits_than_planned_are_refused(site: Site) -> None:
    encoded = site.encoded(items(40, dim=64), mantissa_bits=12)
    coarser = encoded.plan.model_copy(update={"mantissa_bits": 11})
    encoded.workspace.write_plan(coarser, replacing=encoded.plan)
    report = type(encoded)(site, encoded.workspace, coarser).audit()
    assert len(report.problems) == BUCKETS
    assert all("have more than 11 mantissa bits, the first is of item 'item-" in p for p in report.problems)


LISTS = IndexSettings(factory="IVF16,Flat", max_changed=9.0, target_recall=0.5)


@pytest.mark.parametrize(("before", "after", "patched"), [(10, 10, True), (10, 23, False), (23, 10, False)])
def test_an_index_is_patched_only_at_equal_precision(site: Site, before: int, after: int, patched: bool) -> None:
    yesterday, today = items(600, dim=64), items(600, dim=64) | items(5, dim=64, prefix="new-", seed=1)
    base = site.publish(yesterday, ds=YESTERDAY, index=LISTS, mantissa_bits=before)
    encoded = site.encoded(today, base=base, mantissa_bits=after)
    encoded.audit()
    build = encoded.index(LISTS).index.build
    assert (build.items, build.changed) == ((600, 5) if patched else (605, 0))


def test_a_backfill_is_superseded_by_a_release_with_another_precision(site: Site) -> None:
    # Bucket 2 has no file, so that no file shows the precision.
    day = in_buckets(items(60, dim=64), 0, 1, 3)
    site.publish(day)
    some = in_buckets(items(60, dim=64), 2)
    encoded = site.encoded(some, plan_id="some", chosen=(2,))
    encoded.audit()
    encoded.index()
    coarse = site.publish(day, plan_id="again", mantissa_bits=10)
    for publish in (encoded.release, encoded.release_on_top):
        with pytest.raises(Superseded, match=r"^superseded: "):
            publish()
    assert release_log.read_releases(site.storage, site.table_uri)[-1] == coarse
    for file in coarse.table.files:
        found = vectors_of(read_rows(site.storage, site.table_uri, file))
        assert all(x == naive(x, 10) for vector in found.values() for x in vector)

"""Hashes that must agree between Python, Spark's SQL and tables that were published before."""

import hashlib
import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_schemas.feature_table import bucket_number, partition_path
from marc_schemas.files import PublishedFile
from marc_schemas.identity import content_hash, files_digest, plan_key, receipts_digest, row_id

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# SELECT xxhash64(id) & 9223372036854775807, left(sha2(id, 256), 32), by Spark 4.2.0. A change would orphan every table.
KNOWN = {
    "": (1779300269653747460, "e3b0c44298fc1c149afbf4c8996fb924"),
    "42": (4478522748992786751, "73475cb40a568e8da8a045ced110137e"),
    "item-1": (7116214533829597509, "59908df50572502ceeabbcc669a28bcc"),
    "tt0111161": (6663945433915024792, "ab9a75ebe17a869c1cb30fb51d02d2f4"),
    "Ünïcødé": (815451342645751584, "bef14f670c8662d46408f1b4b6b7fa05"),
    "日本語の商品": (6346535573256716483, "46d8051289147c355d676c0e8e2d3091"),
    "😀🎬": (1361205645007485920, "0ac3f9d0c7c47b5897b12221abd7a3ec"),
    "a" * 31: (1155894261107880164, "61c60b487d1a921e0bcc9bf853dda0fb"),
    "a" * 32: (4175410394768388789, "3ba3f5f43b92602683c19aee62a20342"),
    "0123456789" * 10: (6379203369694145893, "9cfe7faff7054298ca87557e15a10262"),
}


@pytest.mark.parametrize("item", KNOWN)
def test_hashes_are_those_that_spark_computed(item: str) -> None:
    assert (row_id(item), content_hash(item)) == KNOWN[item]


@given(st.text())
def test_hashes_of_any_text_have_their_range_and_are_stable(text: str) -> None:
    assert 0 <= row_id(text) == row_id(str(text)) < 2**63
    assert bytes.fromhex(content_hash(text)) == hashlib.sha256(text.encode()).digest()[:16]


def test_sets_of_files_and_receipts_have_the_digests_that_earlier_runs_recorded() -> None:
    # Another digest would make every finished stage run again.
    files = [PublishedFile(path=path, bytes=1, sha256=sha) for path, sha in (("part-1", "ab"), ("part-0", "cd"))]
    assert files_digest(files) == files_digest(files[::-1]) == "cc2e28d00b1512b7e5dacd9859ddefa9"
    receipts: list[Any] = [SimpleNamespace(bucket=1, file=None), SimpleNamespace(bucket=0, file=files[0])]
    assert receipts_digest(receipts) == receipts_digest(receipts[::-1]) == "0c2126369730b793c1c9544fb4f0b664"
    assert plan_key("0123456789abcdef0123456789abcdef") == "0123456789abcdef"


@given(ds=st.dates().map(str), bucket=st.integers(0, 65_535), name=st.from_regex(r"part-[0-9a-f-]{1,40}\.parquet"))
def test_a_path_contains_its_bucket(ds: str, bucket: int, name: str) -> None:
    assert bucket_number(f"{partition_path(ds, bucket)}/{name}") == bucket


def random_ids(count: int) -> list[str]:
    """Ids of every length from 0 to 120 characters, of every width of UTF-8."""
    draw = random.Random(11)  # noqa: S311
    ranges = [(0x20, 0x7E), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x10FFFF)]
    found = []
    for number in range(count):
        widths = draw.choice([ranges, ranges[:1], ranges[-1:]])
        found.append("".join(chr(draw.randint(*draw.choice(widths))) for _ in range(number % 121)))
    return found


@pytest.mark.spark
def test_spark_sql_and_python_compute_the_same_hashes(spark: "SparkSession") -> None:
    ids = [*random_ids(2000), *KNOWN]
    rows = spark.createDataFrame(pa.table({"id": ids})).selectExpr(
        "id", "xxhash64(id) & 9223372036854775807L AS row_id", "left(sha2(id, 256), 32) AS content"
    )
    found = list(zip(*rows.toArrow().to_pydict().values(), strict=True))
    assert found == [(i, row_id(i), content_hash(i)) for i in ids]

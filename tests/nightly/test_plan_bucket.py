"""The planner of one bucket, without Spark: changes, previous files, tokens, duplicates and collisions."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planning
from marc_pipeline.model.tokens import count_tokens, load_tokenizer
from marc_pipeline.nightly.plan_bucket import PLANNED_ROWS, TOKEN_SAMPLE, _older_record, by_bucket, compare, plan_bucket
from marc_schemas.catalogue import Change, Reason
from marc_schemas.identity import content_hash, row_id
from plan_cases import (
    IDS,
    TEXTS,
    naive_changes,
    naive_tokens,
    planned_rows,
)
from planning import STORAGE, settings_at

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@settings(deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 7)), max_size=8, unique_by=lambda run: run[0]),
    cuts=st.lists(st.integers(0, 60)),
)
def test_rows_are_split_by_bucket_at_any_batch_boundaries(runs: list[tuple[int, int]], cuts: list[int]) -> None:
    numbers = [bucket for bucket, length in sorted(runs) for _ in range(length)]
    # Usable rows of a bucket have different ids; unusable rows have the bucket as id.
    ids = [n if n < 0 else n + 10 * place for place, n in enumerate(numbers)]
    table = pa.table({"row_id": pa.array(ids, pa.int64()), "row": pa.array(range(len(numbers)))})
    edges = sorted({0, len(numbers), *(cut for cut in cuts if cut < len(numbers))})

    def batches() -> Iterator[pa.RecordBatch]:
        for start, end in itertools.pairwise(edges):
            # Spark may send empty batches.
            yield pa.RecordBatch.from_pylist([], table.schema)
            yield table.slice(start, end - start).combine_chunks().to_batches()[0]

    found = [(bucket, rows["row"].to_pylist()) for bucket, rows in by_bucket(batches(), 10)]
    grouped = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1])
    assert found == [(bucket, [row for row, _ in pairs]) for bucket, pairs in grouped]


@settings(deadline=None)
@given(before=st.dictionaries(IDS, TEXTS), today=st.dictionaries(IDS, TEXTS), bundles=st.data())
def test_compare_equals_a_comparison_of_two_dicts(
    before: dict[str, str], today: dict[str, str], bundles: st.DataObject
) -> None:
    made_by = {item_id: bundles.draw(st.sampled_from(["old", "now"])) for item_id in before}

    def rows(items: dict[str, str]) -> pa.Table:
        columns = {"item_id": list(items), "content_hash": list(map(content_hash, items.values()))}
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})

    previous = rows(before).append_column("bundle", pa.array(made_by.values(), pa.string()))
    usable = {i: text if made_by[i] == "now" else f"{text} of another bundle" for i, text in before.items()}
    for bundle in ("now", None):
        change, deleted = compare(rows(today), previous, bundle=bundle)
        changes, gone = naive_changes(usable, today, same_bundle=bundle is not None)
        assert dict(zip(today, change.to_pylist(), strict=True)) == changes
        assert deleted == len(gone)


@settings(max_examples=25, deadline=None)
@given(
    before=st.dictionaries(IDS, TEXTS, max_size=25),
    today=st.dictionaries(IDS, TEXTS, max_size=25),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    same_bundle=st.booleans(),
)
def test_previous_items_are_found_whatever_the_number_of_buckets(
    tmp_path_factory: pytest.TempPathFactory,
    before: dict[str, str],
    today: dict[str, str],
    counts: tuple[int, int],
    same_bundle: bool,
) -> None:
    root = tmp_path_factory.mktemp("buckets")
    wanted = settings_at(root, root, buckets=counts[1])
    base = planning.publish(wanted, before, buckets=counts[0], bundle=None if same_bundle else "0" * 16)
    context = planning.bucket_context(wanted, base)
    changes, gone = naive_changes(before, today, same_bundle=same_bundle)
    for bucket in range(counts[1]):
        mine = {i: text for i, text in today.items() if row_id(i) % counts[1] == bucket}
        summary = plan_bucket(context, bucket, planned_rows(mine))
        assert summary.work is not None
        expected = Counter(changes[i] for i in mine)
        assert (summary.work.new, summary.work.changed, summary.work.unchanged) == tuple(expected[c] for c in Change)
        assert summary.work.deleted == sum(row_id(i) % counts[1] == bucket for i in gone)
        paths = [Path(wanted.table_uri, file.path) for file in summary.work.previous]
        found = {i for path in paths for i in pq.ParquetFile(path).read(["item_id"])["item_id"].to_pylist()}
        assert {i for i in before if row_id(i) % counts[1] == bucket} <= found


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=12), max_tokens=st.integers(2, 20))
def test_token_counts_equal_the_tokenizers_own(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_tokens: int
) -> None:
    bundle = planning.bundle_at(str(tmp_path_factory.mktemp("bundle")), max_tokens=max_tokens)
    tokenizer = load_tokenizer(STORAGE, bundle.uri, max_tokens)
    found = count_tokens(tokenizer, texts, of=len(texts))
    assert (found.tokens, found.error, found.exact) == (naive_tokens(texts, max_tokens), 0, True)


def test_tokens_of_a_large_bucket_are_estimated(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, tmp_path, buckets=4)
    context = planning.bucket_context(wanted, None)
    size = TOKEN_SAMPLE // 4
    today = {f"item {n:05d}": " ".join(["word"] * (n % 40)) + f" {n}" for n in range(size * 3)}
    summary = plan_bucket(context, 0, planned_rows(today))
    assert summary.work is not None
    assert not summary.exact
    true = naive_tokens(list(today.values()), planning.MAX_TOKENS)
    assert 0 < abs(summary.work.tokens - true) < 2 * summary.work.tokens_error < 0.05 * true
    longer = [text for text in today.values() if naive_tokens([text], 999) > planning.MAX_TOKENS]
    assert len(longer) > size // 10
    assert summary.work.cut_texts == pytest.approx(len(longer), rel=0.2)
    lost = naive_tokens(longer, 999) - len(longer) * planning.MAX_TOKENS
    assert summary.work.lost_tokens == pytest.approx(lost, rel=0.2)
    exact = plan_bucket(context, 0, planned_rows(dict(list(today.items())[:size])))
    assert exact.work is not None
    assert exact.exact
    assert exact.work.tokens_error == 0


def test_a_row_id_collision_is_quarantined_and_never_merged(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, tmp_path, buckets=1)
    context = planning.bucket_context(wanted, planning.publish(wanted, {"a": "old", "b": "text of b"}))
    today = {"a": "text of a", "b": "text of b", "c": "text of c", "d": "text of d"}
    summary = plan_bucket(context, 0, planned_rows(today, ids={"a": 5, "b": 7, "c": 5, "d": 5}))
    assert summary.quarantined == {Reason.ROW_ID_COLLISION: 2}
    assert summary.work is not None
    assert (summary.work.items, summary.work.changed, summary.work.unchanged, summary.work.new) == (2, 1, 1, 0)
    assert context.base is not None
    items = pq.read_table(context.workspace.items_uri(0, context.base.release_id)).to_pylist()
    assert [(item["item_id"], item["row_id"], item["text"]) for item in items] == [
        ("a", 5, "text of a"), ("b", 7, "text of b")
    ]  # fmt: skip
    rejected = pq.read_table(Path(context.workspace.quarantine_uri, "bucket-00000.parquet")).to_pylist()
    assert [(json.loads(row["row"]), row["source"]) for row in rejected] == [
        ({"item_id": i, "row_id": 5, "text": today[i]}, "c.jsonl") for i in "cd"
    ]


@pytest.mark.parametrize("victim", ["b", "c", "d"])
def test_an_item_of_the_base_release_keeps_its_row_id(tmp_path: Path, victim: str) -> None:
    """Ids of equal hashes can be made. Neither an earlier nor a later id takes the place of a published item."""
    wanted = settings_at(tmp_path, tmp_path, buckets=1)
    context = planning.bucket_context(wanted, planning.publish(wanted, {victim: "published", "x": "other"}))
    today = {name: f"text of {name}" for name in "abcdex"}
    ids = dict.fromkeys("abcde", 5) | {"x": 7}
    summary = plan_bucket(context, 0, planned_rows(today, ids=ids))
    assert summary.quarantined == {Reason.ROW_ID_COLLISION: 4}
    assert summary.work is not None
    assert (summary.work.changed, summary.work.new, summary.work.deleted) == (2, 0, 0)
    assert context.base is not None
    items = pq.read_table(context.workspace.items_uri(0, context.base.release_id)).to_pylist()
    assert [item["item_id"] for item in items] == sorted([victim, "x"])


def test_an_older_duplicate_does_not_collide(tmp_path: Path) -> None:
    context = planning.bucket_context(settings_at(tmp_path, tmp_path, buckets=1), None)
    rows = planned_rows({"a": "text of a"}).to_pylist()
    rows.insert(0, {**rows[0], "text": "older", "updated_at": -1})
    rows[1]["updated_at"] = 0
    summary = plan_bucket(context, 0, pa.Table.from_pylist(rows, schema=PLANNED_ROWS))
    assert summary.quarantined == {Reason.OLDER_DUPLICATE: 1}
    assert summary.work is not None
    assert summary.work.items == 1
    assert pq.read_table(context.workspace.items_uri(0, None))["text"].to_pylist() == ["text of a"]


VERSIONS = st.tuples(
    st.sampled_from(["a", "b", "é", "😀"]),
    st.sampled_from([None, -1, 0, 5]),
    TEXTS,
    st.sampled_from(["x.csv", "y.csv"]),
)


@settings(max_examples=60, deadline=None)
@given(versions=st.lists(VERSIONS, max_size=20))
def test_the_kept_row_of_an_id_is_the_one_that_sql_would_choose(
    tmp_path_factory: pytest.TempPathFactory, versions: list[tuple[str, int | None, str, str]]
) -> None:
    root = tmp_path_factory.mktemp("versions")
    context = planning.bucket_context(settings_at(root, root, buckets=1), None)
    rows = [
        {"item_id": i, "row_id": row_id(i), "text": t, "content_hash": content_hash(t), "updated_at": at, "source": s}
        for i, at, t, s in versions
    ]
    summary = plan_bucket(context, 0, pa.Table.from_pylist(rows, schema=PLANNED_ROWS))

    # The order of marc_pipeline.catalogue.rows.NEWEST_FIRST in plain Python.
    by_source = sorted(versions, key=lambda v: v[3])
    newest_first = sorted(by_source, key=lambda v: (v[1] is not None, v[1] or 0, content_hash(v[2])), reverse=True)
    newest: dict[str, tuple[str, int | None, str, str]] = {}
    older = Counter[tuple[str, str, str, str]]()
    for version in newest_first:
        best = newest.setdefault(version[0], version)
        if best is not version:
            older[version[0], version[2], version[3], str(version[1])] += 1
    stamps = {None: "None", "1969-12-31T23:59:59.999Z": "-1"} | dict.fromkeys(["1970-01-01T00:00:00.000Z"], "0 or 5")
    found = Counter[tuple[str, str, str, str]]()
    if older:
        for row in pq.read_table(Path(context.workspace.quarantine_uri, "bucket-00000.parquet")).to_pylist():
            record = json.loads(row["row"])
            found[record["item_id"], record["text"], row["source"], stamps[record.get("updated_at")]] += 1
    coarse = Counter[tuple[str, str, str, str]]()
    for (item_id, text, source, stamp), count in older.items():
        coarse[item_id, text, source, "0 or 5" if stamp in {"0", "5"} else stamp] += count
    items = pq.read_table(context.workspace.items_uri(0, None)).to_pylist() if newest else []
    assert {item["item_id"]: item["text"] for item in items} == {i: version[2] for i, version in newest.items()}
    assert [item["item_id"] for item in items] == sorted(newest)
    # The file decides between rows that are equal otherwise.
    assert found == coarse
    assert summary.quarantined == ({Reason.OLDER_DUPLICATE: older.total()} if older else {})


@pytest.mark.spark
def test_the_record_of_an_older_duplicate_equals_that_of_spark(spark: "SparkSession", tmp_path: Path) -> None:
    texts = ["".join(map(chr, range(1, 300))), '\x00 \\ \\u001b " / 😀 \u2028', "é" * 9]
    moments = [None, 0, -1, -1001, 999, 1_700_000_000_123_456, 253_402_300_800_000_000, 10**18, -(10**17), -(10**18)]
    rows = [(f"{text} {n}", text, at) for text in texts for n, at in enumerate(moments)]
    frame = spark.createDataFrame(rows, "item_id STRING, text STRING, at BIGINT")
    wanted = frame.selectExpr("to_json(struct(item_id, text, timestamp_micros(at) AS updated_at)) AS row").collect()
    assert [_older_record(*row) for row in rows] == [row.row for row in wanted]


@pytest.mark.parametrize("piece_bytes", [1, 200, 10**9])
def test_a_bucket_does_not_depend_on_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr("marc_pipeline.nightly.plan_bucket.PIECE_BYTES", piece_bytes)
    context = planning.bucket_context(settings_at(tmp_path, tmp_path, buckets=1), None)
    texts = {f"item {n:02d}": "word " * (n % 7) + str(n) for n in range(50)}
    rows = planned_rows(texts)
    summary = plan_bucket(context, 0, pa.concat_tables([rows, rows.slice(10, 20)]))
    assert summary.quarantined == {Reason.OLDER_DUPLICATE: 20}
    found = pq.read_table(context.workspace.items_uri(0, None))
    assert dict(zip(found["item_id"].to_pylist(), found["text"].to_pylist(), strict=True)) == texts
    rejected = pq.read_table(Path(context.workspace.quarantine_uri, "bucket-00000.parquet"))
    assert rejected["item_id"].to_pylist() == sorted(texts)[10:30]

"""A plan accounts for every row, compares with the base release like a dict would, and is named by what it does."""

import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import planning
from example_counts import examples
from marc_pipeline.cli.publishing import describe_plan, print_plan
from marc_pipeline.config import EncodeSettings, Settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.errors import Superseded, UserError
from marc_pipeline.model.tokens import TokenCount, count_tokens, load_tokenizer
from marc_pipeline.nightly.encode import pending_tasks
from marc_pipeline.nightly.plan import _start_seconds, base_release, make_plan
from marc_pipeline.nightly.plan_bucket import PLANNED_ROWS, TOKEN_SAMPLE, _older_record, by_bucket, compare, plan_bucket
from marc_pipeline.nightly.plan_identity import identify_plan
from marc_pipeline.releases import log as release_log
from marc_pipeline.scheduler.tasks import identify_backfills
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import ITEMS, QUARANTINE, Change, Reason
from marc_schemas.feature_table import bucket_number
from marc_schemas.identity import content_hash, row_id
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.receipt import Receipt
from marc_schemas.release import Release
from planning import BLANK, DS, STORAGE, CatalogueRow, naive_plan, plan_day, settings_at, write_csv, write_jsonl
from release_cases import altered, unpublished

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

# A seed says nothing when it shrinks: the first one that fails is shown as it is.
SPARK_EXAMPLES = examples(1, of=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])


def write_day(root: Path, items: dict[str, str], name: str = "day") -> Path:
    return write_jsonl(root / name / "c.jsonl", [{"item_id": i, "title": t} for i, t in items.items()])


# --- every row is accounted for

HOSTILE = "abc ,;'\"\\\n\r\t\x00\x01\x0b\x1b\x7f{}[]:/%é漢😀\u0301\u200b\u2028\ufeff\x85"
STAMPS = [None, None, "2026-11-01T00:00:00", "2026-11-01T00:00:01", "2026-11-20T00:00:00"]
LONG = 1_000_000


class Hostile:
    """Makes the rows of three files that differ, and keeps what was written."""

    def __init__(self, seed: int, form: str) -> None:
        self.random = planning.chance(seed)
        self.form = form
        self.rows: list[CatalogueRow] = []

    def text(self) -> str | None:
        choice = self.random.random()
        if choice < 0.1:
            return None
        if choice < 0.2:
            return self.random.choice(["", " ", "\t\n", "null", "NULL", "None", "\\N", "\u00a0"])
        if choice < 0.24:
            return "bad \ufffd"
        return "".join(self.random.choices(HOSTILE, k=self.random.randrange(1, 30)))

    def item_id(self, kind: str) -> str | None:
        if kind != "text":
            return None if self.random.random() < 0.02 else str(self.random.randrange(150))
        return self.random.choice([self.text, lambda: f"item {self.random.randrange(300)}"])()

    def make(self, source: str, count: int, kind: str) -> list[CatalogueRow]:
        made = []
        for _ in range(count):
            columns = {"title": self.text(), "genres": self.text()}
            made.append(CatalogueRow(self.item_id(kind), columns, self.random.choice(STAMPS), source))
        item_id = "17" if kind != "text" else "long"
        made.insert(1, CatalogueRow(item_id, {"title": "x" * LONG, "genres": None}, "2026-11-21T00:00:00", source))
        self.rows += made
        return made


def _as_rows(made: Sequence[CatalogueRow]) -> list[dict[str, str | None]]:
    return [{"item_id": r.item_id, **r.columns, "at": r.updated_at, "extra": "é"} for r in made]


def _hostile_csv(folder: Path, hostile: Hostile, count: int) -> list[str]:
    """Two files in another order of columns, one of them with rows of too many and too few fields."""
    write_csv(folder / "a.csv", _as_rows(hostile.make("a.csv", count, "text")), ["item_id", "title", "genres", "at"])
    columns = ["extra", "at", "genres", "title", "item_id"]
    path = write_csv(folder / "b.csv", _as_rows(hostile.make("b.csv", count, "number")), columns, bom=True)
    broken = [",".join("x" * hostile.random.choice([1, 2, 4, 6, 9])) for _ in range(20)]
    return _append_broken(path, broken, hostile)


def _hostile_jsonl(folder: Path, hostile: Hostile, count: int) -> list[str]:
    """Numbers and strings as ids, absent columns, unfinished records, lone surrogates."""
    made = hostile.make("a.jsonl", count, "text")
    rows = [{n: v for n, v in row.items() if v is not None or hostile.random.random() < 0.5} for row in _as_rows(made)]
    write_jsonl(folder / "a.jsonl", rows, ensure_ascii=False)
    numbered = _as_rows(hostile.make("b.jsonl", count, "number"))
    path = write_jsonl(
        folder / "b.jsonl", [{**row, "item_id": row["item_id"] and int(row["item_id"])} for row in numbered]
    )
    kinds = ['{"item_id": "x", "ti', "[1]", "nothing", '{"item_id": "raw\ttab"}', "]", "null", '{"item_id": {}, ']
    return _append_broken(path, hostile.random.choices(kinds, k=20), hostile)


def _append_broken(path: Path, broken: list[str], hostile: Hostile) -> list[str]:
    with path.open("a", newline="") as file:
        file.writelines(line + "\n" for line in broken)
    hostile.rows += [CatalogueRow(None, {}, None, path.name, Reason.MALFORMED)] * len(broken)
    return broken


def _hostile_parquet(folder: Path, hostile: Hostile, count: int) -> list[str]:
    """Ids as string, int32 and int64, columns as string, binary and list, columns in another order."""
    for name, kind, id_type in [("a", "text", pa.string()), ("b", "number", pa.int64()), ("c", "number", pa.int32())]:
        made = hostile.make(f"{name}.parquet", count, kind)
        rows = _as_rows(made)
        ids = [row["item_id"] for row in rows]
        columns = {
            "item_id": pa.array([i if kind == "text" or i is None else int(i) for i in ids], id_type),
            "title": pa.array([row["title"] for row in rows], pa.string()),
            "genres": pa.array([row["genres"] for row in rows], pa.string()),
            "at": pa.array([row["at"] and datetime.fromisoformat(row["at"]) for row in rows], pa.timestamp("us")),
        }
        if name == "b":
            columns["genres"] = columns["genres"].cast(pa.binary())
            columns["title"] = pa.array([None if r["title"] is None else [r["title"]] for r in rows])
        if name == "c":
            columns = {"extra": pa.array(range(len(rows))), **dict(reversed(columns.items()))}
        planning.write_parquet(folder / f"{name}.parquet", columns)
    bad = [bytes(hostile.random.choices([0xFF, 0xC3, 0x80, 0x61, 0xED, 0xA0], k=9)) + b"\xff" for _ in range(20)]
    columns = {"item_id": planning.undecoded_strings(bad[:10] + [b"fine"] * 10), "genres": pa.nulls(20, pa.string())}
    columns |= {"title": pa.array([b"fine"] * 10 + bad[10:], pa.binary()), "at": pa.nulls(20, pa.timestamp("ms"))}
    planning.write_parquet(folder / "d.parquet", columns)
    hostile.rows += [CatalogueRow(None, {}, None, "d.parquet", Reason.UNDECODABLE)] * len(bad)
    return []


WRITERS: dict[str, Callable[[Path, Hostile, int], list[str]]] = {
    "csv": _hostile_csv,
    "jsonl": _hostile_jsonl,
    "parquet": _hostile_parquet,
}


@pytest.mark.parametrize("form", WRITERS)
@SPARK_EXAMPLES
@given(seed=st.integers(0, 2**32 - 1))
def test_rows_in_are_items_planned_plus_rows_quarantined(
    spark: "SparkSession", tmp_path_factory: pytest.TempPathFactory, form: str, seed: int
) -> None:
    root = tmp_path_factory.mktemp(form)
    hostile = Hostile(seed, form)
    broken = WRITERS[form](root / "day", hostile, 800)
    day = plan_day(
        spark, settings_at(root, root / "day", template=planning.TEMPLATE, updated_at_column="at", buckets=5)
    )

    items, reasons = naive_plan(hostile.rows, planning.TEMPLATE)
    assert day.texts == items
    assert day.reasons == reasons
    # The plan's own counts are those of its files, and nothing is lost between them.
    assert day.plan.quarantined == dict(day.reasons)
    assert day.plan.rows_read == len(hostile.rows) == len(day.items) + len(day.quarantine)
    assert day.plan.items == day.plan.new == len(day.items)
    for item_id, item in day.items.items():
        assert (item["row_id"], item["bucket"]) == (row_id(item_id), row_id(item_id) % 5)
        assert item["content_hash"] == content_hash(item["text"])
    written = Counter((r.source, json.dumps(_stripped(r))) for r in hostile.rows if r.reason is None)
    for row in day.quarantine:
        if row["reason"] == Reason.MALFORMED:
            broken.remove(row["row"])
        elif row["reason"] in {Reason.NULL_ID, Reason.EMPTY_TEXT} and form == "csv":
            kept = {name: value for name, value in json.loads(row["row"]).items() if name != "extra"}
            written.subtract([(row["source"], json.dumps(dict(sorted(kept.items()))))])
    assert broken == []
    assert min(written.values()) >= 0


def _stripped(row: CatalogueRow) -> dict[str, str]:
    """What CSV can tell of a row: null and empty are the same there."""
    found = {"item_id": row.item_id, **row.columns, "at": row.updated_at}
    return {name: value for name, value in sorted(found.items()) if value}


@SPARK_EXAMPLES
@given(seed=st.integers(0, 2**32 - 1))
def test_lone_surrogates_and_cut_bytes_lose_no_row(
    spark: "SparkSession", tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    root, chance = tmp_path_factory.mktemp("surrogates"), planning.chance(seed)
    pieces = [r"\ud800", r"\udfff", r"\ud83d\ude00", r"\u0000", "a", r"\"", r"\\", "\xff\xfe", "é", r"\n"]

    def text() -> str:
        return "".join(chance.choices(pieces, k=chance.randrange(4)))

    lines = [f'{{"item_id": "{text()}", "title": "{text()}"}}' for _ in range(2000)]
    data = "\n".join(['{"item_id": "first", "title": "first"}', *lines]).encode("latin-1")
    planning.write_bytes(root / "day" / "c.jsonl", data)
    day = plan_day(spark, settings_at(root, root / "day"))
    assert day.plan.rows_read == len(lines) + 1 == len(day.items) + len(day.quarantine)
    assert all(row["row"] for row in day.quarantine)


def test_every_reason_is_counted_and_written_with_its_row(spark: "SparkSession", tmp_path: Path) -> None:
    lines = [
        '{"item_id": "a", "title": "old", "at": "2026-11-01"}',
        '{"item_id": "a", "title": "latest", "at": "2026-11-03"}',
        '{"item_id": "a", "title": "undated"}',
        '{"item_id": "", "title": "no id", "at": "2026-11-02"}',
        '{"item_id": "b", "title": " "}',
        '{"item_id": "c", "title": "\ufffd"}',
        '{"item_id": "d", "title": ',
    ]
    path = planning.write_bytes(tmp_path / "day" / "items.jsonl", "\n".join(lines).encode())
    day = plan_day(spark, settings_at(tmp_path, path, updated_at_column="at"))
    assert day.texts == {"a": "latest"}
    rows = {(row["item_id"], row["reason"]): row["row"] for row in day.quarantine if row["reason"] != "older_duplicate"}
    assert {key: row if key[1] == Reason.MALFORMED else json.loads(row) for key, row in rows.items()} == {
        ("", Reason.NULL_ID): {"item_id": "", "title": "no id", "at": "2026-11-02"},
        ("b", Reason.EMPTY_TEXT): {"item_id": "b", "title": " "},
        ("c", Reason.UNDECODABLE): {"item_id": "c", "title": "\ufffd"},
        (None, Reason.MALFORMED): lines[-1],
    }
    older = [json.loads(row["row"]) for row in day.quarantine if row["reason"] == Reason.OLDER_DUPLICATE]
    assert sorted((row["item_id"], row["text"], row.get("updated_at", "")[:10]) for row in older) == [
        ("a", "old", "2026-11-01"), ("a", "undated", "")
    ]  # fmt: skip
    assert {row["source"] for row in day.quarantine} == {path.name}
    assert day.plan.quarantined == {
        "empty_text": 1, "malformed": 1, "null_id": 1, "older_duplicate": 2, "undecodable": 1
    }  # fmt: skip
    work_uri = Path(str(tmp_path), "data", "work", "plans", day.plan.plan_id)
    for folder, schema in [("items/nothing", ITEMS), ("quarantine", QUARANTINE)]:
        files = sorted((work_uri / folder).glob("*.parquet"))
        assert files
        for file in files:
            assert pq.read_schema(file).equals(schema)


def test_a_catalogue_without_a_usable_row_is_planned_with_nothing_to_do(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"item_id": None, "title": "a"}, {"item_id": "x", "title": ""}])
    plan = plan_day(spark, settings_at(tmp_path, path)).plan
    assert (plan.rows_read, plan.items, plan.work, plan.tokens) == (2, 0, (), 0)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_catalogue_without_rows_is_the_users_error(spark: "SparkSession", tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c.{ending}"
    if ending == "csv":
        write_csv(path, [], ["item_id", "title"])
    else:
        planning.write_parquet(path, {"item_id": pa.array([], pa.string()), "title": pa.array([], pa.string())})
    with pytest.raises(UserError, match="no rows") as error:
        plan_day(spark, settings_at(tmp_path, path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# --- the latest row wins, however the files are cut


def test_the_latest_row_wins_however_files_are_split_and_ordered(spark: "SparkSession", tmp_path: Path) -> None:
    chance = planning.chance(7)
    rows = [
        {"item_id": f"{chance.randrange(40)}", "title": f"text {chance.randrange(9)}", "at": chance.choice(STAMPS)}
        for _ in range(300)
    ]
    found = []
    for number, files in enumerate([1, 1, 3, 7]):
        chance.shuffle(rows)
        for file in range(files):
            # Names run the other way in every second round, so that no order of files can decide.
            name = f"{file if number % 2 else files - file}.jsonl"
            write_jsonl(tmp_path / str(number) / name, rows[file::files])
        day = plan_day(spark, settings_at(tmp_path, tmp_path / str(number), updated_at_column="at"))
        found.append((day.items, sorted(row["row"] for row in day.quarantine)))
    assert all(result == found[0] for result in found[1:])
    written = [CatalogueRow(r["item_id"], {"title": r["title"]}, r["at"], "") for r in rows]
    items, reasons = naive_plan(written, "{title}")
    assert {item_id: item["text"] for item_id, item in found[0][0].items()} == items
    assert len(found[0][1]) == reasons[Reason.OLDER_DUPLICATE]


# --- against the base release

IDS = st.text("abcé😀", max_size=3)
TEXTS = st.sampled_from(["a", "b", "", "é"])


def naive_changes(
    before: dict[str, str], today: dict[str, str], *, same_bundle: bool = True
) -> tuple[dict[str, str], set[str]]:
    """The change by item id, and the ids that are gone."""
    kept = {i for i, text in today.items() if same_bundle and before.get(i) == text}
    changes = {i: Change.UNCHANGED if i in kept else Change.CHANGED if i in before else Change.NEW for i in today}
    return {i: change.value for i, change in changes.items()}, before.keys() - today.keys()


@given(before=st.dictionaries(IDS, TEXTS), today=st.dictionaries(IDS, TEXTS), bundles=st.data())
def test_compare_is_a_comparison_of_two_dicts(
    before: dict[str, str], today: dict[str, str], bundles: st.DataObject
) -> None:
    made_by = {item_id: bundles.draw(st.sampled_from(["old", "now"])) for item_id in before}
    previous = pa.table(
        {
            "item_id": pa.array(list(before), pa.string()),
            "content_hash": pa.array(map(content_hash, before.values()), pa.string()),
            "bundle": pa.array(made_by.values(), pa.string()),
        }
    )
    items = pa.table(
        {
            "item_id": pa.array(list(today), pa.string()),
            "content_hash": pa.array(map(content_hash, today.values()), pa.string()),
        }
    )
    change, deleted = compare(items, previous, bundle="now")
    usable = {
        item_id: text if made_by[item_id] == "now" else f"{text} of another bundle" for item_id, text in before.items()
    }
    changes, gone = naive_changes(usable, today)
    assert dict(zip(today, change.to_pylist(), strict=True)) == changes
    assert deleted == len(gone)
    # Without a bundle nothing is carried over.
    change, deleted = compare(items, previous, bundle=None)
    changes, _ = naive_changes(before, today, same_bundle=False)
    assert dict(zip(today, change.to_pylist(), strict=True)) == changes
    assert deleted == len(gone)


def planned_rows(items: dict[str, str], *, ids: dict[str, int] | None = None) -> pa.Table:
    """Good rows as they reach the planner of a bucket."""
    rows = [
        {
            "item_id": item_id,
            "row_id": ids[item_id] if ids else row_id(item_id),
            "text": text,
            "content_hash": content_hash(text),
            "source": "c.jsonl",
        }
        for item_id, text in sorted(items.items())
    ]
    return pa.Table.from_pylist(rows, schema=PLANNED_ROWS)


@settings(max_examples=25, deadline=None)
@given(
    before=st.dictionaries(IDS, TEXTS, max_size=25),
    today=st.dictionaries(IDS, TEXTS, max_size=25),
    counts=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    same_bundle=st.booleans(),
)
def test_every_previous_item_is_found_whatever_the_number_of_buckets(
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
        assert summary.work.new + summary.work.changed == expected[Change.NEW] + expected[Change.CHANGED]
        holding = {i for i in before if row_id(i) % counts[1] == bucket}
        carried = {i for file in summary.work.previous for i in _ids_in(wanted, file.path)}
        assert holding <= carried


def _ids_in(wanted: Settings, path: str) -> list[str]:
    return list(pq.ParquetFile(Path(wanted.table_uri, path)).read(columns=["item_id"])["item_id"].to_pylist())


BEFORE = {f"item {n}": f"text {n}" for n in range(60)}
TODAY = {f"item {n}": f"text {n}" + " changed" * (n % 7 == 0) for n in range(20, 80)}


@pytest.mark.parametrize(("base_buckets", "buckets"), [(4, 4), (6, 4), (1, 5), (3, 1)])
def test_a_plan_compares_with_the_previous_release(
    spark: "SparkSession", tmp_path: Path, base_buckets: int, buckets: int
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY), buckets=buckets)
    base = planning.publish(wanted, BEFORE, ds="2026-11-19", buckets=base_buckets)
    day = plan_day(spark, wanted)
    changes, gone = naive_changes(BEFORE, TODAY)
    assert day.changes == changes
    assert day.plan.deleted == len(gone) == 20
    assert Counter(day.changes.values()) == {
        "new": day.plan.new,
        "changed": day.plan.changed,
        "unchanged": day.plan.unchanged,
    }
    assert day.plan.base_release == base.release_id
    for work in day.plan.work:
        assert work.deleted == sum(row_id(i) % buckets == work.bucket for i in gone)
    assert day.plan.tokens_per_second == base.tokens_per_second == 100.0
    start = base.seconds["encode"] - base.counts.tokens / 100
    assert (day.plan.start_seconds, day.plan.seconds) == (
        pytest.approx(start),
        pytest.approx(start + day.plan.tokens / 100),
    )
    assert start > 0


def test_without_a_release_everything_is_new_and_with_another_bundle_changed(
    spark: "SparkSession", tmp_path: Path
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    first = plan_day(spark, wanted)
    assert set(first.changes.values()) == {"new"}
    assert (first.plan.base_release, first.plan.tokens_per_second, first.plan.seconds) == (None, None, None)
    planning.publish(wanted, TODAY)
    other = settings_at(tmp_path, wanted.catalogue.uri, seed=1)
    day = plan_day(spark, other)
    assert set(day.changes.values()) == {"changed"}
    assert day.plan.tokens == first.plan.tokens > 0
    assert day.plan.tokens_per_second is None


def test_buckets_whose_items_are_all_gone_are_planned_with_their_deletions(
    spark: "SparkSession", tmp_path: Path
) -> None:
    buckets = 16
    wanted = settings_at(tmp_path, write_day(tmp_path, {"item 0": "text 0"}), buckets=buckets)
    planning.publish(wanted, BEFORE)
    plan = plan_day(spark, wanted).plan
    held = Counter(row_id(item_id) % buckets for item_id in BEFORE)
    held[row_id("item 0") % buckets] -= 1
    assert {work.bucket: work.deleted for work in plan.work} == dict(held)
    assert plan.unchanged == plan.items == 1
    assert plan.deleted == len(BEFORE) - 1
    assert plan.tokens == 0
    assert all(len(work.previous) == 1 for work in plan.work)


def test_the_base_is_the_latest_release_of_the_date_or_before_else_the_earliest_after(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, tmp_path)
    releases = [planning.publish(wanted, {}, ds=ds) for ds in ("2026-11-10", "2026-11-12", "2026-11-14")]
    again = planning.publish(wanted, {"a": "b"}, ds="2026-11-12")

    def base(ds: str) -> Release | None:
        return base_release([*releases, again], ds=ds)

    assert base("2026-11-20") == base("2026-11-14") == releases[2]
    assert base("2026-11-13") == base("2026-11-12") == again
    assert base("2026-11-11") == base("2026-11-10") == base("2026-11-01") == releases[0]
    assert base_release([], ds=DS) is None
    withdrawn = again.model_copy(update={"release_id": "gone", "turn": again.turn + 1, "withdrawn": True})
    assert base_release([*releases, again, withdrawn], ds="2026-11-13") == releases[0]


# --- what names a plan


def precise(wanted: Settings, bits: int) -> Settings:
    return wanted.model_copy(update={"mantissa_bits": bits})


def plan_id(wanted: Settings, ds: str = DS) -> str:
    return identify_plan(open_deployment(wanted), ds=ds).plan_id


def test_a_plan_id_changes_with_everything_that_changes_the_plan(tmp_path: Path) -> None:
    path = write_day(tmp_path, BEFORE)
    both = planning.write_bytes(tmp_path / "c.txt", b'item_id,title\n{"item_id": "1", "title": "a"}\n')
    variants: dict[str, Callable[[], str]] = {
        "as it is": lambda: plan_id(settings_at(tmp_path, path)),
        "ds": lambda: plan_id(settings_at(tmp_path, path), ds="2026-11-21"),
        "content": lambda: plan_id(settings_at(tmp_path, write_day(tmp_path, TODAY, "other"))),
        "one byte": lambda: plan_id(settings_at(tmp_path, write_day(tmp_path, {**BEFORE, "item 3": "text 4"}, "byte"))),
        "bundle": lambda: plan_id(settings_at(tmp_path, path, seed=1)),
        "template": lambda: plan_id(settings_at(tmp_path, path, template="{title}.")),
        "buckets": lambda: plan_id(settings_at(tmp_path, path, buckets=5)),
        "mantissa bits": lambda: plan_id(precise(settings_at(tmp_path, path), 22)),
        "id column": lambda: plan_id(settings_at(tmp_path, path, id_column="title")),
        "updated_at": lambda: plan_id(settings_at(tmp_path, path, updated_at_column="title")),
        "as CSV": lambda: plan_id(settings_at(tmp_path, both, format="csv")),
        "as JSON lines": lambda: plan_id(settings_at(tmp_path, both, format="jsonl")),
    }
    found = {name: make() for name, make in variants.items()}
    assert len(set(found.values())) == len(variants)
    write_day(tmp_path, TODAY, "both")
    folder = settings_at(tmp_path, tmp_path / "both")
    before = plan_id(folder)
    shutil.copy(path, tmp_path / "both" / "second.jsonl")
    assert plan_id(folder) != before


def test_a_plan_id_stays_when_files_are_touched_or_copied(tmp_path: Path) -> None:
    path = write_day(tmp_path, BEFORE)
    wanted = settings_at(tmp_path, path.parent)
    before = plan_id(wanted)
    os.utime(path, (0, 0))
    assert plan_id(wanted) == before
    copied = shutil.copytree(path.parent, tmp_path / "elsewhere")
    assert plan_id(settings_at(tmp_path, copied)) == before
    assert plan_id(settings_at(tmp_path, copied / "*.jsonl")) == before
    (copied / "_SUCCESS").touch()
    assert plan_id(settings_at(tmp_path, copied)) == before
    # The same bundle trained again is the same bundle, wherever it lies.
    assert plan_id(settings_at(tmp_path / "moved", copied)) == before


def test_a_plan_made_once_is_returned_as_it_stands(spark: "SparkSession", tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    first = plan_day(spark, wanted)
    # Without a session nothing could be planned again.
    again = plan_day(None, wanted)
    assert again == first
    assert again.plan.created_at == first.plan.created_at <= datetime.now(UTC)


def test_a_plan_that_nobody_worked_on_is_made_anew_against_a_release_that_came_in_between(
    spark: "SparkSession", tmp_path: Path
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    looked_at = plan_day(spark, wanted).plan
    release = planning.publish(wanted, BEFORE)
    assert (looked_at.base_release, looked_at.unchanged) == (None, 0)
    made = plan_day(spark, wanted).plan
    assert made.plan_id == looked_at.plan_id
    assert made.base_release == release.release_id
    assert made.unchanged > 0
    assert plan_day(None, wanted).plan == made


def test_a_damaged_file_of_last_night_makes_its_bucket_new_and_stops_nothing(
    spark: "SparkSession", tmp_path: Path
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    release = planning.publish(wanted, BEFORE)
    damaged = release.table.files[0]
    path = Path(wanted.table_uri) / damaged.path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    plan = plan_day(spark, wanted).plan
    bucket = bucket_number(damaged.path)
    (work,) = (work for work in plan.work if work.bucket == bucket)
    assert (work.new, work.previous) == (work.items, ())
    assert work.deleted == max(0, damaged.rows - work.items)
    assert sum(other.unchanged for other in plan.work if other.bucket != bucket) > 0


def test_a_plan_is_made_anew_when_the_day_is_published_withdrawn_or_rolled_back(
    spark: "SparkSession", tmp_path: Path
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    old = planning.publish(wanted, BEFORE, ds="2026-11-19")
    found = [plan_day(spark, wanted).plan]
    live = planning.publish(wanted, TODAY)
    found.append(plan_day(spark, wanted).plan)
    gone = live.model_copy(update={"release_id": "gone", "turn": live.turn + 1, "withdrawn": True})
    assert release_log.append(STORAGE, wanted.table_uri, [gone])
    found.append(plan_day(spark, wanted).plan)
    # A later date is nothing that this one would supersede, or be compared with.
    planning.publish(wanted, BEFORE, ds="2026-11-21")
    assert plan_day(None, wanted).plan == found[-1]
    assert [(plan.base_release, plan.live_release) for plan in found] == [
        (old.release_id, None),
        (live.release_id, live.release_id),
        (old.release_id, "gone"),
    ]
    assert [plan.unchanged for plan in found] == [34, 60, 34]
    assert len({plan.plan_id for plan in found}) == 1


def write_receipts(wanted: Settings, plan: Plan, texts: dict[str, str]) -> None:
    """What encode leaves behind for every bucket of a plan."""
    workspace = Workspace(STORAGE, wanted.work_uri, plan.plan_id)
    by_bucket = {work.bucket: work for work in plan.work}
    files = {bucket_number(f.path): f for f in planning.write_release(wanted, texts).table.files}
    for number in by_bucket:
        workspace.write_receipt(
            Receipt(
                plan_id=plan.plan_id, bucket=number, bundle=plan.bundle, file=files.get(number), encoded=1, reused=0,
                tokens=1, padded_tokens=1, seconds=1, model_seconds=1, device="none", dtype="none",
                finished_at=datetime.now(UTC),
            )
        )  # fmt: skip


def test_what_was_encoded_counts_for_a_plan_that_is_made_anew(spark: "SparkSession", tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    first = plan_day(spark, wanted)
    workspace = Workspace(STORAGE, wanted.work_uri, first.plan.plan_id)
    write_receipts(wanted, first.plan, TODAY)
    # With other texts: nothing of it can be carried over.
    other = {item: f"{text}, other" for item, text in BEFORE.items()}
    release = planning.publish(wanted, other)
    again = plan_day(spark, wanted)
    assert (again.plan.plan_id, again.plan.base_release) == (first.plan.plan_id, release.release_id)
    assert set(first.changes.values()) == {"new"}
    assert again.changes == naive_changes(other, TODAY)[0]
    assert pending_tasks(workspace, again.plan, table_uri=wanted.table_uri, settings=EncodeSettings()) == []
    # A worker of the plan before still finds the items that it was sent to encode.
    assert planning.read_planned(wanted, first.plan).items == first.items
    (receipt, *_) = workspace.require_receipts(again.plan)
    assert receipt.file is not None
    Path(wanted.table_uri, receipt.file.path).unlink()
    (task,) = pending_tasks(workspace, again.plan, table_uri=wanted.table_uri, settings=EncodeSettings())
    assert (task.work.bucket, task.base) == (receipt.bucket, release.release_id)


def test_throughput_is_that_of_the_largest_run_with_the_same_bundle(spark: "SparkSession", tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    for day, (tokens, speed, bundle) in enumerate(
        [(10, 5.0, None), (900, 70.0, None), (20, 6.0, None), (10**6, 9.0, "f" * 16)]
    ):
        made = planning.write_release(wanted, BEFORE, ds=f"2026-11-1{day}", bundle=bundle)
        measured = altered(made, counts__tokens=tokens, tokens_per_second=speed)
        assert release_log.append(STORAGE, wanted.table_uri, [measured])
    assert plan_day(spark, wanted).plan.tokens_per_second == 70.0


# --- some buckets of a day


def in_buckets(items: dict[str, str], *numbers: int, buckets: int = 4) -> dict[str, str]:
    return {item_id: text for item_id, text in items.items() if row_id(item_id) % buckets in numbers}


def test_chosen_buckets_plan_their_own_rows_and_no_others(spark: "SparkSession", tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    planning.publish(wanted, TODAY, ds="2026-11-21")
    live = planning.publish(wanted, BEFORE)
    day = plan_day(spark, wanted, chosen=(3, 1, 3))
    plan = day.plan
    assert day.texts == in_buckets(TODAY, 1, 3)
    changes, gone = naive_changes(in_buckets(BEFORE, 1, 3), in_buckets(TODAY, 1, 3))
    assert day.changes == changes
    assert (plan.deleted, plan.rows_read, plan.items) == (len(gone), len(changes), len(changes))
    assert [work.bucket for work in plan.work] == [1, 3]
    assert plan.chosen == (1, 3)
    assert plan.base_release == plan.live_release == live.release_id
    assert {bucket_number(file.path) for work in plan.work for file in work.previous} == {1, 3}
    # It stands like any other.
    assert plan_day(None, wanted, chosen=(1, 3)).plan == plan


def test_chosen_buckets_have_the_quarantine_of_their_own_items(spark: "SparkSession", tmp_path: Path) -> None:
    ids = [f"item {number}" for number in range(40)]
    rows: list[dict[str, str | None]] = [{"item_id": i, "title": f"text of {i}"} for i in ids]
    rows += [{"item_id": f"empty {number}", "title": ""} for number in range(20)]
    rows += [{"item_id": i, "title": "again"} for i in ids[:10]]
    rows += [{"item_id": None, "title": "nobody's"}, {"item_id": " ", "title": "blank"}]
    path = write_jsonl(tmp_path / "day" / "c.jsonl", rows)
    with path.open("a") as file:
        file.write("no json\n")
    wanted = settings_at(tmp_path, path)
    planning.publish(wanted, {"item 0": "text of item 0"})
    day = plan_day(spark, wanted, chosen=(2,))
    mine = {i for i in ids if row_id(i) % 4 == 2}
    assert day.items.keys() == mine
    found = Counter((row["reason"], row["item_id"]) for row in day.quarantine)
    empty = {f"empty {n}" for n in range(20) if row_id(f"empty {n}") % 4 == 2}
    older = mine & set(ids[:10])
    assert {key for key in found if key[0] == Reason.EMPTY_TEXT} == {(Reason.EMPTY_TEXT, i) for i in empty}
    assert sum(count for key, count in found.items() if key[0] == Reason.OLDER_DUPLICATE) == len(older)
    assert not [key for key in found if key[0] == Reason.MALFORMED]
    assert day.plan.quarantined == dict(day.reasons)
    assert day.plan.rows_read == len(day.items) + len(day.quarantine)


def test_all_buckets_chosen_one_by_one_are_the_whole_day(spark: "SparkSession", tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    planning.publish(wanted, BEFORE)
    whole = plan_day(spark, wanted)
    parts = [plan_day(spark, wanted, chosen=(number,)) for number in range(4)]
    assert {item_id: item for part in parts for item_id, item in part.items.items()} == whole.items
    for count in ("items", "new", "changed", "unchanged", "deleted", "tokens", "rows_read"):
        assert sum(getattr(part.plan, count) for part in parts) == getattr(whole.plan, count), count


def test_a_chosen_bucket_whose_items_are_all_gone_is_planned_with_its_deletions(
    spark: "SparkSession", tmp_path: Path
) -> None:
    kept = in_buckets(BEFORE, 0, 1)
    wanted = settings_at(tmp_path, write_day(tmp_path, kept))
    planning.publish(wanted, BEFORE)
    plan = plan_day(spark, wanted, chosen=(2, 3)).plan
    assert (plan.items, plan.rows_read) == (0, 0)
    assert {work.bucket: work.deleted for work in plan.work} == {n: len(in_buckets(BEFORE, n)) for n in (2, 3)}
    assert plan_day(spark, wanted, chosen=(1,)).plan.deleted == 0


def test_chosen_buckets_go_by_the_bundle_and_the_buckets_of_the_days_release(
    spark: "SparkSession", tmp_path: Path
) -> None:
    path = write_day(tmp_path, TODAY)
    first = settings_at(tmp_path, path)
    live = planning.publish(first, BEFORE)
    now = settings_at(tmp_path, path, seed=1, buckets=7)
    day = plan_day(spark, now, chosen=(1,))
    assert (day.plan.bundle, day.plan.bundle_uri, day.plan.buckets) == (live.bundle.version, live.bundle.uri, 4)
    assert day.texts == in_buckets(TODAY, 1)
    assert Counter(day.changes.values())["unchanged"] > 0
    assert plan_day(spark, now).plan.bundle != live.bundle.version
    # The number of buckets to choose from is the release's as well.
    with pytest.raises(UserError, match=f"no bucket 5: release {live.release_id} has buckets 0 to 3"):
        plan_day(None, now, chosen=(5,))


@pytest.mark.parametrize("bucket", [-1, 4, 99])
def test_a_bucket_that_there_is_not_is_the_users_error(tmp_path: Path, bucket: int) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    live = planning.publish(wanted, BEFORE)
    with pytest.raises(UserError, match=f"no bucket {bucket}: release {live.release_id} has buckets 0 to 3"):
        identify_plan(open_deployment(wanted), ds=DS, chosen=(0, bucket))


def test_buckets_of_a_day_that_was_made_with_another_template_are_the_users_error(tmp_path: Path) -> None:
    path = write_day(tmp_path, TODAY)
    live = planning.publish(settings_at(tmp_path, path), BEFORE)
    now = settings_at(tmp_path, path, template="{title}!")
    with pytest.raises(UserError, match=f"release {live.release_id} of {DS} was made with template .*: backfill the"):
        identify_plan(open_deployment(now), ds=DS, chosen=(0,))
    assert identify_plan(open_deployment(now), ds=DS).chosen is None


@pytest.mark.parametrize(("before", "now"), [(23, 10), (10, 23), (10, 11)])
def test_buckets_of_a_day_that_was_stored_with_another_precision_are_the_users_error(
    tmp_path: Path, before: int, now: int
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    live = planning.publish(precise(wanted, before), BEFORE)
    said = f"release {live.release_id} of {DS} stores {before} mantissa bits, .* says {now}: backfill the whole day"
    with pytest.raises(UserError, match=said):
        identify_plan(open_deployment(precise(wanted, now)), ds=DS, chosen=(0,))
    assert identify_plan(open_deployment(precise(wanted, now)), ds=DS).mantissa_bits == now
    assert identify_plan(open_deployment(precise(wanted, before)), ds=DS, chosen=(0,)).chosen == (0,)


@pytest.mark.parametrize(
    ("before", "now", "carried"), [(23, 10, True), (10, 10, True), (12, 10, True), (10, 12, False), (22, 23, False)]
)
def test_vectors_are_carried_over_where_they_are_stored_as_precisely_as_is_wanted(
    spark: "SparkSession", tmp_path: Path, before: int, now: int, carried: bool
) -> None:
    wanted = precise(settings_at(tmp_path, write_day(tmp_path, TODAY)), now)
    planning.publish(precise(wanted, before), BEFORE)
    day = plan_day(spark, wanted)
    assert day.changes == naive_changes(BEFORE, TODAY, same_bundle=carried)[0]
    assert day.plan.mantissa_bits == now
    assert (day.plan.unchanged > 0) is carried


def test_buckets_of_a_date_without_a_release_are_planned_as_the_whole_date(
    spark: "SparkSession", tmp_path: Path
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    planning.publish(wanted, BEFORE, ds="2026-11-19")
    plain = identify_plan(open_deployment(wanted), ds=DS)
    for chosen in [(1,), (0, 99)]:
        identity = identify_plan(open_deployment(wanted), ds=DS, chosen=chosen)
        assert identity == plain
        assert identity.chosen is None
    day = plan_day(spark, wanted, chosen=(1,))
    assert day.texts == TODAY
    assert day.plan.chosen is None
    # A date that was withdrawn has no release either.
    live = planning.publish(wanted, BEFORE)
    assert identify_plan(open_deployment(wanted), ds=DS, chosen=(1,)).chosen == (1,)
    gone = live.model_copy(update={"release_id": "gone", "turn": live.turn + 1, "withdrawn": True})
    assert release_log.append(STORAGE, wanted.table_uri, [gone])
    assert identify_plan(open_deployment(wanted), ds=DS, chosen=(1,)) == plain


def test_a_plan_id_changes_with_the_chosen_buckets_and_with_a_recomputation(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    planning.publish(wanted, BEFORE)
    every = [(), (0,), (1,), (0, 1), (0, 1, 2, 3)]
    found = [
        identify_plan(open_deployment(wanted), ds=DS, chosen=chosen, recompute=recompute).plan_id
        for chosen in every
        for recompute in (False, True)
    ]
    assert len(set(found)) == 2 * len(every)
    # Buckets are a set.
    assert identify_plan(open_deployment(wanted), ds=DS, chosen=(1, 0, 1)).plan_id == found[2 * every.index((0, 1))]


@pytest.mark.parametrize("chosen", [(), (1,)])
def test_what_was_computed_anew_can_be_so_once_more(tmp_path: Path, chosen: tuple[int, ...]) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    planning.publish(wanted, BEFORE)
    found = [identify_plan(open_deployment(wanted), ds=DS, chosen=chosen, recompute=True).plan_id for _ in range(2)]
    planning.publish(wanted, {**BEFORE, **{f"more {n}": "text" for n in range(9)}})
    found.append(identify_plan(open_deployment(wanted), ds=DS, chosen=chosen, recompute=True).plan_id)
    assert found[0] == found[1] != found[2]


def test_backfills_of_dates_with_and_without_a_release_are_named_once_for_all_tries(tmp_path: Path) -> None:
    config = tmp_path / "marc.yaml"
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    config.write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    asked = {"first": DS, "last": DS, "buckets": [1], "config": str(config)}
    (whole,) = identify_backfills(**asked, recompute=False)
    assert whole["buckets"] == []
    planning.publish(wanted, BEFORE)
    again = identify_plan(open_deployment(wanted), ds=DS, chosen=whole["buckets"])
    assert again.plan_id == whole["plan_id"]
    (some,) = identify_backfills(**asked, recompute=False)
    assert some["buckets"] == [1]
    assert some["plan_id"] == identify_plan(open_deployment(wanted), ds=DS, chosen=[1]).plan_id != whole["plan_id"]


@pytest.mark.parametrize("chosen", [(), (2,)])
def test_a_recomputation_marks_every_unchanged_text_as_changed(
    spark: "SparkSession", tmp_path: Path, chosen: tuple[int, ...]
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    planning.publish(wanted, BEFORE)
    plain, anew = (plan_day(spark, wanted, chosen=chosen, recompute=recompute) for recompute in (False, True))
    before, today = (in_buckets(items, *(chosen or range(4))) for items in (BEFORE, TODAY))
    assert plain.changes == naive_changes(before, today)[0]
    assert anew.changes == naive_changes(before, today, same_bundle=False)[0]
    assert anew.texts == plain.texts
    assert (anew.plan.unchanged, anew.plan.new, anew.plan.deleted) == (0, plain.plan.new, plain.plan.deleted)
    assert anew.plan.changed == plain.plan.changed + plain.plan.unchanged
    assert anew.plan.tokens == naive_tokens(sorted(today.values()), planning.MAX_TOKENS) > plain.plan.tokens


def test_buckets_of_a_release_that_was_replaced_meanwhile_are_not_planned(
    spark: "SparkSession", tmp_path: Path
) -> None:
    path = write_day(tmp_path, TODAY)
    wanted = settings_at(tmp_path, path)
    live = planning.publish(wanted, BEFORE)
    identity = identify_plan(open_deployment(wanted), ds=DS, chosen=(1,))
    # The same bundle and buckets: what is there now is what the plan changes.
    now = planning.publish(wanted, {**BEFORE, "one more": "text"})
    assert make_plan(spark, open_deployment(wanted), identity).live_release == now.release_id
    planning.publish(wanted, BEFORE, buckets=5)
    with pytest.raises(Superseded, match="was replaced a moment ago"):
        make_plan(spark, open_deployment(wanted), identity)
    planning.publish(precise(wanted, 10), BEFORE)
    with pytest.raises(Superseded, match="was replaced a moment ago"):
        make_plan(spark, open_deployment(wanted), identity)
    planning.publish(settings_at(tmp_path, path, seed=1), BEFORE)
    with pytest.raises(Superseded, match="was replaced a moment ago"):
        make_plan(spark, open_deployment(wanted), identity)
    gone = live.model_copy(update={"release_id": "gone", "turn": 6, "withdrawn": True})
    assert release_log.append(STORAGE, wanted.table_uri, [gone])
    with pytest.raises(Superseded, match="was replaced a moment ago"):
        make_plan(spark, open_deployment(wanted), identity)


# --- cutting the stream of rows into buckets


@given(
    runs=st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 7)), max_size=8, unique_by=lambda run: run[0]),
    cuts=st.lists(st.integers(0, 60)),
)
def test_rows_are_cut_by_bucket_at_any_batch_boundaries(runs: list[tuple[int, int]], cuts: list[int]) -> None:
    numbers = [bucket for bucket, length in sorted(runs) for _ in range(length)]
    # Ids of a bucket differ, those of rows that have none are its number.
    ids = [n if n < 0 else n + 10 * place for place, n in enumerate(numbers)]
    table = pa.table({"row_id": pa.array(ids, pa.int64()), "row": pa.array(range(len(numbers)))})
    edges = sorted({0, len(numbers), *(cut for cut in cuts if cut < len(numbers))})

    def batches() -> Iterator[pa.RecordBatch]:
        for start, end in itertools.pairwise(edges):
            # An empty batch before every other one, as Spark may send them.
            yield from table.slice(start, 0).combine_chunks().to_batches() or [_empty(table.schema)]
            yield table.slice(start, end - start).combine_chunks().to_batches()[0]

    found = [(bucket, rows["row"].to_pylist()) for bucket, rows in by_bucket(batches(), 10)]
    grouped = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1])
    assert found == [(bucket, [row for row, _ in pairs]) for bucket, pairs in grouped]


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


# --- tokens


def naive_tokens(texts: Sequence[str], max_tokens: int) -> int:
    """Tokens one text at a time, untruncated and then cut."""
    tokenizer = Tokenizer.from_str(planning.tokenizer_json().decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return sum(min(max_tokens, len(tokenizer.encode(text).ids)) for text in texts)


def test_exact_tokens_are_the_tokenizers_and_equal_texts_count_once(spark: "SparkSession", tmp_path: Path) -> None:
    today = {f"item {n}": f"Ünusual wörds 😀 {'supercalifragilistic ' * (n % 9)}{n // 4}" for n in range(40)}
    today |= {f"twin {n}": "the same text" for n in range(30)}
    wanted = settings_at(tmp_path, write_day(tmp_path, today), buckets=1)
    kept = {i: today[i] for i in ("item 3", "item 8", "twin 1")}
    planning.publish(wanted, {**kept, "item 4": "was different"})
    plan = plan_day(spark, wanted).plan
    texts = {text.strip(BLANK) for item_id, text in today.items() if item_id not in kept}
    assert plan.tokens_exact
    assert plan.tokens == naive_tokens(sorted(texts), planning.MAX_TOKENS)
    assert any(naive_tokens([text], 10**6) > planning.MAX_TOKENS for text in texts)


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(max_size=40), max_size=12), max_tokens=st.integers(2, 20))
def test_token_counts_equal_the_tokenizers_own(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], max_tokens: int
) -> None:
    bundle = planning.bundle_at(str(tmp_path_factory.mktemp("bundle")), max_tokens=max_tokens)
    tokenizer = load_tokenizer(STORAGE, bundle.uri, max_tokens)
    assert count_tokens(tokenizer, texts, of=len(texts)) == TokenCount(naive_tokens(texts, max_tokens))


def test_tokens_of_a_large_bucket_are_estimated_and_said_to_be(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, tmp_path, buckets=4)
    context = planning.bucket_context(wanted, None)
    size = TOKEN_SAMPLE // 4
    today = {f"item {n:05d}": " ".join(["word"] * (n % 20)) + f" {n}" for n in range(size * 3)}
    summary = plan_bucket(context, 0, planned_rows(today))
    assert summary.work is not None
    assert not summary.exact
    true = naive_tokens(list(today.values()), planning.MAX_TOKENS)
    assert 0 < abs(summary.work.tokens - true) < 2 * summary.work.tokens_error < 0.05 * true
    exact = plan_bucket(context, 0, planned_rows(dict(list(today.items())[:size])))
    assert exact.work is not None
    assert exact.exact
    assert exact.work.tokens_error == 0


def test_a_plan_says_how_far_off_its_tokens_may_be(
    spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"item {n}": "word " * (n % 25) + str(n) for n in range(2000)}
    wanted = settings_at(tmp_path, write_day(tmp_path, texts), buckets=6)
    whole = plan_day(spark, wanted).plan
    assert (whole.tokens_exact, whole.tokens_error) == (True, 0)
    assert {work.tokens_error for work in whole.work} == {0}
    again = settings_at(tmp_path, write_day(tmp_path, texts, "other"), buckets=40)
    true = naive_tokens(list(texts.values()), planning.MAX_TOKENS)
    assert whole.tokens == true
    monkeypatch.setattr("marc_pipeline.nightly.plan_bucket.TOKEN_SAMPLE", 0)
    context = planning.bucket_context(again, None)
    parts = [{i: t for i, t in texts.items() if row_id(i) % 40 == n} for n in range(40)]
    works = [plan_bucket(context, n, planned_rows(part)).work for n, part in enumerate(parts)]
    found = tuple(work for work in works if work is not None)
    plan = whole.model_copy(update={"work": found, "tokens_exact": False})
    # Independent errors add up as squares: far less than one by one.
    assert plan.tokens_error == pytest.approx(sum(work.tokens_error**2 for work in found) ** 0.5)
    assert abs(plan.tokens - true) < 1.5 * plan.tokens_error < 0.06 * true
    shown = describe_plan(plan, EncodeSettings())
    assert shown["tokens_error"] == plan.tokens_error
    print_plan(plan, EncodeSettings())
    assert "cost" not in capsys.readouterr().out
    paid = EncodeSettings(price_per_device_hour=3.5, devices=4)
    hour = plan.model_copy(update={"tokens_per_second": plan.tokens / 3590, "start_seconds": 10.0})
    assert describe_plan(hour, paid)["cost"] == pytest.approx(14.0)
    assert describe_plan(plan, paid)["cost"] is None
    print_plan(hour, paid)
    shown_cost = capsys.readouterr().out
    assert "about 14.00" in shown_cost
    assert "about 3,600 s" in shown_cost
    print_plan(plan, EncodeSettings())
    share = 100 * plan.tokens_error / plan.tokens
    assert f"{plan.tokens:,} ± {share:.1f} % (from a sample)" in capsys.readouterr().out
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    # A plan of before the error was written down is read.
    older = json.loads(whole.model_dump_json())
    for work in older["work"]:
        del work["tokens_error"]
    assert Plan.model_validate(older) == whole


# --- row ids that collide


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
    assert [(row["item_id"], json.loads(row["row"])["row_id"], row["source"]) for row in rejected] == [
        ("c", 5, "c.jsonl"), ("d", 5, "c.jsonl")
    ]  # fmt: skip


def test_a_collided_row_keeps_its_text(tmp_path: Path) -> None:
    context = planning.bucket_context(settings_at(tmp_path, tmp_path, buckets=1), None)
    plan_bucket(context, 0, planned_rows({"a": "text of a", "c": "text of c"}, ids={"a": 5, "c": 5}))
    rejected = pq.read_table(Path(context.workspace.quarantine_uri, "bucket-00000.parquet")).to_pylist()
    assert "text of c" in rejected[0]["row"]


def test_a_collision_with_an_older_duplicate_is_none(tmp_path: Path) -> None:
    context = planning.bucket_context(settings_at(tmp_path, tmp_path, buckets=1), None)
    rows = planned_rows({"a": "text of a"}).to_pylist()
    rows.insert(0, {**rows[0], "text": "older", "updated_at": -1})
    rows[1]["updated_at"] = 0
    summary = plan_bucket(context, 0, pa.Table.from_pylist(rows, schema=PLANNED_ROWS))
    assert summary.quarantined == {Reason.OLDER_DUPLICATE: 1}
    assert summary.work is not None
    assert summary.work.items == 1
    assert pq.read_table(context.workspace.items_uri(0, None))["text"].to_pylist() == ["text of a"]


# --- duplicates in a bucket


VERSIONS = st.tuples(
    st.sampled_from(["a", "b", "é", "😀"]),
    st.sampled_from([None, -1, 0, 5]),
    TEXTS,
    st.sampled_from(["x.csv", "y.csv"]),
)


@settings(max_examples=60, deadline=None)
@given(versions=st.lists(VERSIONS, max_size=20))
def test_of_several_rows_of_an_id_the_one_counts_that_sql_would_choose(
    tmp_path_factory: pytest.TempPathFactory, versions: list[tuple[str, int | None, str, str]]
) -> None:
    root = tmp_path_factory.mktemp("versions")
    context = planning.bucket_context(settings_at(root, root, buckets=1), None)
    rows = [
        {"item_id": i, "row_id": row_id(i), "text": t, "content_hash": content_hash(t), "updated_at": at, "source": s}
        for i, at, t, s in versions
    ]
    summary = plan_bucket(context, 0, pa.Table.from_pylist(rows, schema=PLANNED_ROWS))

    # Row by row as marc_pipeline.catalogue.source.NEWEST_FIRST says it.
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
    # Of rows that are equal but for the file, the file decides.
    assert found == coarse
    assert summary.quarantined == ({Reason.OLDER_DUPLICATE: older.total()} if older else {})


def test_the_record_of_an_older_duplicate_is_what_spark_would_write(spark: "SparkSession", tmp_path: Path) -> None:
    texts = ["".join(map(chr, range(1, 300))), '\x00 \\ \\u001b " / 😀 \u2028', "é" * 9]
    moments = [None, 0, -1, -1001, 999, 1_700_000_000_123_456, 253_402_300_800_000_000, 10**18, -(10**17), -(10**18)]
    rows = [(f"{text} {n}", text, at) for text in texts for n, at in enumerate(moments)]
    frame = spark.createDataFrame(rows, "item_id STRING, text STRING, at BIGINT")
    wanted = frame.selectExpr("to_json(struct(item_id, text, timestamp_micros(at) AS updated_at)) AS row").collect()
    assert [_older_record(*row) for row in rows] == [row.row for row in wanted]


@pytest.mark.parametrize("piece_bytes", [1, 200, 10**9])
def test_a_bucket_is_the_same_in_however_many_pieces_it_is_written(
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


@pytest.mark.parametrize(("parallel", "seconds"), [(1, 105.0), (2, 125.0), (4, 245.0)])
def test_the_largest_bucket_takes_its_time_however_many_run_beside_it(parallel: int, seconds: float) -> None:
    work = tuple(BucketPlan.model_construct(tokens=tokens) for tokens in (600, 300, 100))
    plan = Plan.model_construct(work=work, tokens_per_second=10.0, start_seconds=5.0, parallel=parallel)
    assert plan.seconds == pytest.approx(seconds)
    assert plan.model_copy(update={"work": ()}).seconds == 0
    assert plan.model_copy(update={"tokens_per_second": None}).seconds is None


def test_start_up_is_that_of_the_nights_and_not_of_the_one_that_was_tried_again() -> None:
    def night(seconds: float, tokens: int, speed: float | None, bundle: str = "b") -> Release:
        taken = {"encode": seconds}
        return unpublished(bundle__version=bundle, seconds=taken, counts__tokens=tokens, tokens_per_second=speed)

    full = night(116.0, 10_000, 100.0)
    # What small nights carry over makes them slow by the token, not at the start.
    small = [night(21.0, 100, 10.0), night(22.0, 200, 12.0)]
    others = [night(5.0, 0, None), night(900.0, 100, 10.0, bundle="other")]
    assert _start_seconds([full], full) == pytest.approx(16)
    assert _start_seconds([full, *small, *others, night(2000.0, 100, 5.0)], full) == pytest.approx(20)
    assert _start_seconds(others, full) == 0

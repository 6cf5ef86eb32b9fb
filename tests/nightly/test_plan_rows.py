"""The plan stage over hostile catalogues: every row is planned or quarantined, and the latest row is kept."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

import planning
from example_counts import examples
from marc_pipeline.errors import UserError
from marc_schemas.catalogue import ITEMS, QUARANTINE, Reason
from marc_schemas.identity import content_hash, row_id
from planning import CatalogueRow, naive_plan, plan_day, settings_at, write_csv, write_jsonl

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

# Seeds do not shrink, so the first failing one is reported.
SPARK_EXAMPLES = examples(1, of=3, phases=[Phase.explicit, Phase.reuse, Phase.generate])
HOSTILE = "abc ,;'\"\\\n\r\t\x00\x01\x0b\x1b\x7f{}[]:/%é漢😀\u0301\u200b\u2028\ufeff\x85"
STAMPS = [None, None, "2026-11-01T00:00:00", "2026-11-01T00:00:01", "2026-11-20T00:00:00"]
LONG = 1_000_000


class Hostile:
    """Makes rows with hostile texts and ids, and keeps them for the comparison."""

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
    """Two files with different orders of columns; one has rows with too many or too few fields."""
    write_csv(folder / "a.csv", _as_rows(hostile.make("a.csv", count, "text")), ["item_id", "title", "genres", "at"])
    columns = ["extra", "at", "genres", "title", "item_id"]
    path = write_csv(folder / "b.csv", _as_rows(hostile.make("b.csv", count, "number")), columns, bom=True)
    broken = [",".join("x" * hostile.random.choice([1, 2, 4, 6, 9])) for _ in range(20)]
    return _append_broken(path, broken, hostile)


def _hostile_jsonl(folder: Path, hostile: Hostile, count: int) -> list[str]:
    """Two files with numbers and strings as ids, absent columns and incomplete records."""
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
    """Four files with ids as string, int32 and int64, columns as string, binary and list, in different orders."""
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
def test_every_row_is_planned_or_quarantined(
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
    # The plan's counts equal those of its files.
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
    """The row as CSV stores it, where null and empty are equal."""
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


def test_a_catalogue_without_a_usable_row_has_an_empty_plan(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"item_id": None, "title": "a"}, {"item_id": "x", "title": ""}])
    plan = plan_day(spark, settings_at(tmp_path, path)).plan
    assert (plan.rows_read, plan.items, plan.work, plan.tokens) == (2, 0, (), 0)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_catalogue_without_rows_is_the_users_error(spark: "SparkSession", tmp_path: Path, ending: str) -> None:
    path, empty = tmp_path / f"c.{ending}", pa.array([], pa.string())
    write_csv(path, [], ["item_id", "title"])
    if ending == "parquet":
        planning.write_parquet(path, {"item_id": empty, "title": empty})
    with pytest.raises(UserError, match=f"^the catalogue at .*{path} is empty: it has no rows$"):
        plan_day(spark, settings_at(tmp_path, path))


def test_the_latest_row_is_kept_whatever_the_files_and_their_order(spark: "SparkSession", tmp_path: Path) -> None:
    chance = planning.chance(7)
    rows = [
        {"item_id": f"{chance.randrange(40)}", "title": f"text {chance.randrange(9)}", "at": chance.choice(STAMPS)}
        for _ in range(300)
    ]
    found = []
    for number, files in enumerate([1, 1, 3, 7]):
        chance.shuffle(rows)
        for file in range(files):
            # Every second round reverses the names, so that the order of files has no influence.
            name = f"{file if number % 2 else files - file}.jsonl"
            write_jsonl(tmp_path / str(number) / name, rows[file::files])
        day = plan_day(spark, settings_at(tmp_path, tmp_path / str(number), updated_at_column="at"))
        found.append((day.items, sorted(row["row"] for row in day.quarantine)))
    assert all(result == found[0] for result in found[1:])
    written = [CatalogueRow(r["item_id"], {"title": r["title"]}, r["at"], "") for r in rows]
    items, reasons = naive_plan(written, "{title}")
    assert {item_id: item["text"] for item_id, item in found[0][0].items()} == items
    assert len(found[0][1]) == reasons[Reason.OLDER_DUPLICATE]

"""Every row of a catalogue becomes an item or is quarantined with its reason, whatever the format."""

import csv
import datetime as dt
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planning
from example_counts import examples
from marc_pipeline.catalogue import source as catalogue
from marc_pipeline.catalogue import text_records as catalogue_text
from marc_pipeline.catalogue.text_records import csv_records
from marc_pipeline.errors import UserError
from marc_pipeline.spark.session import worker_errors
from marc_schemas.catalogue import Reason
from marc_schemas.identity import content_hash, row_id
from planning import Row, read, rendered, texts, write_bytes, write_csv, write_jsonl, write_parquet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

COLUMNS = ("item_id", "title", "genres")
BOOKS: list[dict[str, str | None]] = [
    {"item_id": "plain", "title": "Dune", "genres": "sci-fi"},
    {"item_id": "comma", "title": "Eats, Shoots & Leaves", "genres": "language, humour"},
    {"item_id": "quotes", "title": 'The "Best" of', "genres": '"quoted"'},
    {"item_id": "quote, comma", "title": '"a", "b"', "genres": '","'},
    {"item_id": "lines", "title": "first\nsecond\n\nfourth", "genres": "\nleading and trailing\n"},
    {"item_id": "backslash", "title": "C:\\temp\\new \\", "genres": "\\"},
    {"item_id": "spaces", "title": "  indented", "genres": "tail\t "},
    {"item_id": " padded id ", "title": "kept as it is", "genres": None},
    {"item_id": "é😀\u2028", "title": "Ünïcödé 漢字 👩‍👩‍👧", "genres": "\u200fעברית"},
    {"item_id": "half", "title": None, "genres": "only genres"},
    {"item_id": "#hash", "title": "# no comment", "genres": "null"},
]


def as_parquet(path: Path, rows: Sequence[Row]) -> Path:
    return write_parquet(path, {name: pa.array([row[name] for row in rows], pa.string()) for name in COLUMNS})


WRITERS: dict[str, Callable[[Path], Path]] = {
    "parquet": lambda folder: as_parquet(folder / "c.parquet", BOOKS),
    "csv": lambda folder: write_csv(folder / "c.csv", BOOKS, COLUMNS),
    "csv, all quoted": lambda folder: write_csv(folder / "c.csv", BOOKS, COLUMNS, quoting=1),
    "csv, CRLF": lambda folder: write_csv(folder / "c.csv", BOOKS, COLUMNS, line_end="\r\n"),
    "csv, BOM": lambda folder: write_csv(folder / "c.csv", BOOKS, COLUMNS, bom=True),
    "csv, BOM, CRLF, quoted": lambda folder: write_csv(
        folder / "c.csv", BOOKS, COLUMNS, bom=True, line_end="\r\n", quoting=1
    ),
    "csv, gz": lambda folder: write_csv(folder / "c.csv.gz", BOOKS, COLUMNS),
    "json lines": lambda folder: write_jsonl(folder / "c.jsonl", BOOKS),
    "json lines, UTF-8": lambda folder: write_jsonl(folder / "c.ndjson", BOOKS, ensure_ascii=False),
    "json lines, gz": lambda folder: write_jsonl(folder / "c.jsonl.gz", BOOKS),
    "json lines, absent": lambda folder: write_jsonl(
        folder / "c.json", [{name: value for name, value in row.items() if value is not None} for row in BOOKS]
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_come_from_every_format(spark: "SparkSession", tmp_path: Path, name: str) -> None:
    rows = read(spark, WRITERS[name](tmp_path), template=planning.TEMPLATE)
    assert texts(rows) == {row["item_id"]: rendered(planning.TEMPLATE, row) for row in BOOKS}
    assert {row["reason"] for row in rows} == {None}


def test_row_ids_and_content_hashes_are_those_of_the_contract(spark: "SparkSession", tmp_path: Path) -> None:
    for row in read(spark, WRITERS["parquet"](tmp_path), template=planning.TEMPLATE):
        assert row["row_id"] == row_id(row["item_id"])
        assert row["content_hash"] == content_hash(row["text"])


def test_stray_quotes_in_csv_stay_text(spark: "SparkSession", tmp_path: Path) -> None:
    lines = ["item_id,title", '1,a "b" c', '2,5" disk', '3,"say "hi" now"', '4,"x, ""y"", z"', "5,it's"]
    path = write_bytes(tmp_path / "c.csv", "\n".join(lines).encode())
    assert texts(read(spark, path)) == {
        "1": 'a "b" c', "2": '5" disk', "3": 'say "hi" now', "4": 'x, "y", z', "5": "it's"
    }  # fmt: skip


def test_parquet_types_become_text_as_python_writes_them(spark: "SparkSession", tmp_path: Path) -> None:
    columns: dict[str, pa.Array] = {
        "item_id": pa.array([1, 2**62], pa.int64()),
        "int8": pa.array([-7, None], pa.int8()),
        "uint64": pa.array([2**64 - 1, None], pa.uint64()),
        "float": pa.array([3.5, -0.25]),
        "decimal": pa.array([Decimal("1.50"), None]),
        "date": pa.array([dt.date(2026, 1, 2), None]),
        "time": pa.array([dt.datetime(2026, 1, 2, 3, 4, 5, 123456), None], pa.timestamp("us")),
        "words": pa.array([["a", None, "b, c"], []], pa.list_(pa.string())),
        "numbers": pa.array([[1, 2], None], pa.large_list(pa.int32())),
        "dates": pa.array([[dt.date(2026, 1, 2)], []]),
        "category": pa.array(["x", None]).dictionary_encode(),
        "large": pa.array(["y", None], pa.large_string()),
        "binary": pa.array(["é".encode(), None], pa.binary()),
    }
    template = "|".join(f"{{{name}}}" for name in columns)

    def text(value: object) -> str:
        if isinstance(value, list):
            return ", ".join(text(v) for v in value if v is not None)
        return value.decode() if isinstance(value, bytes) else str(value)

    expected = {
        str(item["item_id"]): rendered(template, {n: None if v is None else text(v) for n, v in item.items()})
        for item in pa.table(columns).to_pylist()
    }
    path = write_parquet(tmp_path / "c.parquet", columns)
    assert texts(read(spark, path, template=template)) == expected


@pytest.mark.parametrize("values", [pa.nulls(2), pa.array([True, None])], ids=["null", "bool"])
def test_nulls_of_any_parquet_type_are_no_text(spark: "SparkSession", tmp_path: Path, values: pa.Array) -> None:
    columns = {"item_id": ["1", "2"], "title": ["a", "b"], "x": values}
    found = texts(read(spark, write_parquet(tmp_path / "c.parquet", columns), template="{title}{x}"))
    assert found == {
        item_id: title + json.dumps(x).replace("null", "")
        for item_id, title, x in zip(columns["item_id"], columns["title"], values.to_pylist(), strict=True)
    }


def test_json_values_become_text_as_they_are_written(spark: "SparkSession", tmp_path: Path) -> None:
    values = ["12", "-3.50", "12345678901234567890123", "1e9", "true", '"word"', '"2026-01-02"']
    lines = [f'{{"item_id": {n}, "x": {value}, "words": ["a", null, {value}]}}\n' for n, value in enumerate(values)]
    path = write_bytes(tmp_path / "c.jsonl", "".join(lines).encode())
    assert texts(read(spark, path, template="{x}|{words}")) == {
        str(n): f"{value}|a, {value}".replace('"', "") for n, value in enumerate(values)
    }


# --- templates

HOSTILE = "ab {}'\"\\`$%_;-/*#?\n\r\t\x00\x01\x7f\u2028é😀\\n\\u0041"
TEMPLATES = [
    "{title}",
    "{title}{title}",
    "{{{title}}}",
    "{{title}} {title}}}{{",
    "it's \"{title}\" and ''{genres}''",
    "C:\\new\\table\\u0041\\ {title}\\",
    "first\nsecond: {title}\r\n\tthird: {genres}",
    "100 % {title} _ \\% \\_ ; -- /* {genres} */",
    "${{env:HOME}} ${{spark.app.name}} ${title}",
    "  {title}  {genres}\n",
]


def _texts_of_templates(spark: "SparkSession", path: Path, templates: Sequence[str]) -> dict[tuple[int, str], str]:
    frames = []
    for number, template in enumerate(templates):
        wanted = planning.catalogue_settings(path, template=template)
        source = catalogue.find_source(wanted, str(path), ds=planning.DS, storage=planning.STORAGE)
        rows = catalogue.read_rows(spark, source, wanted, storage=planning.STORAGE)
        frames.append(rows.selectExpr(f"{number} AS number", "item_id", "text"))
    union = frames[0]
    for frame in frames[1:]:
        union = union.union(frame)
    return {(row.number, row.item_id): row.text for row in union.collect()}


def _templates() -> st.SearchStrategy[str]:
    literal = st.text(HOSTILE, max_size=8).map(lambda text: text.replace("{", "{{").replace("}", "}}"))
    column = st.sampled_from(["{title}", "{genres}"])
    pieces = st.lists(st.tuples(literal, column), min_size=1, max_size=4)
    return st.tuples(pieces, literal).map(lambda t: "".join(a + b for a, b in t[0]) + t[1])


@examples(1, of=2)
@given(drawn=st.lists(_templates(), min_size=6, max_size=6))
def test_templates_render_as_python_renders_them(
    spark: "SparkSession", tmp_path_factory: pytest.TempPathFactory, drawn: list[str]
) -> None:
    path = WRITERS["json lines"](tmp_path_factory.mktemp("templates"))
    templates = [*TEMPLATES, *drawn]
    found = _texts_of_templates(spark, path, templates)
    assert found == {
        (number, row["item_id"]): (
            # A row without any of the template's columns has no text at all, literals or not.
            rendered(template, row) if any(row[n] for n in ("title", "genres") if f"{{{n}}}" in template) else ""
        )
        for number, template in enumerate(templates)
        for row in BOOKS
    }


# --- quarantine

BAD_CSV = (
    b"item_id,title,extra\n"
    b"few,a\n"
    b"many,a,b,c\n"
    b",no id,x\n"
    b'" \t",blank id,x\n'
    b"bad\xfftext,b\xc3,x\n"
    b"badtext,b\xff\xfe,x\n"
    b"elsewhere,fine,\xff\n"
    b"empty,,x\n"
    b'blank," \t\n",x\n'
    b"good,text,x\n"
)


def _reasons(rows: Sequence[Row]) -> list[tuple[str | None, str]]:
    return [(row["reason"], row["row"]) for row in rows if row["reason"] is not None]


def test_bad_csv_rows_are_quarantined_with_their_record(spark: "SparkSession", tmp_path: Path) -> None:
    rows = read(spark, write_bytes(tmp_path / "c.csv", BAD_CSV))
    assert texts(rows) == {"elsewhere": "fine", "good": "text"}
    found = _reasons(rows)
    assert [(reason, row) for reason, row in found if reason == Reason.MALFORMED] == [
        (Reason.MALFORMED, "few,a"),
        (Reason.MALFORMED, "many,a,b,c"),
    ]
    assert [(reason, json.loads(row)) for reason, row in found if reason != Reason.MALFORMED] == [
        (Reason.NULL_ID, {"title": "no id", "extra": "x"}),
        (Reason.NULL_ID, {"item_id": " \t", "title": "blank id", "extra": "x"}),
        (Reason.UNDECODABLE, {"item_id": "bad\ufffdtext", "title": "b\ufffd", "extra": "x"}),
        (Reason.UNDECODABLE, {"item_id": "badtext", "title": "b\ufffd\ufffd", "extra": "x"}),
        (Reason.EMPTY_TEXT, {"item_id": "empty", "extra": "x"}),
        (Reason.EMPTY_TEXT, {"item_id": "blank", "title": " \t\n", "extra": "x"}),
    ]
    assert {row["source"] for row in rows} == {"c.csv"}


def test_bad_json_lines_are_quarantined_with_their_record(spark: "SparkSession", tmp_path: Path) -> None:
    malformed = [
        '{"item_id": "cut", "title":',
        "[1, 2]",
        '"word"',
        "null",
        "no json",
        '{"item_id": "tab\there"}',
        '{"item_id": "twice", "title": "a", "title": "b"}',
        '{"item_id": {"nested": 1}, "title": "a"}',
        '{"item_id": "nested", "title": {"en": "a"}}',
        '{"item_id": "nested", "title": ["a", ["b"]]}',
        '{"item_id": "deep", "title": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "\x00",
        "\x0c",
        "{}\ufeff",
    ]
    rejected = [
        ({"title": "no id"}, Reason.NULL_ID),
        ({"item_id": None, "title": "null id"}, Reason.NULL_ID),
        ({"item_id": "\n", "title": "blank id"}, Reason.NULL_ID),
        ({"item_id": "\ufffd", "title": "replaced before"}, Reason.UNDECODABLE),
        ({"item_id": "empty", "title": ""}, Reason.EMPTY_TEXT),
        ({"item_id": "null", "title": None}, Reason.EMPTY_TEXT),
        ({}, Reason.NULL_ID),
    ]
    lines = [*malformed, *(json.dumps(row) for row, _ in rejected), '{"item_id": "good", "title": "text"}', "", "  "]
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", "\n".join(lines).encode()))
    assert texts(rows) == {"good": "text"}
    found = _reasons(rows)
    assert found[: len(malformed)] == [(Reason.MALFORMED, line) for line in malformed]
    assert [(reason, json.loads(row)) for reason, row in found[len(malformed) :]] == [
        (reason, row) for row, reason in rejected
    ]


def test_undecodable_json_lines_are_quarantined_and_readable(spark: "SparkSession", tmp_path: Path) -> None:
    lines = [b'{"item_id": "a", "title": "x\xffy"}', b'{"item_id": "\xed\xa0\x80", "title": "b"}', b'{"cut": "\xe2\x82']
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", b'{"item_id": "ok", "title": "t"}\n' + b"\n".join(lines)))
    assert texts(rows) == {"ok": "t"}
    assert [re.sub("\ufffd+", "?", row) for _, row in _reasons(rows)] == [
        re.sub("\ufffd+", "?", line.decode(errors="replace")) for line in lines
    ]


def test_undecodable_json_lines_are_called_undecodable(spark: "SparkSession", tmp_path: Path) -> None:
    data = b'{"item_id": "ok", "title": "t"}\n{"item_id": "a", "title": "x\xffy"}\n'
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", data))
    assert [row["reason"] for row in rows] == [None, Reason.UNDECODABLE]


BYTES = [b"ok", b"a\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"cut\xe2\x82", "é😀".encode(), b""]


@pytest.mark.parametrize(
    "make",
    [
        lambda: planning.undecoded_strings(BYTES),
        lambda: pa.array(BYTES, pa.binary()),
        lambda: pa.array(BYTES, pa.large_binary()),
        lambda: pa.ListArray.from_arrays(list(range(len(BYTES) + 1)), planning.undecoded_strings(BYTES)),
    ],
    ids=["string", "binary", "large_binary", "array<string>"],
)
def test_undecodable_bytes_in_parquet_are_quarantined(
    spark: "SparkSession", tmp_path: Path, make: Callable[[], pa.Array]
) -> None:
    path = write_parquet(tmp_path / "c.parquet", {"item_id": range(len(BYTES)), "title": make()})
    found = {row["item_id"]: (row["reason"], row["row"], row["text"]) for row in read(spark, path)}
    for number, value in enumerate(BYTES):
        reason, record, text = found[str(number)]
        try:
            decoded = value.decode()
        except UnicodeDecodeError:
            assert (reason, text) == (Reason.UNDECODABLE, "")
            assert json.loads(record)["item_id"] == number
        else:
            assert (reason, text) == (None if decoded else Reason.EMPTY_TEXT, decoded)


def test_undecodable_ids_in_parquet_are_quarantined_without_an_id(spark: "SparkSession", tmp_path: Path) -> None:
    columns = {"item_id": planning.undecoded_strings([b"a\xff", b"b"]), "title": ["x", "y"]}
    rows = read(spark, write_parquet(tmp_path / "c.parquet", columns))
    assert texts(rows) == {"b": "y"}
    bad = next(row for row in rows if row["reason"])
    assert (bad["item_id"], bad["reason"]) == (None, Reason.UNDECODABLE)
    assert json.loads(bad["row"]) == {"item_id": "a\ufffd", "title": "x"}


# --- the latest row wins

MOMENTS = [dt.datetime(2026, 11, day, hour, tzinfo=dt.UTC) for day, hour in [(1, 0), (1, 1), (9, 23), (10, 0), (20, 5)]]
NAIVE = [moment.replace(tzinfo=None) for moment in MOMENTS]


def _shuffled() -> list[int]:
    order = [*range(len(MOMENTS)), None, None]
    planning.chance(4).shuffle(order)
    return order


def _updated_parquet(kind: pa.DataType, value: Callable[[int], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        order = _shuffled()
        updated = pa.array([None if n is None else value(n) for n in order], kind)
        columns = {"item_id": ["x"] * len(order), "title": [f"version {n}" for n in order], "at": updated}
        return write_parquet(folder / "c.parquet", columns)

    return write


def _updated_text(write: Callable[[Path, list[Row]], Path], value: Callable[[int], object]) -> Callable[[Path], Path]:
    def written(folder: Path) -> Path:
        order = _shuffled()
        rows = [{"item_id": "x", "title": f"version {n}", "at": None if n is None else value(n)} for n in order]
        return write(folder, rows)

    return written


def _csv(folder: Path, rows: list[Row]) -> Path:
    return write_csv(folder / "c.csv", rows, ["item_id", "title", "at"])


def _jsonl(folder: Path, rows: list[Row]) -> Path:
    return write_jsonl(folder / "c.jsonl", rows)


def _zoned(n: int) -> str:
    return MOMENTS[n].astimezone(dt.timezone(dt.timedelta(hours=(n % 3) * 5 - 7))).isoformat()


UPDATED: dict[str, Callable[[Path], Path]] = {
    "CSV, ISO": _updated_text(_csv, lambda n: NAIVE[n].isoformat()),
    "CSV, ISO with zones": _updated_text(_csv, _zoned),
    "CSV, ISO with Z": _updated_text(_csv, lambda n: NAIVE[n].isoformat() + "Z"),
    "CSV, epoch seconds": _updated_text(_csv, lambda n: int(MOMENTS[n].timestamp())),
    "CSV, epoch seconds with fractions": _updated_text(_csv, lambda n: 1_700_000_000 + n / 8),
    "CSV, epoch milliseconds": _updated_text(_csv, lambda n: 1_700_000_000_000 + n),
    "JSON, ISO": _updated_text(_jsonl, lambda n: NAIVE[n].isoformat(" ")),
    "JSON, epoch seconds": _updated_text(_jsonl, lambda n: int(MOMENTS[n].timestamp())),
    "JSON, epoch milliseconds as text": _updated_text(_jsonl, lambda n: str(1_700_000_000_000 + n)),
    "Parquet, string": _updated_parquet(pa.string(), lambda n: NAIVE[n].isoformat()),
    "Parquet, int64 seconds": _updated_parquet(pa.int64(), lambda n: int(MOMENTS[n].timestamp())),
    "Parquet, int64 milliseconds": _updated_parquet(pa.int64(), lambda n: 1_700_000_000_000 + n),
    "Parquet, double": _updated_parquet(pa.float64(), lambda n: 1_700_000_000 + n / 8),
    "Parquet, timestamp s": _updated_parquet(pa.timestamp("s"), NAIVE.__getitem__),
    "Parquet, timestamp ms": _updated_parquet(pa.timestamp("ms", "UTC"), MOMENTS.__getitem__),
    "Parquet, timestamp us": _updated_parquet(pa.timestamp("us", "Europe/Berlin"), MOMENTS.__getitem__),
    "Parquet, date": _updated_parquet(pa.date32(), lambda n: dt.date(2026, 11, 1 + n)),
}
UPDATED_BROKEN: dict[str, Callable[[Path], Path]] = {
    "Parquet, timestamp ns": _updated_parquet(pa.timestamp("ns"), NAIVE.__getitem__),
    "Parquet, timestamp ns UTC": _updated_parquet(pa.timestamp("ns", "UTC"), MOMENTS.__getitem__),
    "Parquet, int64 microseconds": _updated_parquet(pa.int64(), lambda n: 1_700_000_000_000_000 + n),
    "CSV, epoch microseconds": _updated_text(_csv, lambda n: 1_700_000_000_000_000 + n),
    "JSON, epoch nanoseconds": _updated_text(_jsonl, lambda n: 1_700_000_000_000_000_000 + 1000 * n),
}


def _versions(spark: "SparkSession", path: Path) -> list[str]:
    """Texts by ``updated_at``, nulls first."""
    wanted = planning.catalogue_settings(path, updated_at_column="at")
    source = catalogue.find_source(wanted, str(path), ds=planning.DS, storage=planning.STORAGE)
    rows = catalogue.read_rows(spark, source, wanted, storage=planning.STORAGE)
    # Among equal times the texts run backwards, so that only the times can bring them into order.
    return [row.text for row in rows.orderBy("updated_at", rows["text"].desc()).selectExpr("text").collect()]


@pytest.mark.parametrize(
    "name",
    [
        *UPDATED,
        *(name for name in UPDATED_BROKEN),
    ],
)
def test_updated_at_sorts_rows_by_time_however_it_is_written(spark: "SparkSession", tmp_path: Path, name: str) -> None:
    path = (UPDATED | UPDATED_BROKEN)[name](tmp_path)
    assert _versions(spark, path) == ["version None"] * 2 + [f"version {n}" for n in range(len(MOMENTS))]


def test_a_nanosecond_column_that_nothing_uses_does_no_harm(spark: "SparkSession", tmp_path: Path) -> None:
    columns = {"item_id": ["1"], "title": ["a"], "seen": pa.array([NAIVE[0]], pa.timestamp("ns"))}
    assert texts(read(spark, write_parquet(tmp_path / "c.parquet", columns))) == {"1": "a"}


# --- files of one day that differ


def test_files_of_one_day_may_differ_in_columns_and_types(spark: "SparkSession", tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"item_id": pa.array([1, 2], pa.int32()), "title": ["a", "b"]})
    write_parquet(tmp_path / "b.parquet", {"item_id": pa.array([3, 2**40], pa.int64()), "title": ["c", "d"]})
    write_parquet(tmp_path / "c.parquet", {"extra": [0.5], "title": ["e"], "item_id": ["five"]})
    write_parquet(tmp_path / "d.parquet", {"title": pa.array([["f", "g"]]), "item_id": [b"six"]})
    write_parquet(tmp_path / "e.parquet", {"item_id": pa.array([], pa.int64()), "title": pa.array([], pa.string())})
    assert texts(read(spark, tmp_path)) == {
        "1": "a", "2": "b", "3": "c", str(2**40): "d", "five": "e", "six": "f, g"
    }  # fmt: skip


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_columns_are_found_by_name_in_every_file(spark: "SparkSession", tmp_path: Path, ending: str) -> None:
    orders = [("item_id", "title"), ("title", "item_id"), ("extra", "title", "other", "item_id")]
    for number, columns in enumerate(orders):
        rows = [{name: f"{name} {number}" for name in columns}]
        path = tmp_path / f"{number}.{ending}"
        if ending == "csv":
            write_csv(path, rows, columns)
        else:
            write_jsonl(path, rows)
    write_bytes(tmp_path / f"empty.{ending}", b"")
    rows = read(spark, tmp_path)
    assert texts(rows) == {f"item_id {n}": f"title {n}" for n in range(len(orders))}
    assert sorted(row["source"] for row in rows) == [f"{n}.{ending}" for n in range(len(orders))]


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_file_without_the_updated_at_column_is_an_error_that_names_both(
    spark: "SparkSession", tmp_path: Path, ending: str
) -> None:
    full, short = {"item_id": "1", "title": "a", "at": "2026-11-20"}, {"item_id": "1", "title": "a"}
    for name, row in [("full", full), ("short", short)]:
        path = tmp_path / f"{name}.{ending}"
        if ending == "parquet":
            write_parquet(path, {column: [value] for column, value in row.items()})
        elif ending == "csv":
            write_csv(path, [row], list(row))
        else:
            write_jsonl(path, [row])
    with pytest.raises(UserError, match=r"catalogue\.updated_at_column names column 'at'") as error:
        read(spark, tmp_path, updated_at_column="at")
    assert f"short.{ending}" in str(error.value)
    assert "full." not in str(error.value)


def test_hidden_files_are_no_part_of_a_folder(spark: "SparkSession", tmp_path: Path) -> None:
    write_csv(tmp_path / "day" / "c.csv", BOOKS, COLUMNS)
    for name in ("_SUCCESS", ".c.csv.crc", "_temporary/c.csv", ".hidden/c.parquet"):
        write_bytes(tmp_path / "day" / name, b"not for us")
    assert len(read(spark, tmp_path / "day")) == len(BOOKS)


def test_a_glob_takes_the_files_that_match(spark: "SparkSession", tmp_path: Path) -> None:
    for name in ("items-1.csv", "items-2.csv", "other.csv", "items-3.txt"):
        write_bytes(tmp_path / name, f"item_id,title\n{name},a\n".encode())
    assert texts(read(spark, tmp_path / "items-*.csv")).keys() == {"items-1.csv", "items-2.csv"}
    assert texts(read(spark, tmp_path / "items-[23].*", format="csv")).keys() == {"items-2.csv", "items-3.txt"}


def test_a_glob_does_not_reach_into_folders(spark: "SparkSession", tmp_path: Path) -> None:
    write_bytes(tmp_path / "c.csv", b"item_id,title\n1,today\n")
    write_bytes(tmp_path / "archive" / "c.csv", b"item_id,title\n2,last year\n")
    assert texts(read(spark, tmp_path / "*.csv")) == {"1": "today"}


def test_sample_texts_are_distinct_usable_and_the_same_in_any_order(spark: "SparkSession", tmp_path: Path) -> None:
    rows: list[Row] = [{"item_id": str(n), "title": f"title {n % 7}"} for n in range(30)]
    bad: list[Row] = [{"item_id": None, "title": "no id"}, {"item_id": "x", "title": " "}]
    found = []
    for name, order in [("a", [*rows, *bad]), ("b", [*bad, *rows[::-1]])]:
        wanted = planning.catalogue_settings(write_jsonl(tmp_path / name / "c.jsonl", order))
        source = catalogue.find_source(wanted, wanted.uri, ds=planning.DS, storage=planning.STORAGE)
        for limit in (100, 3):
            found.append(catalogue.sample_texts(spark, source, wanted, storage=planning.STORAGE, limit=limit))
    every, few = found[:2]
    assert sorted(every) == [f"title {n}" for n in range(7)]
    assert every == sorted(every, key=content_hash)
    assert few == every[:3]
    assert found[2:] == [every, few]


# --- the user's mistakes: one clear line each


def _user_error(spark: "SparkSession", uri: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as error, worker_errors():
        read(spark, uri, **changes)
    message = str(error.value)
    assert "\n" not in message
    assert str(uri) in message
    return message


def test_nothing_at_the_uri_names_the_date(spark: "SparkSession", tmp_path: Path) -> None:
    assert planning.DS in _user_error(spark, tmp_path / "absent.csv")
    assert planning.DS in _user_error(spark, tmp_path / "absent-*.csv")


def test_an_empty_folder_is_no_catalogue(spark: "SparkSession", tmp_path: Path) -> None:
    assert planning.DS in _user_error(spark, tmp_path)


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_zero_byte_file_is_an_empty_catalogue(spark: "SparkSession", tmp_path: Path, ending: str) -> None:
    assert "0 bytes" in _user_error(spark, write_bytes(tmp_path / f"c.{ending}", b""))


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_a_missing_column_is_named_with_its_setting_and_what_there_is(
    spark: "SparkSession", tmp_path: Path, ending: str
) -> None:
    row = {"item_id": "1", "title": "a"}
    path = tmp_path / f"c.{ending}"
    if ending == "parquet":
        write_parquet(path, {name: [value] for name, value in row.items()})
    elif ending == "csv":
        write_csv(path, [row], list(row))
    else:
        write_jsonl(path, [row])
    no_id = _user_error(spark, path, id_column="sku")
    assert "catalogue.id_column names column 'sku'" in no_id
    assert "item_id, title" in no_id
    no_text = _user_error(spark, path, template="{title} {plot}")
    assert "catalogue.template names column 'plot'" in no_text
    assert "item_id, title" in no_text
    # Names are exact: a column that only looks alike is not taken for it.
    assert "'Title'" in _user_error(spark, path, template="{Title}")


@pytest.mark.parametrize(
    "value", [pa.array([{"en": "a"}]), pa.array([[("en", "a")]], pa.map_(pa.string(), pa.string()))]
)
def test_a_nested_column_in_the_template_is_refused(spark: "SparkSession", tmp_path: Path, value: pa.Array) -> None:
    path = write_parquet(tmp_path / "c.parquet", {"item_id": ["1"], "title": value})
    assert "nested" in _user_error(spark, path)
    assert texts(read(spark, path, template="{item_id}")) == {"1": "1"}


@pytest.mark.parametrize("value", [[[["a"]]], [[{"en": "a"}]]], ids=["list of lists", "list of structs"])
def test_a_nested_list_in_the_template_is_refused(spark: "SparkSession", tmp_path: Path, value: list[object]) -> None:
    assert "nested" in _user_error(spark, write_parquet(tmp_path / "c.parquet", {"item_id": ["1"], "title": value}))


def test_a_doubled_csv_header_is_named(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.csv", b"item_id,title,title\n1,a,b\n")
    assert "'title' more than once" in _user_error(spark, path)


@pytest.mark.parametrize("data", [b"item_id,title\n1,a\n", b"PAR1", b"PAR1 cut short PAR1"])
def test_a_file_that_is_no_parquet_is_named(spark: "SparkSession", tmp_path: Path, data: bytes) -> None:
    assert "is no Parquet file" in _user_error(spark, write_bytes(tmp_path / "c.parquet", data))


def test_mixed_formats_and_unknown_endings_ask_for_the_format(spark: "SparkSession", tmp_path: Path) -> None:
    unknown = write_bytes(tmp_path / "c.txt", b"item_id,title\n1,a\n")
    assert "catalogue.format" in _user_error(spark, unknown)
    assert texts(read(spark, unknown, format="csv")) == {"1": "a"}
    write_bytes(tmp_path / "mixed" / "c.csv", b"item_id,title\n1,a\n")
    write_bytes(tmp_path / "mixed" / "c.jsonl", b"{}\n")
    assert "catalogue.format" in _user_error(spark, tmp_path / "mixed")


def _unusable_parquet() -> Iterator[Any]:
    half = {"item_id": ["1"], "title": pa.array([1.5], pa.float16())}
    yield pytest.param(half, {}, id="half precision text")
    yield pytest.param({"item_id": ["1"], "title": [dt.time(1, 2)]}, {}, id="time of day text")
    for name, value in [("bool", True), ("list", [1]), ("binary", b"2026-11-20")]:
        columns = {"item_id": ["1"], "title": ["a"], "at": [value]}
        yield pytest.param(columns, {"updated_at_column": "at"}, id=f"{name} updated_at")


@pytest.mark.parametrize(("columns", "changes"), _unusable_parquet())
def test_a_parquet_type_that_cannot_be_used_is_the_users_error(
    spark: "SparkSession", tmp_path: Path, columns: dict[str, object], changes: dict[str, str]
) -> None:
    _user_error(spark, write_parquet(tmp_path / "c.parquet", columns), **changes)


def test_a_fixed_size_list_is_text_like_any_list(spark: "SparkSession", tmp_path: Path) -> None:
    columns = {"item_id": ["1"], "title": pa.array([["a", "b"]], pa.list_(pa.string(), 2))}
    assert texts(read(spark, write_parquet(tmp_path / "c.parquet", columns))) == {"1": "a, b"}


def test_a_doubled_parquet_column_is_named(spark: "SparkSession", tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, names=["item_id", "title", "title"]), path)
    assert "'title'" in _user_error(spark, path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_that_differ_in_case_are_different_columns(spark: "SparkSession", tmp_path: Path, ending: str) -> None:
    path, columns = tmp_path / f"c.{ending}", ["item_id", "title", "Title"]
    if ending == "csv":
        write_csv(path, [dict(zip(columns, "1ab", strict=True))], columns)
    else:
        write_parquet(path, {name: [value] for name, value in zip(columns, "1ab", strict=True)})
    assert texts(read(spark, path)) == {"1": "a"}


def test_a_gz_file_that_is_not_compressed_is_the_users_error(spark: "SparkSession", tmp_path: Path) -> None:
    path = tmp_path / "c.csv.gz"
    path.write_bytes(b"item_id,title\n1,a\n")
    _user_error(spark, path)


# --- hostile names and contents


@pytest.mark.parametrize("folder", ["my catalogue", "100%25", "ünï"])
def test_paths_may_hold_spaces_percents_and_letters(spark: "SparkSession", tmp_path: Path, folder: str) -> None:
    path = write_bytes(tmp_path / folder / f"{folder}.csv", b"item_id,title\n1,a\n")
    rows = read(spark, path)
    assert texts(rows) == {"1": "a"}
    assert rows[0]["source"] == path.name


def test_names_of_parquet_files_are_given_as_they_are(spark: "SparkSession", tmp_path: Path) -> None:
    names = ["plain.parquet", "a+b.parquet", "100%25.parquet", "50% ü.parquet", "c d+e%20f.parquet"]
    for name in names:
        write_parquet(tmp_path / name, {"item_id": [name], "title": ["t"]})
    assert {row["item_id"]: row["source"] for row in read(spark, tmp_path)} == {name: name for name in names}


def test_a_first_json_line_of_more_than_a_mebibyte_is_read(spark: "SparkSession", tmp_path: Path) -> None:
    rows = [{"item_id": "long", "title": "x" * (1 << 20)}, {"item_id": "short", "title": "y"}]
    found = texts(read(spark, write_jsonl(tmp_path / "c.jsonl", rows)))
    assert {item_id: len(text) for item_id, text in found.items()} == {"long": 1 << 20, "short": 1}


@pytest.mark.parametrize("separator", ["\u2028", "\x85"])
def test_line_separators_inside_json_strings_are_text(spark: "SparkSession", tmp_path: Path, separator: str) -> None:
    row = {"item_id": "1", "title": f"a{separator}b"}
    path = write_jsonl(tmp_path / "c.jsonl", [row], ensure_ascii=False)
    assert texts(read(spark, path)) == {"1": row["title"]}


def test_lone_surrogates_are_undecodable(spark: "SparkSession", tmp_path: Path) -> None:
    lines = [r'{"item_id": "\ud800", "title": "a"}', r'{"item_id": "\ud801", "title": "b"}',
             r'{"item_id": "c", "title": "x\udfffy"}', r'{"item_id": "d", "title": "\ud83d\ude00"}']  # fmt: skip
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", "\n".join(lines).encode()))
    assert texts(rows) == {"d": "😀"}
    assert Counter(row["reason"] for row in rows) == {Reason.UNDECODABLE: 3, None: 1}


def test_what_follows_a_json_record_on_its_line_is_not_dropped(spark: "SparkSession", tmp_path: Path) -> None:
    record = '{"item_id": "1", "title": "a"}'
    malformed = [record + more for more in (record, " x", ",", "}", "\x00", "\x0b")]
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", "\n".join([record + " \t\r", *malformed]).encode()))
    assert texts(rows) == {"1": "a"}
    assert _reasons(rows) == [(Reason.MALFORMED, line) for line in malformed]


def test_mixed_line_ends_in_csv_are_no_part_of_an_id(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.csv", b"title,item_id\na,1\r\nb,2\n")
    assert texts(read(spark, path)) == {"1": "a", "2": "b"}


def test_csv_with_bare_carriage_returns_is_read(spark: "SparkSession", tmp_path: Path) -> None:
    assert texts(read(spark, write_bytes(tmp_path / "c.csv", b"item_id,title\r1,a\r2,b\r"))) == {"1": "a", "2": "b"}


@pytest.mark.parametrize("title", ['a"\0b', 'a\0"b', "a\0\nb", "\0"])
def test_nul_in_csv_is_kept(spark: "SparkSession", tmp_path: Path, title: str) -> None:
    row = {"item_id": "1", "title": title}
    assert texts(read(spark, write_csv(tmp_path / "c.csv", [row], list(row)))) == {"1": title}


def test_line_ends_inside_quotes_are_text(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.csv", b'item_id,title\r\n1,"a\r\nb\rc\nd"\r\n2,"e" \r\n')
    assert texts(read(spark, path)) == {"1": "a\r\nb\rc\nd", "2": "e"}


@pytest.mark.parametrize(
    ("broken", "found", "rows_read"),
    [
        (b'2,"broken', {}, 4),
        (b'"2,broken', {}, 4),
        (b'2,"say "hi" now', {}, 4),
        (b'2,"broken\n3,"c, d"', {"3": "c, d"}, 5),
        (b'2,"broken\n3,"c\nd"\n"4",e', {"3": "c\nd", "4": "e"}, 6),
        (b'2,"broken\n3,""\n4,"e"', {"4": "e"}, 6),
    ],
)
def test_an_unclosed_quote_spoils_its_own_line_only(
    spark: "SparkSession", tmp_path: Path, broken: bytes, found: dict[str, str], rows_read: int
) -> None:
    path = write_bytes(tmp_path / "c.csv", b"item_id,title\n1,a\n" + broken + b"\n8,x\n9,y\n")
    rows = read(spark, path)
    assert texts(rows) == {"1": "a", **found, "8": "x", "9": "y"}
    assert [row for reason, row in _reasons(rows) if reason == Reason.MALFORMED] == [broken.split(b"\n")[0].decode()]
    assert len(rows) == rows_read


def test_a_record_of_several_lines_that_is_malformed_is_kept_whole(spark: "SparkSession", tmp_path: Path) -> None:
    # Its inner lines are text: none of them may become an item, however much it looks like one.
    record = '7,"a\n8,no item\n9,neither",more'
    rows = read(spark, write_bytes(tmp_path / "c.csv", f"item_id,title\n{record}\n1,a\n".encode()))
    assert [(row["item_id"], row["reason"], row["row"]) for row in rows] == [
        (None, Reason.MALFORMED, record),
        ("1", None, None),
    ]


def test_a_quoted_field_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue_text, "QUOTED_BYTES", 100)
    lines = [b'1,"a\n', *(b"%d,plain\n" % n for n in range(2, 100)), b'100,end"\n']
    found = list(csv_records(iter(lines)))
    assert found[0] == (None, b'1,"a')
    assert [record for _, record in found] == [line.removesuffix(b"\n") for line in lines]


FIELDS = st.text(st.sampled_from('ab,"\n\r \t\0é\u2028'), max_size=6)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=5),
    line_end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_of_any_texts_is_read_as_it_was_written(rows: list[tuple[str, ...]], line_end: str) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=line_end, quoting=csv.QUOTE_ALL).writerows(rows)
    found = list(csv_records(io.BytesIO(text.getvalue().encode())))
    assert [fields for fields, _ in found] == [[field.encode() for field in row] for row in rows]
    assert b"".join(record + line_end.encode() for _, record in found) == text.getvalue().encode()


@settings(deadline=None)
@given(st.lists(st.sampled_from([b'"', b'""', b",", b"a", b" ", b"\r", b"\n", b"\xff", b"\0"]), max_size=40))
def test_no_byte_of_a_csv_file_is_lost(pieces: list[bytes]) -> None:
    lines = io.BytesIO(b"".join(pieces)).readlines()
    found = [record.replace(b"\n", b"").replace(b"\r", b"") for _, record in csv_records(iter(lines))]
    assert b"".join(found) == b"".join(pieces).replace(b"\n", b"").replace(b"\r", b"")


@pytest.mark.parametrize("piece_bytes", [1, 7, 64, 1000])
def test_json_lines_are_the_same_however_a_file_is_cut(
    spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(catalogue_text, "PIECE_BYTES", piece_bytes)
    lines = [json.dumps({"item_id": str(n), "title": "é" * (n % 9)}, ensure_ascii=False) for n in range(40)]
    path = write_bytes(tmp_path / "c.jsonl", "\r\n".join(["\ufeff", *lines, "", "{"]).encode())
    rows = read(spark, path)
    assert [(row["item_id"], row["text"]) for row in rows] == [(str(n), "é" * (n % 9)) for n in range(40)] + [
        (None, "")
    ]


def test_a_json_column_may_hold_texts_numbers_and_lists(spark: "SparkSession", tmp_path: Path) -> None:
    values = ["word", 7, 1.5, True, ["a", None, 2, False], [], None]
    path = write_jsonl(tmp_path / "c.jsonl", [{"item_id": n, "title": value} for n, value in enumerate(values)])
    found = {row["item_id"]: row["text"] for row in read(spark, path)}
    assert list(found.values()) == ["word", "7", "1.5", "true", "a, 2, false", "", ""]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_the_users_error(spark: "SparkSession", tmp_path: Path, ending: str, encoding: str) -> None:
    text = "item_id,title\n1,a\n" if ending == "csv" else '{"item_id": "1", "title": "a"}\n'
    _user_error(spark, write_bytes(tmp_path / f"c.{ending}", text.encode(encoding)))


def test_a_header_with_an_unclosed_quote_is_the_users_error(spark: "SparkSession", tmp_path: Path) -> None:
    assert "header" in _user_error(spark, write_bytes(tmp_path / "c.csv", b'item_id,"title\n1,a\n'))


def test_a_gz_file_that_was_cut_is_the_users_error(spark: "SparkSession", tmp_path: Path) -> None:
    rows = [{"item_id": str(n), "title": planning.chance(n).randbytes(50).hex()} for n in range(100_000)]
    path = write_jsonl(tmp_path / "c.jsonl.gz", rows)
    path.write_bytes(path.read_bytes()[:-100])
    assert "gzip" in _user_error(spark, path)


# --- a catalogue that is replaced while it is read


def test_a_catalogue_that_changes_while_it_is_read_is_the_users_error(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        write_bytes(tmp_path / name, b"item_id,title\n1,a\n")
    wanted = planning.catalogue_settings(tmp_path)
    source = catalogue.find_source(wanted, wanted.uri, ds=planning.DS, storage=planning.STORAGE)
    catalogue.require_unchanged(source, storage=planning.STORAGE)
    write_bytes(tmp_path / "b.csv", b"item_id,title\n1,b\n")
    for _ in range(2):
        with pytest.raises(UserError, match="replaced or removed") as error:
            catalogue.require_unchanged(source, storage=planning.STORAGE)
        assert f"{tmp_path / 'b.csv'} was" in str(error.value)
        assert "\n" not in str(error.value)
        (tmp_path / "b.csv").unlink(missing_ok=True)


def test_blanks_around_texts_go_and_nothing_else(spark: "SparkSession", tmp_path: Path) -> None:
    edges = ["", " ", "\t", "\n", "\r", " \n", "\x01", "\x1f ", " \x1f", "\u00a0", "!", "\u200b\t", "é", "\x0b"]
    written = [f"{start}{middle}{end}" for start in edges for middle in ("", "a b", "\n") for end in edges]
    ids = [f"{text}{n}" for n, text in enumerate(written)]
    columns = {"item_id": pa.array(ids), "title": pa.array(written)}
    rows = {row["item_id"]: row for row in read(spark, write_parquet(tmp_path / "c.parquet", columns))}
    for item_id, title in zip(ids, written, strict=True):
        text = title.strip(planning.BLANK)
        row = rows[item_id]
        assert (row["text"], row["reason"]) == (text, None if text else Reason.EMPTY_TEXT)
        assert row["content_hash"] == content_hash(text)
        assert row["row_id"] == row_id(item_id)
    without = {"item_id": pa.array(written), "title": pa.array(["text"] * len(written))}
    found = read(spark, write_parquet(tmp_path / "ids" / "c.parquet", without))
    assert Counter(row["item_id"] for row in found if row["reason"] == Reason.NULL_ID) == Counter(
        text for text in written if not text.strip(planning.BLANK)
    )


@pytest.mark.parametrize("uri", ["", "/*.csv"])
def test_a_part_that_comes_while_the_catalogue_is_read_is_the_users_error(tmp_path: Path, uri: str) -> None:
    write_bytes(tmp_path / "a.csv", b"item_id,title\n1,a\n")
    wanted = planning.catalogue_settings(f"{tmp_path}{uri}")
    source = catalogue.find_source(wanted, wanted.uri, ds=planning.DS, storage=planning.STORAGE)
    write_bytes(tmp_path / "b.csv", b"item_id,title\n2,b\n")
    with pytest.raises(UserError, match=r"b\.csv came while the catalogue was read"):
        catalogue.require_unchanged(source, storage=planning.STORAGE)


def test_a_file_that_goes_before_it_is_read_is_the_users_error(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.csv", b"item_id,title\n1,a\n")
    wanted = planning.catalogue_settings(path)
    source = catalogue.find_source(wanted, wanted.uri, ds=planning.DS, storage=planning.STORAGE)
    rows = catalogue.read_rows(spark, source, wanted, storage=planning.STORAGE)
    path.unlink()
    with pytest.raises(UserError, match="is gone"), worker_errors():
        rows.collect()

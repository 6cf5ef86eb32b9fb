"""Every row of a catalogue, in every format, becomes an item or is quarantined with its reason."""

import csv
import datetime as dt
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from marc_pipeline.catalogue import text_records
from marc_pipeline.catalogue.rows import read_catalogue, sample_texts
from marc_pipeline.catalogue.source import CatalogueSource, find_source, require_unchanged
from marc_pipeline.catalogue.text_records import csv_records
from marc_pipeline.config import CatalogueSettings
from marc_pipeline.errors import UserError
from marc_pipeline.spark.session import worker_errors
from marc_schemas.catalogue import Reason
from marc_schemas.identity import content_hash, row_id
from planning import STORAGE, Row, read, rendered, texts, write_bytes, write_csv, write_jsonl, write_parquet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

COLUMNS = ("item_id", "title", "genres")
BOOKS: list[dict[str, str | None]] = [
    dict(zip(COLUMNS, row, strict=True))
    for row in [
        ("plain", "Dune", "sci-fi"),
        ("comma", "Eats, Shoots & Leaves", "language, humour"),
        ("quotes", 'The "Best" of', '"quoted"'),
        ("quote, comma", '"a", "b"', '","'),
        ("lines", "first\nsecond\n\nfourth", "\nleading and trailing\n"),
        ("backslash", "C:\\temp\\new \\", "\\"),
        ("spaces", "  indented", "tail\t "),
        (" padded id ", "kept as it is", None),
        ("é😀\u2028", "Ünïcödé 漢字 👩‍👩‍👧", "\u200fעברית"),
        ("half", None, "only genres"),
        ("#hash", "# no comment", "null"),
    ]
]
FORMS = pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Rows with the same columns, in the format of the file's ending."""
    if path.suffix == ".parquet":
        return write_parquet(path, {name: pa.array([row[name] for row in rows]) for name in rows[0]})
    return write_csv(path, rows, list(rows[0])) if path.suffix == ".csv" else write_jsonl(path, rows)


def find(wanted: CatalogueSettings) -> CatalogueSource:
    return find_source(wanted, wanted.uri, ds=planning.DS, storage=STORAGE)


WRITERS: dict[str, Callable[[Path], Path]] = {
    "parquet": lambda folder: write_rows(folder / "c.parquet", BOOKS),
    "csv": lambda folder: write_rows(folder / "c.csv", BOOKS),
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
def test_every_format_gives_the_same_rows_with_the_hashes_of_the_contract(
    spark: "SparkSession", tmp_path: Path, name: str
) -> None:
    rows = read(spark, WRITERS[name](tmp_path), template=planning.TEMPLATE)
    assert texts(rows) == {row["item_id"]: rendered(planning.TEMPLATE, row) for row in BOOKS}
    for row in rows:
        assert (row["reason"], row["row_id"]) == (None, row_id(row["item_id"]))
        assert row["content_hash"] == content_hash(row["text"])


TEXT_FILES: dict[str, tuple[str, str, dict[str, str]]] = {
    "stray quotes": (
        "c.csv",
        'item_id,title\n1,a "b" c\n2,5" disk\n3,"say "hi" now"\n4,"x, ""y"", z"\n5,it\'s',
        {"1": 'a "b" c', "2": '5" disk', "3": 'say "hi" now', "4": 'x, "y", z', "5": "it's"},
    ),
    "mixed line ends": ("c.csv", "title,item_id\na,1\r\nb,2\n", {"1": "a", "2": "b"}),
    "carriage returns as line ends": ("c.csv", "item_id,title\r1,a\r2,b\r", {"1": "a", "2": "b"}),
    "line ends in quotes": (
        "c.csv", 'item_id,title\r\n1,"a\r\nb\rc\nd"\r\n2,"e" \r\n', {"1": "a\r\nb\rc\nd", "2": "e"}
    ),
    "columns that differ in case": ("c.csv", "item_id,title,Title\n1,a,b\n", {"1": "a"}),
    **{f"NUL {n}": ("c.csv", f'item_id,title\n1,"{title.replace(chr(34), chr(34) * 2)}"\n', {"1": title})
       for n, title in enumerate(['a"\0b', 'a\0"b', "a\0\nb", "\0"])},
    **{f"separator {mark!a}": ("c.jsonl", f'{{"item_id": "1", "title": "a{mark}b"}}\n', {"1": f"a{mark}b"})
       for mark in "\u2028\x85"},
}  # fmt: skip


@pytest.mark.parametrize("name", TEXT_FILES)
def test_text_files_are_parsed(spark: "SparkSession", tmp_path: Path, name: str) -> None:
    file, content, expected = TEXT_FILES[name]
    assert texts(read(spark, write_bytes(tmp_path / file, content.encode()))) == expected


def test_parquet_types_become_text_as_in_python(spark: "SparkSession", tmp_path: Path) -> None:
    columns: dict[str, pa.Array] = {
        "item_id": pa.array([1, 2**62], pa.int64()),
        "int8": pa.array([-7, None], pa.int8()),
        "uint64": pa.array([2**64 - 1, None], pa.uint64()),
        "float": pa.array([3.5, -0.25]),
        "decimal": pa.array([Decimal("1.50"), None]),
        "date": pa.array([dt.date(2026, 1, 2), None]),
        "time": pa.array([dt.datetime(2026, 1, 2, 3, 4, 5, 123456), None], pa.timestamp("us")),
        "words": pa.array([["a", None, "b, c"], []], pa.list_(pa.string())),
        "pair": pa.array([["a", "b"], None], pa.list_(pa.string(), 2)),
        "numbers": pa.array([[1, 2], None], pa.large_list(pa.int32())),
        "dates": pa.array([[dt.date(2026, 1, 2)], []]),
        "category": pa.array(["x", None]).dictionary_encode(),
        "large": pa.array(["y", None], pa.large_string()),
        "binary": pa.array(["é".encode(), None], pa.binary()),
        "null": pa.nulls(2),
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
    # A nanosecond column that no setting names, and columns that differ in case, do no harm.
    columns |= {"seen": pa.array([NAIVE[0]] * 2, pa.timestamp("ns")), "Large": pa.array(["other"] * 2)}
    path = write_parquet(tmp_path / "c.parquet", columns)
    assert texts(read(spark, path, template=template)) == expected
    flags = {"item_id": ["1", "2"], "title": ["a", "b"], "flag": [True, None]}
    assert texts(read(spark, write_parquet(tmp_path / "flags.parquet", flags), template="{title}{flag}")) == {
        "1": "atrue", "2": "b"
    }  # fmt: skip


def test_json_values_become_text_as_they_are_written(spark: "SparkSession", tmp_path: Path) -> None:
    values = ["12", "-3.50", "12345678901234567890123", "1e9", "true", '"word"', '"2026-01-02"']
    lines = [f'{{"item_id": {n}, "x": {value}, "words": ["a", null, {value}]}}\n' for n, value in enumerate(values)]
    path = write_bytes(tmp_path / "c.jsonl", "".join(lines).encode())
    assert texts(read(spark, path, template="{x}|{words}")) == {
        str(n): f"{value}|a, {value}".replace('"', "") for n, value in enumerate(values)
    }
    mixed = ["word", 7, 1.5, True, ["a", None, 2, False], [], None]
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"item_id": n, "title": value} for n, value in enumerate(mixed)])
    assert [row["text"] for row in read(spark, path)] == ["word", "7", "1.5", "true", "a, 2, false", "", ""]


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


def _templates() -> st.SearchStrategy[str]:
    literal = st.text(HOSTILE, max_size=8).map(lambda text: text.replace("{", "{{").replace("}", "}}"))
    column = st.sampled_from(["{title}", "{genres}"])
    pieces = st.lists(st.tuples(literal, column), min_size=1, max_size=4)
    return st.tuples(pieces, literal).map(lambda t: "".join(a + b for a, b in t[0]) + t[1])


@examples(1, of=2)
@given(drawn=st.lists(_templates(), min_size=6, max_size=6))
def test_templates_render_as_in_python(
    spark: "SparkSession", tmp_path_factory: pytest.TempPathFactory, drawn: list[str]
) -> None:
    path = WRITERS["json lines"](tmp_path_factory.mktemp("templates"))
    templates = [*TEMPLATES, *drawn]
    frames = []
    for number, template in enumerate(templates):
        wanted = planning.catalogue_settings(path, template=template)
        rows = read_catalogue(spark, find(wanted), wanted, storage=STORAGE)
        frames.append(rows.selectExpr(f"{number} AS number", "item_id", "text"))
    union = frames[0]
    for frame in frames[1:]:
        union = union.union(frame)
    assert {(row.number, row.item_id): row.text for row in union.collect()} == {
        (number, row["item_id"]): (
            # A row that lacks all columns of the template has no text, not even the literals.
            rendered(template, row) if any(row[n] for n in ("title", "genres") if f"{{{n}}}" in template) else ""
        )
        for number, template in enumerate(templates)
        for row in BOOKS
    }


# --- quarantine


def _reasons(rows: Sequence[Row]) -> list[tuple[str | None, str]]:
    return [(row["reason"], row["row"]) for row in rows if row["reason"] is not None]


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
    record = '{"item_id": "1", "title": "a"}'
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
        *(record + more for more in (record, " x", ",", "}", "\x00", "\x0b")),
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
    lines = [*malformed, *(json.dumps(row) for row, _ in rejected), record + " \t\r", "", "  "]
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", "\n".join(lines).encode()))
    assert texts(rows) == {"1": "a"}
    found = _reasons(rows)
    assert found[: len(malformed)] == [(Reason.MALFORMED, line) for line in malformed]
    assert [(reason, json.loads(row)) for reason, row in found[len(malformed) :]] == [
        (reason, row) for row, reason in rejected
    ]


def test_undecodable_json_lines_are_quarantined_and_readable(spark: "SparkSession", tmp_path: Path) -> None:
    lines = [b'{"item_id": "a", "title": "x\xffy"}', b'{"item_id": "\xed\xa0\x80", "title": "b"}', b'{"cut": "\xe2\x82']
    surrogates = [rb'{"item_id": "\ud800", "title": "a"}', rb'{"item_id": "\ud801", "title": "b"}',
                  rb'{"item_id": "c", "title": "x\udfffy"}']  # fmt: skip
    good = [b'{"item_id": "ok", "title": "t"}', rb'{"item_id": "d", "title": "\ud83d\ude00"}']
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", b"\n".join([*lines, *surrogates, *good])))
    assert texts(rows) == {"ok": "t", "d": "😀"}
    assert [row["reason"] for row in rows] == [Reason.UNDECODABLE] * 6 + [None] * 2
    assert [re.sub("\ufffd+", "?", row) for _, row in _reasons(rows)][:3] == [
        re.sub("\ufffd+", "?", line.decode(errors="replace")) for line in lines
    ]


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
    ids = {"item_id": planning.undecoded_strings([b"a\xff", b"b"]), "title": ["x", "y"]}
    bad, good = read(spark, write_parquet(tmp_path / "ids.parquet", ids))
    assert (good["item_id"], good["text"], good["reason"]) == ("b", "y", None)
    assert (bad["item_id"], bad["reason"]) == (None, Reason.UNDECODABLE)
    assert json.loads(bad["row"]) == {"item_id": "a\ufffd", "title": "x"}


# --- times of change

MOMENTS = [dt.datetime(2026, 11, day, hour, tzinfo=dt.UTC) for day, hour in [(1, 0), (1, 1), (9, 23), (10, 0), (20, 5)]]
NAIVE = [moment.replace(tzinfo=None) for moment in MOMENTS]


def _zoned(n: int) -> str:
    return MOMENTS[n].astimezone(dt.timezone(dt.timedelta(hours=(n % 3) * 5 - 7))).isoformat()


def _iso(n: int) -> str:
    return NAIVE[n].isoformat()


def _epoch(n: int) -> int:
    return int(MOMENTS[n].timestamp())


UPDATED: dict[str, tuple[str | pa.DataType, Callable[[int], object]]] = {
    "CSV, ISO": ("csv", _iso),
    "CSV, ISO with zones": ("csv", _zoned),
    "CSV, ISO with Z": ("csv", lambda n: _iso(n) + "Z"),
    "CSV, epoch seconds": ("csv", _epoch),
    "CSV, epoch seconds with fractions": ("csv", lambda n: 1_700_000_000 + n / 8),
    "CSV, epoch milliseconds": ("csv", lambda n: 1_700_000_000_000 + n),
    "CSV, epoch microseconds": ("csv", lambda n: 1_700_000_000_000_000 + n),
    "JSON, ISO": ("jsonl", lambda n: NAIVE[n].isoformat(" ")),
    "JSON, epoch seconds": ("jsonl", _epoch),
    "JSON, epoch milliseconds as text": ("jsonl", lambda n: str(1_700_000_000_000 + n)),
    "JSON, epoch nanoseconds": ("jsonl", lambda n: 1_700_000_000_000_000_000 + 1000 * n),
    "Parquet, string": (pa.string(), _iso),
    "Parquet, int64 seconds": (pa.int64(), _epoch),
    "Parquet, int64 milliseconds": (pa.int64(), lambda n: 1_700_000_000_000 + n),
    "Parquet, int64 microseconds": (pa.int64(), lambda n: 1_700_000_000_000_000 + n),
    "Parquet, double": (pa.float64(), lambda n: 1_700_000_000 + n / 8),
    "Parquet, timestamp s": (pa.timestamp("s"), NAIVE.__getitem__),
    "Parquet, timestamp ms": (pa.timestamp("ms", "UTC"), MOMENTS.__getitem__),
    "Parquet, timestamp us": (pa.timestamp("us", "Europe/Berlin"), MOMENTS.__getitem__),
    "Parquet, timestamp ns": (pa.timestamp("ns"), NAIVE.__getitem__),
    "Parquet, timestamp ns UTC": (pa.timestamp("ns", "UTC"), MOMENTS.__getitem__),
    "Parquet, date": (pa.date32(), lambda n: dt.date(2026, 11, 1 + n)),
}


@pytest.mark.parametrize("name", UPDATED)
def test_updated_at_sorts_rows_by_time_in_every_notation(spark: "SparkSession", tmp_path: Path, name: str) -> None:
    form, value = UPDATED[name]
    order = [*range(len(MOMENTS)), None, None]
    planning.chance(4).shuffle(order)
    updated = [None if n is None else value(n) for n in order]
    titles = [f"version {n}" for n in order]
    if isinstance(form, str):
        rows = [{"item_id": "x", "title": title, "at": at} for title, at in zip(titles, updated, strict=True)]
        path = write_rows(tmp_path / f"c.{form}", rows)
    else:
        columns = {"item_id": ["x"] * len(order), "title": titles, "at": pa.array(updated, form)}
        path = write_parquet(tmp_path / "c.parquet", columns)
    wanted = planning.catalogue_settings(path, updated_at_column="at")
    frame = read_catalogue(spark, find(wanted), wanted, storage=STORAGE)
    # Equal times would put the texts in descending order, so only the times can bring them into this order.
    found = [row.text for row in frame.orderBy("updated_at", frame["text"].desc()).selectExpr("text").collect()]
    assert found == ["version None"] * 2 + [f"version {n}" for n in range(len(MOMENTS))]


# --- files of one day


def test_files_of_one_day_may_differ_in_columns_and_types(spark: "SparkSession", tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"item_id": pa.array([1, 2], pa.int32()), "title": ["a", "b"]})
    write_parquet(tmp_path / "b.parquet", {"item_id": pa.array([3, 2**40], pa.int64()), "title": ["c", "d"]})
    write_parquet(tmp_path / "c.parquet", {"extra": [0.5], "title": ["e"], "item_id": ["five"]})
    write_parquet(tmp_path / "d.parquet", {"title": pa.array([["f", "g"]]), "item_id": [b"six"]})
    write_parquet(tmp_path / "e.parquet", {"item_id": pa.array([], pa.int64()), "title": pa.array([], pa.string())})
    assert texts(read(spark, tmp_path)) == {
        "1": "a", "2": "b", "3": "c", str(2**40): "d", "five": "e", "six": "f, g"
    }  # fmt: skip


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_columns_are_found_by_name_in_every_file(spark: "SparkSession", tmp_path: Path, form: str) -> None:
    orders = [("item_id", "title"), ("title", "item_id"), ("extra", "title", "other", "item_id")]
    for number, columns in enumerate(orders):
        write_rows(tmp_path / f"{number}.{form}", [{name: f"{name} {number}" for name in columns}])
    write_bytes(tmp_path / f"empty.{form}", b"")
    rows = read(spark, tmp_path)
    assert texts(rows) == {f"item_id {n}": f"title {n}" for n in range(len(orders))}
    assert sorted(row["source"] for row in rows) == [f"{n}.{form}" for n in range(len(orders))]


ODD_NAMES = (
    "${env:HOME}", "${spark:spark.app.name}", "_metadata", "_malformed_", "_record_", "_source_", "_json_", "_before_",
    "_0_", "a`b", "c.d", "e'f", "count(*)", "*", "text", "reason", "row", "updated_at", "item_id AS text",
)  # fmt: skip


@FORMS
def test_no_column_name_is_a_name_or_code_of_ours(spark: "SparkSession", tmp_path: Path, form: str) -> None:
    odd = {name: f"value {number}" for number, name in enumerate(ODD_NAMES)}
    rows: list[Row] = [{"item_id": "1", "title": "a", **odd}, {"item_id": "2", "title": "", **odd}]
    write_rows(tmp_path / f"c.{form}", rows)
    spark.conf.set("spark.sql.variable.substitute", "true")
    try:
        found = read(spark, tmp_path)
        used = read(spark, tmp_path, id_column="_metadata", template="{_record_}, {_source_}, {text}")
    finally:
        spark.conf.set("spark.sql.variable.substitute", "false")
    assert texts(found) == {"1": "a"}
    ((reason, record),) = _reasons([row for row in found if row["reason"]])
    assert reason == Reason.EMPTY_TEXT
    assert {name: json.loads(record)[name] for name in ODD_NAMES} == odd
    expected = (odd["_metadata"], f"{odd['_record_']}, {odd['_source_']}, {odd['text']}")
    assert {(row["item_id"], row["text"]) for row in used} == {expected}


def test_a_variable_in_a_template_is_text(spark: "SparkSession", tmp_path: Path) -> None:
    write_rows(tmp_path / "c.csv", [{"item_id": "1", "title": "a"}])
    rows = read(spark, tmp_path, template="${{env:HOME}} {title}", clean=False)
    assert texts(rows) == {"1": "${env:HOME} a"}


def test_hidden_files_of_a_folder_are_skipped(spark: "SparkSession", tmp_path: Path) -> None:
    write_csv(tmp_path / "day" / "c.csv", BOOKS, COLUMNS)
    for name in ("_SUCCESS", ".c.csv.crc", "_temporary/c.csv", ".hidden/c.parquet"):
        write_bytes(tmp_path / "day" / name, b"not for us")
    assert len(read(spark, tmp_path / "day")) == len(BOOKS)


def test_a_glob_matches_names_within_its_folder(spark: "SparkSession", tmp_path: Path) -> None:
    for name in ("items-1.csv", "items-2.csv", "other.csv", "items-3.txt", "archive/items-4.csv"):
        write_bytes(tmp_path / name, f"item_id,title\n{name},a\n".encode())
    assert texts(read(spark, tmp_path / "items-*.csv")).keys() == {"items-1.csv", "items-2.csv"}
    assert texts(read(spark, tmp_path / "items-[23].*", format="csv")).keys() == {"items-2.csv", "items-3.txt"}
    assert texts(read(spark, tmp_path / "*.csv")).keys() == {"items-1.csv", "items-2.csv", "other.csv"}


def test_sample_texts_are_distinct_usable_and_the_same_in_any_order(spark: "SparkSession", tmp_path: Path) -> None:
    rows: list[Row] = [{"item_id": str(n), "title": f"title {n % 7}"} for n in range(30)]
    bad: list[Row] = [{"item_id": None, "title": "no id"}, {"item_id": "x", "title": " "}]
    found = []
    for name, order in [("a", [*rows, *bad]), ("b", [*bad, *rows[::-1]])]:
        wanted = planning.catalogue_settings(write_jsonl(tmp_path / name / "c.jsonl", order))
        found += [sample_texts(spark, find(wanted), wanted, storage=STORAGE, limit=limit) for limit in (100, 3)]
    every, few = found[:2]
    assert sorted(every) == [f"title {n}" for n in range(7)]
    assert every == sorted(every, key=content_hash)
    assert few == every[:3]
    assert found[2:] == [every, few]


# --- mistakes of the user: one clear line each


def _user_error(spark: "SparkSession", uri: Path | str, **changes: Any) -> str:
    with pytest.raises(UserError) as error, worker_errors():
        read(spark, uri, **changes)
    message = str(error.value)
    assert "\n" not in message
    assert str(uri) in message
    return message


def test_a_catalogue_without_files_is_an_error_that_names_the_date(spark: "SparkSession", tmp_path: Path) -> None:
    for uri in (tmp_path / "absent.csv", tmp_path / "absent-*.csv", tmp_path):
        assert f"no catalogue for {planning.DS}" in _user_error(spark, uri)


GOOD_CSV = b"item_id,title\n1,a\n"
BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    **{f"empty {form}": (f"c.{form}", b"", "0 bytes") for form in ("parquet", "csv", "jsonl")},
    "doubled CSV header": ("c.csv", b"item_id,title,title\n1,a,b\n", "'title' more than once"),
    "CSV named Parquet": ("c.parquet", GOOD_CSV, "is not a Parquet file"),
    "cut Parquet": ("c.parquet", b"PAR1", "is not a Parquet file"),
    "damaged Parquet": ("c.parquet", b"PAR1 cut short PAR1", "is not a Parquet file"),
    "unknown ending": ("c.txt", GOOD_CSV, "catalogue.format"),
    "unclosed quote in the header": ("c.csv", b'item_id,"title\n1,a\n', "header"),
    **{f"{encoding} CSV": ("c.csv", GOOD_CSV.decode().encode(encoding), "")
       for encoding in ("utf-16", "utf-16-le", "utf-16-be")},
    **{f"{encoding} JSON": ("c.jsonl", '{"item_id": "1", "title": "a"}\n'.encode(encoding), "")
       for encoding in ("utf-16", "utf-16-le", "utf-16-be")},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_an_unreadable_file_is_the_users_error(spark: "SparkSession", tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    assert message in _user_error(spark, write_bytes(tmp_path / file, content))


def test_a_damaged_gz_file_is_the_users_error(spark: "SparkSession", tmp_path: Path) -> None:
    plain = tmp_path / "plain.csv.gz"
    plain.write_bytes(GOOD_CSV)
    assert "gzip" in _user_error(spark, plain)
    rows = [{"item_id": str(n), "title": planning.chance(n).randbytes(50).hex()} for n in range(100_000)]
    cut = write_jsonl(tmp_path / "c.jsonl.gz", rows)
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "gzip" in _user_error(spark, cut)


def test_a_set_format_decides_where_endings_are_unclear(spark: "SparkSession", tmp_path: Path) -> None:
    assert texts(read(spark, write_bytes(tmp_path / "c.txt", GOOD_CSV), format="csv")) == {"1": "a"}
    write_bytes(tmp_path / "mixed" / "c.csv", GOOD_CSV)
    write_bytes(tmp_path / "mixed" / "c.jsonl", b"{}\n")
    assert "catalogue.format" in _user_error(spark, tmp_path / "mixed")


@FORMS
def test_a_missing_column_is_named_with_its_setting_and_the_columns(
    spark: "SparkSession", tmp_path: Path, form: str
) -> None:
    path = write_rows(tmp_path / f"c.{form}", [{"item_id": "1", "title": "a"}])
    no_id = _user_error(spark, path, id_column="sku")
    assert "catalogue.id_column names column 'sku'" in no_id
    assert "item_id, title" in no_id
    no_text = _user_error(spark, path, template="{title} {plot}")
    assert "catalogue.template names column 'plot'" in no_text
    assert "item_id, title" in no_text
    # Names are case-sensitive.
    assert "'Title'" in _user_error(spark, path, template="{Title}")


@FORMS
def test_a_file_without_the_updated_at_column_is_named(spark: "SparkSession", tmp_path: Path, form: str) -> None:
    write_rows(tmp_path / f"full.{form}", [{"item_id": "1", "title": "a", "at": "2026-11-20"}])
    write_rows(tmp_path / f"short.{form}", [{"item_id": "1", "title": "a"}])
    with pytest.raises(UserError, match=r"catalogue\.updated_at_column names column 'at'") as error:
        read(spark, tmp_path, updated_at_column="at")
    assert f"short.{form}" in str(error.value)
    assert "full." not in str(error.value)


UNUSABLE: dict[str, tuple[Any, str]] = {
    "struct": (pa.array([{"en": "a"}]), "nested"),
    "map": (pa.array([[("en", "a")]], pa.map_(pa.string(), pa.string())), "nested"),
    "list of lists": ([[["a"]]], "nested"),
    "list of structs": ([[{"en": "a"}]], "nested"),
    "half precision": (pa.array([1.5], pa.float16()), "Spark cannot read its type"),
    "time of day": ([dt.time(1, 2)], "Spark cannot read its type"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_parquet_type_that_cannot_become_text_is_refused(spark: "SparkSession", tmp_path: Path, name: str) -> None:
    value, message = UNUSABLE[name]
    path = write_parquet(tmp_path / "c.parquet", {"item_id": ["1"], "title": value})
    assert message in _user_error(spark, path)
    if name in {"struct", "map"}:
        assert texts(read(spark, path, template="{item_id}")) == {"1": "1"}


@pytest.mark.parametrize("value", [True, [1], b"2026-11-20"], ids=["bool", "list", "binary"])
def test_a_parquet_type_that_is_no_time_is_refused(spark: "SparkSession", tmp_path: Path, value: object) -> None:
    columns = {"item_id": ["1"], "title": ["a"], "at": [value]}
    assert "not a time" in _user_error(spark, write_parquet(tmp_path / "c.parquet", columns), updated_at_column="at")


def test_a_doubled_parquet_column_is_named(spark: "SparkSession", tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["1"])] * 3, names=["item_id", "title", "title"]), path)
    assert "'title'" in _user_error(spark, path)


# --- unusual names and contents


@pytest.mark.parametrize("folder", ["my catalogue", "100%25", "ünï"])
def test_paths_may_contain_spaces_percents_and_letters(spark: "SparkSession", tmp_path: Path, folder: str) -> None:
    path = write_bytes(tmp_path / folder / f"{folder}.csv", GOOD_CSV)
    assert [(row["text"], row["source"]) for row in read(spark, path)] == [("a", path.name)]


def test_names_of_parquet_files_are_given_as_they_are(spark: "SparkSession", tmp_path: Path) -> None:
    names = ["plain.parquet", "a+b.parquet", "100%25.parquet", "50% ü.parquet", "c d+e%20f.parquet"]
    for name in names:
        write_parquet(tmp_path / name, {"item_id": [name], "title": ["t"]})
    assert {row["item_id"]: row["source"] for row in read(spark, tmp_path)} == {name: name for name in names}


def test_a_first_json_line_of_more_than_a_mebibyte_is_read(spark: "SparkSession", tmp_path: Path) -> None:
    rows = [{"item_id": "long", "title": "x" * (1 << 20)}, {"item_id": "short", "title": "y"}]
    found = texts(read(spark, write_jsonl(tmp_path / "c.jsonl", rows)))
    assert {item_id: len(text) for item_id, text in found.items()} == {"long": 1 << 20, "short": 1}


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
def test_an_unclosed_quote_spoils_only_its_own_line(
    spark: "SparkSession", tmp_path: Path, broken: bytes, found: Mapping[str, str], rows_read: int
) -> None:
    rows = read(spark, write_bytes(tmp_path / "c.csv", GOOD_CSV + broken + b"\n8,x\n9,y\n"))
    assert texts(rows) == {"1": "a", **found, "8": "x", "9": "y"}
    assert [row for reason, row in _reasons(rows) if reason == Reason.MALFORMED] == [broken.split(b"\n")[0].decode()]
    assert len(rows) == rows_read


def test_a_malformed_record_of_several_lines_is_kept_whole(spark: "SparkSession", tmp_path: Path) -> None:
    # The lines within the quotes are text, although they look like items.
    record = '7,"a\n8,no item\n9,neither",more'
    rows = read(spark, write_bytes(tmp_path / "c.csv", f"item_id,title\n{record}\n1,a\n".encode()))
    assert [(row["item_id"], row["reason"], row["row"]) for row in rows] == [
        (None, Reason.MALFORMED, record),
        ("1", None, None),
    ]


def test_a_quoted_field_above_the_limit_counts_as_unclosed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_records, "QUOTED_BYTES", 100)
    lines = [b'1,"a\n', *(b"%d,plain\n" % n for n in range(2, 100)), b'100,end"\n']
    found = list(csv_records(iter(lines)))
    assert found[0] == (None, b'1,"a')
    assert [record for _, record in found] == [line.removesuffix(b"\n") for line in lines]


FIELDS = st.text(st.sampled_from('ab,"\n\r \t\0é\u2028'), max_size=6)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(FIELDS, FIELDS, FIELDS), max_size=5), line_end=st.sampled_from(["\n", "\r\n"]))
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
def test_json_lines_are_the_same_for_every_size_of_pieces(
    spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(text_records, "PIECE_BYTES", piece_bytes)
    lines = [json.dumps({"item_id": str(n), "title": "é" * (n % 9)}, ensure_ascii=False) for n in range(40)]
    rows = read(spark, write_bytes(tmp_path / "c.jsonl", "\r\n".join(["\ufeff", *lines, "", "{"]).encode()))
    expected = [*((str(n), "é" * (n % 9)) for n in range(40)), (None, "")]
    assert [(row["item_id"], row["text"]) for row in rows] == expected


def test_only_blanks_around_texts_are_trimmed(spark: "SparkSession", tmp_path: Path) -> None:
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


# --- a catalogue that changes during a run


@pytest.mark.parametrize("uri", ["", "/*.csv"])
def test_a_catalogue_that_changes_during_a_run_is_the_users_error(tmp_path: Path, uri: str) -> None:
    for name in ("a.csv", "b.csv"):
        write_bytes(tmp_path / name, GOOD_CSV)
    source = find(planning.catalogue_settings(f"{tmp_path}{uri}"))
    require_unchanged(source, storage=STORAGE)
    write_bytes(tmp_path / "b.csv", b"item_id,title\n1,b\n")
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{tmp_path / 'b.csv'} was replaced or removed [^\n]*$"):
            require_unchanged(source, storage=STORAGE)
        (tmp_path / "b.csv").unlink(missing_ok=True)
    write_bytes(tmp_path / "c.csv", b"item_id,title\n2,b\n")
    with pytest.raises(UserError, match=r"c\.csv was added while the catalogue was read"):
        require_unchanged(source, storage=STORAGE)


def test_a_file_that_is_deleted_before_it_is_read_is_the_users_error(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "c.csv", GOOD_CSV)
    wanted = planning.catalogue_settings(path)
    rows = read_catalogue(spark, find(wanted), wanted, storage=STORAGE)
    path.unlink()
    with pytest.raises(UserError, match="is missing"), worker_errors():
        rows.collect()

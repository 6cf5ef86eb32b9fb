"""Each of 10,000 hostile rows becomes an item, an older duplicate, or is quarantined with its reason.

The expected outcome of a row is computed in plain Python from the values that it is written from.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

import planning
from example_counts import examples
from marc_schemas.catalogue import Reason
from planning import BLANK, Planned, plan_day, settings_at, write_bytes, write_parquet

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

TEMPLATE = "{title}. {genres}"
FILES, ROWS_PER_FILE, BROKEN_PER_FILE = 4, 520, 120
"""Sizes of one of the six catalogues."""

PIECES = [
    *"abcXYZ019 ,;:'\"\\/{}[]#%$`&<>|", "   ", "\n", "\r", "\r\n", "\t", "\0", "\x01", "\x08", "\x0b", "\x0c", "\x1b",
    "\x1f", "\x7f", "\x85", "\u2028", "\u2029", "\ufeff", "\u00a0", "\u200b", "\u200d", "\u202e", "עברית", "ابجد",
    "e\u0301", "o\u0308\u0323", "漢字", "é", "ß", "İ", "😀", "👩\u200d👩\u200d👧", "\U000e0001", "\U0010ffff",
    '""', '","', "\\u0041", "\\N", "null", "NaN",
]  # fmt: skip
SPOILT = ["\ufffd", "\udce9", "caf\udce9", "\udcff\udcfe", "\udced\udca0\udc80", "\udcc0\udcaf", "cut\udce2\udc82"]
"""Invalid UTF-8 as "surrogateescape" represents it, and the replacement character of other programs."""
HALVES = ["\ud800", "\udfff", "x\ud83dy", "\ude00\ud83d", "\udc00" * 2]
MOMENTS = [datetime(2026, 11, day, 6 * day % 24, tzinfo=UTC) for day in (1, 2, 3, 9, 20)]
NO_TIMES = [None, None, "", "yesterday", "2026-13-45", "\0", "12 Nov", "-"]


@dataclass
class Written:
    """A row as it was written.

    Attributes:
        source: name of its file.
        serial: unique number of the row, also written to the file.
        item_id, title, genres: Python values.
        moment: its time of change.
        reason: reason by the way in which the row was spoilt, whatever its values.
        raw: bytes of the record in text files.
    """

    source: str
    serial: str
    item_id: Any = None
    title: Any = None
    genres: Any = None
    moment: datetime | None = None
    reason: Reason | None = None
    raw: bytes | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    def fate(self) -> tuple[Reason | None, str, str]:
        """Return the expected reason, id and text."""
        if self.reason:
            return self.reason, "", ""
        values = [self.item_id, self.title, self.genres]
        if any(map(is_nested, values)):
            return Reason.MALFORMED if _is_utf8(self.raw or b"") else Reason.UNDECODABLE, "", ""
        item_id, *texts = map(as_text, values)
        if not all(is_decodable(text) for text in (item_id, *texts)):
            return Reason.UNDECODABLE, "", ""
        if not item_id.strip(BLANK):
            return Reason.NULL_ID, "", ""
        if not any(text.strip(BLANK) for text in texts):
            return Reason.EMPTY_TEXT, "", ""
        return None, item_id, f"{texts[0]}. {texts[1]}".strip(BLANK)


def is_nested(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(v, list | dict) for v in value))


def as_text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, list):
        return ", ".join(as_text(item) for item in value if item is not None)
    return value if isinstance(value, str) else json.dumps(value)


def is_decodable(text: str) -> bool:
    return _is_utf8(text.encode("utf-8", "surrogatepass")) and "\ufffd" not in text


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Catalogue:
    """Writes the files of a day and records the rows."""

    def __init__(self, seed: int, folder: Path, *, dated: bool) -> None:
        self.random = planning.chance(seed)
        self.folder = folder
        self.dated = dated
        self.rows: list[Written] = []

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def new(self, source: str, **known: Any) -> Written:
        row = Written(source, f"serial-{len(self.rows):06d}", **known)
        self.rows.append(row)
        return row

    def text(self) -> str:
        return "".join(self.random.choices(PIECES, k=self.random.randrange(1, 25)))

    def title(self, spoilt: Sequence[str]) -> str | None:
        choice = self.random.random()
        if choice < 0.15:
            return self.random.choice([None, None, "", " ", "\t\r\n", "\u00a0"])
        if choice < 0.22:
            return self.random.choice([self.random.choice(spoilt), self.text() + self.random.choice(spoilt)])
        return self.text()

    def item_id(self, spoilt: Sequence[str]) -> str | None:
        choice = self.random.random()
        if choice < 0.06:
            return self.random.choice([None, "", "  ", "\n\t"])
        if choice < 0.09:
            return self.random.choice(spoilt)
        if choice < 0.3:
            return self.text()
        return self.random.choice(["item {}", "{}", " {} ", "é{}", "{}\0"]).format(self.random.randrange(400))

    def stamp(self) -> tuple[str | int | float | None, datetime | None]:
        """Return a time in one of many notations, and the time."""
        if self.chance(0.3):
            return self.random.choice(NO_TIMES), None
        moment = self.random.choice(MOMENTS)
        seconds = int(moment.timestamp())
        zone = timezone(timedelta(hours=self.random.randrange(-9, 10), minutes=30))
        forms: list[str | int | float] = [
            f"{moment:%Y-%m-%dT%H:%M:%S}", f"{moment:%Y-%m-%d %H:%M:%S.000}", f"{moment:%Y-%m-%dT%H:%M:%SZ}",
            moment.astimezone(zone).isoformat(), seconds, seconds * 1000, seconds * 10**6, seconds * 10**9,
            seconds + 0.0,
        ]  # fmt: skip
        return self.random.choice(forms), moment

    def long_texts(self) -> Iterator[str]:
        yield "x" * 1_000_000
        yield "é, \"'\n" * 170_000
        yield " ".join(f"word{n % 977}" for n in range(100_000))


# --- CSV


def write_csv_day(day: Catalogue) -> None:
    """Write files with different columns, line ends and quoting, one in Latin-1, one that ends inside quotes."""
    optional = ["at"] if day.dated else []
    files = [
        ("a.csv", ["item_id", "title", "genres", "at", "serial"], csv.QUOTE_MINIMAL, "\n"),
        ("b.csv", ["extra", "genres", "title", "other", "at", "item_id", "serial"], csv.QUOTE_ALL, "\r\n"),
        ("c.csv", ["title", "genres", *optional, "item_id", "serial"], csv.QUOTE_MINIMAL, "\r\n"),
        ("d.csv.gz", ["genres", "item_id", *optional, "title", "serial"], csv.QUOTE_MINIMAL, "\n"),
    ]
    for name, columns, quoting, line_end in files:
        to_csv = _csv_writer(columns, line_end)
        header = b"\xef\xbb\xbf" * (name == "b.csv") + ",".join(columns).encode() + line_end.encode()
        good = [_csv_row(day, name, latin=name == "c.csv") for _ in range(ROWS_PER_FILE - BROKEN_PER_FILE)]
        if name == "a.csv":
            for text in day.long_texts():
                good.append(day.new(name, item_id=f"long {len(text)}", title=text))
        pieces = [to_csv(row, quoting) for row in good] + [line_end.encode()] * 20
        pieces += [_csv_spoilt(day, name, len(columns), to_csv, line_end) for _ in range(BROKEN_PER_FILE)]
        day.random.shuffle(pieces)
        if name == "d.csv.gz":
            pieces.append(_unclosed(day, name, line_end))
            # No quote follows, so that only the end of the file shows the unclosed quote.
            pieces += [to_csv(day.new(name, item_id=f"last {n}", title="plain"), csv.QUOTE_NONE) for n in range(20)]
        write_bytes(day.folder / name, header + b"".join(pieces))


def _csv_writer(columns: Sequence[str], line_end: str) -> Callable[[Written, int], bytes]:
    def to_csv(row: Written, quoting: int) -> bytes:
        values = {"item_id": row.item_id, "title": row.title, "genres": row.genres, "serial": row.serial, **row.columns}
        row.columns = {name: str(values[name]) for name in columns if values.get(name) not in {None, ""}}
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator=line_end, quoting=quoting)  # type: ignore[arg-type]
        writer.writerow([row.columns.get(name) for name in columns])
        return text.getvalue().encode("utf-8", "surrogateescape")

    return to_csv


def _csv_row(day: Catalogue, name: str, *, latin: bool) -> Written:
    written, moment = day.stamp()
    row = day.new(name, item_id=day.item_id(SPOILT), title=day.title(SPOILT), genres=day.title(SPOILT), moment=moment)
    if latin:
        # Bytes of Latin-1, read as UTF-8.
        word = day.random.choice(["café", "naïve", "Grüße", "plain", "años"])
        row.title = word.encode("latin-1").decode("utf-8", "surrogateescape")
        row.genres = None
    # Unused columns may contain anything.
    row.columns = {"at": written, "extra": day.random.choice([None, "\udcff", "x,y"]), "other": day.text()}
    return row


def _unclosed(day: Catalogue, name: str, line_end: str) -> bytes:
    row = day.new(name, reason=Reason.MALFORMED)
    row.raw = day.random.choice([b'%s,"never closed', b'%s,"a, ""b"", c', b'"%s never closed']) % row.serial.encode()
    return row.raw + line_end.encode()


def _csv_spoilt(
    day: Catalogue, name: str, fields: int, to_csv: Callable[[Written, int], bytes], line_end: str
) -> bytes:
    """Return a malformed record with its line end."""
    kind = day.random.randrange(6)
    if kind == 0:
        # The following quote can only open a field, which shows that the one before is unclosed.
        guard = to_csv(day.new(name, item_id=f"guard {len(day.rows)}", title="follows"), csv.QUOTE_ALL)
        return _unclosed(day, name, line_end) + guard
    row = day.new(name, reason=Reason.MALFORMED)
    serial = row.serial.encode()
    row.raw = [
        serial,
        serial + b",x" * (fields - 2),
        serial + b"," * fields,
        b'"' + serial + b'\nitem 1,"",text\n",' + b"x," * fields,
        serial + b"\xff",
    ][kind - 1]
    if kind == 5:
        row.reason = Reason.UNDECODABLE
    return row.raw + line_end.encode()


# --- JSON lines


def write_jsonl_day(day: Catalogue) -> None:
    """Write texts, numbers, lists and objects in the same columns, one file in Latin-1, one compressed."""
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.ndjson"):
        lines = [_json_row(day, name) for _ in range(ROWS_PER_FILE - BROKEN_PER_FILE)]
        lines += [_json_spoilt(day, name) for _ in range(BROKEN_PER_FILE)]
        if name == "a.jsonl":
            for text in day.long_texts():
                row = day.new(name, item_id=len(text), title=text)
                lines.append(_to_json(row, {}, ascii_only=day.chance(0.5)))
        day.random.shuffle(lines)
        end = day.random.choice([b"\n", b"\r\n"])
        mark = b"\xef\xbb\xbf" * (name == "b.jsonl")
        write_bytes(day.folder / name, mark + end.join(lines) + day.random.choice([end, b"", end * 3 + b"  "]))


def _to_json(row: Written, more: dict[str, Any], *, ascii_only: bool) -> bytes:
    members = {"item_id": row.item_id, "title": row.title, "genres": row.genres, "serial": row.serial, **more}
    members = {name: value for name, value in members.items() if value is not None or len(row.serial) % 2}
    text = json.dumps(members, ensure_ascii=ascii_only)
    # Escaping joins adjacent surrogates into one character.
    found = json.loads(text)
    row.item_id, row.title, row.genres = found.get("item_id"), found.get("title"), found.get("genres")
    row.raw = text.encode("utf-8", "surrogatepass")
    return row.raw


def _json_value(day: Catalogue, text: str | None) -> Any:
    if day.chance(0.75):
        return text
    number = day.random.randrange(400)
    return day.random.choice(
        [
            number, -number, number / 8, 10**30 + number, True, [], [text], [number, None, "a, b", False], [[number]],
            {}, {"id": number}, [{"en": text}], [None],
        ]
    )  # fmt: skip


def _json_row(day: Catalogue, name: str) -> bytes:
    written, moment = day.stamp()
    row = day.new(
        name,
        item_id=_json_value(day, day.item_id(HALVES)),
        title=_json_value(day, day.title(HALVES)),
        genres=_json_value(day, day.title(HALVES)),
        moment=moment,
    )
    more = {
        "at": written,
        day.random.choice(["extra", "other", "\ud800"]): day.random.choice([HALVES, {"a": [{}]}, 1e300]),
    }
    raw = _to_json(row, more, ascii_only=day.chance(0.7))
    if name == "d.ndjson" and day.chance(0.5):
        row.title, row.item_id, row.reason = "café", "latin", Reason.UNDECODABLE
        members = {"serial": row.serial, "item_id": row.item_id, "title": row.title}
        row.raw = raw = json.dumps(members, ensure_ascii=False).encode("latin-1")
    return raw


def _json_spoilt(day: Catalogue, name: str) -> bytes:
    row = day.new(name, reason=Reason.MALFORMED)
    record = b'{"serial": "%s", "item_id": "item 1", "title": "text"}' % row.serial.encode()
    kinds = [
        record[: -day.random.randrange(1, 20)],
        record + record,
        record + b" " + day.random.choice([b"x", b"null", b"]", b"\0", b'"a"', b"{}"]),
        b"[" + record + b"]",
        b'"' + row.serial.encode() + b'"',
        record.replace(b"text", b"raw\ttab"),
        record.replace(b"text", b"raw\0nul"),
        record.replace(b"text", b"bad \\x escape"),
        record[:-1] + b', "title": "another"}',
        record[:-1] + b', "deep": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        record.replace(b'"', b"'"),
        record.replace(b"text", b"\xff")[:-1],
    ]
    row.raw = day.random.choice(kinds)
    if row.raw is kinds[-1]:
        row.reason = Reason.UNDECODABLE
    return row.raw


# --- Parquet


def write_parquet_day(day: Catalogue) -> None:
    """Write other types and orders of columns in every file, and invalid UTF-8."""
    times: dict[str, tuple[pa.DataType, Callable[[datetime], Any]]] = {
        "a": (pa.timestamp("us"), lambda moment: moment.replace(tzinfo=None)),
        "b": (pa.int64(), lambda moment: int(moment.timestamp()) * 1000),
        "c": (pa.string(), lambda moment: moment.isoformat()),
        "d": (pa.timestamp("ns", "UTC"), lambda moment: moment),
    }
    for name, (kind, to_time) in times.items():
        source = f"{name}.parquet"
        rows = []
        for _ in range(ROWS_PER_FILE):
            moment = None if day.chance(0.3) else day.random.choice(MOMENTS)
            row = day.new(source, title=day.title(SPOILT), genres=day.title(SPOILT), moment=moment)
            row.item_id = day.item_id(SPOILT) if name in "ad" else _or_none(day, day.random.randrange(400))
            rows.append(row)
        if name == "a":
            rows += [day.new(source, item_id=f"long {len(text)}", title=text) for text in day.long_texts()]
        if name == "c":
            for row in rows:
                row.title = _or_none(day, [row.title, None, "a, b"][: day.random.randrange(4)])
                row.genres = None
        columns = {
            "title": _parquet_texts([row.title for row in rows], name),
            "genres": _parquet_texts([row.genres for row in rows], "a" if name == "c" else name),
            "at": pa.array([row.moment and to_time(row.moment) for row in rows], kind),
            "serial": pa.array([row.serial for row in rows]),
        }
        if name in "ad":
            columns["item_id"] = _parquet_texts([row.item_id for row in rows], name)
        else:
            columns["item_id"] = pa.array([row.item_id for row in rows], {"b": pa.int64(), "c": pa.int32()}[name])
        if name == "d":
            columns = {"extra": pa.array([{"a": [1]}] * len(rows)), **dict(reversed(columns.items()))}
        write_parquet(day.folder / source, columns)


def _or_none(day: Catalogue, value: Any) -> Any:
    return None if day.chance(0.05) else value


def _parquet_texts(values: Sequence[Any], kind: str) -> pa.Array:
    """Return strings, binary, lists of strings or large strings with exactly these bytes."""
    if kind == "c":
        offsets = [0]
        flat: list[str | None] = []
        for value in values:
            flat += value or []
            offsets.append(len(flat))
        starts = [None if value is None else start for value, start in zip(values, offsets, strict=False)]
        return pa.ListArray.from_arrays(pa.array([*starts, offsets[-1]], pa.int32()), _parquet_texts(flat, "a"))
    encoded = [None if value is None else value.encode("utf-8", "surrogateescape") for value in values]
    if kind == "b":
        return pa.array(encoded, pa.binary())
    array = pa.array(encoded, pa.large_binary() if kind == "d" else pa.binary())
    string = pa.LargeStringArray if kind == "d" else pa.StringArray
    _, offsets_buffer, data = array.buffers()
    return string.from_buffers(len(array), offsets_buffer, data, array.buffers()[0], array.null_count)


# --- the expected outcome


def expected_of(rows: Sequence[Written], *, dated: bool) -> tuple[dict[str, str], Counter[tuple[str, str, str]]]:
    """Return the text by item id, and file, id and text of the older duplicates."""
    versions: dict[str, list[tuple[str, str, str, str]]] = {}
    for row in rows:
        reason, item_id, text = row.fate()
        if reason is None:
            moment = row.moment.isoformat() if dated and row.moment else ""
            digest = hashlib.sha256(text.encode()).hexdigest()
            versions.setdefault(item_id, []).append((moment, digest, row.source, text))
    items, older = {}, Counter[tuple[str, str, str]]()
    for item_id, found in versions.items():
        # Of equal rows, the row of the first file counts.
        latest = max(found)
        latest = min((version for version in found if version[:2] == latest[:2]), key=lambda version: version[2])
        items[item_id] = latest[3]
        older.update((source, item_id, text) for _, _, source, text in found)
        older[latest[2], item_id, latest[3]] -= 1
    return items, +older


def check(rows: Sequence[Written], planned: Planned, *, dated: bool) -> None:
    """Assert that items and quarantine are exactly the written rows, each with its reason, file and record."""
    items, older = expected_of(rows, dated=dated)
    assert len(rows) == len(planned.items) + len(planned.quarantine) == planned.plan.rows_read
    assert planned.texts.keys() == items.keys()
    assert [item_id for item_id, text in planned.texts.items() if items[item_id] != text] == []

    duplicates = [row for row in planned.quarantine if row["reason"] == Reason.OLDER_DUPLICATE]
    records = [(row["source"], json.loads(row["row"])) for row in duplicates]
    assert Counter((source, record["item_id"], record["text"]) for source, record in records) == older
    by_serial = {row.serial: row for row in rows}
    rejected = {row.serial: reason for row in rows if (reason := row.fate()[0])}
    assert planned.reasons == Counter(rejected.values()) + Counter({Reason.OLDER_DUPLICATE: older.total()})
    assert planned.plan.quarantined == planned.reasons
    for found in planned.quarantine:
        if found["reason"] != Reason.OLDER_DUPLICATE:
            (serial,) = set(re.findall(r"serial-\d{6}", found["row"]))
            assert found["reason"] == rejected.pop(serial), found
            assert found["source"] == by_serial[serial].source
            check_record(by_serial[serial], found["row"])
    assert rejected == {}


def check_record(row: Written, record: str) -> None:
    """Assert that the quarantined record is the row, apart from invalid UTF-8."""
    if row.raw is not None:
        assert _replaced(record) == _replaced(row.raw.decode(errors="replace"))
    elif row.columns:
        values = {n: v.encode("utf-8", "surrogateescape").decode(errors="replace") for n, v in row.columns.items()}
        assert json.loads(_replaced(record)) == json.loads(_replaced(json.dumps(values, ensure_ascii=False)))
    elif isinstance(row.title, str) and row.source != "b.parquet":
        title = row.title.encode("utf-8", "surrogateescape").decode(errors="replace")
        assert _replaced(json.loads(record)["title"]) == _replaced(title)


def _replaced(text: str) -> str:
    """Join replacement characters, because programs differ in their number for a run of bad bytes."""
    return re.sub("\ufffd+", "\ufffd", text)


WRITERS = {"csv": write_csv_day, "jsonl": write_jsonl_day, "parquet": write_parquet_day}


@pytest.mark.parametrize("dated", [True, False], ids=["updated_at", "no updated_at"])
@pytest.mark.parametrize("form", WRITERS)
def test_every_hostile_row_is_an_item_or_quarantined_with_its_reason(
    spark: "SparkSession", tmp_path: Path, form: str, dated: bool
) -> None:
    day = Catalogue(20261120 + dated, tmp_path / "day", dated=dated)
    WRITERS[form](day)
    assert len(day.rows) >= FILES * ROWS_PER_FILE
    wanted = settings_at(tmp_path, day.folder, template=TEMPLATE, updated_at_column="at" if dated else None, buckets=5)
    planned = plan_day(spark, wanted)
    check(day.rows, planned, dated=dated)
    # The generator makes every reason, enough items and long texts.
    reasons = {Reason.NULL_ID, Reason.UNDECODABLE, Reason.EMPTY_TEXT, Reason.OLDER_DUPLICATE}
    assert planned.reasons.keys() == reasons | ({Reason.MALFORMED} if form != "parquet" else set())
    assert len(planned.items) > 400
    assert max(map(len, planned.texts.values())) >= 1_000_000


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=()), max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=2), values, max_size=2),
    max_leaves=4,
)


@examples(1, of=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(drawn=st.lists(st.tuples(VALUES, VALUES, st.booleans()), min_size=50, max_size=150))
def test_any_json_value_is_a_text_or_quarantined(
    spark: "SparkSession", tmp_path_factory: pytest.TempPathFactory, drawn: list[tuple[Any, Any, bool]]
) -> None:
    root = tmp_path_factory.mktemp("values")
    day = Catalogue(0, root / "day", dated=False)
    lines = [_to_json(day.new("c.jsonl", item_id="first", title="first", genres="first"), {}, ascii_only=True)]
    for item_id, title, ascii_only in drawn:
        lines.append(_to_json(day.new("c.jsonl", item_id=item_id, title=title), {}, ascii_only=ascii_only))
    write_bytes(day.folder / "c.jsonl", b"\n".join(lines))
    check(day.rows, plan_day(spark, settings_at(root, day.folder, template=TEMPLATE)), dated=False)

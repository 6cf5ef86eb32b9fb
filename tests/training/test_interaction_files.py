"""Files of interactions: every supported way to write them gives the same rows, and bad files are refused."""

import datetime
import decimal
import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from marc_pipeline.config import InteractionSettings
from marc_pipeline.storage import Storage
from rating_files import GOOD, ITEMS, equal, read, read_all, refusal, write

BOTH = ("r.csv", "r.parquet")
PARQUET = ("r.parquet",)


# Formats


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(
        st.tuples(
            st.text("uvwxyz01 ,é\"'", min_size=1, max_size=3).filter(str.strip),
            st.sampled_from(ITEMS),
            st.sampled_from([0.5, 1, 3.5, 4, 4.5]),
            st.integers(-(10**10), 10**10),
        ),
        min_size=2,
    )
)
def test_parquet_and_csv_give_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]
) -> None:
    assume(
        all(len(kinds) > 1 for kinds in ({u for u, *_ in rows}, {r >= 4 for _, _, r, _ in rows}, {t for *_, t in rows}))
    )
    columns = dict(zip(GOOD, map(list, zip(*rows, strict=True)), strict=True))
    folder = tmp_path_factory.mktemp("rows")
    found = read(write(folder / "r.parquet", columns))
    assert equal(found, read(write(folder / "r.csv", columns)))
    by_time = sorted(rows, key=lambda row: row[3])
    assert [ITEMS[item] for item in found.items] == [row[1] for row in by_time]
    numbers = {user: number for number, user in enumerate(dict.fromkeys(row[0] for row in by_time))}
    assert found.users.tolist() == [numbers[row[0]] for row in by_time]


def test_column_names_folders_globs_formats_and_compression_do_not_change_the_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "whole.csv", GOOD)
    whole = read(path)
    names = {"user_column": "who", "item_column": "what", "rating_column": "clicked", "timestamp_column": "at"}
    renamed = dict(zip(names.values(), GOOD.values(), strict=True)) | {"note": ["x,\ny"] * 5}
    assert all(equal(read(write(tmp_path / name, renamed), **names), whole) for name in BOTH)

    # A folder named like a partition does not add a column, and empty files add no rows.
    for number, part in enumerate((slice(0, 2), slice(2, 5))):
        half = {name: values[part] for name, values in GOOD.items()}
        write(tmp_path / "in" / f"rating={number}" / "r.csv", half)
        write(tmp_path / "pq" / f"rating={number}" / "r.parquet", half)
    (tmp_path / "in" / "rating=1" / "s.csv").write_bytes(b"")
    write(tmp_path / "in" / "rating=1" / "t.csv", {name: [] for name in GOOD})
    write(tmp_path / "pq" / "rating=1" / "t.parquet", {name: [] for name in GOOD})
    for uri in ("in", "in/*/*.csv", "pq", "pq/rating=?/*.parquet"):
        assert equal(read(tmp_path / uri), whole), uri

    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "r.txt").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert equal(read(tmp_path / "r.csv.gz"), whole)
    assert equal(read(tmp_path / "r.txt", format="csv"), whole)


def test_files_are_opened_through_the_storage_and_its_errors_are_not_the_users(tmp_path: Path) -> None:
    class Moved(Storage):
        """Simulates S3, where the path inside the file system differs from the uri."""

        def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
            return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), Path(uri).name

    class Down(Storage):
        def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
            raise OSError(f"no connection for {uri}")

    for name in BOTH:
        wanted = InteractionSettings(uri=str(write(tmp_path / name, GOOD)))
        assert len(read_all(Moved(), wanted, ITEMS)) == 5
        with pytest.raises(OSError, match="no connection"):
            read_all(Down(), wanted, ITEMS)


# Values


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.decimal128(38, 0), pa.string(), pa.large_string()])
def test_whole_numbers_and_text_are_the_same_id(tmp_path: Path, kind: pa.DataType) -> None:
    numbers = pa.array([3, 1, 2, 2, 3])
    ids = numbers.cast(pa.string()).cast(kind) if "string" in str(kind) else numbers.cast(kind, safe=False)
    for column in (ids, ids.dictionary_encode()):
        path = write(tmp_path / "r.parquet", GOOD | {"item_id": column, "user_id": column})
        assert read(path, ["1", "2", "3"]).items.tolist() == [1, 0, 2, 2, 1]


def test_csv_ids_that_look_like_numbers_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD | {"item_id": ["01", "1", "NA", "null", "1.0"]})
    assert read(path, ["1", "01", "1.0", "NA", "null"]).items.tolist() == [3, 0, 2, 1, 4]


@pytest.mark.parametrize("labels", [[1, 0, 1, 0, 1], [True, False, True, False, True]])
def test_labels_are_ratings_with_threshold_1(tmp_path: Path, labels: list[Any]) -> None:
    path = write(tmp_path / "r.parquet", GOOD | {"rating": labels})
    assert read(path, positive_rating=1).labels.tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.decimal128(5, 2), pa.string()])
def test_a_rating_equal_to_the_threshold_is_a_click_in_every_precision(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["4.1", "4.0", "3.7", "3.6", "4.3"])
    ratings = texts if kind == pa.string() else pa.array([decimal.Decimal(t.as_py()) for t in texts])
    if pa.types.is_floating(kind):
        ratings = texts.cast(pa.float64()).cast(kind, safe=False)
    path = write(tmp_path / "r.parquet", GOOD | {"rating": ratings, "timestamp": [1, 2, 3, 4, 5]})
    assert read(path, positive_rating=4.1).labels.tolist() == [1, 0, 0, 0, 1]
    assert read(path, positive_rating=3.7).labels.tolist() == [1, 1, 1, 0, 1]


MOMENT = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
MOMENTS = [MOMENT - datetime.timedelta(seconds=step) for step in (0, 40, 30, 20, 10)]
SECONDS = [int(moment.timestamp()) for moment in MOMENTS]
ARROW = pa.array(MOMENTS).cast(pa.timestamp("us", "UTC"))
TIMES: dict[str, Any] = {
    "seconds": SECONDS,
    "milliseconds": [s * 1000 for s in SECONDS],
    "microseconds": [s * 1_000_000 for s in SECONDS],
    "nanoseconds": [s * 10**9 + 999 for s in SECONDS],
    "digits": [str(s) for s in SECONDS],
    "offset": [moment.isoformat() for moment in MOMENTS],
    "Z": [moment.strftime("%Y-%m-%dT%H:%M:%SZ") for moment in MOMENTS],
    "no zone": [moment.strftime(" %Y-%m-%d %H:%M:%S.000000999") for moment in MOMENTS],
    "zone": [moment.astimezone(datetime.timezone(datetime.timedelta(hours=5))) for moment in MOMENTS],
    "naive": [moment.replace(tzinfo=None) for moment in MOMENTS],
    **{
        str(kind): ARROW.cast(kind)
        for kind in (*map(pa.timestamp, ("s", "ms", "ns")), pa.timestamp("us", "Asia/Tokyo"))
    },
}


@pytest.mark.parametrize("written", TIMES.values(), ids=TIMES.keys())
def test_every_way_to_write_a_time_gives_the_same_microseconds(tmp_path: Path, written: Any) -> None:
    for name in PARQUET if isinstance(written, pa.Array) else BOTH:
        found = read(write(tmp_path / name, GOOD | {"timestamp": written}))
        assert found.times.tolist() == [second * 1_000_000 for second in sorted(SECONDS)]


def test_dates_are_midnights_and_numbers_near_a_limit_between_units_stay_in_order(tmp_path: Path) -> None:
    days = [datetime.date(1970, 1, day) for day in (5, 4, 3, 2, 1)]
    for name in BOTH:
        found = read(write(tmp_path / name, GOOD | {"timestamp": days}))
        assert found.times.tolist() == [day * 86_400_000_000 for day in range(5)]
    written = [10**11 - 2, 10**11 - 1, 10**11, 10**11 + 1, 10**11 + 2]
    assert read(write(tmp_path / "r.parquet", GOOD | {"timestamp": written})).items.tolist() == [2, 0, 1, 1, 2]


# Refusals


def column_error(column: str, problem: str) -> str:
    return f"interactions.{column.removesuffix('_id')}_column: column {column!r} of {{path}} {problem}"


MISSING = {"user_id": "no user", "item_id": "no item", "rating": "no rating (null or NaN)", "timestamp": "no timestamp"}
NAN, INFINITY = float("nan"), float("inf")
TIME = "a time (whole seconds since 1970, a timestamp or an ISO date)"
REFUSED: list[tuple[tuple[str, ...], str, Any, str]] = [
    *(
        (
            BOTH,
            column,
            [*GOOD[column][:first], *[None] * count, *GOOD[column][first + count :]],
            f"has {no} in {count} of the first 5 rows, first in row {first + 1}; remove them",
        )
        for column, no in MISSING.items()
        for first, count in ((2, 2), (0, 5))
    ),
    (BOTH, "user_id", ["a", "b", "c", "a", " \t"], "has no user in 1 of the first 5 rows, first in row 5; remove them"),
    (BOTH, "item_id", ["a", "b", "c", "a", " \t"], "has no item in 1 of the first 5 rows, first in row 5; remove them"),
    (
        BOTH,
        "rating",
        [1.0, NAN, 4.0, NAN, 5.0],
        "has no rating (null or NaN) in 2 of the first 5 rows, first in",
    ),
    (
        PARQUET,
        "rating",
        [1.0, None, 4.0, NAN, 5.0],
        "has no rating (null or NaN) in 2 of the first 5 rows, first in",
    ),
    (
        BOTH,
        "rating",
        [1.0, 4.0, 5.0, INFINITY, 5.0],
        "has an infinite rating in 1 of the first 5 rows, first in row 4",
    ),
    (
        BOTH,
        "rating",
        [1.0, 4.0, 5.0, -INFINITY, 5.0],
        "has an infinite rating in 1 of the first 5 rows, first in row 4",
    ),
    (
        BOTH,
        "rating",
        ["1", "4", "five\nstars", "bad", "5"],
        "has 'five\\nstars' in row 3, which is not a number written like '1' in row 1",
    ),
    (BOTH, "rating", ["good", "4", "3", "2", "5"], "has 'good' in row 1, which is not a number"),
    (PARQUET, "rating", [datetime.date(2020, 1, 1)] * 5, "is date32[day]; a rating must be a number: convert"),
    (BOTH, "timestamp", ["yesterday", "1", "2", "3", "4"], f"has 'yesterday' in row 1, which is not {TIME}"),
    (BOTH, "timestamp", ["1", "2", "soon", "3", "4"], "has 'soon' in row 3, which is not a time"),
    (BOTH, "timestamp", ["2020-01-01", "2020-01-02", "2020-02-30", "3", "4"], "has '2020-02-30' in row 3, which is"),
    (
        BOTH,
        "timestamp",
        ["2020-01-01", "2020-01-02T03:04:05Z", "2", "3", "4"],
        f"has '2020-01-02T03:04:05Z' in row 2, which is not {TIME} written like '2020-01-01' in row 1",
    ),
    (BOTH, "timestamp", ["1.5", "2", "3", "4", "5"], "has '1.5' in row 1, which is not a time"),
    (PARQUET, "timestamp", pa.array([1.5, 2, 3, 4, 5]), f"is double, not {TIME}"),
    (PARQUET, "timestamp", pa.array([datetime.time(1)] * 5), "is time64[us], not a time"),
    (PARQUET, "timestamp", pa.array([True] * 5), "is bool, not a time"),
    (
        PARQUET,
        "timestamp",
        pa.array([2**63] * 5, pa.uint64()),
        "contains a time out of range: Integer value 9223372036854775808",
    ),
    (
        PARQUET,
        "timestamp",
        pa.array([2**62] * 5, pa.timestamp("ms")),
        "contains a time out of range: Casting from timestamp[ms]",
    ),
    *(
        (PARQUET, column, values, f"is {kind}")
        for column in ("user_id", "item_id")
        for values, kind in [
            ([1.0, 2.0, 3.0, 1.0, 2.0], "double; an id must be text or a whole number: convert the column"),
            ([True] * 5, "bool; an id must be"),
            ([b"a"] * 5, "binary; an id must be"),
            ([["a"]] * 5, "list"),
        ]
    ),
]


@pytest.mark.parametrize(("names", "column", "values", "problem"), REFUSED)
def test_an_unusable_value_is_refused_with_column_file_and_row(
    tmp_path: Path, names: tuple[str, ...], column: str, values: Any, problem: str
) -> None:
    for name in names:
        path = write(tmp_path / name, GOOD | {column: values})
        assert refusal(lambda path=path: read(path)).startswith(column_error(column, problem).format(path=path))


@pytest.mark.parametrize("column", GOOD)
def test_a_missing_or_ambiguous_column_is_refused(tmp_path: Path, column: str) -> None:
    named = {"rating_column": "rating"} if column == "rating" else {}
    rest = {key: values for key, values in GOOD.items() if key != column}
    setting = f"interactions.{column.removesuffix('_id')}_column names column {column!r}, which"
    for name in BOTH:
        path = write(tmp_path / name, rest)
        expected = f"{setting} {path} does not have (it has: {', '.join(rest)})"
        assert refusal(lambda path=path: read(path, **named)) == expected
    path = tmp_path / "twice.csv"
    path.write_text(f"user_id,item_id,rating,timestamp,{column}\nu,a,1,2,3\n")
    assert refusal(lambda: read(path)) == f"{setting} {path} has more than once"


HEADER = b"user_id,item_id,rating,timestamp"
PLAIN = HEADER + b"\nu,a,1,2\n"


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("r.csv", HEADER + "\nu,caf\xe9,1,2\n".encode("latin-1"), "readable CSV file in UTF-8"),
        ("r.csv", "us\xe9r,item_id\nu,a\n".encode("latin-1"), "readable CSV file in UTF-8"),
        ("r.csv", PLAIN.decode().encode("utf-16"), "readable CSV file in UTF-8"),
        pytest.param("r.csv", PLAIN + b"u,a,1\n", "readable CSV file in UTF-8", id="too few fields"),
        pytest.param("r.csv", HEADER + b'\n"u,a,1,2\nv,a,1,3\n', "readable CSV file in UTF-8", id="open quote"),
        pytest.param("r.csv", HEADER, "readable CSV file in UTF-8", id="header without a line break"),
        pytest.param("r.csv", b'"' + b"x" * 200_000, "readable CSV file in UTF-8", id="huge header"),
        ("r.csv.gz", PLAIN, "complete gzip file"),
        # With an id, because the bytes contain the time of day.
        pytest.param("r.csv.gz", gzip.compress(PLAIN * 99)[:-10], "complete gzip file", id="cut gzip"),
        ("r.parquet", PLAIN, "readable Parquet file"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str, content: bytes, wanted: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(lambda: read(path)).startswith(f"{path} is not a {wanted}: ")


def test_missing_files_empty_files_and_unknown_formats_are_refused(tmp_path: Path) -> None:
    message = refusal(lambda: read_all(Storage(), InteractionSettings(), ITEMS))
    assert message.startswith("interactions.uri is not set; name Parquet or CSV files")
    (tmp_path / "empty").mkdir()
    for uri in ("none.csv", "no/folder", "*.parquet", "empty"):
        expected = f"interactions.uri: there is no file at {tmp_path / uri}; name a file, a folder or a glob"
        assert refusal(lambda uri=uri: read(tmp_path / uri)) == expected
    for name in BOTH:
        path = write(tmp_path / name, {column: [] for column in GOOD})
        expected = f"the interactions at {path} are empty: no file has a row; at least one is needed"
        assert refusal(lambda path=path: read(path)) == expected
        path.write_bytes(b"")
        assert refusal(lambda path=path: read(path)) == expected
    for names in (["r.txt"], ["r.csv", "s.parquet"], ["r.jsonl"]):
        folder = tmp_path / f"from {names[0]}"
        for name in names:
            write(folder / name, GOOD)
        expected = f"cannot tell the format of {folder / names[0]}; set interactions.format to parquet or csv"
        assert refusal(lambda folder=folder: read(folder)) == expected

"""Interactions: read as they are written or refused in one line, cut by time, and no row's history knows its future."""

import csv
import datetime
import decimal
import gzip
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from marc_pipeline.config import InteractionSettings, load_settings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage
from marc_pipeline.training.interactions import (
    Interactions,
    Split,
    histories,
    read_interactions,
    split_by_time,
    split_by_user,
    training_counts,
)
from repository_paths import SHARED

ITEMS = ["a", "b", "c"]
GOOD = {
    "user_id": ["u", "v", "u", "w", "v"],
    "item_id": ["c", "a", "b", "b", "c"],
    "rating": [5.0, 3.5, 4.0, 0.5, 4.5],
    "timestamp": [30, 20, 10, 40, 20],
}
MOVIELENS = SHARED / "data" / "ml-latest-small"


def write(path: Path, columns: dict[str, Any]) -> Path:
    """A Parquet or CSV file, by the ending of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
        return path
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    return path


def read(path: Path | str, items: list[str] | None = None, **given: Any) -> Interactions:
    return read_interactions(Storage(), InteractionSettings(uri=str(path), **given), ITEMS if items is None else items)


def same(one: Interactions, other: Interactions) -> bool:
    names = ("users", "items", "labels", "times")
    pairs = [(getattr(one, name), getattr(other, name)) for name in names]
    same = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    return same and one.profiles is other.profiles is None


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as refused:
        call()
    message = str(refused.value)
    assert "\n" not in message
    assert message.isprintable()
    return message


# Reading


@pytest.mark.parametrize("name", ["r.parquet", "r.csv"])
def test_rows_come_in_the_order_of_time_with_users_by_first_appearance_and_items_by_position(
    tmp_path: Path, name: str
) -> None:
    found = read(write(tmp_path / name, GOOD))
    assert found.times.tolist() == [10_000_000, 20_000_000, 20_000_000, 30_000_000, 40_000_000]
    assert found.users.tolist() == [0, 1, 1, 0, 2]
    assert found.items.tolist() == [1, 0, 2, 2, 1]
    assert found.labels.tolist() == [1, 0, 1, 1, 0]
    assert [a.dtype.name for a in (found.users, found.items, found.labels, found.times)] == [
        "int64", "int64", "float32", "int64",
    ]  # fmt: skip
    assert (len(found), found.n_users) == (5, 3)


rows = st.lists(
    st.tuples(
        st.text("uvwxyz01 ,é\"'", min_size=1, max_size=3).filter(str.strip),
        st.sampled_from(ITEMS),
        st.sampled_from([0.5, 1, 3.5, 4, 4.5]),
        st.integers(-(10**10), 10**10),
    ),
    min_size=2,
)


@settings(deadline=None, max_examples=50)
@given(rows=rows)
def test_parquet_and_csv_give_the_same(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[Any, ...]]) -> None:
    assume(len({row[0] for row in rows}) > 1 and len({row[2] >= 4 for row in rows}) > 1)
    columns = dict(zip(GOOD, map(list, zip(*rows, strict=True)), strict=True))
    folder = tmp_path_factory.mktemp("rows")
    found = read(write(folder / "r.parquet", columns))
    assert same(found, read(write(folder / "r.csv", columns)))
    by_time = sorted(rows, key=lambda row: row[3])
    assert [ITEMS[item] for item in found.items] == [row[1] for row in by_time]
    numbers = {user: number for number, user in enumerate(dict.fromkeys(row[0] for row in by_time))}
    assert found.users.tolist() == [numbers[row[0]] for row in by_time]


def test_what_is_read_can_be_written_to(tmp_path: Path) -> None:
    found = read(write(tmp_path / "r.csv", GOOD))
    assert all(a.flags.writeable for a in (found.users, found.items, found.labels, found.times))


def test_columns_have_the_names_that_the_settings_give_them(tmp_path: Path) -> None:
    renamed = dict(zip(["who", "what", "clicked", "at"], GOOD.values(), strict=True)) | {"note": ["x,\ny"] * 5}
    names = {"user_column": "who", "item_column": "what", "rating_column": "clicked", "timestamp_column": "at"}
    good = read(write(tmp_path / "good.csv", GOOD))
    assert same(read(write(tmp_path / "r.csv", renamed), **names), good)
    assert same(read(write(tmp_path / "r.parquet", renamed), **names), good)


def test_a_label_is_a_rating_with_threshold_1(tmp_path: Path) -> None:
    for number, labels in enumerate([[1, 0, 1, 0, 1], [True, False, True, False, True]]):
        path = write(tmp_path / f"{number}.parquet", GOOD | {"rating": labels})
        assert read(path, positive_rating=1).labels.tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.decimal128(5, 2), pa.string()])
def test_a_rating_that_equals_the_threshold_is_a_click_whatever_its_precision(
    tmp_path: Path, kind: pa.DataType
) -> None:
    texts = pa.array(["4.1", "4.0", "3.7", "3.6", "4.3"])
    ratings = texts if kind == pa.string() else pa.array([decimal.Decimal(t.as_py()) for t in texts])
    if pa.types.is_floating(kind):
        ratings = texts.cast(pa.float64()).cast(kind, safe=False)
    path = write(tmp_path / "r.parquet", GOOD | {"rating": ratings, "timestamp": [1, 2, 3, 4, 5]})
    assert read(path, positive_rating=4.1).labels.tolist() == [1, 0, 0, 0, 1]
    assert read(path, positive_rating=3.7).labels.tolist() == [1, 1, 1, 0, 1]


def test_a_folder_and_a_glob_are_all_their_files_and_rows_of_one_time_keep_their_order(tmp_path: Path) -> None:
    halves = [{name: values[part] for name, values in GOOD.items()} for part in (slice(0, 2), slice(2, 5))]
    # A folder named like a partition is no column, and empty files are no rows.
    for number, half in enumerate(halves):
        write(tmp_path / "in" / f"rating={number}" / "r.csv", half)
        write(tmp_path / "pq" / f"rating={number}" / "r.parquet", half)
    (tmp_path / "in" / "rating=1" / "s.csv").write_bytes(b"")
    write(tmp_path / "in" / "rating=1" / "t.csv", {name: [] for name in GOOD})
    write(tmp_path / "pq" / "rating=1" / "t.parquet", {name: [] for name in GOOD})
    whole = read(write(tmp_path / "whole.csv", GOOD))
    for uri in ("in", "in/*/*.csv", "pq", "pq/rating=?/*.parquet"):
        assert same(read(tmp_path / uri), whole), uri


def test_the_format_can_be_given_and_csv_may_be_compressed(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD)
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "r.txt").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert same(read(tmp_path / "r.csv.gz"), read(path))
    assert same(read(tmp_path / "r.txt", format="csv"), read(path))


def test_files_are_opened_through_the_storage(tmp_path: Path) -> None:
    write(tmp_path / "r.csv", GOOD)
    write(tmp_path / "r.parquet", GOOD)

    class Moved(Storage):
        """Stands for S3: the path inside the file system is not the uri."""

        def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
            return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), Path(uri).name

    for name in ("r.csv", "r.parquet"):
        uri = str(tmp_path / name)
        assert len(read_interactions(Moved(), InteractionSettings(uri=uri), ITEMS)) == 5


# Ids


@pytest.mark.parametrize("kind", [pa.int64(), pa.uint8(), pa.decimal128(38, 0), pa.string(), pa.large_string()])
def test_whole_numbers_and_text_are_the_same_id(tmp_path: Path, kind: pa.DataType) -> None:
    numbers = pa.array([3, 1, 2, 2, 3])
    texts = numbers.cast(pa.string())
    ids = (
        texts.cast(kind)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind)
        else numbers.cast(kind, safe=False)
    )
    for column in (ids, ids.dictionary_encode()):
        path = write(tmp_path / "r.parquet", GOOD | {"item_id": column, "user_id": column})
        assert read(path, ["1", "2", "3"]).items.tolist() == [1, 0, 2, 2, 1]


def test_ids_of_a_csv_file_are_text_even_where_they_look_like_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD | {"item_id": ["01", "1", "NA", "null", "1.0"]})
    found = read(path, ["1", "01", "1.0", "NA", "null"])
    assert found.items.tolist() == [3, 0, 2, 1, 4]


@pytest.mark.parametrize("name", ["user_id", "item_id"])
@pytest.mark.parametrize(
    ("values", "kind"),
    [([1.0, 2.0, 3.0, 1.0, 2.0], "double"), ([True] * 5, "bool"), ([b"a"] * 5, "binary"), ([["a"]] * 5, "list")],
)
def test_ids_that_could_be_written_in_several_ways_are_refused(
    tmp_path: Path, name: str, values: list[Any], kind: str
) -> None:
    path = write(tmp_path / "r.parquet", GOOD | {name: values})
    message = refusal(lambda: read(path))
    assert message.startswith(f"interactions.{name.removesuffix('_id')}_column: column {name!r} of {path} is {kind}")
    assert message.endswith("an id must be text or a whole number: convert the column")


def test_rows_of_unknown_items_are_left_out_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "r.csv", GOOD)
    with caplog.at_level(logging.WARNING):
        found = read(path, ["c", "b"], max_unknown_fraction=0.2)
    assert found.items.tolist() == [1, 0, 0, 1]
    assert found.times.tolist() == [10_000_000, 20_000_000, 30_000_000, 40_000_000]
    assert found.users.tolist() == [0, 1, 0, 2]
    assert [record.message for record in caplog.records] == [
        f"1 (20.00%) of the 5 rows at {path} name items that the catalogue lacks, for example 'a': left out"
    ]


def test_a_user_whose_only_rows_are_left_out_has_no_number(tmp_path: Path) -> None:
    columns = {name: [*values, values[0]] for name, values in GOOD.items()}
    columns["user_id"][-1], columns["item_id"][-1], columns["timestamp"][-1] = "first", "gone", 1
    found = read(write(tmp_path / "r.csv", columns), max_unknown_fraction=0.5)
    assert found.users.tolist() == [0, 1, 1, 0, 2]


def test_nothing_is_warned_of_where_every_item_is_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(write(tmp_path / "r.csv", GOOD))
    assert caplog.records == []


# Times

MOMENT = datetime.datetime(2020, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
SECONDS = int(MOMENT.timestamp())
EARLIER = [0, 40, 30, 20, 10]


def at(step: float) -> datetime.datetime:
    return MOMENT - datetime.timedelta(seconds=step)


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
@pytest.mark.parametrize(
    "written",
    [
        pytest.param([SECONDS - s for s in EARLIER], id="seconds"),
        pytest.param([(SECONDS - s) * 1000 for s in EARLIER], id="milliseconds"),
        pytest.param([(SECONDS - s) * 1_000_000 for s in EARLIER], id="microseconds"),
        pytest.param([(SECONDS - s) * 10**9 + 999 for s in EARLIER], id="nanoseconds"),
        pytest.param([str(SECONDS - s) for s in EARLIER], id="digits"),
        pytest.param([at(s).isoformat() for s in EARLIER], id="offset"),
        pytest.param([at(s).strftime("%Y-%m-%dT%H:%M:%SZ") for s in EARLIER], id="Z"),
        pytest.param([at(s).strftime(" %Y-%m-%d %H:%M:%S.000000999") for s in EARLIER], id="no zone"),
        pytest.param([at(s).astimezone(datetime.timezone(datetime.timedelta(hours=5))) for s in EARLIER], id="zone"),
        pytest.param([at(s).replace(tzinfo=None) for s in EARLIER], id="naive"),
    ],
)
def test_every_way_to_write_a_moment_is_the_same_moment(tmp_path: Path, name: str, written: list[Any]) -> None:
    found = read(write(tmp_path / name, GOOD | {"timestamp": written}))
    assert found.times.tolist() == [(SECONDS - s) * 1_000_000 for s in sorted(EARLIER, reverse=True)]


@pytest.mark.parametrize(
    "kind", [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("ns"), pa.timestamp("us", "Asia/Tokyo")]
)
def test_timestamps_of_every_unit_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    written = pa.array([at(s) for s in EARLIER]).cast(pa.timestamp("us", "UTC")).cast(kind)
    found = read(write(tmp_path / "r.parquet", GOOD | {"timestamp": written}))
    assert found.times.tolist() == [(SECONDS - s) * 1_000_000 for s in sorted(EARLIER, reverse=True)]


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_days_are_their_midnights(tmp_path: Path, name: str) -> None:
    days = [datetime.date(1970, 1, day) for day in (5, 4, 3, 2, 1)]
    found = read(write(tmp_path / name, GOOD | {"timestamp": days}))
    assert found.times.tolist() == [day * 86_400_000_000 for day in range(5)]


def test_counts_that_pass_a_limit_between_units_do_not_run_backwards(tmp_path: Path) -> None:
    written = [10**11 - 2, 10**11 - 1, 10**11, 10**11 + 1, 10**11 + 2]
    found = read(write(tmp_path / "r.parquet", GOOD | {"timestamp": written}))
    assert found.items.tolist() == [2, 0, 1, 1, 2]


# Refusals


def test_no_uri() -> None:
    message = refusal(lambda: read_interactions(Storage(), InteractionSettings(), ITEMS))
    assert message.startswith("interactions.uri is not set; name Parquet or CSV files")


@pytest.mark.parametrize("uri", ["none.csv", "no/folder", "*.parquet", "empty"])
def test_no_such_file(tmp_path: Path, uri: str) -> None:
    (tmp_path / "empty").mkdir()
    message = refusal(lambda: read(tmp_path / uri))
    assert message == f"interactions.uri: nothing at {tmp_path / uri}; name a file, a folder or a glob"


def test_a_format_that_cannot_be_told(tmp_path: Path) -> None:
    for names in (["r.txt"], ["r.csv", "s.parquet"], ["r.jsonl"]):
        folder = tmp_path / names[0]
        for name in names:
            write(folder / name, GOOD)
        message = refusal(lambda folder=folder: read(folder))
        assert message == f"cannot tell the format of {folder / names[0]}; set interactions.format to parquet or csv"


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
@pytest.mark.parametrize(
    ("column", "setting"),
    [
        ("user_id", "user_column"),
        ("item_id", "item_column"),
        ("rating", "rating_column"),
        ("timestamp", "timestamp_column"),
    ],
)
def test_a_missing_column(tmp_path: Path, name: str, column: str, setting: str) -> None:
    rest = {key: values for key, values in GOOD.items() if key != column}
    path = write(tmp_path / name, rest)
    assert refusal(lambda: read(path)) == (
        f"interactions.{setting} names column {column!r}, which {path} does not have (it has: {', '.join(rest)})"
    )


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("user_id,item_id,rating,timestamp,rating\nu,a,1,2,3\n")
    assert "names column 'rating', which" in (message := refusal(lambda: read(path)))
    assert message.endswith("has more than once")


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
@pytest.mark.parametrize(
    ("column", "setting", "problem"),
    [
        ("user_id", "user_column", "no user"),
        ("item_id", "item_column", "no item"),
        ("rating", "rating_column", "no rating (null or NaN)"),
        ("timestamp", "timestamp_column", "no timestamp"),
    ],
)
def test_nulls(tmp_path: Path, name: str, column: str, setting: str, problem: str) -> None:
    for count, values in ((2, [*GOOD[column][:2], None, None, GOOD[column][4]]), (5, [None] * 5)):
        path = write(tmp_path / name, GOOD | {column: values})
        assert refusal(lambda path=path: read(path)) == (
            f"interactions.{setting}: column {column!r} of {path} has {problem} in {count} of 5 rows, "
            f"first in row {6 - count if count == 5 else 3}; remove them"
        )


@pytest.mark.parametrize("column", ["user", "item"])
@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_blank_ids_are_no_ids(tmp_path: Path, name: str, column: str) -> None:
    path = write(tmp_path / name, GOOD | {f"{column}_id": ["a", "b", "c", "a", " \t"]})
    assert f"has no {column} in 1 of 5 rows, first in row 5; remove them" in refusal(lambda: read(path))


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_nan_ratings(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOOD | {"rating": [1.0, float("nan"), 4.0, float("nan"), 5.0]})
    assert "has no rating (null or NaN) in 2 of 5 rows, first in row 2; remove them" in refusal(lambda: read(path))


def test_null_and_nan_ratings_are_counted_together(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", GOOD | {"rating": [1.0, None, 4.0, float("nan"), 5.0]})
    assert "has no rating (null or NaN) in 2 of 5 rows, first in row 2" in refusal(lambda: read(path))


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_ratings(tmp_path: Path, name: str, value: float) -> None:
    path = write(tmp_path / name, GOOD | {"rating": [1.0, 4.0, 5.0, value, 5.0]})
    assert refusal(lambda: read(path)) == (
        f"interactions.rating_column: column 'rating' of {path} has an infinite rating in 1 of 5 rows, "
        "first in row 4; remove them"
    )


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_ratings_that_are_no_numbers(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, GOOD | {"rating": ["1", "4", "five\nstars", "bad", "5"]})
    assert refusal(lambda: read(path)) == (
        f"interactions.rating_column: column 'rating' of {path} has 'five\\nstars' in row 3, which is not a number "
        "written like '1' in row 1"
    )
    path = write(tmp_path / name, GOOD | {"rating": ["good", "4", "3", "2", "5"]})
    assert refusal(lambda: read(path)).endswith("has 'good' in row 1, which is not a number")


def test_a_rating_column_of_another_type(tmp_path: Path) -> None:
    path = write(tmp_path / "r.parquet", GOOD | {"rating": [datetime.date(2020, 1, 1)] * 5})
    assert refusal(lambda: read(path)).endswith("is date32[day]; a rating must be a number: convert the column")


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["yesterday", "1", "2", "3", "4"], "'yesterday' in row 1, which is not a time (whole seconds since 1970,"),
        (["1", "2", "soon", "3", "4"], "'soon' in row 3, which is not a time"),
        (["2020-01-01", "2020-01-02", "2020-02-30", "3", "4"], "'2020-02-30' in row 3, which is not a time"),
        (["2020-01-01", "2020-01-02T03:04:05Z", "2", "3", "4"], "written like '2020-01-01' in row 1"),
        (["1.5", "2", "3", "4", "5"], "'1.5' in row 1, which is not a time"),
    ],
)
def test_text_that_is_no_time(tmp_path: Path, name: str, values: list[str], problem: str) -> None:
    path = write(tmp_path / name, GOOD | {"timestamp": values})
    message = refusal(lambda: read(path))
    assert message.startswith(f"interactions.timestamp_column: column 'timestamp' of {path} has ")
    assert problem in message


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (pa.array([1.5, 2, 3, 4, 5]), "is double, not a time (whole seconds since 1970, a timestamp or an ISO date)"),
        (pa.array([datetime.time(1)] * 5), "is time64[us], not a time"),
        (pa.array([True] * 5), "is bool, not a time"),
        (pa.array([2**63] * 5, pa.uint64()), "holds a time out of range: Integer value 9223372036854775808"),
        (pa.array([2**62] * 5, pa.timestamp("ms")), "holds a time out of range: Casting from timestamp[ms]"),
    ],
)
def test_a_timestamp_column_of_another_type(tmp_path: Path, values: pa.Array, problem: str) -> None:
    path = write(tmp_path / "r.parquet", GOOD | {"timestamp": values})
    assert problem in refusal(lambda: read(path))


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_no_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, {column: [] for column in GOOD})
    assert refusal(lambda: read(path)) == (
        f"the interactions at {path} are empty: no file has a row; at least one is needed"
    )


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_no_bytes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert "are empty" in refusal(lambda: read(tmp_path / name))


def test_clicks_only_and_no_clicks(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD)
    assert refusal(lambda: read(path, positive_rating=0.5)) == (
        f"all 5 interactions at {path} are clicks: no rating is below interactions.positive_rating 0.5; raise it"
    )
    assert refusal(lambda: read(path, positive_rating=6)) == (
        f"none of the 5 interactions at {path} is a click: no rating reaches interactions.positive_rating 6; lower it"
    )


def test_one_user_only(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD | {"user_id": ["u"] * 5})
    assert refusal(lambda: read(path)) == (
        f"all 5 interactions at {path} are of one user, and at least 2 are needed; "
        "does interactions.user_column 'user_id' name the users?"
    )


def test_too_many_unknown_items(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD)
    assert refusal(lambda: read(path, ["b"])) == (
        f"3 (60.00%) of the 5 rows at {path} name items that the catalogue lacks, for example 'c'; "
        "at most 10.00% may: mend the ids, or raise interactions.max_unknown_fraction to leave these rows out"
    )
    assert refusal(lambda: read(path, ["1"], max_unknown_fraction=1)) == (
        f"all of the 5 rows at {path} name items that the catalogue lacks, for example 'c'; "
        "is interactions.item_column 'item_id' the catalogue's id?"
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("user_id,item_id,rating,timestamp\nu,caf\xe9,1,2\n".encode("latin-1"), id="latin-1 value"),
        pytest.param("us\xe9r,item_id\nu,a\n".encode("latin-1"), id="latin-1 header"),
        pytest.param("user_id,item_id,rating,timestamp\nu,a,1,2\n".encode("utf-16"), id="utf-16"),
        pytest.param(b"user_id,item_id,rating,timestamp\nu,a,1,2\nu,a,1\n", id="too few fields"),
        pytest.param(b'user_id,item_id,rating,timestamp\n"u,a,1,2\nv,a,1,3\n', id="open quote"),
        pytest.param(b"user_id,item_id,rating,timestamp", id="header cut off"),
        pytest.param(b'"' + b"x" * 200_000, id="huge header"),
    ],
)
def test_a_csv_file_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.csv"
    path.write_bytes(content)
    assert refusal(lambda: read(path)).startswith(f"{path} is no readable CSV file in UTF-8: ")


def test_gzip_that_is_none_or_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "r.csv.gz"
    plain = write(tmp_path / "r.csv", GOOD).read_bytes()
    for content in (plain, gzip.compress(plain)[:-10]):
        path.write_bytes(content)
        assert refusal(lambda: read(path)).startswith(f"{path} is no whole gzip file: ")


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    path.write_bytes(b"user_id,item_id\nu,a\n")
    assert refusal(lambda: read(path)).startswith(f"{path} is no readable Parquet file: ")


def test_what_a_retry_may_cure_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", GOOD)

    class Down(Storage):
        def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
            raise OSError(f"no connection for {uri}")

    with pytest.raises(OSError, match="no connection"):
        read_interactions(Down(), InteractionSettings(uri=str(path)), ITEMS)


# The object


def make(rows: list[tuple[int, int, int, int]]) -> Interactions:
    """From (user, item, label, time) in any order."""
    ordered = sorted(rows, key=lambda row: row[3])
    users, items, labels, times = (np.array([row[i] for row in ordered], np.int64) for i in range(4))
    return Interactions(users, items, labels.astype(np.float32), times)


drawn = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1), st.integers(-4, 12)), max_size=40
).map(make)


def test_rows_that_run_backwards_are_a_mistake_of_the_caller() -> None:
    good = make([(0, 0, 1, 1), (1, 1, 0, 2)])
    with pytest.raises(ValueError, match="sorted by time"):
        replace(good, times=good.times[::-1])


@given(drawn, st.integers(0, 40), st.integers(0, 40))
def test_taken_rows_are_the_rows_and_keep_the_numbers_of_users(found: Interactions, start: int, stop: int) -> None:
    taken = found.take(slice(start, stop))
    assert len(taken) == len(found.users[start:stop])
    for name in ("users", "items", "labels", "times"):
        assert np.array_equal(getattr(taken, name), getattr(found, name)[start:stop])
    assert taken.n_users == max(taken.users.tolist(), default=-1) + 1


# Split


def tries(found: Interactions, **shares: float) -> Split | str:
    try:
        return split_by_time(found, **shares)
    except UserError as error:
        return str(error)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.just(0), st.just(0), st.integers(0, 1), st.integers(0, 60)), min_size=1, max_size=80).map(
        make
    ),
    st.sampled_from([(0.8, 0.1), (0.5, 0.25), (0.34, 0.33), (0.1, 0.1)]),
)
def test_a_split_covers_all_rows_in_three_parts_of_which_each_is_strictly_later(
    found: Interactions, shares: tuple[float, float]
) -> None:
    split = tries(found, train=shares[0], validation=shares[1])
    n, times = len(found), found.times.tolist()
    # By definition: a part starts at the first row of the moment that the share falls on.
    firsts = [round(n * share) for share in (shares[0], sum(shares))]
    first, second = (times.index(times[row]) if row < n else n for row in firsts)
    parts = {"train": (0, first), "validation": (first, second), "test": (second, n)}
    bad = [name for name, (a, b) in parts.items() if len(set(found.labels[a:b].tolist())) < 2]
    if bad:
        assert f" leaves {bad[0]} with " in str(split)
        return
    assert isinstance(split, Split)
    assert {name: (rows.start, rows.stop) for name, rows in vars(split).items()} == parts
    assert times[first - 1] < times[first] <= times[second - 1] < times[second]


def test_without_ties_the_shares_are_met() -> None:
    found = make([(0, 0, row % 2, row) for row in range(100)])
    assert split_by_time(found) == Split(slice(0, 80), slice(80, 90), slice(90, 100))
    assert split_by_time(found, train=0.7, validation=0.1).validation == slice(70, 80)


def test_rows_of_one_moment_go_to_the_later_part() -> None:
    moments = [*range(75), *[75] * 10, *range(85, 100)]
    found = make([(0, 0, row % 2, moment) for row, moment in enumerate(moments)])
    assert split_by_time(found) == Split(slice(0, 75), slice(75, 90), slice(90, 100))


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ([5] * 10, "train"),
        ([*range(50), *[50] * 50], "validation"),
        ([], "train"),
    ],
)
def test_a_part_without_rows_is_named(times: list[int], name: str) -> None:
    found = make([(0, 0, row % 2, moment) for row, moment in enumerate(times)])
    message = refusal(lambda: split_by_time(found))
    assert message == (
        f"the split of {len(found)} interactions by time leaves {name} with 0 rows, and 1 of each label is the least; "
        "give more interactions, or finer timestamps if many rows share one"
    )


@pytest.mark.parametrize(("start", "name"), [(0, "train"), (80, "validation"), (90, "test")])
@pytest.mark.parametrize(("label", "kind"), [(1, "clicks only"), (0, "rows without a click only")])
def test_a_part_of_one_kind_is_named(start: int, name: str, label: int, kind: str) -> None:
    stop = {0: 80, 80: 90, 90: 100}[start]
    found = make([(0, 0, label if start <= row < stop else row % 2, row) for row in range(100)])
    message = refusal(lambda: split_by_time(found))
    assert f"leaves {name} with {kind} ({stop - start} rows); give more interactions, or set" in message
    assert "interactions.positive_rating" in message


@pytest.mark.parametrize(
    ("train", "validation"), [(0, 0.1), (0.8, 0), (0.8, 0.2), (1.5, 0.1), (0.8, -0.1), (float("nan"), 0.1)]
)
def test_shares_that_are_none(train: float, validation: float) -> None:
    found = make([(0, 0, row % 2, row) for row in range(100)])
    message = refusal(lambda: split_by_time(found, train=train, validation=validation))
    assert message.startswith(f"train {train:g} and validation {validation:g} are no shares of a split")


@settings(deadline=None)
@given(drawn, st.integers(3, 4), st.integers(0, 3))
def test_folds_part_users_and_lose_no_row(found: Interactions, folds: int, fold: int) -> None:
    assume(fold < folds)
    try:
        order, split = split_by_user(found, folds=folds, fold=fold)
    except UserError as error:
        assert "set train.layers" in str(error)  # noqa: PT017 - most draws have too few users
        return
    parts = [order[rows] for rows in vars(split).values()]
    assert sorted(order.tolist()) == list(range(len(found)))
    assert all((np.diff(part) > 0).all() for part in parts)  # each in the order of time
    users = [set(found.users[part].tolist()) for part in parts]
    assert not users[0] & users[1] | users[0] & users[2] | users[1] & users[2]
    assert all(set(found.labels[part].tolist()) == {0, 1} for part in parts)


def test_every_user_is_held_out_once() -> None:
    found = make([(user, 1, label, 10 * user + label) for user in range(23) for label in (0, 1)])
    tests, validations = [], []
    for fold in range(5):
        order, split = split_by_user(found, folds=5, fold=fold)
        tests.append(set(found.users[order[split.test]].tolist()))
        validations.append(set(found.users[order[split.validation]].tolist()))
    assert sorted(user for users in tests for user in users) == list(range(23))
    assert validations == [*tests[1:], tests[0]]
    assert {len(users) for users in tests} == {4, 5}


@pytest.mark.parametrize("users", [1, 4])
def test_fewer_users_than_folds_are_refused(users: int) -> None:
    found = make([(user, 1, label, 10 * user + label) for user in range(users) for label in (0, 1)])
    assert f"of {users} users, dealt into 5 groups" in refusal(lambda: split_by_user(found, folds=5, fold=0))


# Histories


def naive_histories(found: Interactions, length: int, label: int) -> list[list[int]]:
    """As the definition reads."""
    rows = list(zip(found.users, found.items, found.labels, found.times, strict=True))
    result = []
    for user, _, _, moment in rows:
        earlier = [int(i) for u, i, clicked, t in rows if u == user and clicked == label and t < moment]
        newest = earlier[::-1][:length]
        result.append(newest + [-1] * (length - len(newest)))
    return result


@settings(deadline=None, max_examples=300)
@given(drawn, st.integers(1, 8), st.integers(0, 1))
def test_a_history_is_what_its_definition_says(found: Interactions, length: int, label: int) -> None:
    result = histories(found, length=length, label=label)
    assert (result.shape, result.dtype) == ((len(found), length), np.int64)
    assert result.tolist() == naive_histories(found, length, label)


def test_a_history_is_newest_first_and_knows_nothing_of_its_own_moment() -> None:
    found = make([(0, 7, 1, 10), (0, 8, 1, 20), (0, 9, 1, 20), (0, 5, 0, 25), (1, 6, 1, 26), (0, 4, 1, 30)])
    assert histories(found, length=3, label=1).tolist() == [
        [-1, -1, -1],
        [7, -1, -1],
        [7, -1, -1],
        [9, 8, 7],
        [-1, -1, -1],
        [9, 8, 7],
    ]
    assert histories(found, length=1, label=0).tolist() == [[-1], [-1], [-1], [-1], [-1], [5]]


@given(drawn, st.integers(0, 40))
def test_no_later_row_changes_a_history(found: Interactions, rows: int) -> None:
    whole = histories(found, length=4, label=1)[:rows]
    assert np.array_equal(whole, histories(found.take(slice(0, rows)), length=4, label=1))


def test_users_and_times_of_any_size_are_told_apart() -> None:
    big = 2**62
    found = make([(big // 2**32, 1, 1, -big), (big // 2**32 - 1, 2, 1, 0), (big // 2**32, 3, 1, big)])
    assert histories(found, length=2, label=1).tolist() == [[-1, -1], [-1, -1], [1, -1]]


def test_a_hundred_thousand_histories_take_less_than_a_second() -> None:
    random, n = np.random.default_rng(0), 100_000
    found = Interactions(
        users=random.integers(0, 500, n),
        items=random.integers(0, 9000, n),
        labels=random.integers(0, 2, n).astype(np.float32),
        times=np.sort(random.integers(0, 10**15, n)),
    )
    started = time.perf_counter()
    histories(found, length=10, label=1)
    assert time.perf_counter() - started < 1


@given(drawn, st.integers(0, 40), st.integers(0, 40))
def test_counts_are_those_of_the_rows(found: Interactions, start: int, stop: int) -> None:
    counts = training_counts(found, slice(start, stop), 9)
    assert counts.dtype == np.int64
    assert counts.tolist() == [found.items[start:stop].tolist().count(item) for item in range(9)]


# Settings


def test_the_uri_follows_the_root_and_the_file(tmp_path: Path) -> None:
    def loaded(line: str) -> InteractionSettings:
        path = tmp_path / "marc.yaml"
        path.write_text(f'catalogue: {{uri: "x.csv", template: "{{t}}"}}\n{line}\n')
        return load_settings(path).interactions

    assert loaded("") == InteractionSettings()
    assert loaded("").uri is None
    assert loaded("interactions: {uri: in/*.csv, history: 3}") == InteractionSettings(
        uri=f"{tmp_path}/in/*.csv", history=3
    )
    assert loaded("interactions: {uri: '{root}/r.csv'}").uri == f"{tmp_path}/data/r.csv"
    assert loaded("root: s3://b/p/\ninteractions: {uri: '{root}/r'}").uri == "s3://b/p/r"
    for line, message in {
        "interactions: {history: 0}": "interactions.history: Input should be greater than or equal to 1 (got 0)",
        "interactions: {max_unknown_fraction: 2}": "interactions.max_unknown_fraction: Input should be less than",
        "interactions: {positive_rating: .nan}": "interactions.positive_rating: Input should be a finite number",
        "interactions: {format: jsonl}": "interactions.format: Input should be 'auto', 'parquet' or 'csv'",
        "interactions: {user: x}": "unknown key interactions.user",
    }.items():
        assert message in refusal(lambda line=line: loaded(line))


# The real data


@pytest.fixture(scope="module")
def movielens() -> Interactions:
    """100,836 real ratings of 9,742 films."""
    if not (MOVIELENS / "ratings.csv").is_file():
        pytest.skip("the real ratings shared/data/ml-latest-small are not beside this checkout")
    with (MOVIELENS / "movies.csv").open(encoding="utf-8", newline="") as file:
        films = [row["movieId"] for row in csv.DictReader(file)]
    return read(MOVIELENS / "ratings.csv", films, user_column="userId", item_column="movieId")


def test_real_ratings_are_read_whole(movielens: Interactions) -> None:
    with (MOVIELENS / "ratings.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert (len(movielens), movielens.n_users) == (100_836, 610) == (len(lines), len({x["userId"] for x in lines}))
    assert int(movielens.labels.sum()) == sum(float(line["rating"]) >= 4 for line in lines)
    assert movielens.times.tolist() == sorted(int(line["timestamp"]) * 1_000_000 for line in lines)
    counts = training_counts(movielens, slice(None), 9742)
    assert counts.sum() == 100_836
    # Toy Story is the first film.
    assert counts[0] == sum(line["movieId"] == "1" for line in lines)


def test_real_ratings_split_80_10_10(movielens: Interactions) -> None:
    split = split_by_time(movielens)
    sizes = [len(movielens.take(rows)) for rows in (split.train, split.validation, split.test)]
    assert sum(sizes) == 100_836
    assert np.allclose(np.array(sizes) / 100_836, [0.8, 0.1, 0.1], atol=0.001)


def test_histories_of_real_ratings_are_what_the_definition_says(movielens: Interactions) -> None:
    result = histories(movielens, length=10, label=1)
    for row in range(0, 100_836, 997):
        user, moment = movielens.users[row], movielens.times[row]
        mine = (movielens.users == user) & (movielens.labels == 1) & (movielens.times < moment)
        wanted = movielens.items[mine][::-1][:10].tolist()
        assert result[row].tolist() == wanted + [-1] * (10 - len(wanted))


def test_user_texts_are_read_each_once_and_blanks_say_nothing(tmp_path: Path) -> None:
    about = ["likes trains", " ", "likes trains", None, "new here"]
    path = write(tmp_path / "ratings.parquet", {**GOOD, "about": about})
    found = read(path, user_text_column="about")
    assert sorted(found.profile_texts) == ["likes trains", "new here"]
    assert found.profiles is not None
    assert [found.profile_texts[place] if place >= 0 else None for place in found.profiles] == [
        "likes trains", None, "new here", "likes trains", None,
    ]  # fmt: skip
    with pytest.raises(UserError, match="user_text_column"):
        read(path, user_text_column="profile")

"""Rows that are kept: a window of days, a sample of whole users, in one process or in Spark, with bounded memory."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage
from marc_pipeline.training import interaction_files
from marc_pipeline.training.interaction_files import find_interactions
from marc_pipeline.training.interaction_rows import ROWS, InteractionSource, _fitting, read_rows
from marc_pipeline.training.interaction_tasks import read_rows_in_spark
from rating_files import GOOD, read, refusal, write

STORAGE = Storage()
DAY, START, ROWS_PER_FILE, FILES = 86_400, 1_500_000_000, 3000, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of purchases of 200 users on 90 days, and one row of a user who bought once, on the last day."""
    folder, rng = tmp_path_factory.mktemp("purchases"), np.random.default_rng(0)
    for number in range(FILES):
        users = (rng.random(ROWS_PER_FILE) ** 2 * 200).astype(int)
        days = np.sort(rng.integers(30 * number, 30 * number + 30, ROWS_PER_FILE))
        columns = {
            "user_id": [f"user {user}" for user in users],
            "item_id": rng.integers(0, 1000, ROWS_PER_FILE),
            "timestamp": START + days * DAY,
            "about": [f"likes {user % 7}" if user % 5 else " " for user in users],
        }
        pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


def source(folder: Path, **keys: Any) -> InteractionSource:
    settings = InteractionSettings(uri=str(folder), **keys)
    return InteractionSource(find_interactions(STORAGE, settings), settings, STORAGE)


def plain(table: pa.Table) -> list[dict[str, Any]]:
    return [{**row} for row in table.to_pylist()]


def everything(folder: Path) -> list[dict[str, Any]]:
    return pa.concat_tables(pq.read_table(folder / f"{number}.parquet") for number in range(FILES)).to_pylist()


@pytest.mark.parametrize("days", [1, 7, 45, 1000])
def test_a_window_keeps_the_days_before_the_latest_row(folder: Path, days: int) -> None:
    raw = everything(folder)
    since = max(row["timestamp"] for row in raw) - days * DAY
    expected = [row["timestamp"] * 1_000_000 for row in raw if row["timestamp"] >= since]
    assert read_rows(source(folder, days=days))["time"].to_pylist() == expected


@pytest.mark.parametrize("keys", [{}, {"days": 30}])
@pytest.mark.parametrize("limit", [100, 1000, 2500])
def test_above_the_cap_whole_users_are_kept_the_same_ones_every_time(
    folder: Path, limit: int, keys: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    every = read_rows(source(folder, **keys))
    with caplog.at_level(logging.INFO):
        found = read_rows(source(folder, max_rows=limit, **keys))
    kept = set(found["user"].to_pylist())
    assert plain(found) == [row for row in plain(every) if row["user"] in kept]
    assert 0.8 * limit < found.num_rows <= limit
    assert f"{found.num_rows:,} of {every.num_rows:,} rows are kept, all rows of a sample of users" in caplog.text
    assert read_rows(source(folder, max_rows=limit, **keys)).equals(found)
    larger = set(read_rows(source(folder, max_rows=2 * limit, **keys))["user"].to_pylist())
    assert len(kept & larger) > 0.8 * len(kept)


def test_a_cap_of_all_rows_keeps_all_and_a_window_may_make_the_sample_unnecessary(folder: Path) -> None:
    assert read_rows(source(folder, max_rows=FILES * ROWS_PER_FILE)).num_rows == FILES * ROWS_PER_FILE
    windowed = read_rows(source(folder, days=20))
    assert read_rows(source(folder, days=20, max_rows=windowed.num_rows)).equals(windowed)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.integers(1, 100))
def test_groups_are_taken_in_order_as_long_as_they_fit(counts: list[int], limit: int) -> None:
    groups, kept = _fitting(np.array(counts), limit)
    if groups is None:
        assert kept == sum(counts) <= limit
        return
    assert kept == sum(np.array(counts)[groups]) <= limit < sum(counts)
    for place, taken in enumerate(groups):
        before = sum(count for count, kept_too in zip(counts[:place], groups, strict=False) if kept_too)
        assert taken == (before + counts[place] <= limit)


def test_a_cap_below_every_user_is_refused(tmp_path: Path) -> None:
    users = ["u", "v"] * 10
    path = write(tmp_path / "p.csv", {"user_id": users, "item_id": list("ab" * 10), "timestamp": range(1, 21)})
    message = refusal(lambda: read_rows(source(path, max_rows=5)))
    assert message == "interactions.max_rows 5 is less than the rows of one group of users; raise it"


# Batches


def test_batches_do_not_change_rows_or_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 2000
    columns = {
        "user_id": [f"u{row % 37}" for row in range(rows)],
        "item_id": ["abc"[row % 3] for row in range(rows)],
        "rating": [row % 5 + 1 for row in range(rows)],
        "timestamp": [START + row for row in range(rows)],
    }
    for name in ("r.csv", "r.parquet"):
        path = write(tmp_path / name, columns)
        with monkeypatch.context() as small:
            whole = read_rows(source(path))
            bad = write(tmp_path / f"bad {name}", columns | {"user_id": ["u"] * 1500 + [""] + ["v"] * 499})
            small.setattr(interaction_files, "BATCH_ROWS", 100)
            small.setattr(interaction_files, "BATCH_BYTES", 3000)
            assert plain(read_rows(source(path))) == plain(whole)
            assert "has no user in 1 of the first 1," in (message := refusal(lambda bad=bad: read(bad)))
            assert "first in row 1,501; remove them" in message


MEMORY = """
import re, sys
from pathlib import Path
from marc_pipeline.config import InteractionSettings
from marc_pipeline.storage import Storage
from marc_pipeline.training.interaction_files import find_interactions
from marc_pipeline.training.interaction_rows import InteractionSource, read_rows
settings = InteractionSettings(uri=sys.argv[1], max_rows=20_000)
rows = read_rows(InteractionSource(find_interactions(Storage(), settings), settings, Storage()))
# The maximum of getrusage would include the memory of the process that started this one.
print(rows.num_rows, int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
"""


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, form: str) -> None:
    """Eight times the rows, in one row group: only Arrow's buffer is larger. All rows would take over 300 MiB more."""
    peaks = {}
    for rows in (500_000, 4_000_000):
        rng = np.random.default_rng(0)
        users = pa.array(rng.integers(10**12, 10**12 + 10**6, rows)).cast(pa.string())
        table = pa.table(
            {"user_id": users, "item_id": rng.integers(0, 1000, rows), "timestamp": np.arange(rows) + START}
        )
        path = tmp_path / f"{rows}.{form}"
        if form == "csv":
            pacsv.write_csv(table, path)
        else:
            pq.write_table(table, path, row_group_size=rows)
        done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        kept, peaks[rows] = map(int, done.stdout.split())
        assert 19_000 < kept <= 20_000
    assert peaks[4_000_000] < peaks[500_000] + 100, f"peaks in MiB by rows: {peaks}"


# Spark


@pytest.mark.spark
@pytest.mark.parametrize("keys", [{}, {"days": 30, "max_rows": 1000}, {"user_text_column": "about"}])
def test_spark_reads_the_same_rows(folder: Path, spark: Any, tmp_path: Path, keys: dict[str, Any]) -> None:
    here = source(folder, **keys)
    found, selection = read_rows_in_spark(spark, source(folder, **keys), folder=str(tmp_path / "rows"))
    assert plain(found) == plain(read_rows(here))
    assert found.schema == ROWS
    assert selection.feedback == here.selection.feedback
    assert not (tmp_path / "rows").exists(), "parts are deleted"


@pytest.mark.spark
def test_spark_reports_the_users_errors_as_they_are(spark: Any, tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.csv", GOOD)
    bad = write(tmp_path / "in" / "b.csv", GOOD | {"item_id": ["a", "", "b", "b", "a"]})
    with pytest.raises(UserError) as refused:
        read_rows_in_spark(spark, source(tmp_path / "in"), folder=str(tmp_path / "rows"))
    assert str(refused.value) == (
        f"interactions.item_column: column 'item_id' of {bad} has no item in 1 of the first 5 rows, first in row 2; "
        "remove them"
    )

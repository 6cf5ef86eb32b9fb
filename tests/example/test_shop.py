"""The example data: deterministic, messy in known ways, and with ratings that the items' content explains."""

import csv
import hashlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from marc_pipeline.errors import UserError
from marc_pipeline.example.ratings import INTERACTIONS_DAYS, INTERACTIONS_END, write_interactions
from marc_pipeline.example.shop import MESSY_ROWS, read_good_items, write_catalogue

DAY, NEXT_DAY, THIRD_DAY = "2026-11-20", "2026-11-21", "2026-11-24"
TEXT = ("title", "brand", "category", "description")
Row = dict[str, str]
Days = tuple[Path, Path, Path]


def read_rows(path: Path) -> list[Row]:
    """Every row of a file; bytes that are no UTF-8 become U+FFFD."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.DictReader(file))


def sort_out(rows: list[Row]) -> tuple[dict[str, Row], Counter[str]]:
    """Good rows by id and the number of bad ones by reason, told apart by what the reasons mean."""
    good: dict[str, Row] = {}
    bad: Counter[str] = Counter()
    for row in rows:
        if not row["item_id"].strip():
            bad["null_id"] += 1
        elif "\ufffd" in "".join(row.values()):
            bad["undecodable"] += 1
        elif not any(row[column].strip() for column in TEXT):
            bad["empty_text"] += 1
        elif row["item_id"] in good:
            bad["older_duplicate"] += 1
            good[row["item_id"]] = max(row, good[row["item_id"]], key=lambda r: r["updated_at"])
        else:
            good[row["item_id"]] = row
    return good, bad


def rendered(row: Row) -> str:
    return ". ".join(row[column] for column in TEXT)


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    """Three days' files of one folder, the last after a gap."""
    folder = tmp_path_factory.mktemp("catalogue")
    first, second, third = (write_catalogue(folder, ds=ds) for ds in (DAY, NEXT_DAY, THIRD_DAY))
    return first, second, third


@pytest.fixture(scope="module")
def good(days: Days) -> dict[str, Row]:
    """Good rows of the first day by id."""
    return sort_out(read_rows(days[0]))[0]


@pytest.fixture(scope="module")
def ratings(days: Days, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    path = tmp_path_factory.mktemp("interactions") / "interactions.parquet"
    return pq.read_table(write_interactions(path, days[0]))


def test_5000_items_take_less_than_two_seconds(tmp_path: Path) -> None:
    started = time.process_time()
    write_catalogue(tmp_path, ds=DAY)
    assert time.process_time() - started < 2


def test_the_same_arguments_give_the_same_bytes(days: Days, tmp_path: Path) -> None:
    again = [write_catalogue(tmp_path, ds=ds) for ds in (DAY, NEXT_DAY, THIRD_DAY)]
    assert [path.name for path in again] == [f"{ds}.csv" for ds in (DAY, NEXT_DAY, THIRD_DAY)]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in days]


def test_a_catalogue_keeps_its_bytes_from_version_to_version(tmp_path: Path) -> None:
    digests = [
        hashlib.sha256(write_catalogue(tmp_path, ds=ds, items=50).read_bytes()).hexdigest() for ds in (DAY, NEXT_DAY)
    ]
    assert digests == [
        "2a32ae6ba0e200030c3b799b50b1780c7ef4585012708958f39b72ed7700265a",
        "5019b1ce5862c438548bc2420f4578dfcecf4a714e97fc4e5ea01eda463adeb9",
    ]


def test_another_seed_gives_another_catalogue(tmp_path: Path) -> None:
    one = write_catalogue(tmp_path / "1", ds=DAY, items=50, seed=1)
    two = write_catalogue(tmp_path / "2", ds=DAY, items=50, seed=2)
    assert one.read_bytes() != two.read_bytes()


def test_an_existing_day_is_kept_and_a_new_one_is_the_only_file_of_its_folder(tmp_path: Path) -> None:
    path = write_catalogue(tmp_path / "new", ds=DAY, items=50)
    assert list((tmp_path / "new").iterdir()) == [path] == [tmp_path / "new" / f"{DAY}.csv"]
    path.write_bytes(b"mine\n")
    assert write_catalogue(tmp_path / "new", ds=DAY, items=50) == path
    assert path.read_bytes() == b"mine\n"


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, rows: Sequence[Any]) -> None:
        path.write_text("half a fi")
        raise OSError("disk full")

    monkeypatch.setattr("marc_pipeline.example.shop._write_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        write_catalogue(tmp_path, ds=DAY, items=50)
    assert list(tmp_path.iterdir()) == []


def test_every_day_holds_the_promised_messy_rows(days: Days) -> None:
    for path, expected in zip(days, (5000, 4990, 4980), strict=True):
        rows = read_rows(path)
        good, bad = sort_out(rows)
        assert bad == MESSY_ROWS == {"null_id": 3, "empty_text": 3, "older_duplicate": 4, "undecodable": 2}
        assert len(good) == expected
        assert len(rows) == expected + sum(MESSY_ROWS.values())


def test_undecodable_rows_are_latin_1_under_ids_of_their_own(days: Days) -> None:
    with pytest.raises(UnicodeDecodeError):
        days[0].read_bytes().decode()
    rows = read_rows(days[0])
    broken = [row for row in rows if "\ufffd" in row["description"]]
    uses = Counter(row["item_id"] for row in rows)
    assert [uses[row["item_id"]] for row in broken] == [1, 1]
    assert "Crème".encode("latin-1") in days[0].read_bytes()


def test_older_duplicates_are_older_and_say_something_else(days: Days) -> None:
    by_id: defaultdict[str, list[Row]] = defaultdict(list)
    for row in read_rows(days[1]):
        by_id[row["item_id"]].append(row)
    pairs = [rows for item_id, rows in by_id.items() if item_id.strip() and len(rows) > 1]
    assert [len(pair) for pair in pairs] == [2, 2, 2, 2]
    for one, other in pairs:
        assert one["updated_at"] != other["updated_at"]
        assert rendered(one) != rendered(other)


def test_good_items_are_read_back_without_the_messy_ones(days: Days) -> None:
    for path in days:
        good, _ = sort_out(read_rows(path))
        assert {item.item_id: item._asdict() for item in read_good_items(path)} == good


@pytest.mark.parametrize(("before", "after", "ds"), [(0, 1, NEXT_DAY), (1, 2, THIRD_DAY)])
def test_a_later_day_edits_50_adds_20_removes_30(days: Days, before: int, after: int, ds: str) -> None:
    old, _ = sort_out(read_rows(days[before]))
    new, _ = sort_out(read_rows(days[after]))
    edited = [i for i in old.keys() & new.keys() if rendered(old[i]) != rendered(new[i])]
    added = new.keys() - old.keys()
    assert (len(edited), len(added), len(old.keys() - new.keys())) == (50, 20, 30)
    assert all(new[i]["updated_at"] == ds for i in [*edited, *added])
    untouched = old.keys() & new.keys() - set(edited)
    assert all(old[i] == new[i] for i in untouched)


def test_removed_ids_never_come_back(tmp_path: Path) -> None:
    gone: set[str] = set()
    before: set[str] = set()
    for day in range(1, 29):
        path = write_catalogue(tmp_path, ds=f"2026-02-{day:02d}", items=100)
        now = set(sort_out(read_rows(path))[0])
        gone |= before - now
        assert not gone & now
        before = now
    assert len(gone) == 27  # 0.6 % of 100 rounds to one a day


def test_the_delta_scales_with_the_catalogue_and_is_never_nothing(tmp_path: Path) -> None:
    for items, expected in ((2000, (20, 8, 12)), (20, (1, 1, 1))):
        folder = tmp_path / str(items)
        old, _ = sort_out(read_rows(write_catalogue(folder, ds=DAY, items=items)))
        new, _ = sort_out(read_rows(write_catalogue(folder, ds=NEXT_DAY, items=items)))
        edited = sum(rendered(old[i]) != rendered(new[i]) for i in old.keys() & new.keys())
        assert (edited, len(new.keys() - old.keys()), len(old.keys() - new.keys())) == expected


def test_a_later_day_follows_the_newest_earlier_one_and_ignores_other_files(tmp_path: Path) -> None:
    write_catalogue(tmp_path, ds="2026-01-01", items=50)
    second = write_catalogue(tmp_path, ds="2026-01-05", items=50)
    (tmp_path / "2026-01-06-notes.csv").write_text("not a day\n")
    write_catalogue(tmp_path, ds="2026-01-09", items=50)
    between = write_catalogue(tmp_path, ds="2026-01-07", items=50)
    before, after = (set(sort_out(read_rows(path))[0]) for path in (second, between))
    assert (len(before - after), len(after - before)) == (1, 1)


def test_texts_are_distinct_and_of_very_different_length(good: dict[str, Row]) -> None:
    assert len({rendered(row) for row in good.values()}) >= 0.99 * len(good)
    words = [len(row["description"].split()) for row in good.values()]
    percentiles = statistics.quantiles(words, n=100)
    assert percentiles[4] <= 6  # short phrases
    assert 8 <= percentiles[49] <= 40  # one to three sentences
    assert percentiles[96] >= 150  # the long tail
    assert 300 <= max(words) <= 900


def test_fields_hold_what_breaks_careless_readers(days: Days, good: dict[str, Row]) -> None:
    texts = [rendered(row) for row in good.values()]
    for sign, least in (('"', 500), (",", 2000), ("\n", 200), ("é", 200), ("🌿", 10)):
        assert sum(sign in text for text in texts) >= least, sign
    assert 200 <= sum(not row["brand"] for row in good.values()) <= 800
    assert b'""' in days[0].read_bytes()
    assert b"\r" not in days[0].read_bytes()


def test_there_are_a_dozen_categories_with_kinds_below(good: dict[str, Row]) -> None:
    kinds = {row["category"] for row in good.values()}
    assert len({kind.split(" > ")[0] for kind in kinds}) == 12
    assert len(kinds) == 48


@pytest.mark.parametrize(("ds", "items"), [("20.11.2026", 50), ("2026-11-31", 50), (DAY, 9)])
def test_bad_arguments_are_refused(tmp_path: Path, ds: str, items: int) -> None:
    with pytest.raises(UserError):
        write_catalogue(tmp_path, ds=ds, items=items)


@pytest.mark.parametrize(("foreign", "items", "match"), [("id,name\n1,spoon\n", 50, "id,name"), ("", 5000, "10 items")])
def test_an_earlier_day_of_another_origin_or_size_is_refused(
    tmp_path: Path, foreign: str, items: int, match: str
) -> None:
    earlier = write_catalogue(tmp_path, ds=DAY, items=10)
    if foreign:
        earlier.write_text(foreign)
    with pytest.raises(UserError, match=match):
        write_catalogue(tmp_path, ds=NEXT_DAY, items=items)


def test_interactions_have_the_promised_columns_in_order_of_time(ratings: pa.Table) -> None:
    assert {field.name: str(field.type) for field in ratings.schema} == {
        "user_id": "string",
        "item_id": "string",
        "rating": "float",
        "timestamp": "timestamp[us, tz=UTC]",
    }
    assert set(ratings["rating"].to_pylist()) == {half / 2 for half in range(1, 11)}
    times = ratings["timestamp"].to_pylist()
    assert times == sorted(times)
    assert INTERACTIONS_END - timedelta(days=INTERACTIONS_DAYS) <= times[0]
    assert times[-1] < INTERACTIONS_END


def test_interactions_name_good_items_at_most_once_per_user(ratings: pa.Table, good: dict[str, Row]) -> None:
    pairs = list(zip(ratings["user_id"].to_pylist(), ratings["item_id"].to_pylist(), strict=True))
    assert {item for _, item in pairs} <= good.keys()
    assert len(set(pairs)) == len(pairs)


def test_users_and_items_have_long_tails(ratings: pa.Table) -> None:
    per_user = sorted(Counter(ratings["user_id"].to_pylist()).values())
    per_item = Counter(ratings["item_id"].to_pylist())
    assert len(per_user) == 600
    assert 34 <= statistics.mean(per_user) <= 46
    assert per_user[300] < statistics.mean(per_user) < per_user[-1] / 4
    assert 5000 - len(per_item) >= 5000 // 12  # cold
    assert per_item.most_common(1)[0][1] > 20 * ratings.num_rows / 5000


def test_interactions_are_deterministic_and_left_alone(days: Days, tmp_path: Path) -> None:
    one, two, other = (tmp_path / name / "i.parquet" for name in ("one", "two", "other"))
    write_interactions(one, days[0], users=20)
    write_interactions(two, days[0], users=20)
    write_interactions(other, days[0], users=20, seed=8)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    two.write_bytes(b"mine")
    assert write_interactions(two, days[0]) == two
    assert two.read_bytes() == b"mine"


def interactions_of(folder: Path, *, items: int, users: int) -> pa.Table:
    catalogue = write_catalogue(folder, ds=DAY, items=items)
    return pq.read_table(write_interactions(folder / "i.parquet", catalogue, users=users))


def test_some_items_stay_cold_however_many_users_there_are(tmp_path: Path) -> None:
    table = interactions_of(tmp_path, items=60, users=600)
    assert table.num_rows > 200 * 60
    assert len(set(table["item_id"].to_pylist())) == 60 - 5


def test_a_tiny_catalogue_still_gives_interactions(tmp_path: Path) -> None:
    table = interactions_of(tmp_path, items=10, users=3)
    assert Counter(table["user_id"].to_pylist()) == {"u00001": 5, "u00002": 5, "u00003": 5}


@pytest.mark.parametrize(("users", "match"), [(600, "no catalogue"), (0, "0 users")])
def test_interactions_refuse_a_missing_catalogue_and_no_users(tmp_path: Path, users: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        write_interactions(tmp_path / "i.parquet", tmp_path / "missing.csv", users=users)


def past_mean_auc(ratings: pa.Table, value_of: dict[str, str]) -> float:
    """AUC on the last fifth of time of a user's mean rating per value of the item, from the first four."""
    rows = list(zip(*(ratings[name].to_pylist() for name in ("user_id", "item_id", "rating")), strict=True))
    cut = len(rows) * 4 // 5
    seen: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for user, item, rating in rows[:cut]:
        seen[user, value_of[item]].append(rating)
    known = [(seen[u, value_of[i]], r >= 4) for u, i, r in rows[cut:] if (u, value_of[i]) in seen]
    return float(roc_auc_score([label for _, label in known], [statistics.fmean(past) for past, _ in known]))


def test_the_content_of_items_predicts_what_users_like(ratings: pa.Table, good: dict[str, Row]) -> None:
    positive = [rating >= 4 for rating in ratings["rating"].to_pylist()]
    assert 0.35 <= statistics.fmean(positive) <= 0.60
    category = {item_id: row["category"].split(" > ")[0] for item_id, row in good.items()}
    chance = dict(zip(category, [*list(category.values())[1:], "Pets"], strict=True))  # the neighbour's category
    assert past_mean_auc(ratings, category) > 0.60
    # The gap is what the category itself tells, beyond how kindly a user rates.
    assert past_mean_auc(ratings, category) > past_mean_auc(ratings, chance) + 0.08


def gap_spread(ratings: pa.Table, has: set[str]) -> float:
    """How much users differ in what they rate the items of a set above all others."""
    by_user: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
    for row in ratings.to_pylist():
        by_user[row["user_id"], row["item_id"] in has].append(row["rating"])
    return statistics.stdev(
        statistics.fmean(by_user[user, True]) - statistics.fmean(by_user[user, False])
        for user in sorted({user for user, _ in by_user})
        if len(by_user[user, True]) >= 5
    )


def test_users_differ_over_styles_and_not_over_colours(ratings: pa.Table, good: dict[str, Row]) -> None:
    def naming(*words: str) -> set[str]:
        return {i for i, row in good.items() if any(word in row["title"].lower() for word in words)}

    rustic = naming("rustic", "farmhouse", "rough-hewn", "country-style")
    coloured = naming("navy", "sand", "crème", "black", "olive")
    assert gap_spread(ratings, rustic) > 1.3 * gap_spread(ratings, coloured)

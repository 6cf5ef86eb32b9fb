"""The example shop: reproducible catalogues with known messy rows, and ratings that depend on the items' texts."""

import csv
import hashlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from marc_pipeline.errors import UserError
from marc_pipeline.example.ratings import INTERACTIONS, INTERACTIONS_DAYS, INTERACTIONS_END, write_interactions
from marc_pipeline.example.shop import MESSY_ROWS, read_good_items, write_catalogue
from marc_pipeline.example.vocabulary import vocabulary

DAY, NEXT_DAY, THIRD_DAY = "2026-11-20", "2026-11-21", "2026-11-24"
TEXT = ("title", "brand", "category", "description")
Row = dict[str, str]
Days = tuple[Path, Path, Path]


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; bytes that are not UTF-8 become U+FFFD."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.DictReader(file))


def sort_out(path: Path) -> tuple[dict[str, Row], Counter[str]]:
    """Good rows of a file by id, and the number of bad rows by reason, by independent rules."""
    good: dict[str, Row] = {}
    bad: Counter[str] = Counter()
    for row in read_rows(path):
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


def edits(old: dict[str, Row], new: dict[str, Row]) -> tuple[set[str], set[str], set[str]]:
    """Ids that were edited, added and removed between two days."""
    edited = {item for item in old.keys() & new.keys() if rendered(old[item]) != rendered(new[item])}
    return edited, new.keys() - old.keys(), old.keys() - new.keys()


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    """Files of three days in one folder; the last one follows a gap."""
    folder = tmp_path_factory.mktemp("catalogue")
    first, second, third = (write_catalogue(folder, ds=ds) for ds in (DAY, NEXT_DAY, THIRD_DAY))
    return first, second, third


@pytest.fixture(scope="module")
def good(days: Days) -> dict[str, Row]:
    """Good rows of the first day by id."""
    return sort_out(days[0])[0]


@pytest.fixture(scope="module")
def ratings(days: Days, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    path = tmp_path_factory.mktemp("interactions") / "interactions.parquet"
    return pq.read_table(write_interactions(path, days[0]))


def test_5000_items_take_less_than_two_seconds(tmp_path: Path) -> None:
    started = time.process_time()
    write_catalogue(tmp_path, ds=DAY, items=5000)
    assert time.process_time() - started < 2


def test_the_same_arguments_give_the_same_bytes(days: Days, tmp_path: Path) -> None:
    again = [write_catalogue(tmp_path, ds=ds) for ds in (DAY, NEXT_DAY, THIRD_DAY)]
    assert [path.name for path in again] == [f"{ds}.csv" for ds in (DAY, NEXT_DAY, THIRD_DAY)]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in days]


def test_the_bytes_of_a_catalogue_do_not_change_between_releases_of_the_program(tmp_path: Path) -> None:
    digests = [
        hashlib.sha256(write_catalogue(tmp_path, ds=ds, items=50).read_bytes()).hexdigest() for ds in (DAY, NEXT_DAY)
    ]
    assert digests == [
        "9d34d0b0d288b65e5129181f166b8ef0ad519c6032eabcb56a730631655b6a88",
        "fdfba810877259b1e4c790204d6cb3c516be8fcda26f6be10fab4e20da95fc44",
    ]


def test_another_seed_gives_another_catalogue(tmp_path: Path) -> None:
    made = [write_catalogue(tmp_path / str(seed), ds=DAY, items=50, seed=seed).read_bytes() for seed in (1, 2)]
    assert made[0] != made[1]


def test_a_new_day_is_one_file_and_an_existing_file_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    path = write_catalogue(folder, ds=DAY, items=50)
    assert list(folder.iterdir()) == [path] == [folder / f"{DAY}.csv"]
    path.write_bytes(b"mine\n")
    assert write_catalogue(folder, ds=DAY, items=50) == path
    assert path.read_bytes() == b"mine\n"


def test_a_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, rows: Sequence[Any]) -> None:
        path.write_text("half a fi")
        raise OSError("disk full")

    monkeypatch.setattr("marc_pipeline.example.shop._write_rows", fail)
    with pytest.raises(OSError, match="disk full"):
        write_catalogue(tmp_path, ds=DAY, items=50)
    assert list(tmp_path.iterdir()) == []


def test_every_day_has_the_documented_messy_rows_and_reads_back_without_them(days: Days) -> None:
    for path, expected in zip(days, (2000, 1996, 1992), strict=True):
        good, bad = sort_out(path)
        assert bad == MESSY_ROWS == {"null_id": 3, "empty_text": 3, "older_duplicate": 4, "undecodable": 2}
        assert len(good) == expected == len(read_rows(path)) - sum(MESSY_ROWS.values())
        assert {item.item_id: item._asdict() for item in read_good_items(path)} == good


def test_undecodable_rows_are_latin_1_and_have_unique_ids(days: Days) -> None:
    with pytest.raises(UnicodeDecodeError):
        days[0].read_bytes().decode()
    rows = read_rows(days[0])
    broken = [row for row in rows if "\ufffd" in row["description"]]
    uses = Counter(row["item_id"] for row in rows)
    assert [uses[row["item_id"]] for row in broken] == [1, 1]
    assert "Crème".encode("latin-1") in days[0].read_bytes()


def test_older_duplicates_have_another_time_and_another_text(days: Days) -> None:
    by_id: defaultdict[str, list[Row]] = defaultdict(list)
    for row in read_rows(days[1]):
        by_id[row["item_id"]].append(row)
    pairs = [rows for item_id, rows in by_id.items() if item_id.strip() and len(rows) > 1]
    assert [len(pair) for pair in pairs] == [2, 2, 2, 2]
    for one, other in pairs:
        assert one["updated_at"] != other["updated_at"]
        assert rendered(one) != rendered(other)


@pytest.mark.parametrize(("before", "after", "ds"), [(0, 1, NEXT_DAY), (1, 2, THIRD_DAY)])
def test_a_later_day_edits_20_adds_8_removes_12(days: Days, before: int, after: int, ds: str) -> None:
    old, new = sort_out(days[before])[0], sort_out(days[after])[0]
    edited, added, removed = edits(old, new)
    assert (len(edited), len(added), len(removed)) == (20, 8, 12)
    assert all(new[i]["updated_at"] == ds for i in edited | added)
    assert all(old[i] == new[i] for i in old.keys() & new.keys() - edited)


def test_removed_ids_are_never_used_again(tmp_path: Path) -> None:
    gone, before = set[str](), set[str]()
    for day in range(1, 29):
        path = write_catalogue(tmp_path, ds=f"2026-02-{day:02d}", items=100)
        now = set(sort_out(path)[0])
        gone |= before - now
        assert not gone & now
        before = now
    assert len(gone) == 27  # 0.6 % of 100 rounds to one a day


@pytest.mark.parametrize(("items", "expected"), [(5000, (50, 20, 30)), (20, (1, 1, 1))])
def test_the_changes_of_a_day_scale_with_the_catalogue(tmp_path: Path, items: int, expected: tuple[int, ...]) -> None:
    old, new = (sort_out(write_catalogue(tmp_path, ds=ds, items=items))[0] for ds in (DAY, NEXT_DAY))
    assert tuple(map(len, edits(old, new))) == expected


def test_a_later_day_follows_the_newest_earlier_one_and_ignores_other_files(tmp_path: Path) -> None:
    write_catalogue(tmp_path, ds="2026-01-01", items=50)
    second = write_catalogue(tmp_path, ds="2026-01-05", items=50)
    (tmp_path / "2026-01-06-notes.csv").write_text("not a day\n")
    write_catalogue(tmp_path, ds="2026-01-09", items=50)
    between = write_catalogue(tmp_path, ds="2026-01-07", items=50)
    _, added, removed = edits(*(sort_out(path)[0] for path in (second, between)))
    assert (len(added), len(removed)) == (1, 1)


def test_texts_are_distinct_and_have_very_different_lengths(good: dict[str, Row]) -> None:
    assert len({rendered(row) for row in good.values()}) >= 0.99 * len(good)
    words = [len(row["description"].split()) for row in good.values()]
    percentiles = statistics.quantiles(words, n=100)
    assert percentiles[4] <= 6  # short phrases
    assert 8 <= percentiles[49] <= 40  # one to three sentences
    assert percentiles[96] >= 150  # the long tail
    assert 300 <= max(words) <= 900


def test_fields_contain_quotes_commas_line_breaks_and_non_ascii_characters(days: Days, good: dict[str, Row]) -> None:
    texts = [rendered(row) for row in good.values()]
    for sign, least in (('"', 200), (",", 800), ("\n", 60), ("é", 80), ("🌿", 4)):
        assert sum(sign in text for text in texts) >= least, sign
    assert 80 <= sum(not row["brand"] for row in good.values()) <= 320
    assert b'""' in days[0].read_bytes()
    assert b"\r" not in days[0].read_bytes()


def test_there_are_12_categories_with_48_kinds(good: dict[str, Row]) -> None:
    kinds = {row["category"] for row in good.values()}
    assert len({kind.split(" > ")[0] for kind in kinds}) == 12
    assert len(kinds) == 48


@pytest.mark.parametrize(("ds", "items"), [("20.11.2026", 50), ("2026-11-31", 50), (DAY, 9)])
def test_bad_arguments_are_refused(tmp_path: Path, ds: str, items: int) -> None:
    with pytest.raises(UserError):
        write_catalogue(tmp_path, ds=ds, items=items)


@pytest.mark.parametrize(("foreign", "items", "match"), [("id,name\n1,spoon\n", 50, "id,name"), ("", 2000, "10 items")])
def test_a_foreign_or_smaller_earlier_day_is_refused(tmp_path: Path, foreign: str, items: int, match: str) -> None:
    earlier = write_catalogue(tmp_path, ds=DAY, items=10)
    if foreign:
        earlier.write_text(foreign)
    with pytest.raises(UserError, match=match):
        write_catalogue(tmp_path, ds=NEXT_DAY, items=items)


def test_interactions_have_the_documented_schema_in_order_of_time(ratings: pa.Table) -> None:
    assert ratings.schema.remove_metadata() == INTERACTIONS
    assert [str(field.type) for field in INTERACTIONS] == ["string", "string", "float", "timestamp[us, tz=UTC]"]
    assert set(ratings["rating"].to_pylist()) == {half / 2 for half in range(1, 11)}
    times = ratings["timestamp"].to_pylist()
    assert times == sorted(times)
    assert INTERACTIONS_END - timedelta(days=INTERACTIONS_DAYS) <= times[0]
    assert times[-1] < INTERACTIONS_END


def test_a_user_rates_good_items_only_and_each_at_most_once(ratings: pa.Table, good: dict[str, Row]) -> None:
    pairs = list(zip(ratings["user_id"].to_pylist(), ratings["item_id"].to_pylist(), strict=True))
    assert {item for _, item in pairs} <= good.keys()
    assert len(set(pairs)) == len(pairs)


def test_users_and_items_have_long_tails(ratings: pa.Table) -> None:
    per_user = sorted(Counter(ratings["user_id"].to_pylist()).values())
    per_item = Counter(ratings["item_id"].to_pylist())
    assert len(per_user) == 500
    assert 34 <= statistics.mean(per_user) <= 46
    assert per_user[250] < statistics.mean(per_user) < per_user[-1] / 4
    assert 2000 - len(per_item) >= 2000 // 12  # never rated
    assert per_item.most_common(1)[0][1] > 15 * ratings.num_rows / 2000


def test_interactions_are_reproducible_and_an_existing_file_is_kept(days: Days, tmp_path: Path) -> None:
    one, two, other = (
        write_interactions(tmp_path / name / "i.parquet", days[0], users=20, seed=seed)
        for name, seed in (("one", 7), ("two", 7), ("other", 8))
    )
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    two.write_bytes(b"mine")
    assert write_interactions(two, days[0]) == two
    assert two.read_bytes() == b"mine"


def interactions_of(folder: Path, *, items: int, users: int) -> pa.Table:
    catalogue = write_catalogue(folder, ds=DAY, items=items)
    return pq.read_table(write_interactions(folder / "i.parquet", catalogue, users=users))


def test_some_items_are_never_rated_even_with_many_users(tmp_path: Path) -> None:
    table = interactions_of(tmp_path, items=60, users=600)
    assert table.num_rows > 200 * 60
    assert len(set(table["item_id"].to_pylist())) == 60 - 5


def test_a_tiny_catalogue_has_interactions(tmp_path: Path) -> None:
    table = interactions_of(tmp_path, items=10, users=3)
    assert Counter(table["user_id"].to_pylist()) == {"u00001": 5, "u00002": 5, "u00003": 5}


@pytest.mark.parametrize(("users", "match"), [(600, "no catalogue"), (0, "0 users")])
def test_a_missing_catalogue_and_zero_users_are_refused(tmp_path: Path, users: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        write_interactions(tmp_path / "i.parquet", tmp_path / "missing.csv", users=users)


def past_mean_auc(ratings: pa.Table, value_of: dict[str, str]) -> float:
    """AUC on the last fifth of the rows, of a user's earlier mean rating for items with the same value."""
    rows = list(zip(*(ratings[name].to_pylist() for name in ("user_id", "item_id", "rating")), strict=True))
    cut = len(rows) * 4 // 5
    seen: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for user, item, rating in rows[:cut]:
        seen[user, value_of[item]].append(rating)
    known = [(seen[u, value_of[i]], r >= 4) for u, i, r in rows[cut:] if (u, value_of[i]) in seen]
    return float(roc_auc_score([label for _, label in known], [statistics.fmean(past) for past, _ in known]))


def test_about_half_of_the_ratings_are_clicks_and_no_user_clicks_everything(ratings: pa.Table) -> None:
    by_user: defaultdict[str, list[bool]] = defaultdict(list)
    for row in ratings.to_pylist():
        by_user[row["user_id"]].append(row["rating"] >= 4)
    shares = [statistics.fmean(clicks) for clicks in by_user.values()]
    assert 0.45 <= statistics.fmean(shares) <= 0.60
    assert sum(share in {0, 1} for share in shares) < 0.05 * len(shares)


def named_value(text: str, wordings: Mapping[str, Sequence[str]]) -> str:
    """The value whose wording stands first in a text, by a rule of this test; empty if there is none."""
    places = {text.find(word): value for value, words in wordings.items() for word in words if word in text}
    return places[min(places)] if places else ""


def values_of(attribute: str, good: dict[str, Row]) -> dict[str, str]:
    """The department, or the style, use or price that each item's text names."""
    words = vocabulary()
    styles = {name: style.words for name, style in words.styles.items()}
    wordings = {"style": styles, "use": words.uses, "price": words.prices}
    if attribute == "department":
        return {item_id: row["category"].split(" > ")[0] for item_id, row in good.items()}
    return {
        i: named_value(f"{row['title']} {row['description']}".lower(), wordings[attribute]) for i, row in good.items()
    }


@pytest.mark.parametrize(("attribute", "gain"), [("department", 0.08), ("style", 0.15), ("use", 0.02), ("price", 0.02)])
def test_what_a_text_names_predicts_what_a_user_likes(
    ratings: pa.Table, good: dict[str, Row], attribute: str, gain: float
) -> None:
    value_of = values_of(attribute, good)
    # The values of other items keep the effect of generous users and of frequent values only.
    others = np.random.default_rng(1).permutation(list(value_of.values())).tolist()
    chance = past_mean_auc(ratings, dict(zip(value_of, others, strict=True)))
    assert past_mean_auc(ratings, value_of) > chance + gain


def test_who_likes_a_style_likes_its_neighbour_and_not_the_opposite(ratings: pa.Table, good: dict[str, Row]) -> None:
    style_of, styles = values_of("style", good), list(vocabulary().styles)
    by_user: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for row in ratings.to_pylist():
        by_user[row["user_id"], style_of[row["item_id"]]].append(row["rating"])
    users = sorted({user for user, _ in by_user})

    def correlation(distance: int) -> float:
        pairs = [
            (statistics.fmean(by_user[user, style]), statistics.fmean(by_user[user, styles[(place + distance) % 8]]))
            for user in users
            for place, style in enumerate(styles)
            if by_user[user, style] and by_user[user, styles[(place + distance) % 8]]
        ]
        return statistics.correlation(*zip(*pairs, strict=True))

    assert correlation(1) > 0.2 > -0.2 > correlation(4)


def gap_spread(ratings: pa.Table, has: set[str]) -> float:
    """Spread between users of the difference in mean rating between a set's items and all others."""
    by_user: defaultdict[tuple[str, bool], list[float]] = defaultdict(list)
    for row in ratings.to_pylist():
        by_user[row["user_id"], row["item_id"] in has].append(row["rating"])
    return statistics.stdev(
        statistics.fmean(by_user[user, True]) - statistics.fmean(by_user[user, False])
        for user in sorted({user for user, _ in by_user})
        if len(by_user[user, True]) >= 5
    )


def test_tastes_depend_on_styles_but_not_on_colours(ratings: pa.Table, good: dict[str, Row]) -> None:
    def naming(*words: str) -> set[str]:
        return {i for i, row in good.items() if any(word in row["title"].lower() for word in words)}

    rustic = naming("rustic", "farmhouse", "rough-hewn", "country-style")
    coloured = naming("navy", "sand", "crème", "black", "olive")
    assert gap_spread(ratings, rustic) > 1.3 * gap_spread(ratings, coloured)

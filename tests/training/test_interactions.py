"""Interactions: order, numbering and labels of rows, rows of unknown items, texts about users, and real ratings."""

import csv
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from marc_pipeline.config import InteractionSettings, load_settings
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.time_split import histories, split_by_time
from rating_files import GOOD, make, read, refusal, write
from repository_paths import SHARED

MOVIELENS = SHARED / "data" / "ml-latest-small"
drawn = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 1), st.integers(-4, 12)), max_size=40
).map(make)


@pytest.mark.parametrize("name", ["r.parquet", "r.csv"])
def test_rows_are_sorted_by_time_users_by_first_appearance_and_items_by_position(tmp_path: Path, name: str) -> None:
    found = read(write(tmp_path / name, GOOD))
    assert found.times.tolist() == [10_000_000, 20_000_000, 20_000_000, 30_000_000, 40_000_000]
    assert found.users.tolist() == [0, 1, 1, 0, 2]
    assert found.items.tolist() == [1, 0, 2, 2, 1]
    assert found.labels.tolist() == [1, 0, 1, 1, 0]
    assert (len(found), found.n_users) == (5, 3)
    arrays = (found.users, found.items, found.labels, found.times)
    assert [a.dtype.name for a in arrays] == ["int64", "int64", "float32", "int64"]
    assert all(a.flags.writeable for a in arrays)


def test_rows_of_unknown_items_are_skipped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "r.csv", GOOD)
    with caplog.at_level(logging.WARNING):
        read(path)
        assert caplog.records == []
        found = read(path, ["c", "b"], max_unknown_fraction=0.2)
    assert found.items.tolist() == [1, 0, 0, 1]
    assert found.times.tolist() == [10_000_000, 20_000_000, 30_000_000, 40_000_000]
    assert found.users.tolist() == [0, 1, 0, 2]
    share = f"of the 5 rows at {path} name items that the catalogue lacks, for example"
    assert [record.message for record in caplog.records] == [f"interactions: 1 (20.00%) {share} 'a': skipped"]
    assert refusal(lambda: read(path, ["b"])) == (
        f"3 (60.00%) {share} 'c'; the limit is 10.00%: correct the ids, or raise interactions.max_unknown_fraction "
        "to skip these rows"
    )
    assert refusal(lambda: read(path, ["1"], max_unknown_fraction=1)) == (
        f"all {share} 'c'; is interactions.item_column 'item_id' the catalogue's id?"
    )


def test_a_user_with_skipped_rows_only_has_no_number(tmp_path: Path) -> None:
    columns = {name: [*values, values[0]] for name, values in GOOD.items()}
    columns["user_id"][-1], columns["item_id"][-1], columns["timestamp"][-1] = "first", "gone", 1
    found = read(write(tmp_path / "r.csv", columns), max_unknown_fraction=0.5)
    assert found.users.tolist() == [0, 1, 1, 0, 2]


def test_texts_about_users_are_read_once_each_and_blanks_are_missing(tmp_path: Path) -> None:
    about = ["likes trains", " ", "likes trains", None, "new here"]
    path = write(tmp_path / "ratings.parquet", {**GOOD, "about": about})
    found = read(path, user_text_column="about")
    assert sorted(found.profile_texts) == ["likes trains", "new here"]
    assert found.profiles is not None
    texts = [found.profile_texts[place] if place >= 0 else None for place in found.profiles]
    assert texts == ["likes trains", None, "new here", "likes trains", None]
    assert "user_text_column" in refusal(lambda: read(path, user_text_column="profile"))


def test_unsorted_rows_are_refused() -> None:
    good = make([(0, 0, 1, 1), (1, 1, 0, 2)])
    with pytest.raises(ValueError, match="sorted by time"):
        replace(good, times=good.times[::-1])


@given(drawn, st.integers(0, 40), st.integers(0, 40))
def test_taken_rows_keep_the_numbers_of_users(found: Interactions, start: int, stop: int) -> None:
    taken = found.take(slice(start, stop))
    assert len(taken) == len(found.users[start:stop])
    for name in ("users", "items", "labels", "times"):
        assert np.array_equal(getattr(taken, name), getattr(found, name)[start:stop])
    assert taken.n_users == max(taken.users.tolist(), default=-1) + 1


def test_settings_resolve_the_uri_and_refuse_bad_values(tmp_path: Path) -> None:
    def loaded(line: str) -> InteractionSettings:
        path = tmp_path / "marc.yaml"
        path.write_text(f'catalogue: {{uri: "x.csv", template: "{{t}}"}}\n{line}\n')
        return load_settings(path).interactions

    assert loaded("") == InteractionSettings()
    assert loaded("").uri is None
    wanted = InteractionSettings(uri=f"{tmp_path}/in/*.csv", history=3)
    assert loaded("interactions: {uri: in/*.csv, history: 3}") == wanted
    assert loaded("interactions: {uri: '{root}/r.csv'}").uri == f"{tmp_path}/data/r.csv"
    assert loaded("root: s3://b/p/\ninteractions: {uri: '{root}/r'}").uri == "s3://b/p/r"
    for line, message in {
        "{history: 0}": "interactions.history: Input should be greater than or equal to 1 (got 0)",
        "{max_unknown_fraction: 2}": "interactions.max_unknown_fraction: Input should be less than",
        "{positive_rating: .nan}": "interactions.positive_rating: Input should be a finite number",
        "{format: jsonl}": "interactions.format: Input should be 'auto', 'parquet' or 'csv'",
        "{user: x}": "unknown key interactions.user",
    }.items():
        assert message in refusal(lambda line=line: loaded(f"interactions: {line}"))


# Real ratings


@pytest.fixture(scope="module")
def movielens() -> Interactions:
    """100,836 real ratings of 9,742 films."""
    if not (MOVIELENS / "ratings.csv").is_file():
        pytest.skip("the real ratings shared/data/ml-latest-small are not beside this checkout")
    with (MOVIELENS / "movies.csv").open(encoding="utf-8", newline="") as file:
        films = [row["movieId"] for row in csv.DictReader(file)]
    return read(MOVIELENS / "ratings.csv", films, user_column="userId", item_column="movieId")


def test_real_ratings_are_read_completely_and_split_80_10_10(movielens: Interactions) -> None:
    with (MOVIELENS / "ratings.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert (len(movielens), movielens.n_users) == (100_836, 610) == (len(lines), len({x["userId"] for x in lines}))
    assert int(movielens.labels.sum()) == sum(float(line["rating"]) >= 4 for line in lines)
    assert movielens.times.tolist() == sorted(int(line["timestamp"]) * 1_000_000 for line in lines)
    counts = np.bincount(movielens.items, minlength=9742)
    assert counts.sum() == 100_836
    assert counts[0] == sum(line["movieId"] == "1" for line in lines), "Toy Story is the first film"
    split = split_by_time(movielens)
    sizes = [len(movielens.take(rows)) for rows in (split.train, split.validation, split.test)]
    assert sum(sizes) == 100_836
    assert np.allclose(np.array(sizes) / 100_836, [0.8, 0.1, 0.1], atol=0.001)


def test_histories_of_real_ratings_follow_the_definition(movielens: Interactions) -> None:
    result = histories(movielens, length=10, label=1)
    for row in range(0, 100_836, 997):
        user, moment = movielens.users[row], movielens.times[row]
        mine = (movielens.users == user) & (movielens.labels == 1) & (movielens.times < moment)
        wanted = movielens.items[mine][::-1][:10].tolist()
        assert result[row].tolist() == wanted + [-1] * (10 - len(wanted))

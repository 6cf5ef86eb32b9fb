"""The release log: records read back, the newest release, turns, withdrawn dates and older formats."""

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError
from hypothesis import given
from hypothesis import strategies as st

from interruptions import lose_answers, together
from marc_pipeline.errors import UserError
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.log import (
    ReleaseLog,
    append,
    find_release,
    live_releases,
    newest,
    read_log,
    read_releases,
    replace,
)
from marc_pipeline.storage import Storage
from marc_schemas.release import IndexBuild, Release
from published import NOON, Site, items
from release_cases import like

STORAGE = Storage()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release that was really published, to derive others from."""
    return Site(tmp_path_factory.mktemp("made")).publish(items(20))


def published(uri: str, *releases: Release) -> None:
    """Append releases one after the other."""
    for release in releases:
        assert append(STORAGE, uri, [release])


def ids_in(uri: str) -> list[str]:
    return [release.release_id for release in read_releases(STORAGE, uri)]


def rows_of(uri: str) -> int:
    """Rows in the log, as any Delta reader counts them."""
    return int(DeltaTable(f"{uri}/_releases").to_pyarrow_table().num_rows)


def test_a_release_reads_back_as_it_was_written(tmp_path: Path, made: Release) -> None:
    full = like(
        made, "full", ds="2026-11-20", seconds={"encode": 1.5, "plan": 0.25}, tokens_per_second=12.5,
        audit__drift=0.125, index__nprobe=8, supersedes="an older one", quarantine_uri="/x", turn=7, withdrawn=True,
        restores="another",
        retired_at=NOON, index__build=IndexBuild(items=3, nprobe=4, mean=(0.25, -1.0), changed=2),
    )  # fmt: skip
    bare = like(
        made, "bare", ds="2026-11-21", hour=1, seconds={}, tokens_per_second=None,
        audit__drift=None, index__nprobe=None, supersedes=None, quarantine_uri=None, restores=None, retired_at=None,
        index__build=IndexBuild(items=3, nprobe=None, mean=(0.5,)),
    )  # fmt: skip
    published(str(tmp_path), full, bare)
    assert read_releases(STORAGE, str(tmp_path)) == [full, bare]


def test_releases_are_sorted_by_time_of_publication(tmp_path: Path, made: Release) -> None:
    published(
        str(tmp_path), *(like(made, f"r{hour}", ds=f"2026-11-{30 - hour}", hour=hour) for hour in (5, 1, 3, 2, 4))
    )
    assert ids_in(str(tmp_path)) == ["r1", "r2", "r3", "r4", "r5"]


def test_a_table_without_a_log_has_no_releases(tmp_path: Path) -> None:
    assert read_releases(STORAGE, str(tmp_path)) == []
    assert read_releases(STORAGE, str(tmp_path / "nowhere")) == []
    assert newest([]) is None


def test_a_backfill_of_an_old_day_never_becomes_the_newest(made: Release) -> None:
    today = like(made, "today", ds="2026-11-20", hour=0)
    backfill = like(made, "backfill", ds="2026-11-01", hour=9)
    # Clocks differ between machines: within a date, the turn decides.
    again = like(made, "again", ds="2026-11-01", hour=8, turn=2)
    assert newest([today, backfill, again]) == today
    assert newest([today, backfill, again], ds="2026-11-01") == again
    assert newest([today, backfill, again], ds="2026-11-02") is None


@given(
    st.lists(st.tuples(st.integers(1, 5), st.booleans()), max_size=12),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_the_newest_is_the_last_turn_of_the_last_day_that_was_not_withdrawn(
    made: Release, drawn: list[tuple[int, bool]], day: int, order: random.Random
) -> None:
    releases: list[Release] = []
    seen: dict[str, Release] = {}
    for number, (of, withdrawn) in enumerate(drawn):
        ds = f"2026-11-0{of}"
        turn = seen[ds].turn + 1 if ds in seen else 1
        hour = order.randrange(5)
        seen[ds] = like(made, f"r{number:02d}", ds=ds, hour=hour, turn=turn, withdrawn=withdrawn)
        releases.append(seen[ds])
    order.shuffle(releases)
    live = {ds: release for ds, release in seen.items() if not release.withdrawn}
    assert live_releases(releases) == live
    assert list(live_releases(releases)) == sorted(live)
    assert newest(iter(releases)) == (live[max(live)] if live else None)
    assert newest(iter(releases), ds=f"2026-11-0{day}") == live.get(f"2026-11-0{day}")
    log = ReleaseLog("/somewhere", tuple(releases), None)
    assert log.live(f"2026-11-0{day}") == live.get(f"2026-11-0{day}")
    assert all(log.find(release.release_id) == release for release in releases)
    assert log.find("nobody") is None
    assert log.find(None) is None


def test_a_release_is_found_by_id_by_date_or_as_the_newest(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, new, late = (
        like(made, "old", ds="2026-11-01"),
        like(made, "new", ds="2026-11-20", hour=1),
        like(made, "late", ds="2026-11-01", hour=2, turn=2),
    )
    published(uri, old, new, late)
    assert find_release(STORAGE, uri) == new
    assert find_release(STORAGE, uri, ds="2026-11-01") == late
    assert find_release(STORAGE, uri, release_id="old") == old
    assert find_release(STORAGE, uri, ds="2026-11-01", release_id="old") == old


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"ds": "2026-11-05"}, "no release of 2026-11-05 at {uri}; there are 2 releases of 2026-11-01 to 2026-11-20"),
        ({"release_id": "x"}, "no release x at {uri}; there are 2 releases of 2026-11-01 to 2026-11-20"),
        ({"release_id": "old", "ds": "2026-11-20"}, "release old is of 2026-11-01, not of 2026-11-20"),
    ],
)
def test_the_error_for_a_missing_release_names_the_releases_that_exist(
    tmp_path: Path, made: Release, wanted: dict[str, str], message: str
) -> None:
    published(str(tmp_path), like(made, "old", ds="2026-11-01"), like(made, "new", ds="2026-11-20", hour=1))
    with pytest.raises(UserError) as refused:
        find_release(STORAGE, str(tmp_path), **wanted)
    assert str(refused.value) == message.format(uri=tmp_path)


def test_the_error_before_the_first_release_says_how_to_publish_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no release at .* yet; the nightly run publishes one"):
        find_release(STORAGE, str(tmp_path), release_id="x")


def test_one_of_two_concurrent_appends_with_the_same_turn_succeeds(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "there already", ds="2026-11-01")])
    together(monkeypatch, release_log, "write_deltalake")
    rivals = [like(made, name, ds="2026-11-20") for name in ("one", "two")]
    with ThreadPoolExecutor(2) as pool:
        made_it = list(pool.map(lambda release: append(STORAGE, uri, [release]), rivals))
    assert sorted(made_it) == [False, True]
    assert [r for r in read_releases(STORAGE, uri) if r.ds == "2026-11-20"] == [rivals[made_it.index(True)]]


def test_concurrent_appends_of_different_dates_all_succeed(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "there already", ds="2026-11-01")])
    together(monkeypatch, release_log, "write_deltalake", parties=4)
    with ThreadPoolExecutor(4) as pool:
        made_it = list(pool.map(lambda n: append(STORAGE, uri, [like(made, f"r{n}", ds=f"2026-11-1{n}")]), range(4)))
    assert made_it == [True] * 4
    assert set(ids_in(uri)) == {"there already", "r0", "r1", "r2", "r3"}


def test_concurrent_first_appends_to_a_new_table_all_succeed(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    rivals = 6
    for attempt in range(10):
        uri = str(tmp_path / str(attempt))

        def publish(number: int, uri: str = uri) -> bool:
            return append(STORAGE, uri, [like(made, f"r{number}", ds=f"2026-11-1{number}")])

        with monkeypatch.context() as patch, ThreadPoolExecutor(rivals) as pool:
            together(patch, DeltaTable, "create", parties=rivals)
            assert list(pool.map(publish, range(rivals))) == [True] * rivals
        assert len(read_releases(STORAGE, uri)) == rivals


@pytest.mark.parametrize("folder", ["with blanks", "ü and #"])
def test_a_table_uri_may_contain_blanks_and_special_characters(tmp_path: Path, made: Release, folder: str) -> None:
    uri = str(tmp_path / folder)
    published(uri, like(made, "r", ds="2026-11-20"))
    assert ids_in(uri) == ["r"]


def test_the_time_of_publication_keeps_its_time_zone(tmp_path: Path, made: Release) -> None:
    append(STORAGE, str(tmp_path), [like(made, "r", ds="2026-11-20")])
    created = read_releases(STORAGE, str(tmp_path))[0].created_at
    assert created == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert created.utcoffset() == timedelta(0)


# --- turns


def test_a_taken_turn_is_refused_and_the_next_turn_is_free(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    assert read_log(STORAGE, uri).next_turn("2026-11-20") == 1
    assert append(STORAGE, uri, [like(made, "first", ds="2026-11-20")])
    assert read_log(STORAGE, uri).next_turn("2026-11-20") == 2
    assert read_log(STORAGE, uri).next_turn("2026-11-19") == 1
    assert not append(STORAGE, uri, [like(made, "late", ds="2026-11-20")])
    assert append(STORAGE, uri, [like(made, "second", ds="2026-11-20", turn=2)])
    assert not append(STORAGE, uri, [like(made, "much later", ds="2026-11-20")])
    assert ids_in(uri) == ["first", "second"]


@pytest.mark.parametrize("error", [CommitFailedError, DeltaError, OSError])
def test_an_append_whose_answer_was_lost_succeeds_once(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    uri = str(tmp_path)
    lose_answers(monkeypatch, error=error)
    release = like(made, "ours", ds="2026-11-20")
    assert append(STORAGE, uri, [release])
    assert append(STORAGE, uri, [release])
    assert not append(STORAGE, uri, [like(made, "theirs", ds="2026-11-20")])
    assert read_releases(STORAGE, uri) == [release]


def test_an_append_fails_after_the_configured_number_of_attempts(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise CommitFailedError("no")

    monkeypatch.setattr(release_log, "write_deltalake", fail)
    with pytest.raises(OSError, match="failed 3 times, at last: no"):
        append(Storage(attempts=3), str(tmp_path), [like(made, "r", ds="2026-11-20")])
    assert len(tries) == 3
    assert read_releases(STORAGE, str(tmp_path)) == []


def test_releases_of_several_dates_are_appended_in_one_commit_or_not_at_all(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "there", ds="2026-11-20")])
    version = DeltaTable(f"{uri}/_releases").version()
    together = [like(made, "old", ds="2026-11-19"), like(made, "new", ds="2026-11-20")]
    assert not append(STORAGE, uri, together)
    assert ids_in(uri) == ["there"]
    # The turn of the other date stays free.
    assert read_log(STORAGE, uri).next_turn("2026-11-19") == 1
    together[1] = together[1].model_copy(update={"turn": 2})
    assert append(STORAGE, uri, together)
    assert DeltaTable(f"{uri}/_releases").version() == version + 1
    assert read_log(STORAGE, uri).next_turn("2026-11-19") == 2
    assert read_log(STORAGE, uri).next_turn("2026-11-20") == 3


def test_one_of_a_concurrent_roll_back_and_release_succeeds(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in range(5):
        uri = str(tmp_path / str(attempt))
        published(uri, like(made, "19", ds="2026-11-19"), like(made, "20", ds="2026-11-20"))
        roll_back = [
            like(made, "back", ds="2026-11-19", turn=2),
            like(made, "gone", ds="2026-11-20", turn=2, withdrawn=True),
        ]
        rivals = [roll_back, [like(made, "rival", ds="2026-11-20", turn=2)]]
        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
            together(patch, release_log, "write_deltalake")
            made_it = list(pool.map(lambda rows, uri=uri: append(STORAGE, uri, rows), rivals))  # type: ignore[misc]
        assert sorted(made_it) == [False, True]
        found = set(ids_in(uri)) - {"19", "20"}
        assert found == ({"back", "gone"} if made_it[0] else {"rival"})


# --- withdrawn dates


def test_a_withdrawn_date_has_no_release_and_an_earlier_date_is_the_newest(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, new = like(made, "old", ds="2026-11-19"), like(made, "new", ds="2026-11-20", hour=1)
    gone = like(made, "gone", ds="2026-11-20", hour=2, turn=2, withdrawn=True)
    published(uri, old, new, gone)
    assert find_release(STORAGE, uri) == old
    with pytest.raises(UserError, match=r"no release of 2026-11-20 at .*; there are 3 releases of 2026-11-19 to 2026"):
        find_release(STORAGE, uri, ds="2026-11-20")
    # A withdrawn release is found by its id. The withdrawal itself holds no vectors.
    assert find_release(STORAGE, uri, release_id="new") == new
    with pytest.raises(UserError, match="release gone withdrew 2026-11-20"):
        find_release(STORAGE, uri, release_id="gone")
    back = like(made, "back", ds="2026-11-20", hour=3, turn=3)
    append(STORAGE, uri, [back])
    assert find_release(STORAGE, uri) == back


# --- records that retention replaces


def test_replace_keeps_records_that_were_appended_meanwhile(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, kept = like(made, "old", ds="2026-11-01"), like(made, "kept", ds="2026-11-02", hour=1)
    published(uri, old, kept)
    found = read_log(STORAGE, uri)
    late = like(made, "late", ds="2026-11-03", hour=2)
    published(uri, late)
    retired = kept.model_copy(update={"retired_at": NOON})
    assert replace(STORAGE, found, [retired])
    assert read_releases(STORAGE, uri) == [retired, late]
    assert rows_of(uri) == 2
    # A turn stays taken after its record is removed.
    assert read_log(STORAGE, uri).next_turn("2026-11-01") == 3
    assert not append(STORAGE, uri, [like(made, "again", ds="2026-11-01", hour=3)])


def test_one_of_a_concurrent_replace_and_append_of_a_date_is_refused(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, other = like(made, "old", ds="2026-11-01"), like(made, "other", ds="2026-11-02", hour=1)
    published(uri, old, other)
    found, retired = read_log(STORAGE, uri), old.model_copy(update={"retired_at": NOON})
    late = like(made, "late", ds="2026-11-01", hour=2, turn=2)
    assert append(STORAGE, uri, [late])
    assert not replace(STORAGE, found, [retired, other])
    assert read_releases(STORAGE, uri) == [old, other, late]
    found = read_log(STORAGE, uri)
    assert replace(STORAGE, found, [retired, other, late])
    assert not append(STORAGE, uri, [like(made, "later", ds="2026-11-01", hour=3, turn=3)])
    # Turns of unchanged dates stay free. ``turns`` takes the turn of a date without a record.
    second = like(made, "second", ds="2026-11-02", hour=3, turn=2)
    assert not append(STORAGE, uri, [second], turns={"2026-11-01": 3})
    assert append(STORAGE, uri, [second], turns={"2026-11-01": 4})
    assert not append(STORAGE, uri, [], turns={"2026-11-01": 4})
    assert append(STORAGE, uri, [], turns={"2026-11-01": 5})
    assert read_releases(STORAGE, uri) == [retired, other, late, second]
    assert read_log(STORAGE, uri).next_turn("2026-11-01") == 6


def test_the_second_of_two_concurrent_replaces_is_refused(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    rows = [like(made, f"r{n}", ds=f"2026-11-0{n}", hour=n) for n in range(1, 4)]
    published(uri, *rows)
    first, second = read_log(STORAGE, uri), read_log(STORAGE, uri)
    assert replace(STORAGE, first, rows[1:])
    assert not replace(STORAGE, second, rows[:2])
    assert read_releases(STORAGE, uri) == rows[1:]


def test_replace_without_a_log_succeeds_and_writes_nothing(tmp_path: Path) -> None:
    assert replace(STORAGE, read_log(STORAGE, str(tmp_path)), [])
    assert list(tmp_path.iterdir()) == []

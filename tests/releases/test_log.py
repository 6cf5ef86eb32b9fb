"""The release log: records read back, the newest release, turns, withdrawn dates and replaced records."""

import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    """A published release, to derive others from."""
    return Site(tmp_path_factory.mktemp("made")).publish(items(20))


@dataclass(frozen=True)
class Log:
    """The release log of a table, with releases of November 2026."""

    uri: str
    made: Release

    def like(self, name: str, day: int, hour: int = 0, **changes: Any) -> Release:
        return like(self.made, name, ds=f"2026-11-{day:02d}", hour=hour, **changes)

    def append(self, *releases: Release, turns: Mapping[str, int] | None = None) -> bool:
        return append(STORAGE, self.uri, releases, turns=turns)

    def publish(self, *releases: Release) -> None:
        """Append releases one after the other."""
        for release in releases:
            assert self.append(release)

    @property
    def ids(self) -> list[str]:
        return [release.release_id for release in self.releases]

    @property
    def releases(self) -> list[Release]:
        return read_releases(STORAGE, self.uri)

    def read(self) -> ReleaseLog:
        return read_log(STORAGE, self.uri)

    def next_turn(self, day: int) -> int:
        return self.read().next_turn(f"2026-11-{day:02d}")

    def find(self, **wanted: Any) -> Release:
        return find_release(STORAGE, self.uri, **wanted)

    @property
    def version(self) -> int:
        return int(DeltaTable(f"{self.uri}/_releases").version())


@pytest.fixture
def log(tmp_path: Path, made: Release) -> Log:
    return Log(str(tmp_path), made)


def test_a_release_reads_back_as_it_was_written(log: Log) -> None:
    full = log.like(
        "full", 20, seconds={"encode": 1.5, "plan": 0.25}, tokens_per_second=12.5, audit__drift=0.125,
        index__nprobe=8, supersedes="an older one", quarantine_uri="/x", turn=7, withdrawn=True, restores="another",
        retired_at=NOON, index__build=IndexBuild(items=3, nprobe=4, mean=(0.25, -1.0), changed=2),
    )  # fmt: skip
    sparse = log.like(
        "sparse", 21, hour=1, seconds={}, tokens_per_second=None, audit__drift=None, index__nprobe=None,
        supersedes=None, quarantine_uri=None, restores=None, retired_at=None,
        index__build=IndexBuild(items=3, nprobe=None, mean=(0.5,)),
    )  # fmt: skip
    log.publish(full, sparse)
    assert log.releases == [full, sparse]
    created = log.releases[0].created_at
    assert created == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert created.utcoffset() == timedelta(0)


def test_releases_are_sorted_by_time_of_publication(log: Log) -> None:
    log.publish(*(log.like(f"r{hour}", 30 - hour, hour) for hour in (5, 1, 3, 2, 4)))
    assert log.ids == ["r1", "r2", "r3", "r4", "r5"]


@pytest.mark.parametrize("folder", ["with blanks", "ü and #"])
def test_a_table_uri_may_contain_blanks_and_special_characters(tmp_path: Path, made: Release, folder: str) -> None:
    log = Log(str(tmp_path / folder), made)
    log.publish(log.like("r", 20))
    assert log.ids == ["r"]


def test_a_table_without_a_log_has_no_releases(log: Log) -> None:
    assert log.releases == read_releases(STORAGE, f"{log.uri}/nowhere") == []
    assert newest([]) is None
    with pytest.raises(UserError, match=r"no release at .* yet; the nightly run publishes one"):
        log.find(release_id="x")
    assert replace(STORAGE, log.read(), [])
    assert list(Path(log.uri).iterdir()) == []


# --- the newest release


def test_a_backfill_of_an_old_day_never_becomes_the_newest(log: Log) -> None:
    # Clocks differ between machines: within a date, the turn decides.
    today, backfill, again = log.like("today", 20), log.like("backfill", 1, 9), log.like("again", 1, 8, turn=2)
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
    assert log.find("nobody") is log.find(None) is None


def test_a_release_is_found_by_id_by_date_or_as_the_newest(log: Log) -> None:
    old, new, late = log.like("old", 1), log.like("new", 20, 1), log.like("late", 1, 2, turn=2)
    log.publish(old, new, late)
    assert log.find() == new
    assert log.find(ds="2026-11-01") == late
    assert log.find(release_id="old") == log.find(ds="2026-11-01", release_id="old") == old


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"ds": "2026-11-05"}, "no release of 2026-11-05 at {uri}; there are 2 releases of 2026-11-01 to 2026-11-20"),
        ({"release_id": "x"}, "no release x at {uri}; there are 2 releases of 2026-11-01 to 2026-11-20"),
        ({"release_id": "old", "ds": "2026-11-20"}, "release old is of 2026-11-01, not of 2026-11-20"),
    ],
)
def test_the_error_for_a_missing_release_names_the_existing_ones(
    log: Log, wanted: dict[str, str], message: str
) -> None:
    log.publish(log.like("old", 1), log.like("new", 20, 1))
    with pytest.raises(UserError) as refused:
        log.find(**wanted)
    assert str(refused.value) == message.format(uri=log.uri)


def test_a_withdrawn_date_has_no_release_and_an_earlier_date_is_the_newest(log: Log) -> None:
    old, new = log.like("old", 19), log.like("new", 20, 1)
    log.publish(old, new, log.like("gone", 20, 2, turn=2, withdrawn=True))
    assert log.find() == old
    with pytest.raises(UserError, match=r"no release of 2026-11-20 at .*; there are 3 releases of 2026-11-19 to 2026"):
        log.find(ds="2026-11-20")
    # A withdrawn release is found by its id. The withdrawal itself holds no vectors.
    assert log.find(release_id="new") == new
    with pytest.raises(UserError, match="release gone withdrew 2026-11-20"):
        log.find(release_id="gone")
    restored = log.like("restored", 20, 3, turn=3)
    log.publish(restored)
    assert log.find() == restored


# --- turns


def test_a_taken_turn_is_refused_and_the_next_turn_is_free(log: Log) -> None:
    assert log.next_turn(20) == 1
    assert log.append(log.like("first", 20))
    assert (log.next_turn(20), log.next_turn(19)) == (2, 1)
    assert not log.append(log.like("late", 20))
    assert log.append(log.like("second", 20, turn=2))
    assert not log.append(log.like("much later", 20))
    assert log.ids == ["first", "second"]


def test_releases_of_several_dates_are_appended_in_one_commit_or_not_at_all(log: Log) -> None:
    log.publish(log.like("there", 20))
    version, old = log.version, log.like("old", 19)
    assert not log.append(old, log.like("new", 20))
    assert log.ids == ["there"]
    # The turn of the other date stays free.
    assert log.next_turn(19) == 1
    assert log.append(old, log.like("new", 20, turn=2))
    assert log.version == version + 1
    assert (log.next_turn(19), log.next_turn(20)) == (2, 3)


@pytest.mark.parametrize("error", [CommitFailedError, DeltaError, OSError])
def test_an_append_whose_answer_was_lost_succeeds_once(
    log: Log, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    lose_answers(monkeypatch, error=error)
    release = log.like("ours", 20)
    log.publish(release, release)
    assert not log.append(log.like("theirs", 20))
    assert log.releases == [release]


def test_an_append_fails_after_the_configured_number_of_attempts(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise CommitFailedError("no")

    monkeypatch.setattr(release_log, "write_deltalake", fail)
    with pytest.raises(OSError, match="failed 3 times, at last: no"):
        append(Storage(attempts=3), log.uri, [log.like("r", 20)])
    assert len(tries) == 3
    assert log.releases == []


# --- concurrent appends


def at_once(log: Log, *batches: list[Release]) -> list[bool]:
    """Append batches in threads that have all opened the log before the first commit."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(batches)) as pool:
        together(patch, release_log, "write_deltalake", parties=len(batches))
        return list(pool.map(lambda rows: log.append(*rows), batches))


def test_one_of_two_concurrent_appends_with_the_same_turn_succeeds(log: Log) -> None:
    log.publish(log.like("there", 1))
    rivals = [log.like(name, 20) for name in ("one", "two")]
    appended = at_once(log, *([rival] for rival in rivals))
    assert sorted(appended) == [False, True]
    assert [r for r in log.releases if r.ds == "2026-11-20"] == [rivals[appended.index(True)]]


def test_concurrent_appends_of_different_dates_all_succeed(log: Log) -> None:
    log.publish(log.like("there", 1))
    assert at_once(log, *([log.like(f"r{n}", 10 + n)] for n in range(4))) == [True] * 4
    assert set(log.ids) == {"there", "r0", "r1", "r2", "r3"}


def test_one_of_a_concurrent_roll_back_and_release_succeeds(tmp_path: Path, made: Release) -> None:
    for attempt in range(5):
        log = Log(str(tmp_path / str(attempt)), made)
        log.publish(log.like("19", 19), log.like("20", 20))
        roll_back = [log.like("back", 19, turn=2), log.like("gone", 20, turn=2, withdrawn=True)]
        appended = at_once(log, roll_back, [log.like("rival", 20, turn=2)])
        assert sorted(appended) == [False, True]
        assert set(log.ids) - {"19", "20"} == ({"back", "gone"} if appended[0] else {"rival"})


def test_concurrent_first_appends_to_a_new_table_all_succeed(tmp_path: Path, made: Release) -> None:
    rivals = 6
    for attempt in range(10):
        log = Log(str(tmp_path / str(attempt)), made)
        releases = [log.like(f"r{number}", 10 + number) for number in range(rivals)]
        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(rivals) as pool:
            together(patch, DeltaTable, "create", parties=rivals)
            assert list(pool.map(log.append, releases)) == [True] * rivals
        assert len(log.ids) == rivals


# --- records that retention replaces


def test_replace_keeps_records_that_were_appended_meanwhile(log: Log) -> None:
    kept, late = log.like("kept", 2, 1), log.like("late", 3, 2)
    log.publish(log.like("old", 1), kept)
    found = log.read()
    log.publish(late)
    retired = kept.model_copy(update={"retired_at": NOON})
    assert replace(STORAGE, found, [retired])
    assert log.releases == [retired, late]
    assert DeltaTable(f"{log.uri}/_releases").to_pyarrow_table().num_rows == 2
    # A turn stays taken after its record is removed.
    assert log.next_turn(1) == 3
    assert not log.append(log.like("again", 1, 3))


def test_one_of_a_concurrent_replace_and_append_of_a_date_is_refused(log: Log) -> None:
    old, other, late = log.like("old", 1), log.like("other", 2, 1), log.like("late", 1, 2, turn=2)
    log.publish(old, other)
    found, retired = log.read(), old.model_copy(update={"retired_at": NOON})
    log.publish(late)
    assert not replace(STORAGE, found, [retired, other])
    assert log.releases == [old, other, late]
    assert replace(STORAGE, log.read(), [retired, other, late])
    assert not log.append(log.like("later", 1, 3, turn=3))
    # Turns of unchanged dates stay free. ``turns`` takes the turn of a date without a record.
    second = log.like("second", 2, 3, turn=2)
    assert not log.append(second, turns={"2026-11-01": 3})
    assert log.append(second, turns={"2026-11-01": 4})
    assert not log.append(turns={"2026-11-01": 4})
    assert log.append(turns={"2026-11-01": 5})
    assert log.releases == [retired, other, late, second]
    assert log.next_turn(1) == 6


def test_the_second_of_two_concurrent_replaces_is_refused(log: Log) -> None:
    rows = [log.like(f"r{n}", n, n) for n in range(1, 4)]
    log.publish(*rows)
    first, second = log.read(), log.read()
    assert replace(STORAGE, first, rows[1:])
    assert not replace(STORAGE, second, rows[:2])
    assert log.releases == rows[1:]

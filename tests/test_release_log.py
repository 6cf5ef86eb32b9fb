"""The release log: where readers start, what is newest, and that a plan is published once."""

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import deltalake
import pytest
from deltalake import DeltaTable
from hypothesis import given
from hypothesis import strategies as st
from published import NOON, Meeting, Site, items

from pipeline import release_log
from pipeline.errors import UserError
from pipeline.release_log import append, find_release, newest, read_releases
from pipeline.storage import Storage
from schemas.release import Release

STORAGE = Storage()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release that was really published, to derive others from."""
    return Site(tmp_path_factory.mktemp("made")).publish(items(20))


def like(made: Release, name: str, *, ds: str, hour: int = 0, **changes: Any) -> Release:
    facts = {"release_id": name, "plan_id": f"plan of {name}", "ds": ds, "created_at": NOON + timedelta(hours=hour)}
    return made.model_copy(update=facts | changes)


def test_a_release_reads_back_as_it_was_written(tmp_path: Path, made: Release) -> None:
    full = like(
        made, "full", ds="2026-11-20", seconds={"encode": 1.5, "plan": 0.25}, tokens_per_second=12.5, drift=0.125,
        index_nprobe=8, supersedes="an older one", quarantine_uri="/x",
    )  # fmt: skip
    bare = like(
        made, "bare", ds="2026-11-21", hour=1, seconds={}, tokens_per_second=None, drift=None, index_nprobe=None,
        supersedes=None, quarantine_uri=None,
    )  # fmt: skip
    uri = str(tmp_path)
    assert append(STORAGE, uri, full)
    assert append(STORAGE, uri, bare)
    assert read_releases(STORAGE, uri) == [full, bare]


def test_releases_come_oldest_first_however_they_were_written(tmp_path: Path, made: Release) -> None:
    hours = [5, 1, 3, 2, 4]
    for hour in hours:
        append(STORAGE, str(tmp_path), like(made, f"r{hour}", ds=f"2026-11-{30 - hour}", hour=hour))
    assert [release.release_id for release in read_releases(STORAGE, str(tmp_path))] == ["r1", "r2", "r3", "r4", "r5"]


def test_there_are_no_releases_before_the_first(tmp_path: Path) -> None:
    assert read_releases(STORAGE, str(tmp_path)) == []
    assert read_releases(STORAGE, str(tmp_path / "nowhere")) == []
    assert newest([]) is None


def test_a_backfill_of_an_old_day_never_becomes_the_newest(made: Release) -> None:
    today = like(made, "today", ds="2026-11-20", hour=0)
    backfill = like(made, "backfill", ds="2026-11-01", hour=9)
    again = like(made, "again", ds="2026-11-01", hour=10)
    assert newest([today, backfill, again]) == today
    assert newest([today, backfill, again], ds="2026-11-01") == again
    assert newest([today, backfill, again], ds="2026-11-02") is None


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=12), st.integers(1, 6))
def test_the_newest_is_the_last_published_of_the_last_day(
    made: Release, drawn: list[tuple[int, int]], day: int
) -> None:
    releases = [like(made, f"r{n:02d}", ds=f"2026-11-0{d}", hour=h) for n, (d, h) in enumerate(drawn)]

    def last(of: list[Release]) -> Release | None:
        by_time = sorted(of, key=lambda r: r.release_id)
        by_time.sort(key=lambda r: r.created_at)
        return by_time[-1] if by_time else None

    days = sorted({release.ds for release in releases})
    assert newest(releases) == (last([r for r in releases if r.ds == days[-1]]) if days else None)
    ds = f"2026-11-0{day}"
    assert newest(iter(releases), ds=ds) == last([r for r in releases if r.ds == ds])


def test_a_release_is_found_by_id_by_day_or_as_the_newest(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, new, late = (
        like(made, "old", ds="2026-11-01"),
        like(made, "new", ds="2026-11-20", hour=1),
        like(made, "late", ds="2026-11-01", hour=2),
    )
    for release in (old, new, late):
        append(STORAGE, uri, release)
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
def test_a_release_that_is_not_there_is_refused_with_what_is_there(
    tmp_path: Path, made: Release, wanted: dict[str, str], message: str
) -> None:
    append(STORAGE, str(tmp_path), like(made, "old", ds="2026-11-01"))
    append(STORAGE, str(tmp_path), like(made, "new", ds="2026-11-20", hour=1))
    with pytest.raises(UserError) as refused:
        find_release(STORAGE, str(tmp_path), **wanted)
    assert str(refused.value) == message.format(uri=tmp_path)


def test_before_the_first_night_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no release at .* yet; the nightly run publishes one"):
        find_release(STORAGE, str(tmp_path), release_id="x")


def test_two_threads_that_append_the_same_plan_at_one_moment_make_one_release(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, like(made, "there already", ds="2026-11-01"))
    both_have_opened_the_log = Meeting(2)
    write = deltalake.write_deltalake

    def write_together(*arguments: Any, **named: Any) -> None:
        both_have_opened_the_log.wait()
        write(*arguments, **named)

    monkeypatch.setattr(release_log, "write_deltalake", write_together)
    rivals = [like(made, name, ds="2026-11-20", plan_id="the same plan") for name in ("one", "two")]
    with ThreadPoolExecutor(2) as pool:
        made_it = list(pool.map(lambda release: append(STORAGE, uri, release), rivals))
    assert sorted(made_it) == [False, True]
    published = [r.release_id for r in read_releases(STORAGE, uri) if r.ds == "2026-11-20"]
    assert published == [rivals[made_it.index(True)].release_id]


def test_releases_of_different_plans_may_be_appended_at_one_moment(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, like(made, "there already", ds="2026-11-01"))
    all_have_opened_the_log = Meeting(4)
    write = deltalake.write_deltalake

    def write_together(*arguments: Any, **named: Any) -> None:
        all_have_opened_the_log.wait()
        write(*arguments, **named)

    monkeypatch.setattr(release_log, "write_deltalake", write_together)
    with ThreadPoolExecutor(4) as pool:
        made_it = list(pool.map(lambda n: append(STORAGE, uri, like(made, f"r{n}", ds=f"2026-11-1{n}")), range(4)))
    assert made_it == [True] * 4
    assert {r.release_id for r in read_releases(STORAGE, uri)} == {"there already", "r0", "r1", "r2", "r3"}


def test_the_first_releases_of_a_new_table_may_come_at_once(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, rivals = DeltaTable.create, 6
    for attempt in range(10):
        uri, all_create = str(tmp_path / str(attempt)), Meeting(rivals)

        def create_together(*arguments: Any, meeting: Meeting = all_create, **named: Any) -> DeltaTable:
            meeting.wait()
            return create(*arguments, **named)

        def publish(number: int, uri: str = uri) -> bool:
            return append(STORAGE, uri, like(made, f"r{number}", ds=f"2026-11-1{number}"))

        monkeypatch.setattr(DeltaTable, "create", create_together)
        with ThreadPoolExecutor(rivals) as pool:
            assert list(pool.map(publish, range(rivals))) == [True] * rivals
        assert len(read_releases(STORAGE, uri)) == rivals


@pytest.mark.parametrize("folder", ["with blanks", "ü and #"])
def test_a_table_may_lie_in_a_folder_with_blanks_in_its_name(tmp_path: Path, made: Release, folder: str) -> None:
    uri = str(tmp_path / folder)
    append(STORAGE, uri, like(made, "r", ds="2026-11-20"))
    assert [release.release_id for release in read_releases(STORAGE, uri)] == ["r"]


def test_the_moment_of_publication_keeps_its_zone(tmp_path: Path, made: Release) -> None:
    append(STORAGE, str(tmp_path), like(made, "r", ds="2026-11-20"))
    created = read_releases(STORAGE, str(tmp_path))[0].created_at
    assert created == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert created.utcoffset() == timedelta(0)

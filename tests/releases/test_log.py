"""The release log: where readers start, what is newest, and that every turn of a day is taken once."""

import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import deltalake
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from hypothesis import given
from hypothesis import strategies as st

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
from marc_schemas.release import FORMAT_VERSION, OLDEST_FORMAT, RELEASES, IndexBuild, Release
from published import NOON, Meeting, Site, items
from release_cases import altered

STORAGE = Storage()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A release that was really published, to derive others from."""
    return Site(tmp_path_factory.mktemp("made")).publish(items(20))


def like(made: Release, name: str, *, ds: str, hour: int = 0, **changes: Any) -> Release:
    facts = {"release_id": name, "plan_id": f"plan of {name}", "ds": ds, "created_at": NOON + timedelta(hours=hour)}
    return altered(made, **(facts | {"turn": 1} | changes))


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
    uri = str(tmp_path)
    assert append(STORAGE, uri, [full])
    assert append(STORAGE, uri, [bare])
    assert read_releases(STORAGE, uri) == [full, bare]


def test_releases_come_oldest_first_however_they_were_written(tmp_path: Path, made: Release) -> None:
    hours = [5, 1, 3, 2, 4]
    for hour in hours:
        append(STORAGE, str(tmp_path), [like(made, f"r{hour}", ds=f"2026-11-{30 - hour}", hour=hour)])
    assert [release.release_id for release in read_releases(STORAGE, str(tmp_path))] == ["r1", "r2", "r3", "r4", "r5"]


def test_there_are_no_releases_before_the_first(tmp_path: Path) -> None:
    assert read_releases(STORAGE, str(tmp_path)) == []
    assert read_releases(STORAGE, str(tmp_path / "nowhere")) == []
    assert newest([]) is None


def test_a_backfill_of_an_old_day_never_becomes_the_newest(made: Release) -> None:
    today = like(made, "today", ds="2026-11-20", hour=0)
    backfill = like(made, "backfill", ds="2026-11-01", hour=9)
    # Clocks differ between machines: of one day, the turn counts.
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


def test_a_release_is_found_by_id_by_day_or_as_the_newest(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, new, late = (
        like(made, "old", ds="2026-11-01"),
        like(made, "new", ds="2026-11-20", hour=1),
        like(made, "late", ds="2026-11-01", hour=2, turn=2),
    )
    for release in (old, new, late):
        append(STORAGE, uri, [release])
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
    append(STORAGE, str(tmp_path), [like(made, "old", ds="2026-11-01")])
    append(STORAGE, str(tmp_path), [like(made, "new", ds="2026-11-20", hour=1)])
    with pytest.raises(UserError) as refused:
        find_release(STORAGE, str(tmp_path), **wanted)
    assert str(refused.value) == message.format(uri=tmp_path)


def test_before_the_first_night_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no release at .* yet; the nightly run publishes one"):
        find_release(STORAGE, str(tmp_path), release_id="x")


def test_two_threads_that_take_one_turn_at_one_moment_make_one_release(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "there already", ds="2026-11-01")])
    both_have_opened_the_log = Meeting(2)
    write = deltalake.write_deltalake

    def write_together(*arguments: Any, **named: Any) -> None:
        both_have_opened_the_log.wait()
        write(*arguments, **named)

    monkeypatch.setattr(release_log, "write_deltalake", write_together)
    rivals = [like(made, name, ds="2026-11-20") for name in ("one", "two")]
    with ThreadPoolExecutor(2) as pool:
        made_it = list(pool.map(lambda release: append(STORAGE, uri, [release]), rivals))
    assert sorted(made_it) == [False, True]
    published = [r.release_id for r in read_releases(STORAGE, uri) if r.ds == "2026-11-20"]
    assert published == [rivals[made_it.index(True)].release_id]


def test_releases_of_different_days_may_be_appended_at_one_moment(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "there already", ds="2026-11-01")])
    all_have_opened_the_log = Meeting(4)
    write = deltalake.write_deltalake

    def write_together(*arguments: Any, **named: Any) -> None:
        all_have_opened_the_log.wait()
        write(*arguments, **named)

    monkeypatch.setattr(release_log, "write_deltalake", write_together)
    with ThreadPoolExecutor(4) as pool:
        made_it = list(pool.map(lambda n: append(STORAGE, uri, [like(made, f"r{n}", ds=f"2026-11-1{n}")]), range(4)))
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
            return append(STORAGE, uri, [like(made, f"r{number}", ds=f"2026-11-1{number}")])

        monkeypatch.setattr(DeltaTable, "create", create_together)
        with ThreadPoolExecutor(rivals) as pool:
            assert list(pool.map(publish, range(rivals))) == [True] * rivals
        assert len(read_releases(STORAGE, uri)) == rivals


@pytest.mark.parametrize("folder", ["with blanks", "ü and #"])
def test_a_table_may_lie_in_a_folder_with_blanks_in_its_name(tmp_path: Path, made: Release, folder: str) -> None:
    uri = str(tmp_path / folder)
    append(STORAGE, uri, [like(made, "r", ds="2026-11-20")])
    assert [release.release_id for release in read_releases(STORAGE, uri)] == ["r"]


def test_the_moment_of_publication_keeps_its_zone(tmp_path: Path, made: Release) -> None:
    append(STORAGE, str(tmp_path), [like(made, "r", ds="2026-11-20")])
    created = read_releases(STORAGE, str(tmp_path))[0].created_at
    assert created == datetime(2026, 11, 20, 12, tzinfo=UTC)
    assert created.utcoffset() == timedelta(0)


# --- turns


def test_a_turn_that_is_taken_is_refused_and_the_next_one_is_free(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    assert read_log(STORAGE, uri).next_turn("2026-11-20") == 1
    assert append(STORAGE, uri, [like(made, "first", ds="2026-11-20")])
    assert read_log(STORAGE, uri).next_turn("2026-11-20") == 2
    assert read_log(STORAGE, uri).next_turn("2026-11-19") == 1
    assert not append(STORAGE, uri, [like(made, "late", ds="2026-11-20")])
    assert append(STORAGE, uri, [like(made, "second", ds="2026-11-20", turn=2)])
    assert not append(STORAGE, uri, [like(made, "much later", ds="2026-11-20")])
    assert [release.release_id for release in read_releases(STORAGE, uri)] == ["first", "second"]


@pytest.mark.parametrize("error", [CommitFailedError, DeltaError, OSError])
def test_an_append_whose_answer_was_lost_made_its_release(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    uri, write = str(tmp_path), deltalake.write_deltalake

    def answer_is_lost(*arguments: Any, **named: Any) -> None:
        write(*arguments, **named)
        raise error("the store took it, and nobody heard")

    monkeypatch.setattr(release_log, "write_deltalake", answer_is_lost)
    release = like(made, "ours", ds="2026-11-20")
    assert append(STORAGE, uri, [release])
    assert append(STORAGE, uri, [release])
    assert not append(STORAGE, uri, [like(made, "theirs", ds="2026-11-20")])
    assert read_releases(STORAGE, uri) == [release]


def test_a_store_that_never_takes_a_commit_is_an_error_in_the_end(
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


def test_releases_of_several_days_arrive_in_one_commit_or_not_at_all(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "there", ds="2026-11-20")])
    version = DeltaTable(f"{uri}/_releases").version()
    together = [like(made, "old", ds="2026-11-19"), like(made, "new", ds="2026-11-20")]
    assert not append(STORAGE, uri, together)
    assert [release.release_id for release in read_releases(STORAGE, uri)] == ["there"]
    # The day that was free stays free.
    assert read_log(STORAGE, uri).next_turn("2026-11-19") == 1
    together[1] = together[1].model_copy(update={"turn": 2})
    assert append(STORAGE, uri, together)
    assert DeltaTable(f"{uri}/_releases").version() == version + 1
    assert read_log(STORAGE, uri).next_turn("2026-11-19") == 2
    assert read_log(STORAGE, uri).next_turn("2026-11-20") == 3


def test_a_roll_back_and_a_release_at_one_moment_are_never_both_there(
    tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = deltalake.write_deltalake
    for attempt in range(5):
        uri, all_have_opened_the_log = str(tmp_path / str(attempt)), Meeting(2)
        append(STORAGE, uri, [like(made, "19", ds="2026-11-19")])
        append(STORAGE, uri, [like(made, "20", ds="2026-11-20")])

        def write_together(*arguments: Any, meeting: Meeting = all_have_opened_the_log, **named: Any) -> None:
            meeting.wait()
            write(*arguments, **named)

        roll_back = [
            like(made, "back", ds="2026-11-19", turn=2),
            like(made, "gone", ds="2026-11-20", turn=2, withdrawn=True),
        ]
        rivals = [roll_back, [like(made, "rival", ds="2026-11-20", turn=2)]]
        with monkeypatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(release_log, "write_deltalake", write_together)
            made_it = list(pool.map(lambda rows, uri=uri: append(STORAGE, uri, rows), rivals))  # type: ignore[misc]
        assert sorted(made_it) == [False, True]
        found = {release.release_id for release in read_releases(STORAGE, uri)} - {"19", "20"}
        assert found == ({"back", "gone"} if made_it[0] else {"rival"})


# --- what was withdrawn


def test_a_day_that_was_withdrawn_has_no_release_and_the_newest_is_an_earlier_one(
    tmp_path: Path, made: Release
) -> None:
    uri = str(tmp_path)
    old, new = like(made, "old", ds="2026-11-19"), like(made, "new", ds="2026-11-20", hour=1)
    gone = like(made, "gone", ds="2026-11-20", hour=2, turn=2, withdrawn=True)
    for release in (old, new, gone):
        append(STORAGE, uri, [release])
    assert find_release(STORAGE, uri) == old
    with pytest.raises(UserError, match=r"no release of 2026-11-20 at .*; there are 3 releases of 2026-11-19 to 2026"):
        find_release(STORAGE, uri, ds="2026-11-20")
    # What was withdrawn can still be named, the row that withdrew it says nothing about vectors.
    assert find_release(STORAGE, uri, release_id="new") == new
    with pytest.raises(UserError, match="release gone says that 2026-11-20 was withdrawn"):
        find_release(STORAGE, uri, release_id="gone")
    back = like(made, "back", ds="2026-11-20", hour=3, turn=3)
    append(STORAGE, uri, [back])
    assert find_release(STORAGE, uri) == back


# --- rows that retention replaces


def test_replaced_rows_leave_and_those_appended_meanwhile_stay(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    old, kept = like(made, "old", ds="2026-11-01"), like(made, "kept", ds="2026-11-02", hour=1)
    append(STORAGE, uri, [old])
    append(STORAGE, uri, [kept])
    found = read_log(STORAGE, uri)
    late = like(made, "late", ds="2026-11-03", hour=2)
    append(STORAGE, uri, [late])
    retired = kept.model_copy(update={"retired_at": NOON})
    assert replace(STORAGE, found, [retired])
    assert read_releases(STORAGE, uri) == [retired, late]
    assert rows_of(uri) == 2
    # A turn outlives its row: what was forgotten is not published again under the same number.
    assert read_log(STORAGE, uri).next_turn("2026-11-01") == 3
    assert not append(STORAGE, uri, [like(made, "again", ds="2026-11-01", hour=3)])


def test_of_a_date_that_is_retired_and_published_at_one_moment_one_must_look_again(
    tmp_path: Path, made: Release
) -> None:
    uri = str(tmp_path)
    old, other = like(made, "old", ds="2026-11-01"), like(made, "other", ds="2026-11-02", hour=1)
    append(STORAGE, uri, [old])
    append(STORAGE, uri, [other])
    found, retired = read_log(STORAGE, uri), old.model_copy(update={"retired_at": NOON})
    late = like(made, "late", ds="2026-11-01", hour=2, turn=2)
    assert append(STORAGE, uri, [late])
    assert not replace(STORAGE, found, [retired, other])
    assert read_releases(STORAGE, uri) == [old, other, late]
    found = read_log(STORAGE, uri)
    assert replace(STORAGE, found, [retired, other, late])
    assert not append(STORAGE, uri, [like(made, "later", ds="2026-11-01", hour=3, turn=3)])
    # Of a date that stays as it was, the turn is free; that of one which must stay is taken without a row.
    second = like(made, "second", ds="2026-11-02", hour=3, turn=2)
    assert not append(STORAGE, uri, [second], turns={"2026-11-01": 3})
    assert append(STORAGE, uri, [second], turns={"2026-11-01": 4})
    assert not append(STORAGE, uri, [], turns={"2026-11-01": 4})
    assert append(STORAGE, uri, [], turns={"2026-11-01": 5})
    assert read_releases(STORAGE, uri) == [retired, other, late, second]
    assert read_log(STORAGE, uri).next_turn("2026-11-01") == 6


def test_of_two_that_replace_rows_at_one_moment_one_must_look_again(tmp_path: Path, made: Release) -> None:
    uri = str(tmp_path)
    rows = [like(made, f"r{n}", ds=f"2026-11-0{n}", hour=n) for n in range(1, 4)]
    for row in rows:
        append(STORAGE, uri, [row])
    first, second = read_log(STORAGE, uri), read_log(STORAGE, uri)
    assert replace(STORAGE, first, rows[1:])
    assert not replace(STORAGE, second, rows[:2])
    assert read_releases(STORAGE, uri) == rows[1:]


def test_before_the_first_release_there_is_nothing_to_replace(tmp_path: Path) -> None:
    assert replace(STORAGE, read_log(STORAGE, str(tmp_path)), [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "remedy"), [(OLDEST_FORMAT - 1, "publish into a new table_uri"), (FORMAT_VERSION + 1, "upgrade .*")]
)
def test_a_log_of_an_unreadable_format_is_the_users_error(
    tmp_path: Path, made: Release, version: int, remedy: str
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "fine", ds="2026-11-01")])
    append(STORAGE, uri, [like(made, "odd", ds="2026-11-02", format_version=version)])
    with pytest.raises(UserError, match=f"release odd .* format {version}, .* reads formats .*; {remedy}$"):
        read_releases(STORAGE, uri)


# Fields with defaults, at the top, in a nested model and in the models of a list, stand for those of a later format.
ADDED = {"retired_at", "restores", "withdrawn", "tombstones", "blocks"}


def before_added(kind: pa.DataType) -> pa.DataType:
    """The type without the added fields, at any depth."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, before_added(field.type)) for field in kind if field.name not in ADDED])
    return pa.list_(before_added(kind.value_type)) if pa.types.is_list(kind) else kind


@pytest.fixture
def old_log(tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Release]]:
    """A log from before some fields were added, and its records as this program must read them."""
    monkeypatch.setattr(release_log, "FORMAT_VERSION", FORMAT_VERSION + 1)
    old = [like(made, f"r{n}", ds=f"2026-11-0{n}", hour=n) for n in (1, 2)]
    schema = pa.schema(list(before_added(pa.struct(list(RELEASES)))))
    rows = pa.Table.from_pylist([release.model_dump() for release in old], schema=schema)
    taken = CommitProperties(app_transactions=[Transaction(f"ds={release.ds}", 1) for release in old])
    write_deltalake(f"{tmp_path}/_releases", rows, commit_properties=taken)
    files = tuple(file.model_copy(update={"blocks": ""}) for file in made.table.files)
    bare = {
        "table__files": files,
        "index__files": tuple(file.model_copy(update={"blocks": ""}) for file in made.index.files),
        "index__queries_file__blocks": "",
        "bundle__card_file__blocks": "",
    }
    return str(tmp_path), [altered(release, format_version=FORMAT_VERSION + 1, **bare) for release in old]


def test_records_of_an_older_format_are_migrated(old_log: tuple[str, list[Release]]) -> None:
    uri, expected = old_log
    assert read_releases(STORAGE, uri) == expected
    assert find_release(STORAGE, uri).release_id == "r2"


def test_a_log_of_an_older_format_takes_new_records(old_log: tuple[str, list[Release]], made: Release) -> None:
    uri, expected = old_log
    late = like(made, "late", ds="2026-11-03", hour=3, restores="r1", format_version=FORMAT_VERSION + 1)
    assert append(STORAGE, uri, [late])
    assert read_releases(STORAGE, uri) == [*expected, late]
    assert columns_of(uri) == RELEASES.names
    assert not append(STORAGE, uri, [late.model_copy(update={"release_id": "later"})])


def test_records_of_an_older_format_are_replaced_by_migrated_ones(old_log: tuple[str, list[Release]]) -> None:
    uri, (first, second) = old_log
    retired = altered(first, retired_at=NOON)
    assert replace(STORAGE, read_log(STORAGE, uri), [retired, second])
    assert read_releases(STORAGE, uri) == [retired, second]
    assert columns_of(uri) == RELEASES.names


def test_a_log_of_the_same_format_keeps_its_schema(tmp_path: Path, made: Release) -> None:
    for number in (1, 2):
        append(STORAGE, str(tmp_path), [like(made, f"r{number}", ds=f"2026-11-0{number}")])
    # A changed schema would make commits at the same moment fail.
    commits = sorted((tmp_path / "_releases" / "_delta_log").glob("*.json"))
    assert ["metaData" in commit.read_text() for commit in commits] == [True, False, False]


def columns_of(uri: str) -> list[str]:
    """Columns of the log, as any Delta reader sees them, in the order of the model."""
    found = {field.name for field in DeltaTable(f"{uri}/_releases").schema().fields}
    return [name for name in RELEASES.names if name in found]

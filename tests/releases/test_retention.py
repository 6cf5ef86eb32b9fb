"""Retention: what is kept stays whole, what nobody needs goes, and a vacuum that died is finished by the next one."""

import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from hypothesis import given
from hypothesis import strategies as st

from example_counts import examples, slow
from marc_pipeline.config import AuditSettings, CatalogueSettings, IndexSettings, RetentionSettings, Settings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import PipelineError, ReleaseGone, Superseded, UserError
from marc_pipeline.nightly import publish as publishing
from marc_pipeline.nightly import stages
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases import retention
from marc_pipeline.releases.log import read_log, read_releases
from marc_pipeline.releases.retention import Removal, vacuum
from marc_pipeline.releases.roll_back import roll_back
from marc_pipeline.storage import STAGED_PREFIX, Storage, local
from marc_pipeline.table.commit import committed_files
from marc_schemas.release import Release
from published import BUCKETS, DS, Encoded, Meeting, Site, Vector, Vectors, in_buckets, items

LONG_AGO, YESTERDAY, TOMORROW = "2026-11-01", "2026-11-19", "2026-11-21"
VECTORS, OTHERS, THIRD = items(40), items(30, seed=1), items(35, seed=2)
GRACE = 24.0
# What may be left of a site that keeps as little as settings allow.
LEAST = RetentionSettings(days=1, releases_per_day=1, grace_hours=GRACE)
AT_ONCE = LEAST.model_copy(update={"grace_hours": 0.0})

Action = Callable[[], Any]


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rivals that met do not wait for long; and no power fails here, nobody waits for the disk."""
    monkeypatch.setattr(stages, "PUBLISH_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr(local, "_flush", lambda _: None)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


def after(hours: float) -> datetime:
    """So many hours from now: what a test has just written is that old by then."""
    return datetime.now(UTC) + timedelta(hours=hours)


def as_vacuumed(site: Site, kept: RetentionSettings = LEAST) -> Deployment:
    return Deployment(site.settings.model_copy(update={"retention": kept}), site.storage)


def sweep(site: Site, hours: float, kept: RetentionSettings = LEAST, *, dry_run: bool = False) -> Removal:
    """A vacuum so many hours from now."""
    return vacuum(as_vacuumed(site, kept), now=after(hours), dry_run=dry_run)


def log_of(site: Site) -> list[Release]:
    return read_releases(site.storage, site.table_uri)


def ids(*releases: Release) -> set[str]:
    return {one.release_id for one in releases}


def back(site: Site, to: Release) -> list[Release]:
    return roll_back(site.storage, site.table_uri, to.release_id)


def files(site: Site) -> dict[str, str]:
    """Every file's digest by its path; of Delta's and the release log's own files there are other tests."""
    found = {path for path in site.root.rglob("*") if path.is_file()}
    logs = {path for path in found if {"_delta_log", "_releases"} & set(path.parts)}
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found - logs}


def everything(site: Site) -> dict[str, tuple[int, str]]:
    """Every file there is, and every folder: when it was written, and what it holds."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in site.root.rglob("*")
    }


def files_of(site: Site, *releases: Release) -> set[str]:
    """What releases name, as paths."""
    table = {f"{site.table_uri}/{file.path}" for one in releases for file in one.table.files}
    return table | {f"{one.index.uri}/{f.path}" for one in releases for f in one.index.all_files}


def committed(site: Site, ds: str | None = None) -> set[str]:
    """Files of the Delta table's newest version, as paths."""
    return {f"{site.table_uri}/{path}" for path in committed_files(DeltaTable(site.table_uri), ds=ds)}


def rows_of(opened: OpenRelease) -> dict[str, list[float]]:
    """Vectors of a release by item, as its dataset gives them."""
    rows = opened.dataset().to_table(columns=["item_id", "vector"]).to_pylist()
    return {row["item_id"]: row["vector"] for row in rows}


def plain(vectors: Vectors) -> dict[str, list[float]]:
    return {item: vector.tolist() for item, vector in vectors.items()}


def assert_whole(site: Site, *releases: Release) -> None:
    for one in releases:
        assert verify(site.storage, one, table_uri=site.table_uri) == []


def assert_readable(site: Site, *releases: Release) -> None:
    """Each is in the log, as others than retention see it, and whole."""
    assert ids(*releases) <= ids(*log_of(site))
    assert_whole(site, *releases)


def one_changed(vectors: Vectors, bucket: int, seed: int = 7) -> dict[str, Vector]:
    """A bucket of which one item has another vector."""
    mine = in_buckets(vectors, bucket)
    return mine | {min(mine): next(iter(items(1, seed=seed).values()))}


def finished(site: Site, vectors: Vectors, *, ds: str = DS, plan_id: str) -> Encoded:
    """A plan that got as far as the release, and not there."""
    encoded = site.encoded(vectors, ds=ds, plan_id=plan_id)
    encoded.audit()
    encoded.index()
    return encoded


def dead_between_its_commits(site: Site, vectors: Vectors, *, ds: str = DS, plan_id: str) -> Encoded:
    """A run that died after the commit to the Delta table, before that to the release log."""
    encoded = finished(site, vectors, ds=ds, plan_id=plan_id)

    def die(*_: Any, **__: Any) -> bool:
        raise ConnectionError

    with pytest.MonkeyPatch.context() as patch, suppress(ConnectionError):
        patch.setattr(release_log, "append", die)
        encoded.release()
    assert committed(site, ds) == {f"{site.table_uri}/{one.file.path}" for one in encoded.receipts if one.file}
    return encoded


def written_by(encoded: Encoded) -> set[str]:
    """Every file of a plan: its table files, index and work area."""
    key = encoded.plan.plan_id[:16]
    return {path for path in files(encoded.site) if key in path}


def write_at(paths: set[str], moment: datetime) -> None:
    """Files as they would be, had they been written then."""
    for path in paths:
        os.utime(path, (moment.timestamp(), moment.timestamp()))


# --- releases: retired, and gone after the grace


def test_a_release_beyond_those_of_its_day_is_read_through_the_grace_and_gone_after_it(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    opened, idle = (
        open_release(site.table_uri, release_id=first.release_id),
        OpenRelease(first, uri=site.table_uri, storage=site.storage),
    )
    before, now = files(site), after(1)
    clock = partial(vacuum, as_vacuumed(site))

    assert clock(now=now) == Removal(retired=(first.release_id,), forgotten=(), files=(), bytes=0)
    assert log_of(site) == [first.model_copy(update={"retired_at": now}), second]
    assert clock(now=now + timedelta(hours=GRACE) - timedelta(microseconds=1)) == Removal((), (), (), 0)
    assert files(site) == before
    assert rows_of(opened) == plain(VECTORS)
    np.testing.assert_array_equal(opened.vectors(list(VECTORS)), np.stack(list(VECTORS.values())))
    # Who knows its id may still open it; nobody else comes upon it.
    assert rows_of(open_release(site.table_uri, release_id=first.release_id)) == plain(VECTORS)
    assert open_release(site.table_uri).facts == open_release(site.table_uri, ds=DS).facts == second

    done = clock(now=now + timedelta(hours=GRACE))
    assert (done.retired, done.forgotten) == ((), (first.release_id,))
    assert before.keys() - files(site).keys() == set(done.files)
    assert files_of(site, first) <= set(done.files)
    assert not files_of(site, second) & set(done.files)
    assert log_of(site) == [second]
    # What is mapped into memory is there as long as somebody holds it; nothing else is.
    np.testing.assert_array_equal(opened.vectors(["item-0"]), [VECTORS["item-0"]])
    for read in (opened.dataset, lambda: idle.vectors(["item-0"]), lambda: idle.search(VECTORS["item-0"])):
        with pytest.raises(ReleaseGone, match=f"release {first.release_id} of {DS} is gone: retention deleted it"):
            read()
    with pytest.raises(UserError, match=f"no release {first.release_id}"):
        open_release(site.table_uri, release_id=first.release_id)
    assert_whole(site, second)


def test_what_was_removed_is_as_large_as_it_says(site: Site) -> None:
    site.publish(VECTORS, plan_id="first")
    site.publish(OTHERS, plan_id="second")
    sizes = {path: Path(path).stat().st_size for path in files(site)}
    done = sweep(site, 1, AT_ONCE)
    gone = sizes.keys() - files(site).keys()
    assert len(gone) > BUCKETS
    assert done.bytes == sum(sizes[path] for path in gone)


def test_a_retired_release_cannot_be_rolled_back_to_and_a_kept_one_can(site: Site) -> None:
    first, second, third = (
        site.publish(vectors, plan_id=f"plan {number}") for number, vectors in enumerate((VECTORS, OTHERS, THIRD))
    )
    sweep(site, 1, LEAST.model_copy(update={"releases_per_day": 2}))
    with pytest.raises(UserError, match=f"release {first.release_id} was retired on"):
        back(site, first)
    assert open_release(site.table_uri).facts == third
    (made,) = back(site, second)
    assert made.retired_at is None
    assert rows_of(open_release(site.table_uri)) == plain(OTHERS)


def test_the_newest_releases_of_each_date_are_kept(site: Site) -> None:
    made = {
        ds: [site.publish(items(8, seed=number), ds=ds, plan_id=f"{ds} {number}") for number in range(3)]
        for ds in (YESTERDAY, DS)
    }
    for kept in (9, 3, 2, 1):
        before = {one.release_id for one in log_of(site) if one.retired_at is None}
        done = sweep(site, 1, RetentionSettings(releases_per_day=kept))
        newest = ids(*made[YESTERDAY][-kept:], *made[DS][-kept:])
        assert {one.release_id for one in log_of(site) if one.retired_at is None} == newest
        assert set(done.retired) == before - newest
        assert len(log_of(site)) == 6


def test_a_roll_back_is_the_newest_release_of_its_date_and_keeps_what_it_restored(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    (made,) = back(site, first)
    done = sweep(site, 1, AT_ONCE)
    assert set(done.forgotten) == ids(first, second)
    assert log_of(site) == [made]
    assert rows_of(open_release(site.table_uri)) == plain(VECTORS)
    assert not files_of(site, second) & files(site).keys()


def test_dates_beyond_the_newest_are_retired_also_when_they_are_published_last(site: Site) -> None:
    dates = ["2026-11-17", "2026-11-18", YESTERDAY, DS]
    made = {ds: site.publish(items(8, seed=n), ds=ds) for n, ds in enumerate(dates)}
    two = LEAST.model_copy(update={"days": 2})
    assert set(sweep(site, 1, two).retired) == ids(made[dates[0]], made[dates[1]])
    late = site.publish(VECTORS, ds=LONG_AGO)
    again = site.publish(VECTORS, ds=dates[0], plan_id="again")
    assert set(sweep(site, 2, two).retired) == ids(late, again)
    # Of a date that goes, readers see the release that they saw, as long as it is there.
    assert open_release(site.table_uri, ds=dates[1]).facts.release_id == made[dates[1]].release_id
    assert set(sweep(site, 40, two).forgotten) == ids(late, again, made[dates[0]], made[dates[1]])
    assert log_of(site) == [made[YESTERDAY], made[DS]]
    assert_whole(site, *log_of(site))
    assert committed(site) == files_of(site, *log_of(site)) - {
        path for path in files(site) if path.startswith(site.index_uri)
    }


@pytest.mark.parametrize("last", ["newest date", "older date", "roll-back"])
def test_what_readers_of_the_newest_date_see_is_never_given_up(site: Site, last: str) -> None:
    site.publish(THIRD, ds=YESTERDAY, plan_id="before")
    first = site.publish(VECTORS, plan_id="first")
    if last != "newest date":
        site.publish(OTHERS, plan_id="second")
    if last == "older date":
        site.publish(THIRD, ds=LONG_AGO, plan_id="late")
    if last == "roll-back":
        back(site, first)
    newest = open_release(site.table_uri)
    seen = rows_of(newest)
    for hours in (0, 1000):
        sweep(site, hours, AT_ONCE)
        assert log_of(site) == [newest.facts]
        assert rows_of(open_release(site.table_uri)) == rows_of(newest) == seen
        assert_whole(site, newest.facts)
        assert committed(site) == set(newest.files())


def test_a_withdrawn_date_newer_than_what_readers_see_can_be_brought_back(site: Site) -> None:
    long_ago = site.publish(THIRD, ds=LONG_AGO)
    live = site.publish(VECTORS, ds=YESTERDAY)
    replaced = site.publish(THIRD, ds=DS, plan_id="replaced")
    withdrawn = site.publish(OTHERS, ds=DS)
    back(site, live)
    for hours in (1, 1000):
        sweep(site, hours, AT_ONCE)
        assert open_release(site.table_uri).facts == live
        assert_readable(site, live, withdrawn)
    assert not ids(long_ago, replaced) & ids(*log_of(site))
    assert committed(site) == set(open_release(site.table_uri).files())
    back(site, withdrawn)
    assert open_release(site.table_uri).facts.ds == DS
    assert rows_of(open_release(site.table_uri)) == plain(OTHERS)
    assert committed(site, DS) == set(open_release(site.table_uri).files())


def test_a_withdrawn_date_takes_the_place_of_no_other(site: Site) -> None:
    kept = [site.publish(items(8, seed=n), ds=ds) for n, ds in enumerate((LONG_AGO, YESTERDAY))]
    site.publish(OTHERS, ds=DS)
    back(site, kept[1])
    assert sweep(site, 1, RetentionSettings(days=2)) == Removal((), (), (), 0)
    site.publish(THIRD, ds=TOMORROW)
    assert set(sweep(site, 1, RetentionSettings(days=2)).retired) == ids(kept[0])


def test_a_withdrawn_date_goes_with_its_withdrawal_when_it_is_old(site: Site) -> None:
    live = site.publish(VECTORS, ds=YESTERDAY)
    withdrawn = site.publish(OTHERS, ds=DS)
    (withdrawal,) = back(site, live)
    site.publish(THIRD, ds=TOMORROW)
    assert set(sweep(site, 1).retired) == ids(live, withdrawn, withdrawal)
    # As long as one of both is there, so is the other: the date does not come back by itself.
    with pytest.raises(UserError, match=f"no release of {DS}"):
        open_release(site.table_uri, ds=DS)
    assert set(sweep(site, 30).forgotten) == ids(live, withdrawn, withdrawal)
    assert [one.ds for one in log_of(site)] == [TOMORROW]
    assert not files_of(site, live, withdrawn) & files(site).keys()


def test_a_date_goes_on_counting_its_turns_after_its_releases_are_forgotten(site: Site) -> None:
    before = [site.publish(items(8, seed=n), ds=YESTERDAY, plan_id=f"plan {n}") for n in range(3)]
    site.publish(VECTORS)
    sweep(site, 1, AT_ONCE)
    assert [one.ds for one in log_of(site)] == [DS]
    made = site.publish(OTHERS, ds=YESTERDAY, plan_id="after all")
    assert made.supersedes is None
    assert made.turn > before[-1].turn
    assert_readable(site, made)


# --- files that several releases name


def test_files_that_two_releases_share_stay_as_long_as_one_of_them(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    new = one_changed(VECTORS, 1)
    second = site.publish(new, plan_id="second", chosen=(1,))
    shared = files_of(site, first) & files_of(site, second)
    assert len(shared) == BUCKETS - 1
    before = files(site)

    done = sweep(site, 1, AT_ONCE)
    assert done.forgotten == (first.release_id,)
    # Of the first plan only what its release alone named: its bucket, its index.
    assert set(done.files) == files_of(site, first) - shared
    assert files(site) == {path: digest for path, digest in before.items() if path not in done.files}
    assert rows_of(open_release(site.table_uri)) == plain(dict(VECTORS) | new)
    assert_readable(site, second)
    assert committed(site) == set(open_release(site.table_uri).files())

    third = site.publish(THIRD, plan_id="third")
    done = sweep(site, 1, AT_ONCE)
    assert shared < files_of(site, second) < set(done.files)
    # Nor is there any more of the two plans in the work area.
    plans = {path.name for path in (site.root / "work" / "plans").iterdir()}
    assert plans == {third.plan_id}
    assert_readable(site, third)


def test_shards_that_two_releases_share_stay_as_long_as_one_of_them(site: Site) -> None:
    settings = IndexSettings(factory="IVF2,Flat", shard_mib=1e-4, merge_mib=0, max_changed=1, max_drift=9)
    first = site.publish(VECTORS, plan_id="first", index=settings)
    second = site.publish(one_changed(VECTORS, 1), plan_id="second", chosen=(1,), base=first, index=settings)
    shared = set(first.index.files) & set(second.index.files)
    assert len(shared) == BUCKETS - 1
    done = sweep(site, 1, AT_ONCE)
    assert done.forgotten == (first.release_id,)
    assert not {f"{site.index_uri}/{file.path}" for file in shared} & set(done.files)
    assert f"{site.index_uri}/{first.index.files[1].path}" in done.files
    assert_readable(site, second)


def test_a_plan_that_was_published_twice_keeps_its_files(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    again = site.publish(VECTORS, plan_id="first")
    assert again.table.files == first.table.files
    assert set(sweep(site, 1, AT_ONCE).forgotten) == ids(first, second)
    assert_readable(site, again)
    assert site.workspace(again.plan_id).read_plan() is not None


def test_a_release_of_which_no_table_file_is_its_own_keeps_its_work_area(site: Site) -> None:
    site.publish(VECTORS, plan_id="first")
    emptying = site.encoded({}, plan_id="emptying", chosen=(1,))
    emptying.audit(AuditSettings(max_drift=10, max_deleted_fraction=1))
    emptying.index()
    made = emptying.release()
    assert not [file for file in made.table.files if made.plan_id[:16] in file.path]
    left = written_by(emptying)
    assert sweep(site, 1, AT_ONCE).files
    assert left <= files(site).keys()
    assert_readable(site, made)


# --- files of runs that died


# Of what is published as well: but for the plan, the index has the same name.
def encoded_only(site: Site) -> Encoded:
    return site.encoded(VECTORS, plan_id="dead")


def indexed(site: Site) -> Encoded:
    return finished(site, VECTORS, plan_id="dead")


def half_encoded(site: Site) -> Encoded:
    encoded = encoded_only(site)
    for bucket in (1, 3):
        Path(encoded.workspace.uri, "receipts", f"{bucket:05d}.json").unlink()
    return encoded


@pytest.mark.parametrize("reached", [encoded_only, half_encoded, indexed])
def test_a_run_that_died_leaves_nothing_after_the_grace(site: Site, reached: Callable[[Site], Encoded]) -> None:
    live = site.publish(VECTORS, plan_id="live")
    before = files(site)
    dead = reached(site)
    left = files(site).keys() - before.keys()
    assert left == written_by(dead)
    assert sweep(site, GRACE - 0.1) == Removal((), (), (), 0)
    assert files(site).keys() == before.keys() | left
    done = sweep(site, GRACE + 0.1)
    assert (done.retired, done.forgotten, set(done.files)) == ((), (), left)
    assert files(site) == before
    assert_readable(site, live)


def test_what_killed_writers_left_half_written_goes_after_the_grace(site: Site) -> None:
    live = site.publish(VECTORS)
    left = {
        Path(site.table_uri) / f"ds={DS}" / "bucket=1" / f"{STAGED_PREFIX}0a",
        Path(site.table_uri) / f"ds={TOMORROW}" / "bucket=0" / f"{STAGED_PREFIX}0b",
        Path(site.index_uri) / live.plan_id / f"{STAGED_PREFIX}0c",
        Path(site.index_uri) / ("f" * 32) / f"{STAGED_PREFIX}0d",
        site.root / "work" / "plans" / ("f" * 32) / "receipts" / f"{STAGED_PREFIX}0e",
    }
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    fresh = Path(site.table_uri) / f"ds={DS}" / "bucket=1" / f"{STAGED_PREFIX}0f"
    fresh.write_bytes(b"less")
    write_at({str(fresh)}, after(1))
    before = files(site).keys() - {str(path) for path in left}
    assert sweep(site, GRACE - 0.1).files == ()
    done = sweep(site, GRACE + 0.1)
    assert set(done.files) == {str(path) for path in left}
    assert done.bytes == 4 * len(left)
    assert files(site).keys() == before
    assert not (Path(site.table_uri) / f"ds={TOMORROW}").exists()
    assert_readable(site, live)


def test_before_the_first_release_what_a_dead_run_left_goes_as_well(site: Site) -> None:
    site.encoded(VECTORS, plan_id="only encoded")
    dead_between_its_commits(site, OTHERS, plan_id="nearly there")
    bundle = {path for path in files(site) if path.startswith(site.bundles_uri)}
    done = sweep(site, GRACE + 0.1)
    assert files(site).keys() == bundle
    assert len(done.files) > 2 * BUCKETS
    assert committed(site) == set()


@pytest.mark.parametrize(
    "fresh",
    [
        pytest.param(lambda run: {f"{run.workspace.uri}/receipts/00002.json"}, id="receipt"),
        pytest.param(lambda run: {path for path in written_by(run) if "/indexes/" in path}, id="index"),
        pytest.param(lambda run: {path for path in written_by(run) if "/bucket=2/" in path}, id="table"),
    ],
)
def test_a_run_that_wrote_lately_keeps_every_file(site: Site, fresh: Callable[[Encoded], set[str]]) -> None:
    site.publish(VECTORS, plan_id="live")
    working, dead = finished(site, OTHERS, plan_id="working"), finished(site, THIRD, plan_id="dead")
    before, now = files(site), after(0)
    write_at(written_by(working) | written_by(dead), now - timedelta(hours=GRACE + 6))
    write_at(fresh(working), now - timedelta(hours=GRACE - 1))
    done = vacuum(as_vacuumed(site), now=now)
    assert set(done.files) == {path for path in before if dead.plan.plan_id[:16] in path}
    assert files(site).keys() == before.keys() - set(done.files)
    assert_readable(site, working.release())


def strangers(site: Site) -> list[Path]:
    table, key = Path(site.table_uri), "0123456789abcdef"
    return [
        table / "README",
        table / "_SUCCESS",
        table / f"ds={DS}" / "bucket=1" / "notes.txt",
        table / f"ds={DS}" / "bucket=1" / "part-00000-c000.snappy.parquet",
        table / f"ds={DS}" / "bucket=1" / f"part-{key}-{key}.parquet.bak",
        table / "_delta_log" / "README",
        site.root / "README",
        site.root / "work" / "README",
        Path(site.bundles_uri) / "dead-bundle" / "bundle.json",
    ]


def test_what_is_not_ours_and_deltas_own_files_are_never_touched(site: Site) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    site.publish(OTHERS)
    for path in strangers(site):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    logs = {str(path) for name in ("_delta_log", "_releases") for path in site.root.rglob(f"{name}/**/*.*")}
    assert len(logs) > 4
    done = sweep(site, 1000, AT_ONCE)
    assert done.forgotten
    assert not {path for path in done.files if "_delta_log" in path or "_releases" in path}
    assert [path.read_text() for path in strangers(site)] == ["mine"] * len(strangers(site))
    assert all(Path(path).exists() for path in logs)


@pytest.mark.parametrize("name", ["README", "0123456789abcdef", "backup/index.faiss"])
@pytest.mark.parametrize("folder", ["indexes", "work/plans"])
def test_what_lies_beside_the_folders_of_the_plans_is_not_ours(site: Site, folder: str, name: str) -> None:
    site.publish(VECTORS)
    path = site.root / folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert sweep(site, 1000).files == ()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("live", ["of that date", "of another date"])
def test_what_a_dead_run_committed_leaves_the_newest_version_of_the_delta_table(site: Site, live: str) -> None:
    first = site.publish(VECTORS, ds=DS if live == "of that date" else YESTERDAY, plan_id="live")
    dead = dead_between_its_commits(site, OTHERS, plan_id="dead")
    version = DeltaTable(site.table_uri).version()
    sweep(site, GRACE - 0.1)
    assert DeltaTable(site.table_uri).version() == version
    done = sweep(site, GRACE + 0.1)
    assert not written_by(dead)
    assert committed(site) == set(open_release(site.table_uri).files())
    assert not committed(site) & set(done.files)
    rows = DeltaTable(site.table_uri).to_pyarrow_table().to_pylist()
    assert {row["item_id"]: row["vector"] for row in rows} == plain(VECTORS)
    assert_readable(site, first)
    made = site.publish(OTHERS, plan_id="dead")
    assert_readable(site, made)
    assert committed(site, DS) == {f"{site.table_uri}/{file.path}" for file in made.table.files}


def test_what_a_dead_run_committed_stays_while_a_release_names_it(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    dead_between_its_commits(site, VECTORS, plan_id="first")
    sweep(site, GRACE + 0.1, RetentionSettings())
    assert_readable(site, first, second)
    # The first one's files are no longer anybody's.
    sweep(site, GRACE + 0.1, AT_ONCE)
    assert committed(site) == set(open_release(site.table_uri).files())
    assert_readable(site, second)


# --- how a site may be named


def as_named(root: str) -> Deployment:
    catalogue = CatalogueSettings(uri=f"{root}/no-catalogue", template="{title}")
    return Deployment(Settings(catalogue=catalogue, root=root, retention=LEAST), Storage())


@pytest.mark.parametrize(
    "named",
    [
        pytest.param(lambda root: f"{root.parent}//{root.name}", id="two slashes"),
        pytest.param(lambda root: f"{root.parent}/./{root.name}", id="a dot"),
        pytest.param(lambda root: f"{root}/../{root.name}", id="up and down"),
        pytest.param(lambda root: str(root.parent / "link"), id="link"),
    ],
)
def test_a_site_that_is_named_in_another_way_loses_nothing(site: Site, named: Callable[[Path], str]) -> None:
    made = site.publish(VECTORS)
    (site.root.parent / "link").symlink_to(site.root)
    there, before = as_named(named(site.root)), files(site)
    opened = open_release(there.settings.table_uri)
    assert opened.search(VECTORS["item-3"], k=1)[0].tolist() == [["item-3"]]
    assert vacuum(there, now=after(1000)).files == ()
    assert files(site) == before
    assert_readable(site, made)


# --- a site with something of every kind


@dataclass(frozen=True)
class State:
    """What a vacuum leaves: the log's rows, the files, and the Delta table's newest version."""

    rows: tuple[Release, ...]
    files: dict[str, str]
    committed: set[str]


@dataclass(frozen=True)
class Busy:
    """A site where a vacuum retires, forgets, mends the Delta table and removes; it can be had as often as asked.

    Attributes:
        site: the site.
        copy: what it is brought back from.
        now: the moment of the vacuum.
        done: what an undisturbed vacuum said.
        end: what it left.
    """

    site: Site
    copy: Path
    now: datetime
    done: Removal
    end: State

    def restore(self) -> None:
        shutil.rmtree(self.site.root)
        shutil.copytree(self.copy, self.site.root)

    def vacuum(self, *, dry_run: bool = False) -> Removal:
        return vacuum(as_vacuumed(self.site), now=self.now, dry_run=dry_run)

    def state(self) -> State:
        return State(tuple(log_of(self.site)), files(self.site), committed(self.site))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Busy:
    root = tmp_path_factory.mktemp("busy")
    site = Site(root / "site")
    old = site.publish(THIRD, ds=LONG_AGO)
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(one_changed(VECTORS, 1), plan_id="second", chosen=(1,))
    assert set(sweep(site, 1).retired) == ids(old, first)
    third = site.publish(one_changed(VECTORS, 2), plan_id="third", chosen=(2,))
    withdrawn = site.publish(OTHERS, ds=TOMORROW)
    back(site, third)
    dead_between_its_commits(site, OTHERS, plan_id="dead")
    dead_between_its_commits(site, OTHERS, ds=YESTERDAY, plan_id="dead yesterday")
    site.encoded(THIRD, ds="2026-11-25", plan_id="dead early")
    (Path(site.table_uri) / f"ds={DS}" / "bucket=1" / f"{STAGED_PREFIX}0a").write_bytes(b"half")
    now = after(GRACE + 2)
    shutil.copytree(site.root, root / "copy")
    done = vacuum(as_vacuumed(site), now=now)
    assert (set(done.retired), set(done.forgotten)) == (ids(second), ids(old, first))
    busy = Busy(site, root / "copy", now, done, State((), {}, set()))
    assert_readable(site, third, withdrawn)
    return Busy(site, busy.copy, now, done, busy.state())


@pytest.fixture
def busy(prepared: Busy) -> Busy:
    prepared.restore()
    return prepared


def test_a_dry_run_changes_nothing_and_says_what_a_real_one_does(busy: Busy) -> None:
    before = everything(busy.site)
    said = busy.vacuum(dry_run=True)
    assert everything(busy.site) == before
    found = files(busy.site)
    sizes = {path: Path(path).stat().st_size for path in found}
    assert busy.vacuum() == said == busy.done
    assert set(said.files) == found.keys() - files(busy.site).keys()
    assert said.bytes == sum(sizes[path] for path in said.files)


def test_the_second_vacuum_does_nothing(busy: Busy) -> None:
    busy.vacuum()
    table, log = (DeltaTable(uri).version() for uri in (busy.site.table_uri, f"{busy.site.table_uri}/_releases"))
    assert busy.state() == busy.end
    assert busy.vacuum() == Removal((), (), (), 0)
    assert busy.state() == busy.end
    assert DeltaTable(busy.site.table_uri).version() == table
    assert DeltaTable(f"{busy.site.table_uri}/_releases").version() == log


@pytest.mark.parametrize("dry_run", [False, True])
def test_of_an_empty_site_nothing_is_made_and_nothing_removed(site: Site, dry_run: bool) -> None:
    assert sweep(site, 1000, AT_ONCE, dry_run=dry_run) == Removal((), (), (), 0)
    assert not site.root.exists()


def test_a_log_that_is_being_read_stays_there(site: Site) -> None:
    site.publish(VECTORS, plan_id="first")
    site.publish(OTHERS, plan_id="second")
    table = read_log(site.storage, site.table_uri).table
    assert table is not None
    wanted = table.to_pyarrow_table().num_rows
    assert sweep(site, 1000, AT_ONCE).forgotten
    assert table.to_pyarrow_table().num_rows == wanted == 2


def test_the_two_logs_are_shortened_and_say_what_they_said(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        site.publish(items(8, seed=number), plan_id=f"plan {number}")
    rows, held = log_of(site), committed(site)
    logs = [Path(site.table_uri) / "_delta_log", Path(site.table_uri) / "_releases" / "_delta_log"]
    write_at({str(path) for log in logs for path in log.iterdir()}, after(-24 * 60))
    monkeypatch.setattr(retention, "LOG_GRACE_HOURS", 0)
    write = [path for log in logs for path in log.glob("*.json")]
    assert sweep(site, 0, RetentionSettings(releases_per_day=3, grace_hours=0)).forgotten == (rows[0].release_id,)
    assert sum(path.exists() for path in write) <= len(logs)
    assert log_of(site) == rows[1:]
    assert committed(site) == held
    newest = DeltaTable(f"{site.table_uri}/_releases").file_uris()
    assert {path.name for path in logs[1].parent.glob("*.parquet")} == {Path(uri).name for uri in newest}
    made = site.publish(VECTORS)
    assert made.supersedes == rows[-1].release_id
    assert made.turn > rows[-1].turn


# --- killed at any moment


class Killed(BaseException):
    """The process ends here: nobody catches it."""


def kill(patch: pytest.MonkeyPatch, owner: object, name: str, *, call: int, done: bool) -> None:
    """Die in a call of something, before or after it has done its work; later calls as well."""
    ours, calls = getattr(owner, name), iter(range(1, 1000))

    def dying(*arguments: Any, **named: Any) -> Any:
        number = next(calls)
        if number < call or (number == call and done):
            ours(*arguments, **named)
        if number >= call:
            raise Killed

    patch.setattr(owner, name, dying)


MOMENTS = [
    (release_log, "replace", 1),
    (retention, "commit_day", 2),
    (Storage, "remove", 1),
    (Path, "unlink", 20),
    (DeltaTable, "create_checkpoint", 2),
]


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "call"), MOMENTS, ids=[f"{name} {call}" for _, name, call in MOMENTS])
def test_a_vacuum_that_is_killed_damages_nothing_and_is_finished_by_the_next(
    busy: Busy, owner: object, name: str, call: int, done: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        kill(patch, owner, name, call=call, done=done)
        busy.vacuum()
    assert_whole(busy.site, *(one for one in log_of(busy.site) if not one.withdrawn))
    assert committed(busy.site) <= files(busy.site).keys()
    busy.vacuum()
    assert busy.state() == busy.end


def test_files_that_cannot_be_removed_are_removed_by_the_next_vacuum(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = Storage.remove

    def remove_some(access: Storage, uris: Any) -> None:
        found = list(uris)
        ours(access, found[::2])
        raise OSError("some could not be deleted")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="some could not be deleted"):  # noqa: PT012
        patch.setattr(Storage, "remove", remove_some)
        busy.vacuum()
    assert_whole(busy.site, *(one for one in log_of(busy.site) if not one.withdrawn))
    left = tuple(uri for uri in busy.done.files if Path(uri).exists())
    assert 0 < len(left) < len(busy.done.files)
    done = busy.vacuum()
    assert (done.retired, done.forgotten, done.files) == ((), (), left)
    assert busy.state() == busy.end


def test_a_commit_to_the_log_whose_answer_was_lost_is_no_second_one_and_is_told(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = deltalake.write_deltalake

    def answer_is_lost(*arguments: Any, **named: Any) -> None:
        monkeypatch.setattr(release_log, "write_deltalake", write)
        write(*arguments, **named)
        raise CommitFailedError("the store took it, and nobody heard")

    monkeypatch.setattr(release_log, "write_deltalake", answer_is_lost)
    assert busy.vacuum() == busy.done
    assert busy.state() == busy.end


def test_a_vacuum_whose_log_is_always_written_by_others_gives_up_and_changes_nothing(
    busy: Busy, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(busy.site)
    monkeypatch.setattr(release_log, "replace", lambda *_: False)
    with pytest.raises(Superseded, match="other runs keep writing the release log"):
        busy.vacuum()
    assert everything(busy.site) == before


# --- beside others


MEETINGS = [(release_log, "replace"), (retention, "commit_day"), (Storage, "remove"), (DeltaTable, "vacuum")]


@pytest.mark.parametrize(("owner", "name"), MEETINGS, ids=[name for _, name in MEETINGS])
def test_two_vacuums_at_one_moment_leave_what_one_leaves(
    busy: Busy, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    both, ours = Meeting(2), getattr(owner, name)

    def together(*arguments: Any, **named: Any) -> Any:
        both.wait()
        return ours(*arguments, **named)

    monkeypatch.setattr(owner, name, together)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: busy.vacuum(), range(2)))
    monkeypatch.undo()
    assert busy.state() == busy.end
    assert set(done[0].files) | set(done[1].files) == set(busy.done.files)
    assert set(done[0].retired) | set(done[1].retired) == set(busy.done.retired)
    assert_whole(busy.site, *(one for one in log_of(busy.site) if not one.withdrawn))


def at_that_moment(
    patch: pytest.MonkeyPatch, owner: object, name: str, action: Action, *, ds: str | None = None
) -> list[Any]:
    """Do something before the first call of something else (for a date); what it gave."""
    ours: Any = getattr(owner, name)
    given: list[Any] = []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if ds in (None, named.get("ds")):
            patch.setattr(owner, name, ours)
            given.append(action())
        return ours(*arguments, **named)

    patch.setattr(owner, name, interrupted)
    return given


@pytest.mark.parametrize("chosen", [None, (1,)], ids=["whole", "bucket"])
@pytest.mark.parametrize(
    ("owner", "name", "ds"),
    [
        pytest.param(release_log, "replace", None, id="replace"),
        pytest.param(retention, "commit_day", DS, id="commit_day"),
        pytest.param(Storage, "remove", None, id="remove"),
    ],
)
def test_a_release_that_comes_in_the_middle_of_a_vacuum_is_whole_and_what_readers_see(
    busy: Busy,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    ds: str | None,
    chosen: tuple[int, ...] | None,
) -> None:
    content = THIRD if chosen is None else one_changed(VECTORS, 1, seed=8)
    # Its files are written now, and the vacuum is one of now: those of all others were written long before.
    write_at(set(files(busy.site)), busy.now - timedelta(hours=GRACE + 1))
    rival = partial(busy.site.publish, content, plan_id="rival", chosen=chosen)

    def publish() -> Release:
        made = rival()
        write_at({path for path in files(busy.site) if made.plan_id[:16] in path}, busy.now)
        return made

    made = at_that_moment(monkeypatch, owner, name, publish, ds=ds)
    busy.vacuum()
    assert_whole(busy.site, *(one for one in log_of(busy.site) if not one.withdrawn))
    opened = open_release(busy.site.table_uri)
    assert [opened.facts] == made
    assert committed(busy.site, DS) == set(opened.files())


@pytest.mark.parametrize(
    ("owner", "name"),
    [(publishing, "_require_files"), (publishing, "commit_day"), (publishing, "append")],
    ids=["_require_files", "commit_day", "append"],
)
def test_a_vacuum_in_the_middle_of_a_run_leaves_its_files(
    site: Site, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    site.publish(VECTORS, plan_id="live")
    working = finished(site, OTHERS, plan_id="working")
    dead = dead_between_its_commits(site, THIRD, plan_id="dead")
    left, now = written_by(dead), after(0)
    write_at(set(files(site)), now - timedelta(hours=GRACE + 1))
    working.workspace.write_seconds("audit", 1.0)
    done = at_that_moment(monkeypatch, owner, name, lambda: vacuum(as_vacuumed(site), now=now))
    made = working.release_on_top()
    assert [set(one.files) for one in done] == [left]
    assert_readable(site, made)
    assert rows_of(open_release(site.table_uri)) == plain(OTHERS)
    assert committed(site) == set(open_release(site.table_uri).files())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        pytest.param(publishing, "_require_files", id="_require_files"),
        pytest.param(publishing, "commit_day", id="commit_day"),
        pytest.param(publishing, "append", id="append"),
    ],
)
def test_a_release_stage_that_is_run_long_after_the_others_publishes_what_is_whole_or_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    live = site.publish(VECTORS, plan_id="live")
    late = finished(site, OTHERS, plan_id="late")
    write_at(set(files(site)), after(-GRACE - 1))
    at_that_moment(monkeypatch, owner, name, lambda: sweep(site, 0))
    with suppress(PipelineError):
        late.release_on_top()
    assert_readable(site, live)
    assert_whole(site, *log_of(site))


@pytest.mark.parametrize("call", range(4))
def test_a_run_that_comes_back_in_the_middle_of_a_vacuum_publishes_what_is_whole_or_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    live = site.publish(VECTORS, plan_id="live")
    late = finished(site, OTHERS, plan_id="late")
    write_at(set(files(site)), after(-GRACE - 1))
    ours, calls, made = Storage.remove, [], []

    def come_back() -> None:
        with suppress(PipelineError):
            made.append(late.release_on_top())

    def interrupted(access: Storage, uris: Any) -> None:
        calls.append(1)
        if len(calls) == call // 2 + 1 and call % 2 == 0:
            come_back()
        ours(access, uris)
        if len(calls) == call // 2 + 1 and call % 2 == 1:
            come_back()

    monkeypatch.setattr(Storage, "remove", interrupted)
    sweep(site, 0)
    assert len(calls) == 2
    # Before its plan is taken it lives, afterwards it is dead.
    assert len(made) == (call == 0)
    assert_readable(site, made[0] if made else live)
    assert_whole(site, *log_of(site))


def test_a_backfill_of_a_bucket_of_a_date_that_retention_takes_meanwhile_is_whole_or_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    live = site.publish(OTHERS)
    sweep(site, -GRACE - 1)
    write_at(set(files(site)), after(-GRACE - 2))
    some = site.encoded(one_changed(VECTORS, 1), ds=YESTERDAY, plan_id="some", chosen=(1,))
    some.audit()
    some.index()
    at_that_moment(monkeypatch, release_log, "append", lambda: sweep(site, 0))
    with suppress(PipelineError):
        some.release_on_top()
    assert_readable(site, live)
    assert_whole(site, *log_of(site))


@pytest.mark.parametrize("restored", ["what its date has", "what its date had"])
def test_what_was_rolled_back_to_while_retention_retired_it_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, restored: str
) -> None:
    wanted = site.publish(VECTORS, ds=YESTERDAY, plan_id="wanted")
    if restored == "what its date had":
        site.publish(THIRD, ds=YESTERDAY, plan_id="newer")
    site.publish(OTHERS)
    done = at_that_moment(monkeypatch, release_log, "append", lambda: sweep(site, 0))
    try:
        back(site, wanted)
    except PipelineError:
        expected = OTHERS
    else:
        expected = VECTORS
    assert wanted.release_id in done[0].retired
    for hours in (1, 100, 1000):
        sweep(site, hours)
        assert rows_of(open_release(site.table_uri)) == plain(expected)
        assert_whole(site, open_release(site.table_uri).facts)


@pytest.mark.parametrize("name", ["replace", "write_deltalake"])
def test_what_is_rolled_back_to_in_the_middle_of_a_vacuum_is_kept(
    site: Site, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted = site.publish(VECTORS, ds=YESTERDAY, plan_id="wanted")
    site.publish(OTHERS)
    made = at_that_moment(monkeypatch, release_log, name, lambda: back(site, wanted))
    for hours in (0, 1, 1000):
        sweep(site, hours)
        assert rows_of(open_release(site.table_uri)) == plain(VECTORS)
        assert_whole(site, open_release(site.table_uri).facts)
    assert len(made) == 1


def test_runs_and_vacuums_side_by_side_leave_every_release_of_the_log_whole(site: Site) -> None:
    given_up = [site.publish(VECTORS, ds=YESTERDAY), site.publish(VECTORS, plan_id="first")]
    site.publish(one_changed(VECTORS, 1), plan_id="second", chosen=(1,))
    assert set(sweep(site, -GRACE - 1).retired) == ids(*given_up)
    dead = dead_between_its_commits(site, OTHERS, plan_id="dead")
    left = files_of(site, given_up[0]) | written_by(dead)
    write_at(set(files(site)), after(-GRACE - 2))
    content = [(TOMORROW, VECTORS), (DS, THIRD), (TOMORROW, OTHERS), (YESTERDAY, VECTORS)]

    def publish() -> list[Release]:
        return [
            finished(site, found, ds=ds, plan_id=f"new {n}").release_on_top() for n, (ds, found) in enumerate(content)
        ]

    with ThreadPoolExecutor(3) as pool:
        vacuums = [pool.submit(lambda: [sweep(site, 0) for _ in range(4)]) for _ in range(2)]
        made = pool.submit(publish).result()
        forgotten = {name for one in vacuums for done in one.result() for name in done.forgotten}
    assert forgotten == ids(*given_up)
    assert not left & files(site).keys()
    assert_readable(site, *made)
    assert_whole(site, *log_of(site))
    assert open_release(site.table_uri).facts == made[2]
    sweep(site, 0)
    assert committed(site, TOMORROW) == set(open_release(site.table_uri).files())


# --- any sequence of events

DATES = [YESTERDAY, DS, TOMORROW]
events = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(DATES), st.integers(0, 2)),
        st.tuples(st.just("bucket"), st.sampled_from(DATES), st.integers(0, BUCKETS - 1)),
        st.tuples(st.just("back"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("die"), st.sampled_from(DATES), st.integers(3, 4)),
        st.tuples(st.just("vacuum"), st.integers(1, 3), st.integers(1, 2)),
        st.tuples(st.just("vacuum"), st.integers(1, 3), st.integers(1, 2)),
        st.tuples(st.just("wait"), st.sampled_from([1, 5, 20]), st.just(0)),
    ),
    min_size=6,
    max_size=12,
)


@dataclass
class Story:
    """A site and what there should be on it, step by step, on a clock of its own.

    Attributes:
        site: the site.
        grace: of every vacuum, hours.
        now: the clock.
        contents: items of each release by its id.
        seen: what readers of each date see, by date.
        turns: the last of each date.
        steps: how many there were.
    """

    site: Site
    grace: int
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    contents: dict[str, Vectors] = field(default_factory=dict)
    seen: dict[str, Release] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    def take(self, event: tuple[Any, ...]) -> None:
        self.steps += 1
        self.now += timedelta(minutes=1)
        before = self._written()
        getattr(self, event[0])(*event[1:])
        write_at({path for path, at in self._written().items() if before.get(path) != at}, self.now)

    def _written(self) -> dict[str, float]:
        return {path: Path(path).stat().st_mtime for path in files(self.site)}

    def publish(self, ds: str, version: int) -> None:
        vectors = items(16, seed=version)
        self._published(vectors, self.site.publish(vectors, ds=ds, plan_id=f"{ds} {version}"))

    def bucket(self, ds: str, bucket: int) -> None:
        if ds not in self.seen:
            self.publish(ds, 0)
            return
        before = self.contents[self.seen[ds].release_id]
        new = one_changed(before, bucket, seed=100 + self.steps)
        made = self.site.publish(new, ds=ds, plan_id=f"{ds} step {self.steps}", chosen=(bucket,))
        self._published({**before, **new}, made)

    def back(self, number: int, _: int) -> None:
        known = [one for one in log_of(self.site) if not one.withdrawn]
        if not known:
            return
        target = known[number % len(known)]
        if target.retired_at is not None:
            with pytest.raises(UserError, match="was retired"):
                back(self.site, target)
            return
        for made in back(self.site, target):
            if made.withdrawn:
                self.turns[made.ds] = made.turn
                del self.seen[made.ds]
            else:
                self._published(self.contents[target.release_id], made)

    def die(self, ds: str, version: int) -> None:
        dead_between_its_commits(self.site, items(16, seed=version), ds=ds, plan_id=f"{ds} {version}")

    def wait(self, hours: int, _: int) -> None:
        self.now += timedelta(hours=hours)

    def vacuum(self, days: int, per_day: int) -> None:
        kept = RetentionSettings(days=days, releases_per_day=per_day, grace_hours=self.grace)
        before = {one.release_id: one for one in log_of(self.site)}
        said = vacuum(as_vacuumed(self.site, kept), now=self.now, dry_run=True)
        found = files(self.site)
        done = vacuum(as_vacuumed(self.site, kept), now=self.now)
        assert done == said
        assert found.keys() - files(self.site).keys() == set(done.files)
        # What is kept, told from the outside: dates by what readers see, releases of a date by their turns.
        newest = sorted(self.seen)[-days:]
        for one in log_of(self.site):
            later = [two for two in before.values() if two.ds == one.ds and two.turn > one.turn and not two.withdrawn]
            beyond = bool(newest and one.ds < newest[0]) or len(later) + (not one.withdrawn) > per_day
            assert (one.retired_at is not None) == (beyond or before[one.release_id].retired_at is not None)
        for gone in done.forgotten:
            retired = before[gone].retired_at or self.now
            assert retired + timedelta(hours=self.grace) <= self.now
        self.seen = {ds: one for ds, one in self.seen.items() if one.release_id not in done.forgotten}
        assert newest[-1:] == sorted(self.seen)[-1:]
        lately = (self.now - timedelta(hours=self.grace)).timestamp()
        alive = {
            path.split("/plans/")[1][:16] for path, at in self._written().items() if "/plans/" in path and at >= lately
        }
        for path in files(self.site).keys() - files_of(self.site, *log_of(self.site)):
            if path.startswith((self.site.table_uri, self.site.index_uri)):
                assert any(plan in path for plan in alive)

    def _published(self, vectors: Vectors, made: Release) -> None:
        self.contents[made.release_id] = vectors
        if made.ds not in self.seen or self.seen[made.ds].release_id != made.release_id:
            assert made.turn > self.turns.get(made.ds, 0)
        self.turns[made.ds] = made.turn
        self.seen[made.ds] = made

    def check(self) -> None:
        """Every release that the log names is whole, and readers of each date see what was last given them."""
        found = {one.release_id: one for one in log_of(self.site)}
        for one in found.values():
            assert files_of(self.site, one) <= files(self.site).keys()
            assert one.withdrawn or rows_of(
                OpenRelease(one, uri=self.site.table_uri, storage=self.site.storage)
            ) == plain(self.contents[one.release_id])
        assert_whole(self.site, *(found[one.release_id] for one in self.seen.values()))
        live = release_log.live_releases(found.values())
        assert {ds: one.release_id for ds, one in live.items()} == {ds: one.release_id for ds, one in self.seen.items()}
        if self.seen:
            newest = open_release(self.site.table_uri)
            assert newest.facts.ds == max(self.seen)
            assert newest.facts.retired_at is None
            assert committed(self.site) <= files(self.site).keys()


@examples(1, of=4, database=None)
@given(grace=st.sampled_from([0, 6, 24]), story=events)
def test_whatever_happens_in_whatever_order_readers_have_what_they_should(
    tmp_path_factory: pytest.TempPathFactory, grace: int, story: list[tuple[Any, ...]]
) -> None:
    told = Story(Site(tmp_path_factory.mktemp("story") / "site"), grace)
    for event in story:
        told.take(event)
        told.check()


# --- what was seen at a moment


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_what_readers_saw_at_a_moment_is_found_as_long_as_it_is_known(site: Site, seed: int) -> None:
    """Against what a reader opened then; once retention forgets, the same or nothing, never another release."""
    days, draw = ["2026-11-18", "2026-11-19", "2026-11-20"], np.random.default_rng(seed)
    seen: list[tuple[datetime, dict[str | None, str]]] = []
    for turn in range(9):
        if turn > 2 and draw.random() < 0.3:
            back(site, log_of(site)[int(draw.integers(len(log_of(site))))])
        else:
            ds = days[int(draw.integers(len(days)))]
            site.publish(items(5, seed=turn), ds=ds, plan_id=f"{turn:032x}")
        live = release_log.live_releases(log_of(site))
        then: dict[str | None, str] = {ds: release.release_id for ds, release in live.items()}
        then[None] = open_release(site.table_uri).facts.release_id
        seen.append((max(release.created_at for release in log_of(site)), then))

    def found(moment: datetime, ds: str | None) -> str | None:
        try:
            return open_release(site.table_uri, ds=ds, at=moment).facts.release_id
        except ReleaseGone:
            return "gone"
        except UserError:
            return None

    for moment, then in seen:
        for ds in (None, *days):
            assert found(moment, ds) == then.get(ds)
            assert found(moment + timedelta(microseconds=1), ds) in {
                then.get(ds),
                *(later.get(ds) for _, later in seen),
            }
    assert found(seen[0][0] - timedelta(days=1), None) is None
    with pytest.raises(UserError, match="has no time zone"):
        open_release(site.table_uri, at=datetime(2026, 11, 20))
    with pytest.raises(UserError, match="not by both"):
        open_release(site.table_uri, release_id=seen[-1][1][None], at=seen[0][0])

    # Every date keeps its last release: of the others, an older date's could be taken for what was the newest.
    for hours in (0, 30, 60, 90):
        sweep(site, hours, LEAST.model_copy(update={"days": len(days)}))
    known = ids(*log_of(site))
    gone = 0
    for moment, then in seen:
        for ds in (None, *days):
            answer = found(moment, ds)
            assert answer in {then.get(ds), "gone", None}
            assert answer != "gone" or then.get(ds) not in known or ds is None
            gone += answer != then.get(ds)
    assert gone
    assert found(seen[-1][0], None) == seen[-1][1][None]

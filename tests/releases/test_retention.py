"""Retention: which releases and dates are kept, retired and forgotten, and files that several releases share."""

from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from day_content import OTHERS, THIRD, TOMORROW, VECTORS, YESTERDAY, plain
from marc_pipeline.config import AuditSettings, IndexSettings, RetentionSettings
from marc_pipeline.errors import ReleaseGone, UserError
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.releases.ownership import OWNER
from marc_pipeline.releases.retention import Removal, vacuum
from published import BUCKETS, DS, items
from vacuumed import AT_ONCE, GRACE, LEAST, VacuumedSite, after, ids, one_changed, vectors_of

pytestmark = pytest.mark.usefixtures("no_waiting")
LONG_AGO = "2026-11-01"


@pytest.fixture
def site(tmp_path: Path) -> VacuumedSite:
    return VacuumedSite(tmp_path / "site")


# --- releases are retired first, and forgotten after the grace period


def test_a_retired_release_can_be_read_during_the_grace_period_and_is_deleted_after_it(site: VacuumedSite) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    opened = open_release(site.table_uri, release_id=first.release_id)
    idle = OpenRelease(first, uri=site.table_uri, storage=site.storage)
    before, now = site.files(), after(1)
    clock = partial(vacuum, site.with_retention())

    assert clock(now=now) == Removal(retired=(first.release_id,), forgotten=(), files=(), bytes=0)
    assert site.log == [first.model_copy(update={"retired_at": now}), second]
    assert clock(now=now + timedelta(hours=GRACE) - timedelta(microseconds=1)) == Removal((), (), (), 0)
    assert site.files() == before
    assert vectors_of(opened) == plain(VECTORS)
    np.testing.assert_array_equal(opened.vectors(list(VECTORS)), np.stack(list(VECTORS.values())))
    # A retired release opens by its id only.
    assert vectors_of(open_release(site.table_uri, release_id=first.release_id)) == plain(VECTORS)
    assert open_release(site.table_uri).facts == open_release(site.table_uri, ds=DS).facts == second

    sizes = {path: Path(path).stat().st_size for path in before}
    done = clock(now=now + timedelta(hours=GRACE))
    assert (done.retired, done.forgotten) == ((), (first.release_id,))
    assert before.keys() - site.files().keys() == set(done.files)
    assert len(done.files) > BUCKETS
    assert done.bytes == sum(sizes[path] for path in done.files)
    assert site.files_of(first) <= set(done.files)
    assert not site.files_of(second) & set(done.files)
    assert site.log == [second]
    # Vectors that are mapped into memory stay readable; every other read fails.
    np.testing.assert_array_equal(opened.vectors(["item-0"]), [VECTORS["item-0"]])
    for read in (opened.dataset, lambda: idle.vectors(["item-0"]), lambda: idle.search(VECTORS["item-0"])):
        with pytest.raises(ReleaseGone, match=f"release {first.release_id} of {DS} is gone: retention deleted it"):
            read()
    with pytest.raises(UserError, match=f"no release {first.release_id}"):
        open_release(site.table_uri, release_id=first.release_id)
    site.assert_whole(second)


def test_a_roll_back_to_a_retired_release_is_refused_and_to_a_kept_one_allowed(site: VacuumedSite) -> None:
    first, second, third = (
        site.publish(vectors, plan_id=f"plan {number}") for number, vectors in enumerate((VECTORS, OTHERS, THIRD))
    )
    site.vacuum(1, LEAST.model_copy(update={"releases_per_day": 2}))
    with pytest.raises(UserError, match=f"release {first.release_id} was retired on"):
        site.roll_back(first)
    assert site.assert_live(THIRD) == third
    (made,) = site.roll_back(second)
    assert made.retired_at is None
    site.assert_live(OTHERS)


def test_the_newest_releases_of_each_date_are_kept(site: VacuumedSite) -> None:
    made = {
        ds: [site.publish(items(8, seed=number), ds=ds, plan_id=f"{ds} {number}") for number in range(3)]
        for ds in (YESTERDAY, DS)
    }
    for kept in (9, 3, 2, 1):
        before = {one.release_id for one in site.log if one.retired_at is None}
        done = site.vacuum(1, RetentionSettings(releases_per_day=kept))
        newest = ids(*made[YESTERDAY][-kept:], *made[DS][-kept:])
        assert {one.release_id for one in site.log if one.retired_at is None} == newest
        assert set(done.retired) == before - newest
        assert len(site.log) == 6


def test_dates_beyond_the_newest_are_retired_even_when_they_are_published_last(site: VacuumedSite) -> None:
    dates = ["2026-11-17", "2026-11-18", YESTERDAY, DS]
    made = {ds: site.publish(items(8, seed=n), ds=ds) for n, ds in enumerate(dates)}
    two = LEAST.model_copy(update={"days": 2})
    assert set(site.vacuum(1, two).retired) == ids(made[dates[0]], made[dates[1]])
    late = site.publish(VECTORS, ds=LONG_AGO)
    again = site.publish(VECTORS, ds=dates[0], plan_id="again")
    assert set(site.vacuum(2, two).retired) == ids(late, again)
    # Readers of a retired date see the same release until it is forgotten.
    assert open_release(site.table_uri, ds=dates[1]).facts.release_id == made[dates[1]].release_id
    assert set(site.vacuum(40, two).forgotten) == ids(late, again, made[dates[0]], made[dates[1]])
    assert site.log == [made[YESTERDAY], made[DS]]
    site.assert_whole()
    assert site.committed() == {path for path in site.files_of(*site.log) if not path.startswith(site.index_uri)}


@pytest.mark.parametrize("last", ["newest date", "older date", "roll-back"])
def test_the_live_release_of_the_newest_date_is_always_kept(site: VacuumedSite, last: str) -> None:
    data = (site.table_uri, site.index_uri)
    site.publish(THIRD, ds=YESTERDAY, plan_id="before")
    first = site.publish(VECTORS, plan_id="first")
    if last != "newest date":
        site.publish(OTHERS, plan_id="second")
    if last == "older date":
        site.publish(THIRD, ds=LONG_AGO, plan_id="late")
    if last == "roll-back":
        site.roll_back(first)
    before, newest = site.log, open_release(site.table_uri)
    for hours in (0, 1000):
        done = site.vacuum(hours, AT_ONCE)
        assert set(done.forgotten) == ids(*before) - ids(newest.facts)
        before = [newest.facts]
        assert [site.assert_live(OTHERS if last == "older date" else VECTORS)] == site.log == before
        assert vectors_of(newest) == vectors_of(open_release(site.table_uri))
        assert site.files_of(newest.facts) == {path for path in site.files() if path.startswith(data)}


# --- withdrawn dates


def test_a_withdrawn_date_newer_than_the_live_one_can_be_restored(site: VacuumedSite) -> None:
    long_ago = site.publish(THIRD, ds=LONG_AGO)
    live = site.publish(VECTORS, ds=YESTERDAY)
    replaced = site.publish(THIRD, ds=DS, plan_id="replaced")
    withdrawn = site.publish(OTHERS, ds=DS)
    site.roll_back(live)
    for hours in (1, 1000):
        site.vacuum(hours, AT_ONCE)
        assert site.assert_live(VECTORS) == live
        site.assert_readable(withdrawn)
    assert not ids(long_ago, replaced) & ids(*site.log)
    site.roll_back(withdrawn)
    assert site.assert_live(OTHERS, ds=DS).ds == DS


def test_a_withdrawn_date_does_not_count_towards_the_days_that_are_kept(site: VacuumedSite) -> None:
    kept = [site.publish(items(8, seed=n), ds=ds) for n, ds in enumerate((LONG_AGO, YESTERDAY))]
    site.publish(OTHERS, ds=DS)
    site.roll_back(kept[1])
    assert site.vacuum(1, RetentionSettings(days=2)) == Removal((), (), (), 0)
    site.publish(THIRD, ds=TOMORROW)
    assert set(site.vacuum(1, RetentionSettings(days=2)).retired) == ids(kept[0])


def test_an_old_withdrawn_date_is_retired_together_with_its_withdrawal(site: VacuumedSite) -> None:
    live = site.publish(VECTORS, ds=YESTERDAY)
    withdrawn = site.publish(OTHERS, ds=DS)
    (withdrawal,) = site.roll_back(live)
    site.publish(THIRD, ds=TOMORROW)
    assert set(site.vacuum(1).retired) == ids(live, withdrawn, withdrawal)
    # Release and withdrawal are forgotten together; otherwise the date would come back.
    with pytest.raises(UserError, match=f"no release of {DS}"):
        open_release(site.table_uri, ds=DS)
    assert set(site.vacuum(30).forgotten) == ids(live, withdrawn, withdrawal)
    assert [one.ds for one in site.log] == [TOMORROW]
    assert not site.files_of(live, withdrawn) & site.files().keys()


def test_turns_of_a_date_go_on_after_its_releases_are_forgotten(site: VacuumedSite) -> None:
    before = [site.publish(items(8, seed=n), ds=YESTERDAY, plan_id=f"plan {n}") for n in range(3)]
    site.publish(VECTORS)
    site.vacuum(1, AT_ONCE)
    assert [one.ds for one in site.log] == [DS]
    made = site.publish(OTHERS, ds=YESTERDAY, plan_id="after all")
    assert made.supersedes is None
    assert made.turn > before[-1].turn
    site.assert_readable(made)


# --- files that several releases share


def test_shared_table_files_are_kept_as_long_as_one_release_names_them(site: VacuumedSite) -> None:
    first = site.publish(VECTORS, plan_id="first")
    new = one_changed(VECTORS, 1)
    second = site.publish(new, plan_id="second", chosen=(1,))
    shared = site.files_of(first) & site.files_of(second)
    assert len(shared) == BUCKETS - 1
    before = site.files()

    done = site.vacuum(1, AT_ONCE)
    assert done.forgotten == (first.release_id,)
    # Only files that no other release names are deleted: one bucket, and the index.
    assert set(done.files) == site.files_of(first) - shared
    assert site.files() == {path: digest for path, digest in before.items() if path not in done.files}
    assert site.assert_live(dict(VECTORS) | new) == second

    third = site.publish(THIRD, plan_id="third")
    done = site.vacuum(1, AT_ONCE)
    assert shared < site.files_of(second) < set(done.files)
    # The work areas of both plans are deleted too.
    assert {path.name for path in (site.root / "work" / "plans").iterdir()} == {third.plan_id, OWNER}
    site.assert_readable(third)


def test_shared_index_shards_are_kept_as_long_as_one_release_names_them(site: VacuumedSite) -> None:
    settings = IndexSettings(factory="IVF2,Flat", shard_mib=1e-4, merge_mib=0, max_changed=1, max_drift=9)
    first = site.publish(VECTORS, plan_id="first", index=settings)
    second = site.publish(one_changed(VECTORS, 1), plan_id="second", chosen=(1,), base=first, index=settings)
    shared = set(first.index.files) & set(second.index.files)
    assert len(shared) == BUCKETS - 1
    done = site.vacuum(1, AT_ONCE)
    assert done.forgotten == (first.release_id,)
    assert not {f"{site.index_uri}/{file.path}" for file in shared} & set(done.files)
    assert f"{site.index_uri}/{first.index.files[1].path}" in done.files
    site.assert_readable(second)


def test_a_plan_that_was_published_twice_keeps_its_files(site: VacuumedSite) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    again = site.publish(VECTORS, plan_id="first")
    assert again.table.files == first.table.files
    assert set(site.vacuum(1, AT_ONCE).forgotten) == ids(first, second)
    site.assert_readable(again)
    assert site.workspace(again.plan_id).read_plan() is not None


def test_a_release_without_table_files_of_its_own_keeps_its_work_area(site: VacuumedSite) -> None:
    site.publish(VECTORS, plan_id="first")
    lax = AuditSettings(max_drift=10, max_deleted_fraction=1)
    made = site.publish({}, plan_id="emptying", chosen=(1,), audit=lax)
    assert not [file for file in made.table.files if made.plan_id[:16] in file.path]
    left = site.written_by(made)
    assert site.vacuum(1, AT_ONCE).files
    assert left <= site.files().keys()
    site.assert_readable(made)

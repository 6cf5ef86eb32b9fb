"""Roll back: an earlier release is published again, and later dates are withdrawn."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from day_content import OTHERS, THIRD, TOMORROW, VECTORS, YESTERDAY, held, plain
from interruptions import before, fail
from marc_pipeline.errors import CorruptFile, Superseded, UserError
from marc_pipeline.reader.release import open_release
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases import roll_back as rolling_back
from marc_pipeline.releases.log import newest, read_log
from marc_pipeline.releases.roll_back import roll_back
from marc_schemas.release import Release
from published import DS, NOON, Site, flip
from release_cases import altered


def facts_but(row: Release) -> dict[str, Any]:
    """The fields that a roll-back leaves unchanged."""
    own = {"release_id", "created_at", "turn", "supersedes", "restores", "withdrawn"}
    return row.at_version(0).model_dump(exclude=own)


def test_a_roll_back_within_a_date_publishes_the_earlier_release_again(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    (made,) = site.roll_back(first)
    assert facts_but(made) == facts_but(first)
    assert (made.restores, made.supersedes, made.turn) == (first.release_id, second.release_id, 3)
    assert made.release_id not in (first.release_id, second.release_id)
    assert site.log == [first, second, made]
    assert newest(site.log) == made
    assert held(site) == held(site, made.table.version) == plain(VECTORS)
    assert made.table.version == second.table.version + 1
    assert verify(site.storage, made, table_uri=site.table_uri) == []
    opened = open_release(site.table_uri)
    assert opened.search(VECTORS["item-3"], k=1)[0].tolist() == [["item-3"]]


def test_a_roll_back_to_the_live_release_changes_nothing(site: Site) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    live = site.publish(VECTORS)
    version = DeltaTable(site.table_uri).version()
    assert site.roll_back(live) == []
    assert DeltaTable(site.table_uri).version() == version
    site.publish(OTHERS, plan_id="second")
    (made,) = site.roll_back(live)
    # The restored release has two ids.
    assert site.roll_back(live) == site.roll_back(made) == []
    assert len(site.log) == 4


def test_a_roll_back_of_a_roll_back_names_the_release_that_was_first_restored(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    (made,) = site.roll_back(first)
    (undone,) = site.roll_back(second)
    assert (undone.restores, undone.supersedes) == (second.release_id, made.release_id)
    (again,) = site.roll_back(made)
    assert again.restores == first.release_id
    assert held(site) == plain(VECTORS)


def test_a_roll_back_to_an_earlier_date_withdraws_the_later_dates(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    today = site.publish(OTHERS)
    tomorrow = site.publish(THIRD, ds=TOMORROW)
    version = DeltaTable(f"{site.table_uri}/_releases").version()
    made = site.roll_back(old)
    assert DeltaTable(f"{site.table_uri}/_releases").version() == version + 1
    assert [(row.ds, row.withdrawn, row.supersedes, row.turn, row.restores) for row in made] == [
        (DS, True, today.release_id, 2, None),
        (TOMORROW, True, tomorrow.release_id, 2, None),
    ]
    emptied = [altered(row, counts__items=0, table__files=(), index__files=()) for row in (today, tomorrow)]
    assert [facts_but(row) for row in made] == [facts_but(row) for row in emptied]
    assert newest(site.log) == open_release(site.table_uri).facts == old
    for ds in (DS, TOMORROW):
        with pytest.raises(UserError, match=f"no release of {ds}"):
            open_release(site.table_uri, ds=ds)
        assert held(site, ds=ds) == {}
    assert held(site, ds=YESTERDAY) == plain(VECTORS)
    # No file was deleted: a withdrawn release can still be opened by its id.
    assert open_release(site.table_uri, release_id=tomorrow.release_id).dataset().count_rows() == 35
    assert site.roll_back(old) == []


def test_a_roll_back_to_a_withdrawn_release_publishes_its_date_again(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    today = site.publish(OTHERS)
    tomorrow = site.publish(THIRD, ds=TOMORROW)
    site.roll_back(old)
    (made,) = site.roll_back(tomorrow)
    assert facts_but(made) == facts_but(tomorrow)
    assert (made.restores, made.supersedes, made.turn, made.withdrawn) == (tomorrow.release_id, None, 3, False)
    assert newest(site.log) == made
    assert held(site, ds=TOMORROW) == plain(THIRD)
    # The date between stays withdrawn until a roll-back to it, which withdraws no earlier date.
    assert held(site) == {}
    between, later = site.roll_back(today)
    assert (between.ds, between.restores, later.ds, later.withdrawn) == (DS, today.release_id, TOMORROW, True)
    assert held(site) == plain(OTHERS)
    assert held(site, ds=YESTERDAY) == plain(VECTORS)


def test_the_next_run_of_a_withdrawn_date_publishes_it_again(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    today = site.publish(OTHERS, plan_id="today")
    site.roll_back(old)
    made = site.publish(OTHERS, plan_id="today")
    assert (made.turn, made.supersedes) == (3, None)
    assert made.table.files == today.table.files
    assert newest(site.log) == made


@pytest.mark.parametrize("harm", [lambda path: flip(path, 300), Path.unlink], ids=["flipped", "missing"])
@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda release: Path(release.table.uri) / release.table.files[1].path, id="table"),
        pytest.param(lambda release: Path(release.index.uri) / release.index.files[0].path, id="index"),
    ],
)
def test_a_roll_back_to_a_damaged_release_is_refused_and_changes_nothing(
    site: Site, damaged: Callable[[Release], Path], harm: Callable[[Path], None]
) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(VECTORS)
    log, version = site.log, DeltaTable(site.table_uri).version()
    harm(damaged(old))
    with pytest.raises(CorruptFile, match=f"release {old.release_id} is damaged; nothing was changed"):
        site.roll_back(old)
    assert site.log == log
    assert DeltaTable(site.table_uri).version() == version


def test_a_roll_back_to_an_unknown_withdrawn_or_retired_release_is_a_user_error(site: Site) -> None:
    with pytest.raises(UserError, match=r"no release nobody at "):
        roll_back(site.storage, site.table_uri, "nobody")
    old = site.publish(VECTORS, ds=YESTERDAY)
    live = site.publish(VECTORS)
    (withdrawal,) = site.roll_back(old)
    log = site.log
    for release_id in ("nobody", withdrawal.release_id):
        with pytest.raises(UserError, match=f"no release {release_id} at .*; see `marc releases`"):
            roll_back(site.storage, site.table_uri, release_id)
    assert site.log == log
    retired = live.model_copy(update={"retired_at": NOON})
    kept = [old, retired, withdrawal]
    assert release_log.replace(site.storage, read_log(site.storage, site.table_uri), kept)
    with pytest.raises(UserError, match=f"release {live.release_id} was retired on 2026-11-20 12:00"):
        site.roll_back(live)
    assert site.log == kept


def test_the_next_roll_back_finishes_one_that_died(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first = site.publish(VECTORS, ds=YESTERDAY, plan_id="first")
    site.publish(OTHERS, ds=YESTERDAY, plan_id="second")
    today = site.publish(THIRD)
    log = site.log
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):  # noqa: PT012
        fail(patch, rolling_back, "append")
        site.roll_back(first)
    # Readers follow the log, so they still see the newest release.
    assert site.log == log
    assert open_release(site.table_uri).facts == today
    assert open_release(site.table_uri).dataset().count_rows() == 35
    version = DeltaTable(site.table_uri).version()
    restored, withdrawn = site.roll_back(first)
    assert DeltaTable(site.table_uri).version() == version
    # One roll-back restores its date and withdraws the later one.
    assert (restored.ds, restored.withdrawn, restored.restores) == (YESTERDAY, False, first.release_id)
    assert (withdrawn.ds, withdrawn.withdrawn) == (DS, True)
    assert newest(site.log) == restored
    assert held(site, ds=YESTERDAY) == plain(VECTORS)
    assert held(site) == {}


def test_a_roll_back_supersedes_a_concurrent_release(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(OTHERS, plan_id="first")
    rivals = before(monkeypatch, rolling_back, "append", lambda: site.publish(THIRD, plan_id="rival"))
    (withdrawn,) = site.roll_back(old)
    assert (withdrawn.supersedes, withdrawn.turn) == (rivals[0].release_id, 3)
    assert newest(site.log) == old
    assert held(site) == {}


def test_a_roll_back_that_other_runs_always_overtake_is_superseded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(VECTORS)
    monkeypatch.setattr(rolling_back, "append", lambda *_, **__: False)
    with pytest.raises(Superseded, match="other runs"):
        site.roll_back(old)

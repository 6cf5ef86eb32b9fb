"""Vacuums that are killed, fail or run beside runs, roll-backs and other vacuums."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from day_content import OTHERS, THIRD, TOMORROW, VECTORS, YESTERDAY, plain
from interruptions import before, lose_answers, together
from marc_pipeline.errors import PipelineError, Superseded
from marc_pipeline.nightly import publish as publishing
from marc_pipeline.reader.release import open_release
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases import roll_back as rolling_back
from marc_pipeline.releases.retention import Removal, vacuum
from marc_pipeline.storage import STAGED_PREFIX, Storage
from marc_schemas.release import Release
from published import DS
from vacuumed import GRACE, LONG_AGO, VacuumedSite, after, ids, one_changed, vectors_of, write_at

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def site(tmp_path: Path) -> VacuumedSite:
    return VacuumedSite(tmp_path / "site")


@dataclass(frozen=True)
class Busy:
    """A site with work for every step of a vacuum at the time ``now``, a copy of it, and that vacuum's results."""

    site: VacuumedSite
    copy: Path
    now: datetime
    done: Removal
    end: tuple[object, ...]

    def restore(self) -> None:
        shutil.rmtree(self.site.root)
        shutil.copytree(self.copy, self.site.root)

    def vacuum(self, *, dry_run: bool = False) -> Removal:
        return vacuum(self.site.with_retention(), now=self.now, dry_run=dry_run)

    def assert_finished(self) -> None:
        assert state_of(self.site) == self.end


def state_of(site: VacuumedSite) -> tuple[object, ...]:
    return site.log, site.files(), site.committed()


def everything(site: VacuumedSite) -> dict[str, tuple[int, str]]:
    """Modification time and SHA-256 of every file and folder."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in site.root.rglob("*")
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Busy:
    root = tmp_path_factory.mktemp("busy")
    site = VacuumedSite(root / "site")
    old = site.publish(THIRD, ds="2026-11-01")
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(one_changed(VECTORS, 1), plan_id="second", chosen=(1,))
    assert set(site.vacuum(1).retired) == ids(old, first)
    third = site.publish(one_changed(VECTORS, 2), plan_id="third", chosen=(2,))
    withdrawn = site.publish(OTHERS, ds=TOMORROW)
    site.roll_back(third)
    site.dead_run(OTHERS, plan_id="dead")
    site.dead_run(OTHERS, ds=YESTERDAY, plan_id="dead yesterday")
    site.encoded(THIRD, ds="2026-11-25", plan_id="dead early")
    (Path(site.table_uri) / f"ds={DS}" / "bucket=1" / f"{STAGED_PREFIX}0a").write_bytes(b"half")
    now = after(GRACE + 2)
    shutil.copytree(site.root, root / "copy")
    done = vacuum(site.with_retention(), now=now)
    assert (set(done.retired), set(done.forgotten)) == (ids(second), ids(old, first))
    site.assert_readable(third, withdrawn)
    return Busy(site, root / "copy", now, done, state_of(site))


@pytest.fixture
def busy(prepared: Busy) -> Busy:
    prepared.restore()
    return prepared


def test_a_dry_run_changes_nothing_and_reports_the_removals_of_a_real_run(busy: Busy) -> None:
    at_first = everything(busy.site)
    report = busy.vacuum(dry_run=True)
    assert everything(busy.site) == at_first
    sizes = {path: Path(path).stat().st_size for path in busy.site.files()}
    assert busy.vacuum() == report == busy.done
    assert set(report.files) == sizes.keys() - busy.site.files().keys()
    assert report.bytes == sum(sizes[path] for path in report.files)


def test_a_second_vacuum_does_nothing(busy: Busy) -> None:
    busy.vacuum()
    tables = (busy.site.table_uri, f"{busy.site.table_uri}/_releases")
    versions = [DeltaTable(uri).version() for uri in tables]
    busy.assert_finished()
    assert busy.vacuum() == Removal((), (), (), 0)
    busy.assert_finished()
    assert [DeltaTable(uri).version() for uri in tables] == versions


# --- a vacuum that is killed or fails


class Killed(BaseException):
    """Stands for the end of the process; no code catches it."""


def kill(patch: pytest.MonkeyPatch, owner: object, name: str, *, call: int, done: bool) -> None:
    """Raise at one call of a function and at every later one; ``done``: after that call has finished."""
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
    (release_log, "commit_day", 2),
    (Storage, "remove", 1),
    (Path, "unlink", 20),
    (DeltaTable, "create_checkpoint", 2),
]


@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "name", "call"), MOMENTS, ids=[f"{name} {call}" for _, name, call in MOMENTS])
def test_the_next_vacuum_finishes_a_killed_one(busy: Busy, owner: object, name: str, call: int, done: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        kill(patch, owner, name, call=call, done=done)
        busy.vacuum()
    busy.site.assert_whole()
    assert busy.site.committed() <= busy.site.files().keys()
    busy.vacuum()
    busy.assert_finished()


def test_the_next_vacuum_deletes_files_that_could_not_be_deleted(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Storage.remove

    def remove_some(access: Storage, uris: Any) -> None:
        ours(access, list(uris)[::2])
        raise OSError("some could not be deleted")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="some could not be deleted"):  # noqa: PT012
        patch.setattr(Storage, "remove", remove_some)
        busy.vacuum()
    busy.site.assert_whole()
    left = tuple(uri for uri in busy.done.files if Path(uri).exists())
    assert 0 < len(left) < len(busy.done.files)
    done = busy.vacuum()
    assert (done.retired, done.forgotten, done.files) == ((), (), left)
    busy.assert_finished()


def test_a_commit_whose_answer_was_lost_is_made_once(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_answers(monkeypatch, once=True)
    assert busy.vacuum() == busy.done
    busy.assert_finished()


def test_a_vacuum_that_cannot_write_the_log_changes_nothing(busy: Busy, monkeypatch: pytest.MonkeyPatch) -> None:
    at_first = everything(busy.site)
    monkeypatch.setattr(release_log, "replace", lambda *_: False)
    with pytest.raises(Superseded, match="other runs keep writing the release log"):
        busy.vacuum()
    assert everything(busy.site) == at_first


# --- a vacuum beside others

during_release = pytest.mark.parametrize("step", ["_require_files", "commit_day", "append"])


@pytest.mark.parametrize(
    ("owner", "name"),
    [(release_log, "replace"), (release_log, "commit_day"), (Storage, "remove"), (DeltaTable, "vacuum")],
    ids=["replace", "commit_day", "remove", "vacuum"],
)
def test_two_concurrent_vacuums_end_in_the_state_of_one(
    busy: Busy, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    together(monkeypatch, owner, name)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: busy.vacuum(), range(2)))
    monkeypatch.undo()
    busy.assert_finished()
    assert set(done[0].files) | set(done[1].files) == set(busy.done.files)
    assert set(done[0].retired) | set(done[1].retired) == set(busy.done.retired)
    busy.site.assert_whole()


@pytest.mark.parametrize("chosen", [None, (1,)], ids=["whole", "bucket"])
@pytest.mark.parametrize(
    ("owner", "name", "ds"),
    [(release_log, "replace", None), (release_log, "commit_day", DS), (Storage, "remove", None)],
    ids=["replace", "commit_day", "remove"],
)
def test_a_release_that_is_published_during_a_vacuum_is_whole_and_live(
    busy: Busy, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, ds: str | None, chosen: tuple[int] | None
) -> None:
    content = THIRD if chosen is None else one_changed(VECTORS, 1, seed=8)
    # The new release's files get the time of the vacuum; all other files are older than the grace period.
    busy.site.claimed_at(LONG_AGO)
    write_at(set(busy.site.files()), busy.now - timedelta(hours=GRACE + 1))

    def publish() -> Release:
        made = busy.site.publish(content, plan_id="rival", chosen=chosen)
        write_at(busy.site.written_by(made), busy.now)
        return made

    made = before(monkeypatch, owner, name, publish, ds=ds)
    busy.vacuum()
    busy.site.assert_whole()
    opened = open_release(busy.site.table_uri)
    assert [opened.facts] == made
    assert busy.site.committed(DS) == set(opened.files())


@during_release
def test_a_vacuum_during_a_release_stage_keeps_the_files_of_a_working_run(
    site: VacuumedSite, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    site.publish(VECTORS, plan_id="live")
    working = site.prepared(OTHERS, plan_id="working")
    dead = site.dead_run(THIRD, plan_id="dead")
    left, now = site.written_by(dead), after(0)
    site.claimed_at(LONG_AGO)
    write_at(set(site.files()), now - timedelta(hours=GRACE + 1))
    working.workspace.write_seconds("audit", 1.0)
    done = before(monkeypatch, publishing, step, lambda: vacuum(site.with_retention(), now=now))
    made = working.release_on_top()
    assert [set(one.files) for one in done] == [left]
    assert site.assert_live(OTHERS) == made


@during_release
def test_a_late_release_stage_publishes_a_whole_release_or_none(
    site: VacuumedSite, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    live = site.publish(VECTORS, plan_id="live")
    late = site.prepared(OTHERS, plan_id="late")
    site.claimed_at(LONG_AGO)
    write_at(set(site.files()), after(-GRACE - 1))
    before(monkeypatch, publishing, step, lambda: site.vacuum(0))
    with suppress(PipelineError):
        late.release_on_top()
    site.assert_readable(live)
    site.assert_whole()


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_a_late_run_during_the_deletions_publishes_a_whole_release_or_none(
    site: VacuumedSite, monkeypatch: pytest.MonkeyPatch, call: int, done: bool
) -> None:
    live = site.publish(VECTORS, plan_id="live")
    late = site.prepared(OTHERS, plan_id="late")
    site.claimed_at(LONG_AGO)
    write_at(set(site.files()), after(-GRACE - 1))
    ours, calls, made = Storage.remove, [], []

    def release() -> None:
        with suppress(PipelineError):
            made.append(late.release_on_top())

    def interrupted(access: Storage, uris: Any) -> None:
        calls.append(1)
        steps = [partial(ours, access, uris)]
        if len(calls) == call:
            steps.insert(done, release)
        for step in steps:
            step()

    monkeypatch.setattr(Storage, "remove", interrupted)
    site.vacuum(0)
    assert len(calls) == 2
    # The run can publish only before its plan is deleted.
    assert len(made) == (call == 1 and not done)
    site.assert_readable(made[0] if made else live)
    site.assert_whole()


def test_a_backfill_of_a_bucket_of_a_date_that_is_deleted_meanwhile_is_whole_or_refused(
    site: VacuumedSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    live = site.publish(OTHERS)
    site.vacuum(-GRACE - 1)
    site.claimed_at(LONG_AGO)
    write_at(set(site.files()), after(-GRACE - 2))
    some = site.prepared(one_changed(VECTORS, 1), ds=YESTERDAY, plan_id="some", chosen=(1,))
    before(monkeypatch, publishing, "append", lambda: site.vacuum(0))
    with suppress(PipelineError):
        some.release_on_top()
    site.assert_readable(live)
    site.assert_whole()


@pytest.mark.parametrize("restored", ["live release of its date", "earlier release of its date"])
def test_a_release_that_is_retired_during_a_roll_back_to_it_is_kept(
    site: VacuumedSite, monkeypatch: pytest.MonkeyPatch, restored: str
) -> None:
    wanted = site.publish(VECTORS, ds=YESTERDAY, plan_id="wanted")
    if restored == "earlier release of its date":
        site.publish(THIRD, ds=YESTERDAY, plan_id="newer")
    site.publish(OTHERS)
    done = before(monkeypatch, rolling_back, "append", lambda: site.vacuum(0))
    try:
        site.roll_back(wanted)
    except PipelineError:
        expected = OTHERS
    else:
        expected = VECTORS
    assert wanted.release_id in done[0].retired
    for hours in (1, 100, 1000):
        site.vacuum(hours)
        live = open_release(site.table_uri)
        assert vectors_of(live) == plain(expected)
        site.assert_whole(live.facts)


@pytest.mark.parametrize("name", ["replace", "write_deltalake"])
def test_a_roll_back_during_a_vacuum_keeps_its_goal(
    site: VacuumedSite, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    wanted = site.publish(VECTORS, ds=YESTERDAY, plan_id="wanted")
    site.publish(OTHERS)
    made = before(monkeypatch, release_log, name, lambda: site.roll_back(wanted))
    for hours in (0, 1, 1000):
        site.vacuum(hours)
        site.assert_live(VECTORS, ds=YESTERDAY)
    assert len(made) == 1


def test_concurrent_runs_and_vacuums_leave_every_release_whole(site: VacuumedSite) -> None:
    given_up = [site.publish(VECTORS, ds=YESTERDAY), site.publish(VECTORS, plan_id="first")]
    site.publish(one_changed(VECTORS, 1), plan_id="second", chosen=(1,))
    assert set(site.vacuum(-GRACE - 1).retired) == ids(*given_up)
    dead = site.dead_run(OTHERS, plan_id="dead")
    left = site.files_of(given_up[0]) | site.written_by(dead)
    site.claimed_at(LONG_AGO)
    write_at(set(site.files()), after(-GRACE - 2))
    content = [(TOMORROW, VECTORS), (DS, THIRD), (TOMORROW, OTHERS), (YESTERDAY, VECTORS)]

    def publish() -> list[Release]:
        return [
            site.prepared(vectors, ds=ds, plan_id=f"new {n}").release_on_top()
            for n, (ds, vectors) in enumerate(content)
        ]

    with ThreadPoolExecutor(3) as pool:
        vacuums = [pool.submit(lambda: [site.vacuum(0) for _ in range(4)]) for _ in range(2)]
        made = pool.submit(publish).result()
        forgotten = {name for one in vacuums for done in one.result() for name in done.forgotten}
    assert forgotten == ids(*given_up)
    assert not left & site.files().keys()
    site.assert_readable(*made)
    site.assert_whole()
    site.vacuum(0)
    assert site.assert_live(OTHERS, ds=TOMORROW) == made[2]

"""Random histories of a site: after any sequence of events, readers see the right release, now and at past moments."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from day_content import TOMORROW, YESTERDAY, plain
from example_counts import examples, slow
from marc_pipeline.config import RetentionSettings
from marc_pipeline.errors import ReleaseGone, UserError
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.releases.log import live_releases
from marc_pipeline.releases.retention import vacuum
from marc_schemas.release import Release
from published import BUCKETS, DS, Vectors, items
from vacuumed import LEAST, VacuumedSite, ids, one_changed, vectors_of, write_at

pytestmark = pytest.mark.usefixtures("no_waiting")
DATES = [YESTERDAY, DS, TOMORROW]
VACUUM = st.tuples(st.just("vacuum"), st.integers(1, 3), st.integers(1, 2))
EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.sampled_from(DATES), st.integers(0, 2)),
        st.tuples(st.just("bucket"), st.sampled_from(DATES), st.integers(0, BUCKETS - 1)),
        st.tuples(st.just("roll_back"), st.integers(0, 20)),
        st.tuples(st.just("die"), st.sampled_from(DATES), st.integers(3, 4)),
        VACUUM,
        VACUUM,
        st.tuples(st.just("wait"), st.sampled_from([1, 5, 20])),
    ),
    min_size=6,
    max_size=12,
)


@pytest.fixture
def site(tmp_path: Path) -> VacuumedSite:
    return VacuumedSite(tmp_path / "site")


@dataclass
class History:
    """A site and its expected content, event by event, on its own clock.

    Attributes:
        site: the site.
        grace: grace period of every vacuum, in hours.
        now: the clock.
        contents: vectors of each release by its id.
        live: what readers of each date see.
        turns: the last turn of each date.
        steps: number of events so far.
    """

    site: VacuumedSite
    grace: int
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    contents: dict[str, Vectors] = field(default_factory=dict)
    live: dict[str, Release] = field(default_factory=dict)
    turns: dict[str, int] = field(default_factory=dict)
    steps: int = 0

    def take(self, event: str, *arguments: Any) -> None:
        self.steps += 1
        self.now += timedelta(minutes=1)
        before = self._written()
        getattr(self, event)(*arguments)
        write_at({path for path, at in self._written().items() if before.get(path) != at}, self.now)

    def _written(self) -> dict[str, float]:
        return {path: Path(path).stat().st_mtime for path in self.site.files()}

    def publish(self, ds: str, version: int) -> None:
        vectors = items(16, seed=version)
        self._published(vectors, self.site.publish(vectors, ds=ds, plan_id=f"{ds} {version}"))

    def bucket(self, ds: str, bucket: int) -> None:
        if ds not in self.live:
            self.publish(ds, 0)
            return
        before = self.contents[self.live[ds].release_id]
        new = one_changed(before, bucket, seed=100 + self.steps)
        made = self.site.publish(new, ds=ds, plan_id=f"{ds} step {self.steps}", chosen=(bucket,))
        self._published({**before, **new}, made)

    def roll_back(self, number: int) -> None:
        known = [one for one in self.site.log if not one.withdrawn]
        if not known:
            return
        target = known[number % len(known)]
        if target.retired_at is not None:
            with pytest.raises(UserError, match="was retired"):
                self.site.roll_back(target)
            return
        for made in self.site.roll_back(target):
            if made.withdrawn:
                self.turns[made.ds] = made.turn
                del self.live[made.ds]
            else:
                self._published(self.contents[target.release_id], made)

    def die(self, ds: str, version: int) -> None:
        self.site.dead_run(items(16, seed=version), ds=ds, plan_id=f"{ds} {version}")

    def wait(self, hours: int) -> None:
        self.now += timedelta(hours=hours)

    def vacuum(self, days: int, per_day: int) -> None:
        settings = RetentionSettings(days=days, releases_per_day=per_day, grace_hours=self.grace)
        before = {one.release_id: one for one in self.site.log}
        deployment = self.site.with_retention(settings)
        report = vacuum(deployment, now=self.now, dry_run=True)
        found = self.site.files()
        done = vacuum(deployment, now=self.now)
        assert done == report
        assert found.keys() - self.site.files().keys() == set(done.files)
        # The rule of retention, computed independently: dates by live releases, releases of a date by turns.
        newest = sorted(self.live)[-days:]
        for one in self.site.log:
            later = [two for two in before.values() if two.ds == one.ds and two.turn > one.turn and not two.withdrawn]
            beyond = bool(newest and one.ds < newest[0]) or len(later) + (not one.withdrawn) > per_day
            assert (one.retired_at is not None) == (beyond or before[one.release_id].retired_at is not None)
        for gone in done.forgotten:
            retired = before[gone].retired_at or self.now
            assert retired + timedelta(hours=self.grace) <= self.now
        self.live = {ds: one for ds, one in self.live.items() if one.release_id not in done.forgotten}
        assert newest[-1:] == sorted(self.live)[-1:]
        grace_start = (self.now - timedelta(hours=self.grace)).timestamp()
        active = {
            path.split("/plans/")[1][:16]
            for path, at in self._written().items()
            if "/plans/" in path and at >= grace_start
        }
        for path in self.site.files().keys() - self.site.files_of(*self.site.log):
            if path.startswith((self.site.table_uri, self.site.index_uri)):
                assert any(plan in path for plan in active)

    def _published(self, vectors: Vectors, made: Release) -> None:
        self.contents[made.release_id] = vectors
        if made.ds not in self.live or self.live[made.ds].release_id != made.release_id:
            assert made.turn > self.turns.get(made.ds, 0)
        self.turns[made.ds] = made.turn
        self.live[made.ds] = made

    def check(self) -> None:
        """Every release of the log is whole, and readers of each date see its last release."""
        found = {one.release_id: one for one in self.site.log}
        for one in found.values():
            assert self.site.files_of(one) <= self.site.files().keys()
            assert one.withdrawn or vectors_of(
                OpenRelease(one, uri=self.site.table_uri, storage=self.site.storage)
            ) == plain(self.contents[one.release_id])
        live = live_releases(found.values())
        assert {ds: one.release_id for ds, one in live.items()} == {ds: one.release_id for ds, one in self.live.items()}
        if live:
            self.site.assert_whole(*live.values())
            newest = open_release(self.site.table_uri)
            assert newest.facts.ds == max(self.live)
            assert newest.facts.retired_at is None
            assert self.site.committed() <= self.site.files().keys()


@examples(1, of=4, database=None)
@given(grace=st.sampled_from([0, 6, 24]), events=EVENTS)
def test_after_any_sequence_of_events_readers_see_the_last_release_of_each_date(
    tmp_path_factory: pytest.TempPathFactory, grace: int, events: list[tuple[Any, ...]]
) -> None:
    history = History(VacuumedSite(tmp_path_factory.mktemp("history") / "site"), grace)
    for event in events:
        history.take(*event)
        history.check()


@pytest.mark.parametrize("seed", [0, *slow(1, 2)])
def test_a_past_release_is_found_by_time_until_retention_forgets_it(site: VacuumedSite, seed: int) -> None:
    """After that, the answer is the same release or an error, never another release."""
    days, draw = ["2026-11-18", "2026-11-19", "2026-11-20"], np.random.default_rng(seed)
    seen: list[tuple[datetime, dict[str | None, str]]] = []
    for turn in range(9):
        if turn > 2 and draw.random() < 0.3:
            site.roll_back(site.log[int(draw.integers(len(site.log)))])
        else:
            ds = days[int(draw.integers(len(days)))]
            site.publish(items(5, seed=turn), ds=ds, plan_id=f"{turn:032x}")
        live = live_releases(site.log)
        then: dict[str | None, str] = {ds: release.release_id for ds, release in live.items()}
        then[None] = open_release(site.table_uri).facts.release_id
        seen.append((max(release.created_at for release in site.log), then))

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
    with pytest.raises(UserError, match="not both"):
        open_release(site.table_uri, release_id=seen[-1][1][None], at=seen[0][0])

    # Retention keeps the last release of every date; without it, an older date would look like the newest.
    for hours in (0, 30, 60, 90):
        site.vacuum(hours, LEAST.model_copy(update={"days": len(days)}))
    known = ids(*site.log)
    gone = 0
    for moment, then in seen:
        for ds in (None, *days):
            answer = found(moment, ds)
            assert answer in {then.get(ds), "gone", None}
            assert answer != "gone" or then.get(ds) not in known or ds is None
            gone += answer != then.get(ds)
    assert gone
    assert found(seen[-1][0], None) == seen[-1][1][None]

"""Whatever nights, backfills, rebuilds and roll-backs follow one another: table and index hold what a dictionary says.

Every release is asked for the own vector of each of its items, and must find the item first, or tied with the first.
What ties is said by :data:`BLUR`: how far a reported score may lie from the inner product in double precision. Two
reported scores are told apart where they differ by more than both of them may be off.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from examples import slow
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray
from published import BUCKETS, DIM, NOON, Site, Vector, unit_vectors

from pipeline.config import AuditSettings, IndexSettings
from pipeline.errors import UserError
from pipeline.reader import OpenRelease, UnknownItems, open_release
from pipeline.release import roll_back
from pipeline.release_log import live_releases, read_releases
from pipeline.verify import verify
from schemas.identity import row_id
from schemas.release import Release

FIRST = "2026-11-01"
NAMES = [f"item-{number:02d}" for number in range(28)]
ANYTHING = 1e30
LAX = AuditSettings(max_drift=ANYTHING, max_deleted_fraction=1)
LISTS = 4
K = 5

FLAT, INVERTED, GRAPH, CODED = "Flat", "IVF4,Flat", "HNSW8", "IVF4,SQ8"
# As one file, and in a shard for every bucket.
WHOLE, SPLIT = 512.0, 1e-4

# Eight products of unit vectors, added up in float32.
ROUNDING = (DIM + 1) * 2.0**-24
# Of neighbours that are this close, the measured recall counts any.
TIE = 1e-6 + 2 * ROUNDING
# A code is off by half a step, a 510th of the range of its component; a unit vector is less than 4 across from its
# list's centre. That holds for what lies within the range that was trained: see POOL.
BLUR = {FLAT: ROUNDING, INVERTED: ROUNDING, GRAPH: ROUNDING, CODED: DIM**0.5 * 4 / 510 + ROUNDING}


def near(vector: Vector, distance: float, number: int) -> Vector:
    """A unit vector not far from another."""
    moved = vector + distance * unit_vectors(["moved"], seed=number)["moved"]
    unit: Vector = (moved / np.linalg.norm(moved)).astype(np.float32)
    return unit


# Codes clip what lies beyond the range that they were trained on, by as much as it lies beyond. Where there are codes,
# every item has one of these vectors, and each of them is there whenever an index is trained.
POOL = list(unit_vectors([f"pool {number}" for number in range(8)], seed=7).values())
POOL += [near(POOL[number], 10.0**-number, number) for number in range(1, 5)]


class Wanted(NamedTuple):
    """Which vector: a new one, that of another item, or one near to that."""

    kind: str
    number: int
    distance: float


class Edit(NamedTuple):
    """What happens to an item: it comes or changes, is computed anew of its text, leaves, or all its bucket does."""

    kind: str
    item: int
    vector: Wanted


@dataclass(frozen=True, eq=False)
class Item:
    """What the table must hold of one: its vector, that of its text, and when it was computed."""

    vector: Vector
    text: Vector
    at: datetime = NOON


Items = Mapping[str, Item]
DISTANCES = [1e-4, 1e-3, 1e-2, 1e-1]
DAYS = ["next", "next", "again", "before", "anew"]
KINDS = [*["put"] * 6, *["anew"] * 2, *["leave"] * 3, "empty"]
EDITS = st.lists(
    st.builds(
        Edit,
        st.sampled_from(KINDS),
        st.integers(0, len(NAMES) - 1),
        st.builds(
            Wanted,
            st.sampled_from(["fresh", "fresh", "same", "near"]),
            st.integers(0, 999),
            st.sampled_from(DISTANCES),
        ),
    ),
    min_size=1,
    max_size=8,
)
FACTORIES = st.sampled_from(list(BLUR))
WHICH = st.integers(0, 99)
CHOSEN = st.sets(st.integers(0, BUCKETS - 1), min_size=1, max_size=3)


@dataclass
class Lifecycle:
    """A feature table with its index, and what each of its releases and dates must hold.

    Attributes:
        site: where it is published.
        factory: of the index, where there are enough items for it.
        coded: items have vectors of the pool only, so that every factory's codes have a known resolution.
        wide: lists are probed until the recall is perfect, not as few as possible.
        shard_mib: size of a shard of the index.
        held: by release.
        live: release by date, as readers see them.
        pinned: an open reader of each release, and what it answered when the release was new.
        patched: indexes that hold changes since they were built, by factory; ``built``: those that hold none.
    """

    site: Site
    factory: str
    coded: bool = False
    wide: bool = False
    shard_mib: float = WHOLE
    held: dict[str, Items] = field(default_factory=dict)
    live: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, tuple[OpenRelease, list[Any]]] = field(default_factory=dict)
    patched: Counter[str] = field(default_factory=Counter)
    built: Counter[str] = field(default_factory=Counter)
    steps: int = 0

    def start(self, edits: Sequence[Edit]) -> Release:
        always = {f"pool-{number:02d}": Item(vector, vector) for number, vector in enumerate(POOL)}
        first = unit_vectors(NAMES[:12], seed=1)
        items = always if self.coded else {name: Item(vector, vector) for name, vector in first.items()}
        return self._publish(FIRST, self._edited(items, edits, NAMES), base=None)

    def day(self, how: str, which: int, edits: Sequence[Edit]) -> Release:
        """A whole date: the next one, one that is live again or built anew, or the one before, maybe the earliest."""
        ds = self._live(which)
        if how == "next":
            ds = max(opened.facts.ds for opened, _ in self.pinned.values())
        if how in ("next", "before"):
            ds = f"{date.fromisoformat(ds) + timedelta(days=2 if how == 'next' else -1)}"
        before = [day for day in self.live if day <= ds]
        base = max(before) if before else min(self.live)
        items = self._edited(self.held[self.live[base]], edits, NAMES)
        made = self._publish(ds, items, base=base, max_changed=0 if how == "anew" else ANYTHING)
        assert how != "anew" or made.index_build.changed == 0
        return made

    def backfill(self, which: int, chosen: Sequence[int], edits: Sequence[Edit]) -> Release:
        """Some buckets of a date that is live."""
        ds = self._live(which)
        names = [name for name in NAMES if row_id(name) % BUCKETS in chosen]
        items = self._edited(self.held[self.live[ds]], edits, names)
        return self._publish(ds, items, base=ds, chosen=tuple(chosen))

    def another_factory(self, factory: str, which: int, edits: Sequence[Edit]) -> Release:
        """A date again, with an index of another kind, which what follows has as well."""
        self.factory = factory if factory != CODED or self.coded else FLAT
        return self.day("again", which, edits)

    def back(self, which: int) -> None:
        """Roll back to any release that there was."""
        target = list(self.pinned)[which % len(self.pinned)]
        ds = self.pinned[target][0].facts.ds
        made = roll_back(self.site.storage, self.site.table_uri, target)
        assert {row.ds for row in made if row.withdrawn} == {day for day in self.live if day > ds}
        restored = [row for row in made if not row.withdrawn]
        self.live = {day: release_id for day, release_id in self.live.items() if day <= ds}
        for row in restored:
            self._pin(row, self.held[target])
        # Where no row was needed, the date shows the same files under a name of its own.
        assert ds in self.live
        assert plain(self.held[self.live[ds]]) == plain(self.held[target])

    def _live(self, which: int) -> str:
        return sorted(self.live)[which % len(self.live)]

    def _publish(
        self,
        ds: str,
        items: Items,
        *,
        base: str | None,
        chosen: tuple[int, ...] | None = None,
        max_changed: float = ANYTHING,
    ) -> Release:
        self.steps += 1
        encoded = self.site.encoded(
            {name: item.text for name, item in items.items()},
            ds=ds,
            plan_id=f"step {self.steps}",
            base=self.pinned[self.live[base]][0].facts if base else None,
            chosen=chosen,
            alter=lambda _, rows: computed_anew(rows, items),
        )
        assert encoded.audit(LAX).problems == ()
        # Lists cannot be trained on fewer vectors than there are lists.
        factory = self.factory if len(items) >= LISTS else FLAT
        exact = factory == FLAT or (factory == INVERTED and self.wide)
        encoded.index(
            IndexSettings(
                factory=factory,
                target_recall=1 if exact else 0.01,
                k=K,
                max_changed=max_changed,
                max_drift=ANYTHING,
                shard_mib=self.shard_mib,
                merge_mib=0,
            )
        )
        made = encoded.release()
        (self.patched if made.index_build.changed else self.built)[factory] += 1
        assert made.index_factory == factory
        self._pin(made, items)
        return made

    def _pin(self, made: Release, items: Items) -> None:
        opened = self._opened(made)
        self.held[made.release_id] = items
        self.live[made.ds] = made.release_id
        self.pinned[made.release_id] = opened, answers(opened, items)

    def _edited(self, items: Items, edits: Sequence[Edit], names: Sequence[str]) -> Items:
        found = dict(items)
        for number, edit in enumerate(edits):
            mine = [name for name in names if name in found]
            among = names if edit.kind == "put" else mine
            if not among:
                continue
            name = among[edit.item % len(among)]
            vector = self._vector(edit.vector, found)
            if edit.kind == "put":
                found[name] = Item(vector, vector)
            elif edit.kind == "anew":
                at = NOON + timedelta(minutes=self.steps + 1, seconds=number)
                found[name] = Item(vector, found[name].text, at)
            else:
                bucket = row_id(name) % BUCKETS
                leaving = [name] if edit.kind == "leave" else [one for one in mine if row_id(one) % BUCKETS == bucket]
                if len(leaving) < len(found):
                    found = {one: item for one, item in found.items() if one not in leaving}
        return found

    def _vector(self, wanted: Wanted, items: Items) -> Vector:
        if self.coded:
            return POOL[wanted.number % len(POOL)]
        if wanted.kind == "fresh":
            return unit_vectors(["fresh"], seed=1000 + wanted.number)["fresh"]
        other = items[sorted(items)[wanted.number % len(items)]].vector
        return other if wanted.kind == "same" else near(other, wanted.distance, wanted.number)

    def check(self) -> None:
        """Readers of each date see what they should, and those of older releases what they saw."""
        newest = open_release(self.site.table_uri)
        assert newest.facts.ds == max(self.live)
        found = live_releases(read_releases(self.site.storage, self.site.table_uri))
        assert {ds: release.release_id for ds, release in found.items()} == self.live
        for release in found.values():
            self.check_whole(self._opened(release))
        for release_id, (opened, answered) in self.pinned.items():
            assert answers(opened, self.held[release_id]) == answered

    def check_all(self) -> None:
        """Every release that there ever was, opened anew."""
        for release in read_releases(self.site.storage, self.site.table_uri):
            if not release.withdrawn:
                opened, answered = self._opened(release), self.pinned[release.release_id][1]
                self.check_whole(opened)
                assert answers(opened, self.held[release.release_id]) == answered
        for ds in {opened.facts.ds for opened, _ in self.pinned.values()} - self.live.keys():
            with pytest.raises(UserError, match=f"no release of {ds}"):
                open_release(self.site.table_uri, ds=ds)

    def check_whole(self, opened: OpenRelease) -> None:
        items = self.held[opened.facts.release_id]
        check_table(opened, items)
        check_index(opened, items)
        assert verify(self.site.storage, opened.facts, table_uri=self.site.table_uri) == []

    def _opened(self, release: Release) -> OpenRelease:
        return OpenRelease(release, uri=self.site.table_uri, storage=self.site.storage)


def computed_anew(rows: pa.Table, items: Items) -> pa.Table:
    """Rows with the vectors that items have now, whatever their texts had."""
    mine = [items[name] for name in rows["item_id"].to_pylist()]
    if all(item.at == NOON for item in mine):
        return rows
    found = [
        {**row, "vector": item.vector.tolist(), "encoded_at": item.at}
        for row, item in zip(rows.to_pylist(), mine, strict=True)
    ]
    return pa.Table.from_pylist(found, schema=rows.schema)


def plain(items: Items) -> dict[str, list[float]]:
    return {name: item.vector.tolist() for name, item in items.items()}


def matrix(items: Items) -> NDArray[np.float32]:
    return np.stack([item.vector for item in items.values()])


def answers(opened: OpenRelease, items: Items) -> list[Any]:
    """What a reader hears: ids and scores of neighbours."""
    names, scores = opened.search(matrix(items), k=min(K, len(items)))
    return [names.tolist(), scores.tolist()]


def check_table(opened: OpenRelease, items: Items) -> None:
    rows = opened.dataset().to_table().to_pylist()
    assert len(rows) == len(opened) == len(items)
    assert {row["item_id"]: row["vector"] for row in rows} == plain(items)
    assert {row["item_id"]: row["encoded_at"] for row in rows} == {name: item.at for name, item in items.items()}
    assert {row["ds"] for row in rows} == {opened.facts.ds}
    for row in rows:
        assert row["row_id"] == row_id(row["item_id"])
        assert row["bucket"] == row["row_id"] % BUCKETS
    asked = [*sorted(items, reverse=True), min(items)]
    np.testing.assert_array_equal(opened.vectors(asked), np.stack([items[name].vector for name in asked]))
    if gone := sorted(set(NAMES) - items.keys()):
        with pytest.raises(UnknownItems) as refused:
            opened.vectors(gone)
        assert sorted(refused.value.ids) == gone


def check_index(opened: OpenRelease, items: Items) -> None:
    names, own = list(items), matrix(items)
    assert sorted(opened.index_row_ids().tolist()) == sorted(map(row_id, names))
    factory, nprobe = opened.facts.index_factory, opened.facts.index_nprobe
    products = own.astype(np.float64) @ own.astype(np.float64).T
    blur = BLUR[factory]
    found, scores = opened.search(own, k=len(items))
    place = {name: number for number, name in enumerate(names)}
    neighbours, hits = min(K, len(items) - 1), 0
    for number, name in enumerate(names):
        ranked = [other for other in found[number].tolist() if other is not None]
        reported = scores[number, : len(ranked)]
        # Narrow lists and graphs may lead to fewer; never twice to one, nor to one that is not there.
        assert found[number, len(ranked) :].tolist() == [None] * (len(items) - len(ranked))
        assert len(ranked) == len(set(ranked))
        if factory == FLAT or nprobe == LISTS:
            assert set(ranked) == items.keys()
        exact = products[number, [place[other] for other in ranked]]
        assert np.abs(reported - exact).max() <= blur
        ordered = list(zip((-reported).tolist(), ranked, strict=True))
        assert ordered == sorted(ordered)
        # Of two vectors that are almost the same, the one whose length was rounded up is nearer to both.
        longer = products[number].max() - products[number, number]
        assert reported[ranked.index(name)] >= reported[0] - 2 * blur - longer
        others = np.sort(np.delete(products[number], number))[::-1][:neighbours]
        nearest = [products[number, place[other]] for other in ranked if other != name][:neighbours]
        hits += int((np.array(nearest) >= others.min(initial=1) - TIE).sum())
    if factory != GRAPH:
        # A graph is searched more widely for more neighbours: what it finds of few is not what it finds of many.
        assert hits >= opened.facts.recall * neighbours * len(items) - 1e-6
        for k in {1, min(3, len(items))}:
            fewer = opened.search(own, k)
            assert fewer[0].tolist() == found[:, :k].tolist()
            assert fewer[1].tolist() == scores[:, :k].tolist()


class AnySequence(RuleBasedStateMachine):
    """Hypothesis chooses what happens; after each rule everything is looked at."""

    patched: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._folder = TemporaryDirectory(prefix="lifecycle-")
        self._lifecycle: Lifecycle | None = None

    @property
    def lifecycle(self) -> Lifecycle:
        assert self._lifecycle is not None
        return self._lifecycle

    @initialize(
        factory=FACTORIES, wide=st.booleans(), coded=st.booleans(), shards=st.sampled_from([WHOLE, SPLIT]), edits=EDITS
    )
    def start(self, factory: str, wide: bool, coded: bool, shards: float, edits: list[Edit]) -> None:
        site = Site(Path(self._folder.name))
        self._lifecycle = Lifecycle(site, factory, coded=coded or factory == CODED, wide=wide, shard_mib=shards)
        self._lifecycle.start(edits)

    @rule(how=st.sampled_from(DAYS), which=WHICH, edits=EDITS)
    def day(self, how: str, which: int, edits: list[Edit]) -> None:
        self.lifecycle.day(how, which, edits)

    @rule(which=WHICH, chosen=CHOSEN, edits=EDITS)
    def backfill(self, which: int, chosen: set[int], edits: list[Edit]) -> None:
        self.lifecycle.backfill(which, sorted(chosen), edits)

    @rule(factory=FACTORIES, which=WHICH, edits=EDITS)
    def another_factory(self, factory: str, which: int, edits: list[Edit]) -> None:
        self.lifecycle.another_factory(factory, which, edits)

    @rule(which=WHICH)
    def back(self, which: int) -> None:
        self.lifecycle.back(which)

    @invariant()
    def all_is_well(self) -> None:
        if self._lifecycle is not None:
            self._lifecycle.check()

    def teardown(self) -> None:
        try:
            if self._lifecycle is not None:
                self.patched.update(self._lifecycle.patched)
                self._lifecycle.check_all()
        finally:
            self._folder.cleanup()


def patched_in_any_sequence(chosen: settings, *, seeded: int | None = None) -> int:
    """Run the machine; returns how many indexes held changes since they were built."""

    class Counted(AnySequence):
        patched: ClassVar[Counter[str]] = Counter()

    run_state_machine_as_test(Counted if seeded is None else seed(seeded)(Counted), settings=chosen)
    return Counted.patched.total()


# A sequence is shown as it is: to shrink one takes longer than to read it.
SHORT = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    stateful_step_count=10,
    max_examples=4,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_whatever_happens_table_and_index_hold_the_same_and_every_vector_finds_itself() -> None:
    assert patched_in_any_sequence(SHORT, seeded=4) >= 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whatever_happens_twenty_five_times_as_often() -> None:
    assert patched_in_any_sequence(settings(SHORT, max_examples=100, print_blob=True)) >= 150


def drawn_edits(draw: random.Random) -> list[Edit]:
    return [
        Edit(
            draw.choice(KINDS),
            draw.randrange(len(NAMES)),
            Wanted(draw.choice(["fresh", "same", "near"]), draw.randrange(1000), draw.choice(DISTANCES)),
        )
        for _ in range(draw.randrange(1, 9))
    ]


def patched_in_a_row(site: Site, factory: str, steps: int, shard_mib: float = WHOLE) -> int:
    """A seeded sequence in which hardly an index is built anew, so that what patches leave behind would pile up."""
    draw = random.Random(f"{factory} {steps}")  # noqa: S311 - no secret
    told = Lifecycle(site, factory, coded=factory == CODED, wide=True, shard_mib=shard_mib)
    told.start(drawn_edits(draw))
    for _ in range(steps):
        what, which = (
            draw.choice(["next", "next", "again", "before", "some", "some", "some", "back"]),
            draw.randrange(100),
        )
        if what == "back":
            told.back(which)
        elif what == "some":
            chosen = draw.sample(range(BUCKETS), draw.randrange(1, BUCKETS))
            told.backfill(which, sorted(chosen), drawn_edits(draw))
        else:
            told.day(what, which, drawn_edits(draw))
        told.check()
    # To the first of all, and forth again.
    for which in (0, len(told.pinned) - 1):
        told.back(which)
        told.check()
    told.check_all()
    return told.patched[factory]


@pytest.mark.parametrize(
    ("factory", "shard_mib"),
    [(INVERTED, SPLIT), (GRAPH, SPLIT), *slow((FLAT, WHOLE), (CODED, WHOLE))],
)
def test_patch_upon_patch_leaves_nothing_behind(tmp_path: Path, factory: str, shard_mib: float) -> None:
    assert patched_in_a_row(Site(tmp_path), factory, 16, shard_mib) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("factory", "shard_mib"), [(FLAT, WHOLE), (INVERTED, WHOLE), (GRAPH, SPLIT), (CODED, SPLIT)])
def test_sixty_steps_in_a_row_leave_nothing_behind(tmp_path: Path, factory: str, shard_mib: float) -> None:
    assert patched_in_a_row(Site(tmp_path), factory, 60, shard_mib) >= 25

"""Random sequences of nights, backfills, rebuilds and rollbacks: table and index always match a dictionary.

Each release is searched with the vector of each of its items and must return the item first, or tied with the first.
:data:`BLUR` defines ties: the greatest error of a reported score against the inner product in float64. Two scores
differ if their distance is greater than both errors together.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.errors import UserError
from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases.log import live_releases, read_releases
from marc_pipeline.releases.roll_back import roll_back
from marc_schemas.identity import row_id
from marc_schemas.release import Release
from published import BUCKETS, DIM, NOON, Site, Vector, unit_vectors

FIRST = "2026-11-01"
NAMES = [f"item-{number:02d}" for number in range(28)]
ANYTHING = 1e30
LAX = AuditSettings(max_drift=ANYTHING, max_deleted_fraction=1)
LISTS = 4
K = 5

FLAT, INVERTED, GRAPH, CODED = "Flat", "IVF4,Flat", "HNSW8", "IVF4,SQ8"
# One index file, or one shard per bucket.
WHOLE, SPLIT = 512.0, 1e-4

# Rounding error of a float32 inner product of unit vectors.
ROUNDING = (DIM + 1) * 2.0**-24
# The measured recall treats neighbours this close as equal.
TIE = 1e-6 + 2 * ROUNDING
# The error of a code is half a step, 1/510 of the range of its component. The range of a unit vector around its list's
# centroid is less than 4. This holds only within the trained range: see POOL.
BLUR = {FLAT: ROUNDING, INVERTED: ROUNDING, GRAPH: ROUNDING, CODED: DIM**0.5 * 4 / 510 + ROUNDING}


def near(vector: Vector, distance: float, number: int) -> Vector:
    """A unit vector close to another."""
    moved = vector + distance * unit_vectors(["moved"], seed=number)["moved"]
    unit: Vector = (moved / np.linalg.norm(moved)).astype(np.float32)
    return unit


# Codes clip values beyond the trained range. With codes, every item therefore has one of these vectors, and all of them
# are present whenever an index is trained.
POOL = list(unit_vectors([f"pool {number}" for number in range(8)], seed=7).values())
POOL += [near(POOL[number], 10.0**-number, number) for number in range(1, 5)]


class Wanted(NamedTuple):
    """The vector of an edit: a new one, that of another item, or one close to it."""

    kind: str
    number: int
    distance: float


class Edit(NamedTuple):
    """A change of an item: put, recompute, delete, or empty its bucket."""

    kind: str
    item: int
    vector: Wanted


@dataclass(frozen=True, eq=False)
class Item:
    """The expected row of an item: its vector, the vector of its text, and when it was computed."""

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
    """A feature table with its index, and the expected content of each release and date.

    Attributes:
        site: where it is published.
        factory: of the index, if there are enough items for it.
        coded: items have vectors of the pool only, so that codes have a known resolution.
        wide: probe enough lists for a perfect recall.
        shard_mib: size of a shard of the index.
        held: expected items by release.
        live: live release by date.
        pinned: an open reader of each release, and its answers when the release was new.
        patched: number of patched indexes by factory.
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
    steps: int = 0

    def start(self, edits: Sequence[Edit]) -> Release:
        always = {f"pool-{number:02d}": Item(vector, vector) for number, vector in enumerate(POOL)}
        first = unit_vectors(NAMES[:12], seed=1)
        items = always if self.coded else {name: Item(vector, vector) for name, vector in first.items()}
        return self._publish(FIRST, self._edited(items, edits, NAMES), base=None)

    def day(self, how: str, which: int, edits: Sequence[Edit]) -> Release:
        """Publish a whole date: the next one, a live one again, one with a rebuilt index, or the one before."""
        ds = self._live(which)
        if how == "next":
            ds = max(opened.facts.ds for opened, _ in self.pinned.values())
        if how in ("next", "before"):
            ds = f"{date.fromisoformat(ds) + timedelta(days=2 if how == 'next' else -1)}"
        before = [day for day in self.live if day <= ds]
        base = max(before) if before else min(self.live)
        items = self._edited(self.held[self.live[base]], edits, NAMES)
        made = self._publish(ds, items, base=base, max_changed=0 if how == "anew" else ANYTHING)
        assert how != "anew" or made.index.build.changed == 0
        return made

    def backfill(self, which: int, chosen: Sequence[int], edits: Sequence[Edit]) -> Release:
        """Replace some buckets of a live date."""
        ds = self._live(which)
        names = [name for name in NAMES if row_id(name) % BUCKETS in chosen]
        items = self._edited(self.held[self.live[ds]], edits, names)
        return self._publish(ds, items, base=ds, chosen=tuple(chosen))

    def another_factory(self, factory: str, which: int, edits: Sequence[Edit]) -> Release:
        """Publish a date again with another index type; later releases keep this type."""
        self.factory = factory if factory != CODED or self.coded else FLAT
        return self.day("again", which, edits)

    def back(self, which: int) -> None:
        """Roll back to any earlier release."""
        target = list(self.pinned)[which % len(self.pinned)]
        ds = self.pinned[target][0].facts.ds
        made = roll_back(self.site.storage, self.site.table_uri, target)
        assert {row.ds for row in made if row.withdrawn} == {day for day in self.live if day > ds}
        restored = [row for row in made if not row.withdrawn]
        self.live = {day: release_id for day, release_id in self.live.items() if day <= ds}
        for row in restored:
            self._pin(row, self.held[target])
        # Without a new row, the date is live with the same files under its own release id.
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
            alter=lambda _, rows: recomputed(rows, items),
        )
        assert encoded.audit(LAX).problems == ()
        # IVF needs at least as many vectors as lists.
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
        self.patched[factory] += made.index.build.changed > 0
        assert made.index.factory == factory
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
        """New readers of each date see the expected items, and open readers their old answers."""
        newest = open_release(self.site.table_uri)
        assert newest.facts.ds == max(self.live)
        found = live_releases(read_releases(self.site.storage, self.site.table_uri))
        assert {ds: release.release_id for ds, release in found.items()} == self.live
        for release in found.values():
            self.check_whole(self._opened(release))
        for release_id, (opened, answered) in self.pinned.items():
            assert answers(opened, self.held[release_id]) == answered

    def check_all(self) -> None:
        """Check every release, each with a new reader."""
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


def recomputed(rows: pa.Table, items: Items) -> pa.Table:
    """Rows with the current vectors of the items instead of those of their texts."""
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
    """Ids and scores of neighbours, as a reader returns them."""
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
    factory, nprobe = opened.facts.index.factory, opened.facts.index.nprobe
    products = own.astype(np.float64) @ own.astype(np.float64).T
    blur = BLUR[factory]
    found, scores = opened.search(own, k=len(items))
    place = {name: number for number, name in enumerate(names)}
    neighbours, hits = min(K, len(items) - 1), 0
    for number, name in enumerate(names):
        ranked = [other for other in found[number].tolist() if other is not None]
        reported = scores[number, : len(ranked)]
        # Narrow lists and graphs may return fewer items, but never one twice and never a missing one.
        assert found[number, len(ranked) :].tolist() == [None] * (len(items) - len(ranked))
        assert len(ranked) == len(set(ranked))
        if factory == FLAT or nprobe == LISTS:
            assert set(ranked) == items.keys()
        exact = products[number, [place[other] for other in ranked]]
        assert np.abs(reported - exact).max() <= blur
        ordered = list(zip((-reported).tolist(), ranked, strict=True))
        assert ordered == sorted(ordered)
        # Of two nearly equal vectors, the one that was rounded up has the higher score with both.
        longer = products[number].max() - products[number, number]
        assert reported[ranked.index(name)] >= reported[0] - 2 * blur - longer
        others = np.sort(np.delete(products[number], number))[::-1][:neighbours]
        nearest = [products[number, place[other]] for other in ranked if other != name][:neighbours]
        hits += int((np.array(nearest) >= others.min(initial=1) - TIE).sum())
    if factory != GRAPH:
        # A graph search for more neighbours is wider, so its results for few and for many neighbours differ.
        assert hits >= opened.facts.index.recall * neighbours * len(items) - 1e-6
        for k in {1, min(3, len(items))}:
            fewer = opened.search(own, k)
            assert fewer[0].tolist() == found[:, :k].tolist()
            assert fewer[1].tolist() == scores[:, :k].tolist()


def run_steps(lifecycle: Lifecycle, first: Sequence[Edit], steps: Iterable[Sequence[Any]]) -> None:
    """Start, run every step, and check everything after each; a step is a method's name with its arguments."""
    lifecycle.start(first)
    lifecycle.check()
    for name, *arguments in steps:
        getattr(lifecycle, name)(*arguments)
        lifecycle.check()


STEPS = st.one_of(
    st.tuples(st.just("day"), st.sampled_from(DAYS), WHICH, EDITS),
    st.tuples(st.just("backfill"), WHICH, CHOSEN.map(sorted), EDITS),
    st.tuples(st.just("another_factory"), FACTORIES, WHICH, EDITS),
    st.tuples(st.just("back"), WHICH),
)
# Failing sequences are not shrunk, because shrinking takes longer than reading one.
SHORT = settings(
    database=None,
    deadline=None,
    phases=[Phase.generate],
    max_examples=10,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@pytest.mark.parametrize(
    ("chosen", "seeded", "patched"),
    [
        pytest.param(SHORT, 4, 15, id="short"),
        pytest.param(
            settings(SHORT, max_examples=100, print_blob=True),
            None,
            150,
            id="ten times as long",
            marks=[pytest.mark.slow, pytest.mark.timeout(900)],
        ),
    ],
)
def test_after_any_sequence_index_and_table_agree(
    tmp_path_factory: pytest.TempPathFactory, chosen: settings, seeded: int | None, patched: int
) -> None:
    found: Counter[str] = Counter()

    @chosen
    @given(
        factory=FACTORIES,
        wide=st.booleans(),
        coded=st.booleans(),
        shards=st.sampled_from([WHOLE, SPLIT]),
        first=EDITS,
        steps=st.lists(STEPS, min_size=10, max_size=10),
    )
    def any_sequence(
        factory: str, wide: bool, coded: bool, shards: float, first: list[Edit], steps: list[Sequence[Any]]
    ) -> None:
        site = Site(tmp_path_factory.mktemp("lifecycle"))
        lifecycle = Lifecycle(site, factory, coded=coded or factory == CODED, wide=wide, shard_mib=shards)
        run_steps(lifecycle, first, steps)
        lifecycle.check_all()
        found.update(lifecycle.patched)

    (any_sequence if seeded is None else seed(seeded)(any_sequence))()
    assert found.total() >= patched


def drawn_edits(draw: random.Random) -> list[Edit]:
    return [
        Edit(
            draw.choice(KINDS),
            draw.randrange(len(NAMES)),
            Wanted(draw.choice(["fresh", "same", "near"]), draw.randrange(1000), draw.choice(DISTANCES)),
        )
        for _ in range(draw.randrange(1, 9))
    ]


def drawn_step(draw: random.Random) -> Sequence[Any]:
    """A step without a rebuild, so that errors of patches would accumulate."""
    what, which = draw.choice(["next", "next", "again", "before", "some", "some", "some", "back"]), draw.randrange(100)
    if what == "back":
        return "back", which
    if what == "some":
        chosen = draw.sample(range(BUCKETS), draw.randrange(1, BUCKETS))
        return "backfill", which, sorted(chosen), drawn_edits(draw)
    return "day", what, which, drawn_edits(draw)


@pytest.mark.parametrize(
    ("factory", "shard_mib", "steps", "patched"),
    [
        *((*case, 16, 6) for case in ((FLAT, WHOLE), (INVERTED, SPLIT), (GRAPH, SPLIT), (CODED, WHOLE))),
        *(
            pytest.param(*case, 60, 25, marks=pytest.mark.slow)
            for case in ((FLAT, WHOLE), (INVERTED, WHOLE), (GRAPH, SPLIT), (CODED, SPLIT))
        ),
    ],
)
def test_repeated_patches_keep_index_and_table_equal(
    site: Site, factory: str, shard_mib: float, steps: int, patched: int
) -> None:
    draw = random.Random(f"{factory} {steps}")  # noqa: S311 - no secret
    lifecycle = Lifecycle(site, factory, coded=factory == CODED, wide=True, shard_mib=shard_mib)
    run_steps(lifecycle, drawn_edits(draw), (drawn_step(draw) for _ in range(steps)))
    # Roll back to the first release, and then to the last one.
    for which in (0, len(lifecycle.pinned) - 1):
        lifecycle.back(which)
        lifecycle.check()
    lifecycle.check_all()
    assert lifecycle.patched[factory] >= patched

"""The standing of a plan: whether it may be published, is published already, and whether its release is intact."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from day_content import DAY, OTHERS, THIRD, VECTORS, YESTERDAY, assert_holds, held, plain, stir
from marc_pipeline.config import AuditSettings
from marc_pipeline.errors import CorruptFile, Superseded
from marc_pipeline.nightly.publish import DayMoved
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.log import newest
from marc_pipeline.releases.standing import is_whole, published
from marc_schemas.release import Release
from published import BUCKETS, DS, Encoded, Site, flip, in_buckets, items
from release_cases import altered

pytestmark = pytest.mark.usefixtures("no_waiting")


def published_by(site: Site, plan_id: str, *, ds: str = DS, **chosen: Any) -> Release | None:
    return published(site.storage, site.table_uri, ds=ds, plan_id=plan_id, **chosen)


def assert_superseded(plan: Encoded, reason: str = "") -> None:
    """Neither release method publishes the plan, and the log and the Delta table stay as they are."""
    before, version = plan.site.log, DeltaTable(plan.site.table_uri).version()
    for publish in (plan.release, plan.release_on_top):
        with pytest.raises(Superseded, match=f"^superseded: {reason}") as refused:
            publish()
        assert not isinstance(refused.value, DayMoved)
    assert plan.site.log == before
    assert DeltaTable(plan.site.table_uri).version() == version


# --- plans of a whole date


@pytest.mark.parametrize("first_of_the_day", [True, False])
def test_a_plan_is_superseded_when_another_plan_of_its_date_is_published_first(
    site: Site, first_of_the_day: bool
) -> None:
    if not first_of_the_day:
        site.publish(VECTORS, plan_id="before both")
    slow = site.prepared(OTHERS, plan_id="slow")
    fast = site.publish(THIRD, plan_id="fast")
    assert_superseded(slow, "2026-11-20 was published by another run")
    assert site.log[-1] == fast
    # A new plan with the same content is published on top.
    made = site.publish(OTHERS, plan_id="slow")
    assert made.supersedes == fast.release_id


def test_a_plan_of_the_whole_day_is_superseded_by_a_plan_of_some_buckets(site: Site) -> None:
    site.publish(DAY)
    slow = site.prepared(items(150), plan_id="slow")
    site.publish(stir(DAY, 1, seed=3), plan_id="some", chosen=(1,))
    assert_superseded(slow)


@pytest.mark.parametrize("planned", ["after the withdrawn release", "before it"])
def test_a_plan_is_superseded_when_its_date_is_withdrawn(site: Site, planned: str) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    if planned == "before it":
        slow = site.prepared(DAY, plan_id="slow")
        site.publish(items(30), plan_id="fast")
    else:
        site.publish(VECTORS)
        slow = site.prepared(OTHERS, plan_id="slow")
    site.roll_back(old)
    assert_superseded(slow)
    assert held(site) == {}
    assert newest(site.log) == old


@pytest.mark.parametrize("good_ds", ["2026-11-13", YESTERDAY], ids=["withdrawn", "an earlier release restored"])
def test_a_plan_is_superseded_when_its_base_release_is_rolled_back(site: Site, good_ds: str) -> None:
    good = site.publish(VECTORS, ds=good_ds, plan_id="good")
    bad = site.publish(DAY, ds=YESTERDAY, plan_id="bad")
    plan = site.prepared(DAY, base=bad, plan_id="today")
    site.roll_back(good)
    assert_superseded(plan, f"{YESTERDAY} was rolled back since plan")
    assert held(site) == {}


def test_a_retry_does_not_restore_a_release_that_was_rolled_back(site: Site) -> None:
    before = site.publish(VECTORS, ds=YESTERDAY)
    encoded = site.prepared(DAY, plan_id="day")
    made = encoded.release()
    site.roll_back(before)
    assert encoded.release_on_top() == made
    assert newest(site.log) == before


def test_a_plan_counts_as_published_until_another_plan_of_its_date_is(site: Site) -> None:
    plan_id = site.encoded(VECTORS).plan.plan_id
    assert published_by(site, plan_id) is None
    first = site.publish(VECTORS)
    assert published_by(site, plan_id) == first
    assert published_by(site, plan_id, ds=YESTERDAY) is None
    site.publish(items(30), plan_id="second")
    assert published_by(site, plan_id) is None


def test_a_plan_of_the_day_does_not_count_as_published_after_a_bucket_was_replaced(site: Site) -> None:
    whole = site.publish(DAY)
    site.publish(stir(DAY, 1, seed=1), plan_id="some", chosen=(1,))
    assert published_by(site, whole.plan_id) is None
    made = site.publish(DAY)
    assert (made.turn, made.table.files) == (3, whole.table.files)


# --- plans of some buckets


def test_the_second_of_two_plans_of_one_bucket_is_superseded(site: Site) -> None:
    site.publish(DAY)
    first, second = (site.prepared(stir(DAY, 2, seed=n), plan_id=f"rival-{n}", chosen=(2,)) for n in (1, 2))
    made = first.release()
    assert_superseded(second)
    assert site.log[-1] == made
    assert held(site) == plain(in_buckets(DAY, 0, 1, 3) | stir(DAY, 2, seed=1))


def test_a_plan_of_some_buckets_stays_published_when_other_buckets_are_replaced(site: Site) -> None:
    site.publish(DAY)
    first = site.prepared(stir(DAY, 1, seed=1), plan_id="one", chosen=(1,))
    made = first.release()
    above = site.publish(stir(DAY, 2, seed=2), plan_id="other", chosen=(2,))
    assert published_by(site, made.plan_id, chosen=(1,)) == above
    assert published_by(site, made.plan_id) is None
    assert first.release() == first.release_on_top() == above
    assert len(site.log) == 3
    # A damaged file of the day stops its index.
    damaged = Path(site.table_uri) / above.table.files[1].path
    flip(damaged, 500)
    with pytest.raises(CorruptFile, match=above.table.files[1].path):
        first.index()
    flip(damaged, 500)
    # Another plan of the same bucket replaces it.
    last = site.publish(stir(DAY, 1, seed=3), plan_id="third", chosen=(1,))
    assert published_by(site, made.plan_id, chosen=(1,)) is None
    # A retry of the first plan has nothing to do: it was published in its turn.
    assert first.release() == made
    assert site.log[-1] == last


def test_a_plan_of_some_buckets_does_not_count_as_published_after_one_was_emptied(site: Site) -> None:
    site.publish(DAY)
    mine = stir(DAY, 1, seed=1) | stir(DAY, 3, seed=3)
    made = site.publish(mine, plan_id="two", chosen=(1, 3))
    site.publish({}, plan_id="emptied", chosen=(3,), audit=AuditSettings(max_deleted_fraction=1, max_drift=9))
    assert held(site) == plain(in_buckets(DAY, 0, 2) | stir(DAY, 1, seed=1))
    assert published_by(site, made.plan_id, chosen=(1, 3)) is None
    site.publish(mine, plan_id="two", chosen=(1, 3))
    assert held(site) == plain(in_buckets(DAY, 0, 2) | mine)


def with_another_template(site: Site) -> None:
    live = site.log[-1]
    other = altered(live, release_id="other", turn=live.turn + 1, table__template="{brand}")
    assert release_log.append(site.storage, site.table_uri, [other])


def again(**changes: Any) -> Callable[[Site], Any]:
    return partial(Site.publish, vectors=DAY, plan_id="another", **changes)


@pytest.mark.parametrize(
    "published_since",
    [
        pytest.param(again(weights="other weights"), id="another bundle"),
        pytest.param(again(buckets=BUCKETS * 2), id="another number of buckets"),
        pytest.param(again(), id="the whole date"),
        pytest.param(lambda site: site.roll_back(site.log[0]), id="withdrawn"),
        pytest.param(with_another_template, id="another template"),
        pytest.param(again(mantissa_bits=10), id="another precision"),
    ],
)
def test_a_plan_of_some_buckets_is_superseded_when_its_day_is_replaced(
    site: Site, published_since: Callable[[Site], Any]
) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    site.publish(DAY)
    encoded = site.prepared(stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    published_since(site)
    assert_superseded(encoded)


def test_a_plan_of_some_buckets_is_published_on_top_of_a_roll_back_of_other_buckets(site: Site) -> None:
    first = site.publish(DAY)
    site.publish(stir(DAY, 1, seed=1), plan_id="one", chosen=(1,))
    encoded = site.prepared(stir(DAY, 2, seed=2), plan_id="other", chosen=(2,))
    site.roll_back(first)
    made = encoded.release_on_top()
    assert_holds(site, made, in_buckets(DAY, 0, 1, 3) | stir(DAY, 2, seed=2))
    assert made.restores is None


def test_damage_in_other_buckets_does_not_stop_a_plan_that_was_published(site: Site) -> None:
    site.publish(DAY)
    encoded = site.prepared(stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    made = encoded.release()
    whole = partial(is_whole, site.storage, made, table_uri=site.table_uri)
    flip(Path(site.table_uri) / made.table.files[0].path, 100)
    assert encoded.release() == made
    assert (whole(), whole(chosen=(2,))) == (False, True)
    flip(Path(site.table_uri) / made.table.files[2].path, 100)
    assert not whole(chosen=(2,))

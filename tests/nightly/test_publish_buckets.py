"""Releases of some buckets of a day: the other buckets keep their files, and runs of different buckets combine."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from day_content import DAY, assert_found, assert_holds, held, plain, stir
from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.errors import CorruptFile
from marc_pipeline.nightly.publish import DayMoved
from marc_pipeline.reader.release import open_release
from marc_schemas.feature_table import bucket_number
from marc_schemas.release import Counts
from published import BUCKETS, Site, flip, in_buckets

LAX = AuditSettings(max_deleted_fraction=1, max_drift=9)


pytestmark = pytest.mark.usefixtures("no_waiting")


def changes(counts: Counts) -> dict[str, int]:
    return counts.model_dump(include={"items", "new", "changed", "deleted", "reused"})


STIRRED = {"items": 200, "new": 2, "changed": 3, "deleted": 2, "reused": 195}


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_chosen_buckets_are_replaced_and_the_others_keep_their_files(site: Site, factory: str) -> None:
    settings = IndexSettings(factory=factory)
    live = site.publish(DAY, index=settings)
    before = {file.path: (Path(site.table_uri) / file.path).read_bytes() for file in live.table.files}
    today = stir(DAY, 2, seed=1)
    made = site.publish(today, plan_id="some", chosen=(2,), index=settings)
    day = in_buckets(DAY, 0, 1, 3) | today

    old, new = ({bucket_number(file.path): file for file in one.table.files} for one in (live, made))
    assert [bucket_number(file.path) for file in made.table.files] == [0, 1, 2, 3]
    assert {number: new[number] == old[number] for number in new} == {0: True, 1: True, 2: False, 3: True}
    assert {path: (Path(site.table_uri) / path).read_bytes() for path in before} == before

    assert_holds(site, made, day)
    assert held(site, live.table.version) == plain(DAY)
    paths = set(DeltaTable(site.table_uri, version=made.table.version).file_uris())
    assert paths == {f"{site.table_uri}/{file.path}" for file in made.table.files}

    opened = open_release(site.table_uri)
    assert opened.facts == made
    assert_found(site, day)
    gone = sorted(DAY.keys() - day.keys())
    assert len(gone) == 2
    assert not set(gone) & set(opened.search(np.stack([DAY[i] for i in gone]), k=50)[0].ravel().tolist())
    np.testing.assert_array_equal(opened.vectors(list(day)), np.stack(list(day.values())))

    assert changes(made.counts) == STIRRED
    assert (made.turn, made.supersedes, made.table.buckets, made.bundle) == (2, live.release_id, 4, live.bundle)
    assert (made.index.build.items, made.index.build.changed) == (200, 2 + 2 + 3 + 3)
    assert site.log == [live, made]
    assert open_release(site.table_uri, release_id=live.release_id).search(DAY[gone[0]], k=1)[0].tolist() == [[gone[0]]]


def test_moments_stay_exact_however_often_buckets_are_replaced(site: Site) -> None:
    day = dict(DAY)
    site.publish(day)
    for number in range(12):
        bucket = number % 4
        today = stir(day, bucket, seed=number)
        made = site.publish(today, plan_id=f"plan-{number}", chosen=(bucket,))
        day = in_buckets(day, *({0, 1, 2, 3} - {bucket})) | today
        assert_holds(site, made, day)
        assert changes(made.counts) == STIRRED | {"items": len(day), "reused": len(day) - 5}


def test_a_chosen_bucket_can_become_empty_and_an_empty_one_can_be_filled(site: Site) -> None:
    site.publish(in_buckets(DAY, 0, 1, 2))
    encoded = site.prepared(in_buckets(DAY, 3), plan_id="swap", chosen=(1, 3), audit=LAX)
    made = encoded.release()
    assert_holds(site, made, in_buckets(DAY, 0, 2, 3))
    assert (made.counts.new, made.counts.deleted) == (len(in_buckets(DAY, 3)), len(in_buckets(DAY, 1)))
    assert [bucket_number(file.path) for file in made.table.files] == [0, 2, 3]


def test_the_last_full_bucket_of_a_day_cannot_be_emptied(site: Site) -> None:
    site.publish(in_buckets(DAY, 1))
    report = site.encoded({}, plan_id="none", chosen=(1,)).audit(LAX)
    assert report.problems == ("the snapshot is empty: no row of the catalogue could be used",)


def test_publishing_some_buckets_again_returns_the_same_release(site: Site) -> None:
    site.publish(DAY)
    encoded = site.prepared(stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    made = encoded.release()
    version = DeltaTable(site.table_uri).version()
    assert encoded.release() == encoded.release_on_top() == made
    assert DeltaTable(site.table_uri).version() == version


def test_runs_of_different_buckets_are_published_on_top_of_each_other(site: Site) -> None:
    live = site.publish(DAY)
    one, other = (stir(DAY, bucket, seed=bucket) for bucket in (1, 2))
    first = site.prepared(one, plan_id="one", chosen=(1,))
    second = site.prepared(other, plan_id="other", chosen=(2,))
    below = first.release()
    with pytest.raises(DayMoved, match="run the index stage again"):
        second.release()
    assert site.log == [live, below]
    made = second.release_on_top()
    day = in_buckets(DAY, 0, 3) | one | other
    assert_holds(site, made, day)
    assert_found(site, day)
    assert (made.supersedes, made.turn) == (below.release_id, 3)
    assert changes(made.counts) == STIRRED


def test_concurrent_runs_of_all_buckets_are_all_published(site: Site) -> None:
    site.publish(DAY)
    stirred = [stir(DAY, bucket, seed=bucket) for bucket in range(BUCKETS)]
    rivals = [site.prepared(stirred[n], plan_id=f"rival-{n}", chosen=(n,)) for n in range(BUCKETS)]
    with ThreadPoolExecutor(BUCKETS) as pool:
        made = list(pool.map(lambda rival: rival.release_on_top(), rivals))
    assert sorted(one.turn for one in made) == [2, 3, 4, 5]
    day = {item: vector for one in stirred for item, vector in one.items()}
    assert_holds(site, max(made, key=lambda one: one.turn), day)


def test_the_index_stage_refuses_a_damaged_file_of_another_bucket(site: Site) -> None:
    live = site.publish(DAY)
    encoded = site.encoded(stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    encoded.audit()
    flip(Path(site.table_uri) / live.table.files[0].path, 1000)
    with pytest.raises(CorruptFile, match=live.table.files[0].path):
        encoded.index()

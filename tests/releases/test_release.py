"""The release stage: visible all at once, once, only what audit and index have seen, and back again at will."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import deltalake
import numpy as np
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
from marc_pipeline.nightly import publish as publishing
from marc_pipeline.nightly import stages
from marc_pipeline.nightly.publish import DayMoved, throughput
from marc_pipeline.reader.release import open_release
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.log import newest, read_log, read_releases
from marc_pipeline.releases.roll_back import roll_back
from marc_pipeline.releases.standing import is_whole, published
from marc_pipeline.table.commit import committed_files
from marc_schemas.catalogue import Change
from marc_schemas.feature_table import bucket_number
from marc_schemas.identity import row_id
from marc_schemas.receipt import Receipt
from marc_schemas.release import Counts, Release
from published import BUCKETS, DIM, DS, NOON, TEMPLATE, Encoded, Meeting, Site, Vector, Vectors, flip, in_buckets, items
from release_cases import altered

VECTORS = items(40)
# Enough that a few items that come and go move no mean.
DAY = items(200)
YESTERDAY, TOMORROW = "2026-11-19", "2026-11-21"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rivals that met do not wait for long."""
    monkeypatch.setattr(stages, "PUBLISH_PAUSE_SECONDS", 0.05)


@pytest.fixture
def ready(site: Site) -> Encoded:
    """Encoded, audited and indexed."""
    encoded = site.encoded(VECTORS)
    encoded.audit()
    encoded.index()
    return encoded


def log_of(site: Site) -> list[Release]:
    return read_releases(site.storage, site.table_uri)


def table_file(encoded: Encoded, bucket: int = 0) -> Path:
    file = encoded.receipts[bucket].file
    assert file is not None
    return Path(encoded.site.table_uri) / file.path


def test_a_release_says_what_plan_receipts_audit_and_index_said(site: Site) -> None:
    encoded = site.encoded(VECTORS, quarantined={"null_id": 1, "malformed": 1})
    report, receipt = encoded.audit(), encoded.index(IndexSettings(factory="IVF4,Flat", k=3))
    encoded.workspace.write_seconds("encode", 2.0)
    encoded.workspace.write_seconds("encode", 0.5)
    made = encoded.release()
    assert (made.ds, made.plan_id, made.supersedes) == (DS, encoded.plan.plan_id, None)
    assert made.counts == Counts(
        items=40, new=40, changed=0, reused=0, deleted=0, quarantined=2, encoded=40, tokens=120
    )
    assert (made.table.dim, made.table.buckets, made.table.template) == (DIM, BUCKETS, TEMPLATE)
    assert (made.tokens_per_second, made.seconds) == (240.0, {"encode": 2.5})
    assert made.index == receipt.index
    assert (made.index.k, made.index.recall_queries, made.index.factory) == (3, 40, "IVF4,Flat")
    assert (made.moments, made.audit, made.audit.drift) == (report.gained, report.figures, None)
    assert (made.turn, made.withdrawn, made.restores) == (1, False, None)
    assert made.audit.quarantined_fraction == pytest.approx(2 / 42)
    assert made.quarantine_uri == encoded.workspace.quarantine_uri
    assert made.table.files == tuple(receipt.file for receipt in encoded.receipts)
    assert made.bundle.card_file.sha256.startswith(made.bundle.version)
    assert made.facts()["release_id"] == made.release_id
    assert log_of(site) == [made]


def test_nothing_is_visible_before_the_release_and_everything_after_it(site: Site) -> None:
    yesterday = site.publish(items(5), ds="2026-11-19")
    encoded = site.encoded(VECTORS)
    for stage in (encoded.audit, encoded.index):
        stage()
        assert log_of(site) == [yesterday]
        assert DeltaTable(site.table_uri).to_pyarrow_table().num_rows == 5
        assert len(open_release(site.table_uri)) == 5
    made = encoded.release()
    assert len(open_release(site.table_uri)) == 40
    assert DeltaTable(site.table_uri, version=made.table.version).to_pyarrow_table().num_rows == 45


def test_publishing_again_is_the_same_release(ready: Encoded) -> None:
    made = ready.release()
    version = DeltaTable(ready.site.table_uri).version()
    assert ready.release() == made
    assert log_of(ready.site) == [made]
    assert DeltaTable(ready.site.table_uri).version() == version


def test_publishing_again_needs_nothing_of_the_work_area(ready: Encoded) -> None:
    made = ready.release()
    bare = ready.site.workspace(ready.plan.plan_id)
    for stored in ready.site.storage.list(bare.uri):
        Path(stored.uri).unlink()
    assert ready.release() == made


def test_a_run_that_died_between_its_two_commits_is_finished_by_the_next(
    ready: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any, **__: Any) -> bool:
        raise ConnectionError

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):  # noqa: PT012
        patch.setattr(release_log, "append", die)
        ready.release()
    assert log_of(ready.site) == []
    version = DeltaTable(ready.site.table_uri).version()
    made = ready.release()
    assert made.table.version == version == DeltaTable(ready.site.table_uri).version()
    assert log_of(ready.site) == [made]


def test_two_runs_that_commit_at_one_moment_end_in_one_release(ready: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.site.publish(items(5), ds="2026-11-19")
    both_have_opened_the_log = Meeting(2)
    write = deltalake.write_deltalake

    def write_together(*arguments: Any, **named: Any) -> None:
        both_have_opened_the_log.wait()
        write(*arguments, **named)

    monkeypatch.setattr(release_log, "write_deltalake", write_together)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: ready.release_on_top(), range(2))
    assert one == other
    assert [found.release_id for found in log_of(ready.site) if found.ds == DS] == [one.release_id]


@pytest.mark.parametrize("moment", ["_require_verdicts", "_require_files", "_describe"])
def test_a_rival_that_publishes_the_plan_while_we_do_leaves_one_release(
    ready: Encoded, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    ours = getattr(publishing, moment)
    rivals: list[Release] = []

    def after_a_rival(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(publishing, moment, ours)
        rivals.append(ready.release())
        return ours(*arguments, **named)

    monkeypatch.setattr(publishing, moment, after_a_rival)
    made = ready.release_on_top()
    assert log_of(ready.site) == rivals
    assert [made] == rivals


def test_a_later_plan_of_the_day_supersedes_and_the_first_may_come_back(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(items(30, seed=1), plan_id="second")
    again = site.publish(VECTORS, plan_id="first")
    assert [found.supersedes for found in (first, second, again)] == [None, first.release_id, second.release_id]
    assert [found.turn for found in (first, second, again)] == [1, 2, 3]
    assert again.table.version == second.table.version + 1 == first.table.version + 2
    assert log_of(site) == [first, second, again]
    assert len(open_release(site.table_uri)) == 40
    assert DeltaTable(site.table_uri).to_pyarrow_table().num_rows == 40
    for opened in (first, second):
        assert open_release(site.table_uri, release_id=opened.release_id).dataset().count_rows() == opened.counts.items


def test_a_backfill_leaves_the_newest_day_to_its_readers(site: Site) -> None:
    today = site.publish(VECTORS)
    backfill = site.publish(items(7), ds="2026-11-01")
    assert backfill.supersedes is None
    assert open_release(site.table_uri).facts == today
    assert open_release(site.table_uri, ds="2026-11-01").facts == backfill


def unaudited(encoded: Encoded) -> None:
    (Path(encoded.workspace.uri) / "audit.json").unlink()


def unindexed(encoded: Encoded) -> None:
    (Path(encoded.workspace.uri) / "index.json").unlink()


def half_audited(encoded: Encoded) -> None:
    path = Path(encoded.workspace.uri) / "audit.json"
    path.write_bytes(path.read_bytes()[:50])


def without_a_receipt(encoded: Encoded) -> None:
    (Path(encoded.workspace.uri) / "receipts" / "00002.json").unlink()


def with_a_receipt_of_another_bundle(encoded: Encoded) -> None:
    encoded.workspace.write_receipt(encoded.receipts[2].model_copy(update={"bundle": "another"}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (unaudited, "run the audit stage first"),
        (half_audited, "run the audit stage first"),
        (unindexed, "run the index stage first"),
        (without_a_receipt, r"no receipt for buckets \[2\]; run the encode stage first"),
        (with_a_receipt_of_another_bundle, r"no receipt for buckets \[2\]; run the encode stage first"),
    ],
)
def test_an_unfinished_plan_is_not_published(ready: Encoded, harm: Callable[[Encoded], None], message: str) -> None:
    harm(ready)
    with pytest.raises(UserError, match=message):
        ready.release()
    assert log_of(ready.site) == []
    assert not (Path(ready.site.table_uri) / "_delta_log").exists()


def refused_by_the_audit(encoded: Encoded) -> None:
    report = encoded.workspace.read_audit()
    assert report is not None
    encoded.workspace.write_audit(report.model_copy(update={"problems": ("too strange",)}))


def encoded_once_more(encoded: Encoded) -> None:
    receipt = encoded.receipts[1]
    assert receipt.file is not None
    other = receipt.file.model_copy(update={"sha256": "0" * 64})
    encoded.workspace.write_receipt(receipt.model_copy(update={"file": other}))


def emptied(encoded: Encoded) -> None:
    encoded.workspace.write_receipt(encoded.receipts[1].model_copy(update={"file": None}))


def indexed_from_other_files(encoded: Encoded) -> None:
    index = encoded.workspace.read_index()
    assert index is not None
    encoded.workspace.write_index(index.model_copy(update={"files_digest": "0" * 32}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (refused_by_the_audit, r"the audit refused plan \w+: too strange. Nothing was published"),
        (encoded_once_more, "files changed after the audit; run the audit stage again"),
        (emptied, "files changed after the audit; run the audit stage again"),
    ],
)
def test_what_the_audit_has_not_seen_is_not_published(
    ready: Encoded, harm: Callable[[Encoded], None], message: str
) -> None:
    harm(ready)
    with pytest.raises(GateRefused, match=message):
        ready.release()
    assert log_of(ready.site) == []
    assert not (Path(ready.site.table_uri) / "_delta_log").exists()


def test_an_index_of_other_files_is_not_published(ready: Encoded) -> None:
    indexed_from_other_files(ready)
    with pytest.raises(DayMoved, match="the day's files changed after the index; run the index stage again"):
        ready.release()
    assert log_of(ready.site) == []
    assert not (Path(ready.site.table_uri) / "_delta_log").exists()


def index_file(encoded: Encoded) -> Path:
    receipt = encoded.workspace.read_index()
    assert receipt is not None
    return Path(receipt.index.uri) / receipt.index.files[0].path


def bundle_file(name: str) -> Callable[[Encoded], Path]:
    return lambda encoded: Path(encoded.plan.bundle_uri) / name


@pytest.mark.parametrize(
    ("which", "harm"),
    [
        pytest.param(index_file, lambda path: flip(path, 200), id="index flipped"),
        pytest.param(index_file, lambda path: path.unlink(), id="index missing"),
        pytest.param(bundle_file("backbone/weights.txt"), lambda path: flip(path, 0), id="weights flipped"),
        pytest.param(bundle_file("backbone/weights.txt"), lambda path: path.unlink(), id="weights missing"),
        pytest.param(table_file, lambda path: path.unlink(), id="table missing"),
        pytest.param(
            table_file,
            lambda path: path.write_bytes(b"PAR1"),
            id="table cut short",
        ),
        pytest.param(
            bundle_file("bundle.json"),
            lambda path: path.write_text(path.read_text() + "\n"),
            id="card altered",
        ),
    ],
)
def test_a_file_that_is_damaged_before_the_release_is_named_and_not_published(
    ready: Encoded, which: Callable[[Encoded], Path], harm: Callable[[Path], None]
) -> None:
    path = which(ready)
    harm(path)
    with pytest.raises(CorruptFile, match=path.name):
        ready.release()
    assert log_of(ready.site) == []
    assert not (Path(ready.site.table_uri) / "_delta_log").exists()


def test_a_bundle_that_is_gone_is_the_users_mistake(ready: Encoded) -> None:
    (Path(ready.plan.bundle_uri) / "bundle.json").unlink()
    with pytest.raises(UserError, match="no bundle at"):
        ready.release()
    assert log_of(ready.site) == []


def test_release_ids_sort_by_time_of_publication(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(2026, 11, 21, 3, 0, 0, 1000 * next(ticks), tz)

    monkeypatch.setattr(publishing, "datetime", Clock)
    made = [site.publish(items(2), ds=f"2026-11-{day}", plan_id=f"plan-{day}").release_id for day in range(10, 18)]
    assert sorted(made) == made


# --- what a plan of the whole day may supersede


def held(site: Site, version: int | None = None, ds: str = DS) -> dict[str, list[float]]:
    """Vectors of a date by item id, as any Delta reader sees them."""
    rows = DeltaTable(site.table_uri, version=version).to_pyarrow_table().to_pylist()
    found = {row["item_id"]: row["vector"] for row in rows if row["ds"] == ds}
    assert len(found) == sum(row["ds"] == ds for row in rows)
    return found


def plain(vectors: Vectors) -> dict[str, list[float]]:
    return {item: vector.tolist() for item, vector in vectors.items()}


def prepared(site: Site, vectors: Vectors, *, plan_id: str, chosen: tuple[int, ...] | None = None) -> Encoded:
    """Encoded, audited and indexed against what is live now."""
    encoded = site.encoded(vectors, plan_id=plan_id, chosen=chosen)
    encoded.audit()
    encoded.index()
    return encoded


@pytest.mark.parametrize("first_of_the_day", [True, False])
def test_a_plan_of_the_day_supersedes_only_what_it_was_made_to_supersede(site: Site, first_of_the_day: bool) -> None:
    if not first_of_the_day:
        site.publish(VECTORS, plan_id="before both")
    slow = prepared(site, items(30, seed=1), plan_id="slow")
    fast = site.publish(items(35, seed=2), plan_id="fast")
    version = DeltaTable(site.table_uri).version()
    for publish in (slow.release, slow.release_on_top):
        with pytest.raises(Superseded, match=r"^superseded: 2026-11-20 was published by another run") as refused:
            publish()
        assert not isinstance(refused.value, DayMoved)
    assert log_of(site)[-1] == fast
    assert DeltaTable(site.table_uri).version() == version
    # Planned again, it goes on top.
    made = site.publish(items(30, seed=1), plan_id="slow")
    assert made.supersedes == fast.release_id


def test_a_plan_of_the_day_does_not_take_back_some_buckets_that_were_replaced_since(site: Site) -> None:
    site.publish(DAY)
    slow = prepared(site, items(150), plan_id="slow")
    site.publish(stir(DAY, 1, seed=3), plan_id="some", chosen=(1,))
    with pytest.raises(Superseded, match=r"^superseded: "):
        slow.release()


def test_a_plan_does_not_bring_back_a_day_that_was_withdrawn_since(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(VECTORS)
    slow = prepared(site, items(30, seed=1), plan_id="slow")
    roll_back(site.storage, site.table_uri, old.release_id)
    with pytest.raises(Superseded, match=r"^superseded: "):
        slow.release()
    assert held(site) == {}


def test_the_plan_that_is_published_is_known_until_another_is(site: Site) -> None:
    storage, uri = site.storage, site.table_uri
    plan_id = site.encoded(VECTORS).plan.plan_id
    assert published(storage, uri, ds=DS, plan_id=plan_id) is None
    first = site.publish(VECTORS)
    assert published(storage, uri, ds=DS, plan_id=plan_id) == first
    assert published(storage, uri, ds=YESTERDAY, plan_id=plan_id) is None
    site.publish(items(30), plan_id="second")
    assert published(storage, uri, ds=DS, plan_id=plan_id) is None


def test_a_plan_of_the_day_is_not_published_any_more_once_a_bucket_of_it_was_replaced(site: Site) -> None:
    whole = site.publish(DAY)
    site.publish(stir(DAY, 1, seed=1), plan_id="some", chosen=(1,))
    assert published(site.storage, site.table_uri, ds=DS, plan_id=whole.plan_id) is None
    made = site.publish(DAY)
    assert (made.turn, made.table.files) == (3, whole.table.files)


# --- some buckets of a day


def mean_and_variance(vectors: Vectors) -> tuple[Any, float]:
    rows = np.stack(list(vectors.values())).astype(np.float64)
    return rows.mean(axis=0), float(np.trace(np.atleast_2d(np.cov(rows.T, bias=True))))


def stir(vectors: Vectors, bucket: int, *, seed: int) -> dict[str, Vector]:
    """Two items of a bucket gone, three with other vectors, two new."""
    mine = in_buckets(vectors, bucket)
    ids = sorted(mine)
    changed = dict(zip(ids[2:5], items(3, seed=seed + 100).values(), strict=True))
    fresh = list(in_buckets(items(40, seed=seed, prefix=f"new-{seed}-"), bucket).items())[:2]
    return {i: mine[i] for i in ids[5:]} | changed | dict(fresh)


@pytest.fixture(params=["Flat", "IVF4,Flat"])
def factory(request: pytest.FixtureRequest) -> IndexSettings:
    return IndexSettings(factory=request.param)


def test_some_buckets_are_replaced_and_the_others_stay_as_they_are(site: Site, factory: IndexSettings) -> None:
    live = site.publish(DAY, index=factory)
    before = {file.path: (Path(site.table_uri) / file.path).read_bytes() for file in live.table.files}
    today = stir(DAY, 2, seed=1)
    made = site.publish(today, plan_id="some", chosen=(2,), index=factory)
    day = in_buckets(DAY, 0, 1, 3) | today

    old, new = ({bucket_number(file.path): file for file in one.table.files} for one in (live, made))
    assert [bucket_number(file.path) for file in made.table.files] == [0, 1, 2, 3]
    assert {number: new[number] == old[number] for number in new} == {0: True, 1: True, 2: False, 3: True}
    assert {path: (Path(site.table_uri) / path).read_bytes() for path in before} == before

    assert held(site, made.table.version) == held(site) == plain(day)
    assert held(site, live.table.version) == plain(DAY)
    paths = set(DeltaTable(site.table_uri, version=made.table.version).file_uris())
    assert paths == {f"{site.table_uri}/{file.path}" for file in made.table.files}

    assert verify(site.storage, made, table_uri=site.table_uri) == []
    opened = open_release(site.table_uri)
    assert opened.facts == made
    for item, vector in day.items():
        assert opened.search(vector, k=1)[0].tolist() == [[item]]
    gone = sorted(DAY.keys() - day.keys())
    assert len(gone) == 2
    assert not set(gone) & set(opened.search(np.stack([DAY[i] for i in gone]), k=50)[0].ravel().tolist())
    np.testing.assert_array_equal(opened.vectors(list(day)), np.stack(list(day.values())))

    mean, variance = mean_and_variance(day)
    np.testing.assert_allclose(made.moments.mean, mean, rtol=0, atol=1e-9)
    assert made.moments.variance == pytest.approx(variance, abs=1e-9)
    assert (made.counts.items, made.counts.new, made.counts.changed, made.counts.deleted) == (200, 2, 3, 2)
    assert made.counts.reused == 195
    assert (made.turn, made.supersedes, made.table.buckets, made.bundle) == (2, live.release_id, 4, live.bundle)
    assert (made.index.build.items, made.index.build.changed) == (200, 2 + 2 + 3 + 3)
    assert log_of(site) == [live, made]
    assert open_release(site.table_uri, release_id=live.release_id).search(DAY[gone[0]], k=1)[0].tolist() == [[gone[0]]]


def test_moments_do_not_wander_however_often_buckets_are_replaced(site: Site) -> None:
    day = dict(DAY)
    site.publish(day)
    for number in range(12):
        bucket = number % 4
        today = stir(day, bucket, seed=number)
        made = site.publish(today, plan_id=f"plan-{number}", chosen=(bucket,))
        day = in_buckets(day, *({0, 1, 2, 3} - {bucket})) | today
        mean, variance = mean_and_variance(day)
        np.testing.assert_allclose(made.moments.mean, mean, rtol=0, atol=1e-9)
        assert made.moments.variance == pytest.approx(variance, abs=1e-9)
        assert made.counts.items == len(day)
        assert (made.counts.new, made.counts.changed, made.counts.deleted) == (2, 3, 2)
    assert held(site) == plain(day)
    assert verify(site.storage, made, table_uri=site.table_uri) == []


def test_a_chosen_bucket_may_become_empty_and_an_empty_one_be_filled(site: Site) -> None:
    site.publish(in_buckets(DAY, 0, 1, 2))
    lax = AuditSettings(max_deleted_fraction=1, max_drift=9)
    encoded = site.encoded(in_buckets(DAY, 3), plan_id="swap", chosen=(1, 3))
    assert encoded.audit(lax).problems == ()
    encoded.index()
    made = encoded.release()
    assert held(site) == plain(in_buckets(DAY, 0, 2, 3))
    assert (made.counts.new, made.counts.deleted) == (len(in_buckets(DAY, 3)), len(in_buckets(DAY, 1)))
    assert [bucket_number(file.path) for file in made.table.files] == [0, 2, 3]
    assert verify(site.storage, made, table_uri=site.table_uri) == []


def test_a_day_is_never_emptied_bucket_by_bucket(site: Site) -> None:
    site.publish(in_buckets(DAY, 1))
    encoded = site.encoded({}, plan_id="none", chosen=(1,))
    report = encoded.audit(AuditSettings(max_deleted_fraction=1, max_drift=9))
    assert report.problems == ("the snapshot is empty: no row of the catalogue could be used",)


def test_publishing_some_buckets_again_is_the_same_release(site: Site) -> None:
    site.publish(DAY)
    encoded = prepared(site, stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    made = encoded.release()
    version = DeltaTable(site.table_uri).version()
    assert encoded.release() == encoded.release_on_top() == made
    assert DeltaTable(site.table_uri).version() == version


def test_runs_of_other_buckets_of_one_day_are_published_on_top_of_one_another(site: Site) -> None:
    live = site.publish(DAY)
    one, other = (stir(DAY, bucket, seed=bucket) for bucket in (1, 2))
    first = prepared(site, one, plan_id="one", chosen=(1,))
    second = prepared(site, other, plan_id="other", chosen=(2,))
    below = first.release()
    with pytest.raises(DayMoved, match="run the index stage again"):
        second.release()
    assert log_of(site) == [live, below]
    made = second.release_on_top()
    day = in_buckets(DAY, 0, 3) | one | other
    assert held(site) == held(site, made.table.version) == plain(day)
    assert verify(site.storage, made, table_uri=site.table_uri) == []
    assert (made.supersedes, made.turn) == (below.release_id, 3)
    mean, variance = mean_and_variance(day)
    np.testing.assert_allclose(made.moments.mean, mean, rtol=0, atol=1e-9)
    assert made.moments.variance == pytest.approx(variance, abs=1e-9)
    counts = made.counts
    assert (counts.items, counts.new, counts.changed, counts.deleted, counts.reused) == (200, 2, 3, 2, 195)
    opened = open_release(site.table_uri)
    for item, vector in day.items():
        assert opened.search(vector, k=1)[0].tolist() == [[item]]


def test_runs_of_all_buckets_at_one_moment_all_arrive(site: Site) -> None:
    site.publish(DAY)
    stirred = [stir(DAY, bucket, seed=bucket) for bucket in range(BUCKETS)]
    rivals = [prepared(site, stirred[n], plan_id=f"rival-{n}", chosen=(n,)) for n in range(BUCKETS)]
    with ThreadPoolExecutor(BUCKETS) as pool:
        made = list(pool.map(lambda rival: rival.release_on_top(), rivals))
    assert sorted(one.turn for one in made) == [2, 3, 4, 5]
    last = max(made, key=lambda one: one.turn)
    day = {item: vector for one in stirred for item, vector in one.items()}
    assert held(site) == held(site, last.table.version) == plain(day)
    assert verify(site.storage, last, table_uri=site.table_uri) == []
    mean, variance = mean_and_variance(day)
    np.testing.assert_allclose(last.moments.mean, mean, rtol=0, atol=1e-9)
    assert last.moments.variance == pytest.approx(variance, abs=1e-9)


def test_of_two_runs_of_the_same_bucket_the_second_is_told_to_begin_again(site: Site) -> None:
    site.publish(DAY)
    first, second = (prepared(site, stir(DAY, 2, seed=n), plan_id=f"rival-{n}", chosen=(2,)) for n in (1, 2))
    made = first.release()
    for publish in (second.release, second.release_on_top):
        with pytest.raises(Superseded, match=r"^superseded: ") as refused:
            publish()
        assert not isinstance(refused.value, DayMoved)
    assert log_of(site)[-1] == made
    assert held(site) == plain(in_buckets(DAY, 0, 1, 3) | stir(DAY, 2, seed=1))


def test_the_same_plan_of_some_buckets_at_one_moment_is_one_release(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.publish(DAY)
    encoded = prepared(site, stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    both_have_opened_the_log = Meeting(2)
    write = deltalake.write_deltalake

    def write_together(*arguments: Any, **named: Any) -> None:
        both_have_opened_the_log.wait()
        write(*arguments, **named)

    monkeypatch.setattr(release_log, "write_deltalake", write_together)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: encoded.release_on_top(), range(2))
    assert one == other
    assert len(log_of(site)) == 2


def test_a_plan_of_some_buckets_stays_published_while_others_are_put_on_top(site: Site) -> None:
    site.publish(DAY)
    first = prepared(site, stir(DAY, 1, seed=1), plan_id="one", chosen=(1,))
    made = first.release()
    above = site.publish(stir(DAY, 2, seed=2), plan_id="other", chosen=(2,))
    known = {"storage": site.storage, "table_uri": site.table_uri, "ds": DS, "plan_id": made.plan_id}
    assert published(**known, chosen=(1,)) == above
    assert published(**known) is None
    assert first.release() == first.release_on_top() == above
    assert len(log_of(site)) == 3
    # Damaged, it is not: then it is published once more, on top.
    again = above.table.files[1]
    kept = (Path(site.table_uri) / again.path).read_bytes()
    flip(Path(site.table_uri) / again.path, 500)
    with pytest.raises(CorruptFile, match=again.path):
        first.index()
    (Path(site.table_uri) / again.path).write_bytes(kept)
    # Another plan of the same bucket ends it.
    last = site.publish(stir(DAY, 1, seed=3), plan_id="third", chosen=(1,))
    assert published(**known, chosen=(1,)) is None
    # A retry of the first has nothing to do: it was published in its turn.
    assert first.release() == made
    assert log_of(site)[-1] == last


def test_a_plan_of_some_buckets_is_not_published_any_more_once_one_of_them_was_emptied(site: Site) -> None:
    site.publish(DAY)
    mine = stir(DAY, 1, seed=1) | stir(DAY, 3, seed=3)
    made = site.publish(mine, plan_id="two", chosen=(1, 3))
    encoded = site.encoded({}, plan_id="emptied", chosen=(3,))
    encoded.audit(AuditSettings(max_deleted_fraction=1, max_drift=9))
    encoded.index()
    encoded.release()
    assert held(site) == plain(in_buckets(DAY, 0, 2) | stir(DAY, 1, seed=1))
    assert published(site.storage, site.table_uri, ds=DS, plan_id=made.plan_id, chosen=(1, 3)) is None
    site.publish(mine, plan_id="two", chosen=(1, 3))
    assert held(site) == plain(in_buckets(DAY, 0, 2) | mine)


def test_what_a_run_committed_and_could_not_release_does_not_stay_in_the_delta_table(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, loser = (prepared(site, items(30, seed=n), plan_id=f"plan {n}") for n in range(2))
    append, waiting, won = release_log.append, [], []

    def in_turn(*arguments: Any, **named: Any) -> bool:
        waiting.append(arguments)
        if len(waiting) == 1:
            # Both have committed their files to the Delta table, the loser last; then the winner releases.
            with pytest.raises(Superseded, match=r"^superseded: "):
                loser.release_on_top()
            return won[0]
        if len(waiting) == 2:
            won.append(append(*waiting[0]))
            assert held(site) == plain(items(30, seed=1))
        return append(*arguments, **named)

    monkeypatch.setattr(release_log, "append", in_turn)
    made = winner.release()
    assert won == [True]
    assert log_of(site) == [made]
    assert held(site) == plain(items(30, seed=0))
    assert committed_files(DeltaTable(site.table_uri)) == {file.path for file in made.table.files}


def test_a_retry_of_a_release_that_was_rolled_back_since_does_not_bring_it_back(site: Site) -> None:
    before = site.publish(VECTORS, ds=YESTERDAY)
    encoded = prepared(site, DAY, plan_id="day")
    made = encoded.release()
    roll_back(site.storage, site.table_uri, before.release_id)
    assert encoded.release_on_top() == made
    assert newest(log_of(site)) == before


def test_a_plan_that_was_made_before_its_date_was_withdrawn_is_superseded(site: Site) -> None:
    before = site.publish(VECTORS, ds=YESTERDAY)
    slow = prepared(site, DAY, plan_id="slow")
    site.publish(items(30), plan_id="fast")
    roll_back(site.storage, site.table_uri, before.release_id)
    with pytest.raises(Superseded, match=r"^superseded: "):
        slow.release_on_top()
    assert newest(log_of(site)) == before


@pytest.mark.parametrize("how", ["withdrawn", "an earlier one"])
def test_a_plan_that_carries_over_what_was_rolled_back_since_is_superseded(site: Site, how: str) -> None:
    good = site.publish(VECTORS, ds="2026-11-13" if how == "withdrawn" else YESTERDAY, plan_id="good")
    bad = site.publish(DAY, ds=YESTERDAY, plan_id="bad")
    night = site.encoded(DAY, base=bad, plan_id="night")
    night.audit()
    night.index()
    roll_back(site.storage, site.table_uri, good.release_id)
    with pytest.raises(Superseded, match=f"^superseded: {YESTERDAY} was rolled back since plan"):
        night.release_on_top()
    assert held(site) == {}


def by_another_bundle(site: Site) -> None:
    encoded = site.encoded(DAY, plan_id="another", weights="other weights")
    encoded.audit()
    encoded.index()
    encoded.release()


def into_another_number_of_buckets(site: Site) -> None:
    site.publish(DAY, plan_id="another", buckets=BUCKETS * 2)


def as_a_whole(site: Site) -> None:
    site.publish(DAY, plan_id="another")


def withdrawn(site: Site) -> None:
    roll_back(site.storage, site.table_uri, log_of(site)[0].release_id)


def with_another_precision(site: Site) -> None:
    site.publish(DAY, plan_id="another", mantissa_bits=10)


def with_another_template(site: Site) -> None:
    live = log_of(site)[-1]
    other = altered(live, release_id="other", turn=live.turn + 1, table__template="{brand}")
    assert release_log.append(site.storage, site.table_uri, [other])


@pytest.mark.parametrize(
    "published_since",
    [
        by_another_bundle,
        into_another_number_of_buckets,
        as_a_whole,
        withdrawn,
        with_another_template,
        with_another_precision,
    ],
)
def test_some_buckets_are_not_put_into_a_day_that_is_another_one_now(
    site: Site, published_since: Callable[[Site], None]
) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    site.publish(DAY)
    encoded = prepared(site, stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    published_since(site)
    before = log_of(site)
    for publish in (encoded.release, encoded.release_on_top):
        with pytest.raises(Superseded, match=r"^superseded: "):
            publish()
    assert log_of(site) == before


def test_some_buckets_go_on_top_of_a_roll_back_that_left_them_alone(site: Site) -> None:
    first = site.publish(DAY)
    site.publish(stir(DAY, 1, seed=1), plan_id="one", chosen=(1,))
    encoded = prepared(site, stir(DAY, 2, seed=2), plan_id="other", chosen=(2,))
    roll_back(site.storage, site.table_uri, first.release_id)
    made = encoded.release_on_top()
    assert held(site) == plain(in_buckets(DAY, 0, 1, 3) | stir(DAY, 2, seed=2))
    assert verify(site.storage, made, table_uri=site.table_uri) == []
    assert made.restores is None


def test_damage_in_other_buckets_does_not_stop_a_plan_that_was_published_already(site: Site) -> None:
    site.publish(DAY)
    encoded = prepared(site, stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    made = encoded.release()
    flip(Path(site.table_uri) / made.table.files[0].path, 100)
    assert encoded.release() == made
    assert is_whole(site.storage, made, table_uri=site.table_uri, chosen=(2,))
    assert not is_whole(site.storage, made, table_uri=site.table_uri)
    flip(Path(site.table_uri) / made.table.files[2].path, 100)
    assert not is_whole(site.storage, made, table_uri=site.table_uri, chosen=(2,))


def test_a_damaged_file_of_another_bucket_is_no_source_of_an_index(site: Site) -> None:
    live = site.publish(DAY)
    encoded = site.encoded(stir(DAY, 2, seed=1), plan_id="some", chosen=(2,))
    encoded.audit()
    flip(Path(site.table_uri) / live.table.files[0].path, 1000)
    with pytest.raises(CorruptFile, match=live.table.files[0].path):
        encoded.index()


# --- back to an earlier release


def back(site: Site, to: Release) -> list[Release]:
    return roll_back(site.storage, site.table_uri, to.release_id)


def facts_but(row: Release) -> dict[str, Any]:
    """What a roll-back leaves as it was."""
    own = {"release_id", "created_at", "turn", "supersedes", "restores", "withdrawn"}
    return row.at_version(0).model_dump(exclude=own)


def test_a_roll_back_within_a_date_brings_the_earlier_release_back(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(items(30, seed=1), plan_id="second")
    (made,) = back(site, first)
    assert facts_but(made) == facts_but(first)
    assert (made.restores, made.supersedes, made.turn) == (first.release_id, second.release_id, 3)
    assert made.release_id not in (first.release_id, second.release_id)
    assert log_of(site) == [first, second, made]
    assert newest(log_of(site)) == made
    assert held(site) == held(site, made.table.version) == plain(VECTORS)
    assert made.table.version == second.table.version + 1
    assert verify(site.storage, made, table_uri=site.table_uri) == []
    opened = open_release(site.table_uri)
    assert opened.search(VECTORS["item-3"], k=1)[0].tolist() == [["item-3"]]


def test_a_roll_back_to_what_is_live_changes_nothing(site: Site) -> None:
    site.publish(VECTORS, ds=YESTERDAY)
    live = site.publish(VECTORS)
    version = DeltaTable(site.table_uri).version()
    assert back(site, live) == []
    assert DeltaTable(site.table_uri).version() == version
    site.publish(items(30, seed=1), plan_id="second")
    (made,) = back(site, live)
    # Also to what is live under another name.
    assert back(site, live) == back(site, made) == []
    assert len(log_of(site)) == 4


def test_a_roll_back_of_a_roll_back_names_what_was_first_restored(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(items(30, seed=1), plan_id="second")
    (made,) = back(site, first)
    (undone,) = back(site, second)
    assert (undone.restores, undone.supersedes) == (second.release_id, made.release_id)
    (again,) = back(site, made)
    assert again.restores == first.release_id
    assert held(site) == plain(VECTORS)


def test_a_roll_back_to_an_earlier_date_withdraws_the_later_ones(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    today = site.publish(items(30, seed=1))
    tomorrow = site.publish(items(35, seed=2), ds=TOMORROW)
    version = DeltaTable(f"{site.table_uri}/_releases").version()
    made = back(site, old)
    assert DeltaTable(f"{site.table_uri}/_releases").version() == version + 1
    assert [(row.ds, row.withdrawn, row.supersedes, row.turn, row.restores) for row in made] == [
        (DS, True, today.release_id, 2, None),
        (TOMORROW, True, tomorrow.release_id, 2, None),
    ]
    emptied = [altered(row, counts__items=0, table__files=(), index__files=()) for row in (today, tomorrow)]
    assert [facts_but(row) for row in made] == [facts_but(row) for row in emptied]
    assert newest(log_of(site)) == open_release(site.table_uri).facts == old
    for ds in (DS, TOMORROW):
        with pytest.raises(UserError, match=f"no release of {ds}"):
            open_release(site.table_uri, ds=ds)
        assert held(site, ds=ds) == {}
    assert held(site, ds=YESTERDAY) == plain(VECTORS)
    # Nothing was deleted: who knows its id reads on.
    assert open_release(site.table_uri, release_id=tomorrow.release_id).dataset().count_rows() == 35
    assert back(site, old) == []


def test_a_roll_back_to_an_earlier_date_may_restore_that_date_as_well(site: Site) -> None:
    first = site.publish(VECTORS, ds=YESTERDAY, plan_id="first")
    site.publish(items(30, seed=1), ds=YESTERDAY, plan_id="second")
    site.publish(items(35, seed=2))
    restored, withdrawn = back(site, first)
    assert (restored.ds, restored.withdrawn, restored.restores) == (YESTERDAY, False, first.release_id)
    assert (withdrawn.ds, withdrawn.withdrawn) == (DS, True)
    assert newest(log_of(site)) == restored
    assert held(site, ds=YESTERDAY) == plain(VECTORS)
    assert held(site) == {}


def test_a_withdrawal_is_undone_by_going_back_to_what_was_withdrawn(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    today = site.publish(items(30, seed=1))
    tomorrow = site.publish(items(35, seed=2), ds=TOMORROW)
    back(site, old)
    (made,) = back(site, tomorrow)
    assert facts_but(made) == facts_but(tomorrow)
    assert (made.restores, made.supersedes, made.turn, made.withdrawn) == (tomorrow.release_id, None, 3, False)
    assert newest(log_of(site)) == made
    assert held(site, ds=TOMORROW) == plain(items(35, seed=2))
    # The date between stays withdrawn until it is asked for; that withdraws no date before it.
    assert held(site) == {}
    between, later = back(site, today)
    assert (between.ds, between.restores, later.ds, later.withdrawn) == (DS, today.release_id, TOMORROW, True)
    assert held(site) == plain(items(30, seed=1))
    assert held(site, ds=YESTERDAY) == plain(VECTORS)


def test_a_date_that_was_withdrawn_is_published_again_by_its_next_run(site: Site) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    today = site.publish(items(30, seed=1), plan_id="today")
    back(site, old)
    made = site.publish(items(30, seed=1), plan_id="today")
    assert (made.turn, made.supersedes) == (3, None)
    assert made.table.files == today.table.files
    assert newest(log_of(site)) == made


def damaged_table(_: Site, target: Release) -> Path:
    return Path(target.table.uri) / target.table.files[1].path


def damaged_index(_: Site, target: Release) -> Path:
    return Path(target.index.uri) / target.index.files[0].path


@pytest.mark.parametrize("which", [damaged_table, damaged_index])
@pytest.mark.parametrize("harm", [lambda path: flip(path, 300), lambda path: path.unlink()])
def test_a_roll_back_to_a_damaged_release_is_refused_and_changes_nothing(
    site: Site, which: Callable[[Site, Release], Path], harm: Callable[[Path], None]
) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(VECTORS)
    before, version = log_of(site), DeltaTable(site.table_uri).version()
    harm(which(site, old))
    with pytest.raises(CorruptFile, match=f"release {old.release_id} is damaged; nothing was changed"):
        back(site, old)
    assert log_of(site) == before
    assert DeltaTable(site.table_uri).version() == version


def test_a_roll_back_to_nothing_that_can_be_read_is_the_users_error(site: Site) -> None:
    with pytest.raises(UserError, match=r"no release nobody at "):
        roll_back(site.storage, site.table_uri, "nobody")
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(VECTORS)
    (withdrawal,) = back(site, old)
    before = log_of(site)
    for release_id in ("nobody", withdrawal.release_id):
        with pytest.raises(UserError, match=f"no release {release_id} at .*; see `marc releases`"):
            roll_back(site.storage, site.table_uri, release_id)
    assert log_of(site) == before


def test_a_roll_back_to_what_retention_gave_up_is_the_users_error(site: Site) -> None:
    old = site.publish(VECTORS, plan_id="old")
    live = site.publish(items(30), plan_id="new")
    retired = old.model_copy(update={"retired_at": NOON})
    found = read_log(site.storage, site.table_uri)
    assert release_log.replace(site.storage, found, [retired, live])
    with pytest.raises(UserError, match=f"release {old.release_id} was retired on 2026-11-20 12:00"):
        back(site, old)
    assert log_of(site) == [retired, live]


def test_a_roll_back_that_died_between_its_commits_is_finished_by_the_next(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site.publish(VECTORS, ds=YESTERDAY, plan_id="first")
    site.publish(items(30, seed=1), ds=YESTERDAY, plan_id="second")
    today = site.publish(items(35, seed=2))
    before = log_of(site)

    def die(*_: Any, **__: Any) -> bool:
        raise ConnectionError

    with monkeypatch.context() as patch, pytest.raises(ConnectionError):  # noqa: PT012
        patch.setattr(release_log, "append", die)
        back(site, first)
    assert log_of(site) == before
    # The log is what readers see: until it says otherwise, they have what they had.
    assert open_release(site.table_uri).facts == today
    assert open_release(site.table_uri).dataset().count_rows() == 35
    version = DeltaTable(site.table_uri).version()
    restored, withdrawn = back(site, first)
    assert DeltaTable(site.table_uri).version() == version
    assert (restored.restores, withdrawn.withdrawn) == (first.release_id, True)
    assert held(site, ds=YESTERDAY) == plain(VECTORS)
    assert held(site) == {}


def test_a_roll_back_goes_on_top_of_a_release_that_comes_meanwhile(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(items(30, seed=1), plan_id="first")
    append, rivals = release_log.append, []

    def after_a_rival(*arguments: Any, **named: Any) -> bool:
        monkeypatch.setattr(release_log, "append", append)
        rivals.append(site.publish(items(35, seed=2), plan_id="rival"))
        return append(*arguments, **named)

    monkeypatch.setattr(release_log, "append", after_a_rival)
    (withdrawn,) = back(site, old)
    assert (withdrawn.supersedes, withdrawn.turn) == (rivals[0].release_id, 3)
    assert newest(log_of(site)) == old
    assert held(site) == {}


def test_a_roll_back_that_always_comes_too_late_says_so(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    old = site.publish(VECTORS, ds=YESTERDAY)
    site.publish(VECTORS)
    monkeypatch.setattr(release_log, "append", lambda *_, **__: False)
    with pytest.raises(Superseded, match="other runs keep publishing"):
        back(site, old)


def test_a_commit_of_the_log_whose_answer_was_lost_is_no_second_release(
    ready: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = deltalake.write_deltalake

    def answer_is_lost(*arguments: Any, **named: Any) -> None:
        write(*arguments, **named)
        raise CommitFailedError("the store took it, and nobody heard")

    monkeypatch.setattr(release_log, "write_deltalake", answer_is_lost)
    made = ready.release()
    assert log_of(ready.site) == [made]


def at_work(bucket: int, *, start: float, seconds: float, load: float = 0.0, tokens: int = 100) -> Receipt:
    """The receipt of a worker that began ``start`` seconds after noon."""
    return Receipt(
        plan_id="p", bucket=bucket, bundle="b", file=None, encoded=1, reused=0, tokens=tokens, padded_tokens=tokens,
        seconds=seconds, load_seconds=load, model_seconds=seconds, device="cpu", dtype="float32",
        finished_at=NOON + timedelta(seconds=start + seconds),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("receipts", "seconds", "expected"),
    [
        ([], 10.0, None),
        ([at_work(0, start=5, seconds=1, tokens=0)], 10.0, None),
        # One worker after another: 5 s of start-up before them, 2 s of loading in the first.
        ([at_work(0, start=5, seconds=6, load=2), at_work(1, start=11, seconds=4)], 15.0, 200 / 8),
        # Two side by side, each loads.
        ([at_work(0, start=5, seconds=6, load=2), at_work(1, start=5, seconds=6, load=2)], 11.0, 200 / 4),
        # A second attempt a day later: the stage took 20 s in all.
        ([at_work(0, start=0, seconds=10), at_work(1, start=86_400, seconds=10)], 20.0, 200 / 20),
    ],
    ids=["nothing", "carried over", "in a row", "side by side", "two attempts"],
)
def test_throughput_leaves_start_up_out(receipts: list[Receipt], seconds: float, expected: float | None) -> None:
    assert throughput(receipts, seconds) == (None if expected is None else pytest.approx(expected))


def test_what_could_not_be_encoded_is_in_the_quarantine_and_in_no_other_count(site: Site) -> None:
    encoded = site.encoded(VECTORS, alter=lambda bucket, rows: rows.slice(1) if bucket == 0 else rows)
    (receipt,) = [one for one in encoded.receipts if one.bucket == 0]
    gone = min((item for item in VECTORS if row_id(item) % BUCKETS == 0), key=str.encode)
    encoded.workspace.write_receipt(receipt.model_copy(update={"quarantined": {gone: Change.NEW}}))
    encoded.audit()
    encoded.index(IndexSettings())
    made = encoded.release()
    counts = made.counts
    assert (counts.items, counts.new, counts.changed, counts.reused, counts.quarantined) == (39, 39, 0, 0, 1)
    assert made.quarantine_uri == encoded.workspace.quarantine_uri

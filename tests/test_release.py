"""The release stage: visible all at once, once, and only what audit and index have seen."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any

import deltalake
import pytest
from deltalake import DeltaTable
from published import BUCKETS, DIM, DS, TEMPLATE, Encoded, Meeting, Site, flip, items

from pipeline import release, release_log
from pipeline.config import IndexSettings
from pipeline.errors import CorruptFile, GateRefused, UserError
from pipeline.reader import open_release
from pipeline.release_log import read_releases
from schemas.release import Release

VECTORS = items(40)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


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
    report, index = encoded.audit(), encoded.index(IndexSettings(factory="IVF4,Flat", k=3))
    encoded.workspace.write_seconds("encode", 2.0)
    encoded.workspace.write_seconds("encode", 0.5)
    made = encoded.release()
    assert (made.ds, made.plan_id, made.supersedes) == (DS, encoded.plan.plan_id, None)
    assert (made.items, made.new, made.changed, made.reused, made.deleted, made.quarantined) == (40, 40, 0, 0, 0, 2)
    assert (made.dim, made.buckets, made.template) == (DIM, BUCKETS, TEMPLATE)
    assert (made.encoded, made.tokens, made.tokens_per_second, made.seconds) == (40, 120, 48.0, {"encode": 2.5})
    assert (made.index_uri, made.index_files, made.index_nprobe) == (index.uri, index.files, index.nprobe)
    assert (made.k, made.recall, made.recall_queries, made.index_factory) == (3, index.recall, 40, "IVF4,Flat")
    assert (made.mean, made.variance, made.drift) == (report.mean, report.variance, None)
    assert made.quarantined_fraction == pytest.approx(2 / 42)
    assert made.quarantine_uri == encoded.workspace.quarantine_uri
    assert made.table_files == tuple(receipt.file for receipt in encoded.receipts)
    assert made.bundle_file.sha256.startswith(made.bundle)
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
    assert DeltaTable(site.table_uri, version=made.table_version).to_pyarrow_table().num_rows == 45


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
    assert made.table_version == version == DeltaTable(ready.site.table_uri).version()
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
        one, other = pool.map(lambda _: ready.release(), range(2))
    assert one == other
    assert [found.release_id for found in log_of(ready.site) if found.ds == DS] == [one.release_id]


@pytest.mark.parametrize("moment", ["_require_verdicts", "_require_files", "_describe"])
def test_a_rival_that_publishes_the_plan_while_we_do_leaves_one_release(
    ready: Encoded, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    ours = getattr(release, moment)
    rivals: list[Release] = []

    def after_a_rival(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(release, moment, ours)
        rivals.append(ready.release())
        return ours(*arguments, **named)

    monkeypatch.setattr(release, moment, after_a_rival)
    made = ready.release()
    assert log_of(ready.site) == rivals
    assert [made] == rivals


def test_a_later_plan_of_the_day_supersedes_and_the_first_may_come_back(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(items(30, seed=1), plan_id="second")
    again = site.publish(VECTORS, plan_id="first")
    assert [found.supersedes for found in (first, second, again)] == [None, first.release_id, second.release_id]
    assert again.table_version == second.table_version + 1 == first.table_version + 2
    assert log_of(site) == [first, second, again]
    assert len(open_release(site.table_uri)) == 40
    assert DeltaTable(site.table_uri).to_pyarrow_table().num_rows == 40
    for opened in (first, second):
        assert open_release(site.table_uri, release_id=opened.release_id).dataset().count_rows() == opened.items


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
    encoded.workspace.write_index(index.model_copy(update={"receipts_digest": "0" * 32}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (refused_by_the_audit, r"the audit refused plan \w+: too strange. Nothing was published"),
        (encoded_once_more, "files changed after the audit; run the audit stage again"),
        (emptied, "files changed after the audit; run the audit stage again"),
        (indexed_from_other_files, "files changed after the index; run the index stage again"),
    ],
)
def test_what_audit_and_index_have_not_seen_is_not_published(
    ready: Encoded, harm: Callable[[Encoded], None], message: str
) -> None:
    harm(ready)
    with pytest.raises(GateRefused, match=message):
        ready.release()
    assert log_of(ready.site) == []
    assert not (Path(ready.site.table_uri) / "_delta_log").exists()


def index_file(encoded: Encoded) -> Path:
    index = encoded.workspace.read_index()
    assert index is not None
    return Path(index.uri) / index.files[0].path


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

    monkeypatch.setattr(release, "datetime", Clock)
    made = [site.publish(items(2), ds=f"2026-11-{day}", plan_id=f"plan-{day}").release_id for day in range(10, 18)]
    assert sorted(made) == made

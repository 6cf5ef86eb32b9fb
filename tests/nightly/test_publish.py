"""The release stage: what it records, when readers see it, repeated and concurrent calls, and what it refuses."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from day_content import DAY, OTHERS, VECTORS, YESTERDAY, held, plain, stir
from interruptions import before, fail, lose_answers, together
from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
from marc_pipeline.nightly import publish as publishing
from marc_pipeline.nightly.publish import DayMoved, throughput
from marc_pipeline.reader.release import open_release
from marc_pipeline.releases import log as release_log
from marc_pipeline.table.commit import committed_files
from marc_schemas.catalogue import Change
from marc_schemas.identity import row_id
from marc_schemas.receipt import Receipt
from marc_schemas.release import Counts
from published import BUCKETS, DIM, DS, NOON, TEMPLATE, Encoded, Site, flip, items

pytestmark = pytest.mark.usefixtures("no_waiting")


@pytest.fixture
def ready(site: Site) -> Encoded:
    """A plan that lacks only the release stage."""
    return site.prepared(VECTORS)


def delta_version(site: Site) -> int:
    return int(DeltaTable(site.table_uri).version())


# --- what a release records, and when readers see it


def test_a_release_records_the_results_of_plan_receipts_audit_and_index(site: Site) -> None:
    encoded = site.encoded(VECTORS, quarantined={"null_id": 1, "malformed": 1})
    report, receipt = encoded.audit(), encoded.index(IndexSettings(factory="IVF4,Flat", k=3))
    encoded.workspace.write_seconds("encode", 2.0)
    encoded.workspace.write_seconds("encode", 0.5)
    made = encoded.release()
    assert (made.ds, made.plan_id, made.supersedes) == (DS, encoded.plan.plan_id, None)
    assert made.counts == Counts(
        items=40,
        new=40,
        changed=0,
        reused=0,
        deleted=0,
        quarantined=2,
        encoded=40,
        tokens=120,
        cut_texts=40,
        lost_tokens=200,
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
    assert site.log == [made]


def test_an_item_that_encode_quarantined_is_in_no_other_count(site: Site) -> None:
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


def test_readers_see_nothing_before_the_release_and_everything_after_it(site: Site) -> None:
    yesterday = site.publish(items(5), ds=YESTERDAY)
    encoded = site.encoded(VECTORS)
    for stage in (encoded.audit, encoded.index):
        stage()
        assert site.log == [yesterday]
        assert DeltaTable(site.table_uri).to_pyarrow_table().num_rows == 5
        assert len(open_release(site.table_uri)) == 5
    made = encoded.release()
    assert len(open_release(site.table_uri)) == 40
    assert DeltaTable(site.table_uri, version=made.table.version).to_pyarrow_table().num_rows == 45


def test_a_later_plan_supersedes_the_first_which_can_be_published_again(site: Site) -> None:
    first = site.publish(VECTORS, plan_id="first")
    second = site.publish(OTHERS, plan_id="second")
    again = site.publish(VECTORS, plan_id="first")
    assert [found.supersedes for found in (first, second, again)] == [None, first.release_id, second.release_id]
    assert [found.turn for found in (first, second, again)] == [1, 2, 3]
    assert again.table.version == second.table.version + 1 == first.table.version + 2
    assert site.log == [first, second, again]
    assert len(open_release(site.table_uri)) == 40
    assert DeltaTable(site.table_uri).to_pyarrow_table().num_rows == 40
    for opened in (first, second):
        assert open_release(site.table_uri, release_id=opened.release_id).dataset().count_rows() == opened.counts.items


def test_a_backfill_does_not_change_what_readers_of_the_newest_day_see(site: Site) -> None:
    today = site.publish(VECTORS)
    backfill = site.publish(items(7), ds="2026-11-01")
    assert backfill.supersedes is None
    assert open_release(site.table_uri).facts == today
    assert open_release(site.table_uri, ds="2026-11-01").facts == backfill


def test_release_ids_sort_by_time_of_publication(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Clock":
            return cls(2026, 11, 21, 3, 0, 0, 1000 * next(ticks), tz)

    monkeypatch.setattr(publishing, "datetime", Clock)
    made = [site.publish(items(2), ds=f"2026-11-{day}", plan_id=f"plan-{day}").release_id for day in range(10, 18)]
    assert sorted(made) == made


# --- repeated and concurrent calls


def test_publishing_again_returns_the_same_release_even_without_the_work_area(ready: Encoded) -> None:
    made, version = ready.release(), delta_version(ready.site)
    assert ready.release() == made
    assert ready.site.log == [made]
    for stored in ready.site.storage.list(ready.workspace.uri):
        Path(stored.uri).unlink()
    assert ready.release() == made
    assert delta_version(ready.site) == version


def test_the_next_run_finishes_one_that_died_between_commits(ready: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):  # noqa: PT012
        fail(patch, publishing, "append")
        ready.release()
    assert ready.site.log == []
    version = delta_version(ready.site)
    made = ready.release()
    assert made.table.version == version == delta_version(ready.site)
    assert ready.site.log == [made]


def test_a_commit_whose_answer_was_lost_makes_one_release(ready: Encoded, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_answers(monkeypatch)
    made = ready.release()
    assert ready.site.log == [made]


@pytest.mark.parametrize("chosen", [None, (2,)], ids=["whole date", "one bucket"])
def test_concurrent_runs_of_one_plan_make_one_release(
    site: Site, monkeypatch: pytest.MonkeyPatch, chosen: tuple[int] | None
) -> None:
    live = site.publish(DAY, ds=DS if chosen else YESTERDAY)
    plan = site.prepared(stir(DAY, 2, seed=1), plan_id="some", chosen=chosen)
    together(monkeypatch, release_log, "write_deltalake")
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: plan.release_on_top(), range(2))
    assert one == other
    assert site.log == [live, one]


@pytest.mark.parametrize("step", ["_require_verdicts", "_require_files", "_describe"])
def test_two_runs_of_one_plan_make_one_release_wherever_the_second_overtakes(
    ready: Encoded, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    rivals = before(monkeypatch, publishing, step, ready.release)
    assert [ready.release_on_top()] == rivals == ready.site.log


def test_the_delta_table_ends_with_the_files_of_the_released_run(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    winner, loser = (site.prepared(items(30, seed=n), plan_id=f"plan {n}") for n in range(2))
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
            assert held(site) == plain(OTHERS)
        return append(*arguments, **named)

    monkeypatch.setattr(publishing, "append", in_turn)
    made = winner.release()
    assert won == [True]
    assert site.log == [made]
    assert held(site) == plain(items(30))
    assert committed_files(DeltaTable(site.table_uri)) == {file.path for file in made.table.files}


# --- what is refused


def work_file(encoded: Encoded, name: str) -> Path:
    return Path(encoded.workspace.uri) / name


def bundle_file(encoded: Encoded, name: str = "backbone/weights.txt") -> Path:
    return Path(encoded.plan.bundle_uri) / name


def index_file(encoded: Encoded) -> Path:
    receipt = encoded.workspace.read_index()
    assert receipt is not None
    return Path(receipt.index.uri) / receipt.index.files[0].path


def table_file(encoded: Encoded) -> Path:
    file = encoded.receipts[0].file
    assert file is not None
    return Path(encoded.site.table_uri) / file.path


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def refuse(encoded: Encoded) -> None:
    report = encoded.workspace.read_audit()
    assert report is not None
    encoded.workspace.write_audit(report.model_copy(update={"problems": ("too strange",)}))


def edit_card(encoded: Encoded) -> None:
    card = bundle_file(encoded, "bundle.json")
    card.write_text(card.read_text() + "\n")


def encode_again(encoded: Encoded, bucket: int = 1, **receipt: Any) -> None:
    encoded.workspace.write_receipt(encoded.receipts[bucket].model_copy(update=receipt))


def other_file(encoded: Encoded) -> None:
    file = encoded.receipts[1].file
    assert file is not None
    encode_again(encoded, file=file.model_copy(update={"sha256": "0" * 64}))


def index_other_files(encoded: Encoded) -> None:
    index = encoded.workspace.read_index()
    assert index is not None
    encoded.workspace.write_index(index.model_copy(update={"files_digest": "0" * 32}))


NO_AUDIT, NO_INDEX = "run the audit stage first", "run the index stage first"
NO_RECEIPT = r"no receipt for buckets \[2\]; run the encode stage first"
NOT_AUDITED = "files changed after the audit; run the audit stage again"
REFUSALS: dict[str, tuple[Callable[[Encoded], object], type[Exception], str]] = {
    "audit missing": (lambda e: work_file(e, "audit.json").unlink(), UserError, NO_AUDIT),
    "audit truncated": (lambda e: truncate(work_file(e, "audit.json"), 50), UserError, NO_AUDIT),
    "index missing": (lambda e: work_file(e, "index.json").unlink(), UserError, NO_INDEX),
    "receipt missing": (lambda e: work_file(e, "receipts/00002.json").unlink(), UserError, NO_RECEIPT),
    "receipt of another bundle": (lambda e: encode_again(e, 2, bundle="another"), UserError, NO_RECEIPT),
    "refused": (refuse, GateRefused, r"the audit refused plan \w+: too strange. Nothing was published"),
    "encoded again": (other_file, GateRefused, NOT_AUDITED),
    "emptied": (lambda e: encode_again(e, file=None), GateRefused, NOT_AUDITED),
    "index of other files": (index_other_files, DayMoved, "day's files changed after the index; run the index stage"),
    "index flipped": (lambda e: flip(index_file(e), 200), CorruptFile, r"index-\w+\.faiss"),
    "index file missing": (lambda e: index_file(e).unlink(), CorruptFile, r"index-\w+\.faiss"),
    "weights flipped": (lambda e: flip(bundle_file(e), 0), CorruptFile, r"weights\.txt"),
    "weights missing": (lambda e: bundle_file(e).unlink(), CorruptFile, r"weights\.txt"),
    "card changed": (edit_card, CorruptFile, r"bundle\.json"),
    "card missing": (lambda e: bundle_file(e, "bundle.json").unlink(), UserError, "no bundle at"),
    "table file missing": (lambda e: table_file(e).unlink(), CorruptFile, r"part-\w+-\w+\.parquet is missing"),
    "table file truncated": (lambda e: truncate(table_file(e), 4), CorruptFile, r"\.parquet is of another size"),
}


@pytest.mark.parametrize(("harm", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_an_unfinished_refused_or_damaged_plan_is_not_published(
    ready: Encoded, harm: Callable[[Encoded], object], error: type[Exception], message: str
) -> None:
    harm(ready)
    with pytest.raises(error, match=message):
        ready.release()
    assert ready.site.log == []
    assert not (Path(ready.site.table_uri) / "_delta_log").exists()


# --- throughput


def receipt_of(bucket: int, *, start: float, seconds: float, load: float = 0.0, tokens: int = 100) -> Receipt:
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
        ([receipt_of(0, start=5, seconds=1, tokens=0)], 10.0, None),
        # One worker after another: 5 s of start-up before them, 2 s of loading in the first.
        ([receipt_of(0, start=5, seconds=6, load=2), receipt_of(1, start=11, seconds=4)], 15.0, 200 / 8),
        # Two side by side, each loads.
        ([receipt_of(0, start=5, seconds=6, load=2), receipt_of(1, start=5, seconds=6, load=2)], 11.0, 200 / 4),
        # A second attempt a day later: the stage took 20 s in all.
        ([receipt_of(0, start=0, seconds=10), receipt_of(1, start=86_400, seconds=10)], 20.0, 200 / 20),
    ],
    ids=["nothing", "carried over", "in a row", "side by side", "two attempts"],
)
def test_throughput_excludes_start_up_time(receipts: list[Receipt], seconds: float, expected: float | None) -> None:
    assert throughput(receipts, seconds) == (None if expected is None else pytest.approx(expected))

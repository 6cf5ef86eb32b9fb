"""The plan stage in Spark: changes against the base release, chosen buckets, recomputation and estimates."""

import json
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import planning
from marc_pipeline.cli.publishing import describe_plan, print_plan
from marc_pipeline.config import EncodeSettings, Settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.errors import Superseded, UserError
from marc_pipeline.nightly.encode import pending_tasks
from marc_pipeline.nightly.plan import _start_seconds, base_release, make_plan
from marc_pipeline.nightly.plan_bucket import plan_bucket
from marc_pipeline.releases import log as release_log
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import Change, Reason
from marc_schemas.feature_table import bucket_number
from marc_schemas.identity import row_id
from marc_schemas.plan import BucketPlan, Plan
from marc_schemas.release import Release
from plan_cases import (
    BEFORE,
    TODAY,
    identify,
    in_buckets,
    naive_changes,
    naive_tokens,
    planned_rows,
    pooled,
    precise,
    withdrawn,
    write_day,
)
from planning import BLANK, DS, STORAGE, plan_day, settings_at, write_jsonl
from published import receipt_for
from release_cases import altered, unpublished

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

pytestmark = pytest.mark.spark

pytestmark = pytest.mark.spark


@pytest.mark.parametrize(("base_buckets", "buckets"), [(4, 4), (6, 4), (1, 5), (3, 1)])
def test_a_plan_compares_with_the_previous_release(
    spark: "SparkSession", tmp_path: Path, base_buckets: int, buckets: int
) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY), buckets=buckets)
    base = planning.publish(wanted, BEFORE, ds="2026-11-19", buckets=base_buckets)
    day = plan_day(spark, wanted)
    changes, gone = naive_changes(BEFORE, TODAY)
    assert day.changes == changes
    assert day.plan.deleted == len(gone) == 20
    assert Counter(day.changes.values()) == {change: getattr(day.plan, change) for change in Change}
    assert day.plan.base_release == base.release_id
    for work in day.plan.work:
        assert work.deleted == sum(row_id(i) % buckets == work.bucket for i in gone)
    assert day.plan.tokens_per_second == base.tokens_per_second == 100.0
    start = base.seconds["encode"] - base.counts.tokens / 100
    assert day.plan.start_seconds == pytest.approx(start)
    assert day.plan.seconds == pytest.approx(start + day.plan.tokens / 100)
    assert start > 0


def test_items_are_new_without_a_release_and_changed_with_another_bundle(
    spark: "SparkSession", tmp_path: Path, wanted: Settings
) -> None:
    first = plan_day(spark, wanted)
    assert set(first.changes.values()) == {"new"}
    assert (first.plan.base_release, first.plan.tokens_per_second, first.plan.seconds) == (None, None, None)
    planning.publish(wanted, TODAY)
    other = settings_at(tmp_path, wanted.catalogue.uri, seed=1)
    day = plan_day(spark, other)
    assert set(day.changes.values()) == {"changed"}
    assert day.plan.tokens == first.plan.tokens > 0
    assert day.plan.tokens_per_second is None


def test_buckets_without_items_are_planned_with_their_deletions(spark: "SparkSession", tmp_path: Path) -> None:
    buckets = 16
    wanted = settings_at(tmp_path, write_day(tmp_path, {"item 0": "text 0"}), buckets=buckets)
    planning.publish(wanted, BEFORE)
    plan = plan_day(spark, wanted).plan
    held = Counter(row_id(item_id) % buckets for item_id in BEFORE)
    held[row_id("item 0") % buckets] -= 1
    assert {work.bucket: work.deleted for work in plan.work} == dict(held)
    assert plan.unchanged == plan.items == 1
    assert plan.deleted == len(BEFORE) - 1
    assert plan.tokens == 0
    assert all(len(work.previous) == 1 for work in plan.work)


def test_the_base_is_the_latest_release_up_to_the_date_else_the_earliest_after_it(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, tmp_path)
    releases = [planning.publish(wanted, {}, ds=ds) for ds in ("2026-11-10", "2026-11-12", "2026-11-14")]
    again = planning.publish(wanted, {"a": "b"}, ds="2026-11-12")

    def base(ds: str) -> Release | None:
        return base_release([*releases, again], ds=ds)

    assert base("2026-11-20") == base("2026-11-14") == releases[2]
    assert base("2026-11-13") == base("2026-11-12") == again
    assert base("2026-11-11") == base("2026-11-10") == base("2026-11-01") == releases[0]
    assert base_release([], ds=DS) is None
    assert base_release([*releases, again, withdrawn(again)], ds="2026-11-13") == releases[0]


def test_an_existing_plan_is_returned_until_another_release_is_published(
    spark: "SparkSession", wanted: Settings
) -> None:
    first = plan_day(spark, wanted)
    assert (first.plan.base_release, first.plan.unchanged) == (None, 0)
    # Planning again would fail without a session.
    assert plan_day(None, wanted) == first
    assert first.plan.created_at <= datetime.now(UTC)
    release = planning.publish(wanted, BEFORE)
    made = plan_day(spark, wanted).plan
    assert (made.plan_id, made.base_release) == (first.plan.plan_id, release.release_id)
    assert made.unchanged > 0
    assert plan_day(None, wanted).plan == made


def test_a_bucket_with_a_damaged_base_file_is_planned_as_new(
    spark: "SparkSession", wanted: Settings, live: Release
) -> None:
    damaged = live.table.files[0]
    path = Path(wanted.table_uri) / damaged.path
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    plan = plan_day(spark, wanted).plan
    bucket = bucket_number(damaged.path)
    (work,) = (work for work in plan.work if work.bucket == bucket)
    assert (work.new, work.previous) == (work.items, ())
    assert work.deleted == max(0, damaged.rows - work.items)
    assert sum(other.unchanged for other in plan.work if other.bucket != bucket) > 0


def test_a_plan_is_made_again_when_its_date_is_published_or_withdrawn(spark: "SparkSession", wanted: Settings) -> None:
    old = planning.publish(wanted, BEFORE, ds="2026-11-19")
    found = [plan_day(spark, wanted).plan]
    live = planning.publish(wanted, TODAY)
    found.append(plan_day(spark, wanted).plan)
    assert release_log.append(STORAGE, wanted.table_uri, [withdrawn(live)])
    found.append(plan_day(spark, wanted).plan)
    # A release of a later date changes neither the base nor the live release.
    planning.publish(wanted, BEFORE, ds="2026-11-21")
    assert plan_day(None, wanted).plan == found[-1]
    assert [(plan.base_release, plan.live_release) for plan in found] == [
        (old.release_id, None),
        (live.release_id, live.release_id),
        (old.release_id, "gone"),
    ]
    assert [plan.unchanged for plan in found] == [34, 60, 34]
    assert len({plan.plan_id for plan in found}) == 1


def write_receipts(wanted: Settings, plan: Plan, texts: dict[str, str]) -> None:
    """Write a receipt for every bucket of a plan."""
    workspace = Workspace(STORAGE, wanted.work_uri, plan.plan_id)
    files = {bucket_number(f.path): f for f in planning.write_release(wanted, texts).table.files}
    for work in plan.work:
        workspace.write_receipt(receipt_for(plan, work.bucket, files.get(work.bucket)))


def test_receipts_stay_valid_when_the_plan_is_made_again(spark: "SparkSession", wanted: Settings) -> None:
    first = plan_day(spark, wanted)
    workspace = Workspace(STORAGE, wanted.work_uri, first.plan.plan_id)
    write_receipts(wanted, first.plan, TODAY)
    # With other texts, so that no vector is carried over.
    other = {item: f"{text}, other" for item, text in BEFORE.items()}
    release = planning.publish(wanted, other)
    again = plan_day(spark, wanted)
    assert (again.plan.plan_id, again.plan.base_release) == (first.plan.plan_id, release.release_id)
    assert set(first.changes.values()) == {"new"}
    assert again.changes == naive_changes(other, TODAY)[0]
    assert pending_tasks(workspace, again.plan, table_uri=wanted.table_uri, settings=EncodeSettings()) == []
    # A worker of the earlier plan still finds its items.
    assert planning.read_planned(wanted, first.plan).items == first.items
    (receipt, *_) = workspace.require_receipts(again.plan)
    assert receipt.file is not None
    Path(wanted.table_uri, receipt.file.path).unlink()
    (task,) = pending_tasks(workspace, again.plan, table_uri=wanted.table_uri, settings=EncodeSettings())
    assert (task.work.bucket, task.base) == (receipt.bucket, release.release_id)


def test_throughput_comes_from_the_largest_run_with_the_same_bundle(spark: "SparkSession", wanted: Settings) -> None:
    for day, (tokens, speed, bundle) in enumerate(
        [(10, 5.0, None), (900, 70.0, None), (20, 6.0, None), (10**6, 9.0, "f" * 16)]
    ):
        made = planning.write_release(wanted, BEFORE, ds=f"2026-11-1{day}", bundle=bundle)
        measured = altered(made, counts__tokens=tokens, tokens_per_second=speed)
        assert release_log.append(STORAGE, wanted.table_uri, [measured])
    assert plan_day(spark, wanted).plan.tokens_per_second == 70.0


def test_a_plan_of_chosen_buckets_has_only_their_rows(spark: "SparkSession", wanted: Settings) -> None:
    planning.publish(wanted, TODAY, ds="2026-11-21")
    live = planning.publish(wanted, BEFORE)
    day = plan_day(spark, wanted, chosen=(3, 1, 3))
    plan = day.plan
    assert day.texts == in_buckets(TODAY, 1, 3)
    changes, gone = naive_changes(in_buckets(BEFORE, 1, 3), in_buckets(TODAY, 1, 3))
    assert day.changes == changes
    assert (plan.deleted, plan.rows_read, plan.items) == (len(gone), len(changes), len(changes))
    assert [work.bucket for work in plan.work] == [1, 3]
    assert plan.chosen == (1, 3)
    assert plan.base_release == plan.live_release == live.release_id
    assert {bucket_number(file.path) for work in plan.work for file in work.previous} == {1, 3}
    # Planning again returns the existing plan.
    assert plan_day(None, wanted, chosen=(1, 3)).plan == plan


def test_a_plan_of_chosen_buckets_quarantines_only_their_rows(spark: "SparkSession", tmp_path: Path) -> None:
    ids = [f"item {number}" for number in range(40)]
    rows: list[dict[str, str | None]] = [{"item_id": i, "title": f"text of {i}"} for i in ids]
    rows += [{"item_id": f"empty {number}", "title": ""} for number in range(20)]
    rows += [{"item_id": i, "title": "again"} for i in ids[:10]]
    rows += [{"item_id": None, "title": "no id"}, {"item_id": " ", "title": "blank"}]
    path = write_jsonl(tmp_path / "day" / "c.jsonl", rows)
    with path.open("a") as file:
        file.write("no json\n")
    wanted = settings_at(tmp_path, path)
    planning.publish(wanted, {"item 0": "text of item 0"})
    day = plan_day(spark, wanted, chosen=(2,))
    mine = {i for i in ids if row_id(i) % 4 == 2}
    assert day.items.keys() == mine
    found = Counter((row["reason"], row["item_id"]) for row in day.quarantine)
    empty = {f"empty {n}" for n in range(20) if row_id(f"empty {n}") % 4 == 2}
    older = mine & set(ids[:10])
    assert {key for key in found if key[0] == Reason.EMPTY_TEXT} == {(Reason.EMPTY_TEXT, i) for i in empty}
    assert sum(count for key, count in found.items() if key[0] == Reason.OLDER_DUPLICATE) == len(older)
    assert not [key for key in found if key[0] == Reason.MALFORMED]
    assert day.plan.quarantined == dict(day.reasons)
    assert day.plan.rows_read == len(day.items) + len(day.quarantine)


def test_plans_of_single_buckets_add_up_to_the_whole_day(
    spark: "SparkSession", wanted: Settings, live: Release
) -> None:
    whole = plan_day(spark, wanted)
    parts = [plan_day(spark, wanted, chosen=(number,)) for number in range(4)]
    assert {item_id: item for part in parts for item_id, item in part.items.items()} == whole.items
    for count in ("items", "new", "changed", "unchanged", "deleted", "tokens", "rows_read"):
        assert sum(getattr(part.plan, count) for part in parts) == getattr(whole.plan, count), count


def test_a_chosen_bucket_without_items_is_planned_with_its_deletions(spark: "SparkSession", tmp_path: Path) -> None:
    kept = in_buckets(BEFORE, 0, 1)
    wanted = settings_at(tmp_path, write_day(tmp_path, kept))
    planning.publish(wanted, BEFORE)
    plan = plan_day(spark, wanted, chosen=(2, 3)).plan
    assert (plan.items, plan.rows_read) == (0, 0)
    assert {work.bucket: work.deleted for work in plan.work} == {n: len(in_buckets(BEFORE, n)) for n in (2, 3)}
    assert plan_day(spark, wanted, chosen=(1,)).plan.deleted == 0


def test_chosen_buckets_use_the_bundle_and_the_buckets_of_the_live_release(
    spark: "SparkSession", tmp_path: Path
) -> None:
    path = write_day(tmp_path, TODAY)
    first = settings_at(tmp_path, path)
    live = planning.publish(first, BEFORE)
    now = settings_at(tmp_path, path, seed=1, buckets=7)
    day = plan_day(spark, now, chosen=(1,))
    assert (day.plan.bundle, day.plan.bundle_uri, day.plan.buckets) == (live.bundle.version, live.bundle.uri, 4)
    assert day.texts == in_buckets(TODAY, 1)
    assert Counter(day.changes.values())["unchanged"] > 0
    assert plan_day(spark, now).plan.bundle != live.bundle.version
    # The bucket numbers are those of the release, too.
    with pytest.raises(UserError, match=f"no bucket 5: release {live.release_id} has buckets 0 to 3"):
        plan_day(None, now, chosen=(5,))


@pytest.mark.parametrize(
    ("before", "now", "carried"), [(23, 10, True), (10, 10, True), (12, 10, True), (10, 12, False), (22, 23, False)]
)
def test_vectors_are_carried_over_only_if_they_are_precise_enough(
    spark: "SparkSession", tmp_path: Path, before: int, now: int, carried: bool
) -> None:
    wanted = precise(settings_at(tmp_path, write_day(tmp_path, TODAY)), now)
    planning.publish(precise(wanted, before), BEFORE)
    day = plan_day(spark, wanted)
    assert day.changes == naive_changes(BEFORE, TODAY, same_bundle=carried)[0]
    assert day.plan.mantissa_bits == now
    assert (day.plan.unchanged > 0) is carried


def test_pooled_texts_are_not_cut_and_vectors_of_cut_texts_are_not_carried_over(
    spark: "SparkSession", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    today = {**TODAY, "long": "word " * 99}
    wanted = settings_at(tmp_path, write_day(tmp_path, today))
    planning.publish(wanted, BEFORE)
    plain, anew = plan_day(spark, wanted), plan_day(spark, pooled(wanted))
    assert (plain.plan.cut_texts, plain.plan.lost_tokens > 0, plain.plan.unchanged > 0) == (1, True, True)
    assert (anew.plan.cut_texts, anew.plan.lost_tokens, anew.plan.unchanged) == (0, 0, 0)
    assert (plain.plan.long_texts, anew.plan.long_texts) == ("cut", "pool")
    assert "was trained with encode.long_texts cut, the configuration has pool" in caplog.text
    assert "was made with encode.long_texts cut, the configuration has pool: every item is re-encoded" in caplog.text


def test_chosen_buckets_of_a_date_without_a_release_plan_the_whole_date(
    spark: "SparkSession", wanted: Settings
) -> None:
    planning.publish(wanted, BEFORE, ds="2026-11-19")
    plain = identify(wanted)
    for chosen in [(1,), (0, 99)]:
        identity = identify(wanted, chosen=chosen)
        assert identity == plain
        assert identity.chosen is None
    day = plan_day(spark, wanted, chosen=(1,))
    assert day.texts == TODAY
    assert day.plan.chosen is None
    # A withdrawn date has no release either.
    live = planning.publish(wanted, BEFORE)
    assert identify(wanted, chosen=(1,)).chosen == (1,)
    assert release_log.append(STORAGE, wanted.table_uri, [withdrawn(live)])
    assert identify(wanted, chosen=(1,)) == plain


@pytest.mark.parametrize("chosen", [(), (2,)])
def test_a_recomputation_marks_every_unchanged_text_as_changed(
    spark: "SparkSession", wanted: Settings, live: Release, chosen: tuple[int, ...]
) -> None:
    plain, anew = (plan_day(spark, wanted, chosen=chosen, recompute=recompute) for recompute in (False, True))
    before, today = (in_buckets(items, *(chosen or range(4))) for items in (BEFORE, TODAY))
    assert plain.changes == naive_changes(before, today)[0]
    assert anew.changes == naive_changes(before, today, same_bundle=False)[0]
    assert anew.texts == plain.texts
    assert (anew.plan.unchanged, anew.plan.new, anew.plan.deleted) == (0, plain.plan.new, plain.plan.deleted)
    assert anew.plan.changed == plain.plan.changed + plain.plan.unchanged
    assert anew.plan.tokens == naive_tokens(sorted(today.values()), planning.MAX_TOKENS) > plain.plan.tokens


def test_chosen_buckets_of_a_replaced_release_are_superseded(spark: "SparkSession", tmp_path: Path) -> None:
    path = write_day(tmp_path, TODAY)
    wanted = settings_at(tmp_path, path)
    live = planning.publish(wanted, BEFORE)
    identity = identify(wanted, chosen=(1,))
    # A release with the same bundle and buckets becomes the one that the plan changes.
    now = planning.publish(wanted, {**BEFORE, "one more": "text"})
    assert make_plan(spark, open_deployment(wanted), identity).live_release == now.release_id
    for replace in (
        lambda: planning.publish(wanted, BEFORE, buckets=5),
        lambda: planning.publish(precise(wanted, 10), BEFORE),
        lambda: planning.publish(settings_at(tmp_path, path, seed=1), BEFORE),
        lambda: release_log.append(STORAGE, wanted.table_uri, [withdrawn(live, 5)]),
    ):
        assert replace()
        with pytest.raises(Superseded, match="was replaced a moment ago"):
            make_plan(spark, open_deployment(wanted), identity)


def test_exact_tokens_equal_those_of_the_tokenizer_and_equal_texts_count_once(
    spark: "SparkSession", tmp_path: Path
) -> None:
    today = {f"item {n}": f"Ünusual wörds 😀 {'supercalifragilistic ' * (n % 9)}{n // 4}" for n in range(40)}
    today |= {f"twin {n}": "the same text" for n in range(30)}
    wanted = settings_at(tmp_path, write_day(tmp_path, today), buckets=1)
    kept = {i: today[i] for i in ("item 3", "item 8", "twin 1")}
    planning.publish(wanted, {**kept, "item 4": "was different"})
    plan = plan_day(spark, wanted).plan
    texts = {text.strip(BLANK) for item_id, text in today.items() if item_id not in kept}
    assert plan.tokens_exact
    assert plan.tokens == naive_tokens(sorted(texts), planning.MAX_TOKENS)
    assert any(naive_tokens([text], 10**6) > planning.MAX_TOKENS for text in texts)


def test_a_plan_reports_the_error_of_its_tokens_and_its_cost(
    spark: "SparkSession", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {f"item {n}": "word " * (n % 40) + str(n) for n in range(2000)}
    wanted = settings_at(tmp_path, write_day(tmp_path, texts), buckets=6)
    whole = plan_day(spark, wanted).plan
    assert (whole.tokens_exact, whole.tokens_error) == (True, 0)
    assert {work.tokens_error for work in whole.work} == {0}
    again = settings_at(tmp_path, write_day(tmp_path, texts, "other"), buckets=40)
    true = naive_tokens(list(texts.values()), planning.MAX_TOKENS)
    assert whole.tokens == true
    monkeypatch.setattr("marc_pipeline.nightly.plan_bucket.TOKEN_SAMPLE", 0)
    context = planning.bucket_context(again, None)
    parts = [{i: t for i, t in texts.items() if row_id(i) % 40 == n} for n in range(40)]
    works = [plan_bucket(context, n, planned_rows(part)).work for n, part in enumerate(parts)]
    found = tuple(work for work in works if work is not None)
    plan = whole.model_copy(update={"work": found, "tokens_exact": False})
    # Variances of independent errors add up.
    assert plan.tokens_error == pytest.approx(sum(work.tokens_error**2 for work in found) ** 0.5)
    assert abs(plan.tokens - true) < 1.5 * plan.tokens_error < 0.06 * true
    shown = describe_plan(plan, EncodeSettings())
    assert shown["tokens_error"] == plan.tokens_error
    lost = naive_tokens(list(texts.values()), 10**6) - true
    assert shown["lost_tokens"] == pytest.approx(lost, rel=0.1)
    assert shown["cut_texts"] == plan.cut_texts > 0
    print_plan(plan, EncodeSettings())
    out = capsys.readouterr().out
    assert "cost" not in out
    share = 100 * plan.lost_tokens / (plan.tokens + plan.lost_tokens)
    assert f"{plan.cut_texts:,} texts; {share:.1f} % of all tokens are lost" in out
    paid = EncodeSettings(price_per_device_hour=3.5, devices=4)
    hour = plan.model_copy(update={"tokens_per_second": plan.tokens / 3590, "start_seconds": 10.0})
    assert describe_plan(hour, paid)["cost"] == pytest.approx(14.0)
    assert describe_plan(plan, paid)["cost"] is None
    print_plan(hour, paid)
    shown_cost = capsys.readouterr().out
    assert "about 14.00" in shown_cost
    assert "about 3,600 s" in shown_cost
    print_plan(plan, EncodeSettings())
    share = 100 * plan.tokens_error / plan.tokens
    assert f"{plan.tokens:,} ± {share:.1f} % (from a sample)" in capsys.readouterr().out
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    # An older plan without tokens_error can be read.
    older = json.loads(whole.model_dump_json())
    for work in older["work"]:
        del work["tokens_error"]
    assert Plan.model_validate(older) == whole


@pytest.mark.parametrize(("parallel", "seconds"), [(1, 105.0), (2, 125.0), (4, 245.0)])
def test_the_estimate_is_at_least_the_time_of_the_largest_bucket(parallel: int, seconds: float) -> None:
    work = tuple(BucketPlan.model_construct(tokens=tokens) for tokens in (600, 300, 100))
    plan = Plan.model_construct(work=work, tokens_per_second=10.0, start_seconds=5.0, parallel=parallel)
    assert plan.seconds == pytest.approx(seconds)
    assert plan.model_copy(update={"work": ()}).seconds == 0
    assert plan.model_copy(update={"tokens_per_second": None}).seconds is None


def test_start_up_time_is_the_median_of_the_runs() -> None:
    def run(seconds: float, tokens: int, speed: float | None, bundle: str = "b") -> Release:
        taken = {"encode": seconds}
        return unpublished(bundle__version=bundle, seconds=taken, counts__tokens=tokens, tokens_per_second=speed)

    full = run(116.0, 10_000, 100.0)
    # Small runs have a low throughput, but the same start-up time.
    small = [run(21.0, 100, 10.0), run(22.0, 200, 12.0)]
    others = [run(5.0, 0, None), run(900.0, 100, 10.0, bundle="other")]
    assert _start_seconds([full], full) == pytest.approx(16)
    assert _start_seconds([full, *small, *others, run(2000.0, 100, 5.0)], full) == pytest.approx(20)
    assert _start_seconds(others, full) == 0

"""The plan_id of a date, and the errors of chosen buckets."""

import itertools
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml

import planning
from marc_pipeline.config import Settings
from marc_pipeline.errors import UserError
from marc_pipeline.scheduler.tasks import identify_backfills
from marc_schemas.release import Release
from plan_cases import (
    BEFORE,
    TODAY,
    identify,
    plan_id,
    pooled,
    precise,
    write_day,
)
from planning import DS, settings_at


def test_a_plan_id_changes_with_everything_that_changes_the_plan(tmp_path: Path) -> None:
    path = write_day(tmp_path, BEFORE)
    both = planning.write_bytes(tmp_path / "c.txt", b'item_id,title\n{"item_id": "1", "title": "a"}\n')
    at, other = partial(settings_at, tmp_path), partial(write_day, tmp_path)
    # A bundle is promoted when its settings are made, so each variant is identified at once.
    found = [
        plan_id(at(path)),
        plan_id(at(path), ds="2026-11-21"),
        plan_id(at(other(TODAY, "other"))),
        plan_id(at(other({**BEFORE, "item 3": "text 4"}, "byte"))),
        plan_id(at(path, seed=1)),
        plan_id(at(path, template="{title}.")),
        plan_id(at(path, clean=True)),
        plan_id(at(path, clean=True, boilerplate=["x"])),
        plan_id(at(path, buckets=5)),
        plan_id(precise(at(path), 22)),
        plan_id(pooled(at(path))),
        plan_id(at(path, id_column="title")),
        plan_id(at(path, updated_at_column="title")),
        plan_id(at(both, format="csv")),
        plan_id(at(both, format="jsonl")),
    ]
    assert len(set(found)) == len(found)
    write_day(tmp_path, TODAY, "both")
    folder = settings_at(tmp_path, tmp_path / "both")
    before = plan_id(folder)
    shutil.copy(path, tmp_path / "both" / "second.jsonl")
    assert plan_id(folder) != before


def test_a_plan_id_stays_when_files_are_touched_or_copied(tmp_path: Path) -> None:
    path = write_day(tmp_path, BEFORE)
    wanted = settings_at(tmp_path, path.parent)
    before = plan_id(wanted)
    os.utime(path, (0, 0))
    assert plan_id(wanted) == before
    copied = shutil.copytree(path.parent, tmp_path / "elsewhere")
    assert plan_id(settings_at(tmp_path, copied)) == before
    assert plan_id(settings_at(tmp_path, copied / "*.jsonl")) == before
    (copied / "_SUCCESS").touch()
    assert plan_id(settings_at(tmp_path, copied)) == before
    # A bundle that is trained again has the same version, in any folder.
    assert plan_id(settings_at(tmp_path / "moved", copied)) == before


WHOLE_DATE = "backfill the whole date"


def test_chosen_buckets_keep_the_treatment_of_long_texts(tmp_path: Path) -> None:
    wanted = settings_at(tmp_path, write_day(tmp_path, TODAY))
    live = planning.publish(pooled(wanted), BEFORE)
    assert live.table.long_texts == "pool"
    assert identify(pooled(wanted), chosen=(0,)).long_texts == "pool"
    with pytest.raises(UserError, match=f"long_texts pool, the configuration has cut: {WHOLE_DATE}"):
        identify(wanted, chosen=(0,))


@pytest.mark.parametrize(
    ("before", "now", "changes", "chosen", "message"),
    [
        *((23, 23, {}, (0, n), f"no bucket {n}: release .* has buckets 0 to 3") for n in (-1, 4, 99)),
        (23, 23, {"clean": True}, (0,), f"of {DS} was made with template .*{{clean:1}}.*: {WHOLE_DATE}"),
        (23, 23, {"template": "{title}!"}, (0,), f"of {DS} was made with template .*: {WHOLE_DATE}"),
        (23, 10, {}, (0,), f"of {DS} stores 23 mantissa bits, .* has 10: {WHOLE_DATE}"),
        (10, 23, {}, (0,), f"of {DS} stores 10 mantissa bits, .* has 23: {WHOLE_DATE}"),
        (10, 11, {}, (0,), f"of {DS} stores 10 mantissa bits, .* has 11: {WHOLE_DATE}"),
    ],
)
def test_chosen_buckets_must_fit_the_live_release(
    tmp_path: Path, before: int, now: int, changes: dict[str, str], chosen: tuple[int, ...], message: str
) -> None:
    path = write_day(tmp_path, TODAY)
    wanted = precise(settings_at(tmp_path, path), before)
    live = planning.publish(wanted, BEFORE)
    other = precise(settings_at(tmp_path, path, **changes), now)
    with pytest.raises(UserError, match=message) as error:
        identify(other, chosen=chosen)
    assert live.release_id in str(error.value)
    # Both the whole date and buckets with the settings of the release can be planned.
    whole = identify(other)
    assert (whole.chosen, whole.mantissa_bits) == (None, now)
    assert identify(wanted, chosen=(0,)).chosen == (0,)


def test_a_plan_id_changes_with_the_chosen_buckets_and_with_a_recomputation(wanted: Settings, live: Release) -> None:
    every = list(itertools.product([(), (0,), (1,), (0, 1), (0, 1, 2, 3)], [False, True]))
    found = {given: plan_id(wanted, chosen=given[0], recompute=given[1]) for given in every}
    assert len(set(found.values())) == len(every)
    # Buckets are a set.
    assert plan_id(wanted, chosen=(1, 0, 1)) == found[(0, 1), False]


@pytest.mark.parametrize("chosen", [(), (1,)])
def test_a_repeated_recomputation_is_a_new_plan(wanted: Settings, live: Release, chosen: tuple[int, ...]) -> None:
    found = [plan_id(wanted, chosen=chosen, recompute=True) for _ in range(2)]
    planning.publish(wanted, {**BEFORE, **{f"more {n}": "text" for n in range(9)}})
    found.append(plan_id(wanted, chosen=chosen, recompute=True))
    assert found[0] == found[1] != found[2]


def test_a_retried_backfill_keeps_its_plan_when_the_date_is_published(tmp_path: Path, wanted: Settings) -> None:
    config = tmp_path / "marc.yaml"
    config.write_text(yaml.safe_dump(wanted.model_dump(mode="json")))
    asked = {"first": DS, "last": DS, "buckets": [1], "config": str(config)}
    (whole,) = identify_backfills(**asked, recompute=False)
    assert whole["buckets"] == []
    planning.publish(wanted, BEFORE)
    assert plan_id(wanted, chosen=whole["buckets"]) == whole["plan_id"]
    (some,) = identify_backfills(**asked, recompute=False)
    assert some["buckets"] == [1]
    assert some["plan_id"] == plan_id(wanted, chosen=[1]) != whole["plan_id"]

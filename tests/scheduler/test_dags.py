"""The DAGs through Airflow itself: they load, they run whole, and they retry only what a retry can cure."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_command import Airflow
from marc_pipeline.bundles import run as train
from marc_pipeline.config import load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.example.shop import write_catalogue
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases.log import read_log, read_releases
from marc_pipeline.storage import Storage
from marc_schemas.feature_table import bucket_number
from tiny_models import save_tiny_backbone

pytestmark = [pytest.mark.airflow, pytest.mark.spark]

DS = "2026-11-20"


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Airflow:
    called = Airflow(tmp_path_factory.mktemp("airflow"), repository)
    done = called.call("db", "migrate")
    assert done.returncode == 0, done.stderr
    return called


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small catalogue, a tiny bundle, and their configuration."""
    root = tmp_path_factory.mktemp("site")
    backbone = save_tiny_backbone(root / "backbone")
    write_catalogue(root / "catalogue", ds=DS, items=400)
    path = root / "marc.yaml"
    path.write_text(f"""
root: {root}/data
catalogue:
  uri: {root}/catalogue/{{ds}}.csv
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
buckets: 2
train: {{backbone: {backbone}, dim: 8, max_tokens: 32}}
""")
    return path


def test_every_dag_loads_without_an_error(airflow: Airflow) -> None:
    done = airflow.call("dags", "list-import-errors", "-o", "json")
    assert "marc_" not in done.stdout, done.stdout
    assert airflow.call("dags", "reserialize").returncode == 0
    wanted = {"marc_nightly", "marc_backfill", "marc_maintenance", "marc_train"}
    assert {row["dag_id"] for row in airflow.json("dags", "list")} == wanted


@pytest.mark.slow
def test_the_nightly_dag_publishes_and_announces_and_a_second_run_does_nothing(
    airflow: Airflow, config: Path, spark: Any
) -> None:
    settings = load_settings(config)
    train.train_bundle(open_deployment(settings), ds=DS)
    first = airflow.call("dags", "test", "marc_nightly", DS, config=config)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    (release,) = read_releases(Storage(), settings.table_uri)
    assert (release.ds, release.counts.items) == (DS, 400)
    again = airflow.call("dags", "test", "marc_nightly", DS, config=config)
    assert again.returncode == 0, again.stdout[-3000:]
    assert [r.release_id for r in read_releases(Storage(), settings.table_uri)] == [release.release_id]
    log = first.stdout + first.stderr
    assert release.release_id in log, "the asset event carries the facts of the release"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_past_dates_in_any_order_a_backfill_of_one_bucket_and_a_vacuum(
    airflow: Airflow, config: Path, spark: Any
) -> None:
    settings = load_settings(config)
    train.train_bundle(open_deployment(settings), ds=DS)
    days = ["2026-11-12", "2026-11-10", "2026-11-11"]
    for day in days:
        write_catalogue(config.parent / "catalogue", ds=day, items=400)
        done = airflow.call("dags", "test", "marc_nightly", day, config=config)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = read_log(Storage(), settings.table_uri)
    before = {day: log.live(day) for day in days}
    assert all(before.values())
    asked = json.dumps({"first": "2026-11-10", "last": "2026-11-11", "buckets": [1], "recompute": True})
    done = airflow.call("dags", "test", "marc_backfill", "--conf", asked, config=config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = read_log(Storage(), settings.table_uri)
    for day in days:
        old, new = before[day], log.live(day)
        assert old is not None
        assert new is not None
        kept = [file.path for file in old.table.files if bucket_number(file.path) == 0]
        assert [file.path for file in new.table.files if bucket_number(file.path) == 0] == kept
        assert (new.release_id == old.release_id) == (day == "2026-11-12")
        assert verify(Storage(), new, table_uri=settings.table_uri) == []
        assert new.release_id in done.stdout + done.stderr or day == "2026-11-12", "the event carries the facts"
    done = airflow.call("dags", "test", "marc_maintenance", config=config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert read_releases(Storage(), settings.table_uri) == list(log.releases)


@pytest.mark.slow
def test_a_backfill_of_dates_without_a_catalogue_names_them_and_starts_nothing(
    airflow: Airflow, config: Path, spark: Any
) -> None:
    train.train_bundle(open_deployment(load_settings(config)), ds=DS)
    asked = json.dumps({"first": "2030-01-01", "last": "2030-01-02"})
    done = airflow.call("dags", "test", "marc_backfill", "--conf", asked, config=config)
    log = done.stdout + done.stderr
    assert done.returncode != 0
    assert "nothing was started: 2030-01-01: no catalogue" in log
    assert "2030-01-02: no catalogue" in log


@pytest.mark.slow
def test_what_the_user_must_mend_is_not_retried(airflow: Airflow, config: Path) -> None:
    done = airflow.call("dags", "test", "marc_nightly", "2030-01-01", config=config)
    log = done.stdout + done.stderr
    assert done.returncode != 0
    assert "no catalogue for 2030-01-01" in log
    assert "not retried: the catalogue, the bundle or the configuration must be mended first" in log


EVALUATE = """
import json, sys
from marc_pipeline.scheduler.retries import RetryFromTheStart, RetryTransientFaults
from marc_pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
policy = RetryFromTheStart() if "from the start" in sys.argv else RetryTransientFaults()
errors = {
    "exit 1": RuntimeError("Cannot execute: spark-submit. Error code is: 1."),
    "exit 2": RuntimeError("Cannot execute: spark-submit. Error code is: 2."),
    "exit 3": RuntimeError("Cannot execute: spark-submit. Error code is: 3."),
    "killed": RuntimeError("Cannot execute: spark-submit. Error code is: 137."),
    "user": UserError("x"), "gate": GateRefused("x"), "corrupt": CorruptFile("x"), "os": OSError("disk"),
    "exit 4": RuntimeError("Cannot execute: spark-submit. Error code is: 4."), "superseded": Superseded("x"),
}
print(json.dumps({name: policy.evaluate(error, 1, 3).action.value for name, error in errors.items()}))
"""


@pytest.mark.parametrize("job", ["a stage", "from the start"])
def test_a_retry_is_decided_by_the_exit_code(repository: Path, job: str) -> None:
    command = [sys.executable, "-c", EVALUATE, job]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    fail = {"exit 2", "exit 3", "user", "gate"} | ({"exit 4", "superseded"} if job == "a stage" else set())
    decided = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, action in decided.items() if action == "fail"} == fail
    assert {name for name, action in decided.items() if action == "retry"} == decided.keys() - fail


PARAMS = """
import json, sys
sys.path.insert(0, "dags")
import marc_nightly
from airflow.sdk import DAG
dag = marc_nightly.marc_nightly()
print(json.dumps({name: dag.params.get_param(name).schema for name in dag.params}))
"""


def test_every_param_has_a_type_a_title_and_help(repository: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PARAMS], capture_output=True, text=True, check=True, cwd=repository)
    params = json.loads(done.stdout.splitlines()[-1])
    assert params.keys() == {"ds", "config"}
    assert all({"type", "title"} <= schema.keys() for schema in params.values())
    assert params["ds"]["format"] == "date"

"""The DAGs in Airflow: all of them load, whole runs publish releases, and only transient faults are retried."""

import json
import subprocess
import sys
from collections.abc import Callable
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
DAGS = {
    "marc_nightly": {"ds", "config"},
    "marc_train": {"ds", "config"},
    "marc_backfill": {"first", "last", "buckets", "recompute", "config"},
    "marc_maintenance": {"config"},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small catalogue with a tiny bundle."""
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


@pytest.fixture
def trained(config: Path, spark: Any) -> Path:
    """The configuration with a promoted bundle."""
    train.train_bundle(open_deployment(load_settings(config)), ds=DS)
    return config


def test_every_dag_loads_without_an_error(airflow: Airflow) -> None:
    done = airflow.call("dags", "list-import-errors", "-o", "json")
    assert "marc_" not in done.stdout, done.stdout
    assert airflow.call("dags", "reserialize").returncode == 0
    assert {row["dag_id"] for row in airflow.json("dags", "list")} == DAGS.keys()


@pytest.mark.parametrize("dag", DAGS)
def test_every_param_has_a_type_a_title_and_help(shape_of: Callable[[str], dict[str, Any]], dag: str) -> None:
    shape = shape_of(dag)
    params = shape["params"]
    assert shape["doc"].startswith(f"{dag} ")
    assert params.keys() == DAGS[dag]
    assert all({"type", "title"} <= schema.keys() for schema in params.values())
    assert all(params[name]["format"] == "date" for name in params.keys() & {"ds", "first", "last"})


@pytest.mark.slow
def test_the_nightly_dag_publishes_one_release_and_a_second_run_is_skipped(airflow: Airflow, trained: Path) -> None:
    table_uri = load_settings(trained).table_uri
    log = airflow.run("marc_nightly", DS, config=trained)
    (release,) = read_releases(Storage(), table_uri)
    assert (release.ds, release.counts.items) == (DS, 400)
    assert release.release_id in log, "the asset event carries the facts of the release"
    airflow.run("marc_nightly", DS, config=trained)
    assert [r.release_id for r in read_releases(Storage(), table_uri)] == [release.release_id]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_past_dates_in_any_order_a_backfill_of_one_bucket_and_a_vacuum(airflow: Airflow, trained: Path) -> None:
    table_uri, storage = load_settings(trained).table_uri, Storage()
    dates = ["2026-11-12", "2026-11-10", "2026-11-11"]
    for ds in dates:
        write_catalogue(trained.parent / "catalogue", ds=ds, items=400)
        airflow.run("marc_nightly", ds, config=trained)
    before = {ds: read_log(storage, table_uri).live(ds) for ds in dates}
    assert all(before.values())
    conf = json.dumps({"first": "2026-11-10", "last": "2026-11-11", "buckets": [1], "recompute": True})
    backfilled = airflow.run("marc_backfill", "--conf", conf, config=trained)
    log = read_log(storage, table_uri)
    for ds in dates:
        old, new = before[ds], log.live(ds)
        assert old is not None
        assert new is not None
        kept = [file.path for file in old.table.files if bucket_number(file.path) == 0]
        assert [file.path for file in new.table.files if bucket_number(file.path) == 0] == kept
        assert (new.release_id == old.release_id) == (ds == "2026-11-12")
        assert verify(storage, new, table_uri=table_uri) == []
        assert new.release_id in backfilled or ds == "2026-11-12", "the event carries the facts"
    airflow.run("marc_maintenance", config=trained)
    assert read_releases(storage, table_uri) == list(log.releases)


@pytest.mark.slow
def test_a_backfill_names_all_dates_without_a_catalogue_and_starts_no_job(airflow: Airflow, trained: Path) -> None:
    conf = json.dumps({"first": "2030-01-01", "last": "2030-01-02"})
    log = airflow.run("marc_backfill", "--conf", conf, config=trained, fails=True)
    assert "nothing was started: 2030-01-01: no catalogue" in log
    assert "2030-01-02: no catalogue" in log


@pytest.mark.slow
def test_a_user_error_is_not_retried(airflow: Airflow, config: Path) -> None:
    log = airflow.run("marc_nightly", "2030-01-01", config=config, fails=True)
    assert "no catalogue for 2030-01-01" in log
    assert "not retried: correct the catalogue, the bundle or the configuration first" in log


EVALUATE = """
import json
from marc_pipeline.scheduler.retries import RetryFromTheStart, RetryTransientFaults
from marc_pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
errors = {f"exit {n}": RuntimeError(f"Cannot execute: spark-submit. Error code is: {n}.") for n in (1, 2, 3, 4, 137)}
errors |= {kind.__name__: kind("x") for kind in (UserError, GateRefused, CorruptFile, Superseded, OSError)}
print(json.dumps([
    {name: policy.evaluate(error, 1, 3).action.value for name, error in errors.items()}
    for policy in (RetryTransientFaults(), RetryFromTheStart())
]))
"""


def test_the_exit_code_decides_about_a_retry(repository: Path) -> None:
    command = [sys.executable, "-c", EVALUATE]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
    permanent = {"exit 2", "exit 3", "UserError", "GateRefused"}
    policies = json.loads(done.stdout.splitlines()[-1])
    for decided, fail in zip(policies, (permanent | {"exit 4", "Superseded"}, permanent), strict=True):
        assert len(decided) == 10
        assert decided == {name: "fail" if name in fail else "retry" for name in decided}

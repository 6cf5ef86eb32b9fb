"""The DAG marc_train through Airflow itself: its shape, and one whole run that ends in a promoted bundle."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_command import Airflow
from marc_pipeline.config import load_settings
from marc_pipeline.model.bundle import current_version, open_bundle
from marc_pipeline.storage import Storage
from marc_schemas.layers import LayerReport
from marc_schemas.promotion import BundleComparison
from marc_schemas.training import TrainingRun
from rated_shop import DS
from tiny_models import save_tiny_backbone
from training_world import make_world

pytestmark = [pytest.mark.airflow, pytest.mark.spark]

STAGES = ["identify", "hidden_states", "evaluate_layers", "train_marc", "evaluate_marc", "promote"]
SHAPE = """
import json, sys
sys.path.insert(0, "dags")
import marc_train
from marc_pipeline.scheduler.retries import RetryTransientFaults
dag = marc_train.marc_train()
print(json.dumps({
    "id": dag.dag_id,
    "schedule": str(dag.schedule),
    "runs": dag.max_active_runs,
    "catchup": dag.catchup,
    "tasks": {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks},
    "params": {name: dag.params.get_param(name).schema for name in dag.params},
    "jobs": {task.task_id: task.application for task in dag.tasks if hasattr(task, "application")},
    "arguments": {task.task_id: task.application_args for task in dag.tasks if hasattr(task, "application_args")},
    "policies": [isinstance(task.retry_policy, RetryTransientFaults) for task in dag.tasks],
}))
"""


@pytest.fixture(scope="module")
def shape(repository: Path) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", SHAPE], capture_output=True, text=True, check=True, cwd=repository)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_one_stage_follows_the_other_and_promotion_ends_the_run(shape: dict[str, Any]) -> None:
    assert (shape["id"], shape["schedule"], shape["runs"], shape["catchup"]) == ("marc_train", "None", 1, False)
    assert shape["tasks"].keys() == set(STAGES)
    for place, stage in enumerate(STAGES[:-1]):
        assert STAGES[place + 1] in shape["tasks"][stage]
    # Beside the chain, promote reads what identify announced.
    assert shape["tasks"] == {
        "identify": ["hidden_states", "promote"], "hidden_states": ["evaluate_layers"],
        "evaluate_layers": ["train_marc"], "train_marc": ["evaluate_marc"], "evaluate_marc": ["promote"], "promote": [],
    }  # fmt: skip


def test_every_stage_is_a_job_that_gets_what_identify_announced(shape: dict[str, Any], repository: Path) -> None:
    assert shape["jobs"].keys() == shape["arguments"].keys() == set(STAGES[1:-1])
    for stage, path in shape["jobs"].items():
        assert Path(path) == repository / "jobs" / f"{stage}.py"
        assert Path(path).is_file()
    for arguments in shape["arguments"].values():
        assert arguments[::2] == ["--config", "--ds", "--training-id", "--decided"]
        assert all("task_ids='identify'" in value for value in arguments[1::2])
    assert shape["policies"] == [True] * len(STAGES)


def test_every_param_has_a_type_and_a_title(shape: dict[str, Any]) -> None:
    assert shape["params"].keys() == {"ds", "config"}
    assert all({"type", "title"} <= schema.keys() for schema in shape["params"].values())
    assert shape["params"]["ds"]["format"] == "date"


# --- through Airflow


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Airflow:
    called = Airflow(tmp_path_factory.mktemp("airflow"), repository)
    done = called.call("db", "migrate")
    assert done.returncode == 0, done.stderr
    return called


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shop with ratings, a tiny backbone, and their configuration."""
    root = tmp_path_factory.mktemp("site")
    path = make_world(root, save_tiny_backbone(root / "backbone")).shop.config
    path.write_text(path.read_text().replace("dim: 8", "dim: 8, layers: 2"))
    return path


@pytest.mark.slow
def test_a_run_trains_judges_and_promotes_a_bundle(airflow: Airflow, config: Path) -> None:
    settings = load_settings(config)
    done = airflow.call("dags", "test", "marc_train", DS, config=config)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    bundle = open_bundle(Storage(), settings.bundle_uri)
    (folder,) = (Path(settings.work_uri) / "training").iterdir()
    (run,) = folder.glob("runs/*/run.json")
    trained = TrainingRun.model_validate_json(run.read_bytes())
    assert trained.bundle == bundle.version
    assert bundle.card.training["training_id"] == trained.training_id == folder.name
    comparison = BundleComparison.model_validate_json((folder / "comparisons" / f"{bundle.version}.json").read_bytes())
    assert (comparison.candidate, comparison.current, comparison.problems) == (bundle.version, None, [])
    (judged,) = (Path(settings.work_uri) / "layers" / "reports").iterdir()
    report = LayerReport.model_validate_json((judged / "layers.json").read_bytes())
    assert (report.report_id, report.ds, [model.basis for model in report.models]) == (judged.name, DS, ["clicks"])
    assert {"layers.html", "layers.md", "auc_by_depth.png"} <= {path.name for path in judged.iterdir()}
    # Judged, and not adopted: the configuration says how many layers are kept.
    assert (trained.layers, bundle.card.training["layers_from"]) == (2, "configuration")


@pytest.mark.slow
def test_what_the_user_must_mend_ends_the_run_at_once(airflow: Airflow, config: Path) -> None:
    settings = load_settings(config)
    before = current_version(Storage(), settings.bundle_uri)
    done = airflow.call("dags", "test", "marc_train", "2030-01-01", config=config)
    log = done.stdout + done.stderr
    assert done.returncode != 0
    assert "no catalogue for 2030-01-01" in log
    assert "not retried: the catalogue, the bundle or the configuration must be mended first" in log
    assert current_version(Storage(), settings.bundle_uri) == before

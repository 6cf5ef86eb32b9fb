"""The DAG marc_train in Airflow: its shape, and one whole run that ends in a promoted bundle."""

from collections.abc import Callable
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


def test_the_stages_form_a_chain_of_jobs_with_the_identified_arguments(
    shape_of: Callable[[str], dict[str, Any]], repository: Path
) -> None:
    shape = shape_of("marc_train")
    assert (shape["id"], shape["schedule"], shape["runs"], shape["catchup"]) == ("marc_train", "None", 1, False)
    # Each stage precedes the next one; promote also reads the results of identify.
    chain = {stage: [STAGES[place]] for place, stage in enumerate(STAGES[:-1], 1)}
    assert shape["tasks"] == {**chain, "identify": ["hidden_states", "promote"], "promote": []}
    assert shape["jobs"] == {stage: str(repository / "jobs" / f"{stage}.py") for stage in STAGES[1:-1]}
    assert all(Path(path).is_file() for path in shape["jobs"].values())
    assert shape["arguments"].keys() == shape["jobs"].keys()
    for arguments in shape["arguments"].values():
        assert arguments[::2] == ["--config", "--ds", "--training-id", "--decided"]
        assert all("task_ids='identify'" in value for value in arguments[1::2])
    assert shape["policies"] == [True] * len(STAGES)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a small shop with ratings and a tiny backbone."""
    root = tmp_path_factory.mktemp("site")
    path = make_world(root, save_tiny_backbone(root / "backbone")).shop.config
    path.write_text(path.read_text().replace("dim: 8", "dim: 8, layers: 2"))
    return path


@pytest.mark.slow
def test_a_run_trains_evaluates_and_promotes_a_bundle(airflow: Airflow, config: Path) -> None:
    settings = load_settings(config)
    airflow.run("marc_train", DS, config=config)
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
    # The configuration, and not the evaluation, decides how many layers are kept.
    assert (trained.layers, bundle.card.training["layers_from"]) == (2, "configuration")


@pytest.mark.slow
def test_a_user_error_ends_the_run_without_a_retry(airflow: Airflow, config: Path) -> None:
    settings = load_settings(config)
    before = current_version(Storage(), settings.bundle_uri)
    log = airflow.run("marc_train", "2030-01-01", config=config, fails=True)
    assert "no catalogue for 2030-01-01" in log
    assert "not retried: correct the catalogue, the bundle or the configuration first" in log
    assert current_version(Storage(), settings.bundle_uri) == before

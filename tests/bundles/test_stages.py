"""Training through its stages and the command line: one bundle per run, resume after kills, and user errors."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marc_pipeline.bundles import choices as training_choices
from marc_pipeline.bundles import run as train
from marc_pipeline.bundles import stages as training_run
from marc_pipeline.deployment import open_deployment
from marc_pipeline.errors import UserError
from marc_pipeline.model.bundle import current_version, open_bundle, promote
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.nightly import run
from marc_pipeline.reader.release import open_release
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.tasks import distribute
from marc_pipeline.storage import Storage
from marc_pipeline.training.training_set import identify_training, training_uri
from marc_schemas.promotion import BundleComparison
from marc_schemas.release import Release
from marc_schemas.training import TrainingRun
from rated_shop import DS, ITEMS, RATINGS, USERS, item, ratings
from tiny_models import LAYERS, WIDTH, save_tiny_backbone
from training_world import STORAGE, World, make_world

pytestmark = [
    pytest.mark.spark,
    pytest.mark.usefixtures("one_thread", "spark"),
    # peft 0.21 uses a deprecated property of transformers 5.23.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

NEXT = "2026-11-21"
Trained = tuple[World, dict[str, Any]]


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny") / "backbone")


@pytest.fixture
def world(tmp_path: Path, tiny_backbone: str) -> World:
    """A shop without a bundle."""
    return make_world(tmp_path, tiny_backbone)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, spark: Any) -> Trained:
    """A shop with a bundle that the command line trained, and the printed object."""
    world = make_world(tmp_path_factory.mktemp("trained"), tiny_backbone)
    return world, world.marc.json("train", "--ds", DS)


# --- the chain


def run_of(world: World) -> TrainingRun:
    return TrainingRun.model_validate_json((world.run_folder(world.settings) / "run.json").read_bytes())


def test_a_training_makes_the_bundle_current_and_records_the_run(trained: Trained) -> None:
    world, printed = trained
    bundle, settings = world.current(), world.settings
    assert (printed["bundle"], printed["uri"]) == (bundle.version, bundle.uri)
    assert bundle.card.compressor.kind == printed["compressor"]["kind"] == "bottleneck"
    assert bundle.card.training["training_id"] == world.training_id
    assert bundle.card.training["layers_from"] == "clicks"
    assert (bundle.card.dim, bundle.card.width, bundle.card.template) == (8, WIDTH, settings.catalogue.rendering)
    texts = ["{title}. {genres}".format(**item(number)) for number in range(ITEMS)]
    encoder = load_encoder(STORAGE, bundle.uri, bundle.version, settings.encode, TaskResources())
    vectors = encoder.encode(texts).vectors
    assert vectors.shape == (ITEMS, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    folder, done = world.run_folder(settings), run_of(world)
    assert (done.bundle, done.training_id, done.run_id) == (bundle.version, world.training_id, folder.name)
    assert done.layer_auc.keys() == set(range(LAYERS + 1))
    assert done.layers == printed["layers_kept"]
    assert done.layer_auc[done.layers] >= sorted(done.layer_auc.values())[1], "not the worst"
    assert [row["step"] for row in done.history] == sorted(row["step"] for row in done.history)
    assert all(np.isfinite(value) for row in done.history for value in row.values())
    assert max(row["validation_auc"] for row in done.history) > 0.6
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    compared = Path(training_uri(settings.work_uri, world.training_id), "comparisons", f"{done.bundle}.json")
    comparison = BundleComparison.model_validate_json(compared.read_bytes())
    assert (comparison.candidate, comparison.current, comparison.problems) == (done.bundle, None, [])
    compared_systems = {f"bundle:{done.bundle}", f"pca-layer-{done.layers}", f"pca-layer-{LAYERS}", "random"}
    assert {score.system for score in comparison.scores} == compared_systems
    assert len(comparison.scores) == len(compared_systems) * settings.evaluate.seeds


def test_a_repeated_training_returns_the_same_bundle(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    world, printed = trained
    for name in ("marc_pipeline.bundles.making.train_marc", "marc_pipeline.training.states.write_states"):
        monkeypatch.setattr(name, None)
    done = world.marc.call("train", "--ds", DS, "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert (again.pop("gate")["current"], printed["gate"]["current"]) == (printed["bundle"], None)
    assert again == {name: value for name, value in printed.items() if name != "gate"}
    assert f"bundle {printed['bundle']} exists already" in done.stderr
    assert f"training set: {world.training_id} exists already" in done.stderr
    assert world.current().version == printed["bundle"]


def test_other_settings_train_another_bundle_on_the_same_states(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, printed = trained
    monkeypatch.setattr("marc_pipeline.training.states.write_states", None)
    options = {"frozen": ["--seed", "5", "--max-steps", "6"], "tuned": ["--regime", "tuned", "--max-steps", "2"]}
    for regime, given in options.items():
        other = world.marc.json("train", "--ds", DS, "--layers", "2", *given, "--no-promote")
        assert other["bundle"] != printed["bundle"]
        facts = other["training"]
        assert (facts["regime"], facts["seed"]) == (regime, 5 if regime == "frozen" else 0)
        assert (facts["training_id"], facts["layers_from"]) == (world.training_id, "configuration")
        assert other["layers_kept"] == 2
        assert world.current().version == printed["bundle"], "not promoted"


def test_without_interactions_a_pca_is_trained_and_if_none_keeps_it(world: World) -> None:
    settings = world.shop.settings(interactions={"uri": None})
    bundle = train.train_bundle(open_deployment(settings), ds=DS).bundle
    assert (bundle.card.compressor.kind, bundle.card.training["regime"]) == ("pca", "pca")
    assert world.marc.json("train", "--ds", DS, "--if-none")["bundle"] == bundle.version
    assert not (Path(settings.work_uri) / "training").exists()


def test_later_interactions_change_neither_layers_nor_weights(trained: Trained, world: World) -> None:
    cut = RATINGS * 4 // 5
    rows = ratings()
    world.shop.rated(rows[:cut] + [{**row, "rating": "2" if row["rating"] == "5" else "5"} for row in rows[cut:]])
    bundle = train.train_bundle(open_deployment(world.settings), ds=DS, promote=False).bundle
    assert world.training_id != trained[0].training_id
    other = trained[0].current()
    for name in ("compressor.safetensors", "matching.safetensors"):
        assert bundle.card.files[name] == other.card.files[name]
    assert bundle.card.layers_kept == other.card.layers_kept
    assert run_of(world).layer_auc == run_of(trained[0]).layer_auc


# --- killed and resumed


class Killed(BaseException):
    """Simulates a killed process."""


def kill_after(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """Kill the process right after an object of this name was written so many times."""
    write, left = Storage.write, [times]

    def dying(storage: Storage, uri: str, data: bytes) -> None:
        write(storage, uri, data)
        left[0] -= uri.endswith(name)
        if not left[0]:
            raise Killed

    monkeypatch.setattr(Storage, "write", dying)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, spark: Any) -> str:
    """Version of the bundle of an uninterrupted training with two layers."""
    world = make_world(tmp_path_factory.mktemp("whole"), tiny_backbone)
    return train.train_bundle(open_deployment(world.shop.settings(train={"layers": 2})), ds=DS).bundle.version


@pytest.mark.parametrize(("name", "times"), [("checkpoint.pt", 4), ("bundle.json", 1)])
def test_a_killed_training_resumes_and_makes_the_same_bundle(
    world: World, uninterrupted: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    spark: Any, name: str, times: int,
) -> None:  # fmt: skip
    deployment = open_deployment(world.shop.settings(train={"layers": 2, "checkpoint_every": 1}))
    identity = identify_training(deployment, ds=DS)
    training_run.states_stage(spark, deployment, identity)
    kill_after(monkeypatch, name, times)
    with pytest.raises(Killed):
        training_run.train_stage(spark, deployment, identity.training_id)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has made no bundle with these settings yet; train first"):
        training_run.trained_bundle(deployment, identity.training_id)
    with caplog.at_level(logging.INFO, logger="marc_pipeline"):
        done = training_run.train_stage(spark, deployment, identity.training_id)
    assert "resumes from the checkpoint of step 4" in caplog.text or name != "checkpoint.pt"
    assert done.bundle == uninterrupted == training_run.trained_bundle(deployment, identity.training_id)
    steps = [row["step"] for row in done.history]
    assert steps == sorted(set(steps)), "each validation is recorded once"


def test_a_deleted_bundle_is_trained_again(world: World) -> None:
    settings = world.shop.settings(train={"layers": 2, "max_steps": 2})
    first = train.train_bundle(open_deployment(settings), ds=DS, promote=False).bundle
    shutil.rmtree(first.uri)
    assert train.train_bundle(open_deployment(settings), ds=DS, promote=False).bundle == first


# --- the nightly run after a promotion


def facts_of(release: Release) -> tuple[str, int, int, int]:
    """Version of the bundle, and numbers of items, encoded texts and carried-over vectors."""
    counts = release.counts
    return release.bundle.version, counts.items, counts.encoded, counts.reused


def test_the_nightly_run_after_a_promotion_encodes_every_item_with_the_new_bundle(world: World) -> None:
    settings = world.shop.settings(train={"layers": 2})
    changed = [{**item(3), "title": "Something else"}, *(item(n) for n in range(ITEMS + 2) if n not in {3, 7})]
    world.shop.catalogue(changed, ds=NEXT)
    first = train.train_bundle(open_deployment(settings), ds=DS).bundle
    before = run.run_all(open_deployment(settings), ds=DS).release
    assert facts_of(before) == (first.version, ITEMS, ITEMS, 0)
    quiet = run.run_all(open_deployment(settings), ds=NEXT).release
    assert facts_of(quiet) == (first.version, ITEMS + 1, 3, ITEMS - 2)

    other = training_choices.with_train(settings, {"layers": 3, "max_steps": 3})
    second = train.train_bundle(open_deployment(other), ds=DS, promote=False).bundle
    promote(STORAGE, settings.bundle_uri, second.version)
    after = run.run_all(open_deployment(settings), ds=NEXT).release
    assert facts_of(after) == (second.version, ITEMS + 1, ITEMS + 1, 0)
    tables = {ds: open_release(settings.table_uri, ds=ds).dataset().to_table() for ds in (DS, NEXT)}
    assert set(tables[DS]["bundle"].to_pylist()) == {first.version}
    assert set(tables[NEXT]["bundle"].to_pylist()) == {second.version}
    assert len(tables[NEXT]) == ITEMS + 1
    again = run.run_all(open_deployment(settings), ds=NEXT)
    assert (again.fresh, again.release.release_id) == (False, after.release_id)


# --- evaluate


def no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


SYSTEMS = ("random", "pca-layer-2", "marc", "pca-tuned")


@pytest.fixture(scope="module")
def evaluated(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The printed object of an evaluation with one seed, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    names = [word for name in SYSTEMS for word in ("--system", name)]
    options = ["--layers", "2", "--seeds", "1", "--dim", "8", *names, "--out", str(folder), "--json"]
    done = trained[0].marc.call("evaluate", "--ds", DS, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_an_evaluation_prints_one_json_object_and_writes_tables_and_plots(evaluated: tuple[str, Path]) -> None:
    printed, folder = evaluated
    found = json.loads(printed, parse_constant=no_constant)
    assert {summary["system"] for summary in found["summaries"]} == set(SYSTEMS)
    assert all(0 < summary["auc"] < 1 and summary["dim"] == 8 for summary in found["summaries"])
    assert (found["items"], found["users"], found["chosen_layer"]) == (ITEMS, USERS, 2)
    assert sum(found["rows"]) == RATINGS
    assert found["cold_rows"] > 0
    assert sorted(found["files"]) == sorted(str(path) for path in folder.iterdir())
    assert {"evaluation.json", "evaluation.md"} <= {path.name for path in folder.iterdir()}
    assert all(path.stat().st_size > 0 for path in folder.iterdir())
    json.loads((folder / "evaluation.json").read_text(), parse_constant=no_constant)


@pytest.mark.parametrize(
    ("options", "error", "work"),
    [
        (("--system", "magic"), "magic", "INFO"),
        (("--dim", "8", "--dim", "33"), "33 dimensions are wanted", "fits"),
    ],
)
def test_an_unknown_system_or_dimension_is_reported_before_any_work(
    trained: Trained, tmp_path: Path, options: tuple[str, ...], error: str, work: str
) -> None:
    arguments = ("--layers", "2", *options, "--out", str(tmp_path), "--json")
    done = trained[0].marc.call("evaluate", "--ds", DS, *arguments)
    assert (done.returncode, error in done.stderr) == (2, True), done.stderr
    assert work not in done.stderr


# --- several processes


@pytest.mark.slow
def test_several_processes_train_one_bundle(tmp_path: Path, tiny_backbone: str) -> None:
    world = make_world(tmp_path, tiny_backbone)
    options = ["--layers", "2", "--max-steps", "4", "--no-promote", "--json"]
    done = world.marc.call("train", "--ds", DS, *options, env={"MARC_TRAIN__PROCESSES": "2"})
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    bundle = open_bundle(STORAGE, printed["uri"])
    assert bundle.version == printed["bundle"]
    assert (bundle.card.compressor.kind, bundle.card.layers_kept) == ("bottleneck", 2)
    assert len(list(Path(world.settings.bundle_uri).iterdir())) == 1
    encoder = load_encoder(STORAGE, bundle.uri, bundle.version, world.settings.encode, TaskResources())
    assert np.isfinite(encoder.encode(["x"]).vectors).all()
    (run_file,) = Path(world.settings.work_uri).glob("training/*/runs/*/run.json")
    history = TrainingRun.model_validate_json(run_file.read_bytes()).history
    # The matching network learns alone in the first half.
    assert [row["step"] for row in history] == [2, 4]


@pytest.mark.slow
def test_a_user_error_in_a_process_is_raised_in_the_driver(spark: Any) -> None:
    def mistaken() -> None:
        raise UserError("what is wrong")

    with pytest.raises(UserError, match="what is wrong"):
        distribute(spark, mistaken, processes=2)


# --- mistakes


def renamed(rows: list[dict[str, Any]], old: str, new: str) -> list[dict[str, Any]]:
    return [{new if name == old else name: value for name, value in row.items()} for row in rows]


UNKNOWN = [{**row, "item_id": f"x{row['item_id']}"} for row in ratings()]
LOW = [{**row, "rating": str(1 + number % 2)} for number, row in enumerate(ratings())]
MISTAKES: dict[str, tuple[list[dict[str, Any]] | None, list[str], str]] = {
    "unknown items only": (UNKNOWN, [], "all of the 3,000 rows"),
    "no click": (LOW, [], "none of the 3,000 interactions .* is a click: column 'rating' has 1 to 2"),
    "no timestamps": (renamed(ratings(), "timestamp", "when"), [], "interactions.timestamp_column names column"),
    "one user": ([{**row, "user_id": "u"} for row in ratings()], [], "all 3,000 interactions .* are of one user"),
    "no rating": ([*ratings()[1:], {**ratings()[0], "rating": "nan"}], [], "column 'rating' .* no rating"),
    "one moment": ([{**row, "timestamp": "1"} for row in ratings()], [], "all 3,000 interactions .* the same time"),
    "no interactions": (None, ["--compressor", "marc"], "interactions.uri is not set"),
    "too many layers": (ratings(), ["--layers", "5"], "layers.* the backbone has 4"),
    "too many dimensions": (ratings(), ["--dim", "33"], "33 dimensions are wanted, .* 32 numbers"),
    "too many for a layer": (ratings(), ["--dim", "33", "--layers", "2"], "33 dimensions are wanted, .* 32 numbers"),
    "no regime": (ratings(), ["--regime", "lora"], "train: regime: Input should be 'frozen' or 'tuned' .got 'lora'."),
    "no compressor": (ratings(), ["--compressor", "zip"], "train: compressor: Input should be"),
    "no date": (ratings(), ["--ds", "today"], "'today' is not a date"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_user_error_gives_exit_code_2_and_one_line(
    world: World, case: tuple[list[dict[str, Any]] | None, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, arguments, says = case
    if rows is None:
        world.shop.config.write_text(world.shop.config.read_text().replace("interactions:", "storage: {} #"))
    else:
        world.shop.rated(rows)
    # An error in a Spark task would add many lines of Spark.
    monkeypatch.setattr("marc_pipeline.evaluation.tasks.run_buckets", None)
    done = world.marc.call("train", "--ds", DS, *arguments)
    lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines[0]
    assert "Traceback" not in done.stderr
    assert "INFO states:" not in done.stderr, "reported before the pass over all texts"
    assert current_version(STORAGE, f"{world.shop.root}/data/bundles") is None
    assert done.stdout == ""


def test_a_holdout_with_one_label_is_refused(world: World) -> None:
    cut = RATINGS * 4 // 5
    rows = [{**row, "rating": "5"} if cut * 0.9 < number < cut else row for number, row in enumerate(ratings())]
    world.shop.rated(rows)
    settings = world.shop.settings(train={"layers": 2})
    with pytest.raises(UserError):
        train.train_bundle(open_deployment(settings), ds=DS)
    assert not Path(settings.bundle_uri).exists()


def test_the_installed_program_prints_one_line_and_exits_with_2(world: World) -> None:
    marc = [str(Path(sys.executable).with_name("marc")), "--config", str(world.shop.config)]
    arguments = ["train", "--ds", DS, "--json", "--compressor", "nothing"]
    done = subprocess.run([*marc, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert " ERROR train: compressor: Input should be" in line

"""Training through its stages and the command line: one bundle per run, kills and mistakes, and the night after."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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
from marc_pipeline.spark.session import distribute
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
    pytest.mark.usefixtures("spark"),
    # peft 0.21 asks transformers 5.23 for a property by its old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

NEXT = "2026-11-21"


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_backbone(tmp_path_factory.mktemp("tiny") / "backbone")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path: Path, tiny_backbone: str) -> World:
    """A shop where nothing was trained."""
    return make_world(tmp_path, tiny_backbone)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, spark: Any) -> tuple[World, dict[str, Any]]:
    """A shop whose bundle was trained by the command line, and what that said."""
    world = make_world(tmp_path_factory.mktemp("trained"), tiny_backbone)
    return world, world.marc.json("train", "--ds", DS)


# --- the chain


def test_a_training_ends_in_a_current_bundle_and_says_what_it_is(trained: tuple[World, dict[str, Any]]) -> None:
    world, said = trained
    bundle = world.current()
    assert (said["bundle"], said["uri"]) == (bundle.version, bundle.uri)
    assert bundle.card.compressor.kind == said["compressor"]["kind"] == "bottleneck"
    assert bundle.card.training["training_id"] == world.training_id
    assert bundle.card.training["layers_from"] == "clicks"
    assert (bundle.card.dim, bundle.card.width, bundle.card.template) == (8, WIDTH, "{title}. {genres}")
    texts = ["{title}. {genres}".format(**item(number)) for number in range(ITEMS)]
    encoder = load_encoder(STORAGE, bundle.uri, bundle.version, world.settings.encode, TaskResources())
    vectors = encoder.encode(texts).vectors
    assert vectors.shape == (ITEMS, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_run_leaves_what_it_did_to_be_read(trained: tuple[World, dict[str, Any]]) -> None:
    world, said = trained
    folder = world.run_folder(world.settings)
    done = TrainingRun.model_validate_json((folder / "run.json").read_bytes())
    assert (done.bundle, done.training_id, done.run_id) == (said["bundle"], world.training_id, folder.name)
    assert done.layer_auc.keys() == set(range(1, LAYERS + 1))
    assert done.layers == said["layers_kept"]
    assert done.layer_auc[done.layers] >= sorted(done.layer_auc.values())[1], "not the worst"
    assert [row["step"] for row in done.history] == sorted(row["step"] for row in done.history)
    assert all(np.isfinite(value) for row in done.history for value in row.values())
    assert max(row["validation_auc"] for row in done.history) > 0.6, "there is something to learn, and it is learned"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    compared = Path(training_uri(world.settings.work_uri, world.training_id), "comparisons", f"{done.bundle}.json")
    comparison = BundleComparison.model_validate_json(compared.read_bytes())
    assert (comparison.candidate, comparison.current, comparison.problems) == (done.bundle, None, [])
    assert len(comparison.scores) == world.settings.evaluate.seeds


def test_a_second_training_trains_nothing_and_ends_in_the_same_bundle(
    trained: tuple[World, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, said = trained
    for name in ("marc_pipeline.bundles.making.train_marc", "marc_pipeline.training.states.write_states"):
        monkeypatch.setattr(name, None)
    done = world.marc.call("train", "--ds", DS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == said
    assert f"bundle {said['bundle']} exists already" in done.stderr
    assert f"training set: {world.training_id} exists already" in done.stderr
    assert world.current().version == said["bundle"]


def test_other_settings_train_another_bundle_on_the_same_states(
    trained: tuple[World, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, said = trained
    monkeypatch.setattr("marc_pipeline.training.states.write_states", None)
    other = world.marc.json("train", "--ds", DS, "--layers", "2", "--seed", "5", "--max-steps", "6", "--no-promote")
    assert other["bundle"] != said["bundle"]
    assert (other["layers_kept"], other["training"]["seed"], other["training"]["training_id"]) == (
        2,
        5,
        world.training_id,
    )
    assert other["training"]["layers_from"] == "configuration"
    assert world.current().version == said["bundle"], "not promoted"


def test_the_tuned_regime_is_one_option_away(trained: tuple[World, dict[str, Any]]) -> None:
    world, said = trained
    other = world.marc.json(
        "train", "--ds", DS, "--regime", "tuned", "--layers", "2", "--max-steps", "2", "--no-promote"
    )  # fmt: skip
    assert (other["training"]["regime"], other["layers_kept"]) == ("tuned", 2)
    assert world.current().version == said["bundle"]


def test_without_interactions_a_pca_is_trained_and_if_none_leaves_it(world: World) -> None:
    settings = world.shop.settings(interactions={"uri": None})
    bundle = train.train_bundle(open_deployment(settings), ds=DS)
    assert (bundle.card.compressor.kind, bundle.card.training["regime"]) == ("pca", "pca")
    assert world.marc.json("train", "--ds", DS, "--if-none")["bundle"] == bundle.version
    assert not (Path(settings.work_uri) / "training").exists()


def test_what_users_did_later_has_no_part_in_layer_nor_weights(
    trained: tuple[World, dict[str, Any]], world: World
) -> None:
    cut = RATINGS * 4 // 5
    rows = ratings()
    world.shop.rated(rows[:cut] + [{**row, "rating": "2" if row["rating"] == "5" else "5"} for row in rows[cut:]])
    bundle = train.train_bundle(open_deployment(world.settings), ds=DS, promote=False)
    assert world.training_id != trained[0].training_id
    other = trained[0].current()
    for name in ("compressor.safetensors", "matching.safetensors"):
        assert bundle.card.files[name] == other.card.files[name]
    assert bundle.card.layers_kept == other.card.layers_kept
    runs = [
        TrainingRun.model_validate_json((one.run_folder(one.settings) / "run.json").read_bytes())
        for one in (trained[0], world)
    ]
    assert runs[0].layer_auc == runs[1].layer_auc


# --- killed and started again


class Killed(BaseException):
    """Stands for a process that ends at once."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ends the process right after an object of a name was written so many times."""
    write = Storage.write

    def arm(name: str, times: int) -> None:
        left = [times]

        def dying(storage: Storage, uri: str, data: bytes) -> None:
            write(storage, uri, data)
            left[0] -= uri.endswith(name)
            if not left[0]:
                raise Killed

        monkeypatch.setattr(Storage, "write", dying)

    yield arm
    monkeypatch.setattr(Storage, "write", write)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, spark: Any) -> str:
    """Version of the bundle that a training on two layers ends in."""
    world = make_world(tmp_path_factory.mktemp("whole"), tiny_backbone)
    return train.train_bundle(open_deployment(world.shop.settings(train={"layers": 2})), ds=DS).version


@pytest.mark.parametrize(("name", "times"), [("checkpoint.pt", 4), ("bundle.json", 1)])
def test_a_killed_training_goes_on_and_ends_in_the_same_bundle(
    world: World, uninterrupted: str, kill: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    spark: Any, name: str, times: int,
) -> None:  # fmt: skip
    settings = world.shop.settings(train={"layers": 2, "checkpoint_every": 5})
    identity = identify_training(open_deployment(settings), ds=DS)
    training_run.states_stage(spark, open_deployment(settings), identity)
    kill(name, times)
    with pytest.raises(Killed):
        training_run.train_stage(spark, open_deployment(settings), identity.training_id)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has made no bundle with these settings yet; train first"):
        training_run.trained_bundle(open_deployment(settings), identity.training_id)
    with caplog.at_level(logging.INFO, logger="marc_pipeline"):
        done = training_run.train_stage(spark, open_deployment(settings), identity.training_id)
    assert "resumes from the checkpoint of step 20" in caplog.text or name != "checkpoint.pt"
    assert done.bundle == uninterrupted == training_run.trained_bundle(open_deployment(settings), identity.training_id)
    steps = [row["step"] for row in done.history]
    assert steps == sorted(set(steps)), "no validation is told twice"


def test_a_bundle_that_is_gone_is_trained_again(world: World) -> None:
    import shutil

    settings = world.shop.settings(train={"layers": 2, "max_steps": 2})
    first = train.train_bundle(open_deployment(settings), ds=DS, promote=False)
    shutil.rmtree(first.uri)
    assert train.train_bundle(open_deployment(settings), ds=DS, promote=False) == first


# --- the night after


def facts_of(release: Release) -> tuple[str, int, int, int]:
    """Version of the bundle, items, encoded texts, carried-over vectors."""
    counts = release.counts
    return release.bundle.version, counts.items, counts.encoded, counts.reused


def test_the_night_after_a_promotion_encodes_everything_with_the_new_bundle(world: World) -> None:
    settings = world.shop.settings(train={"layers": 2})
    changed = [{**item(3), "title": "Something else"}, *(item(n) for n in range(ITEMS + 2) if n not in {3, 7})]
    world.shop.catalogue(changed, ds=NEXT)
    first = train.train_bundle(open_deployment(settings), ds=DS)
    before = run.run_all(open_deployment(settings), ds=DS).release
    assert facts_of(before) == (first.version, ITEMS, ITEMS, 0)
    quiet = run.run_all(open_deployment(settings), ds=NEXT).release
    assert facts_of(quiet) == (first.version, ITEMS + 1, 3, ITEMS - 2)

    other = training_choices.with_train(settings, {"layers": 3, "max_steps": 3})
    second = train.train_bundle(open_deployment(other), ds=DS, promote=False)
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
def evaluated(trained: tuple[World, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What an evaluation with one seed printed, and its folder."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    names = [word for name in SYSTEMS for word in ("--system", name)]
    options = ["--layers", "2", "--seeds", "1", "--dim", "8", *names, "--out", str(folder), "--json"]
    done = trained[0].marc.call("evaluate", "--ds", DS, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def test_an_evaluation_prints_one_json_object_and_writes_tables_and_plots(evaluated: tuple[str, Path]) -> None:
    printed, folder = evaluated
    found = json.loads(printed)
    assert {summary["system"] for summary in found["summaries"]} == set(SYSTEMS)
    assert all(0 < summary["auc"] < 1 and summary["dim"] == 8 for summary in found["summaries"])
    assert (found["items"], found["users"], found["chosen_layer"]) == (ITEMS, USERS, 2)
    assert sum(found["rows"]) == RATINGS
    assert found["cold_rows"] > 0
    assert sorted(found["files"]) == sorted(str(path) for path in folder.iterdir())
    assert {"evaluation.json", "evaluation.md"} <= {path.name for path in folder.iterdir()}
    assert all(path.stat().st_size > 0 for path in folder.iterdir())
    json.loads((folder / "evaluation.json").read_text(), parse_constant=no_constant)


def test_what_an_evaluation_prints_is_json_for_everybody(evaluated: tuple[str, Path]) -> None:
    assert isinstance(json.loads(evaluated[0], parse_constant=no_constant), dict)


def test_an_unknown_system_is_the_users_mistake(trained: tuple[World, dict[str, Any]], tmp_path: Path) -> None:
    arguments = ("--layers", "2", "--system", "magic", "--out", str(tmp_path), "--json")
    done = trained[0].marc.call("evaluate", "--ds", DS, *arguments)
    assert (done.returncode, "magic" in done.stderr) == (2, True), done.stderr
    assert "INFO" not in done.stderr  # said before any work


def test_a_dimension_beyond_the_backbone_is_said_before_anything_is_judged(
    trained: tuple[World, dict[str, Any]], tmp_path: Path
) -> None:
    arguments = ("--layers", "2", "--dim", "8", "--dim", "33", "--out", str(tmp_path), "--json")
    done = trained[0].marc.call("evaluate", "--ds", DS, *arguments)
    assert (done.returncode, "33 dimensions are wanted" in done.stderr) == (2, True), done.stderr
    assert "fits" not in done.stderr


# --- several processes


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: str, spark: Any) -> tuple[World, str]:
    """A shop whose bundle two processes trained, and what was printed."""
    world = make_world(tmp_path_factory.mktemp("several"), tiny_backbone)
    options = ["--layers", "2", "--max-steps", "4", "--no-promote", "--json"]
    done = world.marc.call("train", "--ds", DS, *options, env={"MARC_TRAIN__PROCESSES": "2"})
    assert done.returncode == 0, done.stderr
    return world, done.stdout


@pytest.mark.slow
def test_several_processes_train_one_bundle(several: tuple[World, str]) -> None:
    world, printed = several
    said = json.loads(printed.splitlines()[-1])
    bundle = open_bundle(STORAGE, said["uri"])
    assert bundle.version == said["bundle"]
    assert (bundle.card.compressor.kind, bundle.card.layers_kept) == ("bottleneck", 2)
    assert len(list(Path(world.settings.bundle_uri).iterdir())) == 1
    encoder = load_encoder(STORAGE, bundle.uri, bundle.version, world.settings.encode, TaskResources())
    assert np.isfinite(encoder.encode(["x"]).vectors).all()
    (done,) = Path(world.settings.work_uri).glob("training/*/runs/*/run.json")
    history = TrainingRun.model_validate_json(done.read_bytes()).history
    assert [row["step"] for row in history] == [4]


@pytest.mark.slow
def test_several_processes_leave_standard_output_to_the_result(several: tuple[World, str]) -> None:
    assert json.loads(several[1])["bundle"]


@pytest.mark.slow
def test_a_mistake_that_a_process_finds_is_the_users_mistake(spark: Any) -> None:
    def mistaken() -> None:
        raise UserError("what is wrong")

    with pytest.raises(UserError, match="what is wrong"):
        distribute(spark, mistaken, processes=2)


# --- mistakes


def renamed(rows: list[dict[str, Any]], old: str, new: str) -> list[dict[str, Any]]:
    return [{new if name == old else name: value for name, value in row.items()} for row in rows]


UNKNOWN = [{**row, "item_id": f"x{row['item_id']}"} for row in ratings()]
MISTAKES: dict[str, tuple[list[dict[str, Any]] | None, list[str], str]] = {
    "unknown items only": (UNKNOWN, [], "all of the 3,000 rows"),
    "clicks only": ([{**row, "rating": "5"} for row in ratings()], [], "all 3,000 interactions .* are clicks"),
    "no click": ([{**row, "rating": "1"} for row in ratings()], [], "none of the 3,000 interactions .* is a click"),
    "no timestamps": (renamed(ratings(), "timestamp", "when"), [], "interactions.timestamp_column names column"),
    "one user": ([{**row, "user_id": "u"} for row in ratings()], [], "all 3,000 interactions .* are of one user"),
    "no rating": ([*ratings()[1:], {**ratings()[0], "rating": "nan"}], [], "column 'rating' .* no rating"),
    "one moment": ([{**row, "timestamp": "1"} for row in ratings()], [], "leaves train with 0 rows"),
    "no interactions": (None, ["--compressor", "marc"], "interactions.uri is not set"),
    "too many layers": (ratings(), ["--layers", "5"], "layers.* the backbone has 4"),
    "too many dimensions": (ratings(), ["--dim", "33"], "33 dimensions are wanted, .* 32 numbers"),
    "too many for a layer": (ratings(), ["--dim", "33", "--layers", "2"], "33 dimensions are wanted, .* 32 numbers"),
    "no regime": (ratings(), ["--regime", "lora"], "train: regime: Input should be 'frozen' or 'tuned' .got 'lora'."),
    "no compressor": (ratings(), ["--compressor", "zip"], "train: compressor: Input should be"),
    "no date": (ratings(), ["--ds", "today"], "'today' is no date"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_users_mistake_gives_exit_code_2_and_one_clear_line(
    world: World, case: tuple[list[dict[str, Any]] | None, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, arguments, says = case
    if rows is None:
        world.shop.config.write_text(world.shop.config.read_text().replace("interactions:", "storage: {} #"))
    else:
        world.shop.rated(rows)
    # A mistake that a Spark task finds fills the screen with Spark's own errors.
    monkeypatch.setattr("marc_pipeline.evaluation.tasks.run_buckets", None)
    done = world.marc.call("train", "--ds", DS, *arguments)
    lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert re.search(says, lines[0]), lines[0]
    assert "Traceback" not in done.stderr
    # Nobody waits for the pass over all texts to hear of it.
    assert "INFO states:" not in done.stderr
    assert current_version(STORAGE, f"{world.shop.root}/data/bundles") is None
    assert done.stdout == ""


def test_interactions_of_one_label_before_the_boundarys_end_are_the_users_mistake(world: World) -> None:
    """The rows that early stopping looks at are a part of the split, too."""
    cut = RATINGS * 4 // 5
    rows = [{**row, "rating": "5"} if cut * 0.9 < number < cut else row for number, row in enumerate(ratings())]
    world.shop.rated(rows)
    settings = world.shop.settings(train={"layers": 2})
    with pytest.raises(UserError):
        train.train_bundle(open_deployment(settings), ds=DS)
    assert not Path(settings.bundle_uri).exists()


def test_the_program_itself_says_one_line_and_exits_with_2(world: World) -> None:
    marc = [str(Path(sys.executable).with_name("marc")), "--config", str(world.shop.config)]
    arguments = ["train", "--ds", DS, "--json", "--compressor", "nothing"]
    done = subprocess.run([*marc, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert " ERROR train: compressor: Input should be" in line

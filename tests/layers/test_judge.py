"""The evaluation of layers through its stages and the command line: reports, adoption, and the layers of trainings."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layer_reference import dataset_entropy
from marc_command import Marc
from marc_pipeline.bundles import choices as training_choices
from marc_pipeline.bundles.choices import adopted_uri, reviewed, with_train
from marc_pipeline.config import LayerSettings, Settings, load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.layer_choice import choose_layer
from marc_pipeline.evaluation.layer_search import FOLDS
from marc_pipeline.layers import judge as module
from marc_pipeline.layers.findings import METRICS
from marc_pipeline.layers.judge import adopt, judge_layers, publish_report, report_folder
from marc_pipeline.model.bundle import open_bundle
from marc_pipeline.storage import Storage
from marc_pipeline.training.training_set import identify_training, open_training_set
from marc_schemas.layers import Adopted, JudgedLayer, JudgedModel, LayerReport, Recommendation
from rated_shop import CONFIG, DS, ITEMS, RATINGS, Shop, item, ratings, write_rows
from tiny_models import LAYERS, WIDTH, save_tiny_backbone, save_tiny_vision_backbone
from training_world import EXTRA

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark", "one_thread")]

STORAGE = Storage()
SMALL = "layers: {{sample: 200, views: 2, block: 80}}\n"
QUICK = ("--max-steps", "2", "--no-promote")
Backbones = dict[str, str]
TEXTS = ["{title}. {genres}".format(**item(number)) for number in range(ITEMS)]


@dataclass(frozen=True)
class World:
    """A shop and its command line."""

    root: Path
    marc: Marc

    @property
    def settings(self) -> Settings:
        return load_settings(self.marc.config)

    def layers(self, *arguments: str) -> dict[str, Any]:
        return self.marc.json("layers", "--out", str(self.root / "out"), *arguments)

    def mistake(self, *arguments: str) -> str:
        """The error line of a call with exit code 2."""
        done = self.marc.call(*arguments, "--json")
        lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
        assert (done.returncode, done.stdout, len(lines)) == (2, "", 1), done.stderr
        assert "Traceback" not in done.stderr
        return lines[0]


Judged = tuple[World, dict[str, Any]]
MakeWorld = Callable[..., World]


def make_world(root: Path, backbone: str, *, clicks: bool = True, train: str = "") -> World:
    """A shop with or without interactions; ``train`` adds settings of trainings."""
    text = CONFIG + EXTRA.replace("BACKBONE", f"{backbone}{train}").replace("seeds: 2", "seeds: 1") + SMALL
    if not clicks:
        text = re.sub(r"interactions: .*\n", "", text)
    Shop(root)
    return World(root, Marc(root, text))


def report_of(answer: dict[str, Any]) -> LayerReport:
    facts = {name: value for name, value in answer.items() if name not in ("adopted", "files")}
    return LayerReport.model_validate_json(json.dumps(facts))


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    folder = tmp_path_factory.mktemp("backbones")
    found = {name: save_tiny_backbone(folder / name, name) for name in ("bert", "mamba")}
    return {**found, "vit": save_tiny_vision_backbone(folder / "vit")}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, backbones: Backbones, spark: Any) -> Judged:
    """A shop with interactions whose layers the command line has evaluated, and its JSON output."""
    world = make_world(tmp_path_factory.mktemp("judged"), backbones["bert"])
    return world, world.layers("--ds", DS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, backbones: Backbones) -> World:
    """A shop without interactions."""
    return make_world(tmp_path_factory.mktemp("plain"), backbones["bert"], clicks=False)


@pytest.fixture
def twin(judged: Judged, backbones: Backbones, tmp_path: Path) -> MakeWorld:
    """Makes a copy of the evaluated shop and its work area, with other settings of trainings."""

    def make(**changes: Any) -> World:
        world = make_world(tmp_path / "twin", backbones["bert"], **changes)
        shutil.copytree(judged[0].settings.work_uri, world.settings.work_uri)
        return world

    return make


# With clicks


def test_an_evaluation_prints_one_json_object_and_writes_its_files(judged: Judged) -> None:
    world, answer = judged
    plots = {"auc_by_speed.png", "auc_by_depth.png", "metrics_by_depth.png", "cost_by_depth.png"}
    names = {"layers.json", "layers.html", "layers.md", *plots}
    assert {Path(name).name for name in answer["files"]} == names
    assert sorted(answer["files"]) == sorted(str(path) for path in (world.root / "out").iterdir())
    report = report_of(answer)
    assert LayerReport.model_validate_json((world.root / "out" / "layers.json").read_bytes()) == report
    left = Path(report_folder(world.settings, report.report_id))
    assert LayerReport.model_validate_json((left / "layers.json").read_bytes()) == report
    assert (report.ds, report.kind, report.dim, report.sample, report.views) == (DS, "texts", 8, ITEMS, 2)
    assert not answer["adopted"]
    assert not Path(world.settings.bundle_uri).exists()
    (model,) = report.models
    facts = (model.layers, model.width, model.pooling, model.max_tokens, model.inputs)
    assert facts == (LAYERS, WIDTH, "mean", 48, ITEMS)
    assert [layer.layer for layer in model.judged] == [*range(LAYERS + 1)]
    assert all(np.isfinite([layer.metrics[metric.name] for metric in METRICS]).all() for layer in model.judged)
    assert all(layer.metrics["texts"] == ITEMS for layer in model.judged)
    seconds = [layer.seconds for layer in model.judged]
    assert 0 < seconds[0] < seconds[-1] == max(seconds)


def test_every_layer_has_the_auc_of_an_evaluation_and_the_training_part_chooses(judged: Judged) -> None:
    world, answer = judged
    report = report_of(answer)
    (model,) = report.models
    systems = ("--system", "pca-layer-0", "--system", "pca-layer-3")
    found = world.marc.json("evaluate", "--ds", DS, "--layers", "2", "--out", str(world.root / "evaluation"), *systems)
    expected = {summary["system"]: summary["auc"] for summary in found["summaries"]}
    for name, layer in (("pca-layer-0", 0), ("pca-layer-3", 3)):
        assert model.judged[layer].test_auc == pytest.approx([expected[name]], abs=1e-6)
    assert [len(layer.fold_auc) for layer in model.judged] == [FOLDS] * (LAYERS + 1)
    assert max(np.mean(layer.fold_auc) for layer in model.judged) > 0.6 > np.mean(model.random_auc)
    chosen = choose_layer({layer.layer: layer.fold_auc for layer in model.judged})
    (advice,) = report.recommendations
    assert (model.keep, model.basis) == (chosen, "clicks")
    assert (advice.layers, advice.pooling, advice.basis, advice.backbone) == (chosen, "mean", "clicks", model.backbone)


def test_metrics_equal_those_of_the_states_of_trainings(judged: Judged) -> None:
    world, answer = judged
    identity = identify_training(open_deployment(world.settings), ds=DS)
    training_set = open_training_set(STORAGE, world.settings.work_uri, identity.training_id)
    assert sorted(training_set.texts) == sorted(TEXTS)
    for layer in report_of(answer).models[0].judged:
        states = torch.from_numpy(training_set.states(layer.layer))
        assert layer.metrics["dataset_entropy"] == pytest.approx(dataset_entropy(states).item(), abs=1e-4)


def test_a_second_call_reads_the_report_without_spark(
    judged: Judged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world, answer = judged
    for name in ("marc_pipeline.spark.session.spark_session", "marc_pipeline.layers.sweep.run_part"):
        monkeypatch.setattr(name, None)
    done = world.marc.call("layers", "--ds", DS, "--json", "--out", str(tmp_path / "new" / "out"))
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout, parse_constant=pytest.fail)
    assert report_of(again) == report_of(answer)
    assert len(list((tmp_path / "new" / "out").iterdir())) == len(answer["files"])
    assert f"report {answer['report_id']} exists already" in done.stderr


def test_other_settings_of_metrics_give_another_report_from_the_same_states_and_clicks(
    judged: Judged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world, answer = judged
    searched = ("search_layers", "pca_test_scores")
    for name in ("training.states.write_states", *(f"evaluation.layer_search.{name}" for name in searched)):
        monkeypatch.setattr(f"marc_pipeline.{name}", None)
    other = report_of(world.layers("--ds", DS, "--sample", "50", "--out", str(tmp_path)))
    first = report_of(answer)
    assert other.report_id != first.report_id
    assert (other.sample, other.models[0].inputs) == (50, 50)
    for one, two in zip(other.models[0].judged, first.models[0].judged, strict=True):
        assert one.metrics["dataset_entropy"] != two.metrics["dataset_entropy"]
        assert (one.test_auc, one.fold_auc, one.weights_bytes) == (two.test_auc, two.fold_auc, two.weights_bytes)
    assert report_of(world.layers("--ds", DS, "--out", str(tmp_path))) == first


def test_every_input_changes_the_id_of_the_report(judged: Judged) -> None:
    settings = judged[0].settings

    def id_of(settings: Settings, **options: Any) -> str:
        return module._report_id(module._candidates(open_deployment(settings), ds=DS, **options), DS)

    assert id_of(settings) == judged[1]["report_id"]
    values: dict[str, Any] = {
        "sample": 50, "views": 3, "probability": 0.1, "block": 40, "order": 2.0, "temperature": 0.5, "seed": 1,
    }  # fmt: skip
    assert values.keys() == LayerSettings.model_fields.keys()
    others = [
        settings.model_copy(update={"layers": settings.layers.model_copy(update={name: value})})
        for name, value in values.items()
    ]
    others += [with_train(settings, {name: value}) for name, value in {"dim": 4, "max_tokens": 20, "seed": 3}.items()]
    others.append(settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"seeds": 3})}))
    found = [id_of(settings, poolings=poolings) for poolings in ([], ["cls"], ["mean", "cls"])] + [*map(id_of, others)]
    assert len(set(found)) == len(found)
    # The layers that trainings keep at present do not influence the report.
    assert id_of(with_train(settings, {"layers": 2})) == id_of(settings)


def test_later_clicks_do_not_influence_the_choice(judged: Judged, backbones: Backbones, tmp_path: Path) -> None:
    world = make_world(tmp_path, backbones["bert"])
    cut, rows = RATINGS * 4 // 5, ratings()
    later = [{**row, "rating": "2" if row["rating"] == "5" else "5"} for row in rows[cut:]]
    write_rows(tmp_path / "ratings.csv", rows[:cut] + later)
    report, first = judge_layers(open_deployment(world.settings), ds=DS), report_of(judged[1])
    assert report.report_id != first.report_id
    # The reasons contain measured speeds.
    kept = [[(one.layers, one.pooling) for one in found.recommendations] for found in (report, first)]
    assert kept[0] == kept[1]
    for one, other in zip(report.models[0].judged, first.models[0].judged, strict=True):
        assert one.fold_auc == other.fold_auc
        assert one.test_auc != other.test_auc
        assert one.metrics == pytest.approx(other.metrics, abs=1e-9)


# As a stage of a run


def test_the_stage_gives_the_same_report_for_the_announced_training(judged: Judged, twin: MakeWorld) -> None:
    settings, report = twin().settings, report_of(judged[1])
    announced = identify_training(open_deployment(settings), ds=DS).training_id
    assert judge_layers(open_deployment(settings), ds=DS, expected=announced) == report
    with pytest.raises(UserError, match="changed during the training"):
        judge_layers(open_deployment(settings), ds=DS, expected="0" * 32)
    folder = Path(publish_report(open_deployment(settings), report))
    assert folder == Path(report_folder(settings, report.report_id))
    assert {path.name for path in folder.iterdir()} == {Path(name).name for name in judged[1]["files"]}
    again = judge_layers(open_deployment(settings), ds=DS, expected=announced)
    assert again == report, "the pages in its folder do not matter"


# Without clicks


def both(backbones: Backbones) -> list[str]:
    """Options for two backbones and two poolings."""
    names = ["--backbone", backbones["bert"], "--backbone", backbones["mamba"]]
    return [*names, "--pooling", "mean", "--pooling", "cls"]


@pytest.fixture(scope="module")
def compared(plain: World, backbones: Backbones, spark: Any) -> LayerReport:
    """Two backbones with two poolings each, in one call."""
    answer = plain.layers("--ds", DS, "--sample", "40", *both(backbones))
    assert not any("auc" in Path(name).name for name in answer["files"])
    return report_of(answer)


def test_several_backbones_and_poolings_are_evaluated_in_one_call(compared: LayerReport, backbones: Backbones) -> None:
    found = [(model.backbone, model.pooling) for model in compared.models]
    assert found == [(backbones[name], pooling) for name in ("bert", "mamba") for pooling in ("mean", "cls")]
    assert (compared.dim, compared.sample) == (0, 40)
    assert len({model.sweep_id for model in compared.models}) == 4
    for model in compared.models:
        assert model.basis == "metrics"
        assert all(not layer.test_auc and not layer.fold_auc for layer in model.judged)
        assert all(layer.metrics["texts"] == 40 for layer in model.judged)
    # Token figures do not depend on the pooling; figures of pooled vectors do.
    mean, cls = (model.judged[2].metrics for model in compared.models[:2])
    assert mean["prompt_entropy"] == pytest.approx(cls["prompt_entropy"], abs=1e-6)
    assert abs(mean["dataset_entropy"] - cls["dataset_entropy"]) > 1e-3
    assert [(one.backbone, one.pooling) for one in compared.recommendations] == [found[0], found[2]]


def test_a_missing_report_is_made_again_from_the_merged_metrics(
    compared: LayerReport, plain: World, backbones: Backbones, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(report_folder(plain.settings, compared.report_id), "layers.json").unlink()
    small = plain.settings.model_copy(update={"layers": plain.settings.layers.model_copy(update={"sample": 40})})
    again = judge_layers(
        open_deployment(small), ds=DS, backbones=[backbones["bert"], backbones["mamba"]], poolings=["mean", "cls"]
    )
    assert again == compared, "also the seconds"


def test_only_a_recommendation_for_the_configured_backbone_can_be_adopted(
    compared: LayerReport, plain: World, backbones: Backbones, tmp_path: Path
) -> None:
    other = ("--backbone", backbones["mamba"], "--out", str(tmp_path))
    line = plain.mistake("layers", "--ds", DS, "--sample", "40", *other, "--adopt")
    assert "evaluate that backbone, or configure another one first" in line
    assert training_choices.adopted(open_deployment(plain.settings)) is None


def test_without_json_the_command_prints_tables(
    compared: LayerReport, plain: World, backbones: Backbones, tmp_path: Path
) -> None:
    done = plain.marc.call("layers", "--ds", DS, "--sample", "40", *both(backbones), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("prompt entropy", "Recommended (--adopt makes it the default for training)", "layers.html", " *"):
        assert words in done.stdout


# Adoption


def adopted_by_hand(settings: Settings, **changes: Any) -> Adopted:
    """Adopt a recommendation that differs from the choice of the clicks."""
    facts = {"backbone": settings.train.backbone, "layers": 3, "pooling": "last", "basis": "metrics", "reason": "So."}
    advice = Recommendation.model_validate({**facts, **changes})
    layer = JudgedLayer(layer=0, depth=0, metrics={}, seconds=0, weights_bytes=1)
    model = JudgedModel(
        sweep_id="0", backbone=advice.backbone, layers=4, width=32, pooling="last", dtype="float32", device="cpu",
        inputs=2, judged=[layer],
    )  # fmt: skip
    report = LayerReport(
        report_id="0123456789abcdef", ds=DS, dim=0, sample=2, views=2, probability=0.3, block=2, order=1,
        temperature=0.1, models=[model], recommendations=[advice], findings=[],
    )  # fmt: skip
    own = with_train(settings, {"backbone": advice.backbone})
    return adopt(open_deployment(own), report)


def test_trainings_keep_the_adopted_layers(judged: Judged, twin: MakeWorld) -> None:
    world = twin()
    answer = world.layers("--ds", DS, "--adopt")
    assert answer["adopted"]
    record = training_choices.adopted(open_deployment(world.settings))
    assert record is not None
    assert record.recommendation == report_of(judged[1]).recommendations[0]
    assert record.report_id == answer["report_id"]
    trained = world.marc.json("train", "--ds", DS, *QUICK)
    assert (trained["layers_kept"], trained["pooling"]) == (record.recommendation.layers, record.recommendation.pooling)
    assert trained["training"]["layers_from"] == "adopted"
    # The adopted layers do not influence a later evaluation.
    assert report_of(world.layers("--ds", DS)) == report_of(judged[1])


def test_adopted_layers_and_pooling_take_precedence_over_the_choice_of_clicks(twin: MakeWorld) -> None:
    world = twin()
    adopted_by_hand(world.settings)
    trained = world.marc.json("train", "--ds", DS, *QUICK)
    assert (trained["layers_kept"], trained["pooling"]) == (3, "last")
    assert trained["training"]["layers_from"] == "adopted"


def test_a_pca_without_clicks_keeps_all_layers_until_another_number_is_adopted(plain: World) -> None:
    before = plain.marc.json("train", "--ds", DS)
    assert (before["layers_kept"], before["training"]["layers_from"]) == (LAYERS, "all")
    adopted_by_hand(plain.settings, layers=2, pooling="cls")
    try:
        after = plain.marc.json("train", "--ds", DS)
        assert (after["layers_kept"], after["pooling"]) == (2, "cls")
        assert after["training"]["layers_from"] == "adopted"
        bundle = open_bundle(STORAGE, plain.settings.bundle_uri)
        assert bundle.version == after["bundle"], "the record beside the bundles is not a bundle"
    finally:
        Path(adopted_uri(plain.settings)).unlink()


@pytest.mark.parametrize(
    ("train", "advice", "kept", "source"),
    [
        ("", {}, (3, "last"), "adopted"),
        (", pooling: last", {}, (3, "last"), "adopted"),
        (", pooling: mean", {}, (None, "mean"), "clicks"),
        (", layers: 2", {}, (2, "mean"), "configuration"),
        (", layers: 3", {}, (3, "mean"), "configuration"),
        (", layers: 2, pooling: last", {}, (2, "last"), "configuration"),
        (", compressor: pca", {}, (3, "last"), "adopted"),
        ("", {"backbone": "/another/model"}, (None, "mean"), "clicks"),
        (", compressor: pca", {"backbone": "/another/model"}, (None, "mean"), "all"),
        (", layers: 1", None, (1, "mean"), "configuration"),
        ("", None, (None, "mean"), "clicks"),
    ],
)
def test_the_configuration_takes_precedence_over_the_adopted_layers(
    backbones: Backbones, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    train: str, advice: dict[str, Any] | None, kept: tuple[int | None, str], source: str,
) -> None:  # fmt: skip
    settings = make_world(tmp_path, backbones["bert"], train=train).settings
    if advice is not None:
        adopted_by_hand(settings, **advice)
    found, decision = reviewed(open_deployment(settings))
    assert (found.settings.train.layers, found.settings.train.pooling) == kept
    assert decision == source
    assert ("are ignored" in caplog.text) == (train == ", pooling: mean")
    # Options of the command line are configuration.
    assert reviewed(open_deployment(with_train(settings, {"layers": 4})))[0].settings.train.layers == 4


# Images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images in folders, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "below").mkdir()
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("below" if number % 2 else "") / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / ".hidden").write_bytes(b"no image")
    return folder


def test_a_vision_model_is_judged_on_a_folder_of_images(
    judged: Judged, backbones: Backbones, pictures: Path, tmp_path: Path
) -> None:
    world = judged[0]
    arguments = ["--images", str(pictures), "--backbone", backbones["vit"], "--out", str(tmp_path)]
    answer = world.marc.json("layers", *arguments)
    report = report_of(answer)
    (model,) = report.models
    assert (report.kind, report.ds, report.dim, report.sample) == ("images", "", 0, 10)
    assert (model.inputs, model.left_out, model.layers, model.max_tokens) == (10, 1, LAYERS, 0)
    assert model.left_out_because.startswith(f"{pictures}/broken.jpg: ")
    assert all(layer.metrics["texts"] == 9 for layer in model.judged)
    assert not any("auc" in Path(name).name for name in answer["files"]), "images have no clicks"
    assert report_of(world.marc.json("layers", *arguments)) == report
    (pictures / "broken.jpg").unlink()
    fewer = report_of(world.marc.json("layers", *arguments))
    assert (fewer.models[0].inputs, fewer.models[0].left_out) == (9, 0)


# User errors


def test_user_errors_are_found_before_spark_starts(
    plain: World, backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marc_pipeline.spark.session.spark_session", None)
    (tmp_path / "one.png").write_bytes(b"one file")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = ("--out", str(tmp_path / "out"))
    one_of_two = "give one of the two"
    cases = [
        ((), one_of_two),
        (("--ds", DS, "--images", str(tmp_path)), one_of_two),
        (("--images", str(empty)), f"{empty} has 0 images"),
        (("--images", str(tmp_path)), f"{tmp_path} has 1 images"),
        (("--images", str(tmp_path / "nowhere")), "nowhere has 0 images"),
        (("--ds", "2030-01-01"), "no catalogue for 2030-01-01"),
        (("--ds", "today"), "'today' is not a date"),
        (("--ds", DS, "--pooling", "max"), "train: pooling: Input should be 'mean', 'last' or 'cls'"),
    ]
    for arguments, message in cases:
        assert message in plain.mistake("layers", *arguments, *out), arguments
    assert not (tmp_path / "out").exists()


def test_backbones_that_cannot_read_the_inputs_are_user_errors(
    judged: Judged, plain: World, pictures: Path, tmp_path: Path
) -> None:
    out = ("--out", str(tmp_path))
    for world in (judged[0], plain):
        line = world.mistake("layers", "--ds", DS, "--backbone", "/no/such/model", *out)
        assert "cannot load the tokenizer of '/no/such/model'" in line
    assert "cannot load the image processor of" in plain.mistake("layers", "--images", str(pictures), *out)


def test_a_catalogue_of_one_text_is_too_small(backbones: Backbones, tmp_path: Path) -> None:
    world = make_world(tmp_path, backbones["bert"], clicks=False)
    write_rows(tmp_path / "catalogue" / f"{DS}.csv", [item(0), {**item(0), "item_id": "another"}])
    line = world.mistake("layers", "--ds", DS, "--out", str(tmp_path / "out"))
    assert f"the catalogue of {DS} has 1 distinct texts; an evaluation of layers needs at least 2" in line

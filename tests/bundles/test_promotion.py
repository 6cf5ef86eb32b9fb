"""The promotion gate refuses worse or unusable bundles, and readers always see a complete pointer."""

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marc_pipeline.bundles import promotion
from marc_pipeline.bundles import run as train
from marc_pipeline.bundles.gate import problems
from marc_pipeline.config import Settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.model.bundle import (
    POINTER,
    Bundle,
    current_version,
    demote,
    open_bundle,
    promote,
    promoted,
    save_bundle,
)
from marc_pipeline.resources import TaskResources
from marc_pipeline.spark.session import spark_session
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.local import LocalObjects
from marc_pipeline.training.training_set import open_training_set
from marc_schemas.bundle import BundleCard
from marc_schemas.promotion import BundleComparison
from published import DIM, Site, flip, tiny_bundle
from rated_shop import DS, ITEMS, ratings
from tiny_models import save_tiny_backbone
from training_world import World, make_world

STORAGE = Storage()
Weights = dict[str, Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the gate


class Gate:
    """A shop with a current bundle, and bundles derived from it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.settings = world.shop.settings(train={"layers": 2})
        self.first = train.train_bundle(open_deployment(self.settings), ds=DS).bundle
        self.training_id = world.training_id

    def variant(self, name: str, alter: Callable[[Weights], None] | None = None) -> str:
        """Save the first bundle with another name and changed weights of the compressor, and return its version."""

        def write(folder: Path) -> BundleCard:
            shutil.copytree(self.first.uri, folder, dirs_exist_ok=True)
            (folder / "bundle.json").unlink()
            weights = load_file(folder / "compressor.safetensors")
            if alter:
                alter(weights)
            save_file(weights, folder / "compressor.safetensors")
            card = self.first.card
            return card.model_copy(update={"training": {**card.training, "name": name}})

        return save_bundle(STORAGE, self.settings.bundle_uri, write).version

    def worse(self, name: str = "worse") -> str:
        """Save a bundle whose vectors do not contain the genre, which decides the clicks."""
        states = open_training_set(STORAGE, self.settings.work_uri, self.training_id).states(2).astype(np.float64)
        genres = np.stack([states[np.arange(ITEMS) % 5 == genre].mean(axis=0) for genre in range(5)])
        told = np.linalg.svd(genres - genres.mean(axis=0))[2][:4]
        rest = (states - states.mean(axis=0)) @ (np.eye(states.shape[1]) - told.T @ told)
        directions = np.linalg.svd(rest, full_matrices=False)[2][:8] / rest.std()

        def alter(weights: Weights) -> None:
            for part in ("down.weight", "down.bias"):
                weights[part].zero_()
            weights["linear.weight"] = torch.from_numpy(directions).float()
            weights["linear.bias"] = -torch.from_numpy(directions @ states.mean(axis=0)).float()

        return self.variant(name, alter)

    def compare(self, version: str, settings: Settings | None = None) -> BundleComparison:
        with spark_session(self.settings.spark, name="tests"):
            return promotion.compare_stage(open_deployment(settings or self.settings), self.training_id, version)

    def promote(self, version: str) -> BundleComparison:
        return promotion.promote_stage(open_deployment(self.settings), self.training_id, version)

    def refusal(self, version: str, error: type[Exception] = GateRefused) -> str:
        """Return the reason for which the promotion is refused, in one line, while the current bundle stays."""
        before = self.pointer
        with pytest.raises(error) as refused:
            self.promote(version)
        assert self.pointer == before
        assert str(refused.value).isprintable()
        return str(refused.value)

    def with_evaluate(self, **changes: Any) -> Settings:
        return self.settings.model_copy(update={"evaluate": self.settings.evaluate.model_copy(update=changes)})

    @property
    def pointer(self) -> bytes:
        return Path(self.settings.bundle_uri, POINTER).read_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, spark: Any) -> Gate:
    root = tmp_path_factory.mktemp("gate")
    return Gate(make_world(root, save_tiny_backbone(root / "backbone")))


@pytest.fixture
def gate(place: Gate) -> Gate:
    """The gate, with the first bundle as the current one."""
    promote(STORAGE, place.settings.bundle_uri, place.first.version)
    return place


@pytest.mark.spark
def test_a_worse_bundle_is_refused_with_both_figures_unless_tolerated(gate: Gate) -> None:
    worse = gate.worse()
    found = gate.compare(worse)
    current = found.validation_auc[f"bundle:{gate.first.version}"]
    assert found.candidate_auc < current - 0.02
    assert (found.best, found.replacement) == (f"bundle:{gate.first.version}", "")
    message = gate.refusal(worse)
    assert message.startswith(f"bundle {worse} is not promoted: ")
    for part in (f"{found.candidate_auc:.4f}", f"{gate.first.version} is {current:.4f}", "evaluate.tolerance is 0"):
        assert part in message
    kept = Path(gate.settings.work_uri, "training", gate.training_id, "comparisons", f"{worse}.json")
    # Compared as JSON, because NaN differs from itself.
    assert kept.read_text() == found.model_dump_json(indent=1)
    found = gate.compare(worse, gate.with_evaluate(tolerance=0.9))
    assert (found.problems, found.tolerance) == ([], 0.9)
    gate.promote(worse)
    assert open_bundle(STORAGE, gate.settings.bundle_uri).version == worse


@pytest.mark.spark
def test_an_equal_bundle_passes_and_demotion_undoes_the_promotion(gate: Gate) -> None:
    equal = gate.variant("equal")
    for version in (gate.first.version, equal):
        found = gate.compare(version)
        assert (found.current, found.problems) == (gate.first.version, [])
        assert len({auc for name, auc in found.auc.items() if name.startswith("bundle:")}) == 1
        gate.promote(version)
        assert current_version(STORAGE, gate.settings.bundle_uri) == version
    assert promoted(STORAGE, gate.settings.bundle_uri)[-2:] == [gate.first.version, equal]
    assert gate.world.marc.json("demote") == {"bundle": gate.first.version}
    assert open_bundle(STORAGE, gate.settings.bundle_uri) == gate.first


@pytest.mark.spark
def test_a_pca_that_is_better_is_promoted_instead(gate: Gate) -> None:
    worse = gate.worse("worse than a PCA")
    Path(gate.settings.bundle_uri, POINTER).unlink()
    found = gate.compare(worse)
    assert found.best.startswith("pca-layer-")
    assert found.validation_auc[found.best] > found.candidate_auc
    assert found.problems
    with pytest.raises(GateRefused, match="the PCA of layer"):
        promotion.promote_stage(open_deployment(gate.settings), gate.training_id, worse, replace=False)
    gate.promote(worse)
    shipped = open_bundle(STORAGE, gate.settings.bundle_uri)
    assert (shipped.version, shipped.card.compressor.kind) == (found.replacement, "pca")
    # The promoted bundle makes the vectors that won.
    again = gate.compare(shipped.version)
    assert again.validation_auc[f"bundle:{shipped.version}"] == pytest.approx(
        found.validation_auc[found.best], abs=1e-3
    )
    assert again.problems == []


@pytest.mark.spark
def test_the_test_part_decides_nothing(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test part with flipped labels changes the reported figures only."""
    worse = gate.worse("worse on the validation part")
    found, evaluated = gate.compare(worse), promotion.evaluation_data

    def flipped(*given: Any) -> Any:
        data = evaluated(*given)
        labels = data.labels.copy()
        labels[data.split.test] = 1 - labels[data.split.test]
        return replace(data, labels=labels)

    monkeypatch.setattr(promotion, "evaluation_data", flipped)
    other = gate.compare(worse)
    assert (other.validation_auc, other.best, other.problems) == (found.validation_auc, found.best, found.problems)
    assert all(other.auc[name] == pytest.approx(1 - auc) for name, auc in found.auc.items())


@pytest.mark.spark
def test_an_encoder_with_other_vectors_than_the_training_is_refused(gate: Gate) -> None:
    def write(folder: Path) -> BundleCard:
        shutil.copytree(gate.first.uri, folder, dirs_exist_ok=True)
        (folder / "bundle.json").unlink()
        weights = load_file(folder / "backbone/model.safetensors")
        save_file({name: 0.1 * weight for name, weight in weights.items()}, folder / "backbone/model.safetensors")
        return gate.first.card

    candidate = save_bundle(STORAGE, gate.settings.bundle_uri, write).version
    gate.compare(candidate)
    assert "the encoder's vectors differ from those of the training" in gate.refusal(candidate)


@pytest.mark.spark
def test_the_command_line_promotes_and_refuses(gate: Gate) -> None:
    equal, worse = gate.variant("equal by hand"), gate.worse("worse by hand")
    said = gate.world.marc.json("promote", equal, "--ds", DS)
    assert (said["candidate"], said["current"]) == (equal, gate.first.version)
    assert said["auc"][f"bundle:{equal}"] == said["auc"][f"bundle:{gate.first.version}"]
    before = gate.pointer
    done = gate.world.marc.call("promote", worse, "--ds", DS)
    lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert (done.returncode, len(lines), done.stdout) == (3, 1, ""), done.stderr
    assert f"bundle {worse} is not promoted" in lines[0]
    assert gate.pointer == before
    missing = gate.world.marc.call("promote", "0123456789abcdef", "--ds", DS)
    assert (missing.returncode, "no bundle at" in missing.stderr) == (2, True), missing.stderr


@pytest.mark.spark
def test_a_bundle_must_be_evaluated_against_the_current_one(gate: Gate) -> None:
    candidate, other = gate.variant("slow"), gate.variant("quick")
    expected = f"bundle {candidate} was not evaluated on training set {gate.training_id}"
    assert expected in gate.refusal(candidate, UserError)
    gate.compare(candidate)
    promote(STORAGE, gate.settings.bundle_uri, other)
    assert f"bundle {other} became current since {candidate} was evaluated" in gate.refusal(candidate, UserError)


def flip_byte(gate: Gate, version: str, name: str) -> Path:
    path = Path(gate.settings.bundle_uri) / version / name
    flip(path, path.stat().st_size // 2, 1)
    return path


def not_finite(weights: Weights) -> None:
    weights["linear.bias"][3] = float("nan")


def zeros(weights: Weights) -> None:
    for weight in weights.values():
        weight.zero_()


def constant(weights: Weights) -> None:
    zeros(weights)
    weights["linear.bias"].fill_(1)


@pytest.mark.spark
@pytest.mark.parametrize("name", ["compressor.safetensors", "backbone/tokenizer.json"])
def test_a_bundle_with_a_flipped_byte_is_refused_with_the_file(gate: Gate, name: str) -> None:
    candidate = gate.variant(f"flipped {name}")
    path = flip_byte(gate, candidate, name)
    gate.compare(candidate)
    assert f"{path} does not match its SHA-256" in gate.refusal(candidate)


@pytest.mark.spark
@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (not_finite, "in a sample of 150 texts: the model on cpu returns NaN or infinity even for a known good text"),
        (zeros, "150 of 150 sampled vectors are not normalised"),
        (constant, "two random vectors have a mean cosine of 1.000, audit.max_mean_cosine is 0.95"),
    ],
)
def test_a_bundle_with_unusable_vectors_is_refused_with_the_reason(
    gate: Gate, alter: Callable[[Weights], None], reason: str
) -> None:
    candidate = gate.variant(alter.__name__, alter)
    gate.compare(candidate)
    assert reason in gate.refusal(candidate)


@pytest.mark.spark
def test_the_gate_reports_problems_without_an_evaluation(gate: Gate) -> None:
    texts = open_training_set(STORAGE, gate.settings.work_uri, gate.training_id).texts
    sampled = gate.with_evaluate(audit_sample=50)

    def found(version: str) -> list[str]:
        return problems(sampled, texts, version, storage=STORAGE, resources=TaskResources())

    assert found(gate.first.version) == []
    expected = "in a sample of 50 texts: the model on cpu returns NaN or infinity even for a known good text"
    assert found(gate.variant("nan", not_finite)) == [expected]
    assert found(gate.variant("alike", constant))[0].startswith("the vectors use 0.0")
    cut = gate.variant("cut")
    (Path(gate.settings.bundle_uri) / cut / "backbone/config.json").unlink()
    (reason,) = found(cut)
    assert reason.endswith("backbone/config.json is missing")


@pytest.mark.parametrize(("texts", "limit", "size"), [(150, 50, 50), (150, 80, 80), (1999, 1000, 1000), (10, 1000, 10)])
def test_the_sample_has_at_most_audit_sample_texts_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int, limit: int, size: int
) -> None:
    settings = Site(tmp_path).settings
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"audit_sample": limit})})
    sampled: list[int] = []

    def encode(sample: list[str]) -> Any:
        sampled.extend(map(int, sample))
        return SimpleNamespace(vectors=np.random.default_rng(0).normal(size=(len(sample), DIM)))

    monkeypatch.setattr("marc_pipeline.bundles.gate.load_encoder", lambda *_: SimpleNamespace(encode=encode))
    version = tiny_bundle(settings.bundle_uri, normalised=False).version
    found = problems(settings, list(map(str, range(texts))), version, storage=STORAGE, resources=TaskResources())
    assert (found, len(sampled), sampled[0]) == ([], size, 0)
    steps = np.diff([*sampled, texts])
    assert set(steps) <= {texts // size, -(-texts // size)}


@pytest.mark.spark
def test_a_new_bundle_replaces_a_damaged_one(gate: Gate) -> None:
    damaged, sound = gate.variant("to be damaged"), gate.variant("sound")
    promote(STORAGE, gate.settings.bundle_uri, damaged)
    flip_byte(gate, damaged, "compressor.safetensors")
    gate.compare(sound)
    gate.promote(sound)
    assert current_version(STORAGE, gate.settings.bundle_uri) == sound


@pytest.mark.spark
def test_a_test_part_without_cold_items_does_not_prevent_promotion(tmp_path: Path, gate: Gate) -> None:
    """The AUC of cold items is NaN, which must survive being written and read."""
    world = make_world(tmp_path, gate.settings.train.backbone)
    world.shop.rated(ratings(cold=False))
    bundle = train.train_bundle(open_deployment(world.shop.settings(train={"layers": 2})), ds=DS).bundle
    assert world.current() == bundle


# --- the pointer


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[str, list[Bundle]]:
    """Three bundles, none of them current."""
    uri = str(tmp_path / "bundles")
    return uri, [tiny_bundle(uri, weights=f"weights {number}") for number in range(3)]


def test_demotions_go_back_one_promotion_at_a_time(bundles: tuple[str, list[Bundle]]) -> None:
    uri, made = bundles
    one, two, three = (bundle.version for bundle in made)
    assert (current_version(STORAGE, uri), promoted(STORAGE, uri)) == (None, [])
    with pytest.raises(UserError, match="no bundle was current"):
        demote(STORAGE, uri)
    promote(STORAGE, uri, one)
    with pytest.raises(UserError, match=f"no bundle was current at {uri} before this one"):
        demote(STORAGE, uri)
    assert open_bundle(STORAGE, uri) == made[0], "a refused demotion changes nothing"
    promote(STORAGE, uri, two)
    promote(STORAGE, uri, three)
    assert promoted(STORAGE, uri) == [one, two, three]
    assert [demote(STORAGE, uri), demote(STORAGE, uri)] == [two, one]
    with pytest.raises(UserError, match="before this one"):
        demote(STORAGE, uri)
    promote(STORAGE, uri, three)
    assert demote(STORAGE, uri) == one
    # A bundle that is promoted again is listed once.
    for version in (two, one, one):
        promote(STORAGE, uri, version)
    assert promoted(STORAGE, uri) == [two, one]
    assert demote(STORAGE, uri) == two


def test_an_unreadable_pointer_and_a_missing_bundle_are_reported_in_one_line(bundles: tuple[str, list[Bundle]]) -> None:
    uri, _ = bundles
    for content in ("", "{", "[]", '{"before": []}', "null", '{"bundle": "x", "before": 3}'):
        Path(uri, POINTER).write_text(content)
        for look in (open_bundle, demote, current_version):
            with pytest.raises(UserError, match=rf"{POINTER} cannot be read; promote a bundle again"):
                look(STORAGE, uri)
    Path(uri, POINTER).unlink()
    promote(STORAGE, uri, "0123456789abcdef")
    with pytest.raises(UserError, match="which the pointer names; promote one that exists"):
        open_bundle(STORAGE, uri)


def test_promotion_and_demotion_are_one_write_each(
    bundles: tuple[str, list[Bundle]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, (one, two, _) = bundles
    written: list[str] = []
    write = Storage.write

    def counted(storage: Storage, target: str, data: bytes) -> None:
        written.append(target)
        write(storage, target, data)

    monkeypatch.setattr(Storage, "write", counted)
    promote(STORAGE, uri, one.version)
    promote(STORAGE, uri, two.version)
    demote(STORAGE, uri)
    assert written == [join(uri, POINTER)] * 3


def test_readers_always_see_a_complete_pointer(bundles: tuple[str, list[Bundle]]) -> None:
    uri, made = bundles
    versions = {bundle.version for bundle in made}
    promote(STORAGE, uri, made[0].version)
    stop, seen, wrong = threading.Event(), set(), []

    def poll() -> None:
        while not stop.is_set():
            try:
                seen.add(json.loads(Path(uri, POINTER).read_bytes())["bundle"])
                seen.add(open_bundle(STORAGE, uri).version)
            except Exception as error:
                wrong.append(repr(error))

    readers = [threading.Thread(target=poll) for _ in range(3)]
    for reader in readers:
        reader.start()
    for step in range(50):
        promote(STORAGE, uri, made[step % 2 + 1].version)
        demote(STORAGE, uri)
    stop.set()
    for reader in readers:
        reader.join()
    assert wrong == []
    assert seen <= versions
    assert len(seen) > 1, "the readers saw several bundles"
    assert not [path for path in Path(uri).iterdir() if path.name.startswith(".staged")]


def test_a_failed_promotion_keeps_the_old_pointer(
    bundles: tuple[str, list[Bundle]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, (one, two, _) = bundles
    promote(STORAGE, uri, one.version)

    monkeypatch.setattr(LocalObjects, "publish", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        promote(STORAGE, uri, two.version)
    monkeypatch.undo()
    assert open_bundle(STORAGE, uri) == one
    assert sorted(path.name for path in Path(uri).iterdir()) == sorted([POINTER, *(b.version for b in bundles[1])])

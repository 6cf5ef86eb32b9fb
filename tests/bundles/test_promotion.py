"""The gate before promotion, and the pointer: what is worse or unsound stays out, and readers never see half a step."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from published import DIM, Site, tiny_bundle
from rated_shop import DS, ITEMS, ratings
from tiny_models import save_tiny_backbone
from training_world import World, make_world

STORAGE = Storage()
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- the gate


class Gate:
    """A shop with a current bundle, and bundles made from that one."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.settings = world.shop.settings(train={"layers": 2})
        self.first = train.train_bundle(open_deployment(self.settings), ds=DS)
        self.training_id = world.training_id

    def variant(self, name: str, alter: Callable[[Weights], None] | None = None) -> str:
        """Version of a new bundle: the first one under another name, with other weights of the compressor."""

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
        """A compressor that looks away from what makes users click: the genre leaves no trace in its vectors."""
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
        with spark_session(self.settings.spark, name="tests") as spark:
            return promotion.compare_stage(spark, open_deployment(settings or self.settings), self.training_id, version)

    def promote(self, version: str) -> BundleComparison:
        return promotion.promote_stage(open_deployment(self.settings), self.training_id, version)

    def judge(self, version: str) -> BundleComparison:
        self.compare(version)
        return self.promote(version)

    @property
    def pointer(self) -> bytes:
        return Path(self.settings.bundle_uri, POINTER).read_bytes()

    def reset(self) -> None:
        promote(STORAGE, self.settings.bundle_uri, self.first.version)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, spark: Any) -> Gate:
    root = tmp_path_factory.mktemp("gate")
    return Gate(make_world(root, save_tiny_backbone(root / "backbone")))


@pytest.fixture
def gate(place: Gate) -> Gate:
    """The gate, with the first bundle current whatever ran before."""
    place.reset()
    return place


@pytest.mark.spark
def test_a_worse_bundle_is_refused_and_both_figures_are_named(gate: Gate) -> None:
    worse, before = gate.worse(), gate.pointer
    found = gate.compare(worse)
    assert found.current_auc is not None
    assert found.auc < found.current_auc - 0.02
    with pytest.raises(GateRefused) as refused:
        gate.promote(worse)
    said = str(refused.value)
    assert said.startswith(f"bundle {worse} is not promoted: ")
    assert f"{found.auc:.4f}" in said
    assert f"{gate.first.version} is {found.current_auc:.4f}" in said
    assert "evaluate.tolerance is 0" in said
    assert "\n" not in said
    assert gate.pointer == before
    kept = Path(gate.settings.work_uri, "training", gate.training_id, "comparisons", f"{worse}.json")
    assert BundleComparison.model_validate_json(kept.read_bytes()) == found, "the comparison can be read afterwards"


@pytest.mark.spark
def test_a_stated_tolerance_lets_it_pass(gate: Gate) -> None:
    worse = gate.worse("tolerated")
    tolerant = gate.settings.model_copy(
        update={"evaluate": gate.settings.evaluate.model_copy(update={"tolerance": 0.9})}
    )  # fmt: skip
    found = gate.compare(worse, tolerant)
    assert (found.problems, found.tolerance) == ([], 0.9)
    gate.promote(worse)
    assert open_bundle(STORAGE, gate.settings.bundle_uri).version == worse


@pytest.mark.spark
def test_a_bundle_as_good_as_the_current_one_passes_and_demotion_undoes_it(gate: Gate) -> None:
    equal = gate.variant("equal")
    found = gate.compare(equal)
    assert (found.auc, found.current, found.problems) == (found.current_auc, gate.first.version, [])
    gate.promote(equal)
    assert promoted(STORAGE, gate.settings.bundle_uri)[-2:] == [gate.first.version, equal]
    assert gate.world.marc.json("demote") == {"bundle": gate.first.version}
    assert open_bundle(STORAGE, gate.settings.bundle_uri) == gate.first


@pytest.mark.spark
def test_the_current_bundle_beside_itself_stays_current(gate: Gate) -> None:
    found = gate.compare(gate.first.version)
    assert (found.auc, found.problems) == (found.current_auc, [])
    gate.promote(gate.first.version)
    assert current_version(STORAGE, gate.settings.bundle_uri) == gate.first.version


@pytest.mark.spark
def test_the_command_line_compares_promotes_and_refuses(gate: Gate) -> None:
    equal, worse = gate.variant("equal by hand"), gate.worse("worse by hand")
    said = gate.world.marc.json("promote", equal, "--ds", DS)
    assert (said["candidate"], said["current"], said["auc"]) == (equal, gate.first.version, said["current_auc"])
    before = gate.pointer
    done = gate.world.marc.call("promote", worse, "--ds", DS)
    lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert (done.returncode, len(lines), done.stdout) == (3, 1, ""), done.stderr
    assert f"bundle {worse} is not promoted" in lines[0]
    assert gate.pointer == before
    missing = gate.world.marc.call("promote", "0123456789abcdef", "--ds", DS)
    assert (missing.returncode, "no bundle at" in missing.stderr) == (2, True), missing.stderr


@pytest.mark.spark
def test_a_comparison_with_what_is_no_longer_current_does_not_count(gate: Gate) -> None:
    candidate, other = gate.variant("slow"), gate.variant("quick")
    gate.compare(candidate)
    promote(STORAGE, gate.settings.bundle_uri, other)
    before = gate.pointer
    with pytest.raises(UserError, match=f"bundle {other} became current since {candidate} was evaluated"):
        gate.promote(candidate)
    assert gate.pointer == before


@pytest.mark.spark
def test_a_bundle_that_was_not_compared_is_not_promoted(gate: Gate) -> None:
    candidate, before = gate.variant("never compared"), gate.pointer
    with pytest.raises(UserError, match=f"bundle {candidate} was not evaluated on training set {gate.training_id}"):
        gate.promote(candidate)
    assert gate.pointer == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def not_finite(weights: Weights) -> None:
    weights["linear.bias"][3] = float("nan")


def constant(weights: Weights) -> None:
    for weight in weights.values():
        weight.zero_()
    weights["linear.bias"].fill_(1)


def nothing(weights: Weights) -> None:
    for weight in weights.values():
        weight.zero_()


@pytest.mark.spark
@pytest.mark.parametrize("name", ["compressor.safetensors", "backbone/tokenizer.json"])
def test_a_bundle_with_a_flipped_byte_is_refused_with_the_file_named(gate: Gate, name: str) -> None:
    candidate, before = gate.variant(f"flipped {name}"), gate.pointer
    path = Path(gate.settings.bundle_uri) / candidate / name
    flip(path)
    with pytest.raises(GateRefused) as refused:
        gate.judge(candidate)
    assert f"{path} does not match its SHA-256" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert gate.pointer == before


@pytest.mark.spark
@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (not_finite, "of 150 sampled texts: the model on cpu gives NaN or infinity for any text"),
        (nothing, "150 of 150 sampled vectors have no unit length"),
        (constant, "all sampled vectors are nearly equal"),
    ],
)
def test_a_bundle_with_unsound_vectors_is_refused_with_the_reason(
    gate: Gate, alter: Callable[[Weights], None], reason: str
) -> None:
    candidate, before = gate.variant(alter.__name__, alter), gate.pointer
    with pytest.raises(GateRefused, match=reason):
        gate.judge(candidate)
    assert gate.pointer == before


@pytest.mark.spark
def test_the_audit_alone_finds_what_is_wrong(gate: Gate) -> None:
    texts = open_training_set(STORAGE, gate.settings.work_uri, gate.training_id).texts
    sampled = gate.settings.model_copy(
        update={"evaluate": gate.settings.evaluate.model_copy(update={"audit_sample": 50})}
    )  # fmt: skip

    def found(version: str) -> list[str]:
        return problems(sampled, texts, version, storage=STORAGE, resources=TaskResources())

    assert found(gate.first.version) == []
    assert found(gate.variant("nan", not_finite)) == [
        "of 50 sampled texts: the model on cpu gives NaN or infinity for any text"
    ]
    (reason,) = found(gate.variant("alike", constant))
    assert reason.startswith("all sampled vectors are nearly equal: the largest standard deviation of a dimension is ")
    cut = gate.variant("cut")
    (Path(gate.settings.bundle_uri) / cut / "backbone/config.json").unlink()
    (reason,) = found(cut)
    assert reason.endswith("backbone/config.json is missing")


@pytest.mark.parametrize(("texts", "limit", "size"), [(150, 50, 50), (150, 80, 80), (1999, 1000, 1000), (10, 1000, 10)])
def test_the_sample_has_at_most_the_texts_that_the_settings_allow_and_is_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: int, limit: int, size: int
) -> None:
    settings = Site(tmp_path).settings
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"audit_sample": limit})})
    sampled: list[int] = []

    def encode(sample: list[str]) -> Any:
        sampled.extend(map(int, sample))
        return SimpleNamespace(vectors=np.eye(max(DIM, len(sample)))[: len(sample), :DIM] + 1e-9)

    monkeypatch.setattr("marc_pipeline.bundles.gate.load_encoder", lambda *_: SimpleNamespace(encode=encode))
    version = tiny_bundle(settings.bundle_uri, normalised=False).version
    found = problems(settings, list(map(str, range(texts))), version, storage=STORAGE, resources=TaskResources())
    assert (found, len(sampled), sampled[0]) == ([], size, 0)
    steps = np.diff([*sampled, texts])
    assert set(steps) <= {texts // size, -(-texts // size)}


@pytest.mark.spark
def test_a_sound_bundle_takes_the_place_of_a_damaged_one(gate: Gate) -> None:
    """What the damage is answered with: train and promote a new one."""
    damaged, sound = gate.variant("to be damaged"), gate.variant("sound")
    promote(STORAGE, gate.settings.bundle_uri, damaged)
    flip(Path(gate.settings.bundle_uri) / damaged / "compressor.safetensors")
    gate.judge(sound)
    assert current_version(STORAGE, gate.settings.bundle_uri) == sound


@pytest.mark.spark
def test_a_shop_without_cold_items_promotes_as_well(tmp_path: Path, gate: Gate) -> None:
    """No cold row in the test part: that figure is NaN, and must survive being written down."""
    world = make_world(tmp_path, gate.settings.train.backbone)
    world.shop.rated(ratings(cold=False))
    bundle = train.train_bundle(open_deployment(world.shop.settings(train={"layers": 2})), ds=DS)
    assert world.current() == bundle


# --- the pointer


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[str, list[Bundle]]:
    """Three bundles of which none is current."""
    uri = str(tmp_path / "bundles")
    return uri, [tiny_bundle(uri, weights=f"weights {number}") for number in range(3)]


def test_nothing_is_current_until_something_is_promoted(bundles: tuple[str, list[Bundle]]) -> None:
    uri, (one, *_) = bundles
    assert (current_version(STORAGE, uri), promoted(STORAGE, uri)) == (None, [])
    with pytest.raises(UserError, match="no bundle was current"):
        demote(STORAGE, uri)
    promote(STORAGE, uri, one.version)
    assert open_bundle(STORAGE, uri) == one
    with pytest.raises(UserError, match=f"no bundle was current at {uri} before this one"):
        demote(STORAGE, uri)
    assert open_bundle(STORAGE, uri) == one, "a demotion that is refused changes nothing"


def test_demotions_go_back_step_by_step(bundles: tuple[str, list[Bundle]]) -> None:
    uri, made = bundles
    versions = [bundle.version for bundle in made]
    for version in versions:
        promote(STORAGE, uri, version)
    assert promoted(STORAGE, uri) == versions
    assert [demote(STORAGE, uri), demote(STORAGE, uri)] == [versions[1], versions[0]]
    with pytest.raises(UserError, match="before this one"):
        demote(STORAGE, uri)
    promote(STORAGE, uri, versions[2])
    assert demote(STORAGE, uri) == versions[0]


def test_a_bundle_that_is_promoted_again_is_remembered_once(bundles: tuple[str, list[Bundle]]) -> None:
    uri, (one, two, _) = bundles
    for bundle in (one, two, one, one):
        promote(STORAGE, uri, bundle.version)
    assert promoted(STORAGE, uri) == [two.version, one.version]
    assert demote(STORAGE, uri) == two.version


@pytest.mark.parametrize("content", ["", "{", "[]", '{"before": []}', "null", '{"bundle": "x", "before": 3}'])
def test_a_pointer_that_cannot_be_read_is_one_line(bundles: tuple[str, list[Bundle]], content: str) -> None:
    uri, _ = bundles
    Path(uri, POINTER).write_text(content)
    for look in (open_bundle, demote, current_version):
        with pytest.raises(UserError, match=rf"{POINTER} cannot be read; promote a bundle again"):
            look(STORAGE, uri)


def test_a_pointer_to_nothing_is_one_line(bundles: tuple[str, list[Bundle]]) -> None:
    uri, _ = bundles
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


def test_readers_never_see_a_missing_or_a_torn_pointer(bundles: tuple[str, list[Bundle]]) -> None:
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
    assert len(seen) > 1, "the readers saw it move"
    assert not [path for path in Path(uri).iterdir() if path.name.startswith(".staged")]


def test_a_promotion_that_breaks_off_leaves_the_old_pointer(
    bundles: tuple[str, list[Bundle]], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, (one, two, _) = bundles
    promote(STORAGE, uri, one.version)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(LocalObjects, "publish", full)
    with pytest.raises(OSError, match="disk full"):
        promote(STORAGE, uri, two.version)
    monkeypatch.undo()
    assert open_bundle(STORAGE, uri) == one
    assert sorted(path.name for path in Path(uri).iterdir()) == sorted([POINTER, *(b.version for b in bundles[1])])

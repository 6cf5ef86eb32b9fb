"""MARC bundles in the tuned and the frozen regime: trained and frozen weights, resume, and vectors of the bundle."""

import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from marc_pipeline.bundles.making import Trained
from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.backbone import HiddenStates, PooledStates, load_backbone, truncate
from marc_pipeline.model.bundle import Bundle, check_bundle
from marc_pipeline.model.compressor import Bottleneck
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.storage import Storage
from marc_pipeline.training import fit
from marc_pipeline.training.fit import Checkpoint
from marc_pipeline.training.learning import learning_data
from marc_pipeline.training.lora import TunedStates, add_lora, merged
from marc_pipeline.training.marc import Constraints, Marc
from marc_pipeline.training.matching import CrossingNetwork, ResidualNetwork
from marc_pipeline.training.states import cutting_tokenizer, write_states
from marc_pipeline.training.training_set import STATES
from marc_schemas.bundle import Pooling
from tiny_models import (
    ARCHITECTURES,
    CPU_FLOAT32,
    LAYERS,
    MAX_TOKENS,
    ONE_CORE,
    TEMPLATE,
    TEXTS,
    WIDTH,
    cosines,
)
from tiny_training import DIM, HISTORY, KEPT, STORAGE, TinyTraining, encoded, tiny_training, unit

EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
# peft 0.21 uses a deprecated property of transformers 5.23.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
LEARNED = ("compressor.", "matching.", "clicked.", "skipped.")
Trainings = dict[str, TinyTraining]
Frozen = tuple[TinyTraining, Trained, Bundle]


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return {name: tiny_training(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


class Tuned:
    """A tuned MARC, its vectors and states before merging the adapters, and its bundle."""

    def __init__(self, training: TinyTraining, trained: Trained) -> None:
        self.training, self.trained = training, trained
        self.parameters = {name: p.requires_grad for name, p in trained.objective.named_parameters()}
        self.vectors = trained.objective.vectors().clone()
        self.states = trained.objective.source.all_states().clone()
        self.bundle = training.saved(trained, regime="tuned")


TunedOf = Callable[[str], Tuned]


@pytest.fixture(scope="module")
def tuned(trainings: Trainings) -> TunedOf:
    """A few steps of the tuned regime, cached per architecture."""
    return cache(lambda name: Tuned(trainings[name], trainings[name].trained(regime="tuned")))


def adapted(training: TinyTraining, *, layers: int = KEPT, states: Tensor | None = None, rank: int = 4) -> TunedStates:
    """States of a backbone with initial adapters."""
    backbone = load_backbone(training.train.backbone)
    tokenizer, _ = cutting_tokenizer(backbone, training.train)
    tokens = [np.array(one.ids, dtype=np.int32) for one in tokenizer.encode_batch(TEXTS)]
    return TunedStates(
        add_lora(truncate(backbone, layers), rank=rank, seed=0),
        tokens,
        torch.from_numpy(training.training_set.states(layers)) if states is None else states,
        whole=layers == LAYERS,
        pooling=training.train.pooling,
        dtype=torch.float32,
        token_budget=CPU_FLOAT32.token_budget,
    ).eval()


# --- tuned: trained weights


@EVERY_ARCHITECTURE
def test_tuning_starts_from_the_states_of_the_original_backbone(trainings: Trainings, architecture: str) -> None:
    training = trainings[architecture]
    for layers in (1, KEPT, LAYERS):
        blank = torch.zeros(len(TEXTS), WIDTH)
        source = adapted(training, layers=layers, states=blank)
        # Tuning pads texts; the pass over all layers packs them.
        expected = torch.from_numpy(training.training_set.states(layers))
        torch.testing.assert_close(source.all_states(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(blank, torch.zeros_like(blank)), "the caller's tensor is unchanged"


@EVERY_ARCHITECTURE
def test_only_adapters_compressor_matching_and_history_pooling_are_trained(
    trainings: Trainings, tuned: TunedOf, architecture: str
) -> None:
    parameters = tuned(architecture).parameters
    trained = {name for name, learns in parameters.items() if learns}
    assert trained == {name for name in parameters if "lora_" in name or name.startswith(LEARNED)}
    for part in ("source.", *LEARNED):
        assert any(name.startswith(part) for name in trained), part
    assert any("embed" in name for name in parameters.keys() - trained)
    assert {name.split(".lora_A")[0] for name in trained if ".lora_A" in name} == {
        name.split(".lora_B")[0] for name in trained if ".lora_B" in name
    }


@EVERY_ARCHITECTURE
def test_only_trained_parameters_of_every_kept_block_get_gradients(trainings: Trainings, architecture: str) -> None:
    training = trainings[architecture]
    source = adapted(training)
    # B is initialised with zeros, which would make A's gradients 0.
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    objective = marc(source).train()
    batch = learning_data(
        training.training_set.interactions, settings=InteractionSettings(history=HISTORY), holdout=0.1, items=len(TEXTS)
    ).rows
    terms = objective(batch[torch.arange(64)])
    terms["loss"].backward()
    moved = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all("lora_" in name or name.startswith(LEARNED) for name in moved)
    assert {name for name, p in objective.named_parameters() if not p.requires_grad and p.grad is not None} == set()
    still = {name for name, p in objective.named_parameters() if p.requires_grad} - moved
    assert not still, "every trained parameter has a gradient"
    adapters = {name for name in moved if "lora_" in name}
    assert all(any(f".{block}." in name for name in adapters) for block in range(KEPT))


def marc(source: TunedStates) -> Marc:
    torch.manual_seed(0)
    compressor = Bottleneck(width=WIDTH, dim=DIM, hidden=16)
    torch.nn.init.normal_(compressor.down.weight, std=0.1)
    matching = CrossingNetwork(dim=DIM, users=Marc.USERS, hidden=16, dropout=0.1)
    return Marc(source, compressor, matching, dim=DIM, constraints=Constraints(keep=0.5, decouple=0.1))


def test_candidates_are_encoded_and_other_items_read_from_the_bank(trainings: Trainings) -> None:
    fresh = torch.from_numpy(trainings["bert"].training_set.states(KEPT))
    source = adapted(trainings["bert"], states=torch.full((len(TEXTS), WIDTH), 7.0))
    items = torch.tensor([3, 9, 20, 41])
    candidate = torch.tensor([True, False, True, False])
    found = source(items, candidate)
    torch.testing.assert_close(found[candidate], fresh[items[candidate]])
    assert torch.equal(found[~candidate], torch.full((2, WIDTH), 7.0))
    torch.testing.assert_close(source.bank[items[candidate]], fresh[items[candidate]])
    rest = sorted(set(range(len(TEXTS))) - {3, 20})
    assert torch.equal(source.bank[rest], torch.full((len(rest), WIDTH), 7.0))
    assert not source.bank.requires_grad
    found[~candidate].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in source.parameters()), "the bank carries no gradients"
    found = source(items, candidate)
    found[candidate].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in source.parameters())


def test_states_do_not_depend_on_the_token_budget(trainings: Trainings) -> None:
    source = adapted(trainings["llama"], layers=LAYERS)
    whole = source.all_states().clone()
    for source.token_budget in (1, 48, 10_000):
        torch.testing.assert_close(source.all_states(), whole, atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_a_backbone_with_merged_adapters_gives_the_same_states(trainings: Trainings, architecture: str) -> None:
    trained = trainings[architecture].trained(regime="tuned", max_steps=2)
    wanted = trained.objective.source.all_states().clone()
    assert trained.backbone is not None
    model = merged(trained.backbone)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    tokenizer, _ = cutting_tokenizer(model, trainings[architecture].train)
    plain = Encoder(
        PooledStates(HiddenStates(model, whole=False), "mean"), tokenizer, head=torch.nn.Identity(),
        device=torch.device("cpu"), dtype=torch.float32, token_budget=256,
    )  # fmt: skip
    found = torch.from_numpy(plain.encode(TEXTS).vectors)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_tuning_changes_the_states_and_the_bundle_gives_their_vectors(
    trainings: Trainings, tuned: TunedOf, architecture: str
) -> None:
    before, made = torch.from_numpy(trainings[architecture].training_set.states(KEPT)), tuned(architecture)
    assert torch.isfinite(made.states).all()
    assert ((made.states - before).abs().amax(dim=1) > 1e-3).all(), "every item's state changes"
    source = made.trained.objective.source
    assert isinstance(source, TunedStates)
    assert torch.equal(source.bank, source.all_states())
    assert cosines(encoded(made.bundle, TEXTS), unit(made.vectors)).min() >= 0.9999
    backbone = load_file(Path(made.bundle.uri) / "backbone" / "model.safetensors")
    assert not [name for name in backbone if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize(("architecture", "pooling"), [("bert", "cls"), ("llama", "mean"), ("qwen3", "last")])
def test_a_tuned_bundle_of_the_whole_backbone_keeps_pooling_and_final_norm(
    tmp_path: Path, architecture: str, pooling: Pooling
) -> None:
    training = tiny_training(tmp_path, architecture, pooling=pooling, max_steps=2)
    trained = training.trained(layers=LAYERS, regime="tuned")
    wanted = unit(trained.objective.vectors())
    bundle = training.saved(trained, regime="tuned")
    assert (bundle.card.layers_kept, bundle.card.pooling) == (LAYERS, pooling)
    assert cosines(encoded(bundle, TEXTS), wanted).min() >= 0.9999


def test_the_card_of_a_tuned_bundle_names_the_regime(tuned: TunedOf) -> None:
    made = tuned("bert")
    card = made.bundle.card
    assert (card.training["regime"], card.training["settings"]["regime"]) == ("tuned", "tuned")
    assert card.training["interactions"] == made.trained.interactions
    assert (card.layers_kept, card.backbone_layers, card.compressor.kind) == (KEPT, LAYERS, "bottleneck")
    assert check_bundle(STORAGE, made.bundle) == []


@pytest.mark.parametrize("regime", ["frozen", "tuned"])
def test_user_texts_are_encoded_after_the_items(tmp_path: Path, regime: str) -> None:
    plain = tiny_training(tmp_path, "bert", max_steps=2)
    users = plain.training_set.interactions.users
    profiles = np.where(users % 3 == 0, -1, users % 2)
    training = plain.with_interactions(profiles=profiles, profile_texts=("likes comedies", "likes docuseries"))
    texts = training.training_set.encoded_texts
    write_states(texts, tmp_path / STATES, train=plain.train, encode=CPU_FLOAT32, resources=ONE_CORE)
    trained = training.trained(regime=regime)
    vectors = trained.objective.vectors()
    assert len(vectors) == len(TEXTS) + 2
    bundle = training.saved(trained, regime=regime)
    assert cosines(encoded(bundle, texts), unit(vectors)).min() >= 0.9999
    weights = load_file(Path(bundle.uri) / "matching.safetensors")
    assert {name.split(".")[0] for name in weights} == {"matching", "clicked", "skipped", "profile"}


def test_processes_do_not_synchronise_states_and_banks(trainings: Trainings, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Mock(side_effect=lambda objective, **_: objective)
    monkeypatch.setattr(fit, "place", lambda: (0, 2))
    monkeypatch.setattr(fit, "DistributedDataParallel", group)
    trainings["bert"].trained(max_steps=1)
    assert False in {group.call_args.kwargs.get(name) for name in ("forward_sync_buffers", "broadcast_buffers")}


class Killed(BaseException):
    """Simulates a killed process."""


class KilledAfter(Storage):
    """A storage whose process is killed right after a checkpoint is written."""

    def write(self, uri: str, data: bytes) -> None:
        super().write(uri, data)
        raise Killed


@pytest.mark.parametrize("regime", ["tuned", "frozen"])
def test_a_killed_training_resumes_with_bit_identical_results(
    trainings: Trainings, tmp_path: Path, caplog: pytest.LogCaptureFixture, regime: str
) -> None:
    training = trainings["bert"]
    wanted = {"regime": regime, "checkpoint_every": 2, "max_steps": 5, "validate_every": 2}
    whole = training.trained(**wanted)
    uri = str(tmp_path / "checkpoint.pt")
    with pytest.raises(Killed):
        training.trained(**wanted, checkpoint=Checkpoint(KilledAfter(), uri, "run"))
    with caplog.at_level(logging.INFO, logger="marc_pipeline"):
        resumed = training.trained(**wanted, checkpoint=Checkpoint(STORAGE, uri, "run"))
    assert "resumes from the checkpoint of step 2" in caplog.text
    assert resumed.progress.history == whole.progress.history
    states, others = resumed.objective.state_dict(), whole.objective.state_dict()
    assert states.keys() == others.keys()
    assert all(torch.equal(states[name], others[name]) for name in states)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="marc_pipeline"):
        training.trained(**wanted, checkpoint=Checkpoint(STORAGE, uri, "another run"))
    assert "is of another run" in caplog.text


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def frozen(request: pytest.FixtureRequest, trainings: Trainings) -> Frozen:
    training = trainings[request.param]
    trained = training.trained()
    return training, trained, training.saved(trained)


def test_a_frozen_bundle_gives_the_vectors_of_the_training_and_the_original_backbone(frozen: Frozen) -> None:
    training, trained, bundle = frozen
    found = encoded(bundle, TEXTS)
    assert cosines(found, unit(trained.objective.vectors())).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    assert trained.backbone is None
    original = truncate(load_backbone(training.train.backbone), KEPT).state_dict()
    kept = load_backbone(str(Path(bundle.uri) / "backbone")).state_dict()
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)


def test_the_card_contains_the_facts_of_the_training(frozen: Frozen) -> None:
    training, trained, bundle = frozen
    card, rows = bundle.card, training.training_set.interactions
    assert (card.layers_kept, card.backbone_layers, card.width, card.dim) == (KEPT, LAYERS, WIDTH, DIM)
    assert (card.pooling, card.max_tokens, card.normalised, card.template) == ("mean", MAX_TOKENS, True, TEMPLATE)
    assert card.backbone == training.train.backbone
    arguments = {"width": WIDTH, "dim": DIM, "hidden": 16}
    assert (card.compressor.kind, card.compressor.arguments) == ("bottleneck", arguments)
    boundary = training.training_set.split.train.stop
    assert (card.training["training_id"], card.training["regime"]) == ("tiny", "frozen")
    assert card.training["until"] == rows.times[boundary - 1] < rows.times[boundary]
    assert card.training["interactions"] <= boundary
    assert card.training["settings"]["learning_rate"] == 0.01
    assert card.metrics["holdout_auc"] == pytest.approx(trained.progress.best, abs=1e-6)
    assert card.metrics["steps"] == trained.progress.best_step
    assert check_bundle(STORAGE, bundle) == []
    assert json.loads((Path(bundle.uri) / "bundle.json").read_text())["training"]["seed"] == 0


def test_the_matching_network_is_saved_and_can_be_loaded(frozen: Frozen) -> None:
    _, trained, bundle = frozen
    weights = load_file(Path(bundle.uri) / "matching.safetensors")
    assert {name.split(".")[0] for name in weights} == {"matching", "clicked", "skipped"}
    matching = ResidualNetwork(dim=DIM, users=Marc.USERS, hidden=64, dropout=0.4)
    matching.load_state_dict({n.removeprefix("matching."): w for n, w in weights.items() if n.startswith("matching.")})
    objective = trained.objective
    assert isinstance(objective, Marc)
    for name, weight in matching.state_dict().items():
        assert torch.equal(weight, objective.matching.state_dict()[name])


def test_a_bundle_contains_json_and_safetensors_but_no_pickle(frozen: Frozen, tuned: TunedOf) -> None:
    for bundle in (frozen[2], tuned("mamba").bundle):
        files = [path for path in Path(bundle.uri).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        assert {"bundle.json", "compressor.safetensors", "matching.safetensors", "model.safetensors"} <= {
            path.name for path in files
        }
        for path in files:
            # Signatures of torch.save's zip archives, and of pickles of protocol 2 and later.
            assert path.read_bytes()[:2] not in {b"PK", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6))}
            if path.suffix == ".json":
                json.loads(path.read_text())
        listed = set(bundle.card.files) | {"bundle.json"}
        assert {str(path.relative_to(bundle.uri)) for path in files} == listed


@pytest.mark.parametrize("regime", ["frozen", "tuned"])
def test_the_same_seed_gives_the_same_version_and_another_seed_another(trainings: Trainings, regime: str) -> None:
    training = trainings["bert"]
    versions = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(versions))  # the global seed must not matter
        trained = training.trained(regime=regime, seed=seed, max_steps=2)
        versions.append(training.saved(trained, into=f"again-{len(versions)}", regime=regime, seed=seed).version)
    assert versions[0] == versions[1] != versions[2]


def test_rows_after_the_boundary_do_not_change_the_bundle(trainings: Trainings) -> None:
    training = trainings["bert"]
    boundary = training.training_set.split.train.stop
    labels = training.training_set.interactions.labels.copy()
    labels[boundary:] = 1 - labels[boundary:]
    both = (training, training.with_interactions(labels=labels))
    versions = [one.saved(one.trained(max_steps=2), into=f"leak-{n}").version for n, one in enumerate(both)]
    assert versions[0] == versions[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": WIDTH + 1, "regime": "frozen"}, r"train\.dim is 33"),
        ({"dim": WIDTH + 1, "regime": "tuned"}, r"train\.dim is 33"),
        (
            {"learning_rate": 1e20, "max_steps": 20_000, "epochs": 5},
            r"the loss is not finite at step \d+; lower train.learning_rate",
        ),
    ],
)
def test_too_many_dimensions_and_a_loss_that_is_not_finite_are_refused(
    trainings: Trainings, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        trainings["bert"].trained(**changes)

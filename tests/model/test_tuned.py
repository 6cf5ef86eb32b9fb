"""MARC bundles in both regimes: what is trained, what stays, and that a bundle gives the vectors of its training."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
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
    save_tiny_backbone,
)
from torch import Tensor
from torch.nn import functional

from pipeline.config import EncodeSettings, TrainSettings
from pipeline.errors import UserError
from pipeline.interactions import Interactions
from pipeline.model import fit
from pipeline.model.backbone import HiddenStates, PooledStates, load_backbone, truncate
from pipeline.model.bundle import Bundle, check_bundle
from pipeline.model.compressor import Bottleneck
from pipeline.model.encoder import Encoder, load_encoder
from pipeline.model.fit import Checkpoint
from pipeline.model.learning import learning_data
from pipeline.model.marc import Constraints, Marc
from pipeline.model.matching import CrossingNetwork, ResidualNetwork
from pipeline.model.states import cutting_tokenizer, write_states
from pipeline.model.training import Trained, save_marc, train_marc
from pipeline.model.tuned import TunedStates, add_lora, merged
from pipeline.storage import Storage
from pipeline.training_set import STATES, TrainingSet
from schemas.bundle import Pooling
from schemas.training import TrainingSetCard

STORAGE = Storage()
DIM, KEPT, HISTORY = 8, 3, 5
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
# peft 0.21 asks transformers 5.23 for a property by its old name.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
LEARNED = ("compressor.", "matching.", "clicked.", "skipped.")


@dataclass(frozen=True)
class Site:
    """A tiny backbone, a training set with its states, and a folder of bundles."""

    root: Path
    training_set: TrainingSet
    train: TrainSettings

    def trained(self, *, layers: int = KEPT, checkpoint: Checkpoint | None = None, **changes: Any) -> Trained:
        return train_marc(
            self.training_set,
            layers=layers,
            train=self.train.model_copy(update=changes),
            encode=CPU_FLOAT32,
            history=HISTORY,
            resources=ONE_CORE,
            checkpoint=checkpoint,
        )

    def saved(self, trained: Trained, *, into: str = "bundles", **changes: Any) -> Bundle:
        train = self.train.model_copy(update=changes)
        return save_marc(trained, self.training_set, train=train, storage=STORAGE, bundle_uri=str(self.root / into))


def interactions(rows: int = 700, users: int = 12) -> Interactions:
    """Users who like one of two kinds of genre, with exceptions; several rows share their time."""
    rng = np.random.default_rng(0)
    chosen, items = np.arange(rows) % users, rng.integers(0, len(TEXTS), rows)
    liked = (items % 5 < 2) == (chosen % 2 == 0)
    labels = liked ^ (rng.random(rows) < 0.15)
    return Interactions(chosen, items, labels.astype(np.float32), np.arange(rows, dtype=np.int64) // 2)


def make_site(root: Path, architecture: str, **changes: Any) -> Site:
    train = TrainSettings.model_validate(
        {
            "backbone": save_tiny_backbone(root / "backbone", architecture), "dim": DIM, "max_tokens": MAX_TOKENS,
            "hidden": 16, "batch": 128, "epochs": 2, "warm_up": 1, "learning_rate": 0.01,
            "backbone_learning_rate": 0.01, "lora_rank": 4, "max_steps": 4, **changes,
        }
    )  # fmt: skip
    facts = write_states(TEXTS, root / STATES, train=train, encode=CPU_FLOAT32, resources=ONE_CORE)
    rows = interactions()
    card = TrainingSetCard(
        training_id="tiny", ds="2026-11-20", template=TEMPLATE, backbone=train.backbone, pooling=train.pooling,
        **vars(facts), items=len(TEXTS), users=rows.n_users, interactions=len(rows), clicks=int(rows.labels.sum()),
        files={},
    )  # fmt: skip
    item_ids = [f"i{number:02d}" for number in range(len(TEXTS))]
    return Site(root, TrainingSet(root, card, item_ids, list(TEXTS), rows), train)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return {name: make_site(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


class Tuned:
    """A tuned MARC, its vectors and states before the adapters were merged, and the bundle it became."""

    def __init__(self, site: Site, trained: Trained) -> None:
        self.site, self.trained = site, trained
        self.parameters = {name: p.requires_grad for name, p in trained.objective.named_parameters()}
        self.vectors = trained.objective.vectors().clone()
        self.states = trained.objective.source.all_states().clone()
        self.bundle = site.saved(trained, regime="tuned")


@pytest.fixture(scope="module")
def tuned(sites: dict[str, Site]) -> Callable[[str], Tuned]:
    """A few steps of the tuned regime, once per architecture that a test asks for."""
    return cache(lambda name: Tuned(sites[name], sites[name].trained(regime="tuned")))


def adapted(site: Site, *, layers: int = KEPT, states: Tensor | None = None, rank: int = 4) -> TunedStates:
    """States of a backbone whose adapters have not learned anything."""
    backbone = load_backbone(site.train.backbone)
    tokenizer, _ = cutting_tokenizer(backbone, site.train)
    tokens = [np.array(one.ids, dtype=np.int32) for one in tokenizer.encode_batch(TEXTS)]
    return TunedStates(
        add_lora(truncate(backbone, layers), rank=rank, seed=0),
        tokens,
        torch.from_numpy(site.training_set.states(layers)) if states is None else states,
        whole=layers == LAYERS,
        pooling=site.train.pooling,
        dtype=torch.float32,
        token_budget=CPU_FLOAT32.token_budget,
    ).eval()


def encoded(bundle: Bundle, texts: list[str], *, encode: EncodeSettings = CPU_FLOAT32) -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = (
        load_encoder(STORAGE, bundle.uri, bundle.version, encode, ONE_CORE).encode(texts).vectors
    )
    return vectors


def unit(vectors: Tensor) -> NDArray[np.float32]:
    return np.asarray(functional.normalize(vectors, dim=-1).numpy())


# --- tuned: what is trained


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("layers", [1, KEPT, LAYERS])
def test_tuning_starts_from_the_untouched_backbones_states(
    sites: dict[str, Site], architecture: str, layers: int
) -> None:
    site = sites[architecture]
    blank = torch.zeros(len(TEXTS), WIDTH)
    source = adapted(site, layers=layers, states=blank)
    # Tuning pads its texts, the pass over all layers packs them.
    expected = torch.from_numpy(site.training_set.states(layers))
    torch.testing.assert_close(source.all_states(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(blank, torch.zeros_like(blank)), "the caller's states are the caller's"


@EVERY_ARCHITECTURE
def test_only_adapters_compressor_matching_and_history_pooling_learn(
    sites: dict[str, Site], tuned: Callable[[str], Tuned], architecture: str
) -> None:
    learning = {name for name, learns in tuned(architecture).parameters.items() if learns}
    resting = tuned(architecture).parameters.keys() - learning
    assert all("lora_" in name or name.startswith(LEARNED) for name in learning)
    assert not [name for name in resting if "lora_" in name or name.startswith(LEARNED)]
    for part in ("source.", *LEARNED):
        assert any(name.startswith(part) for name in learning), part
    assert any("embed" in name for name in resting)
    assert {name.split(".lora_A")[0] for name in learning if ".lora_A" in name} == {
        name.split(".lora_B")[0] for name in learning if ".lora_B" in name
    }


@EVERY_ARCHITECTURE
def test_every_kept_block_gets_gradients_and_nothing_frozen_does(sites: dict[str, Site], architecture: str) -> None:
    site = sites[architecture]
    source = adapted(site)
    # B begins as zeros, which hides A's gradients.
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    objective = marc(source).train()
    batch = learning_data(site.training_set.interactions, history=HISTORY, holdout=0.1).training
    terms = objective(batch[torch.arange(64)])
    terms["loss"].backward()
    moved = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all("lora_" in name or name.startswith(LEARNED) for name in moved)
    assert {name for name, p in objective.named_parameters() if not p.requires_grad and p.grad is not None} == set()
    still = {name for name, p in objective.named_parameters() if p.requires_grad} - moved
    assert not still, "all that is trained has a part in the loss"
    adapters = {name for name in moved if "lora_" in name}
    assert all(any(f".{block}." in name for name in adapters) for block in range(KEPT))


def marc(source: TunedStates) -> Marc:
    torch.manual_seed(0)
    compressor = Bottleneck(width=WIDTH, dim=DIM, hidden=16)
    torch.nn.init.normal_(compressor.down.weight, std=0.1)
    matching = CrossingNetwork(dim=DIM, users=Marc.USERS, hidden=16, dropout=0.1)
    return Marc(source, compressor, matching, dim=DIM, constraints=Constraints(keep=0.5, decouple=0.1))


def test_candidates_are_encoded_afresh_and_the_others_read_from_the_bank(sites: dict[str, Site]) -> None:
    fresh = torch.from_numpy(sites["bert"].training_set.states(KEPT))
    source = adapted(sites["bert"], states=torch.full((len(TEXTS), WIDTH), 7.0))
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


def test_states_do_not_depend_on_how_items_are_batched(sites: dict[str, Site]) -> None:
    source = adapted(sites["llama"], layers=LAYERS)
    whole = source.all_states().clone()
    for budget in (1, 48, 10_000):
        source.token_budget = budget
        torch.testing.assert_close(source.all_states(), whole, atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_a_few_steps_change_the_backbones_states_and_the_bank_holds_the_new_ones(
    sites: dict[str, Site], tuned: Callable[[str], Tuned], architecture: str
) -> None:
    before = torch.from_numpy(sites[architecture].training_set.states(KEPT))
    after = tuned(architecture).states
    assert torch.isfinite(after).all()
    assert ((after - before).abs().amax(dim=1) > 1e-3).all(), "every item's state moved"
    source = tuned(architecture).trained.objective.source
    assert isinstance(source, TunedStates)
    assert torch.equal(source.bank, source.all_states())


@EVERY_ARCHITECTURE
def test_merged_adapters_give_the_states_of_the_adapted_model(sites: dict[str, Site], architecture: str) -> None:
    trained = sites[architecture].trained(regime="tuned", max_steps=2)
    wanted = trained.objective.source.all_states().clone()
    assert trained.backbone is not None
    model = merged(trained.backbone)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]
    tokenizer, _ = cutting_tokenizer(model, sites[architecture].train)
    plain = Encoder(
        PooledStates(HiddenStates(model, whole=False), "mean"), tokenizer, head=torch.nn.Identity(),
        device=torch.device("cpu"), dtype=torch.float32, token_budget=256,
    )  # fmt: skip
    found = torch.from_numpy(plain.encode(TEXTS).vectors)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_the_bundle_of_a_tuned_backbone_gives_the_vectors_of_the_training(
    tuned: Callable[[str], Tuned], architecture: str
) -> None:
    found = encoded(tuned(architecture).bundle, TEXTS)
    assert cosines(found, unit(tuned(architecture).vectors)).min() >= 0.9999
    backbone = load_file(Path(tuned(architecture).bundle.uri) / "backbone" / "model.safetensors")
    assert not [name for name in backbone if "lora" in name or "base_layer" in name]


@pytest.mark.parametrize(("architecture", "pooling"), [("bert", "cls"), ("llama", "mean"), ("qwen3", "last")])
def test_a_tuned_bundle_of_the_whole_backbone_keeps_pooling_and_final_norm(
    tmp_path: Path, architecture: str, pooling: Pooling
) -> None:
    site = make_site(tmp_path, architecture, pooling=pooling, max_steps=2)
    trained = site.trained(layers=LAYERS, regime="tuned")
    wanted = unit(trained.objective.vectors())
    bundle = site.saved(trained, regime="tuned")
    assert (bundle.card.layers_kept, bundle.card.pooling) == (LAYERS, pooling)
    assert cosines(encoded(bundle, TEXTS), wanted).min() >= 0.9999


def test_the_card_of_a_tuned_bundle_says_so(tuned: Callable[[str], Tuned]) -> None:
    card = tuned("bert").bundle.card
    assert (card.training["regime"], card.training["settings"]["regime"]) == ("tuned", "tuned")
    assert card.training["interactions"] == tuned("bert").trained.interactions
    assert (card.layers_kept, card.backbone_layers, card.compressor.kind) == (KEPT, LAYERS, "bottleneck")
    assert check_bundle(STORAGE, tuned("bert").bundle) == []


@pytest.mark.parametrize("regime", ["frozen", "tuned"])
def test_texts_of_users_are_encoded_beside_the_items_and_leave_the_vectors_to_these(
    tmp_path: Path, regime: str
) -> None:
    plain = make_site(tmp_path, "bert", max_steps=2)
    told = plain.training_set.interactions
    profiles = np.where(told.users % 3 == 0, -1, told.users % 2)
    rows = Interactions(
        told.users, told.items, told.labels, told.times, profiles, ("likes comedies", "likes docuseries")
    )  # fmt: skip
    texts = TrainingSet(tmp_path, plain.training_set.card, plain.training_set.item_ids, list(TEXTS), rows)
    write_states(texts.encoded_texts, tmp_path / STATES, train=plain.train, encode=CPU_FLOAT32, resources=ONE_CORE)
    site = Site(tmp_path, texts, plain.train)
    trained = site.trained(regime=regime)
    vectors = trained.objective.vectors()
    assert len(vectors) == len(TEXTS) + 2
    bundle = site.saved(trained, regime=regime)
    assert cosines(encoded(bundle, texts.encoded_texts), unit(vectors)).min() >= 0.9999
    weights = load_file(Path(bundle.uri) / "matching.safetensors")
    assert {name.split(".")[0] for name in weights} == {"matching", "clicked", "skipped", "profile"}


def test_states_and_banks_are_not_sent_round_between_processes(
    sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, Any] = {}

    def group(objective: Marc, **options: Any) -> Marc:
        wanted.update(options)
        return objective

    monkeypatch.setattr(fit, "place", lambda: (0, 2))
    monkeypatch.setattr(fit, "DistributedDataParallel", group)
    sites["bert"].trained(max_steps=1)
    assert False in {wanted.get("forward_sync_buffers"), wanted.get("broadcast_buffers")}


class Killed(BaseException):
    """Stands for a process that ends at once."""


class KilledAfter(Storage):
    """A store whose process dies right after a checkpoint was written."""

    def write(self, uri: str, data: bytes) -> None:
        super().write(uri, data)
        raise Killed


@pytest.mark.parametrize("regime", ["tuned", "frozen"])
def test_a_killed_training_goes_on_from_its_checkpoint_and_ends_in_the_same_bits(
    sites: dict[str, Site], tmp_path: Path, caplog: pytest.LogCaptureFixture, regime: str
) -> None:
    site = sites["bert"]
    wanted = {"regime": regime, "checkpoint_every": 2, "max_steps": 5, "validate_every": 2}
    whole = site.trained(**wanted)
    uri = str(tmp_path / "checkpoint.pt")
    with pytest.raises(Killed):
        site.trained(**wanted, checkpoint=Checkpoint(KilledAfter(), uri, "run"))
    with caplog.at_level(logging.INFO, logger="pipeline"):
        resumed = site.trained(**wanted, checkpoint=Checkpoint(STORAGE, uri, "run"))
    assert "goes on from the checkpoint of step 2" in caplog.text
    assert resumed.progress.history == whole.progress.history
    states, others = resumed.objective.state_dict(), whole.objective.state_dict()
    assert states.keys() == others.keys()
    assert all(torch.equal(states[name], others[name]) for name in states)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pipeline"):
        site.trained(**wanted, checkpoint=Checkpoint(STORAGE, uri, "another run"))
    assert "is of another run" in caplog.text


# --- frozen


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def frozen(request: pytest.FixtureRequest, sites: dict[str, Site]) -> tuple[Site, Trained, Bundle]:
    site = sites[request.param]
    trained = site.trained()
    return site, trained, site.saved(trained)


def test_a_frozen_bundle_gives_the_vectors_of_the_training(frozen: tuple[Site, Trained, Bundle]) -> None:
    _, trained, bundle = frozen
    found = encoded(bundle, TEXTS)
    assert cosines(found, unit(trained.objective.vectors())).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_frozen_training_leaves_the_backbone_as_it_was(frozen: tuple[Site, Trained, Bundle]) -> None:
    site, trained, bundle = frozen
    assert trained.backbone is None
    original = truncate(load_backbone(site.train.backbone), KEPT).state_dict()
    kept = load_backbone(str(Path(bundle.uri) / "backbone")).state_dict()
    assert kept.keys() == original.keys()
    assert all(torch.equal(kept[name], original[name]) for name in kept)


def test_the_card_holds_the_facts_of_the_training(frozen: tuple[Site, Trained, Bundle]) -> None:
    site, trained, bundle = frozen
    card, rows = bundle.card, site.training_set.interactions
    assert (card.layers_kept, card.backbone_layers, card.width, card.dim) == (KEPT, LAYERS, WIDTH, DIM)
    assert (card.pooling, card.max_tokens, card.normalised, card.template) == ("mean", MAX_TOKENS, True, TEMPLATE)
    assert card.backbone == site.train.backbone
    assert card.compressor.kind == "bottleneck"
    assert card.compressor.arguments == {"width": WIDTH, "dim": DIM, "hidden": 16}
    boundary = site.training_set.split.train.stop
    assert card.training["training_id"] == "tiny"
    assert card.training["regime"] == "frozen"
    assert card.training["until"] == rows.times[boundary - 1] < rows.times[boundary]
    assert card.training["interactions"] <= boundary
    assert card.training["settings"]["learning_rate"] == 0.01
    assert card.metrics["validation_auc"] == pytest.approx(trained.progress.best, abs=1e-6)
    assert card.metrics["steps"] == trained.progress.best_step
    assert check_bundle(STORAGE, bundle) == []
    assert json.loads((Path(bundle.uri) / "bundle.json").read_text())["training"]["seed"] == 0


def test_the_matching_network_is_kept_beside_the_compressor_and_can_be_loaded(
    frozen: tuple[Site, Trained, Bundle],
) -> None:
    _, trained, bundle = frozen
    weights = load_file(Path(bundle.uri) / "matching.safetensors")
    assert {name.split(".")[0] for name in weights} == {"matching", "clicked", "skipped"}
    matching = ResidualNetwork(dim=DIM, users=Marc.USERS, hidden=64, dropout=0.4)
    matching.load_state_dict({n.removeprefix("matching."): w for n, w in weights.items() if n.startswith("matching.")})
    objective = trained.objective
    assert isinstance(objective, Marc)
    for name, weight in matching.state_dict().items():
        assert torch.equal(weight, objective.matching.state_dict()[name])


def test_a_bundle_holds_json_and_safetensors_and_no_pickle(
    frozen: tuple[Site, Trained, Bundle], tuned: Callable[[str], Tuned]
) -> None:
    for bundle in (frozen[2], tuned("mamba").bundle):
        files = [path for path in Path(bundle.uri).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".json", ".safetensors"}
        assert {"bundle.json", "compressor.safetensors", "matching.safetensors", "model.safetensors"} <= {
            path.name for path in files
        }
        for path in files:
            # Zip archives of torch.save, and bare pickles of protocol 2 and later.
            assert path.read_bytes()[:2] not in {b"PK", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6))}
            if path.suffix == ".json":
                json.loads(path.read_text())
        listed = set(bundle.card.files) | {"bundle.json"}
        assert {str(path.relative_to(bundle.uri)) for path in files} == listed


@pytest.mark.parametrize("regime", ["frozen", "tuned"])
def test_the_same_seed_gives_the_same_version_and_another_seed_another(sites: dict[str, Site], regime: str) -> None:
    site = sites["bert"]
    versions = []
    for seed in (0, 0, 1):
        torch.manual_seed(99 + len(versions))  # whatever ran before
        trained = site.trained(regime=regime, seed=seed, max_steps=2)
        versions.append(site.saved(trained, into=f"again-{len(versions)}", regime=regime, seed=seed).version)
    assert versions[0] == versions[1] != versions[2]


def test_what_lies_behind_the_boundary_changes_nothing(sites: dict[str, Site]) -> None:
    site = sites["bert"]
    rows = site.training_set.interactions
    labels = rows.labels.copy()
    labels[site.training_set.split.train.stop :] = 1 - labels[site.training_set.split.train.stop :]
    other = TrainingSet(
        site.root, site.training_set.card, site.training_set.item_ids, site.training_set.texts,
        Interactions(rows.users, rows.items, labels, rows.times),
    )  # fmt: skip
    versions = [
        one.saved(one.trained(max_steps=2), into=f"leak-{number}").version
        for number, one in enumerate((site, Site(site.root, other, site.train)))
    ]
    assert versions[0] == versions[1]


def test_more_dimensions_than_the_states_have_are_the_users_mistake(sites: dict[str, Site]) -> None:
    for regime in ("frozen", "tuned"):
        with pytest.raises(UserError, match=r"train\.dim is 33"):
            sites["bert"].trained(dim=WIDTH + 1, regime=regime)


def test_a_loss_that_is_not_finite_is_the_users_mistake(sites: dict[str, Site]) -> None:
    with pytest.raises(UserError, match=r"the loss is not finite at step \d+; lower train.learning_rate"):
        sites["bert"].trained(learning_rate=1e20, max_steps=None, epochs=5)

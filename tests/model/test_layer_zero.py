"""Layer 0, the embeddings alone: no block is computed, and a bundle's vectors are those of the first block's input."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from marc_pipeline.bundles.making import save_layer_pca
from marc_pipeline.config import InteractionSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.backbone import (
    InputStates,
    PooledLayers,
    PooledStates,
    blocks,
    kept_states,
    load_backbone,
    truncate,
)
from marc_pipeline.model.batches import PackedTokens, PaddedTokens
from marc_pipeline.model.bundle import Bundle, check_bundle
from marc_pipeline.model.compressor import Normalised, load_compressor
from marc_pipeline.model.encoder import Encoder, load_encoder
from marc_pipeline.storage import Storage
from marc_pipeline.training.states import write_states
from marc_pipeline.training.training_set import require_shape
from tiny_models import (
    ARCHITECTURES,
    CPU_FLOAT32,
    LAYERS,
    ONE_CORE,
    TEXTS,
    WIDTH,
    padded_batch,
    tiny_model,
    train_tiny_bundle,
)
from tiny_training import tiny_training

pytestmark = pytest.mark.usefixtures("one_thread")

STORAGE = Storage()
VOCABULARY = 64
PACKED = {"bert", "llama", "qwen3"}
CONSTANT = ("bert", "cls")
"""Every text has the same embedding of [CLS] at position 0."""
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


def loaded(bundle: Bundle) -> Encoder:
    return load_encoder(STORAGE, bundle.uri, bundle.version, CPU_FLOAT32, ONE_CORE)


def expected_vectors(bundle: Bundle, path: Path, texts: list[str]) -> NDArray[np.float32]:
    """The bundle's compressor, applied to entry 0 of the states of every layer of the original backbone."""
    card = bundle.card
    train = TrainSettings(backbone=card.backbone, pooling=card.pooling, max_tokens=card.max_tokens)
    write_states(texts, path, train=train, encode=CPU_FLOAT32, resources=ONE_CORE)
    states = torch.from_numpy(np.load(path)[0])
    with torch.inference_mode():
        found: NDArray[np.float32] = Normalised(load_compressor(Path(bundle.uri), card.compressor))(states).numpy()
    return found


@pytest.mark.parametrize(
    ("architecture", "pooling"),
    [(name, pooling) for name in ARCHITECTURES for pooling in ("mean", "last", "cls") if (name, pooling) != CONSTANT],
)
def test_a_saved_and_loaded_bundle_compresses_the_input_of_the_first_block(
    tmp_path: Path, architecture: str, pooling: str
) -> None:
    bundle = train_tiny_bundle(tmp_path, architecture, layers=0, pooling=pooling, dim=4)
    assert (bundle.card.layers_kept, bundle.card.backbone_layers) == (0, LAYERS)
    assert check_bundle(STORAGE, bundle) == []
    texts = [*TEXTS, "", "river and kitchen " * 40, "never seen 🎬"]
    encoder = loaded(bundle)
    assert encoder.packed == (architecture in PACKED)
    found = encoder.encode(texts).vectors
    np.testing.assert_allclose(found, expected_vectors(bundle, tmp_path / "states.npy", texts), atol=2e-5)
    # Alone in its batch, each text has the same vector.
    for place in (0, len(TEXTS), len(texts) - 1):
        np.testing.assert_allclose(encoder.encode([texts[place]]).vectors[0], found[place], atol=2e-5)


@EVERY_ARCHITECTURE
def test_a_marc_bundle_and_the_rival_of_the_gate_read_layer_0(tmp_path: Path, architecture: str) -> None:
    training = tiny_training(tmp_path, architecture)
    rival = save_layer_pca(
        training.training_set, layers=0, train=training.train, interactions=InteractionSettings(),
        storage=STORAGE, bundle_uri=str(tmp_path / "bundles"),
    )  # fmt: skip
    for number, bundle in enumerate([training.saved(training.trained(layers=0)), rival]):
        assert bundle.card.layers_kept == 0
        expected = expected_vectors(bundle, tmp_path / f"{number}.npy", TEXTS)
        np.testing.assert_allclose(loaded(bundle).encode(TEXTS).vectors, expected, atol=2e-5)


@EVERY_ARCHITECTURE
def test_no_block_is_computed_and_the_weights_of_blocks_are_not_in_memory(architecture: str) -> None:
    model = truncate(tiny_model(architecture, vocabulary=VOCABULARY), 0)
    assert len(blocks(model)[2]) == model.config.num_hidden_layers == 1
    inside = list(blocks(model)[2][0].modules())

    def refuse(module: nn.Module, *_: object) -> None:
        raise AssertionError(f"{type(module).__name__} is computed")

    for module in inside[1:]:
        module.register_forward_pre_hook(refuse)
    batch, packed = PaddedTokens(*padded_batch(VOCABULARY)), PackedTokens.of([np.arange(5, 9, dtype=np.int32)])
    whole = PooledLayers(tiny_model(architecture, vocabulary=VOCABULARY), "mean")
    zero = PooledStates(kept_states(model, layers=0, of=LAYERS), "mean")
    assert not list(blocks(model)[2][0].parameters())
    with torch.inference_mode():
        assert torch.equal(zero(batch), whole(batch)[:, 0])
    if architecture in PACKED:
        with torch.inference_mode():
            assert zero(packed).shape == (1, WIDTH)


@EVERY_ARCHITECTURE
def test_threads_share_the_module_and_a_failed_pass_does_not_affect_the_next(architecture: str) -> None:
    model = truncate(tiny_model(architecture, vocabulary=VOCABULARY), 0)
    states = InputStates(model)
    ids = [torch.full((2, 3 + number), 4 + number) for number in range(16)]
    batches = [PaddedTokens(rows, torch.ones_like(rows)) for rows in ids]
    expected = [states(batch) for batch in batches]
    with pytest.raises(IndexError):
        states(PaddedTokens(ids[0] + VOCABULARY, torch.ones_like(ids[0])))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(states, batches * 8))
    assert all(torch.equal(one, other) for one, other in zip(found, expected * 8, strict=True))


def test_a_model_that_skips_its_first_block_is_reported() -> None:
    model = truncate(tiny_model("bert", vocabulary=VOCABULARY), 0)
    states = InputStates(model)
    model.encoder.layer = nn.ModuleList()
    with pytest.raises(RuntimeError, match="did not run its first block"):
        states(PaddedTokens(*padded_batch(VOCABULARY)))


@EVERY_ARCHITECTURE
def test_layer_0_is_faster_than_layer_1(tmp_path: Path, architecture: str) -> None:
    texts = TEXTS * 4
    seconds = []
    for layers in (0, 1):
        encoder = loaded(train_tiny_bundle(tmp_path, architecture, layers=layers))
        encoder.encode(texts)
        seconds.append(min(encoder.encode(texts).model_seconds for _ in range(5)))
    assert seconds[0] < seconds[1]


def test_the_saved_backbone_has_one_block_and_another_version(tmp_path: Path) -> None:
    versions = set()
    for layers in (0, 1):
        bundle = train_tiny_bundle(tmp_path, layers=layers)
        versions.add(bundle.version)
        assert len(blocks(load_backbone(f"{bundle.uri}/backbone"))[2]) == 1
    assert len(versions) == 2


def test_a_constant_embedding_is_refused(tmp_path: Path) -> None:
    architecture, pooling = CONSTANT
    with pytest.raises(UserError, match="span fewer than 8 directions"):
        train_tiny_bundle(tmp_path, architecture, layers=0, pooling=pooling)


def test_lora_needs_a_layer() -> None:
    tuned = TrainSettings(regime="tuned", layers=0)
    with pytest.raises(UserError, match="LoRA needs at least one layer; 0 layers are kept"):
        require_shape(tuned, (), layers=LAYERS, width=WIDTH)
    for other in ({"layers": 1}, {"regime": "frozen"}, {"compressor": "pca"}):
        require_shape(tuned.model_copy(update=other), (), layers=LAYERS, width=WIDTH)

"""Hidden states of every layer in one pass: each equals that of the truncated model, for any batching of texts."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from layer_reference import text_states
from marc_pipeline.config import EncodeSettings, TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.backbone import PooledLayers, PooledStates, blocks, kept_states, truncate
from marc_pipeline.model.batches import PaddedTokens, pool
from marc_pipeline.training import states
from marc_pipeline.training.states import write_states
from marc_pipeline.training.training_set import StatesFacts
from marc_schemas.bundle import Pooling
from tiny_models import (
    ARCHITECTURES,
    CPU_FLOAT32,
    LAYERS,
    MAX_TOKENS,
    ONE_CORE,
    TEXTS,
    WIDTH,
    hidden_state_index,
    padded_batch,
    save_tiny_backbone,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 64
Models = dict[str, PreTrainedModel]
Backbones = dict[str, str]
Ids = tuple[Tensor, Tensor]
POOLINGS: list[Pooling] = ["mean", "last", "cls"]
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
EVERY_POOLING = pytest.mark.parametrize("pooling", POOLINGS)


@pytest.fixture(scope="module")
def models() -> Models:
    """One whole model of every architecture; tests hook and change copies only."""
    return {name: tiny_model(name, vocabulary=VOCABULARY) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def batch() -> Ids:
    return padded_batch(VOCABULARY)


def every_layer(model: PreTrainedModel, batch: Ids, pooling: Pooling) -> Tensor:
    with torch.inference_mode():
        found: Tensor = PooledLayers(copy.deepcopy(model), pooling)(PaddedTokens(*batch))
    return found


@EVERY_ARCHITECTURE
@EVERY_POOLING
def test_every_layer_equals_the_truncated_model_bit_for_bit(
    models: Models, batch: Ids, architecture: str, pooling: Pooling
) -> None:
    found = every_layer(models[architecture], batch, pooling)
    assert (found.shape, found.dtype) == ((3, LAYERS + 1, WIDTH), torch.float32)
    for kept in range(LAYERS + 1):
        truncated = truncate(copy.deepcopy(models[architecture]), kept)
        states = kept_states(truncated, layers=kept, of=LAYERS)
        with torch.inference_mode():
            expected = PooledStates(states, pooling)(PaddedTokens(*batch))
        assert torch.equal(found[:, kept], expected), kept


@EVERY_ARCHITECTURE
@EVERY_POOLING
def test_every_layer_equals_transformers_hidden_state_bit_for_bit(
    models: Models, batch: Ids, architecture: str, pooling: Pooling
) -> None:
    model = models[architecture]
    found = every_layer(model, batch, pooling)
    with torch.inference_mode():
        output = model(input_ids=batch[0], attention_mask=batch[1], output_hidden_states=True)
        # Mamba's list lacks the embeddings.
        first = model.get_input_embeddings()(batch[0]) if architecture == "mamba" else output.hidden_states[0]
    named = [first, *(output.hidden_states[hidden_state_index(architecture, kept)] for kept in range(1, LAYERS + 1))]
    for layer, expected in enumerate(named):
        assert torch.equal(found[:, layer], pool(expected, batch[1], pooling)), layer
    assert torch.equal(found[:, LAYERS], pool(output.last_hidden_state, batch[1], pooling)), "the whole model's output"
    for one, other in itertools.pairwise(found.unbind(dim=1)):
        assert not torch.allclose(one, other), "every block changes the state"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mamba"])
def test_only_the_last_layer_of_a_decoder_has_the_final_norm(models: Models, batch: Ids, architecture: str) -> None:
    found = every_layer(models[architecture], batch, "last")
    other = copy.deepcopy(models[architecture])
    norm = other.norm_f if architecture == "mamba" else other.norm
    with torch.no_grad():
        norm.weight.mul_(3)
    changed = every_layer(other, batch, "last")
    assert torch.equal(changed[:, :LAYERS], found[:, :LAYERS])
    torch.testing.assert_close(changed[:, LAYERS], 3 * found[:, LAYERS])


@EVERY_ARCHITECTURE
def test_a_failed_pass_does_not_affect_the_next(models: Models, batch: Ids, architecture: str) -> None:
    pooled = PooledLayers(copy.deepcopy(models[architecture]), "mean")
    ids, mask = batch
    with torch.inference_mode():
        first = pooled(PaddedTokens(ids, mask))
        with pytest.raises(IndexError):
            pooled(PaddedTokens(ids + VOCABULARY, mask))
        assert torch.equal(pooled(PaddedTokens(ids, mask)), first)
        assert torch.equal(
            pooled(PaddedTokens(ids[:1], mask[:1])), every_layer(models[architecture], (ids[:1], mask[:1]), "mean")
        )
        with pytest.raises(RuntimeError, match=r"outside PooledLayers\.forward"):
            pooled.model(input_ids=ids, attention_mask=mask)


def test_states_are_pooled_in_float32_for_every_dtype(models: Models, batch: Ids) -> None:
    exact = every_layer(models["bert"], batch, "mean")
    rough = every_layer(copy.deepcopy(models["bert"]).to(torch.bfloat16), batch, "mean")
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.2, rtol=0.1)
    assert not torch.equal(rough, rough.bfloat16().float()), "the mean of bfloat16 states is in float32"


# --- the file


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    folder = tmp_path_factory.mktemp("states")
    return {name: save_tiny_backbone(folder / name, name) for name in ARCHITECTURES}


def written(
    backbone: str, path: Path, texts: list[str] = TEXTS, *, encode: EncodeSettings = CPU_FLOAT32, **train: object
) -> tuple[NDArray[np.float32], StatesFacts]:
    settings = TrainSettings.model_validate({"backbone": backbone, "max_tokens": MAX_TOKENS, **train})
    facts = write_states(texts, path, train=settings, encode=encode, resources=ONE_CORE)
    return np.load(path, allow_pickle=False), facts


def expected_states(backbone: str, architecture: str, text: str, pooling: Pooling) -> NDArray[np.float64]:
    """Pooled states [L + 1, D] of one text, by transformers alone."""
    model, tokenizer = AutoModel.from_pretrained(backbone).eval(), AutoTokenizer.from_pretrained(backbone)
    ids = tokenizer(text, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")["input_ids"]
    tokens = text_states(architecture, model, ids)
    return np.stack([{"mean": one.mean(axis=0), "last": one[-1], "cls": one[0]}[pooling] for one in tokens])


@EVERY_ARCHITECTURE
@EVERY_POOLING
def test_the_file_contains_every_layer_of_every_text(
    backbones: Backbones, tmp_path: Path, architecture: str, pooling: Pooling
) -> None:
    # The last text is cut at the limit of 48 tokens.
    texts = [*TEXTS[:9], "river and kitchen " * 40]
    found, facts = written(backbones[architecture], tmp_path / "states.npy", texts, pooling=pooling)
    assert (found.shape, found.dtype) == ((LAYERS + 1, len(texts), WIDTH), np.float32)
    assert facts == StatesFacts(layers=LAYERS, width=WIDTH, max_tokens=MAX_TOKENS, dtype="float32", device="cpu")
    for place in (0, 4, len(texts) - 1):
        expected = expected_states(backbones[architecture], architecture, texts[place], pooling)
        np.testing.assert_allclose(found[:, place], expected, atol=2e-5, rtol=1e-4)


@EVERY_ARCHITECTURE
def test_the_file_does_not_depend_on_the_batching_of_texts(
    backbones: Backbones, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    whole, facts = written(backbones[architecture], tmp_path / "whole.npy")
    for at_once in (1, 7, len(TEXTS) - 1, len(TEXTS)):
        monkeypatch.setattr(states, "TEXTS_AT_ONCE", at_once)
        cut, same = written(backbones[architecture], tmp_path / f"{at_once}.npy")
        np.testing.assert_allclose(cut, whole, atol=1e-5, rtol=1e-5)
        assert same == facts
    backwards, _ = written(backbones[architecture], tmp_path / "backwards.npy", TEXTS[::-1])
    np.testing.assert_allclose(backwards[:, ::-1], whole, atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
@EVERY_POOLING
def test_an_empty_text_has_finite_states_independent_of_other_texts(
    backbones: Backbones, tmp_path: Path, architecture: str, pooling: Pooling
) -> None:
    alone, _ = written(backbones[architecture], tmp_path / "alone.npy", [""], pooling=pooling)
    among, _ = written(backbones[architecture], tmp_path / "among.npy", [*TEXTS[:3], "", "x " * 30], pooling=pooling)
    assert np.isfinite(among).all()
    np.testing.assert_allclose(among[:, 3], alone[:, 0], atol=1e-5, rtol=1e-5)


@EVERY_ARCHITECTURE
def test_tokens_after_the_limit_are_ignored(backbones: Backbones, tmp_path: Path, architecture: str) -> None:
    texts = ["river " * 10 + "seven", "river " * 10 + "kitchen " * 50]
    found, facts = written(backbones[architecture], tmp_path / "states.npy", texts, max_tokens=8)
    assert facts.max_tokens == 8
    np.testing.assert_allclose(found[:, 0], found[:, 1], atol=1e-6)
    longer, _ = written(backbones[architecture], tmp_path / "longer.npy", texts, max_tokens=60)
    assert not np.allclose(longer[:, 0], longer[:, 1], atol=1e-3)
    whole, facts = written(backbones[architecture], tmp_path / "whole.npy", ["seven " * 700], max_tokens=500)
    assert facts.max_tokens == (500 if architecture == "mamba" else 64), "the backbone's positions are another limit"
    assert np.isfinite(whole).all()


def test_bfloat16_states_are_written_as_float32_with_their_dtype(backbones: Backbones, tmp_path: Path) -> None:
    exact, _ = written(backbones["bert"], tmp_path / "exact.npy")
    bfloat16 = CPU_FLOAT32.model_copy(update={"dtype": "bfloat16"})
    rough, facts = written(backbones["bert"], tmp_path / "rough.npy", encode=bfloat16)
    assert (rough.dtype, facts.dtype) == (np.float32, "bfloat16")
    assert 0 < np.abs(rough - exact).max() < 0.5


def test_the_layers_setting_does_not_change_the_states(backbones: Backbones, tmp_path: Path) -> None:
    found, facts = written(backbones["llama"], tmp_path / "states.npy", layers=2)
    assert (len(found), facts.layers) == (LAYERS + 1, len(blocks(tiny_model("llama"))[2]))
    assert np.array_equal(found, written(backbones["llama"], tmp_path / "all.npy")[0])


@pytest.mark.parametrize(
    ("backbone", "layers", "dims", "message"),
    [
        ("bert", LAYERS + 1, (), "choose at most 4"),
        ("bert", None, (8, 33), "33 dimensions are wanted"),
        ("/no/such/model", None, (), "cannot load backbone '/no/such/model'"),
    ],
)
def test_impossible_settings_are_refused_before_the_pass_and_leave_no_file(
    backbones: Backbones, tmp_path: Path, backbone: str, layers: int | None, dims: tuple[int, ...], message: str
) -> None:
    train = TrainSettings(backbone=backbones.get(backbone, backbone), layers=layers)
    with pytest.raises(UserError, match=message):
        write_states(TEXTS, tmp_path / "s.npy", train=train, encode=CPU_FLOAT32, resources=ONE_CORE, dims=dims)
    assert not list(tmp_path.iterdir())

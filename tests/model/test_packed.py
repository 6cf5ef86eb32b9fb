"""Packed texts: a model gives the same vectors as for each text alone, or it keeps padded texts."""

import copy
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoModel,
    DebertaV2Config,
    DistilBertConfig,
    Gemma2Config,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedModel,
    RobertaConfig,
    XLMRobertaConfig,
)

from example_counts import examples
from marc_pipeline.model import packed
from marc_pipeline.model.backbone import HiddenStates, PooledLayers, PooledStates, truncate
from marc_pipeline.model.batches import PackedTokens, PaddedTokens
from marc_pipeline.model.onednn import PrepackedLinear, can_prepack, prepack
from marc_schemas.bundle import Pooling
from tiny_models import ARCHITECTURES, LAYERS, MAX_TOKENS, cosines, tiny_config, tiny_model

VOCABULARY = 64
Ids = list[NDArray[np.int32]]
Vectors = NDArray[np.float32]
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 80, "initializer_range": 0.2,
}  # fmt: skip
OTHERS = {
    "roberta": lambda: RobertaConfig(**SHAPE, pad_token_id=1),
    "xlm-roberta": lambda: XLMRobertaConfig(**SHAPE, pad_token_id=1),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=80
    ),
    "mpnet": lambda: MPNetConfig(**SHAPE),
    "deberta-v2": lambda: DebertaV2Config(**SHAPE, relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": lambda: ModernBertConfig(**SHAPE, pad_token_id=0, local_attention=16),
    "mistral": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=8),
    "mistral, wide": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=100),
    "gemma2": lambda: Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=8),
}


def texts_of(lengths: list[int], seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCABULARY, length).astype(np.int32) for length in lengths]


def alone(pooled: nn.Module, texts: Ids) -> Vectors:
    with torch.inference_mode():
        found: Vectors = torch.cat([pooled(PaddedTokens.of([text])) for text in texts]).numpy()
    return found


def together(pooled: nn.Module, texts: Ids, first_position: int = 0) -> Vectors:
    with torch.inference_mode():
        found: Vectors = pooled(PackedTokens.of(texts, first_position=first_position)).numpy()
    return found


some_lengths = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=7)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen3"])
@examples(3, of=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=some_lengths, seed=st.integers(0, 99))
def test_vectors_of_packed_texts_equal_those_of_each_text_alone(
    architecture: str, pooling: Pooling, lengths: list[int], seed: int
) -> None:
    model = tiny_model(architecture, vocabulary=VOCABULARY)
    texts = texts_of(lengths, seed)
    for kept in (2, LAYERS):
        pooled = PooledStates(HiddenStates(truncate(copy.deepcopy(model), kept), whole=kept == LAYERS), pooling)
        expected = alone(pooled, texts)
        assert packed.use_packed(pooled, pooled.model, longest=MAX_TOKENS) == 0
        assert cosines(together(pooled, texts), expected).min() >= 0.99999


@pytest.mark.parametrize("architecture", ["bert", "qwen3"])
def test_packed_states_of_every_layer_equal_those_of_each_text_alone(architecture: str) -> None:
    model = tiny_model(architecture, vocabulary=VOCABULARY)
    pooled, texts = PooledLayers(model, "mean"), texts_of([3, 3, 9, 1])
    expected = alone(pooled, texts)
    assert packed.use_packed(pooled, model, longest=MAX_TOKENS) == 0
    np.testing.assert_allclose(together(pooled, texts), expected, atol=1e-4)


@pytest.mark.parametrize("name", [*OTHERS, "mamba"])
def test_any_other_model_gives_equal_vectors_or_is_unchanged(name: str) -> None:
    config = tiny_config("mamba", vocabulary=VOCABULARY) if name == "mamba" else OTHERS[name]()
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(config).eval()
    before = model.config._attn_implementation
    pooled = PooledStates(HiddenStates(model, whole=True), "mean")
    texts = texts_of([40, 40, 25, 7, 1])
    expected = alone(pooled, texts)
    first = packed.use_packed(pooled, model, longest=MAX_TOKENS)
    if first is None:
        assert model.config._attn_implementation == before
        np.testing.assert_array_equal(alone(pooled, texts), expected)
    else:
        assert cosines(together(pooled, texts, first), expected).min() >= 0.9999
    assert (first is None) == (name in ("mamba", "mpnet", "deberta-v2", "modernbert", "mistral", "gemma2"))
    if name in ("roberta", "xlm-roberta"):
        assert first == 2


def test_padded_batches_use_the_attention_of_transformers() -> None:
    model = tiny_model("qwen3", vocabulary=VOCABULARY)
    ids = torch.randint(4, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        pooled = PooledStates(HiddenStates(model, whole=True), "mean")
        assert packed.use_packed(pooled, model, longest=MAX_TOKENS) == 0
        found = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "native"), [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)])
@examples(5, of=15)
@given(lengths=st.lists(st.sampled_from([1, 2, 5, 30, 170]), min_size=1, max_size=6))
def test_attention_by_length_equals_softmax(
    heads: int, causal: bool, dtype: torch.dtype, native: bool, lengths: list[int]
) -> None:
    lengths = sorted(lengths, reverse=True)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, count, sum(lengths), 8, generator=generator).to(dtype) for count in (4, heads, heads)
    )
    batch = PackedTokens.of(texts_of(lengths))
    module = nn.Module()
    with batch.attended(), patch.object(packed, "multiplies_bfloat16", return_value=native):
        found, _ = packed.packed_attention(module, query, key, value, None, scaling=0.3, is_causal=causal)
    start = 0
    for length in lengths:
        end = start + length
        q, k, v = (part[0, :, start:end].double() for part in (query, key, value))
        k, v = (part.repeat_interleave(4 // heads, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) * 0.3
        if causal:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        expected = (scores.softmax(dim=-1) @ v).transpose(0, 1)
        bound = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(found[0, start:end].double(), expected, atol=bound, rtol=bound)
        start = end


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6))
def test_packed_pooling_equals_padded_pooling(pooling: Pooling, lengths: list[int]) -> None:
    texts = texts_of(lengths)
    batch, padded = PackedTokens.of(texts), PaddedTokens.of(texts)
    states = torch.randn(1, batch.ids.shape[1], 5, generator=torch.Generator().manual_seed(0))
    spread = torch.full((len(lengths), padded.ids.shape[1], 5), 1e6)
    for row, (start, end) in enumerate(zip(batch.bounds[:-1].tolist(), batch.bounds[1:].tolist(), strict=True)):
        spread[row, : end - start] = states[0, start:end]
    # A text without tokens gets one token.
    mask = torch.arange(padded.ids.shape[1]) < torch.tensor(lengths).clamp(min=1)[:, None]
    expected = PaddedTokens(padded.ids, mask.long()).pool(spread, pooling)
    torch.testing.assert_close(batch.pool(states, pooling), expected)


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=9), fill=st.integers(0, 9))
def test_states_by_length_are_those_of_every_text_without_filler(lengths: list[int], fill: int) -> None:
    texts = texts_of(lengths)
    packed, padded = PackedTokens.of(texts, tokens=sum(lengths) + fill), PaddedTokens.of(texts)
    # The state of a token is 100 × its text + its position; filler and padding have 7777.
    row = torch.full((1, packed.ids.shape[1], 1), 7777.0)
    spread = torch.full((len(lengths), padded.ids.shape[1], 1), 7777.0)
    for place, (start, length) in enumerate(zip(packed.bounds.tolist(), lengths, strict=False)):
        for token in range(max(1, length)):
            row[0, start + token] = spread[place, token] = 100 * place + token
    for batch, states in ((packed, row), (padded, spread)):
        found = {
            place: rows.squeeze(1).tolist()
            for places, group in batch.by_length(states)
            for place, rows in zip(places.tolist(), group, strict=True)
        }
        assert found == {
            place: [100.0 * place + token for token in range(max(1, length))] for place, length in enumerate(lengths)
        }


def test_positions_bounds_and_runs_of_a_batch() -> None:
    batch = PackedTokens.of(texts_of([4, 4, 2, 0, 1]), first_position=2)
    assert batch.positions.tolist() == [[2, 3, 4, 5, 2, 3, 4, 5, 2, 3, 2, 2]]
    assert batch.bounds.tolist() == [0, 4, 8, 10, 11, 12]
    assert batch.runs == ((2, 4), (1, 2), (2, 1))


@pytest.mark.skipif(not can_prepack(), reason="this CPU does not multiply bfloat16")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prepacked_weights_give_the_same_states_except_for_rounding(architecture: str) -> None:
    model = tiny_model(architecture, vocabulary=VOCABULARY)
    prepack(model)
    assert not [module for module in model.modules() if isinstance(module, PrepackedLinear)], "float32 is unchanged"
    model = model.to(torch.bfloat16)
    other = copy.deepcopy(model)
    undo = prepack(other)
    replaced = [module for module in other.modules() if isinstance(module, PrepackedLinear)]
    assert len(replaced) == sum(type(module) is nn.Linear for module in model.modules()) > 0
    pooled, altered = (PooledStates(HiddenStates(one, whole=True), "mean") for one in (model, other))
    texts = texts_of([40, 17, 3])
    if architecture == "mamba":
        with pytest.raises(AttributeError, match="weight"):  # its scan reads the weights of its layers directly
            alone(altered, texts)
        undo()
        np.testing.assert_array_equal(alone(altered, texts), alone(pooled, texts))
        return
    found = alone(altered, texts)
    assert cosines(found, alone(pooled, texts)).min() >= 0.999
    undo()
    assert not [module for module in other.modules() if isinstance(module, PrepackedLinear)]
    np.testing.assert_array_equal(alone(altered, texts), alone(pooled, texts))


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_attention_on_a_gpu_equals_that_on_a_cpu(causal: bool, heads: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    batch = PackedTokens.of(texts_of([70, 70, 31, 5, 5, 1]))
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, count, 182, 32, generator=generator).bfloat16() for count in (4, heads, heads)]
    found = []
    for device in ("cpu", "cuda"):
        with batch.to(torch.device(device)).attended():
            moved = (part.to(device) for part in parts)
            found.append(packed.packed_attention(nn.Module(), *moved, None, scaling=0.2, is_causal=causal)[0].cpu())
    torch.testing.assert_close(found[1].float(), found[0].float(), atol=0.03, rtol=0.03)

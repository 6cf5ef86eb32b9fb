"""The measuring pass: token figures against a reference computation, and seconds and weights of every layer."""

import copy
import itertools
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from layer_reference import image_states, naive_figures, text_states
from marc_pipeline.layers.images import ImageBatch
from marc_pipeline.layers.measured import TOKEN_FIGURES, UNDEFINED, MeasuredLayers, weights_bytes
from marc_pipeline.model.backbone import PooledLayers, blocks, truncate
from marc_pipeline.model.batches import PackedTokens, PaddedTokens, TokenBatch
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.model.packed import use_packed
from marc_schemas.bundle import Pooling
from tiny_models import (
    ARCHITECTURES,
    IMAGE_SIDE,
    LAYERS,
    MAX_TOKENS,
    TEXTS,
    WIDTH,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 64
Ids = list[NDArray[np.int32]]
Models = dict[str, PreTrainedModel]
PACKABLE = ("bert", "llama", "qwen3")
LENGTHS = [12, 9, 9, 9, 5, 3, 3, 2, 2, 1, 1]
EVERY_LAYOUT = pytest.mark.parametrize(
    ("architecture", "packed"), [*((name, False) for name in ARCHITECTURES), *((name, True) for name in PACKABLE)]
)


@pytest.fixture(scope="module")
def models() -> Models:
    """One whole model of every architecture; tests hook and change copies only."""
    found = {name: tiny_model(name, vocabulary=VOCABULARY) for name in ARCHITECTURES}
    return {**found, "vit": tiny_vision_model("vit")}


def texts_of(lengths: list[int], seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, VOCABULARY, length).astype(np.int32) for length in lengths]


def measured(model: PreTrainedModel, pooling: Pooling = "mean", **options: Any) -> MeasuredLayers:
    return MeasuredLayers(copy.deepcopy(model), pooling, **options)


def batch_of(found: MeasuredLayers, texts: Ids, *, packed: bool, tokens: int = 0) -> TokenBatch:
    if not packed:
        return PaddedTokens.of(texts)
    assert use_packed(found, found.model, longest=MAX_TOKENS) == 0
    return PackedTokens.of(texts, tokens=tokens)


def measure(found: MeasuredLayers, batch: TokenBatch) -> Tensor:
    with torch.inference_mode(), found.measuring():
        seen: Tensor = found(batch)
    return seen


# Columns


@EVERY_LAYOUT
@pytest.mark.parametrize("order", [1.0, 2.0])
def test_token_figures_equal_those_of_each_text_alone(
    models: Models, architecture: str, packed: bool, order: float
) -> None:
    found = measured(models[architecture], order=order)
    texts = texts_of(LENGTHS)
    # Filler tokens at the end are as long as the last text, so that they look like one more text of its length.
    seen = measure(found, batch_of(found, texts, packed=packed, tokens=sum(LENGTHS) + 7))
    assert (seen.shape, seen.dtype) == ((len(texts), LAYERS + 1, WIDTH + len(TOKEN_FIGURES)), torch.float32)
    ids = [torch.from_numpy(text[None].astype(np.int64)) for text in texts]
    expected = [naive_figures(text_states(architecture, models[architecture], one), order) for one in ids]
    np.testing.assert_allclose(seen[..., WIDTH:].numpy(), expected, atol=2e-4)
    layers = np.array(expected)[0, :, [0, 2]]
    assert (np.abs(np.diff(layers, axis=1)) > 1e-3).all(), "the layers differ from one another"


@EVERY_LAYOUT
@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_measuring_does_not_change_the_pooled_states(
    models: Models, architecture: str, packed: bool, pooling: Pooling
) -> None:
    found, plain = measured(models[architecture], pooling), PooledLayers(copy.deepcopy(models[architecture]), pooling)
    texts = texts_of(LENGTHS)
    batch = batch_of(found, texts, packed=packed)
    if packed:
        assert use_packed(plain, plain.model, longest=MAX_TOKENS) == 0
    with torch.inference_mode():
        assert torch.equal(measure(found, batch)[..., :WIDTH], plain(batch))


def test_token_figures_of_images_are_those_of_their_patches(models: Models) -> None:
    pixels = torch.randn(3, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(0))
    seen = measure(measured(models["vit"]), ImageBatch(pixels))
    with torch.inference_mode():
        assert torch.equal(seen[..., :WIDTH], PooledLayers(copy.deepcopy(models["vit"]), "mean")(ImageBatch(pixels)))
    expected = [naive_figures(image_states(models["vit"], image[None]), 1.0) for image in pixels]
    np.testing.assert_allclose(seen[..., WIDTH:].numpy(), expected, atol=2e-4)
    assert (seen[..., WIDTH + 1] == 17).all(), "16 patches and CLS"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 14), min_size=1, max_size=8),
    layout=st.sampled_from([("mamba", False), ("qwen3", False), ("qwen3", True), ("bert", True)]),
    fill=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_token_figures_do_not_depend_on_other_texts_in_the_batch(
    models: Models, lengths: list[int], layout: tuple[str, bool], fill: int, seed: int
) -> None:
    architecture, packed = layout
    found = measured(models[architecture])
    texts = texts_of(lengths, seed)
    together = measure(found, batch_of(found, texts, packed=packed, tokens=sum(lengths) + fill))
    alone = torch.cat([measure(found, batch_of(found, [text], packed=packed)) for text in texts])
    torch.testing.assert_close(together[..., WIDTH:], alone[..., WIDTH:], atol=5e-4, rtol=1e-3)
    assert together[:, 0, WIDTH + 1].tolist() == [max(1, length) for length in lengths]


@EVERY_LAYOUT
def test_short_texts_have_undefined_curvature_and_no_nan(models: Models, architecture: str, packed: bool) -> None:
    found = measured(models[architecture])
    texts = texts_of([3, 2, 1, 0])
    entropies, tokens, turns = measure(found, batch_of(found, texts, packed=packed))[..., WIDTH:].unbind(dim=2)
    # A single token replaces a text without tokens.
    assert tokens.tolist() == [[count] * (LAYERS + 1) for count in (3, 2, 1, 1)]
    assert (turns[1:] == UNDEFINED).all()
    assert ((turns[0] >= 0) & (turns[0] <= math.pi)).all()
    assert (entropies[2:] == 0).all()
    assert ((entropies[:2] > 0) & (entropies[:2] <= math.log(3))).all()


def test_equal_tokens_have_undefined_curvature_in_the_embeddings(models: Models) -> None:
    seen = measure(measured(models["llama"]), PaddedTokens.of([np.full(6, 7, np.int32)]))[0, :, WIDTH:]
    assert seen[0].tolist() == [pytest.approx(0, abs=1e-6), 6, UNDEFINED]


def test_without_measuring_figures_are_undefined_and_no_time_is_added(models: Models) -> None:
    found = measured(models["bert"])
    batch = PaddedTokens.of(texts_of(LENGTHS))
    with torch.inference_mode():
        before = found(batch)
        seen = measure(found, batch)
        spent = found.seconds()
        after = found(batch)
    for one in (before, after):
        assert (one[..., WIDTH:] == UNDEFINED).all()
        assert torch.equal(one[..., :WIDTH], seen[..., :WIDTH])
    assert np.array_equal(found.seconds(), spent)
    assert spent.any()
    with pytest.raises(ZeroDivisionError), found.measuring():
        raise ZeroDivisionError
    with torch.inference_mode():
        assert (found(batch)[..., WIDTH:] == UNDEFINED).all(), "an error ends the measuring, too"


# Time


def test_seconds_cover_embeddings_and_blocks_and_only_grow(models: Models) -> None:
    found = measured(models["qwen3"])
    assert found.seconds().tolist() == [0] * (LAYERS + 1)
    batch = PaddedTokens.of(texts_of(LENGTHS))
    started = time.perf_counter()
    measure(found, batch)
    first = found.seconds()
    measure(found, batch)
    second = found.seconds()
    assert first.shape == (LAYERS + 1,)
    assert (first > 0).all()
    assert (second > first).all()
    assert second.sum() <= time.perf_counter() - started


class Slow(nn.Module):
    """A block that sleeps for some seconds."""

    def __init__(self, block: nn.Module, seconds: float) -> None:
        super().__init__()
        self.block, self.seconds = block, seconds

    def forward(self, *inputs: Any, **named: Any) -> Any:
        time.sleep(self.seconds)
        return self.block(*inputs, **named)


@pytest.mark.parametrize("slow", [0, 2, LAYERS - 1])
def test_the_time_of_a_block_is_added_to_that_block(models: Models, slow: int) -> None:
    model = copy.deepcopy(models["llama"])
    stack = blocks(model)[2]
    stack[slow] = Slow(stack[slow], 0.05)
    found = MeasuredLayers(model, "mean")
    totals = [found.seconds()]
    for _ in range(3):
        measure(found, PaddedTokens.of(texts_of([4, 3])))
        totals.append(found.seconds())
    # The minimum over passes, because other processes may interrupt one of them.
    seconds = np.diff(totals, axis=0).min(axis=0)
    assert seconds[slow + 1] >= 0.05
    assert np.delete(seconds, slow + 1).max() < 0.05


def test_the_time_of_the_measurement_is_excluded(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from marc_pipeline.layers import measured as module

    def slow(tokens: Tensor, order: float) -> Tensor:
        time.sleep(0.05)
        return torch.zeros(len(tokens))

    monkeypatch.setattr(module, "prompt_entropy", slow)
    found = measured(models["llama"])
    measure(found, PaddedTokens.of(texts_of([4, 4])))
    assert found.seconds().sum() < 0.05


# Batches that fail during the pass


def encoder_of(found: MeasuredLayers, architecture: str) -> Encoder:
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    return Encoder(
        found, tokenizer, head=nn.Identity(), device=torch.device("cpu"), dtype=torch.float32, token_budget=400
    )


class Limited(nn.Module):
    """A block that raises an error in the middle of the pass if the batch exceeds ``room`` tokens."""

    def __init__(self, block: nn.Module, error: Exception) -> None:
        super().__init__()
        self.block, self.error, self.room, self.refused = block, error, 10**9, 0

    def forward(self, states: Tensor, *inputs: Any, **named: Any) -> Any:
        if states.shape[0] * states.shape[1] > self.room:
            self.refused += 1
            raise self.error
        return self.block(states, *inputs, **named)


@pytest.mark.parametrize("error", [MemoryError("no room"), ValueError("too many for me")], ids=["memory", "other"])
@pytest.mark.parametrize("architecture", ["bert", "mamba"])
def test_a_batch_that_runs_again_in_parts_is_measured_once(architecture: str, error: Exception) -> None:
    model = tiny_model(architecture, vocabulary=tiny_tokenizer(architecture).get_vocab_size())
    stack = blocks(model)[2]
    stack[2] = limited = Limited(stack[2], error)
    found = MeasuredLayers(model, "mean")
    encoder = encoder_of(found, architecture)

    def encoded() -> NDArray[np.float32]:
        with found.measuring():
            ((_, done),) = encoder.stream([(None, TEXTS)])
        assert not done.failed
        return done.vectors

    expected = encoded()
    passes = len(found._passes)
    limited.room = 150
    seen = encoded()
    assert limited.refused
    np.testing.assert_allclose(seen, expected, atol=5e-4)
    # The times do not include the pass that failed.
    assert all(len(marks) == 2 * LAYERS + 3 for marks in found._passes[passes:])
    assert (expected[..., WIDTH + 1] > 1).all()


# Weights


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "vit"])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_weights_equal_those_of_the_truncated_model(models: Models, architecture: str, item_bytes: int) -> None:
    model = models[architecture]
    found = weights_bytes(model, item_bytes=item_bytes)
    assert len(found) == LAYERS + 1
    assert all(one < other for one, other in itertools.pairwise(found))
    for layers in range(1, LAYERS + 1):
        truncated = truncate(copy.deepcopy(model), layers)
        assert found[layers] == item_bytes * sum(weight.numel() for weight in truncated.parameters())
    assert found[-1] == item_bytes * model.num_parameters()

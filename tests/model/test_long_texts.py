"""Pooled long texts: equal to chunks encoded alone and averaged by hand, bounded batches, failures of one chunk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from marc_pipeline.config import TrainSettings
from marc_pipeline.model import encoder as encoder_module
from marc_pipeline.model.backbone import HiddenStates, PooledLayers, PooledStates
from marc_pipeline.model.chunks import text_groups, weighted_means
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.training.states import write_states
from marc_schemas.bundle import LongTexts, Pooling
from tiny_models import (
    CPU_FLOAT32,
    MAX_TOKENS,
    ONE_CORE,
    TEXTS,
    WIDTH,
    save_tiny_backbone,
    tiny_model,
    tiny_tokenizer,
)

CHUNK = MAX_TOKENS // 4
SHORT = ["moon", "a", "river"]
LONG = ["seven river moon " * 25, " ".join(TEXTS), "river " * CHUNK, "river " * 50 + "😀"]
MIXED = [SHORT[0], LONG[0], SHORT[1], *LONG[1:], SHORT[2]]


class Head(nn.Module):
    """A head that is not linear, so that a mean before it differs from a mean after it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the squares of the states."""
        return hidden.square()


def whole_model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, vocabulary=tiny_tokenizer(architecture).get_vocab_size())


def encoder_of(
    architecture: str, pooling: Pooling = "mean", long_texts: LongTexts = "pool", *, layers: bool = False, **given: Any
) -> Encoder:
    model, tokenizer = whole_model(architecture), tiny_tokenizer(architecture)
    tokenizer.enable_truncation(max_length=CHUNK)
    pooled = PooledLayers(model, pooling) if layers else PooledStates(HiddenStates(model, whole=True), pooling)
    device = torch.device("cpu")
    wanted = {"head": Head(), "token_budget": 3 * CHUNK, **given}
    return Encoder(pooled, tokenizer, device=device, dtype=torch.float32, long_texts=long_texts, **wanted)


@torch.inference_mode()
def by_hand(architecture: str, pooling: Pooling, text: str) -> NDArray[np.float32]:
    """The vector of a text: the model runs on each slice of its tokens alone, and plain sums make the mean."""
    model, tokenizer = whole_model(architecture), tiny_tokenizer(architecture)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    ids = tokenizer.encode(text).ids
    first, last = ids[: special // 2], ids[len(ids) - (special - special // 2) :]
    content = ids[len(first) : len(ids) - len(last)]
    total, count = torch.zeros(WIDTH), 0
    for start in range(0, len(content), CHUNK - special):
        chunk = [*first, *content[start : start + CHUNK - special], *last]
        states = model(input_ids=torch.tensor([chunk])).last_hidden_state[0].float()
        pooled = {"mean": states.mean(dim=0), "cls": states[0], "last": states[-1]}[pooling]
        total, count = total + len(chunk) * pooled, count + len(chunk)
    vector: NDArray[np.float32] = (total / count).square().numpy()
    return vector


SETUPS: list[tuple[str, Pooling]] = [("bert", "mean"), ("bert", "cls"), ("llama", "last"), ("mamba", "mean")]


@pytest.mark.parametrize(("architecture", "pooling"), SETUPS)
@pytest.mark.parametrize("at_once", [1, 512])
def test_a_long_text_is_the_mean_of_its_chunks_weighted_by_tokens(
    monkeypatch: pytest.MonkeyPatch, architecture: str, pooling: Pooling, at_once: int
) -> None:
    monkeypatch.setattr(encoder_module, "text_groups", lambda counts: text_groups(counts, at_once))
    encoded = encoder_of(architecture, pooling).encode(MIXED)
    expected = np.stack([by_hand(architecture, pooling, text) for text in MIXED])
    np.testing.assert_allclose(encoded.vectors, expected, atol=1e-4, rtol=1e-4)
    assert (encoded.cut_texts, encoded.lost_tokens) == (0, 0)
    cut = encoder_of(architecture, pooling, "cut").encode(MIXED)
    assert cut.cut_texts == len(LONG)
    short = [MIXED.index(text) for text in SHORT]
    np.testing.assert_allclose(encoded.vectors[short], cut.vectors[short], rtol=1e-4, atol=1e-5)
    long = [MIXED.index(text) for text in LONG]
    assert np.abs(encoded.vectors[long] - cut.vectors[long]).max() > 0.1


def test_every_layer_of_a_long_text_is_pooled() -> None:
    found = encoder_of("bert", layers=True).encode(MIXED).vectors
    expected = np.stack([by_hand("bert", "mean", text) for text in MIXED])
    np.testing.assert_allclose(found[:, -1], expected, atol=1e-4, rtol=1e-4)
    assert found.shape[1] > 2


def test_hidden_states_of_trainings_are_pooled_too(tmp_path: Path) -> None:
    train = TrainSettings(backbone=save_tiny_backbone(tmp_path / "backbone"), max_tokens=CHUNK)
    encode = CPU_FLOAT32.model_copy(update={"long_texts": "pool"})
    write_states(MIXED, tmp_path / "states.npy", train=train, encode=encode, resources=ONE_CORE)
    expected = encoder_of("bert", layers=True, head=nn.Identity()).encode(MIXED).vectors
    np.testing.assert_allclose(np.load(tmp_path / "states.npy").swapaxes(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
@pytest.mark.parametrize("budget", [CHUNK, 2 * CHUNK + 1, 1000])
def test_batches_of_chunks_stay_within_the_token_budget(
    monkeypatch: pytest.MonkeyPatch, architecture: str, budget: int
) -> None:
    encoder, progress, computed = encoder_of(architecture, token_budget=budget), list[tuple[int, int]](), list[int]()
    forward = encoder._forward

    def watched(texts: Sequence[NDArray[np.int32]], head: nn.Module) -> torch.Tensor:
        computed.append(sum(map(len, texts)) if encoder.packed else len(texts) * max(map(len, texts)))
        return forward(texts, head)

    monkeypatch.setattr(encoder, "_forward", watched)
    encoder.on_batch = lambda texts, tokens: progress.append((texts, tokens))
    encoded = encoder.encode(MIXED)
    assert max(computed) <= budget
    # The progress counts texts, not chunks.
    assert tuple(map(sum, zip(*progress, strict=True))) == (len(MIXED), encoded.tokens)


@pytest.mark.parametrize("broken", ["error", "nan"])
def test_a_text_fails_if_one_of_its_chunks_fails(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    encoder = encoder_of("bert")
    expected, forward = encoder.encode(MIXED).vectors, encoder._forward
    where = MIXED.index(LONG[3])
    others = [n for n in range(len(MIXED)) if n != where]
    ids_of = [set(tiny_tokenizer("bert").encode(text).ids) for text in MIXED]
    (bad, *_) = ids_of[where].difference(*(ids_of[n] for n in others))

    def fails(texts: Sequence[NDArray[np.int32]], head: nn.Module) -> torch.Tensor:
        hit = [bad in ids for ids in texts]
        if broken == "error" and any(hit):
            raise ValueError("no state for this")
        states = forward(texts, head).clone()
        states[torch.tensor(hit)] = torch.nan
        return states

    monkeypatch.setattr(encoder, "_forward", fails)
    ((_, encoded),) = encoder.stream([(None, MIXED)])
    assert list(encoded.failed) == [where]
    assert ("no state" in encoded.failed[where]) == (broken == "error")
    np.testing.assert_allclose(encoded.vectors[others], expected[others], atol=1e-4)
    assert not encoded.vectors[where].any()


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 9), max_size=30), at_once=st.integers(1, 12))
def test_groups_are_bounded_and_contain_every_text_once(counts: list[int], at_once: int) -> None:
    groups = list(text_groups(counts, at_once))
    assert [n for group in groups for n in range(len(counts))[group]] == list(range(len(counts)))
    assert all(sum(counts[group]) <= at_once or group.stop - group.start == 1 for group in groups)


@given(tokens=st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=5), min_size=1, max_size=9))
def test_weighted_means_equal_numpys_average(tokens: list[list[int]]) -> None:
    flat = np.array([count for text in tokens for count in text], np.int64)
    states = np.random.default_rng(0).normal(size=(len(flat), 2, 3)).astype(np.float32)
    found = weighted_means(states, flat, np.array([len(text) for text in tokens], np.int64))
    start = 0
    for row, text in zip(found, tokens, strict=True):
        some = states[start : start + len(text)]
        np.testing.assert_allclose(row, np.average(some, axis=0, weights=text), rtol=1e-4, atol=1e-5)
        start += len(text)

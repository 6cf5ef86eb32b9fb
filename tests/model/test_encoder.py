"""The encoder: a vector depends on its text alone, comes back in the text's place, and equals a second library's."""

import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel

from example_counts import examples
from marc_pipeline.config import EncodeSettings, TrainSettings
from marc_pipeline.errors import CorruptFile, Unencodable, UserError
from marc_pipeline.model.backbone import HiddenStates, PooledStates, load_backbone, load_tokenizer, locate
from marc_pipeline.model.bundle import Bundle, save_bundle
from marc_pipeline.model.encoder import (
    Encoder,
    OutOfMemory,
    choose_device,
    choose_dtype,
    load_encoder,
    next_batch,
    token_batches,
)
from marc_pipeline.model.onednn import PrepackedLinear
from marc_pipeline.model.tokens import token_ids
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_schemas.bundle import BundleCard, Pooling
from tiny_models import (
    CPU_FLOAT32,
    MAX_TOKENS,
    ONE_CORE,
    TEXTS,
    WIDTH,
    cosines,
    tiny_model,
    tiny_tokenizer,
    train_tiny_bundle,
)

LONG = "a golden river " * 400
ODD_TEXTS = [
    LONG,
    "🎬",
    "🎬🍿👩‍👩‍👧" * 30,
    " ",
    ".",
    "\n\t",
    "[PAD]",
    "[PAD] [SEP] [CLS]",
    "naïve Amélie ＡＢＣ",
    "映画と音楽",
    "x" * 3000,
]
SETUPS: list[tuple[str, Pooling]] = [("bert", "mean"), ("bert", "cls"), ("llama", "last"), ("qwen3", "mean")]
SETUPS += [("mamba", "last"), ("mamba", "mean")]


def tiny_encoder(
    architecture: str, model: PreTrainedModel, *, pooling: Pooling = "mean", token_budget: int = 256
) -> Encoder:
    """An encoder over a whole tiny model, without a compressor."""
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    return Encoder(
        PooledStates(HiddenStates(model, whole=True), pooling),
        tokenizer,
        head=nn.Identity(),
        device=torch.device("cpu"),
        dtype=torch.float32,
        token_budget=token_budget,
    )


def whole_model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, vocabulary=tiny_tokenizer(architecture).get_vocab_size())


def alone(architecture: str, model: PreTrainedModel, pooling: Pooling, text: str) -> NDArray[np.float32]:
    """The vector of one text by the model itself: no batch, no padding, no mask, pooling by hand."""
    ids = tiny_tokenizer(architecture).encode(text).ids
    if len(ids) > MAX_TOKENS:
        # [SEP] stays the last token of a truncated text; decoders have none.
        ids = [*ids[: MAX_TOKENS - 1], ids[-1]] if architecture == "bert" else ids[:MAX_TOKENS]
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    vector: NDArray[np.float32] = {"mean": states.mean(axis=0), "last": states[-1], "cls": states[0]}[pooling]
    return vector


@pytest.fixture(scope="module", params=SETUPS, ids="-".join)
def setup(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel, Pooling]:
    architecture, pooling = request.param
    return architecture, whole_model(architecture), pooling


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return whole_model("bert")


texts_of_any_kind = st.lists(
    st.one_of(
        st.sampled_from([*ODD_TEXTS, *TEXTS]),
        st.text(min_size=1, max_size=60),
        st.text("😀🎬é ü.a", min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=8,
)


@examples(3, of=12, suppress_health_check=[HealthCheck.too_slow])
@given(texts=texts_of_any_kind, token_budget=st.sampled_from([1, 60, 200, 5000]))
@example(texts=ODD_TEXTS + TEXTS[:3], token_budget=5000)
def test_a_vector_depends_on_its_text_alone_whatever_it_is_padded_with(
    setup: tuple[str, PreTrainedModel, Pooling], texts: list[str], token_budget: int
) -> None:
    architecture, model, pooling = setup
    together = tiny_encoder(architecture, model, pooling=pooling, token_budget=token_budget).encode(texts).vectors
    one_by_one = np.stack([alone(architecture, model, pooling, text) for text in texts])
    assert together.shape == (len(texts), WIDTH)
    assert together.dtype == np.float32
    assert cosines(together, one_by_one).min() >= 0.9999


def test_texts_without_any_token_get_a_finite_vector_that_does_not_touch_the_others() -> None:
    encoder = tiny_encoder("llama", whole_model("llama"))
    assert encoder._tokenizer.encode("").ids == []
    assert np.isfinite(encoder.encode([""]).vectors).all()
    together = encoder.encode(["", TEXTS[0], "", TEXTS[1]]).vectors
    assert np.isfinite(together).all()
    assert cosines(together[[1, 3]], encoder.encode(TEXTS[:2]).vectors).min() >= 0.9999


@examples(4, of=15)
@given(order=st.permutations(range(20)), token_budget=st.sampled_from([1, 100, 700]))
def test_rows_come_in_the_order_of_the_texts(bert: PreTrainedModel, order: list[int], token_budget: int) -> None:
    encoder = tiny_encoder("bert", bert, token_budget=token_budget)
    in_place = encoder.encode(TEXTS[:20]).vectors
    # Neighbours differ far more than rounding does: a swapped row cannot pass.
    assert cosines(in_place[1:], in_place[:-1]).max() < 0.999
    shuffled = encoder.encode([TEXTS[place] for place in order]).vectors
    np.testing.assert_allclose(shuffled, in_place[list(order)], atol=1e-4)


def test_no_text_makes_no_row(bert: PreTrainedModel) -> None:
    encoded = tiny_encoder("bert", bert).encode([])
    assert len(encoded.vectors) == encoded.tokens == encoded.padded_tokens == 0


@pytest.mark.parametrize("token_budget", [1, 10, 3 * MAX_TOKENS])
def test_a_model_that_runs_packed_texts_computes_nothing_for_padding(bert: PreTrainedModel, token_budget: int) -> None:
    encoder = tiny_encoder("bert", bert, token_budget=token_budget)
    assert encoder.packed
    encoded = encoder.encode(["seven", "seven river moon", LONG])
    assert encoded.tokens == encoded.padded_tokens == 3 + 5 + MAX_TOKENS
    assert encoded.model_seconds > 0


def test_a_model_that_cannot_is_given_padded_texts_and_says_what_they_cost() -> None:
    model = whole_model("mamba")
    texts = [TEXTS[0], " ".join(TEXTS[:3]), " ".join(TEXTS)]
    lengths = [min(MAX_TOKENS, len(tiny_tokenizer("mamba").encode(text).ids)) for text in texts]
    assert lengths[0] < lengths[1] <= lengths[2] == MAX_TOKENS
    budgets = {1: sum(lengths), 3 * MAX_TOKENS: 3 * MAX_TOKENS}
    for token_budget, padded in budgets.items():
        encoder = tiny_encoder("mamba", model, token_budget=token_budget)
        assert not encoder.packed
        encoded = encoder.encode(texts)
        assert (encoded.tokens, encoded.padded_tokens) == (sum(lengths), padded)


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=60), budget=st.integers(1, 2000))
def test_a_packed_batch_takes_as_many_texts_as_stay_within_the_budget(lengths: list[int], budget: int) -> None:
    lengths = sorted(lengths, reverse=True)
    taken = next_batch(np.array(lengths, dtype=np.int64), budget, packed=True)
    assert 1 <= taken <= len(lengths)
    assert taken == 1 or sum(lengths[:taken]) <= budget
    # More texts than tokens are never added up.
    assert taken in (len(lengths), budget + 1) or sum(lengths[: taken + 1]) > budget


class Blocked(nn.Module):
    """A head that fails as told on what its batch holds."""

    def __init__(self, fail: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.fail = fail

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.fail(hidden)
        return hidden


def with_head(encoder: Encoder, fail: Callable[[torch.Tensor], None]) -> Encoder:
    encoder._head = Blocked(fail)
    return encoder


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("room", [1, 2, 7])
def test_out_of_memory_halves_the_batches_and_goes_on(
    bert: PreTrainedModel, error: type[Exception], room: int, caplog: pytest.LogCaptureFixture
) -> None:
    def full(hidden: torch.Tensor) -> None:
        if len(hidden) > room:
            raise error(f"no room for {len(hidden)} texts")

    encoder = tiny_encoder("bert", bert, token_budget=5000)
    expected = encoder.encode(TEXTS).vectors
    found = with_head(encoder, full).encode(TEXTS)
    assert cosines(found.vectors, expected).min() >= 0.9999
    assert found.failed == {}
    assert "is out of memory: batches of" in caplog.text
    said = len(caplog.records)
    encoder.encode(TEXTS[:room])
    assert len(caplog.records) == said, "the smaller budget is remembered"
    shortest = min(len(tiny_tokenizer("bert").encode(text).ids) for text in TEXTS)
    assert (room + 1) * shortest // 2 <= encoder._token_budget < 5000, "and no smaller than it must be"


def test_a_device_without_room_for_a_single_text_fails_the_task_and_quarantines_nothing(bert: PreTrainedModel) -> None:
    def full(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("no room at all")

    with pytest.raises(OutOfMemory, match="for a single text"):
        list(with_head(tiny_encoder("bert", bert), full).stream([("all", TEXTS)]))


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
@examples(4, of=12)
@given(poisoned=st.sets(st.integers(0, 11), max_size=5), token_budget=st.sampled_from([1, 100, 5000]))
def test_a_text_that_fails_alone_is_told_of_and_its_neighbours_are_encoded(
    architecture: str, poisoned: set[int], token_budget: int
) -> None:
    model = whole_model(architecture)
    encoder = tiny_encoder(architecture, model, token_budget=token_budget)
    texts = TEXTS[:12]
    clean = encoder.encode(texts).vectors

    def poison(hidden: torch.Tensor) -> None:
        for row in poisoned:
            if np.isclose(hidden.numpy(), clean[row], atol=1e-4).all(axis=1).any():
                raise RuntimeError("this text is poison\nand more")

    ((_, encoded),) = with_head(encoder, poison).stream([(None, texts)])
    assert encoded.failed == dict.fromkeys(poisoned, "RuntimeError: this text is poison")
    good = sorted(set(range(12)) - poisoned)
    np.testing.assert_allclose(encoded.vectors[good], clean[good], atol=1e-4)
    assert not encoded.vectors[sorted(poisoned)].any()
    if poisoned:
        with pytest.raises(Unencodable, match=f"text {min(poisoned)} cannot be encoded"):
            encoder.encode(texts)


def test_a_vector_that_is_no_number_is_told_of_and_its_neighbours_are_kept(bert: PreTrainedModel) -> None:
    encoder = tiny_encoder("bert", bert)
    clean = encoder.encode(TEXTS[:3]).vectors

    def spoil(hidden: torch.Tensor) -> None:
        hidden[torch.isclose(hidden, torch.from_numpy(clean[1]), atol=1e-4).all(dim=1)] = math.nan

    ((_, encoded),) = with_head(encoder, spoil).stream([(None, TEXTS[:3])])
    assert encoded.failed == {1: "its vector holds NaN or infinity"}
    np.testing.assert_allclose(encoded.vectors[[0, 2]], clean[[0, 2]], atol=1e-4)


@pytest.mark.parametrize(("count", "after"), [(1, 0), (3, 0), (48, 0), (48, 1), (48, 3)])
def test_where_a_good_text_fails_as_well_it_is_not_the_texts(bert: PreTrainedModel, count: int, after: int) -> None:
    calls = iter(range(1000))

    def breaks(_: torch.Tensor) -> None:
        if next(calls) >= after:
            raise RuntimeError("size mismatch")

    encoder = with_head(tiny_encoder("bert", bert, token_budget=60), breaks)
    with pytest.raises(RuntimeError, match="size mismatch"):
        list(encoder.stream([(None, TEXTS[:count])]))


@pytest.mark.parametrize("count", [1, 48])
def test_a_model_that_gives_no_number_for_any_text_is_broken(bert: PreTrainedModel, count: int) -> None:
    def spoil(hidden: torch.Tensor) -> None:
        hidden[:] = math.nan

    with pytest.raises(Unencodable, match="the model on cpu gives NaN or infinity for any text"):
        list(with_head(tiny_encoder("bert", bert), spoil).stream([(None, TEXTS[:count])]))


def test_many_texts_that_fail_first_do_not_stop_the_others(bert: PreTrainedModel) -> None:
    long = [f"{text} {' '.join(TEXTS)}" for text in TEXTS]
    clean = tiny_encoder("bert", bert).encode(long).vectors

    def too_long(hidden: torch.Tensor) -> None:
        if np.isclose(hidden.numpy()[:, None], clean, atol=1e-4).all(axis=2).any():
            raise IndexError("index out of range in self")

    encoder = tiny_encoder("bert", bert, token_budget=100)
    good = encoder.encode(TEXTS).vectors
    ((_, encoded),) = with_head(encoder, too_long).stream([(None, [*long, *TEXTS])])
    assert set(encoded.failed) == set(range(len(long)))
    np.testing.assert_allclose(encoded.vectors[len(long) :], good, atol=1e-4)


@pytest.mark.parametrize(
    "said",
    ["CUDA error: device-side assert triggered", "CUBLAS_STATUS_EXECUTION_FAILED", "could not create a primitive"],
)
def test_trouble_of_the_device_is_no_texts_fault(bert: PreTrainedModel, said: str) -> None:
    calls = iter(range(1000))

    def once(_: torch.Tensor) -> None:
        if next(calls) == 0:
            raise RuntimeError(said)

    with pytest.raises(RuntimeError, match=said):
        list(with_head(tiny_encoder("bert", bert), once).stream([(None, TEXTS[:1])]))


def test_a_tokenizer_that_fails_on_anything_is_broken(bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[NDArray[np.int32]]:
        raise ValueError("no vocabulary")

    encoder = tiny_encoder("bert", bert)
    monkeypatch.setattr("marc_pipeline.model.encoder.token_ids", broken)
    with pytest.raises(ValueError, match="no vocabulary"):
        list(encoder.stream([(None, TEXTS[:3])]))


def test_out_of_memory_of_a_padded_model_halves_what_was_computed() -> None:
    calls = iter(range(1000))

    def once(_: torch.Tensor) -> None:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("no room")

    texts = [" ".join(TEXTS), *TEXTS[:3]]
    encoder = with_head(tiny_encoder("mamba", whole_model("mamba"), token_budget=5000), once)
    assert encoder.encode(texts).failed == {}
    assert encoder._token_budget == 4 * MAX_TOKENS // 2


@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen3", "mamba"])
def test_every_architecture_runs_in_bfloat16(architecture: str) -> None:
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    encoder = Encoder(
        PooledStates(HiddenStates(whole_model(architecture), whole=True), "mean"),
        tokenizer,
        head=nn.Identity(),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        token_budget=256,
    )
    expected = tiny_encoder(architecture, whole_model(architecture)).encode(TEXTS).vectors
    assert cosines(encoder.encode(TEXTS).vectors, expected).min() >= 0.99


def test_a_text_that_the_tokenizer_fails_on_is_told_of(bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panics(tokenizer: Tokenizer, texts: list[str]) -> list[NDArray[np.int32]]:
        if "poison" in texts:
            raise PanicException("index out of bounds")
        return token_ids(tokenizer, texts)

    encoder = tiny_encoder("bert", bert)
    expected = encoder.encode(TEXTS[:4]).vectors
    monkeypatch.setattr("marc_pipeline.model.encoder.token_ids", panics)
    ((_, encoded),) = encoder.stream([(None, [*TEXTS[:2], "poison", *TEXTS[2:4]])])
    assert encoded.failed == {2: "tokenizer: PanicException: index out of bounds"}
    np.testing.assert_allclose(encoded.vectors[[0, 1, 3, 4]], expected, atol=1e-5)


def test_windows_come_back_in_order_each_with_what_it_came_with(bert: PreTrainedModel) -> None:
    encoder = tiny_encoder("bert", bert)
    windows = [("one", TEXTS[:5]), ("none", []), ("two", TEXTS[5:6])]
    found = list(encoder.stream(iter(windows)))
    assert [window for window, _ in found] == ["one", "none", "two"]
    for (_, texts), (_, encoded) in zip(windows, found, strict=True):
        assert len(encoded.vectors) == len(texts)
    together = np.concatenate([encoded.vectors for _, encoded in found if len(encoded.vectors)])
    np.testing.assert_allclose(together, encoder.encode(TEXTS[:6]).vectors, atol=1e-5)


def test_what_reading_a_window_raises_is_raised_here(bert: PreTrainedModel) -> None:
    def windows() -> Iterator[tuple[None, list[str]]]:
        yield None, TEXTS[:2]
        raise OSError("the disk is gone")

    stream = tiny_encoder("bert", bert).stream(windows())
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


STUCK = """
import sys, time
sys.path.insert(0, {tests!r})
from model.test_encoder import *
encoder = tiny_encoder("bert", whole_model("bert"))
((_, encoded),) = encoder.stream([(None, TEXTS[:3])], stuck_after_s=20)
print(len(encoded.vectors), flush=True)
with_head(encoder, lambda _: time.sleep(60))
list(encoder.stream([(None, TEXTS[:3])], stuck_after_s=0.3))
"""


def test_a_device_that_hangs_ends_the_process_with_a_trace() -> None:
    script = STUCK.format(tests=str(Path(__file__).parents[1] / "fixtures"))
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "Timeout" in done.stderr
    assert "_forward" in done.stderr
    # What came before was in time.
    assert done.stdout == "3\n"
    assert time.monotonic() - started < 60


lengths_longest_first = st.lists(st.integers(0, 300), max_size=60).map(lambda found: sorted(found, reverse=True))


@settings(max_examples=300)
@given(lengths=lengths_longest_first, budget=st.integers(1, 2000))
def test_token_batches_cover_every_row_once_in_order_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(token_batches(np.array(lengths, dtype=np.int64), budget))
    rows = [row for batch in batches for row in range(batch.start, batch.stop)]
    assert rows == list(range(len(lengths)))
    for batch in batches:
        size = batch.stop - batch.start
        assert size >= 1
        assert size == 1 or size * max(lengths[batch]) <= budget
        # Nothing is wasted: with one more row the batch would not fit.
        assert batch.stop == len(lengths) or (size + 1) * max(1, *lengths[batch]) > budget


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train_tiny_bundle(tmp_path_factory.mktemp("encoder"))


def loaded(bundle: Bundle, encode: EncodeSettings = CPU_FLOAT32) -> Encoder:
    return load_encoder(Storage(), bundle.uri, bundle.version, encode, ONE_CORE)


def altered(bundle: Bundle, folder: Path, **change: object) -> Bundle:
    """A sound bundle with the same weights and another card."""

    def write(target: Path) -> BundleCard:
        for name in bundle.card.files:
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes((Path(bundle.uri) / name).read_bytes())
        return bundle.card.model_copy(update=change)

    return save_bundle(Storage(), str(folder), write)


def test_vectors_of_a_normalised_bundle_have_unit_length(bundle: Bundle, tmp_path: Path) -> None:
    unit = loaded(bundle).encode(TEXTS).vectors
    assert unit.shape == (len(TEXTS), bundle.card.dim)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-5)
    plain = loaded(altered(bundle, tmp_path, normalised=False)).encode(TEXTS).vectors
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-5)
    # Whitened training texts: mean 0, variance 1 in every component.
    np.testing.assert_allclose(plain.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(plain.var(axis=0, ddof=1), 1, atol=1e-3)


def test_the_card_alone_decides_pooling_and_truncation(bundle: Bundle, tmp_path: Path) -> None:
    mean = loaded(bundle).encode(TEXTS[:4]).vectors
    by_cls = loaded(altered(bundle, tmp_path, pooling="cls")).encode(TEXTS[:4]).vectors
    assert cosines(mean, by_cls).max() < 0.99
    short = loaded(altered(bundle, tmp_path, max_tokens=5)).encode([LONG])
    assert short.tokens == 5


def test_an_encoder_is_loaded_once_per_process(bundle: Bundle) -> None:
    assert loaded(bundle) is loaded(bundle)


def test_a_damaged_bundle_is_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    damaged = altered(bundle, tmp_path)
    weights = Path(damaged.uri) / "backbone" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptFile, match=r"model\.safetensors does not match its SHA-256"):
        loaded(damaged)


def test_a_bundle_of_an_unknown_compressor_is_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    unknown = altered(bundle, tmp_path, compressor=bundle.card.compressor.model_copy(update={"kind": "hologram"}))
    with pytest.raises(UserError, match="'hologram' is not known here"):
        loaded(unknown)


def test_a_folder_of_bundles_loads_the_current_one(tmp_path: Path) -> None:
    bundle = train_tiny_bundle(tmp_path)
    current = load_encoder(Storage(), str(tmp_path / "bundles"), bundle.version, CPU_FLOAT32, ONE_CORE)
    assert np.array_equal(current.encode(TEXTS[:3]).vectors, loaded(bundle).encode(TEXTS[:3]).vectors)


@pytest.mark.parametrize(
    ("cuda", "wanted", "gpu", "device"),
    [
        (True, "auto", None, "cpu"),
        (True, "auto", "3", "cuda:3"),
        (True, "cuda", None, "cuda:0"),
        (True, "cuda", "2", "cuda:2"),
        (True, "cpu", "1", "cpu"),
        (False, "auto", "0", "cpu"),
        (False, "cpu", None, "cpu"),
    ],
)
def test_the_device_is_the_one_that_was_assigned_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, wanted: str, gpu: str | None, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    encode = EncodeSettings.model_validate({"device": wanted})
    assert choose_device(encode, TaskResources(gpu=gpu)) == torch.device(device)


def test_asking_for_cuda_where_there_is_none_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"encode\.device"):
        choose_device(EncodeSettings(device="cuda"), TaskResources())


@pytest.mark.parametrize(
    ("capabilities", "onednn", "dtype"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, True, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False}, True, torch.float32),
        ({"avx512_bf16": True, "amx_bf16": True}, False, torch.float32),
        ({}, False, torch.float32),
    ],
)
def test_the_cpu_runs_bfloat16_only_where_it_multiplies_it_natively(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], onednn: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert choose_dtype(EncodeSettings(), torch.device("cpu")) == dtype
    assert choose_dtype(EncodeSettings(dtype="float32"), torch.device("cpu")) == torch.float32
    assert choose_dtype(EncodeSettings(dtype="bfloat16"), torch.device("cpu")) == torch.bfloat16


# The embedded default backbone.

TITLES = [
    *random.Random(0).sample(TEXTS, 14),  # noqa: S311 - no secret
    "",
    "🎬 Amélie",
    "映画",
    "short",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "A very long synopsis about nothing in particular. " * 60,
]


def minilm(encode: EncodeSettings, resources: TaskResources = TaskResources(cpus=2)) -> Encoder:  # noqa: B008
    name = TrainSettings().backbone
    tokenizer = load_tokenizer(name).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=256)
    device = choose_device(encode, resources)
    return Encoder(
        PooledStates(HiddenStates(load_backbone(name, dtype=choose_dtype(encode, device)), whole=True), "mean"),
        tokenizer,
        head=nn.Identity(),
        device=device,
        dtype=choose_dtype(encode, device),
        token_budget=1024,
    )


@pytest.fixture(scope="module")
def minilm_float32() -> NDArray[np.float32]:
    vectors: NDArray[np.float32] = minilm(CPU_FLOAT32).encode(TITLES).vectors
    return vectors


def test_the_default_backbone_gives_the_vectors_of_sentence_transformers(minilm_float32: NDArray[np.float32]) -> None:
    reference = pytest.importorskip("sentence_transformers", reason="the second implementation of all-MiniLM-L6-v2")
    model = reference.SentenceTransformer(locate(TrainSettings().backbone), device="cpu")
    expected = model.encode(TITLES, batch_size=4, convert_to_numpy=True, show_progress_bar=False)
    assert len(TITLES) == 20
    assert minilm_float32.shape == expected.shape == (20, 384)
    assert cosines(minilm_float32, expected).min() >= 0.9999


def test_bfloat16_on_the_cpu_agrees_with_float32(minilm_float32: NDArray[np.float32]) -> None:
    if choose_dtype(EncodeSettings(device="cpu"), torch.device("cpu")) != torch.bfloat16:
        pytest.skip("this CPU does not multiply bfloat16 natively")
    encoder = minilm(EncodeSettings(device="cpu"))
    assert next(encoder._pooled.parameters()).dtype == torch.bfloat16
    found = encoder.encode(TITLES).vectors
    assert found.dtype == np.float32
    assert not np.array_equal(found, minilm_float32)
    assert cosines(found, minilm_float32).min() >= 0.999


def test_no_weights_are_packed_for_a_cpu_that_does_not_multiply_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, minilm_float32: NDArray[np.float32]
) -> None:
    """As on a CPU with AVX2 alone: the encoder gives the same vectors and logs that float32 is faster."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    encoder = minilm(EncodeSettings(device="cpu", dtype="bfloat16"))
    assert not [module for module in encoder._pooled.modules() if isinstance(module, PrepackedLinear)]
    assert [record.levelname for record in caplog.records if "encode.dtype float32" in record.message] == ["WARNING"]
    assert cosines(encoder.encode(TITLES).vectors, minilm_float32).min() >= 0.999


def test_in_bfloat16_too_a_vector_hardly_depends_on_the_texts_around_it() -> None:
    encoder = minilm(EncodeSettings(device="cpu", dtype="bfloat16"))
    texts = [*TITLES, *(f"{title}. And once more: {title}" for title in TEXTS), *TITLES * 4]
    together = encoder.encode(texts).vectors
    alone = np.concatenate([encoder.encode([text]).vectors for text in texts[: len(TITLES) + len(TEXTS)]])
    assert cosines(together[: len(alone)], alone).min() >= 0.9999
    assert cosines(together[-len(TITLES) :], alone[: len(TITLES)]).min() >= 0.9999


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_agrees_with_float32_on_the_cpu(minilm_float32: NDArray[np.float32]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    encoder = minilm(EncodeSettings(device="auto"), TaskResources(gpu="0"))
    assert (encoder.device, encoder.dtype) == (torch.device("cuda:0"), torch.bfloat16)
    assert cosines(encoder.encode(TITLES).vectors, minilm_float32).min() >= 0.999


@pytest.mark.gpu
def test_a_bundle_on_a_gpu_gives_unit_vectors_in_order(bundle: Bundle) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = loaded(bundle).encode(TEXTS).vectors
    settings_on_gpu = EncodeSettings(device="cuda", dtype="float32", token_budget=256)
    found = load_encoder(Storage(), bundle.uri, bundle.version, settings_on_gpu, TaskResources(gpu="0"))
    assert cosines(found.encode(TEXTS).vectors, expected).min() >= 0.999


@pytest.mark.gpu
def test_a_gpu_without_room_for_a_batch_gets_smaller_ones(caplog: pytest.LogCaptureFixture) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    resources = TaskResources(gpu="0")
    texts = TITLES * 3000
    expected = minilm(EncodeSettings(device="cuda"), resources).encode(texts).vectors
    encoder = minilm(EncodeSettings(device="cuda"), resources)
    encoder._token_budget = 1 << 24
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + (512 << 20)) / total)
    try:
        found = encoder.encode(texts)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "is out of memory: batches of" in caplog.text
    assert cosines(found.vectors, expected).min() >= 0.9999

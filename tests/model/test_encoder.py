"""The encoder: a vector depends on its own text only, keeps the text's row, and equals a second library's."""

import itertools
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given
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
from marc_pipeline.model.device import OutOfMemory, choose_device, choose_dtype
from marc_pipeline.model.encoded import Encoded
from marc_pipeline.model.encoder import Encoder, load_encoder
from marc_pipeline.model.onednn import PrepackedLinear
from marc_pipeline.model.tokens import TextTokens, text_tokens
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_schemas.bundle import BundleCard, LongTexts, Pooling
from published import flip
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
    LONG, "🎬", "🎬🍿👩‍👩‍👧" * 30, " ", ".", "\n\t", "[PAD]", "[PAD] [SEP] [CLS]", "naïve Amélie ＡＢＣ", "映画と音楽",
    "x" * 3000,
]  # fmt: skip
SETUPS: list[tuple[str, Pooling]] = [("bert", "mean"), ("bert", "cls"), ("llama", "last"), ("qwen3", "mean")]
SETUPS += [("mamba", "last"), ("mamba", "mean")]
Fail = Callable[[torch.Tensor], None]
Vectors = NDArray[np.float32]
ON_GPU = TaskResources(gpu="0")


def whole_model(architecture: str) -> PreTrainedModel:
    return tiny_model(architecture, vocabulary=tiny_tokenizer(architecture).get_vocab_size())


def encoder_of(
    architecture: str,
    model: PreTrainedModel | None = None,
    *,
    pooling: Pooling = "mean",
    token_budget: int = 256,
    dtype: torch.dtype = torch.float32,
    fail: Fail | None = None,
) -> Encoder:
    """An encoder of a whole tiny model, without a compressor; ``fail`` may raise an error or change the states."""
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    states = HiddenStates(model or whole_model(architecture), whole=True)
    encoder = Encoder(
        PooledStates(states, pooling),
        tokenizer,
        head=nn.Identity(),
        device=torch.device("cpu"),
        dtype=dtype,
        token_budget=token_budget,
    )
    return encoder if fail is None else with_head(encoder, fail)


class FailingHead(nn.Module):
    """A head that calls ``fail`` with the pooled states of its batch."""

    def __init__(self, fail: Fail) -> None:
        super().__init__()
        self.fail = fail

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.fail(hidden)
        return hidden


def with_head(encoder: Encoder, fail: Fail) -> Encoder:
    encoder._head = FailingHead(fail)
    return encoder


def raising(error: Exception, *, calls: range = range(10**9)) -> Fail:
    """Raise an error in the calls with these numbers."""
    numbers = itertools.count()

    def fail(_: torch.Tensor) -> None:
        if next(numbers) in calls:
            raise error

    return fail


def streamed(encoder: Encoder, texts: list[str]) -> Encoded:
    ((_, encoded),) = encoder.stream([(None, texts)])
    return encoded


def is_one_of(hidden: torch.Tensor, vectors: Vectors) -> torch.Tensor:
    """Which rows of a batch [b, D] are among these vectors [n, D]."""
    return torch.isclose(hidden[:, None], torch.from_numpy(vectors), atol=1e-4).all(dim=2).any(dim=1)


def alone(architecture: str, model: PreTrainedModel, pooling: Pooling, text: str) -> Vectors:
    """The vector of one text by the model itself: without batch, padding or mask, and pooled by numpy."""
    ids = tiny_tokenizer(architecture).encode(text).ids
    if len(ids) > MAX_TOKENS:
        # [SEP] stays the last token of a truncated text; decoders do not have it.
        ids = [*ids[: MAX_TOKENS - 1], ids[-1]] if architecture == "bert" else ids[:MAX_TOKENS]
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
    vector: Vectors = {"mean": states.mean(axis=0), "last": states[-1], "cls": states[0]}[pooling]
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
def test_a_vector_does_not_depend_on_other_texts_or_padding(
    setup: tuple[str, PreTrainedModel, Pooling], texts: list[str], token_budget: int
) -> None:
    architecture, model, pooling = setup
    together = encoder_of(architecture, model, pooling=pooling, token_budget=token_budget).encode(texts).vectors
    one_by_one = np.stack([alone(architecture, model, pooling, text) for text in texts])
    assert (together.shape, together.dtype) == ((len(texts), WIDTH), np.float32)
    assert cosines(together, one_by_one).min() >= 0.9999


def test_texts_without_tokens_get_finite_vectors_and_do_not_change_other_vectors() -> None:
    encoder = encoder_of("llama")
    assert encoder._tokenizer.encode("").ids == []
    assert np.isfinite(encoder.encode([""]).vectors).all()
    together = encoder.encode(["", TEXTS[0], "", TEXTS[1]]).vectors
    assert np.isfinite(together).all()
    assert cosines(together[[1, 3]], encoder.encode(TEXTS[:2]).vectors).min() >= 0.9999


@examples(4, of=15)
@given(order=st.permutations(range(20)), token_budget=st.sampled_from([1, 100, 700]))
def test_rows_have_the_order_of_the_texts(bert: PreTrainedModel, order: list[int], token_budget: int) -> None:
    encoder = encoder_of("bert", bert, token_budget=token_budget)
    in_place = encoder.encode(TEXTS[:20]).vectors
    # Neighbouring rows differ by far more than rounding, so that swapped rows fail the test.
    assert cosines(in_place[1:], in_place[:-1]).max() < 0.999
    shuffled = encoder.encode([TEXTS[place] for place in order]).vectors
    np.testing.assert_allclose(shuffled, in_place[list(order)], atol=1e-4)


def test_an_empty_list_gives_no_rows(bert: PreTrainedModel) -> None:
    encoded = encoder_of("bert", bert).encode([])
    assert len(encoded.vectors) == encoded.tokens == encoded.padded_tokens == 0


@pytest.mark.parametrize("token_budget", [1, 10, 3 * MAX_TOKENS])
def test_a_packed_model_computes_no_padding(bert: PreTrainedModel, token_budget: int) -> None:
    encoder = encoder_of("bert", bert, token_budget=token_budget)
    assert encoder.packed
    encoded = encoder.encode(["seven", "seven river moon", LONG])
    assert encoded.tokens == encoded.padded_tokens == 3 + 5 + MAX_TOKENS
    assert encoded.model_seconds > 0


@pytest.mark.parametrize(("token_budget", "batches"), [(1, [[0], [1], [2]]), (3 * MAX_TOKENS, [[0, 1, 2]])])
def test_a_padded_model_reports_tokens_with_and_without_padding(token_budget: int, batches: list[list[int]]) -> None:
    texts = [TEXTS[0], " ".join(TEXTS[:3]), " ".join(TEXTS)]
    lengths = [min(MAX_TOKENS, len(tiny_tokenizer("mamba").encode(text).ids)) for text in texts]
    assert lengths[0] < lengths[1] <= lengths[2] == MAX_TOKENS
    encoder = encoder_of("mamba", token_budget=token_budget)
    assert not encoder.packed
    encoded = encoder.encode(texts)
    padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in batches)
    assert (encoded.tokens, encoded.padded_tokens) == (sum(lengths), padded)


@pytest.mark.parametrize("architecture", ["bert", "llama", "qwen3", "mamba"])
def test_every_architecture_runs_in_bfloat16(architecture: str) -> None:
    expected = encoder_of(architecture).encode(TEXTS).vectors
    found = encoder_of(architecture, dtype=torch.bfloat16).encode(TEXTS).vectors
    assert cosines(found, expected).min() >= 0.99


# Failures


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("room", [1, 2, 7])
def test_out_of_memory_halves_the_batches_and_continues(
    bert: PreTrainedModel, error: type[Exception], room: int, caplog: pytest.LogCaptureFixture
) -> None:
    def full(hidden: torch.Tensor) -> None:
        if len(hidden) > room:
            raise error(f"no room for {len(hidden)} texts")

    encoder = encoder_of("bert", bert, token_budget=5000)
    expected = encoder.encode(TEXTS).vectors
    found = with_head(encoder, full).encode(TEXTS)
    assert cosines(found.vectors, expected).min() >= 0.9999
    assert found.failed == {}
    assert "is out of memory: batches of" in caplog.text
    messages = len(caplog.records)
    encoder.encode(TEXTS[:room])
    assert len(caplog.records) == messages, "the encoder keeps the smaller budget"
    shortest = min(len(tiny_tokenizer("bert").encode(text).ids) for text in TEXTS)
    assert (room + 1) * shortest // 2 <= encoder._token_budget < 5000, "the budget is not smaller than necessary"


def test_out_of_memory_of_a_padded_model_halves_the_computed_tokens() -> None:
    full_once = raising(torch.OutOfMemoryError("no room"), calls=range(1))
    encoder = encoder_of("mamba", token_budget=5000, fail=full_once)
    assert encoder.encode([" ".join(TEXTS), *TEXTS[:3]]).failed == {}
    assert encoder._token_budget == 4 * MAX_TOKENS // 2


@pytest.mark.parametrize("architecture", ["bert", "mamba"])
@examples(4, of=12)
@given(poisoned=st.sets(st.integers(0, 11), max_size=5), token_budget=st.sampled_from([1, 100, 5000]))
def test_a_text_that_fails_alone_is_reported_and_the_others_are_encoded(
    architecture: str, poisoned: set[int], token_budget: int
) -> None:
    encoder = encoder_of(architecture, token_budget=token_budget)
    texts = TEXTS[:12]
    clean = encoder.encode(texts).vectors

    def poison(hidden: torch.Tensor) -> None:
        if is_one_of(hidden, clean[sorted(poisoned)]).any():
            raise RuntimeError("this text is poison\nand more")

    encoded = streamed(with_head(encoder, poison), texts)
    assert encoded.failed == dict.fromkeys(poisoned, "RuntimeError: this text is poison")
    good = sorted(set(range(12)) - poisoned)
    np.testing.assert_allclose(encoded.vectors[good], clean[good], atol=1e-4)
    assert not encoded.vectors[sorted(poisoned)].any()
    if poisoned:
        with pytest.raises(Unencodable, match=f"text {min(poisoned)} cannot be encoded"):
            encoder.encode(texts)


def test_a_vector_that_is_not_finite_is_reported_and_the_others_are_kept(bert: PreTrainedModel) -> None:
    encoder = encoder_of("bert", bert)
    clean = encoder.encode(TEXTS[:3]).vectors

    def spoil(hidden: torch.Tensor) -> None:
        hidden[is_one_of(hidden, clean[1:2])] = math.nan

    encoded = streamed(with_head(encoder, spoil), TEXTS[:3])
    assert encoded.failed == {1: "its vector contains NaN or infinity"}
    np.testing.assert_allclose(encoded.vectors[[0, 2]], clean[[0, 2]], atol=1e-4)


def test_many_failing_texts_before_the_others_do_not_stop_them(bert: PreTrainedModel) -> None:
    long = [f"{text} {' '.join(TEXTS)}" for text in TEXTS]
    clean = encoder_of("bert", bert).encode(long).vectors

    def too_long(hidden: torch.Tensor) -> None:
        if is_one_of(hidden, clean).any():
            raise IndexError("index out of range in self")

    encoder = encoder_of("bert", bert, token_budget=100)
    good = encoder.encode(TEXTS).vectors
    encoded = streamed(with_head(encoder, too_long), [*long, *TEXTS])
    assert set(encoded.failed) == set(range(len(long)))
    np.testing.assert_allclose(encoded.vectors[len(long) :], good, atol=1e-4)


def all_nan(hidden: torch.Tensor) -> None:
    hidden[:] = math.nan


def always(error: Exception, *, after: int = 0) -> Callable[[], Fail]:
    return lambda: raising(error, calls=range(after, 10**9))


def once(message: str) -> Callable[[], Fail]:
    return lambda: raising(RuntimeError(message), calls=range(1))


@pytest.mark.parametrize(
    ("fail", "counts", "error", "message"),
    [
        (always(torch.OutOfMemoryError("no room")), [48], OutOfMemory, "for a single text"),
        # The error also occurs for a known good text.
        (always(RuntimeError("size mismatch")), [1, 3, 48], RuntimeError, "size mismatch"),
        (always(RuntimeError("size mismatch"), after=1), [48], RuntimeError, "size mismatch"),
        (always(RuntimeError("size mismatch"), after=3), [48], RuntimeError, "size mismatch"),
        (lambda: all_nan, [1, 48], Unencodable, "the model on cpu returns NaN or infinity even for a known good text"),
        # An error of the device fails the task even if it occurs once.
        (once("CUDA error: device-side assert triggered"), [1], RuntimeError, "CUDA error: device-side assert"),
        (once("CUBLAS_STATUS_EXECUTION_FAILED"), [1], RuntimeError, "CUBLAS_STATUS_EXECUTION_FAILED"),
        (once("could not create a primitive"), [1], RuntimeError, "could not create a primitive"),
    ],
)
def test_an_error_of_model_or_device_fails_the_task_and_no_text(
    bert: PreTrainedModel, fail: Callable[[], Fail], counts: list[int], error: type[Exception], message: str
) -> None:
    for count in counts:
        with pytest.raises(error, match=message):
            streamed(encoder_of("bert", bert, token_budget=60, fail=fail()), TEXTS[:count])


class PanicException(BaseException):
    """A panic in Rust, as the tokenizer raises it."""


def test_a_text_that_the_tokenizer_fails_on_is_reported_unless_it_fails_on_any_text(
    bert: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panics(tokenizer: Tokenizer, texts: list[str], long_texts: LongTexts = "cut") -> list[TextTokens]:
        if "poison" in texts:
            raise PanicException("index out of bounds")
        return text_tokens(tokenizer, texts, long_texts)

    def broken(*_: object) -> list[TextTokens]:
        raise ValueError("no vocabulary")

    encoder = encoder_of("bert", bert)
    expected = encoder.encode(TEXTS[:4]).vectors
    monkeypatch.setattr("marc_pipeline.model.tokens.text_tokens", panics)
    encoded = streamed(encoder, [*TEXTS[:2], "poison", *TEXTS[2:4]])
    assert encoded.failed == {2: "tokenizer: PanicException: index out of bounds"}
    np.testing.assert_allclose(encoded.vectors[[0, 1, 3, 4]], expected, atol=1e-5)
    monkeypatch.setattr("marc_pipeline.model.tokens.text_tokens", broken)
    with pytest.raises(ValueError, match="no vocabulary"):
        streamed(encoder, TEXTS[:3])


# Windows


def test_windows_come_in_order_with_their_objects(bert: PreTrainedModel) -> None:
    encoder = encoder_of("bert", bert)
    windows = [("one", TEXTS[:5]), ("none", []), ("two", TEXTS[5:6])]
    found = list(encoder.stream(iter(windows)))
    assert [(window, len(encoded.vectors)) for window, encoded in found] == [("one", 5), ("none", 0), ("two", 1)]
    together = np.concatenate([encoded.vectors for _, encoded in found if len(encoded.vectors)])
    np.testing.assert_allclose(together, encoder.encode(TEXTS[:6]).vectors, atol=1e-5)


def test_an_error_while_a_window_is_read_is_raised_to_the_caller(bert: PreTrainedModel) -> None:
    def windows() -> Iterator[tuple[None, list[str]]]:
        yield None, TEXTS[:2]
        raise OSError("the disk is gone")

    stream = encoder_of("bert", bert).stream(windows())
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)


STUCK = """
import sys, time
sys.path.insert(0, {tests!r})
from test_encoder import *
encoder = encoder_of("bert")
((_, encoded),) = encoder.stream([(None, TEXTS[:3])], stuck_after_s=20)
print(len(encoded.vectors), flush=True)
with_head(encoder, lambda _: time.sleep(60))
list(encoder.stream([(None, TEXTS[:3])], stuck_after_s=0.3))
"""


def test_a_device_that_hangs_ends_the_process_with_a_trace() -> None:
    started = time.monotonic()
    command = [sys.executable, "-c", STUCK.format(tests=str(Path(__file__).parent))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 1, done.stderr
    assert "Timeout" in done.stderr
    assert "_forward" in done.stderr
    assert done.stdout == "3\n", "the batch before was in time"
    assert time.monotonic() - started < 60


# Bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return train_tiny_bundle(tmp_path_factory.mktemp("encoder"))


def loaded(bundle: Bundle, encode: EncodeSettings = CPU_FLOAT32, resources: TaskResources = ONE_CORE) -> Encoder:
    return load_encoder(Storage(), bundle.uri, bundle.version, encode, resources)


def altered(bundle: Bundle, folder: Path, **change: object) -> Bundle:
    """A valid bundle with the same weights and another card."""

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


def test_the_card_determines_pooling_and_truncation(bundle: Bundle, tmp_path: Path) -> None:
    mean = loaded(bundle).encode(TEXTS[:4]).vectors
    by_cls = loaded(altered(bundle, tmp_path, pooling="cls")).encode(TEXTS[:4]).vectors
    assert cosines(mean, by_cls).max() < 0.99
    assert loaded(altered(bundle, tmp_path, max_tokens=5)).encode([LONG]).tokens == 5


def test_an_encoder_is_loaded_once_per_process_also_through_the_pointer(bundle: Bundle) -> None:
    assert loaded(bundle) is loaded(bundle)
    bundles = str(Path(bundle.uri).parent)
    current = load_encoder(Storage(), bundles, bundle.version, CPU_FLOAT32, ONE_CORE)
    assert np.array_equal(current.encode(TEXTS[:3]).vectors, loaded(bundle).encode(TEXTS[:3]).vectors)


def test_a_damaged_bundle_and_one_of_an_unknown_compressor_are_not_loaded(bundle: Bundle, tmp_path: Path) -> None:
    unknown = altered(bundle, tmp_path, compressor=bundle.card.compressor.model_copy(update={"kind": "hologram"}))
    with pytest.raises(UserError, match="'hologram' is not supported"):
        loaded(unknown)
    damaged = altered(bundle, tmp_path)
    flip(Path(damaged.uri) / "backbone" / "model.safetensors", 200)
    with pytest.raises(CorruptFile, match=r"model\.safetensors does not match its SHA-256"):
        loaded(damaged)


# The embedded default backbone

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
    dtype = choose_dtype(encode, device)
    return Encoder(
        PooledStates(HiddenStates(load_backbone(name, dtype=dtype), whole=True), "mean"),
        tokenizer,
        head=nn.Identity(),
        device=device,
        dtype=dtype,
        token_budget=1024,
    )


@pytest.fixture(scope="module")
def minilm_float32() -> Vectors:
    vectors: Vectors = minilm(CPU_FLOAT32).encode(TITLES).vectors
    return vectors


def test_the_default_backbone_gives_the_vectors_of_sentence_transformers(minilm_float32: Vectors) -> None:
    reference = pytest.importorskip("sentence_transformers", reason="the second implementation of all-MiniLM-L6-v2")
    model = reference.SentenceTransformer(locate(TrainSettings().backbone), device="cpu")
    expected = model.encode(TITLES, batch_size=4, convert_to_numpy=True, show_progress_bar=False)
    assert minilm_float32.shape == expected.shape == (20, 384)
    assert cosines(minilm_float32, expected).min() >= 0.9999


def test_bfloat16_on_the_cpu_agrees_with_float32(minilm_float32: Vectors) -> None:
    if choose_dtype(EncodeSettings(device="cpu"), torch.device("cpu")) != torch.bfloat16:
        pytest.skip("this CPU does not multiply bfloat16 natively")
    encoder = minilm(EncodeSettings(device="cpu"))
    assert next(encoder._pooled.parameters()).dtype == torch.bfloat16
    found = encoder.encode(TITLES).vectors
    assert found.dtype == np.float32
    assert not np.array_equal(found, minilm_float32)
    assert cosines(found, minilm_float32).min() >= 0.999


def test_no_weights_are_packed_for_a_cpu_that_does_not_multiply_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, minilm_float32: Vectors
) -> None:
    """As on a CPU with AVX2 alone: the encoder gives the same vectors and logs that float32 is faster."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    encoder = minilm(EncodeSettings(device="cpu", dtype="bfloat16"))
    assert not [module for module in encoder._pooled.modules() if isinstance(module, PrepackedLinear)]
    assert [record.levelname for record in caplog.records if "encode.dtype float32" in record.message] == ["WARNING"]
    assert cosines(encoder.encode(TITLES).vectors, minilm_float32).min() >= 0.999


def test_in_bfloat16_a_vector_hardly_depends_on_the_other_texts() -> None:
    encoder = minilm(EncodeSettings(device="cpu", dtype="bfloat16"))
    texts = [*TITLES, *(f"{title}. And once more: {title}" for title in TEXTS), *TITLES * 4]
    together = encoder.encode(texts).vectors
    alone = np.concatenate([encoder.encode([text]).vectors for text in texts[: len(TITLES) + len(TEXTS)]])
    assert cosines(together[: len(alone)], alone).min() >= 0.9999
    assert cosines(together[-len(TITLES) :], alone[: len(TITLES)]).min() >= 0.9999


# On a GPU


@pytest.fixture
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_bfloat16_on_a_gpu_agrees_with_float32_on_the_cpu(minilm_float32: Vectors) -> None:
    encoder = minilm(EncodeSettings(device="auto"), ON_GPU)
    assert (encoder.device, encoder.dtype) == (torch.device("cuda:0"), torch.bfloat16)
    assert cosines(encoder.encode(TITLES).vectors, minilm_float32).min() >= 0.999


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_bundle_on_a_gpu_gives_unit_vectors_in_order(bundle: Bundle) -> None:
    expected = loaded(bundle).encode(TEXTS).vectors
    found = loaded(bundle, EncodeSettings(device="cuda", dtype="float32", token_budget=256), ON_GPU)
    assert cosines(found.encode(TEXTS).vectors, expected).min() >= 0.999


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_gpu_without_memory_for_a_batch_gets_smaller_batches(caplog: pytest.LogCaptureFixture) -> None:
    texts = TITLES * 3000
    expected = minilm(EncodeSettings(device="cuda"), ON_GPU).encode(texts).vectors
    encoder = minilm(EncodeSettings(device="cuda"), ON_GPU)
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

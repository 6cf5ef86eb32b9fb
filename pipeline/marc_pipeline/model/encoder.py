"""The encoder: texts in, vectors out, with tokenising beside the model's work and no padding where the model allows."""

import faulthandler
import gc
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import Unencodable, UserError
from marc_pipeline.model.backbone import HiddenStates, PooledLayers, PooledStates, load_backbone
from marc_pipeline.model.batches import PackedTokens, PaddedTokens, TokenBatch
from marc_pipeline.model.budget import CPU_TOKENS, budget_of
from marc_pipeline.model.bundle import local_bundle
from marc_pipeline.model.compressor import load_compressor
from marc_pipeline.model.onednn import can_prepack, multiplies_bfloat16, prepack
from marc_pipeline.model.packed import use_packed
from marc_pipeline.model.tokens import load_tokenizer, token_ids
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage

# Enough that sorting by length leaves many neighbours of one length, little enough to wait for and to hold.
WINDOW_TEXTS = 8192
# Sizes that a batch can have, between one power of two and the next.
FILL_STEPS = 64
# How many programs, one for each shape, oneDNN and the layer above it keep; read when the first one is made. At their
# own 1,024 they come to half a gigabyte.
PROGRAM_CACHES, PROGRAMS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 128
# A model that reads the weights of its maps itself gives something else, or nothing, once they are laid out for oneDNN.
LEAST_COSINE = 0.99
GOOD_TEXT = "a plain text of a few words"
# What libraries below torch say of a device, not of a text.
DEVICE_TROUBLE = ("CUDA error", "CUBLAS_", "CUDNN_", "could not create a", "could not execute a")

log = logging.getLogger(__name__)

W = TypeVar("W")


class OutOfMemory(RuntimeError):
    """The device lacks memory for a single text: a matter of the device, not of the text."""


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 [n, d] in the order of the texts, and what they cost.

    Attributes:
        vectors: zeros where a text failed.
        tokens: of all texts; ``padded_tokens``: with padding.
        model_seconds: the model's own time, on its device.
        failed: reasons, by row, of texts that cannot be encoded even alone.
    """

    vectors: NDArray[np.float32]
    tokens: int
    padded_tokens: int
    model_seconds: float
    failed: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tokenised:
    """Token ids of a window's texts; none where a text failed."""

    ids: list[NDArray[np.int32]]
    failed: dict[int, str]


class Encoder:
    """A backbone with pooling, and a head, on one device.

    The backbone is altered: where it can, it runs packed texts, and on a CPU its weights are laid out for bf16.

    Args:
        pooled: from a batch of token ids to pooled states.
        tokenizer: truncates, does not pad.
        head: from pooled states [b, D] to vectors [b, d]; runs on the device, so that nothing wider leaves it.
        device: where to run.
        dtype: of the backbone; pooling and head are float32.
        token_budget: tokens per batch, padding included; a single longer text still makes a batch. 0: what suits
            the device.
    """

    def __init__(
        self,
        pooled: PooledStates | PooledLayers,
        tokenizer: Tokenizer,
        *,
        head: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        token_budget: int,
    ) -> None:
        self._pooled = pooled.to(device=device, dtype=dtype)
        self._head = head.to(device=device)
        self._tokenizer = tokenizer
        self._stuck_after_s: float | None = None
        self._good = token_ids(tokenizer, [GOOD_TEXT])
        self.device = device
        self.dtype = dtype
        if device.type == "cpu":
            for name in PROGRAM_CACHES:
                os.environ.setdefault(name, str(PROGRAMS))
        longest = (tokenizer.truncation or {}).get("max_length", CPU_TOKENS)
        self._first_position = use_packed(self._pooled, pooled.model, longest=longest)
        if device.type == "cpu" and dtype == torch.bfloat16:
            self._prepare_bfloat16()
        self._token_budget = token_budget or budget_of(device, self._name(), _TimedPass(self, longest))

    @property
    def packed(self) -> bool:
        """Whether the model runs texts end to end, without padding."""
        return self._first_position is not None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Vectors of texts, in their order. But for rounding, they do not depend on which texts come together.

        Args:
            texts: any number, of any length; what exceeds the tokenizer's limit is cut off.

        Raises:
            Unencodable: a text cannot be encoded.
            RuntimeError: the device fails.
        """
        windows = [texts[start : start + WINDOW_TEXTS] for start in range(0, len(texts), WINDOW_TEXTS)]
        parts = [encoded for _, encoded in self.stream((window, window) for window in windows)]
        for number, part in enumerate(parts):
            if part.failed:
                row = min(part.failed)
                raise Unencodable(f"text {number * WINDOW_TEXTS + row} cannot be encoded: {part.failed[row]}")
        if not parts:
            return Encoded(np.empty((0, 0), np.float32), 0, 0, 0.0)
        return Encoded(
            np.concatenate([part.vectors for part in parts]),
            tokens=sum(part.tokens for part in parts),
            padded_tokens=sum(part.padded_tokens for part in parts),
            model_seconds=sum(part.model_seconds for part in parts),
        )

    def stream(
        self, windows: Iterable[tuple[W, Sequence[str]]], *, stuck_after_s: float | None = None
    ) -> Iterator[tuple[W, Encoded]]:
        """Encode window by window; the next one is read and tokenised while the model works on this one.

        Args:
            windows: anything, with the texts that belong to it; drawn from another thread. Texts are sorted by length
                within a window.
            stuck_after_s: when the device takes longer for a batch, or on CUDA for those of a window, this process ends
                with a trace of every thread: for workers that are retried. None: never.

        Yields:
            What came in, and its vectors. A text that fails alone is told of; its neighbours are encoded.

        Raises:
            OutOfMemory: the device cannot hold a single text.
            RuntimeError: the device, the model or the tokenizer fails, also on a text that is known to be good.
        """
        source, self._stuck_after_s = iter(windows), stuck_after_s
        with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
            upcoming = pool.submit(self._tokenised, source)
            while True:
                ready = upcoming.result()
                if ready is None:
                    return
                upcoming = pool.submit(self._tokenised, source)
                window, tokenised = ready
                yield window, self._encode(tokenised)

    def _tokenised(self, source: Iterator[tuple[W, Sequence[str]]]) -> tuple[W, _Tokenised] | None:
        for window, texts in source:
            failed: dict[int, str] = {}
            ids = _token_ids(self._tokenizer, list(texts), failed)
            if failed:
                # Where it fails on this as well, it is not the texts.
                token_ids(self._tokenizer, [GOOD_TEXT])
            return window, _Tokenised(ids, failed)
        return None

    @torch.inference_mode()
    def _encode(self, window: _Tokenised) -> Encoded:
        lengths = np.array([len(ids) for ids in window.ids], dtype=np.int64)
        failed = dict(window.failed)
        order = np.argsort(-lengths, kind="stable")
        order = order[~np.isin(order, list(failed))]
        clock = _Clock(self.device)
        parts: list[tuple[NDArray[np.int64], Tensor]] = []
        padded = start = 0
        while start < len(order):
            # The budget may have shrunk since the last batch.
            rows = order[start : start + next_batch(lengths[order[start:]], self._token_budget, packed=self.packed)]
            start += len(rows)
            padded += self._computed(lengths[rows])
            parts += self._vectors(rows, window.ids, failed, clock)
        with self._watched():
            found = [(rows, vectors.cpu().numpy()) for rows, vectors in parts]
        vectors = np.zeros((len(lengths), *(found[0][1].shape[1:] if found else (0,))), np.float32)
        for rows, part in found:
            vectors[rows] = part
            for row in rows[_odd(part)].tolist():
                vectors[row] = self._once_more(row, window.ids[row], failed)
        return Encoded(vectors, int(lengths.sum()), padded, clock.seconds(), failed)

    def _vectors(
        self, rows: NDArray[np.int64], ids: list[NDArray[np.int32]], failed: dict[int, str], clock: "_Clock"
    ) -> list[tuple[NDArray[np.int64], Tensor]]:
        """Vectors on the device, with their rows; a batch that fails is halved until what fails is alone."""
        try:
            with clock.running(), self._watched():
                return [(rows, self._forward([ids[row] for row in rows.tolist()]))]
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            reason, memory = _reason(error), is_out_of_memory(error)
            if not memory and is_device_trouble(error):
                raise
        # Outside of the handler: the error's frames no longer hold on to what filled the memory.
        if memory:
            self._shrink(self._computed(np.array([len(ids[row]) for row in rows.tolist()], np.int64)))
            if len(rows) == 1:
                raise OutOfMemory(f"{self.device} lacks memory for a single text: {reason}")
        elif len(rows) == 1:
            self._require_good()
            failed[int(rows[0])] = reason
            return []
        half = len(rows) // 2
        return [*self._vectors(rows[:half], ids, failed, clock), *self._vectors(rows[half:], ids, failed, clock)]

    def _once_more(self, row: int, ids: NDArray[np.int32], failed: dict[int, str]) -> NDArray[np.float32]:
        """The vector of a text alone whose vector was no number among others; zeros where it is none again."""
        vector: NDArray[np.float32] = self._forward([ids]).cpu().numpy()
        if _odd(vector).any():
            self._require_good()
            failed[row] = "its vector holds NaN or infinity"
            vector = np.zeros_like(vector)
        found: NDArray[np.float32] = vector[0]
        return found

    def _require_good(self) -> None:
        """Raise what a text that is known to be good meets: then it is not the texts that are bad."""
        if _odd(self._forward(self._good).cpu().numpy()).any():
            raise Unencodable(f"the model on {self.device} gives NaN or infinity for any text")

    def _prepare_bfloat16(self) -> None:
        """Lay the weights out for oneDNN; on a CPU that does not multiply bf16, leave them as they are."""
        if can_prepack():
            self._prepack()
        elif not multiplies_bfloat16():
            log.warning("this CPU does not multiply bfloat16: encode.dtype float32 is faster here, and more precise")

    def _prepack(self) -> None:
        """Lay the weights out for oneDNN, unless the model then gives something else."""
        before = self._pooled_good()
        undo = prepack(self._pooled.model)
        try:
            after = self._pooled_good()
        except Exception as error:
            # Whatever a model says to this: it keeps its weights.
            log.debug("prepacked weights: %s", error)
            after = torch.zeros_like(before)
        if functional.cosine_similarity(after, before, dim=-1).min() < LEAST_COSINE:
            undo()

    @torch.inference_mode()
    def _pooled_good(self) -> Tensor:
        states: Tensor = self._pooled(self._batch(self._good))
        return states

    def _shrink(self, tokens: int) -> None:
        """No batch gets more than half of the tokens that were too many."""
        if tokens // 2 < self._token_budget:
            self._token_budget = max(1, tokens // 2)
            log.warning("%s is out of memory: batches of %d tokens from now on", self.device, self._token_budget)
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _forward(self, texts: Sequence[NDArray[np.int32]]) -> Tensor:
        vectors: Tensor = self._head(self._pooled(self._batch(texts)))
        return vectors

    def _batch(self, texts: Sequence[NDArray[np.int32]]) -> TokenBatch:
        if self._first_position is None:
            return PaddedTokens.of(texts).to(self.device)
        tokens = self._filled(sum(max(1, len(ids)) for ids in texts))
        return PackedTokens.of(texts, first_position=self._first_position, tokens=tokens).to(self.device)

    def _computed(self, lengths: NDArray[np.int64]) -> int:
        """Tokens that a batch of texts, longest first, is to the model."""
        if not self.packed:
            return len(lengths) * max(1, int(lengths[0]))
        return self._filled(int(np.maximum(lengths, 1).sum()))

    def _filled(self, tokens: int) -> int:
        """Up to where a packed batch is filled: oneDNN keeps a program for every number of tokens that it met."""
        if self.device.type == "cuda":
            return tokens
        step = max(1, (1 << tokens.bit_length()) // 2 // FILL_STEPS)
        return -(-tokens // step) * step

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End the process when this takes too long: no exception gets a thread out of a device that hangs."""
        if self._stuck_after_s is None or sys.__stderr__ is None:
            yield
            return
        faulthandler.dump_traceback_later(self._stuck_after_s, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _name(self) -> str:
        """What the speed of a batch depends on besides the device."""
        model = self._pooled.model
        weights = sum(parameter.numel() for parameter in model.parameters())
        return f"{type(model).__name__} of {weights:,} weights in {self.dtype}"


@dataclass(frozen=True)
class _TimedPass:
    """Seconds that a batch of so many tokens takes, in texts of a common length."""

    encoder: Encoder
    longest: int

    @torch.inference_mode()
    def __call__(self, tokens: int) -> float:
        length = min(64, self.longest)
        texts = [np.zeros(length, np.int32)] * max(1, tokens // length)
        started = time.perf_counter()
        self.encoder._forward(texts).cpu()
        return time.perf_counter() - started


class _Clock:
    """The model's own seconds: on CUDA those between events, for a call returns before the work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside of this block."""
        if self._device.type == "cuda":
            begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Seconds so far; results must have arrived."""
        return self._seconds + sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1000


class Normalised(nn.Module):
    """A compressor whose vectors are scaled to unit length."""

    def __init__(self, compressor: nn.Module) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, hidden: Tensor) -> Tensor:
        """Unit vectors [n, d] of pooled hidden states [n, D]."""
        return functional.normalize(self.compressor(hidden), dim=-1)


def next_batch(lengths: NDArray[np.int64], budget: int, *, packed: bool) -> int:
    """How many of the texts, longest first, stay within ``budget`` tokens together; one at least.

    Args:
        lengths: tokens of each text that is left.
        budget: tokens, with padding to the longest unless ``packed``.
        packed: whether there is no padding.
    """
    if not packed:
        return min(len(lengths), max(1, budget // max(1, int(lengths[0]))))
    # More texts than tokens cannot fit: no need to add up the rest.
    return max(1, int(np.searchsorted(lengths[: budget + 1].cumsum(), budget, side="right")))


def token_batches(lengths: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """Cut lengths, longest first, into runs whose rows × longest stay within ``budget`` (one row at least)."""
    start = 0
    while start < len(lengths):
        rows = next_batch(lengths[start:], budget, packed=False)
        yield slice(start, start + rows)
        start += rows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short, on a GPU or on the CPU."""
    said = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in said)


def is_device_trouble(error: BaseException) -> bool:
    """Whether an error is the device's, whatever text it came with."""
    return isinstance(error, torch.AcceleratorError) or any(words in str(error) for words in DEVICE_TROUBLE)


def _token_ids(
    tokenizer: Tokenizer, texts: list[str], failed: dict[int, str], first: int = 0
) -> list[NDArray[np.int32]]:
    """Token ids of each text; texts that the tokenizer fails on alone are told of, by row, and have none."""
    try:
        return token_ids(tokenizer, texts)
    except BaseException as error:
        # What panics in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if len(texts) == 1:
            failed[first] = f"tokenizer: {_reason(error)}"
            return [np.empty(0, np.int32)]
    half = len(texts) // 2
    return [
        *_token_ids(tokenizer, texts[:half], failed, first),
        *_token_ids(tokenizer, texts[half:], failed, first + half),
    ]


def _odd(vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which vectors [n, ...] hold NaN or infinity."""
    # A sum is finite only where every number is.
    odd: NDArray[np.bool_] = ~np.isfinite(vectors.reshape(len(vectors), -1).sum(axis=1, dtype=np.float64))
    return odd


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def choose_device(settings: EncodeSettings, resources: TaskResources) -> torch.device:
    """The GPU that the scheduler assigned, else the first one when asked for, else the CPU."""
    cuda = torch.cuda.is_available()
    if settings.device == "cpu" or (settings.device == "auto" and not (cuda and resources.gpu is not None)):
        return torch.device("cpu")
    if not cuda:
        raise UserError("encode.device is cuda, but torch finds no CUDA device; set encode.device to auto or cpu")
    return torch.device(f"cuda:{resources.gpu or 0}")


def choose_dtype(settings: EncodeSettings, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, unless the settings say otherwise."""
    if settings.dtype != "auto":
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def use_threads(count: int) -> None:
    """Let torch use so many cores in this process."""
    torch.set_num_threads(count)


@lru_cache(maxsize=1)
def load_encoder(
    storage: Storage,
    bundle_uri: str,
    version: str,
    settings: EncodeSettings,
    resources: TaskResources,
) -> Encoder:
    """The encoder of a bundle, every file verified; loaded once per process and kept for the next call.

    Raises:
        CorruptFile: a file of the bundle differs from its checksum.
    """
    folder, bundle = local_bundle(storage, bundle_uri, version)
    card = bundle.card
    device = choose_device(settings, resources)
    dtype = choose_dtype(settings, device)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads or resources.cpus)
        if resources.cpus == 1:
            # A pool of the tokenizer's own would take the cores of other tasks.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    elif resources.cpus > 1:
        # The model is elsewhere: the task's cores may tokenise.
        os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(resources.cpus))
    backbone = load_backbone(str(folder / "backbone"), dtype=dtype)
    compressor = load_compressor(folder, card.compressor)
    return Encoder(
        PooledStates(HiddenStates(backbone, whole=card.layers_kept == card.backbone_layers), card.pooling),
        load_tokenizer(storage, bundle.uri, card.max_tokens),
        head=Normalised(compressor) if card.normalised else compressor,
        device=device,
        dtype=dtype,
        token_budget=settings.token_budget,
    )

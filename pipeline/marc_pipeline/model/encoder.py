"""The encoder: texts to vectors. It tokenises the next window of texts while the model runs on the current one."""

import faulthandler
import gc
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from marc_pipeline.errors import Unencodable
from marc_pipeline.model.backbone import PooledLayers, PooledStates, kept_states, load_backbone
from marc_pipeline.model.batches import PackedTokens, PaddedTokens, TokenBatch, next_batch
from marc_pipeline.model.budget import CPU_TOKENS, budget_of
from marc_pipeline.model.bundle import local_bundle
from marc_pipeline.model.compressor import Normalised, load_compressor
from marc_pipeline.model.device import (
    DeviceClock,
    OutOfMemory,
    choose_device,
    choose_dtype,
    is_device_error,
    is_out_of_memory,
)
from marc_pipeline.model.onednn import can_prepack, multiplies_bfloat16, prepack
from marc_pipeline.model.packed import use_packed
from marc_pipeline.model.tokens import GOOD_TEXT, TokenisedTexts, error_line, load_tokenizer, token_ids, tokenise
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage

# Large enough that sorting by length groups many texts of one length, small enough for memory and latency.
WINDOW_TEXTS = 8192
# Number of batch sizes between one power of two and the next.
FILL_STEPS = 64
# oneDNN and torch cache one program per shape, and read these limits once. The default of 1,024 takes half a gigabyte.
PROGRAM_CACHES, PROGRAMS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 128
# Some models read their own weights. With weights packed for oneDNN, their vectors differ or they fail.
LEAST_COSINE = 0.99

log = logging.getLogger(__name__)

W = TypeVar("W")


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 [n, d] in the order of the texts, and their cost.

    Attributes:
        vectors: zeros for a text that failed.
        tokens: of all texts; ``padded_tokens``: including padding.
        model_seconds: compute time of the model on its device.
        cut_texts, lost_tokens: number of texts beyond the limit of the tokenizer, and estimate of their tokens beyond.
        failed: reason by row, for each text that fails even as the only one of its batch.
    """

    vectors: NDArray[np.float32]
    tokens: int
    padded_tokens: int
    model_seconds: float
    cut_texts: int = 0
    lost_tokens: int = 0
    failed: dict[int, str] = field(default_factory=dict)


class Encoder:
    """A backbone with pooling, and a head, on one device.

    The encoder changes the backbone in place: packed attention if the model supports it, and bf16 weights packed for
    oneDNN on a CPU.

    Args:
        pooled: maps a batch of token ids to pooled states.
        tokenizer: truncates, does not pad.
        head: maps pooled states [b, D] to vectors [b, d] on the device, so that only vectors are copied from it.
        device: device of model and head.
        dtype: of the backbone; pooling and head are float32.
        token_budget: tokens per batch, including padding; a longer text is a batch of its own. 0 chooses a budget for
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
        self.on_batch: Callable[[int, int], None] = lambda _texts, _tokens: None
        """Called after every batch with its numbers of texts and tokens."""
        if device.type == "cpu":
            for name in PROGRAM_CACHES:
                os.environ.setdefault(name, str(PROGRAMS))
        self._longest = (tokenizer.truncation or {}).get("max_length", CPU_TOKENS)
        self._first_position = use_packed(self._pooled, pooled.model, longest=self._longest)
        if device.type == "cpu" and dtype == torch.bfloat16:
            self._prepare_bfloat16()
        self._token_budget = token_budget or budget_of(device, self._name(), self._timed_pass)

    @property
    def packed(self) -> bool:
        """Whether the model runs packed texts, without padding."""
        return self._first_position is not None

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the vectors of texts, in order. Except for rounding, a vector depends on its own text only.

        Args:
            texts: any number, of any length; the tokenizer truncates long ones.

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
            cut_texts=sum(part.cut_texts for part in parts),
            lost_tokens=sum(part.lost_tokens for part in parts),
        )

    def stream(
        self, windows: Iterable[tuple[W, Sequence[str]]], *, stuck_after_s: float | None = None
    ) -> Iterator[tuple[W, Encoded]]:
        """Encode window by window. A second thread reads and tokenises the next window meanwhile.

        Args:
            windows: pairs of any object and its texts. Within a window, texts are sorted by length.
            stuck_after_s: limit in seconds for one batch, on CUDA also for all batches of a window. Beyond it, the
                process prints the stack of every thread and exits, so that Spark retries the task. None: no limit.

        Yields:
            Each object with the vectors of its texts. ``failed`` has the reason of each failed text.

        Raises:
            OutOfMemory: the device lacks memory for a single text.
            RuntimeError: the device, the model or the tokenizer fails, also on a known good text.
        """
        source, self._stuck_after_s = iter(windows), stuck_after_s
        with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
            upcoming = pool.submit(self._tokenised, source)
            while (ready := upcoming.result()) is not None:
                upcoming = pool.submit(self._tokenised, source)
                window, tokenised = ready
                yield window, self._encode(tokenised)

    def _tokenised(self, source: Iterator[tuple[W, Sequence[str]]]) -> tuple[W, TokenisedTexts] | None:
        for window, texts in source:
            return window, tokenise(self._tokenizer, texts)
        return None

    @torch.inference_mode()
    def _encode(self, window: TokenisedTexts) -> Encoded:
        ids, lost = [text.ids for text in window.texts], [text.lost for text in window.texts]
        lengths = np.array([len(of_text) for of_text in ids], dtype=np.int64)
        failed = dict(window.failed)
        order = np.argsort(-lengths, kind="stable")
        order = order[~np.isin(order, list(failed))]
        clock = DeviceClock(self.device)
        parts: list[tuple[NDArray[np.int64], Tensor]] = []
        padded = start = 0
        while start < len(order):
            # Out of memory may have reduced the budget since the last batch.
            rows = order[start : start + next_batch(lengths[order[start:]], self._token_budget, packed=self.packed)]
            start += len(rows)
            padded += self._computed(lengths[rows])
            parts += self._vectors(rows, ids, failed, clock)
            self.on_batch(len(rows), int(lengths[rows].sum()))
        with self._watched():
            found = [(rows, vectors.cpu().numpy()) for rows, vectors in parts]
        vectors = np.zeros((len(lengths), *(found[0][1].shape[1:] if found else (0,))), np.float32)
        for rows, part in found:
            vectors[rows] = part
            for row in rows[_not_finite(part)].tolist():
                vectors[row] = self._retried(row, ids[row], failed)
        return Encoded(
            vectors,
            tokens=int(lengths.sum()),
            padded_tokens=padded,
            model_seconds=clock.seconds(),
            cut_texts=sum(map(bool, lost)),
            lost_tokens=sum(lost),
            failed=failed,
        )

    def _vectors(
        self, rows: NDArray[np.int64], ids: list[NDArray[np.int32]], failed: dict[int, str], clock: DeviceClock
    ) -> list[tuple[NDArray[np.int64], Tensor]]:
        """Vectors on the device, with their rows. A failing batch is halved until each failing text is alone."""
        try:
            with clock.running(), self._watched():
                return [(rows, self._forward([ids[row] for row in rows.tolist()]))]
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            reason, memory = error_line(error), is_out_of_memory(error)
            if not memory and is_device_error(error):
                raise
        # Outside the except block, so that the error's traceback no longer keeps the tensors alive.
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

    def _retried(self, row: int, ids: NDArray[np.int32], failed: dict[int, str]) -> NDArray[np.float32]:
        """Encode a text alone whose vector was not finite in its batch; zeros if it is not finite again."""
        vector: NDArray[np.float32] = self._forward([ids]).cpu().numpy()
        if _not_finite(vector).any():
            self._require_good()
            failed[row] = "its vector contains NaN or infinity"
            vector = np.zeros_like(vector)
        found: NDArray[np.float32] = vector[0]
        return found

    def _require_good(self) -> None:
        """Raise an error if a known good text fails too: then the model or the device is broken, not the text."""
        if _not_finite(self._forward(self._good).cpu().numpy()).any():
            raise Unencodable(f"the model on {self.device} returns NaN or infinity even for a known good text")

    def _prepare_bfloat16(self) -> None:
        """Pack the weights for oneDNN if the CPU multiplies bf16; otherwise leave them unchanged."""
        if can_prepack():
            self._prepack()
        elif not multiplies_bfloat16():
            log.warning("this CPU does not multiply bfloat16: encode.dtype float32 is faster here, and more precise")

    def _prepack(self) -> None:
        before = self._pooled_good()
        undo = prepack(self._pooled.model)
        try:
            after = self._pooled_good()
        except Exception as error:
            # A model may raise any error with packed weights; it then keeps its own.
            log.debug("prepacked weights: %s", error)
            after = torch.zeros_like(before)
        if functional.cosine_similarity(after, before, dim=-1).min() < LEAST_COSINE:
            undo()

    @torch.inference_mode()
    def _pooled_good(self) -> Tensor:
        states: Tensor = self._pooled(self._batch(self._good))
        return states

    def _shrink(self, tokens: int) -> None:
        """Limit later batches to half of the tokens that did not fit."""
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
        """Tokens that the model computes for a batch of texts, longest first."""
        if not self.packed:
            return len(lengths) * max(1, int(lengths[0]))
        return self._filled(int(np.maximum(lengths, 1).sum()))

    def _filled(self, tokens: int) -> int:
        """Round up the size of a packed batch on a CPU, because oneDNN compiles a program for every size."""
        if self.device.type == "cuda":
            return tokens
        step = max(1, (1 << tokens.bit_length()) // 2 // FILL_STEPS)
        return -(-tokens // step) * step

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Exit the process if this context takes too long: no exception reaches a thread that a device blocks."""
        if self._stuck_after_s is None or sys.__stderr__ is None:
            yield
            return
        faulthandler.dump_traceback_later(self._stuck_after_s, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @torch.inference_mode()
    def _timed_pass(self, tokens: int) -> float:
        """Seconds for a batch of about this number of tokens, in texts of a common length."""
        length = min(64, self._longest)
        texts = [np.zeros(length, np.int32)] * max(1, tokens // length)
        started = time.perf_counter()
        self._forward(texts).cpu()
        return time.perf_counter() - started

    def _name(self) -> str:
        """The properties of the model that determine its speed."""
        model = self._pooled.model
        weights = sum(parameter.numel() for parameter in model.parameters())
        return f"{type(model).__name__} of {weights:,} weights in {self.dtype}"


def _not_finite(vectors: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which vectors [n, ...] contain NaN or infinity; a sum is finite only if every number is."""
    found: NDArray[np.bool_] = ~np.isfinite(vectors.reshape(len(vectors), -1).sum(axis=1, dtype=np.float64))
    return found


@lru_cache(maxsize=1)
def load_encoder(
    storage: Storage, bundle_uri: str, version: str, settings: EncodeSettings, resources: TaskResources
) -> Encoder:
    """Return the encoder of a bundle, with every file verified; the process caches the last one.

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
            # The tokenizer's own threads would use the cores of other tasks.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    elif resources.cpus > 1:
        # The model runs on the GPU, so that the tokenizer may use all cores of the task.
        os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(resources.cpus))
    backbone = load_backbone(str(folder / "backbone"), dtype=dtype)
    compressor = load_compressor(folder, card.compressor)
    return Encoder(
        PooledStates(kept_states(backbone, layers=card.layers_kept, of=card.backbone_layers), card.pooling),
        load_tokenizer(storage, bundle.uri, card.max_tokens),
        head=Normalised(compressor) if card.normalised else compressor,
        device=device,
        dtype=dtype,
        token_budget=settings.token_budget,
    )

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
from marc_pipeline.model.chunks import text_groups, weighted_means
from marc_pipeline.model.compressor import Normalised, load_compressor
from marc_pipeline.model.device import (
    DeviceClock,
    OutOfMemory,
    choose_device,
    choose_dtype,
    is_device_error,
    is_out_of_memory,
)
from marc_pipeline.model.encoded import Encoded, WindowWork
from marc_pipeline.model.onednn import can_prepack, multiplies_bfloat16, prepack
from marc_pipeline.model.packed import use_packed
from marc_pipeline.model.tokens import GOOD_TEXT, TokenisedTexts, error_line, load_tokenizer, token_ids, tokenise
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from marc_schemas.bundle import LongTexts

# Large enough that sorting by length groups many texts of one length, small enough for memory and latency.
WINDOW_TEXTS = 8192
# Number of batch sizes between one power of two and the next.
FILL_STEPS = 64
# oneDNN and torch cache one program per shape, and read these limits once. The default of 1,024 takes half a gigabyte.
PROGRAM_CACHES, PROGRAMS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"), 128
# Some models read their own weights. With weights packed for oneDNN, their vectors differ or they fail.
LEAST_COSINE = 0.99
NOT_FINITE = "its vector contains NaN or infinity"

log = logging.getLogger(__name__)

W = TypeVar("W")


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
        long_texts: pool: the pooled state of a text beyond the tokenizer's limit is the mean of those of its chunks,
            weighted by their tokens.
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
        long_texts: LongTexts = "cut",
    ) -> None:
        self._pooled = pooled.to(device=device, dtype=dtype)
        self._head = head.to(device=device)
        self._tokenizer = tokenizer
        self._long_texts: LongTexts = long_texts
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
            texts: any number, of any length; long ones are cut or pooled.

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
        return Encoded.joined(parts)

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
            return window, tokenise(self._tokenizer, texts, self._long_texts)
        return None

    @torch.inference_mode()
    def _encode(self, window: TokenisedTexts) -> Encoded:
        texts, failed, clock = window.texts, dict(window.failed), DeviceClock(self.device)
        good = [row for row in range(len(texts)) if row not in failed]
        short = np.array([row for row in good if len(texts[row].chunks) == 1], np.int64)
        work = WindowWork([text.chunks[0] for text in texts], self._head, clock, failed)
        parts, padded = self._encode_rows(work, short)
        long = [row for row in good if len(texts[row].chunks) > 1]
        for group in text_groups([len(texts[row].chunks) for row in long]):
            rows = np.array(long[group], np.int64)
            more, computed = self._encode_chunks([texts[row].chunks for row in long[group]], rows, clock, failed)
            parts, padded = [*parts, *more], padded + computed
        vectors = np.zeros((len(texts), *(parts[0][1].shape[1:] if parts else (0,))), np.float32)
        for rows, part in parts:
            vectors[rows] = part
        return Encoded(
            vectors,
            tokens=sum(text.count for text in texts),
            padded_tokens=padded,
            model_seconds=clock.seconds(),
            cut_texts=sum(text.lost > 0 for text in texts),
            lost_tokens=sum(text.lost for text in texts),
            failed=failed,
        )

    def _encode_chunks(
        self, chunks: list[list[NDArray[np.int32]]], rows: NDArray[np.int64], clock: DeviceClock, failed: dict[int, str]
    ) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.float32]]], int]:
        """Vectors of texts with several chunks each, with their rows, and the number of computed tokens."""
        ids = [chunk for of_text in chunks for chunk in of_text]
        counts = np.array([len(of_text) for of_text in chunks], np.int64)
        work = WindowWork(ids, nn.Identity(), clock, {}, texts_per_row=0)
        parts, padded = self._encode_rows(work, np.arange(len(ids)))
        owners = np.repeat(rows, counts)
        failed.update({int(owners[chunk]): reason for chunk, reason in work.failed.items()})
        self.on_batch(len(rows), 0)
        if not parts:
            return [], padded
        states = np.zeros((len(ids), *parts[0][1].shape[1:]), np.float32)
        for places, part in parts:
            states[places] = part
        pooled = weighted_means(states, np.array([len(chunk) for chunk in ids], np.int64), counts)
        with clock.running(), self._watched():
            vectors: NDArray[np.float32] = self._head(torch.from_numpy(pooled).to(self.device)).cpu().numpy()
        for place in [n for n, row in enumerate(rows.tolist()) if row in failed]:
            vectors[place] = 0
        for place in np.flatnonzero(_not_finite(vectors)).tolist():
            failed[int(rows[place])], vectors[place] = NOT_FINITE, 0
        return [(rows, vectors)], padded

    def _encode_rows(
        self, work: WindowWork, rows: NDArray[np.int64]
    ) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.float32]]], int]:
        """Outputs of the head with their rows of ``work.ids``, longest first, and the number of computed tokens."""
        lengths = np.array([len(of_text) for of_text in work.ids], dtype=np.int64)
        order = rows[np.argsort(-lengths[rows], kind="stable")]
        parts: list[tuple[NDArray[np.int64], Tensor]] = []
        padded = start = 0
        while start < len(order):
            # Out of memory may have reduced the budget since the last batch.
            batch = order[start : start + next_batch(lengths[order[start:]], self._token_budget, packed=self.packed)]
            start += len(batch)
            padded += self._computed(lengths[batch])
            parts += self._vectors(batch, work)
            self.on_batch(work.texts_per_row * len(batch), int(lengths[batch].sum()))
        with self._watched():
            found = [(of_part, vectors.cpu().numpy()) for of_part, vectors in parts]
        for of_part, part in found:
            for place in np.flatnonzero(_not_finite(part)).tolist():
                part[place] = self._retried(int(of_part[place]), work)
        return found, padded

    def _vectors(self, rows: NDArray[np.int64], work: WindowWork) -> list[tuple[NDArray[np.int64], Tensor]]:
        """Vectors on the device, with their rows. A failing batch is halved until each failing text is alone."""
        ids = [work.ids[row] for row in rows.tolist()]
        try:
            with work.clock.running(), self._watched():
                return [(rows, self._forward(ids, work.head))]
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            reason, memory = error_line(error), is_out_of_memory(error)
            if not memory and is_device_error(error):
                raise
        # Outside the except block, so that the error's traceback no longer keeps the tensors alive.
        if memory:
            self._shrink(self._computed(np.array([len(of_text) for of_text in ids], np.int64)))
            if len(rows) == 1:
                raise OutOfMemory(f"{self.device} lacks memory for a single text: {reason}")
        elif len(rows) == 1:
            self._require_good()
            work.failed[int(rows[0])] = reason
            return []
        half = len(rows) // 2
        return [*self._vectors(rows[:half], work), *self._vectors(rows[half:], work)]

    def _retried(self, row: int, work: WindowWork) -> NDArray[np.float32]:
        """Encode a text alone whose vector was not finite in its batch; zeros if it is not finite again."""
        vector: NDArray[np.float32] = self._forward([work.ids[row]], work.head).cpu().numpy()
        if _not_finite(vector).any():
            self._require_good()
            work.failed[row] = NOT_FINITE
            vector = np.zeros_like(vector)
        found: NDArray[np.float32] = vector[0]
        return found

    def _require_good(self) -> None:
        """Raise an error if a known good text fails too: then the model or the device is broken, not the text."""
        if _not_finite(self._forward(self._good, self._head).cpu().numpy()).any():
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

    def _forward(self, texts: Sequence[NDArray[np.int32]], head: nn.Module) -> Tensor:
        vectors: Tensor = head(self._pooled(self._batch(texts)))
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
        self._forward(texts, self._head).cpu()
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
        long_texts=settings.long_texts,
    )

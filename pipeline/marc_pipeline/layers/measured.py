"""A measuring forward pass: pooled states and token figures of every layer, and the seconds and weights per block."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marc_pipeline.layers.curvature import curvature
from marc_pipeline.layers.entropy import prompt_entropy
from marc_pipeline.model.backbone import PooledLayers, blocks
from marc_pipeline.model.batches import TokenBatch
from marc_schemas.bundle import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKEN_FIGURES = ("prompt entropy", "tokens", "curvature")
"""Columns that :class:`MeasuredLayers` appends to the pooled state. Defined figures are never negative."""
UNDEFINED = -1.0
"""Replaces an undefined token figure, because the encoder treats NaN as a failure."""


class MeasuredLayers(PooledLayers):
    """Pooled states of every layer, each with the text's ``TOKEN_FIGURES`` in that layer as further columns.

    The figures are columns, not sums, because a batch may fail and run again in parts, and texts may be left out later.

    ``order`` is α of the prompt entropy.
    """

    def __init__(self, model: "PreTrainedModel", pooling: Pooling, *, order: float = 1.0) -> None:
        super().__init__(model, pooling)
        self._order = order
        self._measuring = False
        self._marks: list[float | torch.Event] = []
        self._passes: list[list[float | torch.Event]] = []
        self._device = torch.device("cpu")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measure token figures and time in this context. Outside of it, ``TOKEN_FIGURES`` are ``UNDEFINED``."""
        self._measuring = True
        try:
            yield
        finally:
            self._measuring = False

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return pooled states and token figures [b, L + 1, D + 3], float32, of a batch."""
        self._device = next(self.model.parameters()).device
        self._marks = []
        self._mark()
        found = super().forward(batch)
        if self._measuring:
            self._passes.append(self._marks)
        return found

    def summary(self, batch: TokenBatch, states: Tensor) -> Tensor:
        """Return one row per text [b, D + 3]. The marks exclude this method's time from the block's time."""
        self._mark()
        pooled = super().summary(batch, states)
        figures = pooled.new_full((len(pooled), len(TOKEN_FIGURES)), UNDEFINED)
        if self._measuring:
            for places, tokens in batch.by_length(states):
                found = torch.stack([prompt_entropy(tokens, self._order), curvature(tokens)], dim=1)  # [group, 2]
                entropies, curvatures = found.nan_to_num(nan=UNDEFINED).float().unbind(dim=1)
                lengths = torch.full_like(entropies, tokens.shape[1])
                figures[places] = torch.stack([entropies, lengths, curvatures], dim=1)
        self._mark()
        return torch.cat([pooled, figures], dim=1)

    def seconds(self) -> NDArray[np.float64]:
        """Return the seconds of all measured passes [L + 1]: embeddings, then each block; the last with final norm."""
        found = np.zeros(len(blocks(self.model)[2]) + 1)
        for marks in self._passes:
            # The first mark is the start of the pass. Every layer adds one mark before its summary and one after it.
            found += [_elapsed(begin, end) for begin, end in zip(marks[0::2], marks[1::2], strict=False)]
        return found

    def _mark(self) -> None:
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        self._marks.append(event)


def weights_bytes(model: "PreTrainedModel", *, item_bytes: int) -> list[int]:
    """Return the bytes of the weights of a whole backbone truncated after 0, 1, … L blocks."""
    of_blocks = [sum(weight.numel() for weight in block.parameters()) for block in blocks(model)[2]]
    rest = sum(weight.numel() for weight in model.parameters()) - sum(of_blocks)
    return [item_bytes * (rest + sum(of_blocks[:layer])) for layer in range(len(of_blocks) + 1)]


def _elapsed(begin: float | torch.Event, end: float | torch.Event) -> float:
    if isinstance(begin, torch.Event) and isinstance(end, torch.Event):
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000
    return float(end) - float(begin)  # type: ignore[arg-type]  # both are events, or neither

"""Batches of token ids, packed or padded: batch sizes within a token budget, and pooling to one vector per text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from marc_schemas.bundle import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Replaces the tokens of a text without any: a decoder's tokenizer adds no special tokens to an empty text.
NO_TOKEN = 0


class TokenBatch(Protocol):
    """Token ids of b texts on one device. Each class has its own layout of token states."""

    def run(self, model: "PreTrainedModel") -> Tensor:
        """Return the model's token states, in the layout of the batch."""

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """Pool token states to one float32 vector per text [b, D]."""

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Group token states by the length of their texts, without padding.

        Yields:
            Rows of m texts in the batch, int64 [m], and their states [m, t, D]; t is 1 for a text without tokens.
        """

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device."""


@dataclass(frozen=True)
class PaddedTokens:
    """One text per row.

    Attributes:
        ids: [b, t], padded on the right.
        mask: [b, t], 1 for tokens and 0 for padding.
    """

    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, texts: Sequence[NDArray[np.int32]]) -> Self:
        """Pad the token ids of texts on the right with 0."""
        width = max(1, *map(len, texts))
        ids, mask = np.zeros((2, len(texts), width), dtype=np.int64)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return cls(torch.from_numpy(ids), torch.from_numpy(mask))

    def run(self, model: "PreTrainedModel") -> Tensor:
        """Return the model's last hidden states [b, t, D]."""
        states: Tensor = model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        return states

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """Pool states [b, t, D] to one float32 vector per text [b, D]."""
        return pool(states, self.mask, pooling)

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows [m] and states [m, t, D] of the texts of each length, from states [b, t, D]."""
        lengths = self.mask.sum(dim=1).clamp(min=1)
        for length in sorted(set(lengths.tolist())):
            places = torch.nonzero(lengths == length).squeeze(1)
            yield places, states[places, :length]

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device."""
        return type(self)(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class PackedTokens:
    """Texts one after the other in one row, without padding. Filler tokens may follow the last text.

    Attributes:
        ids: [1, T], T tokens including filler.
        positions: [1, T], position of every token in its text.
        bounds: int32 [b + 1], start of every text, and end of the last one.
        runs: (texts, tokens of each) of consecutive texts with the same length; filler counts as texts of one token.
        tokens: number of tokens of all texts. It is on the host, so that reading it does not wait for the device.
    """

    ids: Tensor
    positions: Tensor
    bounds: Tensor
    runs: tuple[tuple[int, int], ...]
    tokens: int

    @classmethod
    def of(cls, texts: Sequence[NDArray[np.int32]], *, first_position: int = 0, tokens: int = 0) -> Self:
        """Pack the token ids of texts, preferably sorted by length: attention runs once per run of equal lengths.

        Args:
            texts: ids of each text; a text without tokens gets a single 0.
            first_position: the model's number for the position of the first token.
            tokens: filler extends the row to this number of tokens.
        """
        filled = [tokens if len(tokens) else np.full(1, NO_TOKEN, np.int32) for tokens in texts]
        lengths = np.array([len(tokens) for tokens in filled], np.int32)
        bounds = np.concatenate([np.zeros(1, np.int32), lengths.cumsum(dtype=np.int32)])
        rest = max(0, tokens - int(bounds[-1]))
        ids = np.concatenate([*filled, np.full(rest, NO_TOKEN)]).astype(np.int64)
        positions = np.full(len(ids), first_position)
        positions[: bounds[-1]] += np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        runs = tuple((len(list(same)), length) for length, same in groupby([*lengths.tolist(), *[1] * rest]))
        rows = torch.from_numpy(ids[None]), torch.from_numpy(positions[None])
        return cls(*rows, torch.from_numpy(bounds), runs, int(bounds[-1]))

    def run(self, model: "PreTrainedModel") -> Tensor:
        """Return the model's last hidden states [1, T, D]. Its attention must be :mod:`marc_pipeline.model.packed`."""
        with self.attended():
            states: Tensor = model(input_ids=self.ids, position_ids=self.positions).last_hidden_state
        return states

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """Pool states [1, T, D] to one float32 vector per text [b, D]."""
        rows = states[0]
        if pooling == "cls":
            return rows[self.bounds[:-1]].float()
        if pooling == "last":
            return rows[self.bounds[1:] - 1].float()
        tokens = torch.arange(self.tokens, device=rows.device)
        return functional.embedding_bag(tokens, rows.float(), self.bounds.long(), mode="mean", include_last_offset=True)

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows [m] and states [m, t, D] of every run of equal lengths, from states [1, T, D]."""
        texts, first, token = len(self.bounds) - 1, 0, 0
        for run, length in self.runs:
            # Filler may belong to the same run as the last texts.
            count = min(run, texts - first)
            if count == 0:
                return
            places = torch.arange(first, first + count, device=states.device)
            yield places, states[0, token : token + count * length].view(count, length, -1)
            first, token = first + count, token + count * length

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device, copied asynchronously from pinned memory."""
        if device.type != "cuda":
            return self
        ids, positions, bounds = (
            tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.ids, self.positions, self.bounds)
        )
        return type(self)(ids, positions, bounds, self.runs, self.tokens)

    @contextmanager
    def attended(self) -> Iterator[None]:
        """In this context, packed attention reads the bounds of this batch's texts."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[PackedTokens | None] = ContextVar("packed_tokens", default=None)


def current_batch() -> PackedTokens | None:
    """Return the packed batch that the model runs at present in this thread; None outside a packed pass."""
    return _CURRENT.get()


def next_batch(lengths: NDArray[np.int64], budget: int, *, packed: bool) -> int:
    """Return how many of the first texts fit into ``budget`` tokens together; at least one.

    Args:
        lengths: tokens of each remaining text, longest first.
        budget: tokens, including padding to the longest text unless ``packed``.
        packed: whether the batch is packed.
    """
    if not packed:
        return min(len(lengths), max(1, budget // max(1, int(lengths[0]))))
    # More than budget + 1 texts never fit, so that only these lengths are summed.
    return max(1, int(np.searchsorted(lengths[: budget + 1].cumsum(), budget, side="right")))


def token_batches(lengths: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """Yield slices of padded batches, for lengths sorted longest first: rows × longest ≤ ``budget``, or one row."""
    start = 0
    while start < len(lengths):
        rows = next_batch(lengths[start:], budget, packed=False)
        yield slice(start, start + rows)
        start += rows


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """Pool states [n, t, D] with mask [n, t] to one float32 vector per text [n, D]. Padding is on the right."""
    states = states.float()
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        return states[torch.arange(len(states), device=states.device), last]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)

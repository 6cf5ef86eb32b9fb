"""Batches of token ids, packed or padded, and how each becomes one vector per text."""

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

# What stands for a text without any token; a decoder's tokenizer adds none of its own.
NO_TOKEN = 0


class TokenBatch(Protocol):
    """Token ids of b texts on one device."""

    def run(self, model: "PreTrainedModel") -> Tensor:
        """The model's token states, in the batch's own layout."""

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """One float32 vector per text [b, D] of token states in the batch's own layout."""

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Token states of the texts without padding, texts of one length together.

        Yields:
            Places of m texts in the batch, int64 [m], and their states [m, t, D]; t is 1 for a text without tokens.
        """

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""


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
        """Token ids of texts, padded on the right with 0, which the mask hides."""
        width = max(1, *map(len, texts))
        ids, mask = np.zeros((2, len(texts), width), dtype=np.int64)
        for row, tokens in enumerate(texts):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return cls(torch.from_numpy(ids), torch.from_numpy(mask))

    def run(self, model: "PreTrainedModel") -> Tensor:
        """The model's last states [b, t, D]."""
        states: Tensor = model(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        return states

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """One float32 vector per text: [b, t, D] to [b, D]."""
        return pool(states, self.mask, pooling)

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places of m texts [m] and their states [m, t, D] of states [b, t, D], texts of one length together."""
        lengths = self.mask.sum(dim=1).clamp(min=1)
        for length in sorted(set(lengths.tolist())):
            places = torch.nonzero(lengths == length).squeeze(1)
            yield places, states[places, :length]

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return type(self)(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True)
class PackedTokens:
    """Texts end to end in one row, so that nothing is computed for padding.

    Attributes:
        ids: [1, T], T the tokens of all texts, and of what fills the row.
        positions: [1, T], of every token in its text.
        bounds: int32 [b + 1], where the texts begin, and where the last one ends.
        runs: (texts, tokens of each) of neighbours of one length, in order; what fills the row comes last, as texts of
            one token.
        tokens: of all texts; a number of the host's, so that nobody waits for the device to tell it.
    """

    ids: Tensor
    positions: Tensor
    bounds: Tensor
    runs: tuple[tuple[int, int], ...]
    tokens: int

    @classmethod
    def of(cls, texts: Sequence[NDArray[np.int32]], *, first_position: int = 0, tokens: int = 0) -> Self:
        """Token ids of texts, best sorted by length: neighbours of one length are attended to together.

        Args:
            texts: ids of each; one without any gets a single 0.
            first_position: what the model calls the first token's position.
            tokens: fill the row up to so many.
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
        """The model's last states [1, T, D]; its attention must be that of :mod:`marc_pipeline.model.packed`."""
        with self.attended():
            states: Tensor = model(input_ids=self.ids, position_ids=self.positions).last_hidden_state
        return states

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """One float32 vector per text: [1, T, D] to [b, D]."""
        rows = states[0]
        if pooling == "cls":
            return rows[self.bounds[:-1]].float()
        if pooling == "last":
            return rows[self.bounds[1:] - 1].float()
        tokens = torch.arange(self.tokens, device=rows.device)
        return functional.embedding_bag(tokens, rows.float(), self.bounds.long(), mode="mean", include_last_offset=True)

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places of m texts [m] and their states [m, t, D] of states [1, T, D], neighbours of one length together."""
        texts, first, token = len(self.bounds) - 1, 0, 0
        for run, length in self.runs:
            # What fills the row may continue the last run.
            count = min(run, texts - first)
            if count == 0:
                return
            places = torch.arange(first, first + count, device=states.device)
            yield places, states[0, token : token + count * length].view(count, length, -1)
            first, token = first + count, token + count * length

    def to(self, device: torch.device) -> Self:
        """The same batch on another device; from pinned memory, without waiting for it."""
        if device.type != "cuda":
            return self
        ids, positions, bounds = (
            tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.ids, self.positions, self.bounds)
        )
        return type(self)(ids, positions, bounds, self.runs, self.tokens)

    @contextmanager
    def attended(self) -> Iterator[None]:
        """Attention inside of this block is to these texts, each to itself alone."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[PackedTokens | None] = ContextVar("packed_tokens", default=None)


def current_batch() -> PackedTokens | None:
    """The packed batch whose pass is under way here."""
    return _CURRENT.get()


def pool(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """One float32 vector per text: [n, t, D], mask [n, t] to [n, D]. Padding is on the right."""
    states = states.float()
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        return states[torch.arange(len(states), device=states.device), last]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)

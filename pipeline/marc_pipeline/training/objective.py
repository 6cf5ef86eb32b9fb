"""The interface of training objectives: a batch of interactions, states of items, and a loss with validation AUC."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

VALIDATED_AT_ONCE = 16_384
"""Most interactions that are scored at once. The vectors of their histories are the largest part of the memory."""
ITEM_FIELDS = ("items", "clicked", "skipped", "profiles")
"""Fields of ``Clicks`` with row numbers of states."""


@dataclass(frozen=True)
class Clicks:
    """Interactions of one batch. Items are row numbers of one matrix of states; −1 is padding.

    Attributes:
        items: int64 [b], the candidates.
        clicked: int64 [b, k], items that the user clicked earlier.
        skipped: int64 [b, k], items that the user rated earlier without a click.
        labels: float32 [b], 1 for a click.
        profiles: int64 [b, 1], rows of the users' texts; None if users have no texts.
        weights: float32 [b], weights in the loss; None for equal weights.
    """

    items: Tensor
    clicked: Tensor
    skipped: Tensor
    labels: Tensor
    profiles: Tensor | None = None
    weights: Tensor | None = None

    def __getitem__(self, rows: Tensor | slice) -> "Clicks":
        return self._each(lambda part: part[rows])

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device) -> "Clicks":
        """Return the batch on another device."""
        return self._each(lambda part: part.to(device))

    def without_histories(self) -> "Clicks":
        """Return the batch with histories of length 0."""
        return replace(self, clicked=self.clicked[:, :0], skipped=self.skipped[:, :0])

    def batch(self, rows: Tensor, seed: Sequence[int]) -> "Clicks":
        """Return the interactions of a batch; ``seed`` is for negatives, which rated interactions do not need."""
        return self[rows]

    def click_loss(self, logits: Tensor) -> Tensor:
        """Return the weighted mean of the cross-entropy of logits [b] with the labels, in nats."""
        losses = functional.binary_cross_entropy_with_logits(logits, self.labels, weight=self.weights, reduction="sum")
        return losses / (len(self) if self.weights is None else self.weights.sum())

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Clicks":
        parts: dict[str, Any] = {name: None if part is None else change(part) for name, part in vars(self).items()}
        return Clicks(**parts)


class ItemStates(nn.Module):
    """Provides the hidden states of items."""

    def forward(self, items: Tensor, candidate: Tensor) -> Tensor:
        """Return states [m, D] of items [m]; ``candidate`` [m] marks the items whose clicks the loss predicts."""
        raise NotImplementedError

    def all_states(self) -> Tensor:
        """Return the current states [items, D] of all items."""
        raise NotImplementedError


class FrozenStates(ItemStates):
    """Pooled hidden states [items, D] of all items, computed in advance."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.register_buffer("states", states, persistent=False)

    states: Tensor

    def forward(self, items: Tensor, candidate: Tensor) -> Tensor:
        """Return states [m, D] of items [m]."""
        states: Tensor = functional.embedding(items, self.states)
        return states

    def all_states(self) -> Tensor:
        """Return the states [items, D]."""
        return self.states


class Objective(nn.Module):
    """A loss over batches of interactions, and its validation on other interactions.

    ``source`` provides states h [m, D] of items [m], and ``compressor`` maps h [n, D] to z [n, d].
    """

    def __init__(self, source: ItemStates, compressor: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.compressor = compressor

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """Return ``loss`` and its terms."""
        raise NotImplementedError

    def score(self, vectors: Tensor, batch: Clicks) -> Tensor:
        """Return scores [b] that rise with the probability of a click, from the vectors [items, d] of all items."""
        raise NotImplementedError

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Return the compressor's vectors [items, d] of all items, in evaluation mode."""
        mode = self.training
        self.eval()
        made: Tensor = self.compressor(self.source.all_states())
        self.train(mode)
        return made

    @torch.no_grad()
    def validate(self, batch: Clicks) -> float:
        """Return the AUC of held-out interactions; NaN if a score is not finite or all labels are equal."""
        mode = self.training
        vectors = self.vectors()
        self.eval()
        starts = range(0, len(batch), VALIDATED_AT_ONCE)
        scores = torch.cat([self.score(vectors, batch[slice(start, start + VALIDATED_AT_ONCE)]) for start in starts])
        self.train(mode)
        if not scores.isfinite().all() or batch.labels.min() == batch.labels.max():
            return float("nan")
        return float(roc_auc_score(batch.labels.numpy(force=True), scores.numpy(force=True)))


def scaled(vectors: Tensor) -> Tensor:
    """Scale vectors [n, d] to length √d, so that their numbers have mean square 1 for the networks."""
    return functional.normalize(vectors, dim=-1).mul(vectors.shape[-1] ** 0.5)


def distinct(batch: Clicks) -> tuple[Tensor, Tensor, Clicks]:
    """Return the distinct items of a batch.

    Returns:
        The items [m]; a mask [m] of the candidates; and the batch with row numbers of these items.
    """
    parts = {name: getattr(batch, name) for name in ITEM_FIELDS if getattr(batch, name) is not None}
    everything = torch.cat([part.flatten() for part in parts.values()])
    # Replace padding (−1) with an item that is already in the batch.
    items, places = torch.unique(everything.where(everything >= 0, batch.items[:1]), return_inverse=True)
    candidate = torch.zeros(len(items), dtype=torch.bool, device=items.device)
    candidate[places[: len(batch)]] = True
    rows = places.masked_fill(everything < 0, -1).split([part.numel() for part in parts.values()])
    local = {name: row.view(part.shape) for (name, part), row in zip(parts.items(), rows, strict=True)}
    return items, candidate, replace(batch, **local)


def mean_of(vectors: Tensor, history: Tensor) -> Tensor:
    """Return the mean [b, d] of the vectors [m, d] in each history [b, k]; zeros for a history of padding only."""
    present = (history >= 0).to(vectors.dtype)
    found = functional.embedding(history.clamp(min=0), vectors)  # [b, k, d]
    return torch.bmm(present.unsqueeze(1), found).squeeze(1) / present.sum(dim=1, keepdim=True).clamp(min=1)

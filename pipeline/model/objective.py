"""What the training loop trains: a compressor, with whatever its objective needs beside it."""

from dataclasses import dataclass

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Clicks:
    """Interactions of one batch: int64 items [b], earlier clicks and skips [b, k] (−1: none), float32 labels [b].

    All name rows of one matrix of states; ``profiles`` [b, 1] those of the users' texts, None where there are none.
    """

    items: Tensor
    clicked: Tensor
    skipped: Tensor
    labels: Tensor
    profiles: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Clicks":
        profiles = None if self.profiles is None else self.profiles[rows]
        return Clicks(self.items[rows], self.clicked[rows], self.skipped[rows], self.labels[rows], profiles)

    def __len__(self) -> int:
        return len(self.items)

    def to(self, device: torch.device) -> "Clicks":
        """The same on a device."""
        return Clicks(
            self.items.to(device),
            self.clicked.to(device),
            self.skipped.to(device),
            self.labels.to(device),
            None if self.profiles is None else self.profiles.to(device),
        )


class Source(nn.Module):
    """Where the states of items come from."""

    def forward(self, items: Tensor, candidate: Tensor) -> Tensor:
        """States [m, D] of items [m]; ``candidate`` [m] says which of them the loss is about."""
        raise NotImplementedError

    def all_states(self) -> Tensor:
        """States [items, D], as they are now."""
        raise NotImplementedError


class FrozenStates(Source):
    """Pooled hidden states of all items, computed beforehand.

    Args:
        states: [items, D].
    """

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.register_buffer("states", states, persistent=False)

    states: Tensor

    def forward(self, items: Tensor, candidate: Tensor) -> Tensor:
        """States [m, D] of items [m]."""
        states: Tensor = functional.embedding(items, self.states)
        return states

    def all_states(self) -> Tensor:
        """States [items, D]."""
        return self.states


class Objective(nn.Module):
    """A loss over batches of interactions, and how well the compressor serves it on others.

    Args:
        source: from items [m] and which of them are candidates [m] to their states h [m, D].
        compressor: from h [n, D] to z [n, d].
    """

    def __init__(self, source: Source, compressor: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.compressor = compressor

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """``loss`` and its terms."""
        raise NotImplementedError

    def score(self, vectors: Tensor, batch: Clicks) -> Tensor:
        """How likely a click is, in any unit [b], given the vectors [items, d] of all items."""
        raise NotImplementedError

    @torch.no_grad()
    def vectors(self) -> Tensor:
        """Vectors [items, d] of all items, as the compressor makes them."""
        mode = self.training
        self.eval()
        made: Tensor = self.compressor(self.source.all_states())
        self.train(mode)
        return made

    @torch.no_grad()
    def validate(self, batch: Clicks) -> float:
        """AUC of the scores of interactions that were not trained on; NaN where there is none."""
        mode = self.training
        vectors = self.vectors()
        self.eval()
        scores = self.score(vectors, batch)
        self.train(mode)
        if not scores.isfinite().all() or batch.labels.min() == batch.labels.max():
            return float("nan")
        return float(roc_auc_score(batch.labels.numpy(force=True), scores.numpy(force=True)))


def scaled(vectors: Tensor) -> Tensor:
    """Vectors [n, d] at length √d: what is shipped has unit length, networks like numbers of size 1."""
    return functional.normalize(vectors, dim=-1).mul(vectors.shape[-1] ** 0.5)


def distinct(batch: Clicks) -> tuple[Tensor, Tensor, Tensor]:
    """The items that a batch touches.

    Returns:
        Each once [m]; which of them are candidates [m]; and the rows of the batch's entries in them, items first,
        then clicks, skips and profiles, flattened.
    """
    parts = [batch.items, batch.clicked, batch.skipped, *([] if batch.profiles is None else [batch.profiles])]
    everything = torch.cat([part.flatten() for part in parts])
    # Where there is none, an item that is touched anyway: no other may enter the batch.
    items, places = torch.unique(everything.where(everything >= 0, batch.items[:1]), return_inverse=True)
    candidate = torch.zeros(len(items), dtype=torch.bool, device=items.device)
    candidate[places[: len(batch)]] = True
    return items, candidate, places


def mean_of(vectors: Tensor, history: Tensor) -> Tensor:
    """Mean [b, d] of the rows of vectors [m, d] that history [b, k] names; zeros where it names none."""
    present = (history >= 0).to(vectors.dtype)
    found = functional.embedding(history.clamp(min=0), vectors)
    return torch.bmm(present.unsqueeze(1), found).squeeze(1) / present.sum(dim=1, keepdim=True).clamp(min=1)

"""Negatives for positives without ratings: items that the user did not take, drawn by popularity with a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marc_pipeline.config import InteractionSettings
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.objective import Clicks

TRIES = 20
"""Draws before the remaining negatives are drawn exactly, user by user."""
SEED = 0
"""Seed of the negatives that are drawn once: those of evaluations."""


@dataclass(frozen=True, eq=False)
class NegativeSampler:
    """Draws item i for a user with probability ∝ (1 + count_i)^α, never an item that the user took.

    The exponent α is ``interactions.negative_popularity``: 0 draws uniformly, 1 draws as users take. Because of the 1,
    items that nobody took yet are negatives as well. Mikolov et al. 2013 (arXiv 1310.4546) draw words with α = .75.

    Attributes:
        weights: float64 [items], the weight of each item.
        cumulative: float64 [items], their cumulative sum divided by the total.
        taken: int64, sorted keys ``user · items + item`` of the pairs that are never drawn.
    """

    weights: NDArray[np.float64]
    cumulative: NDArray[np.float64]
    taken: NDArray[np.int64]

    @classmethod
    def of(cls, positives: Interactions, *, items: int, popularity: float, known: int) -> "NegativeSampler":
        """Return the sampler that avoids every pair of the positives.

        ``known`` is the number of first rows that the popularity is counted on; ``popularity`` is α.
        """
        counts = np.bincount(positives.items[:known], minlength=items).astype(np.float64)
        weights: NDArray[np.float64] = np.power(1.0 + counts, popularity)
        cumulative = np.cumsum(weights)
        return cls(weights, cumulative / cumulative[-1], np.unique(positives.users * items + positives.items))

    def draw(self, users: NDArray[np.int64], random: np.random.Generator) -> NDArray[np.int64]:
        """Return one item per user, int64 [n]; −1 for a user who took every item."""
        drawn = self._any(len(users), random)
        again = np.flatnonzero(self._is_taken(users, drawn))
        for _ in range(TRIES):
            if not len(again):
                return drawn
            drawn[again] = self._any(len(again), random)
            again = again[self._is_taken(users[again], drawn[again])]
        for row in again:
            drawn[row] = self._exactly(int(users[row]), random)
        return drawn

    def _any(self, n: int, random: np.random.Generator) -> NDArray[np.int64]:
        found: NDArray[np.int64] = np.searchsorted(self.cumulative, random.random(n), side="right")
        return found.clip(max=len(self.cumulative) - 1)

    def _is_taken(self, users: NDArray[np.int64], drawn: NDArray[np.int64]) -> NDArray[np.bool_]:
        keys = users * len(self.cumulative) + drawn
        places = np.searchsorted(self.taken, keys).clip(max=len(self.taken) - 1)
        found: NDArray[np.bool_] = self.taken[places] == keys
        return found

    def _exactly(self, user: int, random: np.random.Generator) -> int:
        n, weights = len(self.weights), self.weights.copy()
        start, end = np.searchsorted(self.taken, (user * n, (user + 1) * n))
        weights[self.taken[start:end] - user * n] = 0
        total = weights.sum()
        return int(random.choice(n, p=weights / total)) if total else -1


@dataclass(frozen=True)
class SampledClicks:
    """Positives of ``users`` [n]; every batch adds ``per_positive`` negatives per positive, drawn anew.

    A negative has the user, the history and the weight of its positive.
    """

    positives: Clicks
    users: Tensor
    sampler: NegativeSampler
    per_positive: int

    def __len__(self) -> int:
        return len(self.positives)

    def __getitem__(self, rows: Tensor | slice) -> "SampledClicks":
        return replace(self, positives=self.positives[rows], users=self.users[rows])

    def to(self, device: torch.device) -> "SampledClicks":
        """Return the positives on another device."""
        return replace(self, positives=self.positives.to(device))

    def batch(self, rows: Tensor, seed: Sequence[int]) -> Clicks:
        """Return the positives of some rows, and then their negatives, which depend on the seed only."""
        return self.with_users(rows, seed)[0]

    def with_users(self, rows: Tensor, seed: Sequence[int]) -> tuple[Clicks, Tensor]:
        """Return :meth:`batch`, and the users of its rows."""
        repeated = rows.repeat(1 + self.per_positive)
        users, negative = self.users[repeated], torch.arange(len(repeated)) >= len(rows)
        drawn = torch.from_numpy(self.sampler.draw(users[negative].numpy(), np.random.default_rng([*seed])))
        batch = self.positives[repeated]
        device = batch.items.device
        items, labels = batch.items.clone(), batch.labels.clone()
        items[negative], labels[negative] = drawn.to(device), 0.0
        usable = items >= 0
        return replace(batch, items=items, labels=labels)[usable], users[usable.cpu()]


def with_negatives(
    interactions: Interactions, *, known: int, items: int, settings: InteractionSettings
) -> Interactions:
    """Return positives with negatives that are drawn once, for an evaluation; ratings are returned as they are.

    Each positive is followed by ``interactions.negatives`` rows of its user, its time and its weight. Negatives of the
    first ``known`` rows, the training part, avoid what their users took in that part, so that they reveal nothing
    about later rows. The others avoid everything that their users took. The popularity is that of the known rows.
    """
    if not interactions.implicit:
        return interactions
    count = settings.negatives
    rows = np.repeat(np.arange(len(interactions)), 1 + count)
    found, positive = interactions.take(rows), np.arange(len(rows)) % (1 + count) == 0
    chosen, random = found.items.copy(), np.random.default_rng(SEED)
    for part, avoided in ((rows < known, interactions.take(slice(0, known))), (rows >= known, interactions)):
        if (drawn := part & ~positive).any():
            popularity = settings.negative_popularity
            sampler = NegativeSampler.of(avoided, items=items, popularity=popularity, known=known)
            chosen[drawn] = sampler.draw(found.users[drawn], random)
    found = replace(found, items=chosen, labels=positive.astype(np.float32), implicit=False)
    return found.take(np.flatnonzero(chosen >= 0))

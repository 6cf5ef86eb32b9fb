"""Training data of an objective: interactions before the time boundary, split into training rows and a holdout."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marc_pipeline.config import InteractionSettings
from marc_pipeline.errors import UserError
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.negatives import NegativeSampler, SampledClicks
from marc_pipeline.training.objective import Clicks
from marc_pipeline.training.time_split import histories
from marc_pipeline.training.training_set import TrainingSet

FITTED_ROWS = 1_000_000
"""Most rows that closed-form fits read; of more rows, they read a sample."""
HOLDOUT_SEED, FITTED_SEED = (1,), (2,)
HELD_ROWS = 100_000
"""Most rows that a validation of early stopping reads; of more rows, it reads a sample."""


@dataclass(frozen=True)
class LearningData:
    """Interactions of the training part, split again for early stopping.

    Attributes:
        rows: all n interactions, in the order of time.
        raters: users of the interactions [n].
        end: training uses the rows before this one.
        start: early stopping uses the rows from this one on.
        sampler: draws negatives if the interactions are positives only; None for ratings.
        per_positive: number of negatives per positive.
    """

    rows: Clicks
    raters: Tensor
    end: int
    start: int
    sampler: NegativeSampler | None = None
    per_positive: int = 0

    @cached_property
    def training(self) -> Clicks | SampledClicks:
        """Interactions for the loss."""
        return self._labelled(slice(0, self.end))

    @cached_property
    def holdout(self) -> Clicks:
        """The latest rows, for early stopping, with negatives that stay the same."""
        held = self._labelled(_sample(self.start, len(self.rows), HELD_ROWS))
        return held.batch(torch.arange(len(held)), HOLDOUT_SEED)

    @cached_property
    def fitted(self) -> tuple[Clicks, Tensor]:
        """Rows of ``training`` with negatives that stay the same, and their users [m], for closed-form fits.

        The rows have no histories, which would take most of the memory.
        """
        rows = _sample(0, self.end, FITTED_ROWS)
        labelled = self._labelled(rows, histories=False)
        if isinstance(labelled, SampledClicks):
            return labelled.with_users(torch.arange(len(labelled)), FITTED_SEED)
        return labelled, self.raters[rows]

    @cached_property
    def known(self) -> Tensor:
        """Items of ``fitted``, ascending. Transforms may be fitted on these items only."""
        return torch.from_numpy(np.unique(self.fitted[0].items.numpy()))

    def whole(self) -> "LearningData":
        """Return a copy that trains on every row. Its holdout is then part of the training rows."""
        return replace(self, end=len(self.rows))

    def _labelled(self, rows: Tensor | slice, *, histories: bool = True) -> Clicks | SampledClicks:
        found = self.rows if histories else self.rows.without_histories()
        if self.sampler is None:
            return found[rows]
        return SampledClicks(found[rows], self.raters[rows], self.sampler, self.per_positive)


def learning_data(
    interactions: Interactions, *, settings: InteractionSettings, holdout: float, items: int
) -> LearningData:
    """Add histories to the interactions of a training part, and split off the holdout.

    Args:
        interactions: interactions before the boundary only.
        settings: length of the users' histories, and the negatives of positives without ratings.
        holdout: share of the latest rows for early stopping.
        items: number of items in the catalogue. The states of the users' texts follow those of the items.

    Raises:
        UserError: the training rows or the holdout would be empty.
    """
    profiles = sampler = None
    if interactions.profiles is not None:
        profiles = torch.from_numpy(np.where(interactions.profiles < 0, -1, interactions.profiles + items)[:, None])
    n, row = len(interactions), round(len(interactions) * (1 - holdout))
    cut = int(np.searchsorted(interactions.times, interactions.times[row])) if row < n else n
    if not 0 < cut < n:
        raise UserError(
            f"train.holdout {holdout:g} splits {n:,} interactions into {cut:,} for training and {n - cut:,} for early "
            "stopping, but both need at least one; change it, or provide more interactions or finer timestamps"
        )
    if interactions.implicit:
        sampler = NegativeSampler.of(interactions, items=items, popularity=settings.negative_popularity, known=n)
    weighted = bool((interactions.weights != 1).any())
    # Sampled negatives were never shown to the user, so they are no history. One column of padding says the same as
    # many, in less time.
    nothing = torch.full((1, 1), -1, dtype=torch.int32).expand(n, -1)
    skipped = nothing if sampler else torch.from_numpy(histories(interactions, length=settings.history, label=0))
    rows = Clicks(
        items=torch.from_numpy(interactions.items),
        clicked=torch.from_numpy(histories(interactions, length=settings.history, label=1)),
        skipped=skipped,
        labels=torch.from_numpy(interactions.labels),
        profiles=profiles,
        weights=torch.from_numpy(interactions.weights) if weighted else None,
    )
    return LearningData(rows, torch.from_numpy(interactions.users), cut, cut, sampler, settings.negatives)


def training_part(training_set: TrainingSet, *, settings: InteractionSettings, holdout: float) -> LearningData:
    """Return the learning data of a training set's training part; arguments and errors as in :func:`learning_data`."""
    rows = training_set.interactions.take(training_set.split.train)
    return learning_data(rows, settings=settings, holdout=holdout, items=len(training_set.item_ids))


def known_states(states: NDArray[np.float32], data: LearningData) -> NDArray[np.float32]:
    """Return the states [m, D] of the known items."""
    return np.asarray(states[data.known.numpy()])


def _sample(start: int, end: int, most: int) -> Tensor | slice:
    """Return all rows of a range, or a repeatable sample of them, ascending."""
    if end - start <= most:
        return slice(start, end)
    return torch.from_numpy(start + np.sort(np.random.default_rng(0).choice(end - start, most, replace=False)))

"""Training data of an objective: interactions before the time boundary, split into training rows and a holdout."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marc_pipeline.errors import UserError
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.objective import Clicks
from marc_pipeline.training.time_split import histories


@dataclass(frozen=True)
class LearningData:
    """Interactions of the training part, split again for early stopping.

    Attributes:
        rows: all n interactions, in the order of time.
        raters: users of the interactions [n].
        end: training uses the rows before this one.
        start: early stopping uses the rows from this one on.
    """

    rows: Clicks
    raters: Tensor
    end: int
    start: int

    @cached_property
    def training(self) -> Clicks:
        """Interactions for the loss."""
        return self.rows[torch.arange(self.end)]

    @cached_property
    def users(self) -> Tensor:
        """Users of the rows of ``training`` [m]."""
        return self.raters[: self.end]

    @cached_property
    def holdout(self) -> Clicks:
        """The latest rows, for early stopping."""
        return self.rows[torch.arange(self.start, len(self.rows))]

    @cached_property
    def known(self) -> Tensor:
        """Items with interactions in ``training``, ascending. Transforms may be fitted on these items only."""
        return torch.from_numpy(np.unique(self.training.items.numpy()))

    def whole(self) -> "LearningData":
        """Return a copy that trains on every row. Its holdout is then part of the training rows."""
        return replace(self, end=len(self.rows))


def learning_data(
    interactions: Interactions, *, history: int, holdout: float, items: int | None = None
) -> LearningData:
    """Add histories to the interactions of a training part, and split off the holdout.

    Args:
        interactions: interactions before the boundary only.
        history: length of the users' histories.
        holdout: share of the latest rows for early stopping.
        items: number of items in the catalogue, required if users have texts. The states of the users' texts follow
            those of the items.

    Raises:
        UserError: the training rows or the holdout would be empty.
    """
    profiles = None
    if interactions.profiles is not None and items is not None:
        profiles = torch.from_numpy(np.where(interactions.profiles < 0, -1, interactions.profiles + items)[:, None])
    n, row = len(interactions), round(len(interactions) * (1 - holdout))
    cut = int(np.searchsorted(interactions.times, interactions.times[row])) if row < n else n
    if not 0 < cut < n:
        raise UserError(
            f"train.holdout {holdout:g} splits {n:,} interactions into {cut:,} for training and {n - cut:,} for early "
            "stopping, but both need at least one; change it, or provide more interactions or finer timestamps"
        )
    rows = Clicks(
        items=torch.from_numpy(interactions.items),
        clicked=torch.from_numpy(histories(interactions, length=history, label=1)),
        skipped=torch.from_numpy(histories(interactions, length=history, label=0)),
        labels=torch.from_numpy(interactions.labels),
        profiles=profiles,
    )
    return LearningData(rows=rows, raters=torch.from_numpy(interactions.users), end=cut, start=cut)


def known_states(states: NDArray[np.float32], data: LearningData) -> NDArray[np.float32]:
    """Return the states [m, D] of the known items."""
    return np.asarray(states[data.known.numpy()])

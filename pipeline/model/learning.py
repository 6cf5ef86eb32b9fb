"""What a training may see: interactions before the boundary, and the hidden states of the items in them."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import UserError
from pipeline.interactions import Interactions, histories
from pipeline.model.objective import Clicks


@dataclass(frozen=True)
class LearningData:
    """Interactions of the training part only, cut once more for early stopping.

    Attributes:
        rows: all of them, in the order of time; raters: their users [n].
        end: training takes the rows before this one.
        start: early stopping takes the rows from this one on.
    """

    rows: Clicks
    raters: Tensor
    end: int
    start: int

    @cached_property
    def training(self) -> Clicks:
        """What losses are computed on."""
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
        """Items with interactions in ``training``, ascending: all that a fitted transform may see."""
        return torch.from_numpy(np.unique(self.training.items.numpy()))

    def whole(self) -> "LearningData":
        """The same with every row to train on; the holdout says nothing then."""
        return replace(self, end=len(self.rows))


def learning_data(
    interactions: Interactions, *, history: int, holdout: float, items: int | None = None
) -> LearningData:
    """Prepare the interactions of a training part.

    Args:
        interactions: of the training part; nothing later.
        history: length of the users' histories.
        holdout: share of the latest rows that early stopping gets.
        items: of the catalogue; the states of the users' texts come after those of the items. Needed where there are
            such texts.

    Raises:
        UserError: nothing would be left to train on, or for early stopping.
    """
    profiles = None
    if interactions.profiles is not None and items is not None:
        profiles = torch.from_numpy(np.where(interactions.profiles < 0, -1, interactions.profiles + items)[:, None])
    n, row = len(interactions), round(len(interactions) * (1 - holdout))
    cut = int(np.searchsorted(interactions.times, interactions.times[row])) if row < n else n
    if not 0 < cut < n:
        raise UserError(
            f"train.holdout {holdout:g} leaves {cut:,} of {n:,} interactions to train on and {n - cut:,} for early "
            "stopping, and both need some; change it, or give more interactions or finer timestamps"
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
    """States [m, D] of the known items."""
    return np.asarray(states[data.known.numpy()])

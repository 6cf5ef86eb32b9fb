"""The steps of a training: how many, the rows of each one, and how long the warm-up takes."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marc_pipeline.config import TrainSettings

LEAST_ROWS = 4
"""Number of rows that the unbiased HSIC needs."""
ALONE_STEPS = 100
"""Most steps in which the matching network learns alone."""
VALIDATE_STEPS = 500
"""Most steps between validations: an epoch of many interactions would be too long."""


class _EpochOrder:
    """The order of the rows in an epoch, which depends on the seed and the number of the epoch only.

    A resumed run takes the same batches without replaying earlier epochs.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """Return a permutation of the rows [rows]."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._rows)
        return self._order


@dataclass(frozen=True)
class Steps:
    """The rows of each step on this process. In the first ``alone`` steps, the matching network learns alone."""

    order: _EpochOrder
    batch: int
    accumulate: int
    per_epoch: int
    alone: int
    total: int
    rank: int
    world: int

    def rows(self, step: int) -> list[Tensor]:
        """Return row numbers of the parts of a step, which have about equal sizes.

        All processes have the same number of parts, because each waits for the others. A short step has fewer parts,
        so that each is large enough to estimate HSIC.
        """
        epoch, place = divmod(step, self.per_epoch)
        size = self.batch * self.world * self.accumulate
        chosen = self.order(epoch)[place * size : (place + 1) * size]
        own = chosen[: len(chosen) // self.world * self.world][self.rank :: self.world]
        parts = max(1, min(self.accumulate, len(own) // LEAST_ROWS))
        return [torch.from_numpy(part.copy()) for part in np.array_split(own, parts)]


def plan_steps(
    rows: int, settings: TrainSettings, steps: int | None, *, first: bool, seed: int, rank: int, world: int
) -> Steps:
    """Return the steps of a training; ``first`` tells whether the matching network learns alone at first."""
    size = settings.batch * world * settings.accumulate
    # The last batch of an epoch has at least half the size, because few rows give a noisy estimate of HSIC.
    per_epoch = max(1, round(rows / size))
    alone = min(round(settings.matching_epochs * per_epoch), ALONE_STEPS, settings.max_steps // 2) if first else 0
    if steps is None:
        steps = min(per_epoch * settings.epochs, settings.max_steps - alone)
    order = _EpochOrder(rows, seed)
    return Steps(order, settings.batch, settings.accumulate, per_epoch, alone, alone + steps, rank, world)


def warm_up_steps(settings: TrainSettings, plan: Steps) -> int:
    """Return the steps of a warm-up: ``train.warm_up`` epochs, at most half of the training.

    It counts in epochs, so that a training of other length starts in the same way.
    """
    return max(1, min(round(settings.warm_up * plan.per_epoch), VALIDATE_STEPS, plan.total // 2))

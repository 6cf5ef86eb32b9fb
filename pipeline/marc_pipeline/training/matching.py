"""Matching networks: map user and item vectors to the logit of a click. Training uses them; encoding does not."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = "matching.safetensors"


class CrossingNetwork(nn.Module):
    """Crosses every user vector u with the item z: [z, u, u·z, |u − z|, …] → hidden → state s → logit.

    Its structure differs from the compressor's, as in the paper.

    Args:
        dim: d.
        users: number of vectors per user.
        hidden: width of both layers; the output of the second layer is the state s.
        dropout: dropout between the layers.
    """

    def __init__(self, *, dim: int, users: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear((1 + 3 * users) * dim, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.logit = nn.Linear(hidden, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, item: Tensor, users: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits [b] and states [b, hidden] of items [b, d] and user vectors, each [b, d]."""
        crossed = [part for u in users for part in (u, u * item, (u - item).abs())]  # 3 · users times [b, d]
        state = functional.relu(self.second(self.dropout(functional.relu(self.first(torch.cat([item, *crossed], 1))))))
        return self.logit(state).squeeze(1), state


class ResidualNetwork(nn.Module):
    """A linear path and a normalised residual branch over [z, u, …], as in the compressor. This is the default.

    In the project's evaluation, vectors trained with it are better than those trained with the crossing network.
    Arguments are those of :class:`CrossingNetwork`; the dropout is in the residual branch.
    """

    def __init__(self, *, dim: int, users: int, hidden: int, dropout: float) -> None:
        super().__init__()
        width = (1 + users) * dim
        self.linear = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        self.logit = nn.Linear(hidden, 1)

    def forward(self, item: Tensor, users: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return logits [b] and states [b, hidden] of items [b, d] and user vectors, each [b, d]."""
        pair = torch.cat([item, *users], dim=1)  # [b, (1 + users) · d]
        state = self.linear(pair) + self.down(self.dropout(functional.gelu(self.up(self.norm(pair)))))
        return self.logit(state).squeeze(1), state


NETWORKS: Mapping[str, type[CrossingNetwork | ResidualNetwork]] = {
    "crossing": CrossingNetwork,
    "residual": ResidualNetwork,
}

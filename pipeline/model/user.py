"""The user side: what a user did lately, or a text about them, as one vector in the space of the items' vectors."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class HistoryPooling(nn.Module):
    """Attention of a candidate item over a user's earlier items: p = Σ_j softmax_j(⟨Q z_i, z_j⟩ / d) z_j.

    Q begins as the identity: at first, items like the candidate count most. Vectors have length √d, so that
    ⟨z_i, z_j⟩ / d is their cosine.

    Args:
        dim: d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, candidates: Tensor, vectors: Tensor, history: Tensor) -> Tensor:
        """Pooled vectors [b, d] of candidates [b, d] over rows of vectors [m, d] that history [b, k] names; −1: none.

        A user without a history has a learned vector.
        """
        present = history >= 0
        keys = functional.embedding(history.clamp(min=0), vectors)
        scores = torch.bmm(keys, self.query(candidates).unsqueeze(-1)).squeeze(-1) / candidates.shape[1]
        weights = torch.softmax(scores.masked_fill(~present, -1e4), dim=1) * present
        pooled = torch.bmm(weights.unsqueeze(1), keys).squeeze(1)
        return pooled + self.nothing * ~present.any(dim=1, keepdim=True)

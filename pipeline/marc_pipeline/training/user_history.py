"""User vectors: attention pooling of a user's recent items, or of a text about the user, to one vector."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class HistoryPooling(nn.Module):
    """Attention of a candidate item over a user's earlier items: p = Σ_j softmax_j(⟨Q z_i, z_j⟩ / d) z_j.

    Q is initialised as the identity, so that items similar to the candidate weigh most. Vectors have length √d, so
    that ⟨z_i, z_j⟩ / d is their cosine.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.query.weight)
        self.nothing = nn.Parameter(torch.zeros(dim))

    def forward(self, candidates: Tensor, vectors: Tensor, history: Tensor) -> Tensor:
        """Return one pooled vector per user [b, d]; a user without a history gets a learned vector.

        Args:
            candidates: item vectors [b, d].
            vectors: vectors [m, d] of all items in the batch.
            history: row numbers [b, k] in ``vectors``; −1 is padding.
        """
        present = history >= 0
        keys = functional.embedding(history.clamp(min=0), vectors)  # [b, k, d]
        scores = torch.bmm(keys, self.query(candidates).unsqueeze(-1)).squeeze(-1) / candidates.shape[1]  # [b, k]
        weights = torch.softmax(scores.masked_fill(~present, -1e4), dim=1) * present
        pooled = torch.bmm(weights.unsqueeze(1), keys).squeeze(1)
        return pooled + self.nothing * ~present.any(dim=1, keepdim=True)

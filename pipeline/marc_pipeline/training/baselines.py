"""Baseline objectives that MARC is compared with: an autoencoder, a matryoshka loss and a contrastive loss."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from marc_pipeline.training.objective import Clicks, ItemStates, Objective, distinct, mean_of, scaled

TEMPERATURE = 0.07
NESTED = (1, 2, 4, 8)


class Autoencoder(Objective):
    """loss = mean of (decode(compress(h)) − h)² over the items of a batch, h standardised.

    The mean and the deviation of ``states`` [n, D], those of the training part's items, standardise h. ``hidden`` is
    the width of the decoder.
    """

    def __init__(self, source: ItemStates, compressor: nn.Module, *, states: Tensor, dim: int, hidden: int) -> None:
        super().__init__(source, compressor)
        self.decoder = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, states.shape[1]))
        self.register_buffer("mean", states.mean(dim=0), persistent=False)
        self.register_buffer("std", states.std(dim=0).clamp(min=1e-6), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """Return the loss."""
        items = torch.unique(batch.items)
        return {"loss": self._error(self.source(items, torch.ones_like(items, dtype=torch.bool)))}

    @torch.no_grad()
    def validate(self, batch: Clicks) -> float:
        """Return minus the loss on held-out interactions, in evaluation mode."""
        mode = self.training
        self.eval()
        error = self(batch)["loss"]
        self.train(mode)
        return -float(error)

    def _error(self, hidden: Tensor) -> Tensor:
        wanted = (hidden - self.mean) / self.std
        return functional.mse_loss(self.decoder(self.compressor(hidden)), wanted)


class TwoTower(Objective):
    """Base class of objectives that score an item by its cosine with the mean of the user's clicks."""

    def score(self, vectors: Tensor, batch: Clicks) -> Tensor:
        """Return the cosines [b] of items and means of clicks."""
        return functional.cosine_similarity(vectors[batch.items], mean_of(scaled(vectors), batch.clicked))

    def _towers(self, batch: Clicks) -> tuple[Tensor, Tensor]:
        """Return item vectors [b, d] and means of the clicks [b, d]."""
        items, candidate, local = distinct(batch)
        vectors = scaled(self.compressor(self.source(items, candidate)))  # [m, d]
        return functional.embedding(local.items, vectors), mean_of(vectors, local.clicked)


class Matryoshka(TwoTower):
    """loss = mean over m ∈ {d, d/2, d/4, d/8} of BCE(click, a_m · cos(u[:m], z[:m]) + b_m).

    Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022 (arXiv 2205.13147).
    """

    def __init__(self, source: ItemStates, compressor: nn.Module, *, dim: int) -> None:
        super().__init__(source, compressor)
        self.sizes = [dim // share for share in NESTED if dim // share]
        self.scale = nn.Parameter(torch.ones(len(self.sizes)))
        self.bias = nn.Parameter(torch.zeros(len(self.sizes)))

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """Return the loss."""
        items, users = self._towers(batch)
        losses = [
            batch.click_loss(scale * functional.cosine_similarity(users[:, :size], items[:, :size]) + bias)
            for size, scale, bias in zip(self.sizes, self.scale, self.bias, strict=True)
        ]
        return {"loss": torch.stack(losses).mean()}


class Contrastive(TwoTower):
    """loss = −log softmax of cos(u, z) / τ over the batch's clicked items, at the item that the user clicked.

    InfoNCE with in-batch negatives: van den Oord et al. 2018 (arXiv 1807.03748). Another row with the same item is
    not a negative.
    """

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """Return the loss; 0 if the batch has fewer than two clicks of users with a history."""
        rows = torch.nonzero((batch.labels > 0) & (batch.clicked[:, 0] >= 0)).squeeze(1)
        clicks = batch[rows]
        if len(clicks) < 2:
            return {"loss": torch.stack([p.sum() * 0.0 for p in self.compressor.parameters()]).sum()}
        items, users = self._towers(clicks)
        cosines = functional.normalize(users, dim=-1) @ functional.normalize(items, dim=-1).T
        same = clicks.items[:, None] == clicks.items
        same.fill_diagonal_(fill_value=False)
        logits = (cosines / TEMPERATURE).masked_fill(same, -torch.inf)
        return {"loss": functional.cross_entropy(logits, torch.arange(len(clicks), device=logits.device))}

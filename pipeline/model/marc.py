"""MARC: compressor and matching network with separate duties, held apart by HSIC constraints.

Xi et al., Modular Representation Compression, SIGIR 2026 (arXiv 2604.18146). The authors' code is not public: where
this is more exact than the paper, it is this project's choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.hsic import Estimator, Kernel, nhsic
from pipeline.model.matching import CrossingNetwork, ResidualNetwork
from pipeline.model.objective import Clicks, Objective, Source, distinct, scaled
from pipeline.model.user import HistoryPooling


@dataclass(frozen=True)
class Constraints:
    """Weights and estimators of the two information constraints.

    Attributes:
        keep: α, of nHSIC(h, z): z keeps what h holds.
        decouple: β, of nHSIC(z, s): the matching network's state is not a copy of z.
        rows: at most so many samples go into an estimate.
    """

    keep: float
    decouple: float
    kernel: Kernel = "linear"
    estimator: Estimator = "biased"
    rows: int = 512


class Marc(Objective):
    """loss = BCE(click, m(z_u, z_i)) − α · nHSIC(h, z) + β · nHSIC(z, s).

    A user is two vectors: attention over what they clicked lately, and over what they rated without a click; and where
    users have texts, a third: that of the text, from the same backbone and compressor.

    Args:
        source: states of items.
        compressor: from h [n, D] to z [n, d].
        matching: from item and user vectors to logits and states s.
        dim: d.
        constraints: weights and estimators of the nHSIC terms.
        profiles: whether users have texts.
    """

    USERS = 2

    def __init__(
        self,
        source: Source,
        compressor: nn.Module,
        matching: CrossingNetwork | ResidualNetwork,
        *,
        dim: int,
        constraints: Constraints,
        profiles: bool = False,
    ) -> None:
        super().__init__(source, compressor)
        self.matching = matching
        self.clicked = HistoryPooling(dim)
        self.skipped = HistoryPooling(dim)
        # A text is a history of one: only a user without any needs something learned.
        self.profile = HistoryPooling(dim) if profiles else None
        self.constraints = constraints

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """``loss`` and its terms: ``click`` (BCE, nats), ``keep`` and ``decouple`` (nHSIC) where weighed."""
        items, candidate, places = distinct(batch)
        b, k = batch.clicked.shape
        hidden = self.source(items, candidate)
        vectors = scaled(self.compressor(hidden))
        clicked, skipped = places[b : b + 2 * b * k].view(2, b, k)
        profiles = None
        if batch.profiles is not None:
            profiles = places[b + 2 * b * k :].view(b, 1).masked_fill(batch.profiles < 0, -1)
        among = Clicks(
            places[:b],
            clicked.masked_fill(batch.clicked < 0, -1),
            skipped.masked_fill(batch.skipped < 0, -1),
            batch.labels,
            profiles,
        )
        logits, states, chosen = self._match(vectors, among)
        terms = {"click": functional.binary_cross_entropy_with_logits(logits, batch.labels)}
        loss, wanted = terms["click"], self.constraints
        if wanted.keep:
            rows = torch.randperm(len(items), device=items.device)[: wanted.rows]
            terms["keep"] = self._dependence(hidden[rows], vectors[rows])
            loss = loss - wanted.keep * terms["keep"]
        if wanted.decouple:
            terms["decouple"] = self._dependence(chosen[: wanted.rows], states[: wanted.rows])
            loss = loss + wanted.decouple * terms["decouple"]
        return {"loss": loss, **terms}

    def score(self, vectors: Tensor, batch: Clicks) -> Tensor:
        """Logits [b]."""
        return self._match(scaled(vectors), batch)[0]

    def _match(self, vectors: Tensor, batch: Clicks) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [b], states [b, s] and item vectors [b, d]; the batch names rows of vectors [m, d]."""
        chosen = functional.embedding(batch.items, vectors)
        users = [self.clicked(chosen, vectors, batch.clicked), self.skipped(chosen, vectors, batch.skipped)]
        if self.profile is not None and batch.profiles is not None:
            users.append(self.profile(chosen, vectors, batch.profiles))
        logits, states = self.matching(chosen, users)
        return logits, states, chosen

    def _dependence(self, x: Tensor, y: Tensor) -> Tensor:
        return nhsic(x, y, kernel=self.constraints.kernel, estimator=self.constraints.estimator)

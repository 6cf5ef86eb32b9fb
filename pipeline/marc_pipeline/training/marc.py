"""The MARC objective: a click loss with HSIC constraints that separate the compressor from the matching network.

Xi et al., Modular Representation Compression, SIGIR 2026 (arXiv 2604.18146). The authors' code is not public. Details
that the paper leaves open are this project's choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from marc_pipeline.training.hsic import Estimator, Kernel, nhsic
from marc_pipeline.training.matching import CrossingNetwork, ResidualNetwork
from marc_pipeline.training.objective import Clicks, ItemStates, Objective, distinct, scaled
from marc_pipeline.training.user_history import HistoryPooling


@dataclass(frozen=True)
class Constraints:
    """Weights and estimators of the two information constraints.

    Attributes:
        keep: α, weight of nHSIC(h, z), which keeps the information of h in z.
        decouple: β, weight of nHSIC(z, s), which keeps the matching network's state from copying z.
        kernel: kernel of both estimates.
        estimator: estimator of both estimates.
        rows: maximum number of samples in an estimate.
    """

    keep: float
    decouple: float
    kernel: Kernel = "linear"
    estimator: Estimator = "biased"
    rows: int = 512


class Marc(Objective):
    """loss = BCE(click, m(z_u, z_i)) − α · nHSIC(h, z) + β · nHSIC(z, s).

    Two vectors represent a user: attention over recently clicked items, and over recent items without a click. If users
    have texts (``profiles``), the text's vector from the same backbone and compressor is a third. ``matching`` maps
    item and user vectors to logits and states s.
    """

    USERS = 2

    def __init__(
        self,
        source: ItemStates,
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
        # A text is treated as a history of length 1; a user without a text gets the learned vector.
        self.profile = HistoryPooling(dim) if profiles else None
        self.constraints = constraints

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        """Return ``loss`` and its terms: ``click`` (BCE, nats), and ``keep`` and ``decouple`` (nHSIC) if weighted."""
        items, candidate, local = distinct(batch)
        hidden = self.source(items, candidate)  # [m, D]
        vectors = scaled(self.compressor(hidden))  # [m, d]
        logits, states, chosen = self._match(vectors, local)
        terms = {"click": batch.click_loss(logits)}
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
        """Return the logits [b]."""
        return self._match(scaled(vectors), batch)[0]

    def _match(self, vectors: Tensor, batch: Clicks) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [b], states [b, s] and item vectors [b, d]; batch entries are row numbers of ``vectors``."""
        chosen = functional.embedding(batch.items, vectors)
        users = [self.clicked(chosen, vectors, batch.clicked), self.skipped(chosen, vectors, batch.skipped)]
        if self.profile is not None and batch.profiles is not None:
            users.append(self.profile(chosen, vectors, batch.profiles))
        logits, states = self.matching(chosen, users)
        return logits, states, chosen

    def _dependence(self, x: Tensor, y: Tensor) -> Tensor:
        return nhsic(x, y, kernel=self.constraints.kernel, estimator=self.constraints.estimator)

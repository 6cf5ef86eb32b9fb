"""Comparison of a candidate bundle with its rivals, for the promotion gate."""

import math

from pydantic import Field

from marc_schemas.evaluation import SystemScore
from marc_schemas.files import Contract


class BundleComparison(Contract):
    """Scores of a candidate bundle and of its rivals, on the same split with the same seeds.

    The rivals are the current bundle, the PCA of the candidate's layer and the PCA of the final layer. The validation
    part decides. The test part is reported, and decides nothing.

    Attributes:
        candidate, current: bundle versions; ``current`` is None before the first promotion.
        validation_auc: mean validation AUC over seeds, by system: ``bundle:VERSION``, ``pca-layer-N``, ``random``.
        auc: mean test AUC over seeds, by system.
        tolerance: validation AUC by which the candidate may be worse than the best rival.
        best: system with the highest validation AUC, random vectors excluded.
        replacement: version of the bundle that is promoted instead, because its PCA is better; empty without one.
        beats_random: whether any system is better than random vectors, by the interval over validation users.
        scores: one per system and seed.
        problems: reasons against the promotion of the candidate; empty if the gate passes it.
    """

    training_id: str
    candidate: str
    current: str | None
    validation_auc: dict[str, float] = Field(default_factory=dict)
    auc: dict[str, float] = Field(default_factory=dict)
    tolerance: float
    best: str = ""
    replacement: str = ""
    beats_random: bool = True
    scores: list[SystemScore]
    problems: list[str]

    @property
    def candidate_auc(self) -> float:
        """Return the candidate's mean validation AUC; NaN if it was not evaluated."""
        return self.validation_auc.get(f"bundle:{self.candidate}", math.nan)

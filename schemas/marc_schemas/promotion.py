"""Comparison of a candidate bundle with the current one, for the promotion gate."""

from marc_schemas.evaluation import SystemScore
from marc_schemas.files import Contract


class BundleComparison(Contract):
    """Scores of a candidate bundle and of the current bundle, on the same split with the same seeds.

    Attributes:
        candidate, current: bundle versions; ``current`` is None before the first promotion.
        auc, current_auc: mean test AUC over seeds.
        tolerance: AUC by which the candidate may be worse.
        scores: scores of both bundles.
        problems: reasons against the promotion; empty if the gate passes.
    """

    training_id: str
    candidate: str
    current: str | None
    auc: float
    current_auc: float | None
    tolerance: float
    scores: list[SystemScore]
    problems: list[str]

"""The comparison of a candidate bundle with the current one, which the promotion gate reads."""

from marc_schemas.evaluation import SystemScore
from marc_schemas.files import Contract


class BundleComparison(Contract):
    """A candidate bundle beside the current one, on the same split with the same seeds.

    Attributes:
        candidate, current: versions; no current one before the first promotion.
        auc, current_auc: mean test AUC over seeds.
        tolerance: that the candidate may fall behind.
        scores: all of them.
        problems: why the candidate may not be promoted; empty when it may.
    """

    training_id: str
    candidate: str
    current: str | None
    auc: float
    current_auc: float | None
    tolerance: float
    scores: list[SystemScore]
    problems: list[str]

"""What a training run leaves behind: the bundle it made, how it went, and whether the bundle was promoted."""

from pydantic import Field

from schemas.evaluation import SystemScore
from schemas.files import Contract


class TrainingRun(Contract):
    """A finished training.

    Attributes:
        training_id: the training set; run_id: that and the settings.
        bundle: version of the bundle that it made.
        layers: blocks that the bundle keeps; layer_auc: mean AUC of every layer within the training part, where the
            layer was chosen by it.
        history: one row per validation: epoch, step, loss terms, validation AUC.
    """

    training_id: str
    run_id: str
    bundle: str
    layers: int
    layer_auc: dict[int, float] = Field(default_factory=dict)
    history: list[dict[str, float]]


class Comparison(Contract):
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

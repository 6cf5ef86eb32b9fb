"""The judgement of a model's layers: metrics, downstream AUC and cost of every layer, and the layer to keep."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from marc_schemas.bundle import Pooling
from marc_schemas.files import Contract

Basis = Literal["clicks", "metrics"]
Decision = Literal["configuration", "adopted", "clicks", "all"]
"""What decides how many layers a bundle keeps: a person's file, an adopted report, the training part; or none does."""


class JudgedLayer(Contract):
    """One layer of one model.

    Attributes:
        layer: blocks behind it, 0 for the embeddings.
        depth: layer / layers of the model.
        metrics: by name; NaN where it is undefined.
        seconds: of one worker for 1,000 texts or images, up to here.
        weights_bytes: of the model truncated here, in the type that it was run in.
        test_auc: of the click model on the layer's whitened PCA, fitted on the training part, one per seed; empty
            without interactions.
        fold_auc: what the choice goes by: AUC within the training part, one per group of users; empty for layer 0,
            which cannot be kept, and without interactions.
    """

    layer: int = Field(ge=0)
    depth: float
    metrics: dict[str, float]
    seconds: float
    weights_bytes: int
    test_auc: list[float] = Field(default_factory=list)
    fold_auc: list[float] = Field(default_factory=list)


class MetricChoice(Contract):
    """What a metric would choose, and what that costs.

    Attributes:
        metric: its name.
        better: which end of it is taken for the better one.
        layer: where it is best, among the layers that can be kept; None where it is undefined.
        correlation: Spearman's, with the mean test AUC over all layers; None without interactions or variation.
        lost_auc: mean test AUC of the best layer that can be kept minus that of this one; None without interactions.
    """

    metric: str
    better: Literal["high", "low"]
    layer: int | None
    correlation: float | None = None
    lost_auc: float | None = None


class Recommendation(Contract):
    """Where to cut a backbone, and how to pool.

    Attributes:
        layers: blocks to keep.
        basis: ``clicks`` where interactions chose, else ``metrics``.
        reason: one sentence.
    """

    backbone: str
    layers: int = Field(ge=1)
    pooling: Pooling
    basis: Basis
    reason: str


class JudgedModel(Contract):
    """Every layer of one backbone under one pooling.

    Attributes:
        sweep_id: names backbone, pooling, texts and settings.
        backbone: name of the model; layers: its blocks; width: D.
        pooling, max_tokens, dtype, device: how they were run; images have no max_tokens.
        inputs: texts or images that were judged; left_out: those that could not be run, with the reason of one.
        judged: layer by layer, the embeddings first.
        choices: of every metric.
        keep: layer to keep under this pooling; basis: what chose it.
    """

    sweep_id: str
    backbone: str
    layers: int
    width: int
    pooling: Pooling
    max_tokens: int = 0
    dtype: str
    device: str
    inputs: int
    left_out: int = 0
    left_out_because: str = ""
    judged: list[JudgedLayer]
    choices: list[MetricChoice] = Field(default_factory=list)
    keep: int | None = None
    basis: Basis | None = None


class LayerReport(Contract):
    """What a sweep found; pages and plots are drawn from this alone.

    Attributes:
        report_id: names all that went in.
        kind: what was judged.
        ds: date of the catalogue; empty for images.
        dim: d of the PCA behind the test AUC; 0 without interactions.
        sample, views, probability, block, order, temperature: settings of the metrics.
        models: one per backbone and pooling.
        recommendations: one per backbone.
        findings: one sentence each.
    """

    report_id: str
    kind: Literal["texts", "images"] = "texts"
    ds: str
    dim: int
    sample: int
    views: int
    probability: float
    block: int
    order: float
    temperature: float
    models: list[JudgedModel]
    recommendations: list[Recommendation]
    findings: list[str]


class Adopted(Contract):
    """The recommendation that somebody reviewed and made the default of trainings with its backbone.

    Attributes:
        recommendation: layers and pooling.
        report_id: where it comes from.
        ds: date of the catalogue that it was found on.
        adopted_at: when.
    """

    recommendation: Recommendation
    report_id: str
    ds: str
    adopted_at: datetime

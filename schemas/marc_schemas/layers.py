"""Report on the layers of a model: metrics, downstream AUC and cost of every layer, and the layer to keep."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from marc_schemas.bundle import Pooling
from marc_schemas.files import Contract

Basis = Literal["clicks", "metrics"]
Decision = Literal["configuration", "adopted", "clicks", "all"]
"""Basis for the number of layers: the configuration, an adopted report, AUC within the training part, or none (all)."""


class JudgedLayer(Contract):
    """One layer of one model.

    Attributes:
        layer: number of blocks up to this layer, 0 for the embeddings.
        depth: ``layer`` divided by the layers of the model.
        metrics: values by name; NaN where a metric is undefined.
        seconds: time of one worker for 1,000 texts or images up to this layer.
        weights_bytes: size of the model truncated at this layer, in the number type that it ran in.
        test_auc: AUC of the click model on the layer's whitened PCA, fitted on the training part, one per seed; empty
            without interactions.
        fold_auc: AUC within the training part, one per group of users, which the choice is based on. A layer that left
            the search early has fewer; empty without interactions.
    """

    layer: int = Field(ge=0)
    depth: float
    metrics: dict[str, float]
    seconds: float
    weights_bytes: int
    test_auc: list[float] = Field(default_factory=list)
    fold_auc: list[float] = Field(default_factory=list)


class MetricChoice(Contract):
    """Layer that a metric would choose, and the AUC that this choice loses.

    Attributes:
        metric: name of the metric.
        better: whether high or low values count as better.
        layer: best layer, embeddings excluded; None where the metric is undefined.
        correlation: Spearman's correlation with the mean test AUC over all layers; None without interactions or
            variation.
        lost_auc: mean test AUC of the best layer, embeddings included, minus that of this layer; None without
            interactions.
    """

    metric: str
    better: Literal["high", "low"]
    layer: int | None
    correlation: float | None = None
    lost_auc: float | None = None


class Recommendation(Contract):
    """Recommended number of layers and pooling of a backbone.

    Attributes:
        layers: number of blocks to keep.
        basis: ``clicks`` for a choice by interactions, else ``metrics``.
        reason: one sentence.
    """

    backbone: str
    layers: int = Field(ge=0)
    pooling: Pooling
    basis: Basis
    reason: str


class JudgedModel(Contract):
    """Every layer of one backbone under one pooling.

    Attributes:
        sweep_id: digest of backbone, pooling, texts and settings.
        backbone: name of the backbone; ``layers`` is its number of blocks, ``width`` its dimension D.
        pooling, max_tokens, dtype, device: how the model ran; images have no max_tokens.
        inputs: number of texts or images.
        left_out: number of inputs that failed; ``left_out_because`` is the reason of one of them.
        judged: one entry per layer, the embeddings first.
        choices: one entry per metric.
        random_auc: AUC of random vectors within the training part, one per group of users; empty without interactions.
        keep: layer to keep under this pooling; None if no layer beats random vectors or no metric is defined.
            ``basis`` is the basis of the choice.
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
    random_auc: list[float] = Field(default_factory=list)
    keep: int | None = None
    basis: Basis | None = None


class LayerReport(Contract):
    """Result of a comparison of layers; pages and plots need no other input.

    Attributes:
        report_id: digest of all inputs.
        kind: kind of the inputs.
        ds: date of the catalogue; empty for images.
        dim: dimension d of the PCA for the test AUC; 0 without interactions.
        sample, views, probability, block, order, temperature: settings of the metrics.
        models: one entry per backbone and pooling.
        recommendations: one entry per backbone.
        findings: results as sentences.
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
    """A recommendation that a user adopted; trainings with its backbone use it by default.

    Attributes:
        recommendation: layers and pooling.
        report_id: report with the recommendation.
        ds: date of the report's catalogue.
        adopted_at: time of the adoption.
    """

    recommendation: Recommendation
    report_id: str
    ds: str
    adopted_at: datetime

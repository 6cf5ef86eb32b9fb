"""Evaluation: what the yardstick measured for every system, dimension and seed, and what follows from it."""

from typing import Literal

from pydantic import Field

from marc_schemas.files import Contract
from marc_schemas.layers import Decision

Family = Literal["reference", "layer", "baseline", "ablation", "marc", "bundle"]


class SystemScore(Contract):
    """One system at one dimension with one seed, as the click model that read its vectors scored.

    Attributes:
        system: identifier, for example ``pca-layer-3``, ``marc``.
        family: what the system is compared as; ``reference`` systems (ID embeddings alone, random vectors, full-width
            final layer) are no rivals at the same dimension.
        layer: block whose hidden state the vectors come from, 0 for the embeddings; None where there is none.
        dim: numbers per vector, 0 for none.
        seed: of the click model and of the training of the vectors.
        auc: area under the ROC curve on the test tenth; cold_auc: on its items with fewer than five training ratings;
            warm_auc: on the others. NaN where those rows are none or all of one label.
        log_loss: on the test tenth, nats.
        validation_auc: of the chosen epoch.
        epoch: the chosen epoch of the click model, from 1.
        train_seconds: to fit or train the vectors; score_seconds: to train the click model.
    """

    system: str
    family: Family
    layer: int | None
    dim: int = Field(ge=0)
    seed: int
    auc: float
    cold_auc: float
    warm_auc: float
    log_loss: float
    validation_auc: float
    epoch: int
    train_seconds: float
    score_seconds: float


class Summary(Contract):
    """Mean and sample standard deviation over seeds of one system at one dimension; the deviation of one seed is NaN.

    Attributes:
        bytes_per_item: of the vector as float32.
        compared_with: the comparison system at the same dimension; for a reference system whose dimension it lacks, at
            its largest one. None, as are the figures below, for the comparison system itself and where there is none.
        difference: mean over common seeds of test AUC minus the comparison system's with the same seed.
        low, high: 95 % interval of that mean (Student's t over seeds); None with fewer than two seeds.
        p_value: paired t-test, two-sided; None with fewer than two seeds.
        cold_difference: as ``difference``, of the AUC on cold items.
        user_low, user_high: 95 % interval of the difference when the test users are drawn anew (bootstrap by user
            of the predictions averaged over seeds): how far the figure depends on who happened to be in the test.
        train_seconds: mean over seeds.
    """

    system: str
    family: Family
    layer: int | None
    dim: int
    seeds: int
    auc: float
    auc_std: float
    cold_auc: float
    cold_auc_std: float
    warm_auc: float
    log_loss: float
    log_loss_std: float
    bytes_per_item: int
    compared_with: str | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    cold_difference: float | None = None
    user_low: float | None = None
    user_high: float | None = None
    train_seconds: float


class Evaluation(Contract):
    """Everything one evaluation found; the report is drawn from this alone.

    Attributes:
        training_id: of the training set: catalogue texts, interactions, backbone.
        backbone: name of the model whose layers were judged; layers: its blocks; width: D.
        rows: interactions in training, validation and test part; cold_rows: test rows of cold items.
        chosen_layer: that systems read; decision: what chose it.
        findings: one sentence each: what came out, in words and figures.
    """

    training_id: str
    backbone: str
    layers: int
    width: int
    users: int
    items: int
    rows: tuple[int, int, int]
    cold_rows: int
    chosen_layer: int
    decision: Decision = "clicks"
    scores: list[SystemScore]
    summaries: list[Summary]
    findings: list[str]

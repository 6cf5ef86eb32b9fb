"""Evaluation: click-model scores of every system, dimension and seed, their means and the findings."""

import math
from typing import Literal

from pydantic import Field

from marc_schemas.files import Contract
from marc_schemas.layers import Decision

Family = Literal["reference", "layer", "baseline", "ablation", "marc", "bundle"]


class SystemScore(Contract):
    """Score of the click model on the vectors of one system, at one dimension with one seed.

    Attributes:
        system: identifier, for example ``pca-layer-3``, ``marc``.
        family: group of the system; ``reference`` systems (ID embeddings alone, random vectors, full-width final
            layer) do not compete at the same dimension.
        layer: block whose hidden state the vectors come from, 0 for the embeddings; None for other vectors.
        dim: dimension of the vectors, 0 for none.
        seed: seed of the click model and of the training of the vectors.
        auc: area under the ROC curve on the test part, the last tenth of the ratings.
        cold_auc, warm_auc: AUC on test items with fewer than five training ratings, and on the others; NaN where an
            AUC is undefined, because there are no rows or only one label.
        log_loss: log loss on the test part, in nats.
        validation_auc: validation AUC of the chosen epoch.
        epoch: the chosen epoch of the click model, from 1.
        recall, ndcg: Recall@10 and NDCG@10 of the test part's positives by the click model among all items; NaN for
            ratings, which do not tell what a user would have taken.
        lookup_recall: Recall@10 of a look-up with the mean vector of the user's history; NaN for ratings.
        train_seconds: time to fit or train the vectors.
        score_seconds: time to train the click model.
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
    recall: float = math.nan
    ndcg: float = math.nan
    lookup_recall: float = math.nan
    train_seconds: float
    score_seconds: float


class Summary(Contract):
    """Mean and sample standard deviation over seeds of one system at one dimension; the deviation of one seed is NaN.

    Attributes:
        bytes_per_item: size of a float32 vector.
        compared_with: the comparison system at the same dimension; at its largest dimension for a reference system
            without a counterpart. The comparison system itself has None here and in the figures below, and so has
            every system when there is no comparison system.
        difference: mean over common seeds of the test AUC minus that of the comparison system.
        low, high: 95 % interval of that mean (Student's t over seeds); None with fewer than two seeds.
        p_value: two-sided paired t-test; None with fewer than two seeds.
        cold_difference: ``difference`` of the AUC on cold items.
        user_low, user_high: 95 % interval of the difference over test users, by a bootstrap by user of the predictions
            averaged over seeds.
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
    recall: float = math.nan
    recall_std: float = math.nan
    ndcg: float = math.nan
    lookup_recall: float = math.nan
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
    """Result of one evaluation; the report needs no other input.

    Attributes:
        training_id: id of the training set: catalogue texts, interactions, backbone.
        backbone: name of the backbone; ``layers`` is its number of blocks, ``width`` its dimension D.
        rows: number of interactions in the training, validation and test part.
        cold_rows: number of test rows of cold items.
        negatives: where the rows without a click come from.
        chosen_layer: layer that the systems read.
        decision: basis of that choice.
        findings: results as sentences with figures.
    """

    training_id: str
    backbone: str
    layers: int
    width: int
    users: int
    items: int
    rows: tuple[int, int, int]
    cold_rows: int
    negatives: str = ""
    chosen_layer: int
    decision: Decision = "clicks"
    scores: list[SystemScore]
    summaries: list[Summary]
    findings: list[str]

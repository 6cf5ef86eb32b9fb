"""Records of a training in the work area: the card of its training set, and the finished run."""

from typing import Literal

from pydantic import Field

from marc_schemas.bundle import LongTexts, Pooling
from marc_schemas.files import Contract, PublishedFile

FORMAT_VERSION: Literal[2] = 2


class TrainingSetCard(Contract):
    """Content of training_set.json: a training set with the pooled hidden states of every layer of one backbone.

    The card is written last, so that a folder with a card is complete.

    Attributes:
        training_id: digest of all inputs, and name of the folder.
        ds: date of the catalogue.
        template: text template of the items, with the version of the cleaning rules.
        backbone: name of the backbone; ``layers`` is its number of blocks, ``width`` its dimension D.
        pooling, max_tokens: how a text became one vector per layer.
        long_texts: whether texts beyond ``max_tokens`` were cut or pooled.
        dtype, device: number type and device of the computation.
        boundaries: times of the first row of the validation part and of the test part, microseconds since 1970.
        items, users, interactions, clicks: counts.
        implicit: whether the interactions are positives only, so that negatives must be sampled.
        files: files by name, relative to the folder.
    """

    format_version: Literal[2] = FORMAT_VERSION
    training_id: str
    ds: str
    template: str
    backbone: str
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    pooling: Pooling
    max_tokens: int
    long_texts: LongTexts = "cut"
    dtype: str
    device: str
    boundaries: tuple[int, int]
    items: int
    users: int
    interactions: int
    clicks: int
    implicit: bool
    files: dict[str, PublishedFile]


class TrainingRun(Contract):
    """A finished training.

    Attributes:
        training_id: id of the training set.
        run_id: digest of the training set and the settings.
        bundle: version of the resulting bundle.
        layers: number of blocks of the bundle.
        keep, decouple: weights α and β of the constraints.
        epochs: chosen number of passes over the training part; None if early stopping ended the training.
        layer_auc: mean AUC of every layer within the training part, if the layer was chosen by it.
        history: one row per validation: epoch, step, loss terms, validation AUC.
    """

    training_id: str
    run_id: str
    bundle: str
    layers: int
    keep: float = 0.0
    decouple: float = 0.0
    epochs: int | None = None
    layer_auc: dict[int, float] = Field(default_factory=dict)
    history: list[dict[str, float]]

"""What a training leaves in the work area: the card of its training set, and the run with the bundle it made."""

from typing import Literal

from pydantic import Field

from marc_schemas.bundle import Pooling
from marc_schemas.files import Contract, PublishedFile

FORMAT_VERSION: Literal[1] = 1


class TrainingSetCard(Contract):
    """training_set.json: items with texts, interactions, and pooled hidden states of every layer of one backbone.

    It is written last: a folder that has a card is complete.

    Attributes:
        training_id: names all that went in; the folder's name.
        ds: date of the catalogue.
        template: text template of the items.
        backbone: name of the model; layers: its blocks; width: D.
        pooling, max_tokens: how a text became one vector per layer.
        dtype, device: what computed the states.
        items, users, interactions, clicks: counts.
        files: by name, relative to the folder.
    """

    format_version: Literal[1] = FORMAT_VERSION
    training_id: str
    ds: str
    template: str
    backbone: str
    layers: int = Field(ge=1)
    width: int = Field(ge=1)
    pooling: Pooling
    max_tokens: int
    dtype: str
    device: str
    items: int
    users: int
    interactions: int
    clicks: int
    files: dict[str, PublishedFile]


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

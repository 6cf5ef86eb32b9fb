"""training_set.json: what a training set was made from; written last, so that the folder is whole."""

from typing import Literal

from pydantic import Field

from schemas.bundle import Pooling
from schemas.files import Contract, PublishedFile

FORMAT_VERSION: Literal[1] = 1


class TrainingSetCard(Contract):
    """Items with their texts, interactions, and the pooled hidden states of every layer of one backbone.

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

"""The settings of a training: overrides, and the decision about layers and pooling."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from marc_pipeline.config import Settings, TrainSettings, describe
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.storage import join
from marc_pipeline.work_area import read_contract
from marc_schemas.bundle import Pooling
from marc_schemas.layers import Adopted, Decision

AUTO = "auto"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerDecision:
    """Layers and pooling that a training decided at its start. As text: ``LAYERS:POOLING:DECISION``.

    Attributes:
        layers: number of layers to keep; None, written as "auto", if the training part chooses.
        pooling: how token states become one vector.
        decision: basis of the choice.
    """

    layers: int | None
    pooling: Pooling
    decision: Decision

    def __str__(self) -> str:
        return f"{AUTO if self.layers is None else self.layers}:{self.pooling}:{self.decision}"

    @classmethod
    def parse(cls, text: str) -> "LayerDecision":
        """Return the decision that a text contains.

        Raises:
            UserError: the text has another form.
        """
        try:
            layers, pooling, decision = text.split(":")
            return cls(
                None if layers == AUTO else int(layers),
                TypeAdapter[Pooling](Pooling).validate_python(pooling),
                TypeAdapter[Decision](Decision).validate_python(decision),
            )
        except ValueError:
            raise UserError(
                f"--decided {text!r} is not LAYERS:POOLING:DECISION, as the task `identify` of marc_train writes it"
            ) from None


@dataclass(frozen=True)
class Chosen:
    """Everything that a training decided before MARC is trained.

    Attributes:
        layers: number of layers to keep.
        keep, decouple: weights α and β of the constraints.
        epochs: number of passes over the training part, without early stopping; None to end by early stopping.
        decision: basis of the choice of the layers.
    """

    layers: int
    keep: float
    decouple: float
    epochs: int | None
    decision: Decision

    def applied(self, train: TrainSettings) -> TrainSettings:
        """Return the settings of the training with the chosen values."""
        update = {"layers": self.layers, "keep": self.keep, "decouple": self.decouple}
        length = {} if self.epochs is None else {"epochs": self.epochs, "patience": None}
        return train.model_copy(update={**update, **length})


def with_train(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """Return settings with keys of ``train`` replaced; a value of None keeps the configured one.

    Raises:
        UserError: a value is out of range.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        # Keys that are not configured stay unset, because an adopted recommendation may set them.
        train = TrainSettings.model_validate({**settings.train.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        raise UserError(f"train: {describe(error)}") from None
    return settings.model_copy(update={"train": train})


def adopted_uri(settings: Settings) -> str:
    """Return the uri of the recommendation that a user adopted for the configured backbone."""
    name = hashlib.sha256(settings.train.backbone.encode()).hexdigest()[:16]
    return join(settings.bundle_uri, "adopted", f"{name}.json")


def adopted(deployment: Deployment) -> Adopted | None:
    """Return the recommendation that a user adopted for the configured backbone, or None."""
    return read_contract(deployment.storage, adopted_uri(deployment.settings), Adopted)


def reviewed(deployment: Deployment) -> tuple[Deployment, Decision]:
    """Take layers and pooling that are not configured from the adopted recommendation.

    A run calls this once and passes the result on. A recommendation that is adopted later applies to the next run.

    Returns:
        The deployment with these settings, and the basis of the choice.
    """
    settings, train = deployment.settings, deployment.settings.train
    if train.layers is not None:
        return deployment, "configuration"
    found = adopted(deployment)
    if found is not None:
        advised = found.recommendation
        if "pooling" not in train.model_fields_set or train.pooling == advised.pooling:
            update = {"layers": advised.layers, "pooling": advised.pooling}
            train = train.model_copy(update=update)
            return deployment.with_settings(settings.model_copy(update={"train": train})), "adopted"
        log.warning(
            "train.pooling is %s; the adopted %d layers are for %s pooling and are ignored",
            *(train.pooling, advised.layers, advised.pooling),
        )
    return deployment, "all" if trains_pca(settings) else "clicks"


def as_decided(deployment: Deployment, decided: LayerDecision | None) -> tuple[Deployment, Decision]:
    """Apply the decision of the run, or that of :func:`reviewed` if there is none."""
    if decided is None:
        return reviewed(deployment)
    overrides = {"layers": decided.layers, "pooling": decided.pooling}
    return deployment.with_settings(with_train(deployment.settings, overrides)), decided.decision


def trains_pca(settings: Settings) -> bool:
    """Return whether a training fits a PCA: it is configured, or there are no interactions."""
    kind = settings.train.compressor
    return kind == "pca" or (kind == "auto" and settings.interactions.uri is None)

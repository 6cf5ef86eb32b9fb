"""What a training is run with: settings with overrides, and the decision about layers and pooling."""

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

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerDecision:
    """Layers and pooling as a training decided them when it began. As text: ``LAYERS:POOLING:DECISION``.

    Attributes:
        layers: blocks of the backbone to keep; None where the training part chooses, written as 0.
        pooling: how token states become one vector.
        decision: who decided.
    """

    layers: int | None
    pooling: Pooling
    decision: Decision

    def __str__(self) -> str:
        return f"{self.layers or 0}:{self.pooling}:{self.decision}"

    @classmethod
    def parse(cls, text: str) -> "LayerDecision":
        """The decision in a text.

        Raises:
            UserError: the text has another form.
        """
        try:
            layers, pooling, decision = text.split(":")
            return cls(
                int(layers) or None,
                TypeAdapter[Pooling](Pooling).validate_python(pooling),
                TypeAdapter[Decision](Decision).validate_python(decision),
            )
        except ValueError:
            raise UserError(
                f"--decided {text!r} is not LAYERS:POOLING:DECISION, as the task `identify` of marc_train writes it"
            ) from None


def with_train(settings: Settings, overrides: Mapping[str, object]) -> Settings:
    """Settings with keys of ``train`` replaced; a value of None keeps the configured one.

    Raises:
        UserError: a value is out of range.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        # Keys that the configuration leaves out stay unset: an adopted recommendation may fill them.
        train = TrainSettings.model_validate({**settings.train.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        raise UserError(f"train: {describe(error)}") from None
    return settings.model_copy(update={"train": train})


def adopted_uri(settings: Settings) -> str:
    """Uri of the recommendation that a user adopted for the configured backbone."""
    name = hashlib.sha256(settings.train.backbone.encode()).hexdigest()[:16]
    return join(settings.bundle_uri, "adopted", f"{name}.json")


def adopted(deployment: Deployment) -> Adopted | None:
    """The recommendation that a user adopted for the configured backbone."""
    return read_contract(deployment.storage, adopted_uri(deployment.settings), Adopted)


def reviewed(deployment: Deployment) -> tuple[Deployment, Decision]:
    """Fill layers and pooling from the adopted recommendation where the configuration leaves them open.

    A run calls this once and passes the answer on: a recommendation that is adopted meanwhile counts for the next run.

    Returns:
        The deployment with those settings, and who decided.
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
    """Apply the decision that the run handed on; a job that runs on its own asks :func:`reviewed`."""
    if decided is None:
        return reviewed(deployment)
    overrides = {"layers": decided.layers, "pooling": decided.pooling}
    return deployment.with_settings(with_train(deployment.settings, overrides)), decided.decision


def trains_pca(settings: Settings) -> bool:
    """Whether a training fits a PCA: because it is configured, or because there are no interactions."""
    kind = settings.train.compressor
    return kind == "pca" or (kind == "auto" and settings.interactions.uri is None)

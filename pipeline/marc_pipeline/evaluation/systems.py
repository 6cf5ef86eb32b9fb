"""The systems that an evaluation compares: names, families, and the layer that each one reads."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from marc_pipeline.errors import UserError
from marc_schemas.evaluation import Family


@dataclass(frozen=True)
class System:
    """A way to turn hidden states into vectors.

    Attributes:
        name: identifier.
        family: group of systems in reports.
        layer: "chosen" by the training part, "final", "tuned" for the final layer of a tuned backbone, or a number.
    """

    name: str
    family: Family
    layer: str | int | None


def systems(layers: int) -> list[System]:
    """Return all systems with frozen states for a backbone with so many layers."""
    return [
        System("ids", "reference", None),
        System("random", "reference", None),
        System("final-full", "reference", "final"),
        *(System(f"pca-layer-{layer}", "layer", layer) for layer in range(layers + 1)),
        System("regression", "baseline", "chosen"),
        System("autoencoder", "baseline", "chosen"),
        System("mrl", "baseline", "final"),
        System("contrastive", "baseline", "final"),
        System("marc-no-constraints", "ablation", "chosen"),
        System("marc-keep", "ablation", "chosen"),
        System("marc-pca-start", "ablation", "chosen"),
        System("marc-crossing", "ablation", "chosen"),
        System("marc-final", "ablation", "final"),
        System("marc", "marc", "chosen"),
    ]


def tuned_systems() -> list[System]:
    """Return the systems that read the final layer of a tuned backbone: its PCA, and MARC."""
    return [System("pca-tuned", "marc", "tuned"), System("marc-tuned", "marc", "tuned")]


def require_known(wanted: Iterable[str]) -> None:
    """Require names of systems that some backbone could have.

    Raises:
        UserError: a name is unknown.
    """
    known = {system.name for system in [*systems(0), *tuned_systems()]}
    for name in wanted:
        if name not in known and not re.fullmatch(r"pca-layer-\d+", name):
            raise UserError(f"there is no system {name!r}; choose from {', '.join(sorted(known))} and other layers")

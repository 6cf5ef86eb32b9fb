"""Operations of the fault campaign, read from ``operations.yaml``."""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from pydantic import TypeAdapter


@dataclass(frozen=True)
class Operation:
    """A command on a site, or several at the same time.

    Attributes:
        name: as in the report.
        state: state of the site before.
        parties: one command each.
        orders: sequences of undisturbed parties; each gives an allowed final state.
        steps: the operation needs no Spark.
        last: party that runs once more in the end, because its catalogue is the one in place.
        superseded: whether a party may fail because another one superseded it.
        removes: files must be the same as after the undisturbed run.
        holds: by date, the allowed contents in the end: a catalogue and the buckets taken from it (none: all).
    """

    name: str
    state: str
    parties: tuple[tuple[str, ...], ...]
    orders: tuple[tuple[int, ...], ...] = ((0,),)
    steps: bool = False
    last: int | None = None
    superseded: bool = False
    removes: bool = False
    holds: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = field(default_factory=dict)


def read_operations() -> dict[str, Operation]:
    """Return all operations by name."""
    found = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    return {each.name: each for each in TypeAdapter(list[Operation]).validate_python(found)}

"""Resources that the scheduler assigns to a task."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResources:
    """Number of cores of the task, and the address of its GPU; None without a GPU."""

    cpus: int = 1
    gpu: str | None = None


def machine() -> TaskResources:
    """Return all cores of this machine, for work that runs alone on it."""
    return TaskResources(cpus=os.cpu_count() or 1)

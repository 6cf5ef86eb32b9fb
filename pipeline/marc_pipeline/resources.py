"""What a scheduler gives to one bucket's worker."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResources:
    """Cores for the task, and the address of a GPU when the scheduler assigned one."""

    cpus: int = 1
    gpu: str | None = None


def machine() -> TaskResources:
    """All cores of this machine, for what runs beside no other task."""
    return TaskResources(cpus=os.cpu_count() or 1)

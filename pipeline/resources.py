"""What a scheduler gives to one bucket's worker."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResources:
    """Cores for the task, and the address of a GPU when the scheduler assigned one."""

    cpus: int = 1
    gpu: str | None = None

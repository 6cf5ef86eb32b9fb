"""Resources of a task: cores and GPU that the scheduler assigns, and memory that goes back to the system."""

import ctypes
import os
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskResources:
    """Number of cores of the task, and the address of its GPU; None without a GPU."""

    cpus: int = 1
    gpu: str | None = None


def machine() -> TaskResources:
    """Return all cores of this machine, for work that runs alone on it."""
    return TaskResources(cpus=os.cpu_count() or 1)


def return_memory() -> None:
    """Return freed memory to the system where the C library is glibc, and do nothing elsewhere.

    Tensors of changing sizes leave gaps in its heap, so that a long training would take several times what it needs.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)

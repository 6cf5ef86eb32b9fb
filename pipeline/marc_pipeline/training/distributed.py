"""Distributed training: join the process group of the launcher, and get this process's rank."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of the launcher's variables (RANK, WORLD_SIZE, …), and leave it at the end."""
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) without a group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()

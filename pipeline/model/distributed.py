"""Several training processes as one group: entering it, and which member this process is."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed


@contextmanager
def process_group() -> Iterator[None]:
    """Join the group that the launcher's variables describe (RANK, WORLD_SIZE, …), and leave it afterwards."""
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) outside of a group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()

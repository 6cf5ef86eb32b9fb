"""The compute device: choose device, dtype and threads, recognise errors of the device, measure its time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import UserError
from marc_pipeline.model.onednn import multiplies_bfloat16
from marc_pipeline.resources import TaskResources

# Errors of libraries below torch that concern the device, not a text.
DEVICE_ERRORS = ("CUDA error", "CUBLAS_", "CUDNN_", "could not create a", "could not execute a")
MEMORY_ERRORS = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class OutOfMemory(RuntimeError):
    """The device lacks memory for a single input. The error concerns the device, not the input."""


def choose_device(settings: EncodeSettings, resources: TaskResources) -> torch.device:
    """Return the GPU that the scheduler assigned, else the first GPU if the settings require one, else the CPU.

    Raises:
        UserError: the settings require CUDA, and torch finds no CUDA device.
    """
    cuda = torch.cuda.is_available()
    if settings.device == "cpu" or (settings.device == "auto" and not (cuda and resources.gpu is not None)):
        return torch.device("cpu")
    if not cuda:
        raise UserError("encode.device is cuda, but torch finds no CUDA device; set encode.device to auto or cpu")
    return torch.device(f"cuda:{resources.gpu or 0}")


def choose_dtype(settings: EncodeSettings, device: torch.device) -> torch.dtype:
    """Return the configured dtype; for ``auto``, bfloat16 if the hardware multiplies it natively, else float32."""
    if settings.dtype != "auto":
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if multiplies_bfloat16() else torch.float32


def use_threads(count: int) -> None:
    """Let torch use this number of threads in this process."""
    torch.set_num_threads(count)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or the CPU lacks memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(part in str(error) for part in MEMORY_ERRORS)


def is_device_error(error: BaseException) -> bool:
    """Return whether an error concerns the device, not the text that it was raised for."""
    return isinstance(error, torch.AcceleratorError) or any(part in str(error) for part in DEVICE_ERRORS)


class DeviceClock:
    """Seconds that the model computes. On CUDA, calls return before the work is done, so events measure it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._events: list[tuple[torch.Event, torch.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of this context."""
        if self._device.type == "cuda":
            begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def seconds(self) -> float:
        """Return the seconds so far. All results must have arrived."""
        return self._seconds + sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1000

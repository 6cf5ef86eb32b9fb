"""The token budget of a batch: measured once for each kind of GPU and model, and cached in a file."""

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

# The throughput of a CPU hardly depends on the batch between 4,096 and 16,384 tokens.
CPU_TOKENS = 8192
FIRST_TOKENS = 8192
MOST_TOKENS = 1 << 20
# The batch is doubled only if the throughput grows by at least this factor.
WORTH = 1.03

log = logging.getLogger(__name__)


def budget_of(device: torch.device, model: str, seconds_of: Callable[[int], float]) -> int:
    """Return the tokens per batch for a model on a device: fixed for a CPU, measured for a GPU.

    ``model``, a part of the cache's key, has the properties of the model that determine its speed. ``seconds_of`` is as
    for :func:`find_budget`.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory >> 30
    key = f"{torch.cuda.get_device_name(device)}, {memory} GiB, {model}, torch {torch.__version__}"
    remembered = _read()
    if key not in remembered:
        found, sure = find_budget(seconds_of)
        log.info("using batches of %d tokens for %s", found, key)
        if not sure:
            return found
        remembered[key] = found
        _write(remembered)
    return remembered[key]


def find_budget(
    seconds_of: Callable[[int], float], *, first: int = FIRST_TOKENS, most: int = MOST_TOKENS
) -> tuple[int, bool]:
    """Double the batch from ``first`` until the throughput hardly grows or the batch does not fit.

    Args:
        seconds_of: seconds for a batch of this many tokens; raises torch.OutOfMemoryError if the batch does not fit.
        first: smallest batch. It is returned even if it does not fit, because the encoder then halves its batches.
        most: largest batch.

    Returns:
        Tokens per batch, and whether to cache them. Out of memory may be due to another process on the GPU.
    """
    best, rate = first, 0.0
    tokens = first
    while tokens <= most:
        try:
            seconds_of(tokens)
            seconds = min(seconds_of(tokens) for _ in range(3))
        except torch.OutOfMemoryError:
            # Half of the largest batch that fits: real texts are longer than those of the trial.
            return max(first, best // 2), False
        if tokens / seconds < rate * WORTH:
            return best, True
        best, rate = tokens, tokens / seconds
        tokens *= 2
    return best, True


def _path() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(cache) / "marc-pipeline" / "token_budgets.json"


def _read() -> dict[str, int]:
    # Without the cache, the device is measured again.
    with suppress(OSError, ValueError, TypeError, AttributeError, RuntimeError):
        return {key: int(tokens) for key, tokens in json.loads(_path().read_text()).items()}
    return {}


def _write(remembered: dict[str, int]) -> None:
    # expanduser raises RuntimeError for a user without a home directory.
    with suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps(remembered, indent=1))
        staged.replace(path)

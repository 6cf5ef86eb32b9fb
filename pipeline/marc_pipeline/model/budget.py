"""How many tokens a batch should have: found by trying, remembered for the device and the model's dtype."""

import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

# What a CPU does per second hardly depends on the batch between 4,096 and 16,384 tokens.
CPU_TOKENS = 8192
FIRST_TOKENS = 8192
MOST_TOKENS = 1 << 20
# A batch twice as large must be faster per token by this much to be worth its memory.
WORTH = 1.03

log = logging.getLogger(__name__)


def budget_of(device: torch.device, model: str, seconds_of: Callable[[int], float]) -> int:
    """Tokens per batch for a model on a device.

    Args:
        device: what suits a CPU is known; what suits a GPU is measured, once for its kind and the model.
        model: what the speed depends on besides.
        seconds_of: as for :func:`find_budget`.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    memory = torch.cuda.get_device_properties(device).total_memory >> 30
    key = f"{torch.cuda.get_device_name(device)}, {memory} GiB, {model}, torch {torch.__version__}"
    remembered = _read()
    if key not in remembered:
        found, sure = find_budget(seconds_of)
        log.info("batches of %d tokens suit %s", found, key)
        if not sure:
            return found
        remembered[key] = found
        _write(remembered)
    return remembered[key]


def find_budget(
    seconds_of: Callable[[int], float], *, first: int = FIRST_TOKENS, most: int = MOST_TOKENS
) -> tuple[int, bool]:
    """The smallest batch, doubling from ``first``, beyond which a larger one no longer pays or fits.

    Args:
        seconds_of: how long a batch of so many tokens takes; raises torch.OutOfMemoryError when it does not fit.
        first: where to begin; taken without a trial if even that does not fit, for the encoder halves it then.
        most: where to end.

    Returns:
        The batch, and whether that is worth remembering: memory may have been short because of a neighbour.
    """
    best, rate = first, 0.0
    tokens = first
    while tokens <= most:
        try:
            seconds_of(tokens)
            seconds = min(seconds_of(tokens) for _ in range(3))
        except torch.OutOfMemoryError:
            # Half of what just fitted: the texts of a night are longer than those that were tried.
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
    # A mere memory: without it, the device is measured again.
    with suppress(OSError, ValueError, TypeError, AttributeError, RuntimeError):
        return {key: int(tokens) for key, tokens in json.loads(_path().read_text()).items()}
    return {}


def _write(remembered: dict[str, int]) -> None:
    # Without a home, expanduser raises RuntimeError.
    with suppress(OSError, RuntimeError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps(remembered, indent=1))
        staged.replace(path)

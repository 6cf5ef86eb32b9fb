"""Pauses and number of attempts after temporary failures of a store, and the error of a full disk."""

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from marc_pipeline.errors import DiskFull

R = TypeVar("R")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 20.0
# delta-rs colours its messages.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

log = logging.getLogger(__name__)


def repeated(uri: str, action: Callable[[], R], *, on: tuple[type[Exception], ...], attempts: int) -> R:
    """Return the result of an action; retry it after temporary errors.

    Args:
        uri: uri for errors and log lines.
        action: an action that is safe to repeat.
        on: types of temporary errors.
        attempts: most tries.

    Raises:
        OSError: every attempt failed with a temporary error.
        DiskFull: the disk is full; this error is not retried.
    """
    for attempt in range(attempts):
        try:
            with disk_full_names(uri):
                return action()
        except DiskFull:
            raise
        except on as error:
            reason = " ".join(COLOURS.sub("", str(error)).split())
            if attempt + 1 >= attempts:
                raise OSError(f"{uri}: failed {attempts} times, at last: {reason}") from error
            log.info("%s: attempt %d of %d failed: %s; trying again", uri, attempt + 1, attempts, reason)
        back_off(attempt)
    raise ValueError(f"attempts is {attempts}; at least one is needed")


def back_off(attempt: int) -> None:
    """Pause before the next attempt; the pause grows with every failure."""
    # The pause is random, so that workers that failed together do not retry together.
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)))  # noqa: S311


@contextmanager
def disk_full_names(uri: str) -> Iterator[None]:
    """Turn the error of a full disk, which differs between libraries, into one that names ``uri``.

    Raises:
        DiskFull: the disk is full.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None)
        if full not in DISK_FULL:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            full = errno.ENOSPC
        raise DiskFull(full, os.strerror(full), uri) from error

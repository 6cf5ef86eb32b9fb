"""Progress lines of long steps: what is done, of what, and about how long the rest takes."""

import logging
import time
from collections.abc import Callable

SECONDS = 10.0
"""Time between two lines."""

log = logging.getLogger(__name__)


class ProgressLog:
    """Logs the progress of one step, at most every 10 s.

    Args:
        label: start of every line.
        total: size of the work.
        unit: unit of the work, in the plural.
    """

    def __init__(self, label: str, total: float, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._started = self._reported = time.monotonic()

    def part(self, before: float, size: float = 1.0) -> Callable[[float], None]:
        """Return a function that takes the share of one part that is done, when ``before`` was done before it."""
        return lambda share: self.at(before + size * share)

    def at(self, done: float, detail: str = "") -> None:
        """Tell that a part of the work is done; ``detail`` is what the step is doing."""
        now = time.monotonic()
        if now - self._reported < SECONDS:
            return
        self._reported = now
        share = done / self._total if self._total else 1.0
        left = f", about {(now - self._started) * (1 / share - 1):,.0f} s left" if share > 0 else ""
        log.info(
            "%s: %s of %s %s (%.0f %%)%s%s",
            *(self._label, f"{done:,.0f}", f"{self._total:,.0f}", self._unit, 100 * share),
            *(f", {detail}" if detail else "", left),
        )

"""Numbers as text: in tables, in sentences and in plots."""

import math

UNKNOWN = "–"


def fixed(value: float | None, digits: int = 4) -> str:
    """A number with a fixed count of decimals; a dash for None and NaN."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """A number with its sign, with a typographic minus; a dash for None."""
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Both ends of an interval with their signs; a dash if either one is None."""
    return UNKNOWN if low is None or high is None else f"{signed(low)} to {signed(high)}"


def with_deviation(mean: float, deviation: float) -> str:
    """``mean ± deviation``; the mean alone if the deviation is NaN, a dash if the mean is NaN."""
    return fixed(mean) if math.isnan(mean) or math.isnan(deviation) else f"{fixed(mean)} ± {fixed(deviation)}"


def p_text(p_value: float) -> str:
    """A p-value with three decimals; ``< 0.001`` below that."""
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def plural(count: int, noun: str) -> str:
    """``1 task``, ``2 tasks``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"

"""How often tests repeat themselves: seldom in the default suite, in full in the slow suite."""

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from _pytest.mark import ParameterSet
from hypothesis import settings

T = TypeVar("T", bound=Callable[..., Any])

SLOW_PROFILE = "slow"


def slow(*values: object) -> list[ParameterSet]:
    """Return further values of a parametrised test that only the slow suite runs; a tuple where it has several."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def examples(few: int, *, of: int, **options: Any) -> Callable[[T], T]:
    """Return a decorator for a test under ``given``: ``few`` examples by default, ``of`` examples in the slow suite.

    ``make test-slow`` loads the Hypothesis profile of that name; the test is then a slow one.

    Args:
        few: examples of the default suite.
        of: examples of the slow suite.
        options: further settings of Hypothesis.
    """
    full = settings.get_current_profile_name() == SLOW_PROFILE
    drawn = settings(max_examples=of if full else few, deadline=None, **options)

    def decorate(test: T) -> T:
        chosen: T = drawn(test)
        return pytest.mark.slow(chosen) if full else chosen

    return decorate

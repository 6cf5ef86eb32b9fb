"""Augmented views of texts: light noise as people type it, seeded.

The operations are those of Skean et al. (ICML 2025, arXiv 2502.02013): character swaps, keyboard slips and splits, with
probability 0.3. How exactly each is done is this project's choice.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from pipeline.errors import UserError

# A language without spaces gets its noise too.
RUN = re.compile(r"\S{1,8}")
# The rows of a QWERTY keyboard, and how far each is shifted to the right, in keys.
ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
JOINER = "\u200d"
SKIN_TONES = range(0x1F3FB, 0x1F400)


def _slips() -> dict[str, str]:
    """The letters beside each letter on the keyboard, in its case."""
    place = {key: (row, column + shift) for row, (keys, shift) in enumerate(ROWS) for column, key in enumerate(keys)}
    slips: dict[str, str] = {}
    for key, (row, x) in place.items():
        beside = [
            other
            for other, (row_, x_) in place.items()
            if (row_ == row and abs(x_ - x) == 1) or (abs(row_ - row) == 1 and abs(x_ - x) < 1)
        ]
        slips[key] = "".join(beside)
        slips[key.upper()] = slips[key].upper()
    return slips


SLIPS = _slips()


def text_view(text: str, *, seed: Sequence[int] | int, probability: float = 0.3) -> str:
    """A damaged copy of a text, the same on every machine; whitespace is kept as it is.

    Every run of up to eight characters that are no whitespace is, with ``probability``, damaged once: two neighbours
    swapped, a letter replaced by one beside it on the keyboard, or a space put in. What cannot be done to a run falls
    to the other two; a run to which nothing can be done is left. Linear in the text.

    Args:
        text: of any length; what lies behind a run has no influence on it.
        seed: one number or several, none negative.
        probability: of damage, of each run.

    Raises:
        UserError: ``probability`` is none.
    """
    if not 0 <= probability <= 1:
        raise UserError(f"{probability} is no probability: a view damages a share of 0 to 1 of the runs")
    spans = [match.span() for match in RUN.finditer(text)]
    # A row of numbers for every run, used or not: raising the probability damages more runs, the others as before.
    draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).random((len(spans), 4))
    parts, done = [], 0
    for number in np.flatnonzero(draws[:, 0] < probability).tolist():
        first, last = spans[number]
        _, operation, place, key = draws[number].tolist()
        parts += [text[done:first], _damaged(text[first:last], int(operation * 3), place, key)]
        done = last
    return "".join([*parts, text[done:]])


def text_views(
    texts: Sequence[str], *, views: int, seed: int, probability: float = 0.3, first: int = 0
) -> list[list[str]]:
    """Damaged copies of texts, [views][texts].

    A view is seeded with ``seed``, its number, and the number of the text in the whole sample: a block of a sample
    gets the views that it would get in the whole.

    Args:
        texts: of the block.
        views: of each text; no two share their noise.
        seed: of the sample.
        probability: of damage, of each run of characters.
        first: number of the block's first text in the sample.

    Raises:
        UserError: ``probability`` is none.
    """
    return [
        [text_view(text, seed=(seed, view, first + i), probability=probability) for i, text in enumerate(texts)]
        for view in range(views)
    ]


def _damaged(run: str, operation: int, place: float, key: float) -> str:
    """A run damaged once, by the first operation that is possible from number ``operation`` on, as it is by none.

    Args:
        run: without whitespace.
        operation: 0 to 2.
        place: where in the run, in [0, 1).
        key: which of the neighbouring keys, in [0, 1).
    """
    operations = (_swapped, _slipped, _split)
    for damage in operations[operation:] + operations[:operation]:
        damaged = damage(run, place, key)
        if damaged is not None:
            return damaged
    return run


def _swapped(run: str, place: float, _: float) -> str | None:
    characters = _characters(run)
    # Swapping equals would change nothing.
    places = [i for i in range(len(characters) - 1) if characters[i] != characters[i + 1]]
    if not places:
        return None
    i = places[int(place * len(places))]
    characters[i : i + 2] = characters[i + 1], characters[i]
    return "".join(characters)


def _slipped(run: str, place: float, key: float) -> str | None:
    places = [i for i, character in enumerate(run) if character in SLIPS]
    if not places:
        return None
    i = places[int(place * len(places))]
    beside = SLIPS[run[i]]
    return run[:i] + beside[int(key * len(beside))] + run[i + 1 :]


def _split(run: str, place: float, _: float) -> str | None:
    characters = _characters(run)
    if len(characters) < 2:
        return None
    i = 1 + int(place * (len(characters) - 1))
    return f"{''.join(characters[:i])} {''.join(characters[i:])}"


def _characters(run: str) -> list[str]:
    """What a reader takes for characters: marks, skin tones and joined emoji stay with what they belong to."""
    if run.isascii():
        return list(run)
    characters: list[str] = []
    for code in run:
        belongs = unicodedata.category(code).startswith("M") or code == JOINER or ord(code) in SKIN_TONES
        if characters and (belongs or characters[-1].endswith(JOINER)):
            characters[-1] += code
        else:
            characters.append(code)
    return characters

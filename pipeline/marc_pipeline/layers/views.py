"""Augmented views of texts: typing errors (swaps, neighbouring keys, inserted spaces) with a fixed seed.

The operations and their probability of 0.3 are those of Skean et al. (ICML 2025, arXiv 2502.02013). This project chose
the details of each operation.
"""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from marc_pipeline.errors import UserError

# At most eight characters, so that languages without spaces get errors too.
RUN = re.compile(r"\S{1,8}")
# The rows of a QWERTY keyboard, and the shift of each to the right, in keys.
ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
JOINER = "\u200d"
SKIN_TONES = range(0x1F3FB, 0x1F400)


def _slips() -> dict[str, str]:
    """Return the neighbouring letters of each letter on the keyboard, in the same case."""
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
    """Return a copy of a text with typing errors, the same on every machine. Whitespace is unchanged.

    A run is up to eight characters without whitespace. Each run gets one error with ``probability``: two neighbouring
    characters swapped, a letter replaced by its neighbour on the keyboard, or an inserted space. If an operation is
    impossible for a run, the next one is tried. The time is linear in the text.

    Args:
        text: any length. Characters after a run do not influence it.
        seed: one or several numbers ≥ 0.
        probability: probability of an error in each run.

    Raises:
        UserError: ``probability`` is not between 0 and 1.
    """
    if not 0 <= probability <= 1:
        raise UserError(f"the probability of a view must be between 0 and 1, not {probability}")
    spans = [match.span() for match in RUN.finditer(text)]
    # Every run draws its numbers, used or not: a higher probability adds errors and keeps the present ones.
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
    """Return copies of texts with typing errors, [views][texts].

    ``seed``, the number of the view and the number of the text in the whole sample determine a view. A block of a
    sample therefore gets the same views as in the whole sample.

    Args:
        texts: texts of the block.
        views: number of views per text.
        seed: seed of the sample.
        probability: as for :func:`text_view`.
        first: number of the block's first text in the sample.

    Raises:
        UserError: ``probability`` is not between 0 and 1.
    """
    return [
        [text_view(text, seed=(seed, view, first + i), probability=probability) for i, text in enumerate(texts)]
        for view in range(views)
    ]


def _damaged(run: str, operation: int, place: float, key: float) -> str:
    """Return a run with one error: of the first possible operation, starting at number ``operation``.

    ``place`` and ``key``, in [0, 1), choose the position in the run and the neighbouring key. A run for which no
    operation is possible is returned unchanged.
    """
    operations = (_swapped, _slipped, _split)
    for damage in operations[operation:] + operations[:operation]:
        damaged = damage(run, place, key)
        if damaged is not None:
            return damaged
    return run


def _swapped(run: str, place: float, _: float) -> str | None:
    characters = _characters(run)
    # Swapping equal characters would not change the run.
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
    """Split a run into visible characters: marks, skin tones and joined emoji stay with their base character."""
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

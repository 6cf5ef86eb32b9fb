"""Views of texts: typing errors with the given probability, reproducible from the seed."""

import math
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.errors import UserError
from marc_pipeline.layers.views import _damaged, text_view, text_views
from tiny_models import TEXTS

SWAP, SLIP, SPLIT = range(3)
LONG = " ".join(TEXTS)
ANY_TEXT = st.text(max_size=60) | st.text(alphabet="ab é\u0301日本👍🏽\u200d\t\n", max_size=60)
SEEDS = st.integers(0, 2**40) | st.lists(st.integers(0, 2**40), min_size=1, max_size=3)
RUNS = st.text(alphabet="abzQé\u0301日👍🏽\u200d1-", min_size=1, max_size=8)
NUMBERS = st.floats(0, 1, exclude_max=True)
# Neighbouring keys, read off a keyboard.
BESIDE = {"q": "wa", "g": "tyfhvb", "p": "ol", "z": "asx", "m": "njk", "a": "qwsz", "l": "kop"}


@settings(deadline=None)
@given(text=ANY_TEXT, seed=SEEDS, probability=st.floats(0, 1))
def test_the_same_seed_gives_the_same_view_and_probability_0_the_text(
    text: str, seed: int | list[int], probability: float
) -> None:
    assert text_view(text, seed=seed, probability=probability) == text_view(text, seed=seed, probability=probability)
    assert text_view(text, seed=seed, probability=0) == text


def test_a_view_is_the_same_in_another_process_and_release() -> None:
    text = "The Quiet River. Señor 日本語のテキスト 👩‍👩‍👧 internationalisation 1999"
    here = text_view(text, seed=(7, 1, 3), probability=1)
    code = f"from marc_pipeline.layers.views import *; print(ascii(text_view({text!a}, seed=(7, 1, 3), probability=1)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii(here)
    # A recorded result: other releases of numpy and other machines must give the same.
    assert text_view("The Quiet River and more", seed=(7, 1, 3), probability=1) == "hTe Quuet Rivre adn morr"


@settings(deadline=None)
@given(text=ANY_TEXT, seed=SEEDS)
def test_whitespace_is_unchanged(text: str, seed: int | list[int]) -> None:
    view = text_view(text, seed=seed, probability=1)
    before, after = (Counter(code for code in word if code.isspace()) for word in (text, view))
    added = after - before
    assert not before - after
    assert set(added) <= {" "}
    # The words keep their order: no operation crosses whitespace.
    assert len(view.split()) == len(text.split()) + added.total()


SPACES = ["", " ", "\t\n  \u3000\u00a0", "\r\n"]
SINGLE_CHARACTERS = ["👍", "👍🏽", "👩\u200d👩\u200d👧", "é\u0301", "1", "日", "\u0301", "\ud800"]


@pytest.mark.parametrize("text", [*SPACES, *SINGLE_CHARACTERS])
def test_whitespace_and_single_characters_without_a_key_are_unchanged(text: str) -> None:
    assert {text_view(text, seed=seed, probability=1) for seed in range(20)} == {text}


@settings(deadline=None)
@given(run=RUNS, operation=st.sampled_from([SWAP, SPLIT]), place=NUMBERS, key=NUMBERS)
def test_swaps_and_splits_keep_every_character(run: str, operation: int, place: float, key: float) -> None:
    # Without letters of the keyboard, a slip is never the next possible operation.
    run = "".join(code for code in run if not (code.isascii() and code.isalpha()))
    damaged = _damaged(run, operation, place, key)
    assert Counter(damaged.replace(" ", "")) == Counter(run)


@settings(deadline=None)
@given(run=RUNS, operation=st.integers(0, 2), place=NUMBERS, key=NUMBERS)
def test_a_run_gets_one_error(run: str, operation: int, place: float, key: float) -> None:
    damaged = _damaged(run, operation, place, key)
    if " " in damaged:
        assert damaged.replace(" ", "", 1) == run
        assert not damaged.startswith(" ")
        assert not damaged.endswith(" ")
    elif Counter(damaged) != Counter(run):
        assert len(damaged) == len(run)
        [(old, new)] = [pair for pair in zip(run, damaged, strict=True) if pair[0] != pair[1]]
        assert (new.isupper(), new.isascii(), new.isalpha()) == (old.isupper(), True, True)
    elif run.isascii() and damaged != run:
        first, second = (i for i in range(len(run)) if run[i] != damaged[i])
        assert second == first + 1
    # Every run with a letter, or with two characters, gets an error.
    if any(code.isascii() and code.isalpha() for code in run) or (run.isascii() and len(run) > 1):
        assert damaged != run


@pytest.mark.parametrize("key", sorted(BESIDE))
def test_a_slip_gives_every_neighbouring_key_and_no_other(key: str) -> None:
    for letter, beside in ((key, BESIDE[key]), (key.upper(), BESIDE[key].upper())):
        hits = {_damaged(letter, SLIP, 0, number / 24) for number in range(24)}
        assert hits == set(beside)


@pytest.mark.parametrize(
    ("run", "operation", "expected"),
    [
        ("ab", SWAP, {"ba"}),
        ("abc", SWAP, {"bac", "acb"}),
        ("abc", SPLIT, {"a bc", "ab c"}),
        ("aab", SWAP, {"aba"}),
        ("aa", SWAP, {"wa", "qa", "sa", "za", "aw", "aq", "as", "az"}),
        ("p", SWAP, {"o", "l"}),
        ("p", SPLIT, {"o", "l"}),
        ("12", SLIP, {"1 2"}),
        ("11", SWAP, {"1 1"}),
        ("1", SLIP, {"1"}),
        ("日本", SLIP, {"日 本"}),
        ("👍🏽a", SWAP, {"a👍🏽"}),
        ("👩\u200d👧1", SPLIT, {"👩\u200d👧 1"}),
        ("e\u0301x", SWAP, {"xe\u0301"}),
    ],
)
def test_an_impossible_operation_is_replaced_by_the_next_one(run: str, operation: int, expected: set[str]) -> None:
    numbers = [number / 24 for number in range(24)]
    assert {_damaged(run, operation, place, key) for place in numbers for key in numbers} == expected


def test_the_share_of_errors_is_the_probability_and_the_operations_are_equally_frequent() -> None:
    runs = 20_000

    def is_binomial(count: int, share: float) -> bool:
        """Within five standard deviations."""
        return abs(count - runs * share) <= 5 * math.sqrt(runs * share * (1 - share))

    for probability in (0.05, 0.3, 0.9, 1.0):
        lines = text_view("abcdefgh\n" * runs, seed=(1, 2), probability=probability).splitlines()
        assert is_binomial(sum(line != "abcdefgh" for line in lines), probability)
    split = sum(" " in line for line in lines)
    swapped = sum(" " not in line and Counter(line) == Counter("abcdefgh") for line in lines)
    assert all(is_binomial(count, 1 / 3) for count in (split, swapped, runs - split - swapped))


def test_texts_without_spaces_get_errors() -> None:
    text = "".join(random.Random(0).choices("日本語のテキストです", k=8000))  # noqa: S311 - no secret
    view = text_view(text, seed=0)
    assert Counter(view.replace(" ", "")) == Counter(text)
    damaged = sum(text[start : start + 8] not in view for start in range(0, 8000, 8))
    assert 200 < damaged < 400


def test_views_of_a_long_text_differ() -> None:
    views = [view for [view] in text_views([LONG], views=8, seed=0)]
    assert len({*views, LONG}) == 9
    assert text_views([LONG], views=8, seed=1)[0] != text_views([LONG], views=8, seed=0)[0]
    [twins] = text_views([LONG, LONG], views=1, seed=0)
    assert twins[0] != twins[1], "the errors depend on the number of the text"


def test_views_of_a_block_equal_those_of_the_whole_sample() -> None:
    whole = text_views(TEXTS, views=3, seed=5, probability=0.5)
    assert [len(view) for view in whole] == [len(TEXTS)] * 3
    for first, last in ((0, 1), (7, 30), (47, 48), (10, 10)):
        block = text_views(TEXTS[first:last], views=3, seed=5, probability=0.5, first=first)
        assert block == [view[first:last] for view in whole]
    assert text_views(TEXTS, views=2, seed=5, probability=0.5) == whole[:2], "more views do not change the first ones"
    for view, texts in enumerate(whole):
        assert texts[9] == text_view(TEXTS[9], seed=(5, view, 9), probability=0.5)


def test_later_characters_and_a_higher_probability_keep_the_errors() -> None:
    assert text_view(LONG, seed=4).startswith(text_view("The Quiet River.", seed=4))
    lines = {p: text_view("abcdefgh\n" * 500, seed=0, probability=p).splitlines() for p in (0.3, 0.6)}
    assert all(more == less for less, more in zip(lines[0.3], lines[0.6], strict=True) if less != "abcdefgh")


def test_the_time_is_linear_in_the_text() -> None:
    text = "lorem ipsum dolor internationalisation " * 25_000
    started = time.perf_counter()
    text_view(text, seed=0)
    # About 0.1 s on one core; a quadratic algorithm would take minutes.
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_probabilities_outside_0_to_1_are_refused(probability: float) -> None:
    with pytest.raises(UserError, match="must be between 0 and 1, not"):
        text_view("abc", seed=0, probability=probability)

"""Choosing a layer: the middle one of those that noise cannot tell from the best."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation import choose_layer


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        pytest.param({1: [0.6, 0.6, 0.6], 2: [0.7, 0.7, 0.7], 3: [0.6, 0.6, 0.6]}, 2, id="one is plainly best"),
        pytest.param({1: [0.70, 0.72], 2: [0.71, 0.71], 3: [0.72, 0.70], 4: [0.5, 0.5]}, 2, id="three alike"),
        pytest.param({1: [0.70, 0.72], 2: [0.71, 0.71], 3: [0.5, 0.5], 4: [0.5, 0.5]}, 1, id="of two equals the lower"),
        pytest.param(
            {1: [0.70, 0.72], 2: [0.71, 0.73], 3: [0.72, 0.70], 4: [0.75, 0.71]}, 2, id="of two middles the better"
        ),
        pytest.param({1: [0.7], 2: [0.8], 3: [0.7]}, 2, id="one stretch: the best"),
        pytest.param({1: [0.7, 0.7]}, 1, id="one layer"),
    ],
)
def test_the_middle_of_the_layers_that_cannot_be_told_apart(scores: dict[int, list[float]], chosen: int) -> None:
    assert choose_layer(scores) == chosen


@given(st.lists(st.lists(st.floats(0.5, 0.9), min_size=3, max_size=3), min_size=1, max_size=8), st.floats(-0.2, 0.1))
def test_what_all_layers_have_in_common_does_not_matter(scores: list[list[float]], shift: float) -> None:
    plain = {layer: [round(auc, 3) for auc in aucs] for layer, aucs in enumerate(scores, start=1)}
    moved = {layer: [auc + round(shift, 3) for auc in aucs] for layer, aucs in plain.items()}
    # A layer on the very edge may fall to either side by rounding.
    assert abs(choose_layer(plain) - choose_layer(moved)) <= len(plain) // 2
    assert choose_layer(plain) in plain

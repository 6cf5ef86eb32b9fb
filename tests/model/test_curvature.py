"""Curvature against loops over tokens, and paths whose turns are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pipeline.model.curvature import curvature

Array = NDArray[np.float64]


def naive_curvature(tokens: Array) -> float:
    """The mean over k of arccos(⟨v_k, v_{k+1}⟩ / (‖v_k‖ ‖v_{k+1}‖)) by a loop."""
    angles = []
    for k in range(len(tokens) - 2):
        step, following = tokens[k + 1] - tokens[k], tokens[k + 2] - tokens[k + 1]
        lengths = math.sqrt(sum(step**2)) * math.sqrt(sum(following**2))
        angles.append(math.acos(np.clip(sum(step * following) / lengths, -1, 1)))
    return sum(angles) / len(angles)


def paths(*turns: float, length: float = 1.0) -> Tensor:
    """One text [1, t, 2] whose steps have a length and turn by these angles."""
    headings = np.cumsum([0.3, *turns])
    steps = length * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]))[None]


def rotation(width: int) -> Tensor:
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(5).normal(size=(width, width)))[0])


@given(
    texts=st.integers(1, 4),
    tokens=st.integers(3, 12),
    width=st.integers(2, 10),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_equals_naive_loops(texts: int, tokens: int, width: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    batch = scale * (rng.normal(size=(texts, tokens, width)) + rng.normal(size=width))
    found = curvature(torch.from_numpy(batch))
    assert found.shape == (texts,)
    assert found.dtype == torch.float64
    # 2e-8 is what is left of arccos near 0 and π.
    assert found.tolist() == pytest.approx([naive_curvature(text) for text in batch], abs=1e-6)
    assert all(0 <= value <= math.pi for value in found.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_straight_line_has_none(dtype: torch.dtype) -> None:
    start, step = torch.tensor([3.0, -1.0, 0.5, 0.0]), torch.tensor([0.25, 0.5, -1.0, 2.0])
    line = start + torch.arange(8)[:, None] * step
    assert curvature(line[None].to(dtype)).item() == 0
    uneven = start + torch.tensor([0.0, 1.0, 4.0, 5.0, 9.0])[:, None] * step
    assert curvature(uneven[None].to(dtype)).item() == pytest.approx(0, abs=1e-15)


def test_right_angles_and_turning_back() -> None:
    zigzag = torch.tensor([[k // 2 + k % 2, k // 2] for k in range(9)])  # right, up, right, up …
    assert curvature(zigzag[None].float()).item() == pytest.approx(math.pi / 2, abs=1e-15)
    there_and_back = torch.tensor([[0.0, 0.0], [2.0, 1.0]] * 3)
    assert curvature(there_and_back[None]).item() == pytest.approx(math.pi, abs=1e-15)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-7, 0.1, 1.0, 2.0, 3.0, math.pi - 1e-7, math.pi - 1e-9])
def test_small_and_large_angles_keep_their_digits(angle: float) -> None:
    """Arccos gives 0 for the first two, and π for the last one."""
    unit = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0 + math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert curvature(unit[None]).item() == pytest.approx(angle, rel=1e-12, abs=1e-15)


def test_is_the_mean_over_the_turns_whatever_the_lengths_of_steps() -> None:
    turns = (0.2, 1.3, -0.7, 2.9)
    expected = np.mean(np.abs(turns))
    for length in (1e-150, 1.0, 1e150):
        assert curvature(paths(*turns, length=length)).item() == pytest.approx(expected, abs=1e-9)
    tokens = paths(*turns)[0]
    steps = tokens.diff(dim=0) * torch.tensor([1.0, 7.0, 0.1, 30.0, 2.0])[:, None]
    assert curvature(steps.cumsum(dim=0)[None]).item() == pytest.approx(np.mean(np.abs(turns[1:])), abs=1e-9)


def test_rotation_scale_and_translation_change_nothing_but_the_order_of_tokens_does() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 9, 6)))
    expected = curvature(tokens)
    for other in (tokens @ rotation(6), -4.5 * tokens, tokens + torch.arange(6), tokens.flip(1)):
        torch.testing.assert_close(curvature(other), expected, rtol=0, atol=1e-12)
    assert (curvature(tokens.sort(dim=1).values) - expected).abs().min() > 0.01


def test_a_step_between_equal_tokens_has_no_angle() -> None:
    turns = (0.4, 1.1, 0.9)
    tokens = paths(*turns)[0]  # steps 0, 1, 2, 3
    waits = torch.cat([tokens[:3], tokens[2:]])  # between steps 1 and 2, whose angle is not known then
    assert curvature(waits[None]).item() == pytest.approx((0.4 + 0.9) / 2)
    at_the_end = torch.cat([tokens, tokens[-1:], tokens[-1:]])
    assert curvature(at_the_end[None]).item() == pytest.approx(np.mean(turns))


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_fewer_than_three_tokens_have_no_curvature(tokens: int) -> None:
    found = curvature(torch.randn(4, tokens, 3))
    assert found.shape == (4,)
    assert found.dtype == torch.float64
    assert found.isnan().all()


def test_a_text_without_any_angle_is_nan_and_the_others_are_not() -> None:
    batch = torch.cat([torch.ones(1, 6, 2), paths(0.5, 0.5, 0.5, 0.5), torch.full((1, 6, 2), math.nan)])
    batch[2, :, 0] = 0
    assert curvature(batch).tolist() == pytest.approx([math.nan, 0.5, math.nan], nan_ok=True)
    assert curvature(batch[:0]).shape == (0,)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 2, 5, 3)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \[b, t, D\], not \["):
        curvature(torch.zeros(shape))

"""Curvature against loops over tokens, and on paths with known angles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_reference import naive_curvature, rotation, tensor
from marc_pipeline.layers.curvature import curvature


def paths(*turns: float, length: float = 1.0) -> Tensor:
    """One text [1, t, 2] with steps of equal length that turn by these angles."""
    headings = np.cumsum([0.3, *turns])
    steps = length * np.stack([np.cos(headings), np.sin(headings)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)]))[None]


@given(
    texts=st.integers(1, 4),
    tokens=st.integers(3, 12),
    width=st.integers(2, 10),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(1e-3, 1e3),
)
@settings(max_examples=50, deadline=None)
def test_curvature_equals_naive_loops(texts: int, tokens: int, width: int, seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    batch = scale * (rng.normal(size=(texts, tokens, width)) + rng.normal(size=width))
    found = curvature(torch.from_numpy(batch))
    assert found.shape == (texts,)
    assert found.dtype == torch.float64
    # The precision of arccos near 0 and π is 2e-8.
    assert found.tolist() == pytest.approx([naive_curvature(text) for text in batch], abs=1e-6)
    assert all(0 <= value <= math.pi for value in found.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_straight_lines_right_angles_and_u_turns(dtype: torch.dtype) -> None:
    start, step = torch.tensor([3.0, -1.0, 0.5, 0.0]), torch.tensor([0.25, 0.5, -1.0, 2.0])
    uneven = torch.tensor([0.0, 1.0, 4.0, 5.0, 9.0])[:, None]
    zigzag = torch.tensor([[k // 2 + k % 2, k // 2] for k in range(9)])  # right, up, right, up …
    there_and_back = torch.tensor([[0.0, 0.0], [2.0, 1.0]] * 3)
    assert curvature((start + torch.arange(8)[:, None] * step)[None].to(dtype)).item() == 0
    for path, expected in ((start + uneven * step, 0), (zigzag, math.pi / 2), (there_and_back, math.pi)):
        assert curvature(path[None].to(dtype)).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-7, 0.1, 1.0, 2.0, 3.0, math.pi - 1e-7, math.pi - 1e-9])
def test_small_and_large_angles_are_precise(angle: float) -> None:
    """Arccos would give 0 for the first two angles, and π for the last one."""
    unit = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0 + math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert curvature(unit[None]).item() == pytest.approx(angle, rel=1e-12, abs=1e-15)


def test_curvature_is_the_mean_angle_for_any_step_lengths() -> None:
    turns = (0.2, 1.3, -0.7, 2.9)
    expected = np.mean(np.abs(turns))
    for length in (1e-150, 1.0, 1e150):
        assert curvature(paths(*turns, length=length)).item() == pytest.approx(expected, abs=1e-9)
    tokens = paths(*turns)[0]
    steps = tokens.diff(dim=0) * torch.tensor([1.0, 7.0, 0.1, 30.0, 2.0])[:, None]
    assert curvature(steps.cumsum(dim=0)[None]).item() == pytest.approx(np.mean(np.abs(turns[1:])), abs=1e-9)


def test_curvature_is_invariant_to_rotation_scale_and_translation_but_not_to_token_order() -> None:
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 9, 6)))
    expected = curvature(tokens)
    for other in (tokens @ tensor(rotation(6)), -4.5 * tokens, tokens + torch.arange(6), tokens.flip(1)):
        torch.testing.assert_close(curvature(other), expected, rtol=0, atol=1e-12)
    assert (curvature(tokens.sort(dim=1).values) - expected).abs().min() > 0.01


def test_steps_between_equal_tokens_are_left_out() -> None:
    turns = (0.4, 1.1, 0.9)
    tokens = paths(*turns)[0]  # steps 0, 1, 2, 3
    waits = torch.cat([tokens[:3], tokens[2:]])  # between steps 1 and 2, which removes their angle
    assert curvature(waits[None]).item() == pytest.approx((0.4 + 0.9) / 2)
    at_the_end = torch.cat([tokens, tokens[-1:], tokens[-1:]])
    assert curvature(at_the_end[None]).item() == pytest.approx(np.mean(turns))


def test_texts_without_any_angle_give_nan_for_themselves_only() -> None:
    for tokens in (0, 1, 2):
        found = curvature(torch.randn(4, tokens, 3))
        assert (found.shape, found.dtype) == ((4,), torch.float64)
        assert found.isnan().all()
    batch = torch.cat([torch.ones(1, 6, 2), paths(0.5, 0.5, 0.5, 0.5), torch.full((1, 6, 2), math.nan)])
    batch[2, :, 0] = 0
    assert curvature(batch).tolist() == pytest.approx([math.nan, 0.5, math.nan], nan_ok=True)
    assert curvature(batch[:0]).shape == (0,)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (1, 2, 5, 3)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"tokens must be \[b, t, D\], not \["):
        curvature(torch.zeros(shape))

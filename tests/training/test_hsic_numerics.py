"""Numerics of HSIC and nHSIC: constant and duplicate rows, NaN, refused inputs, and the precision of the result."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from hsic_reference import (
    Kind,
    Measure,
    all_kinds,
    both_measures,
    dependent,
    gradients,
    naive_hsic,
    naive_nhsic,
    tensors,
)
from marc_pipeline.training.hsic import Estimator, Kernel, hsic, nhsic

pytestmark = pytest.mark.usefixtures("one_thread")


# Degenerate inputs


@all_kinds
@both_measures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
@pytest.mark.parametrize("n", [4, 100, 1001])
def test_a_constant_representation_has_hsic_0_and_gradient_0(
    measure: Measure, kind: Kind, dtype: torch.dtype, value: float, n: int
) -> None:
    constant = torch.full((n, 3), value, dtype=dtype)
    (varied,) = tensors(dependent(n, 3, 4)[0], dtype=dtype)
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        inputs = [tensor.clone().requires_grad_() for tensor in pair]
        out = measure(*inputs, **kind)
        assert out.item() == 0
        assert not any(gradient.any() for gradient in gradients(out, inputs))


@all_kinds
def test_a_representation_that_is_constant_up_to_rounding_has_nhsic_0(kind: Kind) -> None:
    (y,) = tensors(dependent(50, 4, 1)[0], dtype=torch.float32)
    ulps = torch.randint(-1, 2, (50, 3), generator=torch.Generator().manual_seed(0))
    x = (100 * (1 + ulps * torch.finfo(torch.float32).eps)).requires_grad_()
    out = nhsic(x, y, **kind)
    assert out.item() == 0
    assert not gradients(out, [x])[0].any()
    # A spread above rounding counts, for any mean.
    faint = 100 + 0.01 * y
    assert nhsic(faint, y, **kind).item() == pytest.approx(1, abs=1e-3)


@all_kinds
def test_a_large_constant_column_does_not_change_nhsic(kind: Kind) -> None:
    x, y = tensors(*dependent(50, 4, 3), dtype=torch.float32)
    expected = nhsic(x, y, **kind).item()
    x = torch.hstack([x, torch.full((50, 1), 1e8)])  # the massive activations of language models
    assert nhsic(x, y, **kind).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("n", [4, 5, 50, 300])
def test_equidistant_samples_have_an_unbiased_nhsic_of_0(kernel: Kernel, n: int) -> None:
    (y,) = tensors(dependent(n, 3, 1)[0], dtype=torch.float32)
    one_hot = (0.3 * torch.eye(n) + 0.7).requires_grad_()
    out = nhsic(one_hot, y, kernel=kernel, estimator="unbiased")
    assert out.item() == 0
    assert gradients(out, [one_hot])[0].isfinite().all()


@all_kinds
@both_measures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_duplicate_rows_are_ordinary_samples(measure: Measure, kind: Kind, dtype: torch.dtype) -> None:
    x, y = dependent(12, 40, 3)
    x[6:] = x[:6]
    naive = naive_hsic if measure is hsic else naive_nhsic
    inputs = [tensor.requires_grad_() for tensor in tensors(x, y, dtype=dtype)]
    out = measure(*inputs, **kind)
    assert out.item() == pytest.approx(naive(x, y, **kind), rel=1e-3 if dtype == torch.float32 else 1e-9)
    assert all(gradient.isfinite().all() for gradient in gradients(out, inputs))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_when_most_rows_are_equal_the_bandwidth_is_the_median_of_unequal_pairs(
    estimator: Estimator, dtype: torch.dtype
) -> None:
    x, y = dependent(12, 3, 3)
    x[:10] = x[0]
    distances = sorted(d for a, b in itertools.combinations(x.tolist(), 2) if (d := math.dist(a, b)) > 0)
    sigma = distances[(len(distances) - 1) // 2]
    assert len(distances) == 21  # of 66
    inputs = [tensor.requires_grad_() for tensor in tensors(x, y, dtype=dtype)]
    out = hsic(*inputs, kernel="rbf", estimator=estimator)
    expected = naive_hsic(x, y, "rbf", estimator, (sigma, None))
    assert out.item() == pytest.approx(expected, rel=1e-3 if dtype == torch.float32 else 1e-9)
    assert all(gradient.isfinite().all() for gradient in gradients(out, inputs))


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [11, 57, 257])
@pytest.mark.parametrize("width", [300, 3000, 4096])
def test_equal_wide_rows_count_as_equal(estimator: Estimator, dtype: torch.dtype, n: int, width: int) -> None:
    """Matrix products add in different orders, so that computed distances of equal rows are not exactly 0."""
    x, y = dependent(n, 3, 3)
    x[: n * 9 // 10] = x[0]
    isometry = np.linalg.qr(np.random.default_rng(1).normal(size=(width, 3)))[0].T
    narrow, wide, other = tensors(x, x @ isometry + 1, y, dtype=dtype)
    expected = nhsic(narrow, other, kernel="rbf", estimator=estimator).item()
    assert nhsic(wide, other, kernel="rbf", estimator=estimator).item() == pytest.approx(expected, rel=1e-3)


@all_kinds
@both_measures
def test_nan_and_infinity_give_nan(measure: Measure, kind: Kind) -> None:
    x, y = tensors(*dependent(8, 3, 2))
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 1] = bad
        for other in (y, torch.ones(8, 2, dtype=torch.float64)):
            assert measure(broken, other, **kind).isnan()
            assert measure(other, broken, **kind).isnan()


@all_kinds
@both_measures
def test_too_few_samples_and_inputs_that_are_not_matrices_are_refused(measure: Measure, kind: Kind) -> None:
    for n in (0, 1) if kind["estimator"] == "biased" else (1, 3):
        least = 2 if kind["estimator"] == "biased" else 4
        message = f"the {kind['estimator']} HSIC needs at least {least} samples, the batch has {n}"
        with pytest.raises(ValueError, match=message):
            measure(torch.randn(n, 3), torch.randn(n, 2), **kind)
    for shapes in (((5, 3), (6, 3)), ((5,), (5, 3)), ((5, 3), (5,)), ((2, 5, 3), (2, 5, 3))):
        with pytest.raises(ValueError, match=r"must be \[n, p\] and \[n, q\] with the same n, not \[.*\] and \[.*\]"):
            measure(*map(torch.randn, shapes), **kind)


# Precision


@all_kinds
@both_measures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_inputs_are_computed_in_float32(
    measure: Measure, kind: Kind, dtype: torch.dtype, autocast: bool
) -> None:
    narrow = [tensor.requires_grad_() for tensor in tensors(*dependent(64, 24, 8), dtype=dtype)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    value = partial(measure, **kind)
    expected = value(*wide)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = value(*narrow)
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(expected.item(), rel=1e-5)
    # Scaled, as in mixed precision, because gradients of 1e-6 are lost in float16.
    for found, exact in zip(gradients(1e5 * out, narrow), gradients(1e5 * expected, wide), strict=True):
        assert found.dtype == dtype
        atol = 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(found.double(), exact, rtol=max(torch.finfo(dtype).eps, 1e-3), atol=atol)


@all_kinds
def test_inputs_of_two_dtypes_are_computed_in_the_wider(kind: Kind) -> None:
    x, y = tensors(*dependent(10, 3, 2))
    value = partial(nhsic, **kind)
    mixed = value(x.bfloat16(), y)
    assert mixed.dtype == torch.float64
    assert mixed.item() == value(x.bfloat16().double(), y).item()
    assert value(x.bfloat16(), y.float()).dtype == torch.float32

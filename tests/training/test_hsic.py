"""HSIC and nHSIC against loops over the published formulas: values, properties and gradients."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hsic_reference import (
    Kind,
    Measure,
    all_kinds,
    both_measures,
    dependent,
    gradients,
    naive_hsic,
    naive_median_distance,
    naive_nhsic,
    tensors,
)
from layer_reference import Array, rotation
from marc_pipeline.training import hsic as module
from marc_pipeline.training.hsic import Kernel, hsic, nhsic

pytestmark = pytest.mark.usefixtures("one_thread")


# Against the formulas


@all_kinds
@given(
    n=st.integers(4, 14),
    p=st.integers(1, 20),
    q=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.1, 10),
)
@example(n=5, p=5, q=5, seed=0, scale=1.0)  # p·q = n², where the linear kernel changes its algorithm
@example(n=4, p=1, q=1, seed=0, scale=1.0)
@settings(max_examples=40, deadline=None)
def test_hsic_and_nhsic_equal_naive_loops(kind: Kind, n: int, p: int, q: int, seed: int, scale: float) -> None:
    x, y = dependent(n, p, q, seed=seed)
    x = x * scale
    found = hsic(*tensors(x, y), **kind)
    assert found.shape == ()
    assert found.dtype == torch.float64
    # The unbiased estimate is a difference of terms as large as the biased one, and may be close to 0.
    size = naive_hsic(x, y, kind["kernel"], "biased")
    assert found.item() == pytest.approx(naive_hsic(x, y, **kind), rel=1e-6, abs=1e-6 * size)
    own = [naive_hsic(a, a, **kind) / naive_hsic(a, a, kind["kernel"], "biased") for a in (x, y)]
    if min(own) > 1e-6:  # otherwise the loops divide rounding errors
        normalised = nhsic(*tensors(x, y), **kind).item()
        assert normalised == pytest.approx(naive_nhsic(x, y, **kind), abs=1e-6)
        assert -1 - 1e-9 <= normalised <= 1 + 1e-9


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_biased_estimator_works_with_two_and_three_samples(n: int, kernel: Kernel) -> None:
    x, y = dependent(n, 3, 2)
    assert hsic(*tensors(x, y), kernel=kernel).item() == pytest.approx(naive_hsic(x, y, kernel, "biased"), rel=1e-9)


def naive_cka(x: Array, y: Array) -> float:
    """Kornblith 2019: ‖YᵀX‖_F² / (‖XᵀX‖_F ‖YᵀY‖_F) of centred columns, here by singular values."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)

    def squares(matrix: Array) -> float:
        return float((np.linalg.svd(matrix, compute_uv=False) ** 2).sum())

    return squares(y.T @ x) / math.sqrt(squares(x.T @ x) * squares(y.T @ y))


@pytest.mark.parametrize(("n", "p", "q"), [(40, 5, 3), (40, 39, 41), (10, 30, 4), (10, 30, 50), (3, 1, 1)])
def test_linear_nhsic_is_cka(n: int, p: int, q: int) -> None:
    x, y = dependent(n, p, q)
    assert nhsic(*tensors(x, y)).item() == pytest.approx(naive_cka(x, y), rel=1e-9)


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the size of the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@both_measures
def test_the_linear_kernel_takes_the_cheaper_algorithm(measure: Measure) -> None:
    with LargestTensor() as long:
        measure(torch.randn(1000, 4), torch.randn(1000, 3))
    assert long.numel == 4000  # no n × n matrix
    with LargestTensor() as wide:
        measure(torch.randn(10, 500), torch.randn(10, 400))
    assert wide.numel == 5000  # no p × q matrix


# Properties


@all_kinds
@pytest.mark.parametrize(("n", "p"), [(6, 3), (60, 3), (20, 100)])
def test_nhsic_of_a_representation_with_itself_is_1(kind: Kind, n: int, p: int) -> None:
    (x,) = tensors(dependent(n, p, 1)[0])
    assert nhsic(x, x, **kind).item() == pytest.approx(1, abs=1e-9)
    assert hsic(x, x, **kind).item() > 0


@all_kinds
def test_nhsic_of_independent_samples_approaches_0_with_n(kind: Kind) -> None:
    def typical(n: int) -> float:
        rng = np.random.default_rng(n)
        pairs = [tensors(rng.normal(size=(n, 4)), rng.normal(size=(n, 3))) for _ in range(30)]
        return float(np.mean([abs(nhsic(x, y, **kind).item()) for x, y in pairs]))

    sizes = [typical(n) for n in (10, 40, 160, 640)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(sizes)), sizes
    assert sizes[-1] < 0.02


@all_kinds
def test_nhsic_separates_dependence_from_independence(kind: Kind) -> None:
    x, y = tensors(*dependent(200, 4, 3))
    shuffled = y[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    found, chance = (nhsic(x, other, **kind).item() for other in (y, shuffled))
    assert found > 0.08
    assert abs(chance) < found / 8


def test_only_the_rbf_kernel_detects_dependence_without_correlation() -> None:
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    assert nhsic(x, x.square()).item() == pytest.approx(0, abs=1e-12)
    assert nhsic(x, x.square(), kernel="rbf").item() > 0.1


@all_kinds
@both_measures
@pytest.mark.parametrize("width", [3, 60])
def test_hsic_is_symmetric_and_invariant_to_rotation_translation_and_sample_order(
    measure: Measure, kind: Kind, width: int
) -> None:
    x, y = dependent(30, width, 4)
    value = partial(measure, **kind)
    expected = value(*tensors(x, y)).item()
    assert value(*tensors(y, x)).item() == pytest.approx(expected, rel=1e-12)
    order = np.random.default_rng(1).permutation(30)
    moved = [(x @ rotation(width), y), (x, y @ rotation(4)), (x + 100, y - np.arange(4)), (x[order], y[order]), (-x, y)]
    for a, b in moved:
        assert value(*tensors(a, b)).item() == pytest.approx(expected, rel=1e-8)


@all_kinds
@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e12])
def test_nhsic_is_invariant_to_scale(kind: Kind, scale: float) -> None:
    x, y = dependent(30, 3, 4)
    value = partial(nhsic, **kind)
    expected = value(*tensors(x, y)).item()
    assert value(*tensors(x * scale, y)).item() == pytest.approx(expected, rel=1e-8)
    assert value(*tensors(x, y, dtype=torch.float32)).item() == pytest.approx(expected, rel=1e-4)
    # A fourth power of 1e±12 is beyond float32.
    assert value(*tensors(x * scale, y / scale, dtype=torch.float32)).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_only_the_unbiased_estimator_has_mean_0_under_independence(kernel: Kernel) -> None:
    rng = np.random.default_rng(0)
    draws = [tensors(rng.normal(size=(8, 3)), rng.exponential(size=(8, 2))) for _ in range(2000)]
    biased = np.array([hsic(x, y, kernel=kernel).item() for x, y in draws])
    unbiased = np.array([hsic(x, y, kernel=kernel, estimator="unbiased").item() for x, y in draws])
    error = unbiased.std() / math.sqrt(len(draws))
    assert abs(unbiased.mean()) < 4 * error
    assert biased.mean() > 20 * error
    assert biased.min() > 0 > unbiased.min()


def test_the_unbiased_estimator_has_the_right_mean_under_dependence() -> None:
    # For y = x ~ N(0, 1), linear HSIC is the squared covariance, 1.
    rng = np.random.default_rng(0)
    draws = [tensors(rng.normal(size=(8, 1)))[0] for _ in range(4000)]
    found = np.array([hsic(x, x, estimator="unbiased").item() for x in draws])
    assert abs(found.mean() - 1) < 4 * found.std() / math.sqrt(len(found))


# Gradients


@all_kinds
@both_measures
@pytest.mark.parametrize(("n", "p", "q"), [(6, 3, 2), (4, 5, 4)])
def test_gradients_pass_gradcheck_at_a_fixed_bandwidth(
    monkeypatch: pytest.MonkeyPatch, measure: Measure, kind: Kind, n: int, p: int, q: int
) -> None:
    """The bandwidth is fixed, because the detached median would change under finite differences."""
    monkeypatch.setattr(module, "_squared_bandwidth", lambda squared: squared.new_tensor(4.0))
    # nHSIC divides its input by a detached peak, which would matter for a fixed bandwidth.
    monkeypatch.setattr(module, "_unit_peak", lambda x: x)
    inputs = [tensor.requires_grad_() for tensor in tensors(*dependent(n, p, q))]
    assert torch.autograd.gradcheck(partial(measure, **kind), inputs)


@all_kinds
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(("measure", "naive"), [(hsic, naive_hsic), (nhsic, naive_nhsic)])
def test_gradients_equal_finite_differences_of_the_loops_at_the_median_bandwidth(
    measure: Measure, naive: Callable[..., float], kind: Kind, duplicates: bool
) -> None:
    """The loops keep the bandwidth of the original input, because the median is detached."""
    x, y = dependent(6, 3, 2)
    if duplicates:
        x[1], x[4], y[4] = x[0], x[3], y[3]
    sigmas = (naive_median_distance(x), naive_median_distance(y))
    inputs = [tensor.requires_grad_() for tensor in tensors(x, y)]
    found = gradients(measure(*inputs, **kind), inputs)
    step = 1e-5
    for array, gradient in zip((x, y), found, strict=True):
        expected = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept, values = array[index], []
            for moved in (kept + step, kept - step):
                array[index] = moved
                values.append(naive(x, y, **kind, sigmas=sigmas))
            array[index] = kept
            expected[index] = (values[0] - values[1]) / (2 * step)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)


@all_kinds
def test_ascending_the_gradient_raises_nhsic(kind: Kind) -> None:
    x, y = tensors(*dependent(32, 4, 3), dtype=torch.float32)
    start = nhsic(x, y, **kind).item()
    y.requires_grad_()
    optimiser = torch.optim.Adam([y], lr=0.05)
    for _ in range(100):
        (gradient,) = gradients(-nhsic(x, y, **kind), [y])
        y.grad = gradient
        optimiser.step()
    assert nhsic(x, y, **kind).item() > max(0.9, start + 0.1)

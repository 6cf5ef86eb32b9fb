"""HSIC and nHSIC against loops over the published formulas: values, properties, gradients and degenerate inputs."""

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
from layer_reference import Array, rotation
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.model import hsic as module
from pipeline.model.hsic import Estimator, Kernel, hsic, nhsic

pytestmark = pytest.mark.usefixtures("one_thread")

Measure = Callable[..., Tensor]
Bandwidths = tuple[float | None, float | None]

KINDS: list[tuple[Kernel, Estimator]] = [(k, e) for k in ("linear", "rbf") for e in ("biased", "unbiased")]
all_kinds = pytest.mark.parametrize(("kernel", "estimator"), KINDS)
both_measures = pytest.mark.parametrize("measure", [hsic, nhsic])


def naive_median_distance(x: Array) -> float:
    distances = sorted(math.dist(a, b) for a, b in itertools.combinations(x.tolist(), 2))
    return distances[(len(distances) - 1) // 2]


def naive_kernel(x: Array, kernel: Kernel, sigma: float | None = None) -> Array:
    """k(x_i, x_j) by a loop; ``sigma`` instead of the median when given."""
    n = len(x)
    if kernel == "rbf" and sigma is None:
        sigma = naive_median_distance(x)
    matrix = np.zeros((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        if kernel == "linear":
            matrix[i, j] = sum(a * b for a, b in zip(x[i], x[j], strict=True))
        else:
            assert sigma is not None
            matrix[i, j] = math.exp(-(math.dist(x[i], x[j]) ** 2) / (2 * sigma**2))
    return matrix


def naive_estimate(k: Array, m: Array, estimator: Estimator) -> float:
    """Gretton's tr(KHLH)/(n−1)² and Song's equation 5, term by term."""
    n = len(k)
    if estimator == "biased":
        centring = np.eye(n) - np.ones((n, n)) / n
        return float(np.trace(k @ centring @ m @ centring) / (n - 1) ** 2)
    k, m = k.copy(), m.copy()
    for i in range(n):
        k[i, i] = m[i, i] = 0
    trace = sum(k[i, j] * m[j, i] for i, j in itertools.product(range(n), repeat=2))
    sums = sum(k[i, j] for i, j in itertools.product(range(n), repeat=2)) * sum(
        m[i, j] for i, j in itertools.product(range(n), repeat=2)
    )
    chain = sum(k[i, h] * m[h, j] for i, h, j in itertools.product(range(n), repeat=3))
    return float((trace + sums / ((n - 1) * (n - 2)) - 2 * chain / (n - 2)) / (n * (n - 3)))


def naive_hsic(x: Array, y: Array, kernel: Kernel, estimator: Estimator, sigmas: Bandwidths = (None, None)) -> float:
    return naive_estimate(naive_kernel(x, kernel, sigmas[0]), naive_kernel(y, kernel, sigmas[1]), estimator)


def naive_nhsic(x: Array, y: Array, kernel: Kernel, estimator: Estimator, sigmas: Bandwidths = (None, None)) -> float:
    k, m = naive_kernel(x, kernel, sigmas[0]), naive_kernel(y, kernel, sigmas[1])
    own = naive_estimate(k, k, estimator) * naive_estimate(m, m, estimator)
    return naive_estimate(k, m, estimator) / math.sqrt(own)


def dependent(n: int, p: int, q: int, *, seed: int = 0, noise: float = 0.5) -> tuple[Array, Array]:
    """x [n, p], and y [n, q] that depends on it nonlinearly and with noise; neither is centred."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    y = np.tanh(x @ rng.normal(size=(p, q))) + x[:, :1] ** 2 + noise * rng.normal(size=(n, q))
    return x + rng.normal(size=p), y - 3


def tensors(*arrays: Array, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.from_numpy(array).to(dtype) for array in arrays]


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a scalar; an input without influence is an error."""
    return torch.autograd.grad(out, inputs)


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
def test_equals_naive_loops(
    kernel: Kernel, estimator: Estimator, n: int, p: int, q: int, seed: int, scale: float
) -> None:
    x, y = dependent(n, p, q, seed=seed)
    x = x * scale
    found = hsic(*tensors(x, y), kernel=kernel, estimator=estimator)
    assert found.shape == ()
    assert found.dtype == torch.float64
    # The unbiased estimate is a difference of terms as large as the biased one, and may be close to 0.
    size = naive_hsic(x, y, kernel, "biased")
    assert found.item() == pytest.approx(naive_hsic(x, y, kernel, estimator), rel=1e-6, abs=1e-6 * size)
    own = [naive_hsic(a, a, kernel, estimator) / naive_hsic(a, a, kernel, "biased") for a in (x, y)]
    if min(own) > 1e-6:  # otherwise the loops divide rounding errors
        normalised = nhsic(*tensors(x, y), kernel=kernel, estimator=estimator).item()
        assert normalised == pytest.approx(naive_nhsic(x, y, kernel, estimator), abs=1e-6)
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
def test_nhsic_of_a_representation_with_itself_is_1(kernel: Kernel, estimator: Estimator, n: int, p: int) -> None:
    (x,) = tensors(dependent(n, p, 1)[0])
    assert nhsic(x, x, kernel=kernel, estimator=estimator).item() == pytest.approx(1, abs=1e-9)
    assert hsic(x, x, kernel=kernel, estimator=estimator).item() > 0


@all_kinds
def test_nhsic_of_independent_samples_approaches_0_with_n(kernel: Kernel, estimator: Estimator) -> None:
    def typical(n: int) -> float:
        rng = np.random.default_rng(n)
        pairs = [tensors(rng.normal(size=(n, 4)), rng.normal(size=(n, 3))) for _ in range(30)]
        return float(np.mean([abs(nhsic(x, y, kernel=kernel, estimator=estimator).item()) for x, y in pairs]))

    sizes = [typical(n) for n in (10, 40, 160, 640)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(sizes)), sizes
    assert sizes[-1] < 0.02


@all_kinds
def test_nhsic_separates_dependence_from_independence(kernel: Kernel, estimator: Estimator) -> None:
    x, y = tensors(*dependent(200, 4, 3))
    shuffled = y[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    found, chance = (nhsic(x, other, kernel=kernel, estimator=estimator).item() for other in (y, shuffled))
    assert found > 0.08
    assert abs(chance) < found / 8


def test_only_the_rbf_kernel_detects_dependence_without_correlation() -> None:
    x = torch.linspace(-1, 1, 201, dtype=torch.float64)[:, None]
    assert nhsic(x, x.square()).item() == pytest.approx(0, abs=1e-12)
    assert nhsic(x, x.square(), kernel="rbf").item() > 0.1


@all_kinds
@both_measures
@pytest.mark.parametrize("width", [3, 60])
def test_hsic_is_invariant_to_rotation_translation_and_sample_order(
    measure: Measure, kernel: Kernel, estimator: Estimator, width: int
) -> None:
    x, y = dependent(30, width, 4)
    value = partial(measure, kernel=kernel, estimator=estimator)
    expected = value(*tensors(x, y)).item()
    order = np.random.default_rng(1).permutation(30)
    moved = [(x @ rotation(width), y), (x, y @ rotation(4)), (x + 100, y - np.arange(4)), (x[order], y[order]), (-x, y)]
    for a, b in moved:
        assert value(*tensors(a, b)).item() == pytest.approx(expected, rel=1e-8)


@all_kinds
@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e12])
def test_nhsic_is_invariant_to_scale(kernel: Kernel, estimator: Estimator, scale: float) -> None:
    x, y = dependent(30, 3, 4)
    value = partial(nhsic, kernel=kernel, estimator=estimator)
    expected = value(*tensors(x, y)).item()
    assert value(*tensors(x * scale, y)).item() == pytest.approx(expected, rel=1e-8)
    assert value(*tensors(x, y, dtype=torch.float32)).item() == pytest.approx(expected, rel=1e-4)
    # A fourth power of 1e±12 is beyond float32.
    assert value(*tensors(x * scale, y / scale, dtype=torch.float32)).item() == pytest.approx(expected, rel=1e-4)


@all_kinds
@both_measures
def test_hsic_is_symmetric(measure: Measure, kernel: Kernel, estimator: Estimator) -> None:
    x, y = tensors(*dependent(20, 6, 3))
    forth = measure(x, y, kernel=kernel, estimator=estimator).item()
    assert measure(y, x, kernel=kernel, estimator=estimator).item() == pytest.approx(forth, rel=1e-12)


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
    # y = x ~ N(0, 1), linear: HSIC is the squared covariance, 1.
    rng = np.random.default_rng(0)
    found = np.array(
        [hsic(x, x, estimator="unbiased").item() for (x,) in (tensors(rng.normal(size=(8, 1))) for _ in range(4000))]
    )
    assert abs(found.mean() - 1) < 4 * found.std() / math.sqrt(len(found))


# Gradients


@all_kinds
@both_measures
@pytest.mark.parametrize(("n", "p", "q"), [(6, 3, 2), (4, 5, 4)])
def test_gradients_pass_gradcheck_at_a_fixed_bandwidth(
    monkeypatch: pytest.MonkeyPatch,
    measure: Measure,
    kernel: Kernel,
    estimator: Estimator,
    n: int,
    p: int,
    q: int,
) -> None:
    """The bandwidth is fixed, because the detached median would change under finite differences."""
    monkeypatch.setattr(module, "_squared_bandwidth", lambda squared: squared.new_tensor(4.0))
    # nHSIC divides its input by a detached peak, which would matter for a fixed bandwidth.
    monkeypatch.setattr(module, "_unit_peak", lambda x: x)
    inputs = [tensor.requires_grad_() for tensor in tensors(*dependent(n, p, q))]
    assert torch.autograd.gradcheck(partial(measure, kernel=kernel, estimator=estimator), inputs)


@all_kinds
@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize(("measure", "naive"), [(hsic, naive_hsic), (nhsic, naive_nhsic)])
def test_gradients_equal_finite_differences_of_the_loops_at_the_median_bandwidth(
    measure: Measure, naive: Callable[..., float], kernel: Kernel, estimator: Estimator, duplicates: bool
) -> None:
    """The loops keep the bandwidth of the original input, because the median is detached."""
    x, y = dependent(6, 3, 2)
    if duplicates:
        x[1], x[4], y[4] = x[0], x[3], y[3]
    sigmas = (naive_median_distance(x), naive_median_distance(y))
    inputs = [tensor.requires_grad_() for tensor in tensors(x, y)]
    found = gradients(measure(*inputs, kernel=kernel, estimator=estimator), inputs)
    step = 1e-5
    for array, gradient in zip((x, y), found, strict=True):
        expected = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + step
            above = naive(x, y, kernel, estimator, sigmas)
            array[index] = kept - step
            below = naive(x, y, kernel, estimator, sigmas)
            array[index] = kept
            expected[index] = (above - below) / (2 * step)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-7)


@all_kinds
def test_ascending_the_gradient_raises_nhsic(kernel: Kernel, estimator: Estimator) -> None:
    x, y = tensors(*dependent(32, 4, 3), dtype=torch.float32)
    start = nhsic(x, y, kernel=kernel, estimator=estimator).item()
    y.requires_grad_()
    optimiser = torch.optim.Adam([y], lr=0.05)
    for _ in range(100):
        (gradient,) = gradients(-nhsic(x, y, kernel=kernel, estimator=estimator), [y])
        y.grad = gradient
        optimiser.step()
    assert nhsic(x, y, kernel=kernel, estimator=estimator).item() > max(0.9, start + 0.1)


# Degenerate inputs


@all_kinds
@both_measures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -12345.678])
@pytest.mark.parametrize("n", [4, 100, 1001])
def test_a_constant_representation_has_hsic_0_and_gradient_0(
    measure: Measure, kernel: Kernel, estimator: Estimator, dtype: torch.dtype, value: float, n: int
) -> None:
    constant = torch.full((n, 3), value, dtype=dtype)
    (varied,) = tensors(dependent(n, 3, 4)[0], dtype=dtype)
    for pair in ((constant, varied), (varied, constant), (constant, constant)):
        inputs = [tensor.clone().requires_grad_() for tensor in pair]
        out = measure(*inputs, kernel=kernel, estimator=estimator)
        assert out.item() == 0
        assert not any(gradient.any() for gradient in gradients(out, inputs))


@all_kinds
def test_a_representation_that_is_constant_up_to_rounding_has_nhsic_0(kernel: Kernel, estimator: Estimator) -> None:
    (y,) = tensors(dependent(50, 4, 1)[0], dtype=torch.float32)
    ulps = torch.randint(-1, 2, (50, 3), generator=torch.Generator().manual_seed(0))
    x = (100 * (1 + ulps * torch.finfo(torch.float32).eps)).requires_grad_()
    out = nhsic(x, y, kernel=kernel, estimator=estimator)
    assert out.item() == 0
    assert not gradients(out, [x])[0].any()
    # A spread above rounding counts, for any mean.
    faint = 100 + 0.01 * y
    assert nhsic(faint, y, kernel=kernel, estimator=estimator).item() == pytest.approx(1, abs=1e-3)


@all_kinds
def test_a_large_constant_column_does_not_change_nhsic(kernel: Kernel, estimator: Estimator) -> None:
    x, y = tensors(*dependent(50, 4, 3), dtype=torch.float32)
    expected = nhsic(x, y, kernel=kernel, estimator=estimator).item()
    x = torch.hstack([x, torch.full((50, 1), 1e8)])  # the massive activations of language models
    assert nhsic(x, y, kernel=kernel, estimator=estimator).item() == pytest.approx(expected, rel=1e-4)


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
def test_duplicate_rows_are_ordinary_samples(
    measure: Measure, kernel: Kernel, estimator: Estimator, dtype: torch.dtype
) -> None:
    x, y = dependent(12, 40, 3)
    x[6:] = x[:6]
    naive = naive_hsic if measure is hsic else naive_nhsic
    inputs = [tensor.requires_grad_() for tensor in tensors(x, y, dtype=dtype)]
    out = measure(*inputs, kernel=kernel, estimator=estimator)
    assert out.item() == pytest.approx(naive(x, y, kernel, estimator), rel=1e-3 if dtype == torch.float32 else 1e-9)
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
def test_nan_and_infinity_give_nan(measure: Measure, kernel: Kernel, estimator: Estimator) -> None:
    x, y = tensors(*dependent(8, 3, 2))
    for bad in (math.nan, math.inf):
        broken = x.clone()
        broken[2, 1] = bad
        for other in (y, torch.ones(8, 2, dtype=torch.float64)):
            assert measure(broken, other, kernel=kernel, estimator=estimator).isnan()
            assert measure(other, broken, kernel=kernel, estimator=estimator).isnan()


@both_measures
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(
    ("n", "estimator", "least"), [(3, "unbiased", 4), (1, "unbiased", 4), (1, "biased", 2), (0, "biased", 2)]
)
def test_too_few_samples_are_refused(
    measure: Measure, kernel: Kernel, n: int, estimator: Estimator, least: int
) -> None:
    with pytest.raises(ValueError, match=f"the {estimator} HSIC needs at least {least} samples, the batch has {n}"):
        measure(torch.randn(n, 3), torch.randn(n, 2), kernel=kernel, estimator=estimator)


@both_measures
@pytest.mark.parametrize("shapes", [((5, 3), (6, 3)), ((5,), (5, 3)), ((5, 3), (5,)), ((2, 5, 3), (2, 5, 3))])
def test_inputs_that_are_not_matrices_with_equal_rows_are_refused(
    measure: Measure, shapes: tuple[tuple[int, ...], ...]
) -> None:
    with pytest.raises(ValueError, match=r"must be \[n, p\] and \[n, q\] with the same n, not \[.*\] and \[.*\]"):
        measure(*(torch.randn(shape) for shape in shapes))


# Precision


@all_kinds
@both_measures
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_inputs_are_computed_in_float32(
    measure: Measure, kernel: Kernel, estimator: Estimator, dtype: torch.dtype, autocast: bool
) -> None:
    narrow = [tensor.requires_grad_() for tensor in tensors(*dependent(64, 24, 8), dtype=dtype)]
    wide = [tensor.detach().double().requires_grad_() for tensor in narrow]
    value = partial(measure, kernel=kernel, estimator=estimator)
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
def test_inputs_of_two_dtypes_are_computed_in_the_wider(kernel: Kernel, estimator: Estimator) -> None:
    x, y = tensors(*dependent(10, 3, 2))
    value = partial(nhsic, kernel=kernel, estimator=estimator)
    mixed = value(x.bfloat16(), y)
    assert mixed.dtype == torch.float64
    assert mixed.item() == value(x.bfloat16().double(), y).item()
    assert value(x.bfloat16(), y.float()).dtype == torch.float32

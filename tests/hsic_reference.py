"""Reference computations of HSIC by loops over the published formulas, and dependent samples to apply them to."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from layer_reference import Array
from torch import Tensor

from pipeline.model.hsic import Estimator, Kernel, hsic, nhsic

Measure = Callable[..., Tensor]
Bandwidths = tuple[float | None, float | None]

Kind = dict[str, Any]

KINDS = [
    {"kernel": kernel, "estimator": estimator} for kernel in ("linear", "rbf") for estimator in ("biased", "unbiased")
]
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind.values()))
both_measures = pytest.mark.parametrize("measure", [hsic, nhsic])


def naive_median_distance(x: Array) -> float:
    distances = sorted(math.dist(a, b) for a, b in itertools.combinations(x.tolist(), 2))
    return distances[(len(distances) - 1) // 2]


def naive_kernel(x: Array, kernel: Kernel, sigma: float | None = None) -> Array:
    """k(x_i, x_j) by a loop; ``sigma`` replaces the median distance."""
    if kernel == "linear":
        return np.array([[float(sum(a * b)) for b in x] for a in x])
    width = sigma or naive_median_distance(x)
    return np.array([[math.exp(-(math.dist(a, b) ** 2) / (2 * width**2)) for b in x] for a in x])


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

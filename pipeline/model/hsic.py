"""HSIC measures how strongly two representations of the same n samples depend on each other, differentiably.

With kernel matrices K of x and L of y [n, n], and H = I − 11ᵀ/n:

    biased      HSIC(x, y) = tr(K H L H) / (n − 1)²
    unbiased    HSIC(x, y) = [tr(K̃L̃) + 1ᵀK̃1 · 1ᵀL̃1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀK̃L̃1] / (n(n−3)),  K̃ = K − diag K
    nHSIC(x, y) = HSIC(x, y) / sqrt(HSIC(x, x) · HSIC(y, y))

Gretton et al. 2005, Measuring Statistical Dependence with Hilbert-Schmidt Norms (ALT): the biased estimator.
Song et al. 2012, Feature Selection via Dependence Maximization (JMLR 13): the unbiased one.
Székely and Rizzo 2014, Partial Distance Correlation with Methods for Dissimilarities: U-centring, its inner product.
Kornblith et al. 2019, Similarity of Neural Network Representations Revisited (ICML): nHSIC with linear kernels is CKA.
Xi et al. 2026, Modular Representation Compression (MARC, SIGIR): HSIC as the constraint that keeps modules apart. The
kernels, the bandwidth and the estimators offered here are this project's choice.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf"]
Estimator = Literal["biased", "unbiased"]


def hsic(x: Tensor, y: Tensor, *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    """Hilbert-Schmidt independence criterion of a batch, ≥ 0 when biased, mean 0 for independent x, y when unbiased.

    Args:
        x: one representation [n, p].
        y: another of the same samples [n, q].
        kernel: k(a, b) = aᵀb, or exp(−‖a − b‖² / (2σ²)) with σ the median distance, apart for x and y. No gradient
            flows through σ.
        estimator: n ≥ 2 for biased, n ≥ 4 for unbiased.

    Returns:
        A scalar, float32 or wider whatever the inputs and autocast.

    Raises:
        ValueError: x and y are not matrices with equally many rows, or have too few.
    """
    x, y = _prepared(x, y, estimator)
    n = len(x)
    with torch.autocast(x.device.type, enabled=False):
        if kernel == "linear" and estimator == "biased":
            return _linear_product(x, y) / (n - 1) ** 2
        product = (_centred_kernel(x, kernel, estimator) * _centred_kernel(y, kernel, estimator)).sum()
        return product / ((n - 1) ** 2 if estimator == "biased" else n * (n - 3))


def nhsic(x: Tensor, y: Tensor, *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    """HSIC(x, y) / sqrt(HSIC(x, x) · HSIC(y, y)): 1 for x = y, in [0, 1] when biased and in [−1, 1] when unbiased.

    It is 0, with gradient 0, where x or y is constant up to rounding. Arguments and errors are those of ``hsic``.

    Args:
        x: one representation [n, p].
        y: another of the same samples [n, q].
        kernel: linear gives CKA.
        estimator: n ≥ 2 for biased, n ≥ 4 for unbiased.

    Returns:
        A scalar, float32 or wider.
    """
    x, y = (_unit_peak(features) for features in _prepared(x, y, estimator))
    with torch.autocast(x.device.type, enabled=False):
        if kernel == "linear" and estimator == "biased":
            return _cosine(_linear_product(x, y), _linear_product(x, x), _linear_product(y, y))
        kx, ky = _centred_kernel(x, kernel, estimator), _centred_kernel(y, kernel, estimator)
        return _cosine((kx * ky).sum(), kx.square().sum(), ky.square().sum())


def _prepared(x: Tensor, y: Tensor, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Check x [n, p] and y [n, q], bring them to one dtype of at least float32, and centre them."""
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be [n, p] and [n, q] with the same n, not {[*x.shape]} and {[*y.shape]}")
    least = 2 if estimator == "biased" else 4
    if len(x) < least:
        raise ValueError(f"the {estimator} HSIC needs at least {least} samples, the batch has {len(x)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _centred(x.to(dtype)), _centred(y.to(dtype))


def _centred(x: Tensor) -> Tensor:
    """X − 1μᵀ [n, p]; a column that is constant up to rounding becomes exactly 0, not noise."""
    centred = x - x.mean(dim=0)
    noise = _rounding(x) * x.detach().abs().amax(dim=0)
    # "≤" and filling, here and below, let a NaN through: a diverged model must not look independent.
    return centred.masked_fill(centred.detach().abs().amax(dim=0) <= noise, 0.0)


def _unit_peak(x: Tensor) -> Tensor:
    """X / max|X|: nHSIC and its gradient stay the same, and fourth powers within float32."""
    peak = x.detach().abs().amax()
    return x / peak.masked_fill(peak == 0, 1.0)


def _linear_product(x: Tensor, y: Tensor) -> Tensor:
    """‖XᵀY‖_F² = tr(XXᵀ YYᵀ) of centred x [n, p] and y [n, q], by way of the smaller of p × q and n × n."""
    if x.shape[1] * y.shape[1] < len(x) ** 2:
        return (x.mT @ y).square().sum()
    return ((x @ x.mT) * (y @ y.mT)).sum()


def _centred_kernel(x: Tensor, kernel: Kernel, estimator: Estimator) -> Tensor:
    """The matrix [n, n] whose inner products are HSIC times (n − 1)² or n(n − 3); exactly 0 if all rounding."""
    k = x @ x.mT if kernel == "linear" else _rbf(x)
    centred = _double_centred(k) if estimator == "biased" else _u_centred(k)
    noise = _rounding(k) * k.detach().norm()
    return centred.masked_fill(centred.detach().norm() <= noise, 0.0)


def _double_centred(k: Tensor) -> Tensor:
    """H K H."""
    return k - k.mean(dim=0) - k.mean(dim=1, keepdim=True) + k.mean()


def _u_centred(k: Tensor) -> Tensor:
    """Ã_ij = K̃_ij − Σ_l K̃_il/(n−2) − Σ_l K̃_lj/(n−2) + ΣΣK̃/((n−1)(n−2)) off the diagonal, 0 on it.

    Σ Ã_ij B̃_ij / (n(n−3)) is Song's estimator, and as an inner product never negative for A = B.
    """
    n = len(k)
    diagonal = torch.eye(n, dtype=torch.bool, device=k.device)
    k = k.masked_fill(diagonal, 0.0)
    rows, columns = k.sum(dim=1, keepdim=True) / (n - 2), k.sum(dim=0) / (n - 2)
    return (k - rows - columns + k.sum() / ((n - 1) * (n - 2))).masked_fill(diagonal, 0.0)


def _rbf(x: Tensor) -> Tensor:
    """exp(−‖x_i − x_j‖² / (2σ²)) [n, n]."""
    squared = _squared_distances(x)
    return torch.exp(-squared / (2 * _squared_bandwidth(squared.detach())))


def _squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖² [n, n] of centred x; no root, so that the gradient is finite (and 0) between equal rows."""
    gram = x @ x.mT
    lengths = gram.diagonal()
    sums = lengths[:, None] + lengths
    squared = sums - 2 * gram
    # Equal rows differ by rounding here; a median of such differences would be no bandwidth.
    return squared.masked_fill(squared.detach() <= _rounding(x, terms=x.shape[1]) * sums.detach(), 0.0)


def _squared_bandwidth(squared: Tensor) -> Tensor:
    """σ² of the median distance over i < j (the lower of two middle ones), from squared distances [n, n].

    When most rows are equal, the median over unequal pairs; when all are, 1.
    """
    n = len(squared)
    pairs = squared[torch.triu_indices(n, n, offset=1, device=squared.device).unbind()]
    median = pairs.median()
    among_unequal = pairs.masked_fill(pairs == 0, torch.nan).nanmedian().nan_to_num(nan=1.0)
    return torch.where(median == 0, among_unequal, median)


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """The ratio xy / sqrt(xx · yy), and 0 with gradient 0 where xx or yy is 0, since xy is 0 then."""
    own = xx * yy
    return xy / own.masked_fill(own == 0, 1.0).sqrt()  # filled before the root, whose gradient at 0 is infinite


def _rounding(x: Tensor, terms: int = 0) -> float:
    """Relative error to expect of x, and of a sum of so many terms of its dtype."""
    return (8 + math.sqrt(terms)) * torch.finfo(x.dtype).eps

"""HSIC and nHSIC: differentiable measures of the dependence between two representations of the same n samples.

With kernel matrices K of x and L of y [n, n], and H = I − 11ᵀ/n:

    biased      HSIC(x, y) = tr(K H L H) / (n − 1)²
    unbiased    HSIC(x, y) = [tr(K̃L̃) + 1ᵀK̃1 · 1ᵀL̃1 / ((n−1)(n−2)) − 2/(n−2) · 1ᵀK̃L̃1] / (n(n−3)),  K̃ = K − diag K
    nHSIC(x, y) = HSIC(x, y) / sqrt(HSIC(x, x) · HSIC(y, y))

Gretton et al. 2005, Measuring Statistical Dependence with Hilbert-Schmidt Norms (ALT): the biased estimator.
Song et al. 2012, Feature Selection via Dependence Maximization (JMLR 13): the unbiased one.
Székely and Rizzo 2014, Partial Distance Correlation with Methods for Dissimilarities: U-centring, its inner product.
Kornblith et al. 2019, Similarity of Neural Network Representations Revisited (ICML): nHSIC with linear kernels is CKA.
Xi et al. 2026, Modular Representation Compression (MARC, SIGIR): HSIC as the constraint that separates modules. The
kernels, the bandwidth and the estimators are this project's choice.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["linear", "rbf"]
Estimator = Literal["biased", "unbiased"]


def hsic(x: Tensor, y: Tensor, *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    """Return the Hilbert-Schmidt independence criterion of a batch.

    The biased estimate is ≥ 0. The unbiased estimate has mean 0 for independent x and y.

    Args:
        x: one representation [n, p].
        y: another representation of the same samples [n, q].
        kernel: "linear" is k(a, b) = aᵀb. "rbf" is exp(−‖a − b‖² / (2σ²)), with σ the median distance within x or
            within y; no gradient flows through σ.
        estimator: "biased" needs n ≥ 2, "unbiased" needs n ≥ 4.

    Returns:
        A scalar in at least float32, for any input type and under autocast.

    Raises:
        ValueError: x and y are not matrices with the same number of rows, or have too few rows.
    """
    x, y = _prepared(x, y, estimator)
    n = len(x)
    with torch.autocast(x.device.type, enabled=False):
        if kernel == "linear" and estimator == "biased":
            return _linear_product(x, y) / (n - 1) ** 2
        product = (_centred_kernel(x, kernel, estimator) * _centred_kernel(y, kernel, estimator)).sum()
        return product / ((n - 1) ** 2 if estimator == "biased" else n * (n - 3))


def nhsic(x: Tensor, y: Tensor, *, kernel: Kernel = "linear", estimator: Estimator = "biased") -> Tensor:
    """Return nHSIC, which is 1 for x = y, in [0, 1] when biased and in [−1, 1] when unbiased.

    With the linear kernel it is CKA. If x or y is constant up to rounding, nHSIC and its gradient are 0. Arguments,
    type and errors are those of :func:`hsic`.
    """
    x, y = (_unit_peak(features) for features in _prepared(x, y, estimator))
    with torch.autocast(x.device.type, enabled=False):
        if kernel == "linear" and estimator == "biased":
            return _cosine(_linear_product(x, y), _linear_product(x, x), _linear_product(y, y))
        kx, ky = _centred_kernel(x, kernel, estimator), _centred_kernel(y, kernel, estimator)
        return _cosine((kx * ky).sum(), kx.square().sum(), ky.square().sum())


def _prepared(x: Tensor, y: Tensor, estimator: Estimator) -> tuple[Tensor, Tensor]:
    """Check x [n, p] and y [n, q], convert them to one dtype of at least float32, and centre them."""
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(f"x and y must be [n, p] and [n, q] with the same n, not {[*x.shape]} and {[*y.shape]}")
    least = 2 if estimator == "biased" else 4
    if len(x) < least:
        raise ValueError(f"the {estimator} HSIC needs at least {least} samples, the batch has {len(x)}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return _centred(x.to(dtype)), _centred(y.to(dtype))


def _centred(x: Tensor) -> Tensor:
    """Return X − 1μᵀ [n, p]; columns that are constant up to rounding become exactly 0."""
    centred = x - x.mean(dim=0)
    noise = _rounding(x) * x.detach().abs().amax(dim=0)
    # NaN ≤ x is false, so masked_fill keeps NaN, here and below: a diverged model must not look independent.
    return centred.masked_fill(centred.detach().abs().amax(dim=0) <= noise, 0.0)


def _unit_peak(x: Tensor) -> Tensor:
    """Return X / max|X|, so that fourth powers fit into float32. nHSIC and its gradient do not change."""
    peak = x.detach().abs().amax()
    return x / peak.masked_fill(peak == 0, 1.0)


def _linear_product(x: Tensor, y: Tensor) -> Tensor:
    """Return ‖XᵀY‖_F² = tr(XXᵀ YYᵀ) of centred x [n, p] and y [n, q], computed with p × q or n × n numbers."""
    if x.shape[1] * y.shape[1] < len(x) ** 2:
        return (x.mT @ y).square().sum()
    return ((x @ x.mT) * (y @ y.mT)).sum()


def _centred_kernel(x: Tensor, kernel: Kernel, estimator: Estimator) -> Tensor:
    """Return the matrix [n, n] whose inner products are HSIC times (n − 1)² or n(n − 3); 0 if it is only rounding."""
    k = x @ x.mT if kernel == "linear" else _rbf(x)
    centred = _double_centred(k) if estimator == "biased" else _u_centred(k)
    noise = _rounding(k) * k.detach().norm()
    return centred.masked_fill(centred.detach().norm() <= noise, 0.0)


def _double_centred(k: Tensor) -> Tensor:
    """Return H K H."""
    return k - k.mean(dim=0) - k.mean(dim=1, keepdim=True) + k.mean()


def _u_centred(k: Tensor) -> Tensor:
    """Return Ã_ij = K̃_ij − Σ_l K̃_il/(n−2) − Σ_l K̃_lj/(n−2) + ΣΣK̃/((n−1)(n−2)), with 0 on the diagonal.

    Σ Ã_ij B̃_ij / (n(n−3)) is Song's estimator. As an inner product, it is ≥ 0 if A and B are equal.
    """
    n = len(k)
    diagonal = torch.eye(n, dtype=torch.bool, device=k.device)
    k = k.masked_fill(diagonal, 0.0)
    rows, columns = k.sum(dim=1, keepdim=True) / (n - 2), k.sum(dim=0) / (n - 2)
    return (k - rows - columns + k.sum() / ((n - 1) * (n - 2))).masked_fill(diagonal, 0.0)


def _rbf(x: Tensor) -> Tensor:
    """Return exp(−‖x_i − x_j‖² / (2σ²)) [n, n]."""
    squared = _squared_distances(x)
    return torch.exp(-squared / (2 * _squared_bandwidth(squared.detach())))


def _squared_distances(x: Tensor) -> Tensor:
    """Return ‖x_i − x_j‖² [n, n] of centred x. Without a root, the gradient between equal rows is finite (0)."""
    gram = x @ x.mT
    lengths = gram.diagonal()
    sums = lengths[:, None] + lengths
    squared = sums - 2 * gram
    # The difference of equal rows is a rounding error, which must not become the median bandwidth.
    return squared.masked_fill(squared.detach() <= _rounding(x, terms=x.shape[1]) * sums.detach(), 0.0)


def _squared_bandwidth(squared: Tensor) -> Tensor:
    """Return σ², the squared median distance over i < j (the lower of two middle values), from squares [n, n].

    If most rows are equal, this is the median over unequal pairs. If all rows are equal, it is 1.
    """
    n = len(squared)
    pairs = squared[torch.triu_indices(n, n, offset=1, device=squared.device).unbind()]
    median = pairs.median()
    among_unequal = pairs.masked_fill(pairs == 0, torch.nan).nanmedian().nan_to_num(nan=1.0)
    return torch.where(median == 0, among_unequal, median)


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    """Return xy / sqrt(xx · yy), or 0 with gradient 0 if xx or yy is 0, because xy is 0 then."""
    own = xx * yy
    return xy / own.masked_fill(own == 0, 1.0).sqrt()  # masked before the root, whose gradient at 0 is infinite


def _rounding(x: Tensor, terms: int = 0) -> float:
    """Return the expected relative error of x, or of a sum of so many terms of its dtype."""
    return (8 + math.sqrt(terms)) * torch.finfo(x.dtype).eps

"""Matrix-based entropy: how many directions the rows of a representation spread over, and its effective rank.

With the rows of Z [n, D] at unit length, K = Z Zᵀ [n, n] and λ the eigenvalues of K / tr K:

    order α         S_α = log(Σ λ^α) / (1 − α)
    α → 1           S_1 = −Σ λ log λ            (Shannon, von Neumann)
    α = 0           S_0 = log rank K
    α → ∞           S_∞ = −log max λ
    effective rank  exp(S_1)

S_α falls as α grows and is in [0, log min(n, D)]. Z Zᵀ and Zᵀ Z [D, D] share their nonzero eigenvalues. The code
decomposes the smaller of the two. A second moment Σ z zᵀ, summed over blocks of rows, therefore replaces all rows.

Giraldo, Rao and Príncipe 2015, Measures of Entropy from Data Using Infinitely Divisible Kernels (IEEE Transactions on
Information Theory 61): S_α of a normalised Gram matrix. Roy and Vetterli 2007, The Effective Rank (EUSIPCO).
Skean et al. 2025, Layer by Layer: Uncovering Hidden Representations in Language Models (ICML, arXiv 2502.02013): the
linear kernel on unit rows, per token for a text and per text for a data set. Logarithms are natural. This project chose
the rounding threshold, and that rows of zeros are ignored.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Normalisation = Literal["raw", "log_rows", "log_width", "log_least"]

ROUNDING = 1e-12
"""Eigenvalues up to this share of the largest count as 0. It is fixed, so that all functions here agree."""
NEAR_SHANNON = 0.01
"""Orders within this distance of 1 use a formula that does not divide rounding errors by 1 − α."""


def unit_rows(z: Tensor) -> Tensor:
    """Return the rows [..., D] at unit length, float64. Rows of zeros stay 0; rows with NaN or infinity become NaN."""
    z = z.to(torch.float64)
    peak = z.abs().amax(dim=-1, keepdim=True)
    z = z / peak.masked_fill(peak == 0, 1.0)  # so that squares neither overflow nor underflow
    lengths: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / lengths.masked_fill(peak == 0, 1.0)


def spectrum(z: Tensor) -> Tensor:
    """Return the eigenvalues of Z Zᵀ divided by its trace, after scaling the rows of Z [..., n, D] to unit length.

    Rows of zeros are ignored: they pad texts of different lengths to one batch.

    Returns:
        Float64 [..., min(n, D)], ≥ 0, ascending, with sum 1. All are 0 if all rows are 0, and NaN if a number is NaN.

    Raises:
        ValueError: z has no rows or no columns.
    """
    if z.ndim < 2 or not min(z.shape[-2:]):
        raise ValueError(f"z must be [..., n, D] with n and D at least 1, not {[*z.shape]}")
    rows = unit_rows(z)
    n, width = rows.shape[-2:]
    return spectrum_of(rows @ rows.mT if n <= width else rows.mT @ rows)


def spectrum_of(moment: Tensor) -> Tensor:
    """Return the same eigenvalues [..., D] from a second moment Zᵀ Z [..., D, D], or from any Gram matrix.

    The moment may be summed over blocks, Σ z zᵀ, and have any trace.

    Raises:
        ValueError: the matrix is not square, or empty.
    """
    if moment.ndim < 2 or moment.shape[-1] != moment.shape[-2] or not moment.shape[-1]:
        raise ValueError(f"moment must be [..., D, D] with D at least 1, not {[*moment.shape]}")
    moment = moment.to(torch.float64)
    finite = moment.isfinite().all(dim=-1).all(dim=-1)
    # eigvalsh raises an error for the whole batch if one matrix contains NaN.
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], moment, 0.0))
    return _shares(eigenvalues.masked_fill(~finite[..., None], torch.nan))


def entropy(eigenvalues: Tensor, order: float = 1.0) -> Tensor:
    """Return the entropy S_α of a spectrum.

    Args:
        eigenvalues: [..., k], k ≥ 1, with any sum. They are divided by it, and rounding errors count as 0.
        order: α ≥ 0; infinity is allowed.

    Returns:
        Float64 [...] in [0, log k]; 0 where all eigenvalues are 0.

    Raises:
        ValueError: the order is negative or NaN.
    """
    if not order >= 0:
        raise ValueError(f"the order of an entropy must be at least 0, not {order}")
    shares = _shares(eigenvalues.to(torch.float64))
    positive = shares > 0
    logs = shares.masked_fill(~positive, 1.0).log()
    if order == 1:
        found = -(shares * logs).sum(dim=-1)
    elif order == math.inf:
        found = -logs.masked_fill(~positive, -math.inf).amax(dim=-1)
    elif abs(order - 1) < NEAR_SHANNON:
        # Σ λ^α = 1 + Σ λ (λ^(α − 1) − 1), because Σ λ = 1.
        found = torch.log1p((shares * torch.expm1((order - 1) * logs)).sum(dim=-1)) / (1 - order)
    else:
        found = torch.logsumexp((order * logs).masked_fill(~positive, -math.inf), dim=-1) / (1 - order)
    found = found.masked_fill(~positive.any(dim=-1), 0.0).abs()  # a single eigenvalue gives −0
    return found.masked_fill(shares.isnan().any(dim=-1), torch.nan)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Return exp(S_1) of eigenvalues [..., k], which is in [1, k]; 0, like the rank, where all eigenvalues are 0."""
    rank = entropy(eigenvalues).exp()
    return rank.masked_fill((eigenvalues == 0).all(dim=-1), 0.0)


def prompt_entropy(tokens: Tensor, order: float = 1.0) -> Tensor:
    """Return the entropy S_α of each text's tokens, float64 [b], of tokens [b, t, D]; tokens of zeros are padding.

    Raises:
        ValueError: wrong shape, or a negative order.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be [b, t, D], not {[*tokens.shape]}")
    return entropy(spectrum(tokens), order)


def normalise(entropy: Tensor, rows: Tensor | int, width: Tensor | int, how: Normalisation) -> Tensor:
    """Divide an entropy by log N ("log_rows"), log D ("log_width") or log min(N, D) ("log_least"); "raw": by 1.

    N and D, ``rows`` and ``width``, are broadcast to the shape of ``entropy``.

    Returns:
        Float64; NaN where the divisor is 0, as for a single row or column.

    Raises:
        ValueError: an unknown normalisation.
    """
    if how not in get_args(Normalisation):
        raise ValueError(f"normalisation must be one of {', '.join(get_args(Normalisation))}, not {how!r}")
    entropy = entropy.to(torch.float64)
    if how == "raw":
        return entropy
    n, d = (torch.as_tensor(size, dtype=torch.float64, device=entropy.device) for size in (rows, width))
    most = {"log_rows": n, "log_width": d, "log_least": torch.minimum(n, d)}[how].log()
    return entropy / most.masked_fill(most <= 0, torch.nan)


def _shares(eigenvalues: Tensor) -> Tensor:
    """Divide eigenvalues [..., k] by their sum; negative ones, and those below the rounding threshold, become 0."""
    noise = ROUNDING * eigenvalues.amax(dim=-1, keepdim=True)
    # NaN ≤ x is false, so masked_fill keeps NaN: a diverged model gets NaN.
    eigenvalues = eigenvalues.masked_fill((eigenvalues <= noise) | (eigenvalues <= 0), 0.0)
    total = eigenvalues.sum(dim=-1, keepdim=True)
    return eigenvalues / total.masked_fill(total == 0, 1.0)

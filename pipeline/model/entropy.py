"""Matrix-based entropy says over how many directions the rows of a representation spread.

With the rows of Z [n, D] at unit length, K = Z Zᵀ [n, n] and λ the eigenvalues of K / tr K:

    order α         S_α = log(Σ λ^α) / (1 − α)
    α → 1           S_1 = −Σ λ log λ            (Shannon, von Neumann)
    α = 0           S_0 = log rank K
    α → ∞           S_∞ = −log max λ
    effective rank  exp(S_1)

S_α falls as α grows and lies in [0, log min(n, D)]. Zᵀ Z [D, D] has the same spectrum but for zeros, so that the
smaller of the two is decomposed, and a second moment Σ z zᵀ gathered over any number of blocks is enough for all rows.

Giraldo, Rao and Príncipe 2015, Measures of Entropy from Data Using Infinitely Divisible Kernels (IEEE Transactions on
Information Theory 61): S_α of a normalised Gram matrix. Roy and Vetterli 2007, The Effective Rank (EUSIPCO).
Skean et al. 2025, Layer by Layer: Uncovering Hidden Representations in Language Models (ICML, arXiv 2502.02013): the
linear kernel on unit rows, by token for a text and by text for a data set. Logarithms are natural. What counts as
rounding, and that rows of zeros count for nothing, is this project's choice.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Normalisation = Literal["raw", "log_rows", "log_width", "log_least"]

ROUNDING = 1e-12
"""Eigenvalues up to this share of the largest are 0. Fixed, so that n × n, D × D and gathered moments agree."""
NEAR_SHANNON = 0.01
"""Orders this close to 1 take a formula that does not divide rounding by 1 − α."""


def unit_rows(z: Tensor) -> Tensor:
    """Rows [..., D] at unit length, float64; a row of zeros stays one, a row with NaN or infinity becomes NaN."""
    z = z.to(torch.float64)
    peak = z.abs().amax(dim=-1, keepdim=True)
    z = z / peak.masked_fill(peak == 0, 1.0)  # squares stay within float64 whatever the scale
    lengths: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return z / lengths.masked_fill(peak == 0, 1.0)


def spectrum(z: Tensor) -> Tensor:
    """Eigenvalues of Z Zᵀ / tr, of rows brought to unit length.

    Args:
        z: [..., n, D], n ≥ 1. Rows of zeros count for nothing: they pad texts of several lengths to one batch.

    Returns:
        Float64 [..., min(n, D)], ≥ 0, rising, with sum 1. All 0 where all rows are; NaN where one number is.

    Raises:
        ValueError: z has no rows or no columns.
    """
    if z.ndim < 2 or not min(z.shape[-2:]):
        raise ValueError(f"z must be [..., n, D] with n and D at least 1, not {[*z.shape]}")
    rows = unit_rows(z)
    n, width = rows.shape[-2:]
    return spectrum_of(rows @ rows.mT if n <= width else rows.mT @ rows)


def spectrum_of(moment: Tensor) -> Tensor:
    """The same of a second moment Zᵀ Z = Σ z zᵀ that was gathered over blocks, or of any Gram matrix.

    Args:
        moment: symmetric, positive semidefinite [..., D, D], of any trace.

    Returns:
        Float64 [..., D], as ``spectrum``.

    Raises:
        ValueError: the matrix is not square, or empty.
    """
    if moment.ndim < 2 or moment.shape[-1] != moment.shape[-2] or not moment.shape[-1]:
        raise ValueError(f"moment must be [..., D, D] with D at least 1, not {[*moment.shape]}")
    moment = moment.to(torch.float64)
    finite = moment.isfinite().all(dim=-1).all(dim=-1)
    # eigvalsh raises on a NaN and takes the rest of the batch with it.
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], moment, 0.0))
    return _shares(eigenvalues.masked_fill(~finite[..., None], torch.nan))


def entropy(eigenvalues: Tensor, order: float = 1.0) -> Tensor:
    """S_α of a spectrum.

    Args:
        eigenvalues: [..., k], k ≥ 1, of any sum: their shares of it are taken, and rounding is 0.
        order: α ≥ 0; infinity too.

    Returns:
        Float64 [...] in [0, log k]; 0 where all eigenvalues are 0, since there is nothing to tell apart.

    Raises:
        ValueError: the order is negative or NaN.
    """
    if not order >= 0:
        raise ValueError(f"the order of an entropy must be at least 0, not {order}")
    shares = _shares(eigenvalues.to(torch.float64))
    there = shares > 0
    logs = shares.masked_fill(~there, 1.0).log()
    if order == 1:
        found = -(shares * logs).sum(dim=-1)
    elif order == math.inf:
        found = -logs.masked_fill(~there, -math.inf).amax(dim=-1)
    elif abs(order - 1) < NEAR_SHANNON:
        # Σ λ^α = 1 + Σ λ (λ^(α − 1) − 1), because Σ λ = 1.
        found = torch.log1p((shares * torch.expm1((order - 1) * logs)).sum(dim=-1)) / (1 - order)
    else:
        found = torch.logsumexp((order * logs).masked_fill(~there, -math.inf), dim=-1) / (1 - order)
    found = found.masked_fill(~there.any(dim=-1), 0.0).abs()  # of one eigenvalue it is −0
    return found.masked_fill(shares.isnan().any(dim=-1), torch.nan)


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """exp(S_1) of eigenvalues [..., k]: in [1, k], and 0, as the rank is, where all of them are 0."""
    rank = entropy(eigenvalues).exp()
    return rank.masked_fill((eigenvalues == 0).all(dim=-1), 0.0)


def prompt_entropy(tokens: Tensor, order: float = 1.0) -> Tensor:
    """S_α of the tokens of each text.

    Args:
        tokens: [b, t, D]; tokens of zeros pad.
        order: α ≥ 0.

    Returns:
        Float64 [b].

    Raises:
        ValueError: another shape, or a negative order.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be [b, t, D], not {[*tokens.shape]}")
    return entropy(spectrum(tokens), order)


def dataset_entropy(z: Tensor, order: float = 1.0) -> Tensor:
    """S_α of one vector per text.

    Args:
        z: [n, D].
        order: α ≥ 0.

    Returns:
        A float64 scalar.

    Raises:
        ValueError: another shape, or a negative order.
    """
    if z.ndim != 2:
        raise ValueError(f"z must be [n, D], not {[*z.shape]}")
    return entropy(spectrum(z), order)


def normalise(entropy: Tensor, rows: Tensor | int, width: Tensor | int, how: Normalisation) -> Tensor:
    """An entropy by what it could be at most.

    Args:
        entropy: of any shape.
        rows: N; broadcasts over it.
        width: D; broadcasts over it.
        how: "raw" leaves it, "log_rows" divides by log N, "log_width" by log D, "log_least" by log min(N, D).

    Returns:
        Float64; NaN where the divisor is 0: of one row, or one column, there is nothing to compare with.

    Raises:
        ValueError: an unknown normalisation.
    """
    if how not in get_args(Normalisation):
        raise ValueError(f"a normalisation is one of {', '.join(get_args(Normalisation))}, not {how!r}")
    entropy = entropy.to(torch.float64)
    if how == "raw":
        return entropy
    n, d = (torch.as_tensor(size, dtype=torch.float64, device=entropy.device) for size in (rows, width))
    most = {"log_rows": n, "log_width": d, "log_least": torch.minimum(n, d)}[how].log()
    return entropy / most.masked_fill(most <= 0, torch.nan)


def _shares(eigenvalues: Tensor) -> Tensor:
    """Eigenvalues [..., k] of a positive semidefinite matrix by their sum; what is rounding, or negative, is 0."""
    noise = ROUNDING * eigenvalues.amax(dim=-1, keepdim=True)
    # "≤" and filling let a NaN through, as in the kernels of HSIC: a diverged model must not look tidy.
    eigenvalues = eigenvalues.masked_fill((eigenvalues <= noise) | (eigenvalues <= 0), 0.0)
    total = eigenvalues.sum(dim=-1, keepdim=True)
    return eigenvalues / total.masked_fill(total == 0, 1.0)

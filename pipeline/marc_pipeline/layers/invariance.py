"""Invariance of a representation to augmented views of the same text: InfoNCE, LiDAR and DiME.

InfoNCE, for views a, b [n, D] of n texts, c_ij their cosines and τ a temperature:

    loss = −1/(2n) Σ_i [log(e^{c_ii/τ} / Σ_j e^{c_ij/τ}) + log(e^{c_ii/τ} / Σ_j e^{c_ji/τ})]
    mutual information ≥ log n − loss

LiDAR, for q views x_ij of each of n texts, μ_i their means by text and μ the mean of those:

    Σ_b = 1/n Σ_i (μ_i − μ)(μ_i − μ)ᵀ,   Σ_w = 1/(nq) Σ_ij (x_ij − μ_i)(x_ij − μ_i)ᵀ + δ I
    LiDAR = exp(−Σ p log p),  p the eigenvalues of Σ_w^{−1/2} Σ_b Σ_w^{−1/2}, divided by their sum

DiME, for K_a, K_b [n, n] the cosines within each view, ∘ the product of entries and Π permutations:

    DiME = mean over Π of S_α(K_a ∘ Π K_b Πᵀ) − S_α(K_a ∘ K_b),   S_α of the matrix divided by its trace

Van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding (arXiv 1807.03748): InfoNCE.
Thilak et al. 2024, LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL Architectures (ICLR).
Skean et al. 2023, DiME: Maximizing Mutual Information by a Difference of Matrix-Based Entropies (arXiv 2301.08164).
Skean et al. 2025, Layer by Layer (ICML, arXiv 2502.02013): all three on the layers of a language model.
This project chose the temperature of InfoNCE and the mean of both directions, and the linear kernel and the number of
permutations of DiME. LiDAR omits the small constant that its authors add to every p.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from marc_pipeline.layers.entropy import effective_rank, entropy, spectrum_of, unit_rows


def infonce(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the InfoNCE loss of finding each text's other view among the views of all n ≥ 2 texts.

    ``a`` and ``b`` [n, D] are two views of each text; the temperature τ > 0 divides the cosines.

    Returns:
        A float64 scalar ≥ 0; log n if all texts have the same representation.

    Raises:
        ValueError: wrong shapes, fewer than 2 texts, or a temperature that is not above 0.
    """
    _require_pairs(a, b)
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
    scores = unit_rows(a) @ unit_rows(b).mT / temperature  # [n, n]
    pairs = torch.arange(len(a), device=scores.device)
    return (cross_entropy(scores, pairs) + cross_entropy(scores.mT, pairs)) / 2


def information_bound(loss: Tensor, n: int) -> Tensor:
    """Return log n − loss [...], a lower bound on the mutual information of two views. It is at most log n."""
    return math.log(n) - loss


def lidar(between: Tensor, within: Tensor, ridge: float = 1e-4) -> Tensor:
    """Return LiDAR: the effective number of linear discriminants that separate texts despite differences of views.

    With Σ_w = L Lᵀ (Cholesky), L^{−1} Σ_b L^{−T} has the spectrum of Σ_w^{−1/2} Σ_b Σ_w^{−1/2}, because both are
    similar to Σ_w^{−1} Σ_b.

    Args:
        between: Σ_b [D, D] of n texts, which may be summed over blocks.
        within: Σ_w [D, D] of their views without the ridge, at the same scale.
        ridge: δ > 0, relative to the squared scale of the views.

    Returns:
        A float64 scalar in [1, min(n − 1, D)]; 0 for Σ_b = 0, NaN if a number is NaN or infinite.

    Raises:
        ValueError: wrong shapes, a ridge that is not above 0, or a ridge below the rounding of ``within``.
    """
    if between.ndim != 2 or between.shape[0] != between.shape[1] or between.shape != within.shape:
        raise ValueError(f"between and within must be [D, D] both, not {[*between.shape]} and {[*within.shape]}")
    if not ridge > 0:
        raise ValueError(f"the ridge must be above 0, not {ridge}")
    between, within = between.to(torch.float64), within.to(torch.float64)
    if not (between.isfinite().all() and within.isfinite().all()):
        return between.new_tensor(torch.nan)
    identity = torch.eye(len(within), dtype=torch.float64, device=within.device)
    factor, failed = torch.linalg.cholesky_ex(within + ridge * identity)
    if failed:
        largest = within.diagonal().max().item()
        raise ValueError(f"the ridge {ridge} is below the rounding of a scatter of {largest:.3g}; scale the views down")
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    return effective_rank(spectrum_of(torch.linalg.solve_triangular(factor, half.mT, upper=False)))


def dime(a: Tensor, b: Tensor, *, order: float = 1.0, permutations: int = 5, seed: int | Sequence[int] = 0) -> Tensor:
    """Return DiME: how much pairing two views of a text lowers their joint entropy, compared with random pairs.

    ``a`` [n, p] and ``b`` [n, q] are two views of each of n ≥ 2 texts. The result averages ``permutations`` random
    pairings. One or several numbers ≥ 0 are their seed; no global generator is used.

    Returns:
        A float64 scalar, about 0 for independent views.

    Raises:
        ValueError: wrong shapes, fewer than 2 texts, no permutations, or a negative order.
    """
    _require_pairs(a, b, same_width=False)
    if permutations < 1:
        raise ValueError(f"DiME needs at least 1 permutation, not {permutations}")
    kernel_a, kernel_b = (rows @ rows.mT for rows in (unit_rows(a), unit_rows(b)))

    def joint(order_b: Tensor) -> Tensor:
        return entropy(spectrum_of(kernel_a * kernel_b[order_b][:, order_b]), order)

    draw = np.random.default_rng(seed)
    shuffled = [joint(torch.from_numpy(draw.permutation(len(a))).to(kernel_b.device)) for _ in range(permutations)]
    return torch.stack(shuffled).mean() - joint(torch.arange(len(a), device=kernel_b.device))


def _require_pairs(a: Tensor, b: Tensor, *, same_width: bool = True) -> None:
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or (same_width and a.shape != b.shape):
        wanted = "[n, D] both" if same_width else "[n, p] and [n, q] with the same n"
        raise ValueError(f"a and b must be {wanted}, not {[*a.shape]} and {[*b.shape]}")
    if len(a) < 2:
        raise ValueError(f"comparing views needs at least 2 texts, not {len(a)}")

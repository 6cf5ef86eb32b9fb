"""The shape of a space of vectors, and the limits beyond which the space is degenerate."""

import math

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings
from marc_schemas.space import SpaceShape

ENOUGH_ROWS = 4
"""Vectors per dimension from which on a low rank is a property of the space, and not of few vectors."""
SAMPLE_NUMBERS = 2**23
"""Numbers (vectors × d) in the sample of a large table: 32 MiB as float32, 131,072 vectors of d = 64."""
# Equal vectors have a variance of about 1e-15, from rounding to float32.
EQUAL_VARIANCE = 1e-12


def sample_rows(dim: int) -> int:
    """Return the number of vectors of d = ``dim`` that are enough for the shape of a table of any size."""
    return max(SAMPLE_NUMBERS // dim, 2 * ENOUGH_ROWS * dim)


def space_shape(vectors: NDArray[np.float32]) -> SpaceShape:
    """Return the shape of vectors [n, d], each scaled to unit length; zeros stay zeros.

    All figures are 0 for fewer than two vectors, and NaN if a vector contains NaN or infinity.
    """
    n = len(vectors)
    if n < 2:
        return _shape(0.0)
    if not np.isfinite(vectors).all():
        return _shape(math.nan)
    unit = vectors.astype(np.float64)
    lengths = np.linalg.norm(unit, axis=1, keepdims=True)
    unit /= np.where(lengths > 0, lengths, 1)
    total, squares = unit.sum(axis=0), np.count_nonzero(lengths)
    # Centred before the product: the difference of two large sums would lose the digits of a small variance.
    unit -= total / n
    eigenvalues = np.linalg.eigvalsh(unit.T @ unit / n).clip(min=0)  # [d]
    variance = eigenvalues.sum()
    shares = eigenvalues / variance if variance > EQUAL_VARIANCE else np.zeros(1)
    present = shares[shares > 0]
    return SpaceShape(
        effective_rank=float(np.exp(-(present * np.log(present)).sum())) if len(present) else 0.0,
        first_share=float(shares.max()),
        mean_cosine=min(1.0, float((total @ total - squares) / (n * (n - 1)))),
    )


def degenerate(shape: SpaceShape, limits: AuditSettings, *, rows: int, dim: int) -> list[str]:
    """Return one line per limit that the shape of ``rows`` vectors of d = ``dim`` exceeds.

    Fewer than :data:`ENOUGH_ROWS` vectors per dimension exceed no limit. NaN is refused for any number of vectors.
    A low rank alone is no fault: vectors of rank 3 of 64 had a good AUC on one catalogue. The limits find a space
    whose vectors can hardly be told apart.
    """
    if not math.isfinite(shape.effective_rank + shape.first_share + shape.mean_cosine):
        return ["the vectors contain NaN or infinity, so their space has no shape"]
    if rows < ENOUGH_ROWS * dim:
        return []
    found = []
    least = min(limits.min_effective_rank, dim)
    if shape.effective_rank < least:
        found.append(
            f"the vectors use {shape.effective_rank:.2f} of {dim} directions (effective rank), "
            f"audit.min_effective_rank is {least:g}"
        )
    if shape.mean_cosine > limits.max_mean_cosine:
        found.append(
            f"two random vectors have a mean cosine of {shape.mean_cosine:.3f}, "
            f"audit.max_mean_cosine is {limits.max_mean_cosine:g}"
        )
    return found


def _shape(figure: float) -> SpaceShape:
    return SpaceShape(effective_rank=figure, first_share=figure, mean_cosine=figure)

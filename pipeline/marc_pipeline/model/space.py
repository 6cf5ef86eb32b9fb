"""The shape of a space of vectors, and the limits beyond which the space is degenerate."""

import numpy as np
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings
from marc_schemas.space import SpaceShape

ENOUGH_ROWS = 4
"""Vectors per dimension from which on a low rank is a property of the space, and not of few vectors."""


def space_shape(vectors: NDArray[np.float32]) -> SpaceShape:
    """Return the shape of vectors [n, d], each scaled to unit length; zeros stay zeros."""
    exact = vectors.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    unit = exact / np.where(lengths > 0, lengths, 1)
    return shape_of_moments(len(unit), unit.sum(axis=0), unit.T @ unit)


def shape_of_moments(n: int, total: NDArray[np.float64], products: NDArray[np.float64]) -> SpaceShape:
    """Return the shape of n vectors z from Σ z [d] and Σ z zᵀ [d, d], which add up over parts of a table."""
    if n < 2:
        return SpaceShape(effective_rank=0.0, first_share=0.0, mean_cosine=0.0)
    mean = total / n
    eigenvalues = np.linalg.eigvalsh(products / n - np.outer(mean, mean)).clip(min=0)
    # Rounding leaves tiny eigenvalues if all vectors are equal.
    variance = float(eigenvalues.sum())
    shares = eigenvalues / variance if variance > 1e-12 else np.zeros(1)
    present = shares[shares > 0]
    return SpaceShape(
        effective_rank=float(np.exp(-(present * np.log(present)).sum())) if len(present) else 0.0,
        first_share=float(shares.max()),
        mean_cosine=float((total @ total - np.trace(products)) / (n * (n - 1))),
    )


def degenerate(shape: SpaceShape, limits: AuditSettings, *, rows: int, dim: int) -> list[str]:
    """Return one line per limit that the shape of ``rows`` vectors of d = ``dim`` exceeds; none for few vectors.

    A low rank alone is no fault: vectors of rank 3 of 64 had a good AUC on one catalogue. The limits find a space
    whose vectors can hardly be told apart.
    """
    if rows < ENOUGH_ROWS * dim:
        return []
    found = []
    least = min(limits.min_effective_rank, dim)
    if shape.effective_rank < least:
        found.append(
            f"the vectors use {shape.effective_rank:.1f} of {dim} directions (effective rank), "
            f"audit.min_effective_rank is {least:g}"
        )
    if shape.mean_cosine > limits.max_mean_cosine:
        found.append(
            f"two random vectors have a mean cosine of {shape.mean_cosine:.3f}, "
            f"audit.max_mean_cosine is {limits.max_mean_cosine:g}"
        )
    return found

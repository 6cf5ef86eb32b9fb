"""Reduced-rank regression: the directions of h along which items differ in who clicks them; MARC starts from these."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from pipeline.errors import UserError
from pipeline.model.compressor import WhitenedPCA
from pipeline.model.learning import LearningData, known_states

RIDGE = 0.0125
"""λ per item, of states with mean squared length 1."""
PRIOR = 5.0
"""Ratings at the overall mean that every user's mean is shrunk by."""
VARIANCE_SHARE = 1e-4
"""Weight of plain variance, which orders the directions that no click speaks of."""
USERS_AT_ONCE = 4096


def fit_regression(states: NDArray[np.float32], data: LearningData, *, dim: int) -> WhitenedPCA:
    """The d directions of h that predict users' clicks best, whitened; in the form of a PCA, which they replace.

    With X [m, D] the centred states of the known items and Y [m, users] what each user's click says beyond the user's
    mean, divided by the root of the item's ratings, the fit is Ŷ = X A, A = (XᵀX + λI)⁻¹ XᵀY, and the directions are
    those of its d leading left singular vectors. Y is never held densely, nor any matrix with a side of users.

    Izenman, Reduced-rank regression for the multivariate linear model, Journal of Multivariate Analysis 5 (1975).

    Args:
        states: pooled hidden states [items, D].
        data: interactions of the training part.
        dim: d.

    Raises:
        UserError: more dimensions than the states have directions.
    """
    known = known_states(states, data).astype(np.float64)
    mean = known.mean(axis=0)
    x = known - mean
    length = np.sqrt((x**2).sum(axis=1).mean())
    if dim > min(len(x) - 1, x.shape[1]) or not length:
        raise UserError(
            f"train.dim is {dim}: {len(x):,} items with {x.shape[1]} numbers each do not span so many directions"
        )
    x /= length
    gram = x.T @ x
    solved = np.linalg.solve(gram + RIDGE * len(x) * np.eye(len(gram)), np.eye(len(gram)))
    fitted = solved @ _clicked(x, data) @ solved
    fitted += VARIANCE_SHARE * np.trace(fitted) / len(fitted) * np.eye(len(fitted))
    values, vectors = np.linalg.eigh(gram)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    strength, directions = np.linalg.eigh(root @ fitted @ root)
    strength, directions = strength[::-1][:dim], directions[:, ::-1][:, :dim]
    if strength[-1] <= 1e-12 * strength[0]:
        raise UserError(f"train.dim is {dim}: the states of {len(x):,} items span fewer directions")
    weights = fitted @ root @ directions / strength * np.sqrt(len(x)) / length
    module = WhitenedPCA(width=states.shape[1], dim=dim)
    module.mean.copy_(torch.from_numpy(mean))
    module.directions.copy_(torch.from_numpy(weights.T.copy()))
    return module


def _clicked(x: NDArray[np.float64], data: LearningData) -> NDArray[np.float64]:
    """XᵀY (XᵀY)ᵀ [D, D], a block of users at a time."""
    labels = data.training.labels.numpy().astype(np.float64)
    users, items = data.users.numpy(), np.searchsorted(data.known.numpy(), data.training.items.numpy())
    rated = np.bincount(users)
    means = (np.bincount(users, weights=labels) + PRIOR * labels.mean()) / (rated + PRIOR)
    values = (labels - means[users]) / np.sqrt(np.bincount(items))[items]
    ratings = csr_matrix((values, (users, items)), shape=(len(rated), len(x)))
    product = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(rated), USERS_AT_ONCE):
        block = ratings[start : start + USERS_AT_ONCE] @ x
        product += block.T @ block
    return product

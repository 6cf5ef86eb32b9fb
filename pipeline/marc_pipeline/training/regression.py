"""Reduced-rank regression of users' clicks on hidden states: the linear projection that initialises the compressor."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from marc_pipeline.errors import UserError
from marc_pipeline.model.compressor import WhitenedPCA
from marc_pipeline.training.learning import LearningData, known_states

RIDGE = 0.0125
"""λ per item, for states with mean squared length 1."""
PRIOR = 5.0
"""Number of ratings at the overall mean that are added to each user's mean, which shrinks it."""
VARIANCE_SHARE = 1e-4
"""Weight of the variance of states, which orders the directions that do not predict clicks."""
USERS_AT_ONCE = 4096


def fit_regression(states: NDArray[np.float32], data: LearningData, *, dim: int) -> WhitenedPCA:
    """Return the d whitened directions of h that predict users' clicks best, in the form of a PCA.

    X [m, D] are the centred states of the known items. Y [m, users] are the clicks minus the user's mean, divided by
    the root of the item's number of rows, and multiplied by the row's weight. The fit is Ŷ = X A with
    A = (XᵀX + λI)⁻¹ XᵀY. The directions are those of its d leading left singular vectors. No dense matrix grows with
    the number of users.

    Izenman, Reduced-rank regression for the multivariate linear model, Journal of Multivariate Analysis 5 (1975).
    ``states`` are those of all items [items, D]; ``data`` are interactions of the training part.

    Raises:
        UserError: the states span fewer directions than ``dim``.
    """
    x = known_states(states, data).astype(np.float64)
    mean = x.mean(axis=0)
    # In place, because the states are the largest part of the memory.
    x -= mean
    length = np.sqrt((x**2).sum(axis=1).mean())
    if dim > min(len(x) - 1, x.shape[1]) or not length:
        raise UserError(
            f"train.dim is {dim}: {len(x):,} items of width {x.shape[1]} span fewer directions; lower train.dim"
        )
    x /= length
    gram = x.T @ x  # [D, D]
    solved = np.linalg.solve(gram + RIDGE * len(x) * np.eye(len(gram)), np.eye(len(gram)))
    fitted = solved @ _clicked(x, data) @ solved
    fitted += VARIANCE_SHARE * np.trace(fitted) / len(fitted) * np.eye(len(fitted))
    values, vectors = np.linalg.eigh(gram)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    strength, directions = np.linalg.eigh(root @ fitted @ root)
    strength, directions = strength[::-1][:dim], directions[:, ::-1][:, :dim]
    if strength[-1] <= 1e-12 * strength[0]:
        raise UserError(f"train.dim is {dim}: the states of {len(x):,} items span fewer directions; lower train.dim")
    weights = fitted @ root @ directions / strength * np.sqrt(len(x)) / length
    module = WhitenedPCA(width=states.shape[1], dim=dim)
    module.mean.copy_(torch.from_numpy(mean))
    module.directions.copy_(torch.from_numpy(weights.T.copy()))
    return module


def _clicked(x: NDArray[np.float64], data: LearningData) -> NDArray[np.float64]:
    """Return XᵀY (XᵀY)ᵀ [D, D], computed for one block of users at a time."""
    fitted, raters = data.fitted
    labels = fitted.labels.numpy().astype(np.float64)
    users, items = raters.numpy(), np.searchsorted(data.known.numpy(), fitted.items.numpy())
    rated = np.bincount(users)
    means = (np.bincount(users, weights=labels) + PRIOR * labels.mean()) / (rated + PRIOR)
    values = (labels - means[users]) / np.sqrt(np.bincount(items))[items]
    if fitted.weights is not None:
        values *= fitted.weights.numpy()
    ratings = csr_matrix((values, (users, items)), shape=(len(rated), len(x)))  # Yᵀ [users, m]
    product = np.zeros((x.shape[1], x.shape[1]))
    for start in range(0, len(rated), USERS_AT_ONCE):
        block = ratings[start : start + USERS_AT_ONCE] @ x
        product += block.T @ block
    return product

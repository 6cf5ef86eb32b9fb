"""Reduced-rank regression against a dense one with a column per user and a singular value decomposition."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clicks import ITEMS, NEW, SHORT, WIDTH, before_boundary, clicks, learnable, qualities
from marc_pipeline.errors import UserError
from marc_pipeline.model.compressor import WhitenedPCA, fit_pca
from marc_pipeline.training import regression
from marc_pipeline.training.learning import LearningData, known_states, learning_data
from marc_pipeline.training.regression import PRIOR, RIDGE, VARIANCE_SHARE, fit_regression

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]


def project(module: WhitenedPCA, states: NDArray[np.float32]) -> Array:
    found: Array = module(torch.from_numpy(states)).double().numpy()
    return found


def naive_clicks(data: LearningData) -> Array:
    """Y [known items, users]: clicks minus the user's mean, divided by the root of the item's ratings."""
    items = data.known.tolist()
    rows = list(zip(data.fitted[1].tolist(), data.training.items.tolist(), data.training.labels.tolist(), strict=True))
    overall = sum(label for _, _, label in rows) / len(rows)
    y = np.zeros((len(items), max(user for user, _, _ in rows) + 1))
    for user in range(y.shape[1]):
        own = [label for who, _, label in rows if who == user]
        mean = (sum(own) + PRIOR * overall) / (len(own) + PRIOR)
        for who, item, label in rows:
            if who == user:
                y[items.index(item), user] += label - mean
    ratings = np.array([sum(1 for _, other, _ in rows if other == item) for item in items])
    return np.asarray(y / np.sqrt(ratings)[:, None])


def naive_regression(states: NDArray[np.float32], data: LearningData, *, dim: int) -> Array:
    """Vectors [all items, dim], from the singular vectors of the fit."""
    known = states[data.known.numpy()].astype(np.float64)
    mean = known.mean(axis=0)
    scale = np.sqrt(((known - mean) ** 2).sum(axis=1).mean())
    x = (known - mean) / scale
    penalty = np.sqrt(RIDGE * len(x)) * np.eye(x.shape[1])
    # Ridge regression as least squares with additional rows of 0.
    y = naive_clicks(data)
    augmented = np.vstack([y, np.zeros((x.shape[1], y.shape[1]))])
    weights = np.linalg.lstsq(np.vstack([x, penalty]), augmented, rcond=None)[0]
    variance = VARIANCE_SHARE * (weights**2).sum() / x.shape[1]
    left, _, _ = np.linalg.svd(np.hstack([x @ weights, np.sqrt(variance) * x]), full_matrices=False)
    directions: Array = np.linalg.lstsq(x, left[:, :dim] * np.sqrt(len(x)), rcond=None)[0]
    return np.asarray((states - mean) / scale @ directions)


def aligned(found: Array, expected: Array) -> Array:
    signs: Array = np.sign((found * expected).sum(axis=0))
    return found * signs


@pytest.mark.parametrize("dim", [1, 3, 6, 12])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fit_equals_a_dense_regression_up_to_sign(dim: int, seed: int) -> None:
    data, states = learnable(seed=seed)
    found, expected = project(fit_regression(states, data, dim=dim), states), naive_regression(states, data, dim=dim)
    np.testing.assert_allclose(aligned(found, expected), expected, atol=5e-3)


@pytest.mark.parametrize(("dim", "tolerance"), [(6, 2e-3), (WIDTH, 5e-3)])
def test_vectors_of_known_items_are_whitened(dim: int, tolerance: float) -> None:
    data, states = learnable()
    found = project(fit_regression(states, data, dim=dim), known_states(states, data))
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=tolerance)
    np.testing.assert_allclose(np.cov(found, rowvar=False, bias=True), np.eye(dim), atol=tolerance)


@pytest.mark.parametrize(("scale", "shift"), [(0.01, 0.0), (100.0, 0.0), (1.0, 30.0), (5.0, -40.0)])
def test_the_fit_is_invariant_to_scale_and_shift_of_the_states(scale: float, shift: float) -> None:
    data, states = learnable()
    moved = (states * scale + shift * scale).astype(np.float32)
    found, expected = (project(fit_regression(these, data, dim=6), these) for these in (moved, states))
    np.testing.assert_allclose(aligned(found, expected), expected, atol=1e-2)


def test_the_fit_does_not_depend_on_the_block_size_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    data, states = learnable()
    expected = project(fit_regression(states, data, dim=6), states)
    for at_once in (1, 7, 59, 60):
        monkeypatch.setattr(regression, "USERS_AT_ONCE", at_once)
        found = project(fit_regression(states, data, dim=6), states)
        np.testing.assert_allclose(aligned(found, expected), expected, atol=1e-4)


@pytest.mark.parametrize("unrated", [0, NEW])
def test_the_fit_is_deterministic_and_ignores_states_of_unrated_items(unrated: int) -> None:
    data, states = learnable()
    other = states.copy()
    other[:unrated] = 1e3
    first, second = (fit_regression(these, data, dim=6) for these in (states, other))
    assert torch.equal(first.directions, second.directions)
    assert torch.equal(first.mean, second.mean)


def explained(vectors: Array, wanted: Array) -> float:
    """Share of the variance that a linear map of the vectors explains."""
    x = np.column_stack([vectors, np.ones(len(vectors))])
    rest = wanted - x @ np.linalg.lstsq(x, wanted, rcond=None)[0]
    return 1 - float((rest**2).sum() / ((wanted - wanted.mean(axis=0)) ** 2).sum())


def test_the_fit_finds_qualities_that_pca_misses() -> None:
    for seed in range(3):
        data, states = learnable(seed=seed)
        wanted = qualities(seed=seed)
        found = explained(project(fit_regression(states, data, dim=6), states), wanted)
        variance = explained(project(fit_pca(known_states(states, data), dim=6)[0], states), wanted)
        assert found > 0.2 + variance, (seed, found, variance)


@pytest.mark.parametrize("users", [1, 2, 4])
def test_fewer_users_than_dimensions_give_independent_directions(users: int) -> None:
    data, states = learnable(users=users)
    found = project(fit_regression(states, data, dim=8), states)
    assert np.isfinite(found).all()
    known = found[data.known.numpy()]
    np.testing.assert_allclose(np.cov(known, rowvar=False, bias=True), np.eye(8), atol=5e-3)


def test_users_without_rows_do_not_change_the_fit() -> None:
    data, states = learnable()
    expected = project(fit_regression(states, data, dim=6), states)
    interactions, _ = clicks()
    part = interactions.take(before_boundary(interactions))
    part.users[:] += 5
    found = project(fit_regression(states, learning_data(part, settings=SHORT, holdout=0.1, items=len(states)), dim=6), states)
    np.testing.assert_allclose(aligned(found, expected), expected, atol=1e-4)


def test_more_dimensions_than_the_width_or_the_items_are_refused() -> None:
    data, states = learnable()
    for dim in (WIDTH + 1, ITEMS):
        with pytest.raises(UserError, match=rf"train\.dim is {dim}"):
            fit_regression(states, data, dim=dim)
    data, states = learnable(items=NEW + 8)
    assert len(data.known) == 8
    fit_regression(states, data, dim=7)
    with pytest.raises(UserError, match=r"train\.dim is 8: 8 items"):
        fit_regression(states, data, dim=8)


def test_more_dimensions_than_the_rank_are_refused() -> None:
    data, states = learnable()
    flat = states.copy()
    flat[:, 4:] = states[:, :1]
    assert np.isfinite(project(fit_regression(flat, data, dim=4), flat)).all()
    for bad in (flat, np.ones_like(states)):
        with pytest.raises(UserError, match=r"train\.dim is 6"):
            fit_regression(bad, data, dim=6)

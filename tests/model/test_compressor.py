"""The whitened PCA against an independent singular value decomposition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch.nn import functional

from marc_pipeline.errors import UserError
from marc_pipeline.model.compressor import WEIGHTS, Normalised, WhitenedPCA, fit_pca, load_compressor, save_compressor
from marc_schemas.bundle import CompressorCard


def hidden_states(rows: int, width: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Correlated data with a decaying spectrum and a mean far from zero."""
    rng = np.random.default_rng(seed)
    mixing = np.linalg.qr(rng.normal(size=(width, width)))[0] * np.geomspace(3, 0.05, width)[:, None]
    return (rng.normal(size=(rows, width)) @ mixing + rng.normal(size=width) * 5).astype(np.float32)


def project(module: torch.nn.Module, hidden: NDArray[np.float32]) -> NDArray[np.float64]:
    with torch.inference_mode():
        out: torch.Tensor = module(torch.from_numpy(hidden))
    return out.double().numpy()


def svd_whitened(hidden: NDArray[np.float32], dim: int) -> tuple[NDArray[np.float64], float]:
    """Whitened coordinates and share of the variance, by numpy's SVD of the centred data."""
    centred = hidden.astype(np.float64) - hidden.astype(np.float64).mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    share = (singular[:dim] ** 2).sum() / (singular**2).sum()
    return left[:, :dim] * np.sqrt(len(hidden) - 1), float(share)


@pytest.mark.parametrize(
    ("rows", "width", "dim"),
    [(200, 16, 16), (200, 16, 5), (60, 48, 10), (40, 64, 20), (9, 8, 8), (300, 32, 8), (300, 32, 32)],
)
def test_whitened_pca_equals_an_independent_svd_up_to_sign(rows: int, width: int, dim: int) -> None:
    hidden = hidden_states(rows, width)
    module, share = fit_pca(hidden, dim=dim)
    expected, expected_share = svd_whitened(hidden, dim)
    found = project(module, hidden)
    signs = np.sign((found * expected).sum(axis=0))
    np.testing.assert_allclose(found * signs, expected, atol=2e-3)
    assert share == pytest.approx(expected_share, rel=1e-6)
    # The training data is whitened: mean 0, variance 1, no correlation.
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.cov(found, rowvar=False), np.eye(dim), atol=3e-3)


def test_components_are_sorted_by_variance() -> None:
    hidden = hidden_states(300, 16)
    module, _ = fit_pca(hidden, dim=16)
    # Each direction is divided by its standard deviation.
    lengths = np.linalg.norm(module.directions.numpy(), axis=1)
    assert np.all(np.diff(lengths) > 0)
    np.testing.assert_allclose(
        1 / lengths**2, np.linalg.eigvalsh(np.cov(hidden.astype(np.float64), rowvar=False))[::-1], rtol=1e-3
    )


def test_the_same_data_gives_the_same_bits() -> None:
    hidden = hidden_states(100, 16)
    first, second = (fit_pca(hidden.copy(), dim=8)[0] for _ in range(2))
    assert torch.equal(first.directions, second.directions)
    assert torch.equal(first.mean, second.mean)


@pytest.mark.parametrize(
    ("rows", "dim", "rank", "message"),
    [
        (100, 17, 16, r"train\.dim is 17, .* 16 numbers; choose at most 16"),
        *((rows, 8, 16, f"more than 8 distinct texts, the catalogue has {rows}") for rows in (1, 7, 8)),
        *((50, 8, rank, "span fewer than 8 directions") for rank in (0, 3, 7)),
    ],
)
def test_too_few_texts_or_directions_are_user_errors(rows: int, dim: int, rank: int, message: str) -> None:
    rng = np.random.default_rng(0)
    hidden = (rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, 16)) + 1).astype(np.float32)
    with pytest.raises(UserError, match=message):
        fit_pca(hidden, dim=dim)


def test_as_many_directions_as_dimensions_are_enough() -> None:
    rng = np.random.default_rng(0)
    hidden = (rng.normal(size=(50, 8)) @ rng.normal(size=(8, 16)) + 1).astype(np.float32)
    found = project(fit_pca(hidden, dim=8)[0], hidden)
    np.testing.assert_allclose(np.cov(found, rowvar=False), np.eye(8), atol=3e-3)


def test_normalised_vectors_have_unit_length_and_the_same_direction() -> None:
    hidden = hidden_states(50, 16)
    module, _ = fit_pca(hidden, dim=8)
    plain, unit = project(module, hidden), project(Normalised(module), hidden)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6)


def test_a_saved_compressor_loads_with_the_same_bits(tmp_path: Path) -> None:
    hidden = hidden_states(50, 16)
    module, _ = fit_pca(hidden, dim=4)
    save_compressor(module, tmp_path)
    loaded = load_compressor(tmp_path, CompressorCard(kind="pca", arguments={"width": 16, "dim": 4}))
    assert isinstance(loaded, WhitenedPCA)
    assert not loaded.training
    assert np.array_equal(project(loaded, hidden), project(module, hidden))
    with safe_open(tmp_path / WEIGHTS, "np") as file:
        mean, directions = file.get_tensor("mean"), file.get_tensor("directions")
    by_hand = functional.linear(torch.from_numpy(hidden) - torch.from_numpy(mean), torch.from_numpy(directions))
    assert np.array_equal(project(loaded, hidden), by_hand.double().numpy())


def test_an_unknown_kind_of_compressor_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'hologram' is not supported \(supported: pca, bottleneck\); upgrade"):
        load_compressor(tmp_path, CompressorCard(kind="hologram"))

"""The shape of a space: against other ways to compute it, its bounds and symmetries, and the limits."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings
from marc_pipeline.model.space import ENOUGH_ROWS, degenerate, sample_rows, space_shape
from marc_schemas.space import SpaceShape

Matrix = NDArray[np.float32]


def drawn(n: int, d: int, *, seed: int = 0, offset: float = 0.0, decay: float = 0.0) -> Matrix:
    """Gaussian vectors [n, d] whose standard deviations fall like k^(-decay), with a common offset."""
    scale = np.arange(1, d + 1, dtype=np.float64) ** -decay
    return (offset + np.random.default_rng(seed).standard_normal((n, d)) * scale).astype(np.float32)


@st.composite
def spaces(draw: st.DrawFn) -> Matrix:
    """Two or more vectors of any shape of space and of any length, some of them zero."""
    n, d, seed = draw(st.integers(2, 40)), draw(st.integers(1, 9)), draw(st.integers(0, 2**32 - 1))
    vectors = drawn(n, d, seed=seed, offset=draw(st.sampled_from([0, 0.3, 50])), decay=draw(st.sampled_from([0, 1, 4])))
    lengths = draw(st.lists(st.sampled_from([0, 1e-20, 1, 7, 1e15]), min_size=n, max_size=n))
    return vectors * np.array(lengths, np.float32)[:, None]


def figures(shape: SpaceShape) -> list[float]:
    return [shape.effective_rank, shape.first_share, shape.mean_cosine]


@given(spaces())
def test_the_shape_equals_that_of_singular_values_and_of_all_pairs(vectors: Matrix) -> None:
    unit = [v / np.linalg.norm(v) if v.any() else v for v in vectors.astype(np.float64)]
    variances = np.linalg.svd(unit - np.mean(unit, axis=0), compute_uv=False) ** 2
    shares = variances / variances.sum() if variances.sum() > 1e-12 * len(unit) else np.zeros(1)
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    rank = math.exp(entropy) if shares.any() else 0.0
    cosine = np.mean([a @ b for a, b in itertools.combinations(unit, 2)])
    assert figures(space_shape(vectors)) == pytest.approx([rank, shares.max(), cosine], abs=1e-6)


@given(spaces(), st.integers(0, 2**32 - 1))
def test_rotation_order_and_lengths_change_nothing_and_figures_stay_within_bounds(vectors: Matrix, seed: int) -> None:
    (n, d), random = vectors.shape, np.random.default_rng(seed)
    shape = space_shape(vectors)
    assert shape.effective_rank == 0 or 1 - 1e-9 <= shape.effective_rank <= min(d, n - 1) + 1e-9
    assert shape.first_share == 0 or 1 / d - 1e-9 <= shape.first_share <= 1 + 1e-9
    assert -1 / (n - 1) - 1e-9 <= shape.mean_cosine <= 1
    assert figures(space_shape(random.permutation(vectors))) == pytest.approx(figures(shape), abs=1e-9)
    stretched = vectors * random.uniform(0.5, 2, (n, 1)).astype(np.float32)
    rotation, _ = np.linalg.qr(random.standard_normal((d, d)))
    turned = (stretched @ rotation).astype(np.float32)
    assert figures(space_shape(turned)) == pytest.approx(figures(shape), abs=1e-4)


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (np.eye(4, dtype=np.float32)[[0, 1] * 8], (1.0, 1.0, 7 / 15)),
        (np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32), (4.0, 0.25, -1 / 7)),
        (np.tile(drawn(1, 64), (200_000, 1)), (0.0, 0.0, 1.0)),
        (np.zeros((5, 3), np.float32), (0.0, 0.0, 0.0)),
        (np.zeros((0, 3), np.float32), (0.0, 0.0, 0.0)),
        (np.ones((1, 3), np.float32), (0.0, 0.0, 0.0)),
    ],
    ids=["two directions", "every direction", "equal", "zero", "no vector", "one vector"],
)
def test_known_spaces_have_their_shape(vectors: Matrix, expected: tuple[float, ...]) -> None:
    assert figures(space_shape(vectors)) == pytest.approx(expected, abs=1e-9)


def test_the_effective_rank_of_random_directions_is_d() -> None:
    assert space_shape(drawn(20_000, 16)).effective_rank == pytest.approx(16, rel=0.002)


RANK = r"the vectors use 0.00 of 8 directions (effective rank), audit.min_effective_rank is 1.5"
COSINE = "two random vectors have a mean cosine of {}, audit.max_mean_cosine is 0.95"
ENOUGH = ENOUGH_ROWS * 8
LINE = np.outer(np.linspace(-1, 1, ENOUGH), np.ones(8)).astype(np.float32)


@pytest.mark.parametrize(
    ("vectors", "found"),
    [
        (drawn(ENOUGH, 8), []),
        (drawn(ENOUGH, 8, offset=2), []),
        (drawn(ENOUGH, 8, offset=20), [COSINE.format("0.998")]),
        (np.ones((ENOUGH, 8), np.float32), [RANK, COSINE.format("1.000")]),
        (np.ones((ENOUGH - 1, 8), np.float32), []),
        (LINE, [RANK.replace("0.00", "1.00")]),
        (np.where(np.arange(ENOUGH)[:, None] == 5, np.float32(math.nan), drawn(ENOUGH, 8)), ["NaN"]),
        (np.full((2, 8), math.inf, np.float32), ["NaN"]),
    ],
    ids=["wide", "shifted", "one cone", "equal", "equal, few", "one line", "NaN", "infinite, few"],
)
def test_a_space_is_degenerate_beyond_the_limits(vectors: Matrix, found: list[str]) -> None:
    said = degenerate(space_shape(vectors), AuditSettings(), rows=len(vectors), dim=vectors.shape[1])
    assert said == (["the vectors contain NaN or infinity, so their space has no shape"] if found == ["NaN"] else found)


def test_limits_are_settings_and_one_dimension_can_pass_them() -> None:
    shape = space_shape(drawn(400, 4))
    assert degenerate(shape, AuditSettings(min_effective_rank=3.5, max_mean_cosine=0.5), rows=400, dim=4) == []
    (found,) = degenerate(shape, AuditSettings(min_effective_rank=4), rows=400, dim=4)
    assert found.endswith("audit.min_effective_rank is 4")
    (found,) = degenerate(shape, AuditSettings(max_mean_cosine=-0.5), rows=400, dim=4)
    assert found.endswith("audit.max_mean_cosine is -0.5")
    assert degenerate(space_shape(drawn(40, 1)), AuditSettings(), rows=40, dim=1) == []


@pytest.mark.parametrize("dim", [1, 64, 1024, 4096])
def test_the_sample_of_a_large_table_is_small_and_enough_for_the_limits(dim: int) -> None:
    assert sample_rows(dim) >= 2 * ENOUGH_ROWS * dim
    assert dim > 1024 or sample_rows(dim) * dim * 4 <= 2**25  # bytes

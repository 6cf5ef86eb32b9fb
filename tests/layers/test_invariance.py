"""InfoNCE, LiDAR and DiME against loops over their formulas, hand-computed cases, and their invariances."""

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from layer_reference import Array, lidar, rotation, tensor
from marc_pipeline.layers import invariance
from marc_pipeline.layers.invariance import dime, infonce, information_bound


def cosine(x: Array, y: Array) -> float:
    return float(sum(x * y) / math.sqrt(sum(x * x) * sum(y * y)))


def naive_infonce(a: Array, b: Array, temperature: float) -> float:
    n, total = len(a), 0.0
    for i in range(n):
        for one, other in ((a, b), (b, a)):
            scores = [math.exp(cosine(one[i], other[j]) / temperature) for j in range(n)]
            total -= math.log(scores[i] / sum(scores))
    return total / (2 * n)


def naive_shannon(values: Array) -> float:
    shares = [value / sum(values) for value in values if value > 1e-10 * max(values)]
    return -sum(share * math.log(share) for share in shares)


def naive_lidar(views: Array, ridge: float) -> float:
    n, q, width = views.shape
    means = [sum(views[i]) / q for i in range(n)]
    mean = sum(means) / n
    between = sum(np.outer(one - mean, one - mean) for one in means) / n
    within = ridge * np.eye(width)
    for i, j in itertools.product(range(n), range(q)):
        within += np.outer(views[i, j] - means[i], views[i, j] - means[i]) / (n * q)
    root = np.linalg.inv(sqrtm(within).real)
    return math.exp(naive_shannon(np.linalg.eigvalsh(root @ between @ root)))


def naive_joint_entropy(a: Array, b: Array, order: float) -> float:
    kernels = (np.array([[cosine(one, other) for other in x] for one in x]) for x in (a, b))
    values = np.linalg.eigvalsh(np.multiply(*kernels))
    if order == 1:
        return naive_shannon(values)
    shares = [value / sum(values) for value in values if value > 1e-10]
    return math.log(sum(share**order for share in shares)) / (1 - order)


def naive_dime(a: Array, b: Array, order: float, drawn: list[Array]) -> float:
    shuffled = [naive_joint_entropy(a, b[order_b], order) for order_b in drawn]
    return sum(shuffled) / len(shuffled) - naive_joint_entropy(a, b, order)


def pairs(n: int, width: int, *, seed: int = 0, noise: float = 0.5) -> tuple[Array, Array]:
    """Two views [n, D] of the same vectors, which are not centred and differ in length."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, width)) + 0.4
    one, other = (base + noise * rng.normal(size=(n, width)) for _ in range(2))
    return one * rng.lognormal(size=(n, 1)), other


def classes(n: int, q: int, width: int, *, seed: int = 0, noise: float = 0.5) -> Array:
    """Views [n, q, D] around centres; the spread of centres and of noise depends on the direction."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(n, 1, width)) * rng.uniform(0.3, 2, size=width) + 1
    return centres + noise * rng.normal(size=(n, q, width)) @ rng.normal(size=(width, width))


def tensors(arrays: tuple[Array, ...]) -> list[Tensor]:
    return [tensor(array) for array in arrays]


# InfoNCE


@given(
    n=st.integers(2, 10),
    width=st.integers(1, 8),
    temperature=st.floats(0.02, 5),
    noise=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_infonce_equals_naive_loops(n: int, width: int, temperature: float, noise: float, seed: int) -> None:
    a, b = pairs(n, width, seed=seed, noise=noise)
    found = infonce(*tensors((a, b)), temperature)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(naive_infonce(a, b, temperature), abs=1e-6)


def test_the_defaults_are_those_of_the_settings() -> None:
    defaults = {
        name: [p.default for p in inspect.signature(getattr(invariance, name)).parameters.values()][2:]
        for name in ("infonce", "lidar", "dime")
    }
    assert defaults == {"infonce": [0.1], "lidar": [1e-4], "dime": [1.0, 5, 0]}
    a, b = tensors(pairs(12, 3))
    assert dime(a, b).item() != dime(a, b, permutations=6).item()
    views = tensor(classes(5, 2, 8))
    assert abs(lidar(views, 1e-2).item() / lidar(views).item() - 1) > 0.01


def test_infonce_of_orthogonal_texts_falls_with_the_temperature() -> None:
    views = tensor(rotation(6))
    temperatures = (10, 1, 0.3, 0.1, 0.03)
    found = [infonce(views, 3 * views, temperature).item() for temperature in temperatures]
    assert found == pytest.approx([math.log1p(5 * math.exp(-1 / temperature)) for temperature in temperatures])
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0, abs=1e-12)
    assert information_bound(torch.tensor(found[-1]), 6).item() == pytest.approx(math.log(6))


@pytest.mark.parametrize("n", [2, 7, 50])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1])
def test_equal_texts_have_a_loss_of_log_n_and_a_bound_of_0(n: int, temperature: float) -> None:
    loss = infonce(torch.ones(n, 3), torch.ones(n, 3), temperature)
    assert loss.item() == pytest.approx(math.log(n), abs=1e-9)
    assert information_bound(loss, n).item() == pytest.approx(0, abs=1e-9)


def test_infonce_is_symmetric_and_above_log_n_for_wrong_pairs() -> None:
    a, b = tensors(pairs(8, 3))
    assert infonce(b, a, 0.2).item() == pytest.approx(infonce(a, b, 0.2).item(), abs=1e-12)
    # If all of b is equal, neither direction finds its pairs.
    assert infonce(a, torch.ones(8, 3), 0.2).item() > math.log(8) + 0.01
    views = tensor(rotation(6))
    assert infonce(views, views.roll(1, dims=0)).item() > math.log(6)


def test_infonce_is_invariant_to_rotation_lengths_and_text_order() -> None:
    a, b = pairs(12, 5)
    expected = infonce(*tensors((a, b))).item()
    order, lengths = np.random.default_rng(1).permutation(12), np.geomspace(1e-3, 1e3, 12)[:, None]
    moved = [(a @ rotation(5), b @ rotation(5)), (a[order], b[order]), (a * lengths, 7 * b)]
    for other in moved:
        assert infonce(*tensors(other)).item() == pytest.approx(expected, abs=1e-9)
    assert abs(infonce(*tensors((a + 1, b + 1))).item() - expected) > 0.01


# LiDAR


@given(
    n=st.integers(2, 8),
    q=st.integers(2, 5),
    width=st.integers(1, 8),
    ridge=st.sampled_from([1e-4, 1e-2, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_lidar_equals_naive_loops(n: int, q: int, width: int, ridge: float, seed: int) -> None:
    views = classes(n, q, width, seed=seed)
    found = lidar(tensor(views), ridge)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(naive_lidar(views, ridge), rel=1e-6)
    assert 1 - 1e-9 <= found.item() <= min(n - 1, width) + 1e-9


@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("width", [6, 20])
def test_k_classes_at_the_corners_of_a_simplex_have_k_minus_1_discriminants(k: int, width: int) -> None:
    rng = np.random.default_rng(0)
    corners = rotation(width)[:k, None]
    noise = 0.01 * rng.normal(size=(k, 2000, width))
    assert lidar(tensor(5 + 3 * corners + noise)).item() == pytest.approx(k - 1, rel=0.02)


def test_a_direction_with_noisy_views_counts_less() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])[:, None]
    noise = rng.normal(size=(4, 5000, 2)) * [0.1, 1.0]
    # Signal to noise of 100 and 1.
    shares = np.array([100, 1]) / 101
    assert lidar(tensor(corners + noise)).item() == pytest.approx(math.exp(-(shares @ np.log(shares))), rel=0.02)
    assert lidar(tensor(corners + noise * [1.0, 0.1])).item() == pytest.approx(2, rel=0.02)


def test_lidar_is_0_without_distance_between_texts_and_invariant_to_rotation_translation_and_order() -> None:
    assert invariance.lidar(torch.zeros(4, 4), torch.eye(4)).item() == 0
    views = classes(9, 3, 6)
    expected = lidar(tensor(views)).item()
    order = np.random.default_rng(1).permutation(9)
    for other in (views @ rotation(6), views + 10 * np.arange(6), views[order], views[:, [2, 0, 1]], -views):
        assert lidar(tensor(other)).item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("scale", [1e-6, 3.0, 1e6])
def test_the_ridge_scales_with_the_square_of_the_views(scale: float) -> None:
    views = classes(6, 2, 9)
    expected = lidar(tensor(views), 1e-3).item()
    assert lidar(tensor(scale * views), 1e-3 * scale**2).item() == pytest.approx(expected, rel=1e-8)
    assert abs(lidar(tensor(scale * views), 1e-3).item() / expected - 1) > 0.01


# DiME


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
@given(n=st.integers(2, 9), width=st.integers(1, 8), permutations=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_dime_equals_naive_loops(order: float, n: int, width: int, permutations: int, seed: int) -> None:
    a, b = pairs(n, width, seed=seed)
    draw = np.random.default_rng(seed)
    drawn = [draw.permutation(n) for _ in range(permutations)]
    found = dime(*tensors((a, b)), order=order, permutations=permutations, seed=seed)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(naive_dime(a, b, order, drawn), abs=1e-6)


def test_many_permutations_approach_the_mean_over_all_permutations() -> None:
    a, b = pairs(4, 3)
    every = [np.array(order) for order in itertools.permutations(range(4))]
    found = dime(*tensors((a, b)), permutations=2000)
    assert found.item() == pytest.approx(naive_dime(a, b, 1.0, every), rel=0.03)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("order", [0.5, 1.0, 2.0])
def test_dime_falls_with_the_noise_between_views_and_is_0_for_independent_views(order: float, seed: int) -> None:
    a, _ = pairs(150, 4, seed=seed)
    noisy = [pairs(150, 4, seed=seed, noise=noise) for noise in (0.2, 0.5)]
    identical, near, apart, independent = (
        dime(*tensors(views), order=order, seed=seed).item()
        for views in ((a, a), *noisy, (a, pairs(150, 4, seed=seed + 100)[0]))
    )
    assert identical > near > apart > 0
    assert abs(independent) < 0.1 * near


def test_independent_views_have_a_dime_of_about_0_on_average() -> None:
    def found(seed: int) -> float:
        a, b = tensors((pairs(40, 3, seed=seed)[0], pairs(40, 3, seed=seed + 1000)[0]))
        return dime(a, b, seed=seed).item()

    values = np.array([found(seed) for seed in range(60)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))


def test_constant_views_and_two_texts_have_dime_0() -> None:
    a, _ = tensors(pairs(10, 4))
    assert dime(a, torch.ones(10, 4)).item() == pytest.approx(0, abs=1e-12)
    # A permutation of two texts swaps both rows and columns of a 2 × 2 kernel.
    assert dime(*tensors(pairs(2, 4))).item() == pytest.approx(0, abs=1e-12)


def test_permutations_depend_only_on_the_seed() -> None:
    a, b = tensors(pairs(20, 4))
    torch.manual_seed(1)
    expected = dime(a, b, seed=3).item()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert dime(a, b, seed=3).item() == expected
    torch.set_rng_state(state)
    assert dime(a, b, seed=4).item() != expected
    assert len({dime(a, b, seed=(3, block)).item() for block in range(4)}) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_dime_is_invariant_to_rotation_and_lengths_and_accepts_different_widths() -> None:
    a, b = pairs(20, 5)
    expected = dime(*tensors((a, b))).item()
    lengths = np.geomspace(1e-3, 1e3, 20)[:, None]
    wide = b @ np.eye(5, 8)
    for other in ((a @ rotation(5), b), (a, b @ rotation(5)), (a * lengths, -b), (a, wide)):
        assert dime(*tensors(other)).item() == pytest.approx(expected, abs=1e-9)


# Not finite, or refused


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_give_nan(bad: float) -> None:
    a, b = tensors(pairs(6, 3))
    views = tensor(classes(6, 2, 3))
    a[2, 1] = views[2, 1, 1] = bad
    assert torch.stack([infonce(a, b), infonce(b, a), dime(a, b), dime(b, a), lidar(views)]).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_float64(dtype: torch.dtype) -> None:
    a, b = (view.to(dtype) for view in tensors(pairs(9, 4)))
    views = torch.stack([a, b], dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [infonce(a, b), dime(a, b), lidar(views)]
    assert all(value.dtype == torch.float64 for value in found)
    expected = [infonce(a.double(), b.double()), dime(a.double(), b.double()), lidar(views.double())]
    assert [value.item() for value in found] == [value.item() for value in expected]


@pytest.mark.parametrize("shapes", [((5, 3), (6, 3)), ((5,), (5, 3)), ((5, 3), (5,)), ((2, 5, 3), (2, 5, 3))])
def test_views_that_are_not_matrices_with_equal_rows_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    views = [torch.randn(shape) for shape in shapes]
    with pytest.raises(ValueError, match=r"a and b must be \[n, D\] both, not \[.*\] and \[.*\]"):
        infonce(*views)
    with pytest.raises(ValueError, match=r"a and b must be \[n, p\] and \[n, q\] with the same n, not \[.*\]"):
        dime(*views)


A, B, EYE = torch.randn(4, 3), torch.randn(4, 3), torch.eye(3)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (partial(infonce, A, B[:, :2]), r"must be \[n, D\] both, not \[4, 3\] and \[4, 2\]"),
        *(
            (partial(function, A[:1], B[:1]), "comparing views needs at least 2 texts, not 1")
            for function in (infonce, dime)
        ),
        *((partial(infonce, A, B, bad), "the temperature must be above 0, not") for bad in (0.0, -0.1, math.nan)),
        (partial(dime, A, B, permutations=0), "at least 1 permutation, not 0"),
        (partial(dime, A, B, order=-1), "order of an entropy must be at least 0, not -1"),
        (partial(invariance.lidar, EYE, torch.eye(4)), r"must be \[D, D\] both, not \[3, 3\] and \[4, 4\]"),
        *(
            (partial(invariance.lidar, EYE, EYE, bad), "the ridge must be above 0, not")
            for bad in (0.0, -1e-4, math.nan)
        ),
        (
            partial(invariance.lidar, EYE, torch.full((3, 3), 1e20, dtype=torch.float64)),
            r"the ridge 0.0001 is below the rounding of a scatter of 1e\+20",
        ),
    ],
)
def test_invalid_shapes_and_settings_are_refused(measure: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure()

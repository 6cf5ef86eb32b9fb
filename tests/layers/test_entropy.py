"""Matrix-based entropy against loops, hand-computed cases, invariances and refused arguments."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_reference import Array, rotation, tensor
from marc_pipeline.layers.entropy import (
    Normalisation,
    dataset_entropy,
    effective_rank,
    entropy,
    normalise,
    prompt_entropy,
    spectrum,
    spectrum_of,
    unit_rows,
)

ORDERS = [0.0, 0.3, 0.5, 0.99, 0.995, 1.0, 1.005, 1.01, 1.5, 2.0, 5.0, 40.0, math.inf]
all_orders = pytest.mark.parametrize("order", ORDERS)


def naive_spectrum(z: Array) -> Array:
    """Eigenvalues of K_ij / Σ K_ii, K_ij = Σ_d z_id z_jd / (|z_i| |z_j|), by a loop over all pairs."""
    n = len(z)
    gram = np.zeros((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        gram[i, j] = sum(z[i] * z[j]) / math.sqrt(sum(z[i] ** 2) * sum(z[j] ** 2))
    return np.maximum(np.linalg.eigvals(gram / np.trace(gram)).real, 0)


def naive_entropy(z: Array, order: float) -> float:
    found = [value for value in naive_spectrum(z) if value > 1e-10]
    if order == 0:
        return math.log(len(found))
    if order == 1:
        return -sum(value * math.log(value) for value in found)
    if order == math.inf:
        return -math.log(max(found))
    return math.log(sum(value**order for value in found)) / (1 - order)


def random_rows(n: int, width: int, seed: int = 0) -> Array:
    """Rows of different lengths whose directions are neither equal nor evenly spread."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) * rng.uniform(0.2, 2, size=width) * rng.lognormal(size=(n, 1)) + 0.3


def orthonormal(n: int, width: int) -> Tensor:
    return tensor(rotation(width)[:n])


# Against the formulas


@all_orders
@given(n=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@example(n=12, width=5, seed=0)
@example(n=5, width=12, seed=0)
@example(n=6, width=6, seed=0)
@settings(max_examples=15, deadline=None)
def test_entropy_equals_naive_loops(order: float, n: int, width: int, seed: int) -> None:
    z = random_rows(n, width, seed)
    found = dataset_entropy(tensor(z), order)
    assert found.shape == ()
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(naive_entropy(z, order), abs=1e-6)


@pytest.mark.parametrize(("n", "width"), [(7, 4), (4, 7), (5, 5)])
def test_the_spectrum_is_that_of_the_unit_rows_and_sums_to_1(n: int, width: int) -> None:
    z = random_rows(n, width)
    found = spectrum(tensor(z))
    assert found.shape == (min(n, width),)
    assert found.sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(found.numpy(), np.sort(naive_spectrum(z))[-min(n, width) :], atol=1e-9)


@all_orders
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_entropy_of_a_text_does_not_depend_on_its_batch(order: float, tokens: int) -> None:
    texts = np.stack([random_rows(tokens, 8, seed) for seed in range(4)])
    found = prompt_entropy(tensor(texts), order)
    assert found.shape == (4,)
    assert found.tolist() == pytest.approx([naive_entropy(text, order) for text in texts], abs=1e-6)


# Hand-computed cases


@all_orders
@pytest.mark.parametrize(("n", "width"), [(1, 4), (4, 4), (4, 9)])
def test_orthogonal_rows_have_the_largest_entropy(order: float, n: int, width: int) -> None:
    z = orthonormal(n, width) * torch.arange(1.0, n + 1)[:, None]  # of different lengths
    assert dataset_entropy(z, order).item() == pytest.approx(math.log(n), abs=1e-12)
    assert effective_rank(spectrum(z)).item() == pytest.approx(n, abs=1e-9)


@all_orders
@pytest.mark.parametrize(("n", "width"), [(1, 3), (9, 4), (4, 9)])
def test_rows_on_one_line_have_entropy_0(order: float, n: int, width: int) -> None:
    z = tensor(np.outer(np.linspace(-3, 2, n), random_rows(1, width)[0]))
    found = dataset_entropy(z, order).item()
    assert found == pytest.approx(0, abs=1e-12)
    assert math.copysign(1, found) == 1
    assert effective_rank(spectrum(z)).item() == pytest.approx(1, abs=1e-12)


def test_entropies_of_two_directions_with_known_shares() -> None:
    z = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 5.0]])
    shares = (0.75, 0.25)
    assert spectrum(z).tolist() == pytest.approx([0.25, 0.75])
    assert dataset_entropy(z).item() == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert dataset_entropy(z, 2).item() == pytest.approx(-math.log(0.75**2 + 0.25**2))
    assert dataset_entropy(z, 0).item() == pytest.approx(math.log(2))
    assert dataset_entropy(z, math.inf).item() == pytest.approx(-math.log(0.75))


@all_orders
def test_rows_of_zeros_only_have_entropy_0(order: float) -> None:
    zeros = torch.zeros(5, 3)
    assert spectrum(zeros).tolist() == [0, 0, 0]
    assert spectrum_of(torch.zeros(3, 3)).tolist() == [0, 0, 0]
    assert dataset_entropy(zeros, order).item() == 0
    assert effective_rank(spectrum(zeros)).item() == 0


@all_orders
@pytest.mark.parametrize("padded", [5, 40])
def test_rows_of_zeros_are_ignored(order: float, padded: int) -> None:
    texts = [random_rows(n, 6, n) for n in (2, 5, 4)]
    batch = torch.zeros(3, padded, 6, dtype=torch.float64)
    for row, text in zip(batch, texts, strict=True):
        row[: len(text)] = tensor(text)
    alone = [dataset_entropy(tensor(text), order).item() for text in texts]
    assert prompt_entropy(batch, order).tolist() == pytest.approx(alone, abs=1e-12)


# Properties


@given(n=st.integers(1, 10), width=st.integers(1, 10), seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_entropy_falls_with_the_order_and_is_at_most_the_log_of_the_rank(
    n: int, width: int, seed: int, rank: int
) -> None:
    z = random_rows(n, rank, seed) @ random_rows(rank, width, seed + 1)
    found = [dataset_entropy(tensor(z), order).item() for order in ORDERS]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(found)), found
    assert found[0] <= math.log(min(n, width, rank)) + 1e-12
    assert found[-1] >= 0


@pytest.mark.parametrize("step", [1e-1, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_orders_near_1_approach_the_shannon_entropy(step: float) -> None:
    eigenvalues = spectrum(tensor(random_rows(30, 20)))
    shannon = entropy(eigenvalues).item()
    for order in (1 - step, 1 + step):
        assert entropy(eigenvalues, order).item() == pytest.approx(shannon, abs=2 * step + 1e-13)


@pytest.mark.parametrize("edge", [0.99, 1.01])
def test_both_formulas_agree_at_the_threshold_between_them(edge: float) -> None:
    eigenvalues = spectrum(tensor(random_rows(30, 20)))
    inside, outside = (entropy(eigenvalues, edge + step).item() for step in (-1e-12, 1e-12))
    assert inside == pytest.approx(outside, abs=1e-11)


def test_large_orders_approach_the_largest_eigenvalue() -> None:
    eigenvalues = spectrum(tensor(random_rows(30, 20)))
    assert entropy(eigenvalues, 1e6).item() == pytest.approx(entropy(eigenvalues, math.inf).item(), rel=1e-5)
    assert entropy(torch.full((8,), 1 / 8), 1e6).item() == pytest.approx(math.log(8))


@all_orders
@pytest.mark.parametrize(("n", "width"), [(20, 6), (6, 20)])
def test_entropy_is_invariant_to_rotation_scale_and_row_order(order: float, n: int, width: int) -> None:
    z = random_rows(n, width)
    expected = dataset_entropy(tensor(z), order).item()
    rng = np.random.default_rng(1)
    moved = [
        z @ rotation(width),
        z[rng.permutation(n)],
        z * rng.choice([-3, 1e-5, 2], size=(n, 1)),
        1e200 * z,
        1e-200 * z,
    ]
    for other in moved:
        assert dataset_entropy(tensor(other), order).item() == pytest.approx(expected, abs=1e-9)
    assert abs(dataset_entropy(tensor(z + 1), order).item() - expected) > 1e-3 or order == 0


@all_orders
@pytest.mark.parametrize(("n", "width"), [(30, 7), (7, 30)])
def test_a_second_moment_summed_over_blocks_gives_the_same_entropy(order: float, n: int, width: int) -> None:
    """The matrix may be the larger of the two, whose additional eigenvalues are rounding errors."""
    rows = unit_rows(tensor(random_rows(n, width)))
    moment = sum((block.mT @ block for block in rows.split(4)), torch.zeros(width, width))
    expected = entropy(spectrum(rows), order).item()
    assert entropy(spectrum_of(moment), order).item() == pytest.approx(expected, abs=1e-9)


def test_rounding_errors_do_not_count_as_directions() -> None:
    z = np.repeat(random_rows(3, 40), 50, axis=0) * np.random.default_rng(0).uniform(0.1, 9, size=(150, 1))
    eigenvalues = spectrum(tensor(z))
    assert (eigenvalues > 0).sum() == 3
    assert entropy(eigenvalues, 0).item() == pytest.approx(math.log(3))
    assert entropy(eigenvalues, 0.05).item() <= math.log(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_computed_in_float64(dtype: torch.dtype) -> None:
    z = tensor(random_rows(20, 8)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dataset_entropy(z)
    assert found.dtype == torch.float64
    assert found.item() == dataset_entropy(z.double()).item()


@all_orders
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_text_that_is_not_finite_gives_nan_for_itself_only(order: float, bad: float) -> None:
    texts = tensor(np.stack([random_rows(6, 4, seed) for seed in range(3)]))
    expected = prompt_entropy(texts, order).tolist()
    texts[1, 2, 3] = bad
    found = prompt_entropy(texts, order)
    assert found[1].isnan()
    assert found[[0, 2]].tolist() == [expected[0], expected[2]]
    assert effective_rank(spectrum(texts))[1].isnan()


# Normalisations


@pytest.mark.parametrize(
    ("how", "divisor"), [("raw", 1), ("log_rows", math.log(20)), ("log_width", math.log(8)), ("log_least", math.log(8))]
)
def test_normalisation_divides_by_the_largest_entropy(how: Normalisation, divisor: float) -> None:
    raw = dataset_entropy(tensor(random_rows(20, 8)))
    assert normalise(raw, 20, 8, how).item() == pytest.approx(raw.item() / divisor)


@pytest.mark.parametrize(("n", "width"), [(4, 9), (9, 4), (4, 4)])
def test_the_largest_possible_entropy_is_normalised_to_1(n: int, width: int) -> None:
    z = orthonormal(4, 9) if n < width else orthonormal(width, width).repeat(n, 1)[: n // width * width]
    raw = dataset_entropy(z)
    assert normalise(raw, len(z), width, "log_least").item() == pytest.approx(1)


def test_normalisation_takes_one_number_of_rows_per_text() -> None:
    raw, rows = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([2, 16, 1, 0])
    expected = {
        "raw": [1, 1, 0, 0],
        "log_rows": [1 / math.log(2), 1 / math.log(16), math.nan, math.nan],
        "log_width": [1 / math.log(4), 1 / math.log(4), 0, 0],
        "log_least": [1 / math.log(2), 1 / math.log(4), math.nan, math.nan],
    }
    for how, values in expected.items():
        assert normalise(raw, rows, 4, how).tolist() == pytest.approx(values, nan_ok=True)  # type: ignore[arg-type]
    assert normalise(raw, rows, 1, "log_width").isnan().all()


# Refused


@pytest.mark.parametrize("order", [-0.5, -math.inf, math.nan])
def test_a_negative_order_is_refused(order: float) -> None:
    with pytest.raises(ValueError, match="the order of an entropy must be at least 0, not"):
        entropy(torch.ones(3), order)


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        *((spectrum, shape, r"z must be \[..., n, D\]") for shape in [(4,), (0, 4), (4, 0), (2, 0, 4)]),
        *((spectrum_of, shape, r"moment must be \[..., D, D\]") for shape in [(4,), (3, 4), (0, 0)]),
        (prompt_entropy, (4, 3), r"tokens must be \[b, t, D\], not \[4, 3\]"),
        (dataset_entropy, (2, 4, 3), r"z must be \[n, D\], not \[2, 4, 3\]"),
    ],
)
def test_wrong_shapes_are_refused(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(shape))


def test_an_unknown_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="normalisation must be one of raw, log_rows, log_width, log_least, not 'log'"):
        normalise(torch.ones(()), 3, 4, "log")  # type: ignore[arg-type]

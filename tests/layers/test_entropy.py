"""Matrix-based entropy against a reference computation, hand-computed cases, invariances and refused arguments."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from layer_reference import Array, dataset_entropy, naive_entropy, naive_spectrum, rotation, tensor
from marc_pipeline.layers.entropy import (
    effective_rank,
    entropy,
    normalise,
    prompt_entropy,
    spectrum,
    spectrum_of,
    unit_rows,
)

ORDERS = [0.0, 0.3, 0.5, 0.99, 0.995, 1.0, 1.005, 1.01, 1.5, 2.0, 5.0, 40.0, math.inf]
NORMALISATIONS = ("raw", "log_rows", "log_width", "log_least")
all_orders = pytest.mark.parametrize("order", ORDERS)


def random_rows(n: int, width: int, seed: int = 0) -> Array:
    """Rows of different lengths whose directions are neither equal nor evenly spread."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) * rng.uniform(0.2, 2, size=width) * rng.lognormal(size=(n, 1)) + 0.3


@all_orders
@given(n=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
@example(n=12, width=5, seed=0)
@example(n=5, width=12, seed=0)
@example(n=6, width=6, seed=0)
@settings(max_examples=15, deadline=None)
def test_spectrum_and_entropy_equal_the_reference(order: float, n: int, width: int, seed: int) -> None:
    z = random_rows(n, width, seed)
    shares = spectrum(tensor(z))
    assert shares.shape == (min(n, width),)
    assert shares.sum().item() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(shares.numpy(), naive_spectrum(z)[-min(n, width) :], atol=1e-9)
    found = entropy(shares, order)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert found.item() == pytest.approx(naive_entropy(z, order), abs=1e-6)


@all_orders
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_the_entropy_of_a_text_does_not_depend_on_its_batch_or_padding(order: float, tokens: int) -> None:
    texts = [random_rows(tokens + more, 8, more) for more in range(4)]
    expected = pytest.approx([naive_entropy(text, order) for text in texts], abs=1e-6)
    for padded in (tokens + 3, tokens + 40):
        batch = torch.zeros(4, padded, 8, dtype=torch.float64)
        for row, text in zip(batch, texts, strict=True):
            row[: len(text)] = tensor(text)
        assert prompt_entropy(batch, order).tolist() == expected


# Hand-computed cases


@all_orders
@pytest.mark.parametrize(("n", "width"), [(1, 4), (4, 4), (4, 9)])
def test_orthogonal_rows_have_the_largest_entropy_and_equal_directions_entropy_0(
    order: float, n: int, width: int
) -> None:
    orthogonal = tensor(rotation(width)[:n]) * torch.arange(1.0, n + 1)[:, None]
    assert dataset_entropy(orthogonal, order).item() == pytest.approx(math.log(n), abs=1e-12)
    assert effective_rank(spectrum(orthogonal)).item() == pytest.approx(n, abs=1e-9)
    line = tensor(np.outer(np.linspace(-3, 2, n + 1), random_rows(1, width)[0]))
    found = dataset_entropy(line, order).item()
    assert found == pytest.approx(0, abs=1e-12)
    assert math.copysign(1, found) == 1
    assert effective_rank(spectrum(line)).item() == pytest.approx(1, abs=1e-12)


def test_entropies_of_two_directions_with_known_shares() -> None:
    z = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 5.0]])
    assert spectrum(z).tolist() == pytest.approx([0.25, 0.75])
    shannon = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = {1: shannon, 2: -math.log(0.75**2 + 0.25**2), 0: math.log(2), math.inf: -math.log(0.75)}
    assert {order: dataset_entropy(z, order).item() for order in expected} == pytest.approx(expected)


@all_orders
def test_rows_of_zeros_only_have_entropy_0(order: float) -> None:
    zeros = torch.zeros(5, 3)
    assert spectrum(zeros).tolist() == spectrum_of(torch.zeros(3, 3)).tolist() == [0, 0, 0]
    assert dataset_entropy(zeros, order).item() == effective_rank(spectrum(zeros)).item() == 0


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


def test_entropy_is_continuous_in_the_order() -> None:
    of_order = partial(entropy, spectrum(tensor(random_rows(30, 20))))
    shannon = of_order().item()
    for step in (1e-1, 1e-3, 1e-6, 1e-9, 1e-12, 1e-15):
        for order in (1 - step, 1 + step):
            assert of_order(order).item() == pytest.approx(shannon, abs=2 * step + 1e-13)
    for edge in (0.99, 1.01):  # between the two formulas
        inside, outside = (of_order(edge + step).item() for step in (-1e-12, 1e-12))
        assert inside == pytest.approx(outside, abs=1e-11)
    assert of_order(1e6).item() == pytest.approx(of_order(math.inf).item(), rel=1e-5)
    assert entropy(torch.full((8,), 1 / 8), 1e6).item() == pytest.approx(math.log(8))


@all_orders
@pytest.mark.parametrize(("n", "width"), [(20, 6), (6, 20)])
def test_entropy_is_invariant_to_rotation_scale_and_row_order(order: float, n: int, width: int) -> None:
    z = random_rows(n, width)
    expected = dataset_entropy(tensor(z), order).item()
    rng = np.random.default_rng(1)
    scales = rng.choice([-3, 1e-5, 2], size=(n, 1))
    for other in (z @ rotation(width), z[rng.permutation(n)], z * scales, 1e200 * z, 1e-200 * z):
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


def test_normalisation_divides_by_the_largest_entropy() -> None:
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
    divisors = [1, math.log(20), math.log(8), math.log(8)]
    found = [normalise(raw[0], 20, 8, how).item() for how in NORMALISATIONS]  # type: ignore[arg-type]
    assert found == pytest.approx([1 / divisor for divisor in divisors])


@pytest.mark.parametrize(("n", "width"), [(4, 9), (9, 4), (4, 4)])
def test_the_largest_possible_entropy_is_normalised_to_1(n: int, width: int) -> None:
    rows = tensor(rotation(width)[:n])
    z = rows.repeat(n // len(rows), 1)
    assert normalise(dataset_entropy(z), len(z), width, "log_least").item() == pytest.approx(1)


# Refused


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        *((spectrum, shape, r"z must be \[..., n, D\]") for shape in [(4,), (0, 4), (4, 0), (2, 0, 4)]),
        *((spectrum_of, shape, r"moment must be \[..., D, D\]") for shape in [(4,), (3, 4), (0, 0)]),
        (prompt_entropy, (4, 3), r"tokens must be \[b, t, D\], not \[4, 3\]"),
        *(
            (partial(entropy, order=order), (3,), "the order of an entropy must be at least 0, not")
            for order in (-0.5, -math.inf, math.nan)
        ),
        (
            partial(normalise, rows=3, width=4, how="log"),
            (),
            "normalisation must be one of raw, log_rows, log_width, log_least, not 'log'",
        ),
    ],
)
def test_wrong_shapes_orders_and_normalisations_are_refused(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(torch.ones(shape))

"""Layer moments: blocks of any size, in any order, merged and stored in between, give the metrics of the whole."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from layer_reference import dataset_entropy, layer_metrics, lidar
from marc_pipeline.layers.curvature import curvature
from marc_pipeline.layers.entropy import prompt_entropy, unit_rows
from marc_pipeline.layers.moments import LayerMoments

WIDTH = 6
TEXTS = 23
Figures = dict[str, float]
OTHERS: dict[str, Any] = {"order": 2.0, "temperature": 0.5, "ridge": 1e-2, "permutations": 2, "seed": 7}
OF_VIEWS = ("infonce", "information_bound", "lidar", "dime")
OF_TOKENS = (*(f"prompt_entropy{how}" for how in ("", "_log_rows", "_log_width", "_log_least")), "curvature")


@dataclass(frozen=True)
class Block:
    """Arguments of one ``add``."""

    texts: Tensor
    token_figures: Any
    views: Any
    block: int

    def to(self, moments: LayerMoments) -> None:
        moments.add(self.texts, self.token_figures, self.views, block=self.block)


def layer(n: int, *, seed: int = 0, order: float = 1.0, q: int = 3) -> Block:
    """One layer's vectors of n texts, not centred and of different lengths, and token figures of 1 to 8 tokens."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    texts = (normal(n, WIDTH) + 0.5 * normal(WIDTH)) * normal(n, 1).exp()
    views = texts[:, None] + 0.7 * normal(n, q, WIDTH)
    rows = []
    for number in range(n):
        tokens = normal(1, 1 + number % 8, WIDTH) + 0.3
        rows.append([prompt_entropy(tokens, order).item(), tokens.shape[1], curvature(tokens).item()])
    return Block(texts, torch.tensor(rows, dtype=torch.float64).reshape(n, 3), views, 0)


def cut(whole: Block, sizes: Sequence[int]) -> list[Block]:
    assert sum(sizes) == len(whole.texts)
    parts = zip(*(part.split(sizes) for part in (whole.texts, whole.token_figures, whole.views)), strict=True)
    return [Block(*part, block=number) for number, part in enumerate(parts)]


def at_once(whole: Block, sizes: Sequence[int], **options: Any) -> Figures:
    """Metrics of the whole sample; InfoNCE and DiME of each block."""
    blocks = enumerate(np.split(np.arange(len(whole.texts)), np.cumsum(sizes)[:-1]))
    return layer_metrics(whole.texts, whole.token_figures.numpy(), whole.views, blocks, **options)


def assert_same(found: Figures, expected: Figures) -> None:
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9, nan_ok=True)


def stored(moments: LayerMoments) -> LayerMoments:
    """The moments after saving and loading them."""
    return LayerMoments.from_tensors(load(save(moments.tensors())))


def accumulated(blocks: Sequence[Block], **options: Any) -> LayerMoments:
    moments = LayerMoments(WIDTH, **options)
    for block in blocks:
        block.to(moments)
    return moments


Way = tuple[list[int], list[int], list[int], list[bool]]


@st.composite
def ways(draw: st.DrawFn) -> Way:
    """Sizes of blocks, the order in which they come, the process of each, and which processes store theirs."""
    sizes, left = [], TEXTS
    while left:
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    if max(sizes) < 2:
        sizes = [2, *sizes[2:]]
    order = draw(st.permutations(range(len(sizes))))
    processes = draw(st.integers(1, 4))
    spread = [draw(st.integers(0, processes - 1)) for _ in sizes]
    return sizes, list(order), spread, [draw(st.booleans()) for _ in range(processes)]


# Equality with the whole sample


@pytest.mark.parametrize("options", [{}, OTHERS], ids=["defaults", "others"])
@given(way=ways(), seed=st.integers(0, 2**32 - 1))
@example(way=([TEXTS], [0], [0], [False]), seed=0)
@example(way=([1] * 21 + [2], list(range(22)), [0] * 22, [True]), seed=0)
@settings(max_examples=30, deadline=None)
def test_blocks_in_any_order_and_merge_give_the_metrics_of_the_whole(
    options: dict[str, Any], way: Way, seed: int
) -> None:
    sizes, order, spread, stores = way
    whole = layer(TEXTS, seed=seed, order=options.get("order", 1.0))
    blocks = cut(whole, sizes)
    processes = [LayerMoments(WIDTH, **options) for _ in stores]
    for number in order:
        blocks[number].to(processes[spread[number]])
        if stores[spread[number]]:
            processes[spread[number]] = stored(processes[spread[number]])
    first, *others = processes
    for other in others:
        first.merge(other)
    assert_same(first.figures(), at_once(whole, sizes, **options))


def test_figures_can_be_read_between_blocks() -> None:
    whole = layer(TEXTS)
    *blocks, last = cut(whole, [10, 10, 3])
    moments = accumulated(blocks)
    first = Block(whole.texts[:20], whole.token_figures[:20], whole.views[:20], 0)
    assert_same(moments.figures(), at_once(first, [10, 10]))
    last.to(moments)
    assert_same(moments.figures(), at_once(whole, [10, 10, 3]))


def test_a_width_above_the_number_of_texts() -> None:
    draw = torch.Generator().manual_seed(0)
    texts, views = torch.randn(9, 40, generator=draw), torch.randn(9, 2, 40, generator=draw)
    moments = LayerMoments(40)
    for block in range(3):
        moments.add(texts[3 * block :][:3], None, views[3 * block :][:3], block=block)
    found = moments.figures()
    expected = dataset_entropy(texts).item()
    assert found["dataset_entropy"] == pytest.approx(expected, abs=1e-9)
    assert found["dataset_entropy_log_least"] == pytest.approx(expected / math.log(9), abs=1e-9)
    assert found["lidar"] == pytest.approx(lidar(math.sqrt(40) * unit_rows(views)).item(), rel=1e-9)


def test_views_may_differ_in_number_between_blocks() -> None:
    few, many = layer(10, q=2), layer(10, seed=1, q=5)
    moments = accumulated([few, replace(many, block=1)])
    views = [math.sqrt(WIDTH) * unit_rows(block.views) for block in (few, many)]
    means = torch.cat([view.mean(dim=1) for view in views])
    apart = means - means.mean(dim=0)
    inner = torch.cat([(view - view.mean(dim=1, keepdim=True)).flatten(0, 1) for view in views])
    whitened = torch.linalg.solve(inner.mT @ inner / 70 + 1e-4 * torch.eye(WIDTH), apart.mT @ apart / 20)
    shares = torch.linalg.eigvals(whitened).real
    shares = shares / shares.sum()
    assert moments.figures()["lidar"] == pytest.approx(math.exp(-(shares * shares.log()).sum().item()), rel=1e-9)


def test_the_seed_and_the_block_number_determine_the_permutations() -> None:
    one, other = layer(12), layer(12, seed=1)
    expected = accumulated([replace(one, block=4), replace(other, block=9)]).figures()
    torch.manual_seed(5)
    assert_same(accumulated([replace(other, block=9), replace(one, block=4)]).figures(), expected)
    assert accumulated([replace(one, block=5), replace(other, block=9)]).figures()["dime"] != expected["dime"]
    assert accumulated([replace(one, block=4), replace(other, block=9)], seed=1).figures()["dime"] != expected["dime"]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_figures_are_invariant_to_the_scale_of_a_layer(scale: float) -> None:
    whole = layer(TEXTS)
    scaled = Block(scale * whole.texts, whole.token_figures, scale * whole.views, 0)
    assert_same(accumulated([scaled]).figures(), accumulated([whole]).figures())


def test_the_ridge_is_relative_to_a_mean_square_of_1() -> None:
    draw = torch.Generator().manual_seed(0)
    signs = torch.randn(30, 1, 8, generator=draw) + 0.4 * torch.randn(30, 2, 8, generator=draw)
    views = signs.sign().double()
    for ridge in (1e-4, 1e-2, 1.0):
        moments = LayerMoments(8, ridge=ridge)
        moments.add(views[:, 0], None, 1e-3 * views, block=0)
        assert moments.figures()["lidar"] == pytest.approx(lidar(views, ridge).item(), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_blocks_are_accumulated_in_float64(dtype: torch.dtype) -> None:
    whole = layer(TEXTS)
    narrow = Block(whole.texts.to(dtype), whole.token_figures, whole.views.to(dtype), 0)
    wide = Block(narrow.texts.double(), whole.token_figures, whole.views.to(dtype).double(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = accumulated([narrow])
    assert found.figures() == accumulated([wide]).figures()
    assert {tensor.dtype for tensor in found.tensors().values()} == {torch.float64, torch.int64}


def test_moments_do_not_keep_the_graph_of_vectors_with_gradients() -> None:
    whole = layer(TEXTS)
    moments = accumulated([Block(whole.texts.requires_grad_(), whole.token_figures, whole.views.requires_grad_(), 0)])
    assert not any(tensor.requires_grad for tensor in moments.tensors().values())
    assert_same(moments.figures(), at_once(replace(whole, texts=whole.texts.detach()), [TEXTS]))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_figures() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    whole = layer(TEXTS)
    expected = at_once(whole, [10, 13])
    for device in ("cpu", "cuda"):
        moments = LayerMoments(WIDTH, device=device)
        for block in cut(whole, [10, 13]):
            moments.add(block.texts.cuda(), block.token_figures.cuda(), block.views.cuda(), block=block.block)
        assert_same(moments.figures(), expected)
        assert_same(LayerMoments.from_tensors(moments.tensors(), device="cuda").figures(), expected)


# Undefined metrics


def test_figures_of_no_texts_are_nan() -> None:
    found = LayerMoments(WIDTH).figures()
    assert found.pop("texts") == 0
    assert all(math.isnan(value) for value in found.values())
    empty = accumulated([layer(0)]).figures()
    assert_same(empty, LayerMoments(WIDTH).figures())
    moments = accumulated([layer(TEXTS)])
    moments.merge(LayerMoments(WIDTH))
    assert_same(moments.figures(), accumulated([layer(TEXTS)]).figures())


def test_without_views_or_tokens_only_their_figures_are_nan() -> None:
    whole = layer(TEXTS)
    expected = at_once(whole, [TEXTS])
    for missing, names in (("views", OF_VIEWS), ("token_figures", OF_TOKENS)):
        found = accumulated([replace(whole, **{missing: None})]).figures()
        assert_same(found, expected | dict.fromkeys(names, math.nan))


def test_undefined_curvatures_and_texts_of_one_token_are_left_out_of_the_means() -> None:
    figures = torch.tensor(
        [[0.0, 1.0, -1.0], [0.6, 2.0, math.nan], [1.0, 4.0, 0.5], [1.5, 20.0, 1.5], [math.nan, 3.0, 0.7]]
    )
    found = accumulated([Block(torch.randn(5, WIDTH), figures, None, 0)]).figures()
    by_rows, by_least = (
        np.mean([0.6 / math.log(2), 1 / math.log(4), 1.5 / math.log(most)]) for most in (20, min(20, WIDTH))
    )
    expected = [3.1 / 4, by_rows, 3.1 / 4 / math.log(WIDTH), by_least, (0.5 + 1.5 + 0.7) / 3]
    assert [found[name] for name in OF_TOKENS] == pytest.approx(expected)


def test_blocks_of_one_text_have_no_pairs_but_are_classes() -> None:
    whole = layer(3)
    singles = cut(whole, [1, 1, 1])
    found = accumulated(singles).figures()
    assert all(math.isnan(value) for value in (found["infonce"], found["information_bound"], found["dime"]))
    assert found["lidar"] == pytest.approx(lidar(math.sqrt(WIDTH) * unit_rows(whole.views)).item(), rel=1e-9)
    alone = accumulated(singles[:1]).figures()
    assert all(math.isnan(value) for value in (alone["lidar"], alone["dataset_entropy_log_rows"]))
    assert (alone["dataset_entropy"], alone["effective_rank"]) == (0, 1)


@pytest.mark.parametrize("sizes", [[12], [5, 4, 3]])
@pytest.mark.parametrize("seed", range(4))
def test_equal_texts_have_entropy_0_and_lidar_0(sizes: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    views = torch.randn(1, 3, WIDTH, generator=draw, dtype=torch.float64)
    alike = Block(torch.ones(12, WIDTH), torch.zeros(12, 3), views.expand(12, 3, WIDTH), 0)
    found = accumulated(cut(alike, sizes)).figures()
    assert (found["dataset_entropy"], found["effective_rank"]) == pytest.approx((0, 1), abs=1e-12)
    assert (found["information_bound"], found["dime"]) == pytest.approx((0, 0), abs=1e-9)
    assert found["lidar"] == 0
    # Shuffled views have means that differ by rounding.
    shuffled = torch.stack([views[0, torch.randperm(3, generator=draw)] for _ in range(12)])
    assert accumulated(cut(replace(alike, views=shuffled), sizes)).figures()["lidar"] == 0
    zeros = accumulated([Block(torch.zeros(4, WIDTH), None, torch.zeros(4, 2, WIDTH), 0)]).figures()
    assert (zeros["dataset_entropy"], zeros["effective_rank"], zeros["lidar"]) == (0, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_gives_nan(bad: float) -> None:
    whole = layer(TEXTS)
    whole.texts[3, 2] = whole.views[5, 1, 2] = bad
    moments = accumulated(cut(whole, [8, 8, 7]))
    moments.merge(accumulated([layer(TEXTS, seed=1)]))
    found = moments.figures()
    broken = ("dataset_entropy", "effective_rank", "infonce", "information_bound", "lidar", "dime")
    assert all(math.isnan(found[name]) for name in broken)
    assert not math.isnan(found["prompt_entropy"])


# Stored and merged


def test_stored_and_merged_moments_are_independent() -> None:
    first, second = cut(layer(TEXTS), [10, 13])
    moments = accumulated([first], **OTHERS)
    before = moments.figures()
    copy = LayerMoments.from_tensors(moments.tensors())
    assert copy.figures() == before
    second.to(copy)
    assert moments.figures() == before
    assert_same(copy.figures(), accumulated([first, second], **OTHERS).figures())
    other = accumulated([second], **OTHERS)
    before = other.figures()
    moments.merge(other)
    first.to(moments)
    assert other.figures() == before


@pytest.mark.parametrize("name", [*OTHERS, "width"])
def test_moments_with_different_settings_cannot_be_merged(name: str) -> None:
    other = {"width": WIDTH, name: {**OTHERS, "width": 7}[name]}
    with pytest.raises(ValueError, match="cannot be merged into"):
        LayerMoments(WIDTH).merge(LayerMoments(**other))


def test_infinite_orders_and_large_seeds_can_be_stored() -> None:
    moments = accumulated(cut(layer(TEXTS), [10, 13]), order=math.inf, seed=2**62)
    assert stored(moments).figures() == moments.figures()
    stored(moments).merge(moments)


@pytest.mark.parametrize("name", ["moment", "between", "within", "class_mean", "sums", "weights", "counts"])
def test_missing_tensors_and_wrong_shapes_are_refused(name: str) -> None:
    tensors = accumulated([layer(TEXTS)]).tensors()
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(ValueError, match=f"the tensor '{name}' is missing"):
        LayerMoments.from_tensors(without)
    for bad in (tensors[name][None], tensors[name].to(torch.float32)):
        with pytest.raises(ValueError, match=f"'{name}' must be torch"):
            LayerMoments.from_tensors({**without, name: bad})


@pytest.mark.parametrize(
    ("name", "shapes", "wanted"),
    [
        ("texts", [(4, 5), (6,)], "[n, 6]"),
        ("token_figures", [(3, 3), (4, 2)], "[4, 3]"),
        ("views", [(4, 6), (4, 1, 6), (3, 2, 6), (4, 2, 5)], "[4, q, 6] with q at least 2"),
    ],
)
def test_blocks_with_wrong_shapes_are_refused_and_not_added(
    name: str, shapes: list[tuple[int, ...]], wanted: str
) -> None:
    moments = LayerMoments(WIDTH)
    with pytest.raises(ValueError, match="the block number must be at least 0, not -1"):
        replace(layer(4), block=-1).to(moments)
    for shape in shapes:
        with pytest.raises(ValueError, match=re.escape(f"{name} must be {wanted}, not {[*shape]}")):
            replace(layer(4), **{name: torch.zeros(shape)}).to(moments)
    assert_same(moments.figures(), LayerMoments(WIDTH).figures())


@pytest.mark.parametrize(
    "options", [{"order": -1}, {"order": math.nan}, {"temperature": 0}, {"ridge": 0}, {"permutations": 0}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be (at least|above) [01], not {options[name]}"):
        LayerMoments(WIDTH, **options)
    with pytest.raises(ValueError, match="width must be at least 1, not 0"):
        LayerMoments(0)


def test_memory_does_not_grow_with_the_texts() -> None:
    def bytes_after(blocks: int) -> int:
        moments = accumulated([replace(layer(20, seed=number), block=number) for number in range(blocks)])
        return sum(value.untyped_storage().nbytes() for value in vars(moments).values() if isinstance(value, Tensor))

    assert bytes_after(2) == bytes_after(20) == 8 * (3 * WIDTH**2 + WIDTH + 16)
    few, many = (accumulated([layer(n)]) for n in (20, 200))
    sizes = [{name: tensor.nbytes for name, tensor in moments.tensors().items()} for moments in (few, many)]
    assert sizes[0] == sizes[1]
    assert all(isinstance(value, Tensor | int | float) for value in vars(few).values())

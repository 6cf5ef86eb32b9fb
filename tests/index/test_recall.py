"""The measured recall: its neighbours are exact, also after changes, and its bounds hold what they promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.config import IndexSettings
from marc_pipeline.index.recall import (
    Neighbours,
    Queries,
    bounded,
    combined,
    depth_of,
    draw,
    from_bytes,
    held_out,
    known,
    nearest,
    recalled,
    sampled,
    to_bytes,
    without,
)  # fmt: skip
from marc_pipeline.index.vectors import Source
from marc_pipeline.table.commit import day_files
from marc_schemas.identity import row_id
from published import Site, items

QUICK = settings(deadline=None, database=None, max_examples=60)
DIM = 8

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]


def table(count: int, *, seed: int = 0, whole: bool = False) -> tuple[Ids, Matrix]:
    """Row ids and vectors; of small whole numbers many products are equal."""
    random = np.random.default_rng(seed)
    ids = random.choice(10 * count, size=count, replace=False).astype(np.int64)
    drawn = random.integers(-2, 3, (count, DIM)) if whole else random.standard_normal((count, DIM))
    return ids, drawn.astype(np.float32)


def in_batches(ids: Ids, vectors: Matrix, size: int) -> list[tuple[Ids, Matrix]]:
    return [(ids[n : n + size], vectors[n : n + size]) for n in range(0, len(ids), size)]


def naive(own: int, query: Matrix, ids: Ids, vectors: Matrix) -> list[tuple[float, int]]:
    """Scores and ids of all others, best first."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    return sorted(((s, i) for s, i in zip(scores.tolist(), ids.tolist(), strict=True) if i != own), key=lambda x: -x[0])


def assert_exact(near: Neighbours, own: Ids, queries: Matrix, ids: Ids, vectors: Matrix) -> None:
    """Whatever is above the floor is there, with its score; and nothing that is not in the table."""
    for row, (mine, query) in enumerate(zip(own.tolist(), queries, strict=True)):
        best = naive(mine, query, ids, vectors)
        listed = {i: s for i, s in zip(near.ids[row].tolist(), near.scores[row].tolist(), strict=True) if i >= 0}
        assert listed.items() <= {i: pytest.approx(s, abs=1e-4) for s, i in best}.items()
        assert {i for s, i in best if s > near.floor[row] + 1e-4} <= listed.keys()
        assert (near.scores[row][:-1] >= near.scores[row][1:]).all()


@QUICK
@given(count=st.integers(1, 60), size=st.integers(1, 25), depth=st.integers(1, 40), whole=st.booleans())
def test_neighbours_in_batches_are_those_of_a_naive_search(count: int, size: int, depth: int, whole: bool) -> None:
    ids, vectors = table(count, whole=whole)
    asked = ids[: max(1, count // 3)]
    near = nearest(asked, vectors[: len(asked)], in_batches(ids, vectors, size), depth)
    assert near.ids.shape == near.scores.shape == (len(asked), depth)
    assert_exact(near, asked, vectors[: len(asked)], ids, vectors)
    if depth > count:
        assert np.isneginf(near.floor).all()


@QUICK
@given(seed=st.integers(0, 999), rounds=st.integers(1, 6), depth=st.integers(4, 30), whole=st.booleans())
def test_neighbours_stay_exact_while_items_come_and_go(seed: int, rounds: int, depth: int, whole: bool) -> None:
    random = np.random.default_rng(seed)
    ids, vectors = table(50, seed=seed, whole=whole)
    asked, queries = ids[:8], vectors[:8].copy()
    near = nearest(asked, queries, in_batches(ids, vectors, 20), depth)
    for number in range(rounds):
        gone = random.choice(ids[8:], size=random.integers(0, 12), replace=False)
        come, fresh = table(12, seed=seed + 7 * number + 1, whole=whole)
        come = come + 10_000 * (number + 1)
        stays = ~np.isin(ids, gone)
        ids, vectors = np.concatenate([ids[stays], come]), np.concatenate([vectors[stays], fresh])
        near = combined(without(near, gone), nearest(asked, queries, [(come, fresh)], depth))
        assert_exact(near, asked, queries, ids, vectors)
        for k in (1, 3):
            for row in np.flatnonzero(known(near, k, len(ids))).tolist():
                best = naive(int(asked[row]), queries[row], ids, vectors)
                np.testing.assert_allclose(near.scores[row, :k], [score for score, _ in best[:k]], rtol=1e-5, atol=1e-5)


def test_of_a_query_whose_spare_neighbours_have_left_nothing_is_known() -> None:
    ids, vectors = table(60)
    near = nearest(ids[:1], vectors[:1], [(ids, vectors)], depth=6)
    assert known(near, 3, 60).all()
    assert not known(without(near, near.ids[0, :4]), 3, 56).any()


def test_queries_are_the_same_every_night_but_for_what_came_and_left() -> None:
    ids, _ = table(3000)
    first = ids[np.argsort(draw(ids, 5))][:300]
    kept = np.setdiff1d(ids, first[:30])
    then = kept[np.argsort(draw(kept, 5))][:300]
    assert len(np.intersect1d(first, then)) == 270
    assert len(np.intersect1d(first, ids[np.argsort(draw(ids, 6))][:300])) < 100


def test_draws_are_spread_evenly() -> None:
    drawn = draw(np.arange(20_000), 1).astype(np.float64) / 2.0**64
    assert abs(drawn.mean() - 0.5) < 0.01
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)


def test_a_sample_is_what_the_smallest_draws_of_all_files_say(tmp_path_factory: pytest.TempPathFactory) -> None:
    encoded = Site(tmp_path_factory.mktemp("sample")).encoded(items(500))
    files = day_files(encoded.plan, encoded.receipts, None)
    source = Source(encoded.site.storage, encoded.site.table_uri, files, DIM)
    rows = np.array([row_id(item) for item in items(500)])
    for wanted in (1, 40, 499, 500, 700):
        expected = rows[np.argsort(draw(rows, 3))][:wanted]
        np.testing.assert_array_equal(sampled(source, wanted, 3), expected)
    taken = source.take(expected[:50])
    by_row = {row_id(item): vector for item, vector in items(500).items()}
    np.testing.assert_array_equal(taken, np.stack([by_row[row] for row in expected[:50].tolist()]))


@pytest.mark.parametrize(("count", "asked", "expected"), [(10, 1000, (10, 10)), (1200, 1000, (1000, 1200)),
                                                          (9000, 1000, (1000, 1500)), (5, 1, (1, 2))])  # fmt: skip
def test_held_out_queries_come_first_and_half_as_many_say_how_widely_to_search(
    count: int, asked: int, expected: tuple[int, int]
) -> None:
    assert held_out(count, asked) == expected


def queries_of(ids: Ids, vectors: Matrix, held: int, asked: int, k: int) -> Queries:
    near = nearest(ids[:asked], vectors[:asked], [(ids, vectors)], depth_of(k))
    return Queries(ids[:asked], vectors[:asked], held, near)


def test_recall_counts_a_neighbour_that_ties_with_the_last_one_whichever_is_found() -> None:
    vectors = np.eye(DIM, dtype=np.float32)[[0, 0, 0, 0, 1]]
    ids = np.arange(5, dtype=np.int64)
    queries = queries_of(ids, vectors, held=1, asked=1, k=2)

    def found(*rows: int) -> float:
        answer = (np.zeros((1, len(rows)), np.float32), np.array([rows]))
        take = lambda rows: vectors[rows]  # noqa: E731
        return float(recalled(queries, lambda _v, _k: answer, take, 2, 5, held=True)[0])

    assert found(0, 1, 2) == found(0, 3, 1) == found(1, 3, -1) == 1.0
    assert found(0, 1, 4) == found(0, -1, 1) == found(1, 0, -1) == 0.5
    assert found(0, 4, -1) == found(-1, -1, -1) == 0.0


def test_of_more_that_tie_than_are_kept_any_count_and_nothing_else() -> None:
    vectors = np.eye(DIM, dtype=np.float32)[[0] * 200 + [1]]
    ids = np.arange(201, dtype=np.int64)
    queries = queries_of(ids, vectors, held=1, asked=1, k=3)
    assert queries.near.ids.shape[1] < 100
    assert known(queries.near, 3, 201).all()
    for rows, expected in (((0, 197, 198, 199), 1.0), ((150, 200, 0, 151), 2 / 3), ((200, -1, -1, -1), 0.0)):
        answer = (np.zeros((1, 4), np.float32), np.array([rows]))
        shares = recalled(queries, lambda _v, _k, a=answer: a, lambda some: vectors[some], 3, 201, held=True)
        assert shares.tolist() == [pytest.approx(expected)]


def test_queries_that_are_held_out_and_the_others_are_asked_apart() -> None:
    ids, vectors = table(40)
    queries, asked = queries_of(ids, vectors, held=7, asked=12, k=3), []

    def search(some: Matrix, k: int) -> tuple[Matrix, Ids]:
        asked.append(len(some))
        order = np.argsort(-(some @ vectors.T), axis=1)[:, :k]
        return np.take_along_axis(some @ vectors.T, order, axis=1), ids[order]

    take = dict(zip(ids.tolist(), vectors, strict=True))
    for held, expected in ((True, 7), (False, 5)):
        shares = recalled(queries, search, lambda rows: np.stack([take[r] for r in rows]), 3, 40, held=held)
        assert shares.tolist() == [1.0] * expected
    assert asked == [7, 5]


def test_queries_are_read_as_they_were_written() -> None:
    ids, vectors = table(50)
    written = queries_of(ids, vectors, held=7, asked=12, k=3)
    read = from_bytes(to_bytes(written))
    assert read.held == 7
    for name in ("ids", "vectors"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for name in ("ids", "scores", "floor"):
        np.testing.assert_array_equal(getattr(read.near, name), getattr(written.near, name))


def test_the_recall_of_all_items_is_no_estimate() -> None:
    shares = np.array([1.0, 0.5, 0.0, 1.0])
    found = bounded(shares, 4)
    assert (found.mean, found.low, found.high, found.queries) == (0.625, 0.625, 0.625, 4)


@QUICK
@given(shares=st.lists(st.sampled_from([0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=300), more=st.integers(0, 10**6))
def test_bounds_hold_the_mean_and_stay_within_nothing_and_all(shares: list[float], more: int) -> None:
    found = bounded(np.array(shares), len(shares) + more)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.mean == pytest.approx(np.mean(shares))


def test_one_hundred_perfect_answers_do_not_prove_that_all_are() -> None:
    found = bounded(np.ones(100), 1_000_000)
    assert found.high == 1.0
    # As many misses as one hundred answers may well not show: 0.93 ** 100 is below a thousandth, 0.99 ** 100 is not.
    assert 0.90 < found.low < 0.99
    assert bounded(np.ones(1000), 1_000_000).low > 0.99


@pytest.mark.parametrize(("level", "spread"), [(0.95, 0.1), (0.99, 0.03), (0.8, 0.2), (0.999, 0.01)])
def test_bounds_hold_in_ninety_nine_of_a_hundred_samples(level: float, spread: float) -> None:
    random = np.random.default_rng(1)
    # Recall of single queries: tenths, most of them at the top.
    all_of_them = np.round(np.clip(random.normal(level, spread, 20_000), 0, 1), 1)
    true, inside = all_of_them.mean(), 0
    for _ in range(1000):
        found = bounded(random.choice(all_of_them, 400, replace=False), 20_000)
        inside += found.low <= true <= found.high
    assert inside >= 978


# The acceptance of the estimate: seeds choose queries and training sample, the truth asks every item.
@pytest.mark.parametrize("factory", ["IVF32,SQ6", pytest.param("IVF64,Flat", marks=pytest.mark.slow)])
def test_the_true_recall_lies_within_the_bounds_in_nineteen_of_twenty_repetitions(
    tmp_path_factory: pytest.TempPathFactory, factory: str
) -> None:
    vectors = items(6000, dim=16)
    encoded = Site(tmp_path_factory.mktemp("bounds"), dim=16).encoded(vectors)
    best = exact_neighbours(vectors, IndexSettings().k)
    inside, widths = 0, []
    for seed in range(20):
        wanted = IndexSettings(factory=factory, recall_queries=400, target_recall=0.9, seed=seed)
        receipt = encoded.index(wanted)
        true = true_recall(encoded.site, receipt.index.files[0].path, vectors, best)
        inside += receipt.index.figures.recall_low <= true <= receipt.index.figures.recall_high
        widths.append(receipt.index.figures.recall_high - receipt.index.figures.recall_low)
    assert inside >= 19
    assert max(widths) < 0.05


def exact_neighbours(vectors: dict[str, Matrix], k: int) -> NDArray[np.int64]:
    """Row ids [n, k] of every item's nearest others, by numpy."""
    rows, ids = np.stack(list(vectors.values())), np.array([row_id(item) for item in vectors])
    scores = rows @ rows.T
    np.fill_diagonal(scores, -np.inf)
    found: NDArray[np.int64] = ids[np.argpartition(-scores, k, axis=1)[:, :k]]
    return found


def true_recall(site: Site, path: str, vectors: dict[str, Matrix], best: NDArray[np.int64]) -> float:
    """Recall of every item as a query, against its exact neighbours [n, k]."""
    import faiss

    index = faiss.read_index(f"{site.index_uri}/{path}")
    rows, ids = np.stack(list(vectors.values())), np.array([row_id(item) for item in vectors])
    k = best.shape[1]
    _, found = index.search(rows, k + 1)
    hits = 0
    for own, near, listed in zip(ids.tolist(), best.tolist(), found.tolist(), strict=True):
        hits += len(set(near) & set([i for i in listed if i != own][:k]))
    return hits / (k * len(rows))

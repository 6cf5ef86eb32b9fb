"""Recall measurement: exact neighbours, also after changes, recall per query, and the confidence interval."""

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exact_search import exact_recall, ids_and_rows, nearest_ids
from marc_pipeline.config import IndexSettings
from marc_pipeline.index.recall import (
    ExactNeighbours,
    Recall,
    RecallQueries,
    certain,
    estimate_recall,
    exact_neighbours,
    from_bytes,
    merge_neighbours,
    neighbours_kept,
    query_counts,
    random_keys,
    recall_per_query,
    sample_row_ids,
    to_bytes,
    without_items,
)  # fmt: skip
from marc_pipeline.index.vectors import TableVectors
from marc_pipeline.table.commit import day_files
from published import Site, items

QUICK = settings(deadline=None, database=None, max_examples=60)
DIM = 8

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]


def table(count: int, *, seed: int = 0, whole: bool = False) -> tuple[Ids, Matrix]:
    """Row ids and vectors; small whole numbers give many equal products."""
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


def assert_exact(near: ExactNeighbours, own: Ids, queries: Matrix, ids: Ids, vectors: Matrix) -> None:
    """Every item above the floor is listed with its score, and every listed item is in the table."""
    for row, (mine, query) in enumerate(zip(own.tolist(), queries, strict=True)):
        best = naive(mine, query, ids, vectors)
        listed = {i: s for i, s in zip(near.ids[row].tolist(), near.scores[row].tolist(), strict=True) if i >= 0}
        assert listed.items() <= {i: pytest.approx(s, abs=1e-4) for s, i in best}.items()
        assert {i for s, i in best if s > near.floor[row] + 1e-4} <= listed.keys()
        assert (near.scores[row][:-1] >= near.scores[row][1:]).all()


@QUICK
@given(count=st.integers(1, 60), size=st.integers(1, 25), depth=st.integers(1, 40), whole=st.booleans())
def test_neighbours_found_in_batches_equal_a_naive_search(count: int, size: int, depth: int, whole: bool) -> None:
    ids, vectors = table(count, whole=whole)
    asked = ids[: max(1, count // 3)]
    near = exact_neighbours(asked, vectors[: len(asked)], in_batches(ids, vectors, size), depth)
    assert near.ids.shape == near.scores.shape == (len(asked), depth)
    assert_exact(near, asked, vectors[: len(asked)], ids, vectors)
    if depth > count:
        assert np.isneginf(near.floor).all()


@QUICK
@given(seed=st.integers(0, 999), rounds=st.integers(1, 6), depth=st.integers(4, 30), whole=st.booleans())
def test_neighbours_stay_exact_after_additions_and_deletions(seed: int, rounds: int, depth: int, whole: bool) -> None:
    random = np.random.default_rng(seed)
    ids, vectors = table(50, seed=seed, whole=whole)
    asked, queries = ids[:8], vectors[:8].copy()
    near = exact_neighbours(asked, queries, in_batches(ids, vectors, 20), depth)
    for number in range(rounds):
        gone = random.choice(ids[8:], size=random.integers(0, 12), replace=False)
        come, fresh = table(12, seed=seed + 7 * number + 1, whole=whole)
        come = come + 10_000 * (number + 1)
        stays = ~np.isin(ids, gone)
        ids, vectors = np.concatenate([ids[stays], come]), np.concatenate([vectors[stays], fresh])
        near = merge_neighbours(without_items(near, gone), exact_neighbours(asked, queries, [(come, fresh)], depth))
        assert_exact(near, asked, queries, ids, vectors)
        for k in (1, 3):
            for row in np.flatnonzero(certain(near, k, len(ids))).tolist():
                best = naive(int(asked[row]), queries[row], ids, vectors)
                np.testing.assert_allclose(near.scores[row, :k], [score for score, _ in best[:k]], rtol=1e-5, atol=1e-5)


def test_a_query_is_uncertain_once_its_spare_neighbours_are_deleted() -> None:
    ids, vectors = table(60)
    near = exact_neighbours(ids[:1], vectors[:1], [(ids, vectors)], depth=6)
    assert certain(near, 3, 60).all()
    assert not certain(without_items(near, near.ids[0, :4]), 3, 56).any()


def test_the_sample_changes_only_by_added_and_removed_items() -> None:
    ids, _ = table(3000)
    first = ids[np.argsort(random_keys(ids, 5))][:300]
    kept = np.setdiff1d(ids, first[:30])
    then = kept[np.argsort(random_keys(kept, 5))][:300]
    assert len(np.intersect1d(first, then)) == 270
    assert len(np.intersect1d(first, ids[np.argsort(random_keys(ids, 6))][:300])) < 100


def test_random_keys_are_uniform() -> None:
    drawn = random_keys(np.arange(20_000), 1).astype(np.float64) / 2.0**64
    assert abs(drawn.mean() - 0.5) < 0.01
    np.testing.assert_allclose(np.quantile(drawn, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.01)


def test_a_sample_has_the_smallest_keys_of_all_files(site: Site) -> None:
    encoded = site.encoded(items(500))
    files = day_files(encoded.plan, encoded.receipts, None)
    source = TableVectors(encoded.site.storage, encoded.site.table_uri, files, DIM)
    rows, vectors = ids_and_rows(items(500))
    for wanted in (1, 40, 499, 500, 700):
        expected = rows[np.argsort(random_keys(rows, 3))][:wanted]
        np.testing.assert_array_equal(sample_row_ids(source, wanted, 3), expected)
    taken = source.take(expected[:50])
    np.testing.assert_array_equal(taken, vectors[[rows.tolist().index(row) for row in expected[:50]]])


@pytest.mark.parametrize(("count", "asked", "expected"), [(10, 1000, (10, 10)), (1200, 1000, (1000, 1200)),
                                                          (9000, 1000, (1000, 1500)), (5, 1, (1, 2))])  # fmt: skip
def test_there_are_half_as_many_tuning_queries_as_held_out_ones(
    count: int, asked: int, expected: tuple[int, int]
) -> None:
    assert query_counts(count, asked) == expected


def queries_of(ids: Ids, vectors: Matrix, held: int, asked: int, k: int) -> RecallQueries:
    near = exact_neighbours(ids[:asked], vectors[:asked], [(ids, vectors)], neighbours_kept(k))
    return RecallQueries(ids[:asked], vectors[:asked], held, near)


def test_recall_counts_every_result_that_ties_with_the_last_neighbour() -> None:
    vectors = np.eye(DIM, dtype=np.float32)[[0, 0, 0, 0, 1]]
    ids = np.arange(5, dtype=np.int64)
    queries = queries_of(ids, vectors, held=1, asked=1, k=2)

    def found(*rows: int) -> float:
        answer = (np.zeros((1, len(rows)), np.float32), np.array([rows]))
        take = lambda rows: vectors[rows]  # noqa: E731
        return float(recall_per_query(queries, lambda _v, _k: answer, take, 2, 5, held=True)[0])

    assert found(0, 1, 2) == found(0, 3, 1) == found(1, 3, -1) == 1.0
    assert found(0, 1, 4) == found(0, -1, 1) == found(1, 0, -1) == 0.5
    assert found(0, 4, -1) == found(-1, -1, -1) == 0.0


def test_results_count_that_tie_beyond_the_kept_neighbours() -> None:
    vectors = np.eye(DIM, dtype=np.float32)[[0] * 200 + [1]]
    ids = np.arange(201, dtype=np.int64)
    queries = queries_of(ids, vectors, held=1, asked=1, k=3)
    assert queries.near.ids.shape[1] < 100
    assert certain(queries.near, 3, 201).all()
    for rows, expected in (((0, 197, 198, 199), 1.0), ((150, 200, 0, 151), 2 / 3), ((200, -1, -1, -1), 0.0)):
        answer = (np.zeros((1, 4), np.float32), np.array([rows]))
        shares = recall_per_query(queries, lambda _v, _k, a=answer: a, lambda some: vectors[some], 3, 201, held=True)
        assert shares.tolist() == [pytest.approx(expected)]


def test_held_out_and_tuning_queries_are_searched_separately() -> None:
    ids, vectors = table(40)
    queries, asked = queries_of(ids, vectors, held=7, asked=12, k=3), []

    def search(some: Matrix, k: int) -> tuple[Matrix, Ids]:
        asked.append(len(some))
        order = np.argsort(-(some @ vectors.T), axis=1)[:, :k]
        return np.take_along_axis(some @ vectors.T, order, axis=1), ids[order]

    take = dict(zip(ids.tolist(), vectors, strict=True))
    for held, expected in ((True, 7), (False, 5)):
        shares = recall_per_query(queries, search, lambda rows: np.stack([take[r] for r in rows]), 3, 40, held=held)
        assert shares.tolist() == [1.0] * expected
    assert asked == [7, 5]


def test_queries_survive_a_round_trip_through_bytes() -> None:
    ids, vectors = table(50)
    written = queries_of(ids, vectors, held=7, asked=12, k=3)
    read = from_bytes(to_bytes(written))
    assert read.held == 7
    for name in ("ids", "vectors"):
        np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for name in ("ids", "scores", "floor"):
        np.testing.assert_array_equal(getattr(read.near, name), getattr(written.near, name))


def test_the_recall_over_all_items_has_no_interval() -> None:
    assert estimate_recall(np.array([1.0, 0.5, 0.0, 1.0]), 4) == Recall(0.625, 0.625, 0.625, queries=4)


@QUICK
@given(shares=st.lists(st.sampled_from([0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=300), more=st.integers(0, 10**6))
def test_the_interval_contains_the_mean_and_stays_between_zero_and_one(shares: list[float], more: int) -> None:
    found = estimate_recall(np.array(shares), len(shares) + more)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.mean == pytest.approx(np.mean(shares))


def test_one_hundred_perfect_queries_do_not_prove_perfect_recall() -> None:
    found = estimate_recall(np.ones(100), 1_000_000)
    assert found.high == 1.0
    # A recall of 0.93 gives 100 perfect queries with a probability below 0.001 (0.93 ** 100), 0.99 with one above it.
    assert 0.90 < found.low < 0.99
    assert estimate_recall(np.ones(1000), 1_000_000).low > 0.99


@pytest.mark.parametrize(("level", "spread"), [(0.95, 0.1), (0.99, 0.03), (0.8, 0.2), (0.999, 0.01)])
def test_the_interval_covers_the_true_recall_in_99_percent_of_samples(level: float, spread: float) -> None:
    random = np.random.default_rng(1)
    # Recall of single queries, in tenths, mostly high.
    all_of_them = np.round(np.clip(random.normal(level, spread, 20_000), 0, 1), 1)
    true, inside = all_of_them.mean(), 0
    for _ in range(1000):
        found = estimate_recall(random.choice(all_of_them, 400, replace=False), 20_000)
        inside += found.low <= true <= found.high
    assert inside >= 978


# The seed selects queries and training sample; the true recall is measured on every item.
@pytest.mark.parametrize("factory", ["IVF32,SQ6", pytest.param("IVF64,Flat", marks=pytest.mark.slow)])
def test_the_interval_of_built_indexes_covers_the_true_recall_in_19_of_20_runs(
    tmp_path_factory: pytest.TempPathFactory, factory: str
) -> None:
    vectors = items(6000, dim=16)
    encoded = Site(tmp_path_factory.mktemp("bounds"), dim=16).encoded(vectors)
    nearest = nearest_ids(vectors, IndexSettings().k)
    inside, widths = 0, []
    for seed in range(20):
        wanted = IndexSettings(factory=factory, recall_queries=400, target_recall=0.9, seed=seed)
        receipt = encoded.index(wanted)
        path = f"{receipt.index.uri}/{receipt.index.files[0].path}"
        true = exact_recall(faiss.read_index(path), vectors, wanted.k, nearest)
        inside += receipt.index.figures.recall_low <= true <= receipt.index.figures.recall_high
        widths.append(receipt.index.figures.recall_high - receipt.index.figures.recall_low)
    assert inside >= 19
    assert max(widths) < 0.05

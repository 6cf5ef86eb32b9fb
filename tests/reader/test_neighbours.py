"""Neighbour search with filters, reranking and tombstones, for every index type, compared with naive numpy."""

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from exact_search import Neighbour, exact_neighbours
from hand_made_index import hand_made_index, publish_with_indexes
from marc_pipeline.config import AuditSettings
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.index import search as index_search
from marc_pipeline.index.search import IndexSearch, RowFilter
from marc_pipeline.reader import neighbours
from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release
from marc_schemas.identity import row_id
from published import DIM, Site, Vector, Vectors, items
from release_cases import altered

QUICK = settings(deadline=None, database=None, max_examples=40)

# Small whole numbers: products are exact in float32, many scores are equal, and some vectors are equal.
DRAWN = np.random.default_rng(5).integers(-3, 4, (300, DIM)).astype(np.float32)
DRAWN[40:60] = DRAWN[:20]
WHOLE = {f"item-{number:03d}": row for number, row in enumerate(DRAWN)}
IDS = list(WHOLE)

# Index types whose widest search is exact.
EXACT = ["Flat", "IVF4,Flat", "IVF16,Flat"]
ALL = [*EXACT, "IVF8,SQ8", "HNSW8", "SQ8", "PQ4x4", "PQ4x4fs", "OPQ4_8,PQ4x4", "PCA6,IVF4,Flat", "PCA6,HNSW8", "NSG8"]


def rows_of(found: tuple[NDArray[np.object_], NDArray[np.float32]]) -> list[list[Neighbour]]:
    return [list(zip(names.tolist(), scores.tolist(), strict=True)) for names, scores in zip(*found, strict=True)]


Published = Callable[[str, int], OpenRelease]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Releases of the whole numbers, by factory and number of index files; each is published once."""
    made: dict[tuple[str, int], OpenRelease] = {}

    def open_one(factory: str, shards: int) -> OpenRelease:
        if (factory, shards) not in made:
            site = Site(tmp_path_factory.mktemp("lookup"), normalised=False)
            parts = [{item: WHOLE[item] for item in IDS[number::shards]} for number in range(shards)]
            publish_with_indexes(site, WHOLE, [hand_made_index(factory, part) for part in parts])
            made[factory, shards] = open_release(site.table_uri)
        return made[factory, shards]

    return open_one


some_ids = st.one_of(
    st.none(),
    st.lists(st.sampled_from([*IDS, "nobody", "", "\ud800"]), max_size=12),
    st.sets(st.sampled_from(IDS), min_size=100),
    st.integers(1, 30).map(lambda step: IDS[::step]),
)
queries = st.lists(st.lists(st.integers(-3, 3), min_size=DIM, max_size=DIM), min_size=1, max_size=25).map(
    lambda rows: np.array(rows, np.float32)
)


def allowed_by(within: Collection[str] | None, without: Collection[str] | None) -> set[str]:
    return (set(IDS) if within is None else set(IDS) & set(within)) - set(without or ())


@settings(QUICK, max_examples=120)
@given(
    index=st.sampled_from([*itertools.product(EXACT, (1, 3)), *itertools.product(ALL, (1, 2))]),
    asked=queries,
    k=st.integers(1, 40) | st.integers(1, len(IDS)),
    within=some_ids,
    without=some_ids,
    rerank=st.sampled_from([0, 0, 2 * len(IDS)]),
)
def test_search_equals_naive_search_over_the_allowed_items(
    published: Published,
    index: tuple[str, int],
    asked: NDArray[np.float32],
    k: int,
    within: Collection[str] | None,
    without: Collection[str] | None,
    rerank: int,
) -> None:
    if index[0] != "Flat" and within is None and not without:
        within = IDS  # without a filter, the search keeps its tuned width
    found = published(*index).search(asked, k, within=within, without=without, rerank=rerank)
    assert rows_of(found) == [exact_neighbours(query, WHOLE, k, allowed_by(within, without)) for query in asked]
    assert found[1].dtype == np.float32


@pytest.fixture
def filters_use_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index handles every filter, even one that allows few items."""
    monkeypatch.setattr(neighbours, "EXACT_WITHIN", 0)


@pytest.mark.usefixtures("filters_use_the_index")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("factory", ALL)
def test_filtered_search_returns_k_allowed_items_for_every_index_type(
    published: Published, factory: str, shards: int
) -> None:
    release = published(factory, shards)
    for step, k in itertools.product((2, 7, 60), (1, 10, 200)):
        within = IDS[::step]
        for filters in ({"within": within}, {"without": set(IDS) - set(within)}):
            names, scores = release.search(DRAWN[:25], k, **filters)
            count = min(k, len(within))
            for row, own in zip(names, scores, strict=True):
                assert len(set(row[:count])) == count
                assert set(row[:count]) <= set(within)
                assert row[count:].tolist() == [None] * (k - count)
                assert (own[count:] == -np.inf).all()
                assert row[:count].tolist() == [name for _, name in sorted(zip(-own, row[:count], strict=False))]


@pytest.mark.usefixtures("filters_use_the_index")
@pytest.mark.parametrize("factory", ["Flat", "SQ8", "PQ4x4", "PQ4x4fs", "OPQ4_8,PQ4x4", "IVF8,SQ8", "PCA6,IVF4,Flat"])
def test_filtered_scores_equal_unfiltered_ones(published: Published, factory: str) -> None:
    release = published(factory, 1)
    unfiltered = release.search(DRAWN[3], len(IDS), within=IDS if "IVF" in factory else None)
    every = dict(zip(*(found[0] for found in unfiltered), strict=True))
    names, scores = release.search(DRAWN[3], 30, within=IDS[::5])
    expected = sorted(((item, every[item]) for item in IDS[::5]), key=lambda pair: (-pair[1], pair[0]))[:30]
    assert list(zip(names[0], scores[0], strict=True)) == expected


@pytest.mark.parametrize("factory", ["PQ4x4", "SQ8", "IVF8,SQ8"])
def test_reranking_returns_the_best_candidates_by_the_tables_vectors(published: Published, factory: str) -> None:
    release = published(factory, 1)
    candidates, _ = release.search(DRAWN[:30], 40)
    names, scores = release.search(DRAWN[:30], 5, rerank=40)
    for query, offered, chosen, own in zip(DRAWN, candidates, names, scores, strict=False):
        exact = {name: float(query @ WHOLE[name]) for name in offered if name is not None}
        assert own.tolist() == [float(query @ WHOLE[name]) for name in chosen]
        # Results that tie with the last candidate are candidates too, so results can be better than those listed.
        assert sorted(own, reverse=True) == own.tolist()
        assert sum(score > own[-1] for score in exact.values()) < 5
    truth = [{name for name, _ in exact_neighbours(query, WHOLE, 5, IDS)} for query in DRAWN[:30]]
    right, before = (
        sum(len(set(row[:5]) & best) for row, best in zip(found, truth, strict=True)) for found in (names, candidates)
    )
    assert right > before


@QUICK
@given(
    factory=st.sampled_from([*EXACT, "HNSW8", "IVF8,SQ8"]),
    ids=st.lists(st.sampled_from(IDS), max_size=25),
    k=st.integers(1, len(IDS)),
    within=some_ids.filter(lambda ids: ids is not None),
    without=some_ids,
)
def test_similar_items_exclude_the_item_itself(
    published: Published,
    factory: str,
    ids: list[str],
    k: int,
    within: Collection[str],
    without: Collection[str] | None,
) -> None:
    found = published(factory, 1).similar(ids, k, within=within, without=without)
    expected = [exact_neighbours(WHOLE[item], WHOLE, k, allowed_by(within, without) - {item}) for item in ids]
    assert rows_of(found) == expected
    assert found[0].shape == found[1].shape == (len(ids), k)


def test_an_item_among_many_equal_ones_is_not_its_own_neighbour(site: Site) -> None:
    same: Vector = np.eye(DIM, dtype=np.float32)[0]
    lax = AuditSettings(min_effective_rank=0, max_mean_cosine=1)
    site.publish({f"item-{number:02d}": same for number in range(40)}, audit=lax)
    release = open_release(site.table_uri)
    expected = [["item-00", "item-01", "item-02"], ["item-00", "item-02", "item-03"]]
    assert release.similar(["item-30", "item-01"], 3)[0].tolist() == expected
    assert release.similar(["item-30"], 3, rerank=3)[0].tolist() == expected[:1]


def test_similar_with_k_of_all_items_leaves_the_last_place_empty(published: Published) -> None:
    names, scores = published("Flat", 1).similar(["item-007"], len(IDS))
    assert sorted(names[0, :-1]) == [item for item in IDS if item != "item-007"]
    assert (names[0, -1], scores[0, -1]) == (None, -np.inf)


def parts_of(whole: Any, count: int) -> list[Any]:
    """An IVF index in several parts with the same centroids; each vector is in one part."""
    parts = []
    for number in range(count):
        part = faiss.clone_index(whole)
        part.reset()
        mine = [item for place, item in enumerate(IDS) if place % count == number]
        part.add_with_ids(np.stack([WHOLE[item] for item in mine]), np.array([row_id(item) for item in mine]))
        parts.append(part)
    return parts


@pytest.mark.usefixtures("filters_use_the_index")
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16_HNSW8,Flat", "PCA6,IVF16,Flat"])
@pytest.mark.parametrize("filters", [{}, {"within": IDS[::2]}, {"without": IDS[::3]}])
def test_index_files_with_the_same_centroids_answer_like_one_file(
    tmp_path: Path, factory: str, filters: dict[str, list[str]]
) -> None:
    one = hand_made_index(factory, WHOLE)
    faiss.try_extract_index_ivf(one).nprobe = 2
    answers = []
    for name, indexes in (("one", [one]), ("parts", parts_of(one, 3))):
        (tmp_path / name).mkdir()
        site = Site(tmp_path / name, normalised=False)
        publish_with_indexes(site, WHOLE, indexes)
        answers.append(rows_of(open_release(site.table_uri).search(DRAWN, 12, **filters)))
    assert answers[0] == answers[1]


def with_tombstones(factory: str, dead: Vectors) -> Any:
    """An index of the whole numbers and of tombstones, which have the id -1."""
    both = {**WHOLE, **dead}
    index = hand_made_index(factory, both, [row_id(item) if item in WHOLE else -1 for item in both])
    assert (faiss.vector_to_array(index.id_map) < 0).sum() == len(dead)
    return index


@pytest.mark.parametrize("factory", ["HNSW8", "Flat", "PQ4x4", "NSG8", "PCA6,HNSW8"])
def test_tombstones_are_never_found_and_replace_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    # Two tombstones for every item, with the same vector.
    dead = {f"dead-{copy}-{item}": vector for copy in range(2) for item, vector in WHOLE.items()}
    site = Site(tmp_path, normalised=False)
    publish_with_indexes(site, WHOLE, [with_tombstones(factory, dead)], tombstones=len(dead))
    release = open_release(site.table_uri)
    assert release.facts.index.build.tombstones == 600
    assert sorted(release.index_row_ids()) == sorted(map(row_id, IDS))
    for few, filters, k in itertools.product(
        (0, 4096), ({}, {"within": IDS[::2]}, {"without": IDS[::2]}), (10, len(IDS))
    ):
        monkeypatch.setattr(neighbours, "EXACT_WITHIN", few)
        allowed = allowed_by(filters.get("within"), filters.get("without"))
        names, scores = release.search(DRAWN[:30], k, **filters)
        for row, own in zip(names, scores, strict=True):
            found = [name for name in row if name is not None]
            assert len(found) == len(set(found)) == min(k, len(allowed))
            assert set(found) <= allowed
            assert np.isfinite(own[: len(found)]).all()
        if factory == "Flat":
            assert rows_of((names, scores)) == [exact_neighbours(query, WHOLE, k, allowed) for query in DRAWN[:30]]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "PQ4x4", "SQ8"])
@pytest.mark.parametrize("only", [None, True, False])
def test_index_search_skips_tombstones(factory: str, only: bool | None) -> None:
    # The best results of every query are tombstones.
    dead = {f"dead-{copy}-{item}": 2 * vector for copy in range(2) for item, vector in WHOLE.items()}
    search = IndexSearch([with_tombstones(factory, dead)], items=300, tombstones=600)
    rows = np.sort([row_id(item) for item in IDS[::2]])
    row_filter = None if only is None else RowFilter(rows, only=only, count=150)
    parts = list(search.search(DRAWN[:30], 10, row_filter))
    assert sorted(place for part in parts for place in part.positions) == list(range(30))
    for part in parts:
        assert (part.rows[:, :10] >= 0).all()
        assert only is None or (np.isin(part.rows[:, :10], rows) == only).all()


@pytest.mark.usefixtures("filters_use_the_index")
def test_a_filter_widens_the_tuned_search(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    class Seen(IndexSearch):
        def _params(self, selector: Any, width: int) -> Any:
            params = super()._params(selector, width)
            widths.append(getattr(params, "nprobe", None) or params.efSearch)
            return params

    def asked(index: Any, count: int) -> list[int]:
        widths.clear()
        rows = np.sort([row_id(item) for item in IDS[:count]])
        found = list(
            Seen([index], items=300, tombstones=0).search(DRAWN[:4], 5, RowFilter(rows, only=True, count=count))
        )
        assert sum(len(one.positions) for one in found) == 4
        return sorted(set(widths))

    lists = hand_made_index("IVF16,Flat", WHOLE)
    lists.nprobe = 4
    assert asked(lists, 300)[0] == 4
    assert asked(lists, 150)[0] == 12
    assert asked(lists, 10) == [16]
    graph = hand_made_index("HNSW8", WHOLE)
    faiss.downcast_index(graph.index).hnsw.efSearch = 40
    assert asked(graph, 300) == [40]
    assert asked(graph, 100) == [158]


def test_further_lists_are_probed_until_a_filter_has_k_results() -> None:
    # All allowed items are in lists far from the query.
    near, far = np.eye(DIM, dtype=np.float32)[0], -np.eye(DIM, dtype=np.float32)[0]
    noise = np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32) / 100
    vectors = dict(zip(IDS, noise + np.where(np.arange(300)[:, None] < 150, near, far), strict=True))
    index = hand_made_index("IVF16,Flat", vectors)
    index.nprobe = 1
    rows = np.sort([row_id(item) for item in IDS[150:]])
    search = IndexSearch([index], items=300, tombstones=0)
    (found,) = search.search(near[None], 20, RowFilter(rows, only=True, count=150))
    assert (found.rows[0, :20] >= 0).all()


def test_ties_are_searched_in_blocks_of_bounded_size(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_search, "CELLS", 50)
    monkeypatch.setattr(neighbours, "EXACT_CELLS", 500)
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 70)
    asked = np.concatenate([np.zeros((3, DIM), np.float32), DRAWN[:20]])
    for factory in ("Flat", "HNSW8", "PQ4x4"):
        found = published(factory, 2).search(asked, 7, within=IDS[::2])
        assert rows_of(found) == [exact_neighbours(query, WHOLE, 7, IDS[::2]) for query in asked]


@pytest.mark.parametrize("factory", ALL)
def test_a_query_has_the_same_answer_alone_and_in_a_batch(published: Published, factory: str) -> None:
    release = published(factory, 1)
    for options in ({}, {"within": IDS[::2]}, {"rerank": 20}):
        batch = rows_of(release.search(DRAWN[:25], 7, **options))
        alone = [rows_of(release.search(query, 7, **options))[0] for query in DRAWN[:25]]
        if factory in EXACT or options:
            assert batch == alone
        else:
            one, other = ([[score for _, score in row] for row in rows] for rows in (batch, alone))
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_zero_query_finds_the_first_ids(published: Published) -> None:
    release = published("Flat", 1)
    assert rows_of(release.search(np.zeros(DIM), 4)) == [[(item, 0.0) for item in IDS[:4]]]


def test_no_queries_have_no_results(published: Published) -> None:
    none = np.empty((0, DIM), np.float32)
    for options in ({}, {"within": IDS[:3]}, {"without": IDS[:3]}, {"rerank": 9}, {"within": []}):
        names, scores = published("HNSW8", 1).search(none, 3, **options)
        assert names.shape == scores.shape == (0, 3)
    assert published("HNSW8", 1).similar([], 3)[0].shape == (0, 3)


@pytest.mark.parametrize("within", [[], ["nobody"], ["item-001"]])
def test_without_allowed_items_every_place_is_empty(published: Published, within: list[str]) -> None:
    names, scores = published("IVF4,Flat", 1).search(DRAWN[:2], 3, within=within, without=["item-001", "nobody"])
    assert names.tolist() == [[None] * 3] * 2
    assert (scores == -np.inf).all()


def with_value(value: float) -> NDArray[np.float32]:
    rows = DRAWN[:2].copy()
    rows[1, 3] = value
    return rows


ONE = DRAWN[:1]
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    *(
        ("search", (np.zeros(shape, np.float32),), {"within": within}, r"queries have shape \(.*\), .* needs \[n, 8\]")
        for shape in ((DIM + 1,), (2, DIM - 1), (1, 1, DIM), (), (0,), (2, DIM + 1))
        for within in (None, [])
    ),
    *(
        ("search", (with_value(value),), {"within": within}, "queries contain NaN or infinity")
        for value in (np.nan, np.inf, -np.inf)
        for within in (None, [])
    ),
    *(
        ("search", (ONE, k), {"within": within}, f"k is {k}; choose 1 to 300, the number of items")
        for k in (0, -1, len(IDS) + 1)
        for within in (None, IDS[:2])
    ),
    ("similar", (["item-001"], 301), {}, "k is 301; choose 1 to 300"),
    ("similar", (["item-001", "nobody"],), {}, "'nobody'"),
    *(("search", (ONE, 5), {"rerank": n}, f"rerank is {n}; it must be 0 or at least k = 5") for n in (-1, 1, 4)),
    ("search", (ONE, 3), {"within": "item-001"}, "within is the string 'item-001'; pass a list"),
    ("search", (ONE, 3), {"without": "item-001"}, "without is the string 'item-001'"),
    ("search", (ONE, 3), {"within": [7]}, "within contains 7; item ids are strings"),
    ("search", (ONE, 3), {"without": ["item-001", None]}, "without contains None"),
]


@pytest.mark.parametrize(("name", "arguments", "options", "message"), REFUSED)
def test_invalid_searches_are_refused(
    published: Published, name: str, arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        getattr(published("Flat", 1), name)(*arguments, **options)
    assert isinstance(refused.value, UnknownItems) == ("nobody" in message)


@pytest.mark.parametrize("step", [4, -4])
def test_an_index_id_that_is_not_in_the_table_is_reported_as_damage(site: Site, step: int) -> None:
    vectors = items(60)
    ids = [row_id(item) + (0 if item in ("item-3", "item-9") else step) for item in vectors]
    publish_with_indexes(site, vectors, [hand_made_index("Flat", vectors, ids)])
    with pytest.raises(CorruptFile, match="index"):
        open_release(site.table_uri).search(vectors["item-30"], k=3)


@pytest.mark.parametrize(("written", "refused"), [("99.0.1", True), ("1.999.0", True), ("1.9.0", False), ("", False)])
def test_an_index_of_a_newer_faiss_is_refused_before_it_is_read(site: Site, written: str, refused: bool) -> None:
    site.publish(items(40))
    release = open_release(site.table_uri)
    facts = altered(release.facts, index__faiss=written)
    opened = OpenRelease(facts, uri=site.table_uri, storage=site.storage)
    if not refused:
        assert opened.search(items(40)["item-3"], k=1)[0].tolist() == [["item-3"]]
        return
    wanted = ".".join(written.split(".")[:2])
    for read in (lambda: opened.search(items(40)["item-3"]), opened.index_row_ids):
        with pytest.raises(
            UserError, match=rf"written by FAISS {written}, .* {faiss.__version__}; .*faiss-cpu>={wanted}"
        ):
            read()
    assert opened.vectors(["item-3"]).shape == (1, DIM)

"""Looking up: neighbours under filters, scored anew, of items, in any kind of index, against naive numpy."""

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.errors import UserError
from marc_pipeline.index import search as index_search
from marc_pipeline.index.search import RowFilter, IndexSearch
from marc_pipeline.reader import neighbours
from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release
from marc_pipeline.storage.checksums import describe_file
from marc_schemas.identity import row_id
from marc_schemas.release import Release
from published import DIM, Site, Vector, Vectors, items
from release_cases import altered

QUICK = settings(deadline=None, database=None, max_examples=40)

# Small whole numbers: products are exact in float32, many scores are equal, and some vectors are.
DRAWN = np.random.default_rng(5).integers(-3, 4, (300, DIM)).astype(np.float32)
DRAWN[40:60] = DRAWN[:20]
WHOLE = {f"item-{number:03d}": row for number, row in enumerate(DRAWN)}
IDS = list(WHOLE)

# What finds every vector when it searches wide enough, and holds float32.
EXACT = ["Flat", "IVF4,Flat", "IVF16,Flat"]
ALL = [*EXACT, "IVF8,SQ8", "HNSW8", "SQ8", "PQ4x4", "PQ4x4fs", "OPQ4_8,PQ4x4", "PCA6,IVF4,Flat", "PCA6,HNSW8", "NSG8"]

Neighbour = tuple[str | None, float]


def naive(query: Vector, vectors: Vectors, k: int, allowed: Collection[str]) -> list[Neighbour]:
    """The k best of the allowed items, best first, equal scores by id; None beyond."""
    scored = [(item, float(query.astype(np.float64) @ vectors[item].astype(np.float64))) for item in sorted(allowed)]
    best: list[Neighbour] = sorted(scored, key=lambda pair: -pair[1])[:k]  # type: ignore[assignment]
    return best + [(None, -np.inf)] * (k - len(best))


def rows_of(found: tuple[NDArray[np.object_], NDArray[np.float32]]) -> list[list[Neighbour]]:
    return [list(zip(names.tolist(), scores.tolist(), strict=True)) for names, scores in zip(*found, strict=True)]


def build(factory: str, vectors: Vectors, ids: Sequence[int] | None = None) -> Any:
    rows = np.stack(list(vectors.values()))
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    if faiss.try_extract_index_ivf(index) is None:
        index = faiss.index_factory(DIM, f"IDMap2,{factory}", faiss.METRIC_INNER_PRODUCT)
    index.train(np.concatenate([rows] * 4))
    index.add_with_ids(rows, np.array(ids if ids is not None else [row_id(item) for item in vectors]))
    return index


def publish_by_hand(site: Site, vectors: Vectors, indexes: Sequence[Any], *, tombstones: int = 0) -> Release:
    """A release whose index files were made by hand."""
    encoded = site.encoded(vectors)
    encoded.audit()
    receipt = encoded.index()
    files = []
    for number, index in enumerate(indexes):
        path = Path(receipt.index.uri) / f"shard-{number}.faiss"
        faiss.write_index(index, str(path))
        files.append(describe_file(path, path=path.name, rows=index.ntotal))
    encoded.workspace.write_index(altered(receipt, index__files=tuple(files), index__build__tombstones=tombstones))
    return encoded.release()


Published = Callable[[str, int], OpenRelease]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Releases of the whole numbers, by factory and number of index files."""
    made: dict[tuple[str, int], OpenRelease] = {}

    def open_one(factory: str, shards: int) -> OpenRelease:
        if (factory, shards) not in made:
            site = Site(tmp_path_factory.mktemp("lookup"), normalised=False)
            parts = [{item: WHOLE[item] for item in IDS[number::shards]} for number in range(shards)]
            publish_by_hand(site, WHOLE, [build(factory, part) for part in parts])
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


def left(within: Collection[str] | None, without: Collection[str] | None) -> set[str]:
    return (set(IDS) if within is None else set(IDS) & set(within)) - set(without or ())


@QUICK
@given(
    factory=st.sampled_from(EXACT),
    shards=st.sampled_from([1, 3]),
    asked=queries,
    k=st.integers(1, len(IDS)),
    within=some_ids,
    without=some_ids,
)
def test_search_equals_naive_search_over_what_the_filters_leave(
    published: Published,
    factory: str,
    shards: int,
    asked: NDArray[np.float32],
    k: int,
    within: Collection[str] | None,
    without: Collection[str] | None,
) -> None:
    if factory != "Flat" and within is None and not without:
        within = IDS  # without any filter, inverted lists are probed as they were tuned, and no further
    found = published(factory, shards).search(asked, k, within=within, without=without)
    allowed = left(within, without)
    assert rows_of(found) == [naive(query, WHOLE, k, allowed) for query in asked]
    assert found[1].dtype == np.float32


@QUICK
@given(
    factory=st.sampled_from(ALL),
    shards=st.sampled_from([1, 2]),
    asked=queries,
    k=st.integers(1, 40),
    within=some_ids.filter(lambda ids: ids is not None),
    without=some_ids,
)
def test_among_few_items_every_kind_of_index_gives_the_exact_neighbours(
    published: Published,
    factory: str,
    shards: int,
    asked: NDArray[np.float32],
    k: int,
    within: Collection[str],
    without: Collection[str] | None,
) -> None:
    found = published(factory, shards).search(asked, k, within=within, without=without)
    assert rows_of(found) == [naive(query, WHOLE, k, left(within, without)) for query in asked]


@pytest.fixture
def none_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filters go to the index, however few items they leave."""
    monkeypatch.setattr(neighbours, "EXACT_WITHIN", 0)


@pytest.mark.usefixtures("none_are_few")
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("factory", ALL)
def test_a_filter_loses_no_neighbours_in_any_kind_of_index(published: Published, factory: str, shards: int) -> None:
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


@pytest.mark.usefixtures("none_are_few")
@pytest.mark.parametrize("factory", ["Flat", "SQ8", "PQ4x4", "PQ4x4fs", "OPQ4_8,PQ4x4", "IVF8,SQ8", "PCA6,IVF4,Flat"])
def test_filtered_scores_are_those_of_the_same_index_unfiltered(published: Published, factory: str) -> None:
    release = published(factory, 1)
    if "IVF" in factory:
        every = dict(zip(*(found[0] for found in release.search(DRAWN[3], len(IDS), within=IDS)), strict=True))
    else:
        every = dict(zip(*(found[0] for found in release.search(DRAWN[3], len(IDS))), strict=True))
    names, scores = release.search(DRAWN[3], 30, within=IDS[::5])
    expected = sorted(((item, every[item]) for item in IDS[::5]), key=lambda pair: (-pair[1], pair[0]))[:30]
    assert list(zip(names[0], scores[0], strict=True)) == expected


# --- scored anew


@QUICK
@given(
    factory=st.sampled_from(ALL),
    asked=queries,
    k=st.integers(1, 20),
    within=some_ids,
    without=some_ids,
)
def test_reranking_every_candidate_of_a_whole_index_is_an_exact_search(
    published: Published,
    factory: str,
    asked: NDArray[np.float32],
    k: int,
    within: Collection[str] | None,
    without: Collection[str] | None,
) -> None:
    if within is None and not without:
        within = IDS  # what has no filter stops where the index does
    found = published(factory, 1).search(asked, k, within=within, without=without, rerank=2 * len(IDS))
    assert rows_of(found) == [naive(query, WHOLE, k, left(within, without)) for query in asked]


@pytest.mark.parametrize("factory", ["PQ4x4", "SQ8", "IVF8,SQ8"])
def test_reranking_chooses_the_best_of_the_candidates_by_the_tables_vectors(published: Published, factory: str) -> None:
    release = published(factory, 1)
    candidates, _ = release.search(DRAWN[:30], 40)
    names, scores = release.search(DRAWN[:30], 5, rerank=40)
    for query, offered, chosen, own in zip(DRAWN, candidates, names, scores, strict=False):
        exact = {name: float(query @ WHOLE[name]) for name in offered if name is not None}
        assert own.tolist() == [float(query @ WHOLE[name]) for name in chosen]
        # What ties with the last candidate is one too: there may be better ones than those offered, and no worse.
        assert sorted(own, reverse=True) == own.tolist()
        assert sum(score > own[-1] for score in exact.values()) < 5
    truth = [{name for name, _ in naive(query, WHOLE, 5, IDS)} for query in DRAWN[:30]]
    right, before = (
        sum(len(set(row[:5]) & best) for row, best in zip(found, truth, strict=True)) for found in (names, candidates)
    )
    assert right > before


@pytest.mark.parametrize("rerank", [-1, 1, 4])
def test_fewer_candidates_than_neighbours_are_refused(published: Published, rerank: int) -> None:
    with pytest.raises(UserError, match=f"rerank is {rerank}: .* k = 5"):
        published("Flat", 1).search(DRAWN[:1], 5, rerank=rerank)


# --- of items


@QUICK
@given(
    factory=st.sampled_from([*EXACT, "HNSW8", "IVF8,SQ8"]),
    ids=st.lists(st.sampled_from(IDS), max_size=25),
    k=st.integers(1, len(IDS)),
    within=some_ids.filter(lambda ids: ids is not None),
    without=some_ids,
)
def test_similar_items_are_the_neighbours_without_the_item_itself(
    published: Published,
    factory: str,
    ids: list[str],
    k: int,
    within: Collection[str],
    without: Collection[str] | None,
) -> None:
    found = published(factory, 1).similar(ids, k, within=within, without=without)
    expected = [naive(WHOLE[item], WHOLE, k, left(within, without) - {item}) for item in ids]
    assert rows_of(found) == expected
    assert found[0].shape == found[1].shape == (len(ids), k)


def test_an_item_among_many_equal_ones_is_not_its_own_neighbour(tmp_path: Path) -> None:
    site = Site(tmp_path)
    same: Vector = np.eye(DIM, dtype=np.float32)[0]
    site.publish({f"item-{number:02d}": same for number in range(40)})
    release = open_release(site.table_uri)
    assert release.similar(["item-30", "item-01"], 3)[0].tolist() == [
        ["item-00", "item-01", "item-02"],
        ["item-00", "item-02", "item-03"],
    ]
    assert release.similar(["item-30"], 3, rerank=3)[0].tolist() == [["item-00", "item-01", "item-02"]]


def test_of_all_items_one_place_stays_empty(published: Published) -> None:
    names, scores = published("Flat", 1).similar(["item-007"], len(IDS))
    assert sorted(names[0, :-1]) == [item for item in IDS if item != "item-007"]
    assert (names[0, -1], scores[0, -1]) == (None, -np.inf)


def test_similar_items_of_unknown_ones_are_refused(published: Published) -> None:
    with pytest.raises(UnknownItems, match="'nobody'"):
        published("Flat", 1).similar(["item-001", "nobody"])


# --- several files


def parts_of(whole: Any, count: int) -> list[Any]:
    """An IVF index in several parts that share its lists' centroids; each vector in one."""
    parts = []
    for number in range(count):
        part = faiss.clone_index(whole)
        part.reset()
        mine = [item for place, item in enumerate(IDS) if place % count == number]
        part.add_with_ids(np.stack([WHOLE[item] for item in mine]), np.array([row_id(item) for item in mine]))
        parts.append(part)
    return parts


@pytest.mark.usefixtures("none_are_few")
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16_HNSW8,Flat", "PCA6,IVF16,Flat"])
@pytest.mark.parametrize("filters", [{}, {"within": IDS[::2]}, {"without": IDS[::3]}])
def test_several_files_with_the_same_lists_answer_as_one(
    tmp_path: Path, factory: str, filters: dict[str, list[str]]
) -> None:
    one = build(factory, WHOLE)
    faiss.try_extract_index_ivf(one).nprobe = 2
    answers = []
    for name, indexes in (("one", [one]), ("parts", parts_of(one, 3))):
        (tmp_path / name).mkdir()
        site = Site(tmp_path / name, normalised=False)
        publish_by_hand(site, WHOLE, indexes)
        answers.append(rows_of(open_release(site.table_uri).search(DRAWN, 12, **filters)))
    assert answers[0] == answers[1]


# --- the dead


def with_dead(factory: str, dead: Vectors) -> Any:
    """An index of the whole numbers with dead vectors among them, marked as id -1."""
    both = {**WHOLE, **dead}
    index = build(factory, both, [row_id(item) if item in WHOLE else -1 for item in both])
    assert (faiss.vector_to_array(index.id_map) < 0).sum() == len(dead)
    return index


@pytest.mark.parametrize("factory", ["HNSW8", "Flat", "PQ4x4", "NSG8", "PCA6,HNSW8"])
def test_dead_vectors_are_never_found_and_take_no_ones_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factory: str
) -> None:
    # More dead than alive, and every living one has a dead double.
    dead = {f"dead-{copy}-{item}": vector for copy in range(2) for item, vector in WHOLE.items()}
    site = Site(tmp_path, normalised=False)
    publish_by_hand(site, WHOLE, [with_dead(factory, dead)], tombstones=len(dead))
    release = open_release(site.table_uri)
    assert release.facts.index.build.tombstones == 600
    assert sorted(release.index_row_ids()) == sorted(map(row_id, IDS))
    for few, filters, k in itertools.product(
        (0, 4096), ({}, {"within": IDS[::2]}, {"without": IDS[::2]}), (10, len(IDS))
    ):
        monkeypatch.setattr(neighbours, "EXACT_WITHIN", few)
        allowed = left(filters.get("within"), filters.get("without"))
        names, scores = release.search(DRAWN[:30], k, **filters)
        for row, own in zip(names, scores, strict=True):
            found = [name for name in row if name is not None]
            assert len(found) == len(set(found)) == min(k, len(allowed))
            assert set(found) <= allowed
            assert np.isfinite(own[: len(found)]).all()
        if factory == "Flat":
            assert rows_of((names, scores)) == [naive(query, WHOLE, k, allowed) for query in DRAWN[:30]]


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "PQ4x4", "SQ8"])
@pytest.mark.parametrize("only", [None, True, False])
def test_the_index_alone_steps_over_the_dead(factory: str, only: bool | None) -> None:
    # The best of every query are dead: nothing but the index is asked for the living.
    dead = {f"dead-{copy}-{item}": 2 * vector for copy in range(2) for item, vector in WHOLE.items()}
    search = IndexSearch([with_dead(factory, dead)], items=300, tombstones=600)
    rows = np.sort([row_id(item) for item in IDS[::2]])
    row_filter = None if only is None else RowFilter(rows, only=only, count=150)
    parts = list(search.search(DRAWN[:30], 10, row_filter))
    assert sorted(place for part in parts for place in part.positions) == list(range(30))
    for part in parts:
        assert (part.rows[:, :10] >= 0).all()
        assert only is None or (np.isin(part.rows[:, :10], rows) == only).all()


# --- how wide


@pytest.mark.usefixtures("none_are_few")
def test_a_filter_keeps_what_the_index_was_tuned_to_and_widens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []

    class Seen(IndexSearch):
        def _params(self, selector: Any, width: int) -> Any:
            params = super()._params(selector, width)
            widths.append(getattr(params, "nprobe", None) or params.efSearch)
            return params

    def asked(index: Any, count: int) -> list[int]:
        widths.clear()
        rows = np.sort([row_id(item) for item in IDS[:count]])
        found = list(Seen([index], items=300, tombstones=0).search(DRAWN[:4], 5, RowFilter(rows, only=True, count=count)))
        assert sum(len(one.positions) for one in found) == 4
        return sorted(set(widths))

    lists = build("IVF16,Flat", WHOLE)
    lists.nprobe = 4
    assert asked(lists, 300)[0] == 4
    assert asked(lists, 150)[0] == 12
    assert asked(lists, 10) == [16]
    graph = build("HNSW8", WHOLE)
    faiss.downcast_index(graph.index).hnsw.efSearch = 40
    assert asked(graph, 300) == [40]
    assert asked(graph, 100) == [158]


def test_lists_are_probed_further_until_a_filter_has_its_neighbours() -> None:
    # All that is allowed lies in one list, far from the query.
    near, far = np.eye(DIM, dtype=np.float32)[0], -np.eye(DIM, dtype=np.float32)[0]
    noise = np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32) / 100
    vectors = dict(zip(IDS, noise + np.where(np.arange(300)[:, None] < 150, near, far), strict=True))
    index = build("IVF16,Flat", vectors)
    index.nprobe = 1
    rows = np.sort([row_id(item) for item in IDS[150:]])
    search = IndexSearch([index], items=300, tombstones=0)
    (found,) = search.search(near[None], 20, RowFilter(rows, only=True, count=150))
    assert (found.rows[0, :20] >= 0).all()


# --- the same answer


def test_ties_across_the_last_place_are_searched_in_bounded_blocks(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_search, "CELLS", 50)
    monkeypatch.setattr(neighbours, "EXACT_CELLS", 500)
    monkeypatch.setattr(neighbours, "EXACT_ROWS", 70)
    asked = np.concatenate([np.zeros((3, DIM), np.float32), DRAWN[:20]])
    for factory in ("Flat", "HNSW8", "PQ4x4"):
        found = published(factory, 2).search(asked, 7, within=IDS[::2])
        assert rows_of(found) == [naive(query, WHOLE, 7, IDS[::2]) for query in asked]


@pytest.mark.parametrize("factory", ALL)
def test_a_query_is_answered_alone_as_in_a_batch(published: Published, factory: str) -> None:
    release = published(factory, 1)
    for options in ({}, {"within": IDS[::2]}, {"rerank": 20}):
        batch = rows_of(release.search(DRAWN[:25], 7, **options))
        alone = [rows_of(release.search(query, 7, **options))[0] for query in DRAWN[:25]]
        if factory in EXACT or options:
            assert batch == alone
        else:
            np.testing.assert_allclose(
                [[s for _, s in r] for r in batch], [[s for _, s in r] for r in alone], rtol=1e-5
            )


def test_a_zero_query_finds_the_first_ids(published: Published) -> None:
    release = published("Flat", 1)
    assert rows_of(release.search(np.zeros(DIM), 4)) == [[(item, 0.0) for item in IDS[:4]]]


# --- what is refused


def test_no_queries_have_no_neighbours_under_any_option(published: Published) -> None:
    none = np.empty((0, DIM), np.float32)
    for options in ({"within": IDS[:3]}, {"without": IDS[:3]}, {"rerank": 9}, {"within": []}):
        names, scores = published("HNSW8", 1).search(none, 3, **options)
        assert names.shape == scores.shape == (0, 3)
    assert published("HNSW8", 1).similar([], 3)[0].shape == (0, 3)


@pytest.mark.parametrize("within", [[], ["nobody"], ["item-001"]])
def test_where_nothing_may_be_found_all_places_are_empty(published: Published, within: list[str]) -> None:
    names, scores = published("IVF4,Flat", 1).search(DRAWN[:2], 3, within=within, without=["item-001", "nobody"])
    assert names.tolist() == [[None] * 3] * 2
    assert (scores == -np.inf).all()


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"within": "item-001"}, "within is one text, 'item-001'"),
        ({"without": "item-001"}, "without is one text"),
        ({"within": [7]}, "within holds 7; item ids are texts"),
        ({"without": ["item-001", None]}, "without holds None"),
    ],
)
def test_filters_that_are_no_ids_are_refused(published: Published, filters: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        published("Flat", 1).search(DRAWN[:1], 3, **filters)


def test_options_do_not_hide_wrong_queries(published: Published) -> None:
    release = published("Flat", 1)
    with pytest.raises(UserError, match="the release needs"):
        release.search(np.zeros((2, DIM + 1)), 3, within=[])
    with pytest.raises(UserError, match="NaN"):
        release.search(np.full(DIM, np.nan), 3, within=[])
    for search in (lambda: release.search(DRAWN[:1], 301, within=IDS[:2]), lambda: release.similar(["item-001"], 301)):
        with pytest.raises(UserError, match="k is 301, the release holds 300 items"):
            search()


@pytest.mark.parametrize(("written", "refused"), [("99.0.1", True), ("1.999.0", True), ("1.9.0", False), ("", False)])
def test_an_index_of_a_newer_faiss_is_refused_before_it_is_read(tmp_path: Path, written: str, refused: bool) -> None:
    site = Site(tmp_path)
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

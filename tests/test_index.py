"""The index stage: the recall it reports is the recall that a naive search measures, and bad settings are refused."""

import math
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from published import DIM, Encoded, Site, Vectors, items

from pipeline.config import IndexSettings
from pipeline.errors import CorruptFile, GateRefused, UserError
from pipeline.index import EXACT_BELOW, choose_factory, satisfies
from pipeline.integrity import check_file
from schemas.identity import row_id
from schemas.receipt import IndexReceipt

VECTORS = items(400)
LOOSE = 0.01


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Site(tmp_path_factory.mktemp("index")).encoded(VECTORS)


def stored(receipt: IndexReceipt) -> Any:
    (file,) = receipt.files
    return faiss.read_index(str(Path(receipt.uri) / file.path))


def matrix(vectors: Vectors) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array([row_id(item) for item in vectors]), np.stack(list(vectors.values()))


def naive_recall(index: Any, vectors: Vectors, k: int) -> float:
    """Recall@k of every item as a query, itself left out; float64, one query at a time."""
    ids, rows = matrix(vectors)
    hits = 0
    for number, query in enumerate(rows):
        scores = rows.astype(np.float64) @ query.astype(np.float64)
        scores[number] = -np.inf
        true = set(ids[np.argsort(-scores)[:k]].tolist())
        _, (found,) = index.search(query[None], k + 1)
        hits += len(true & set([i for i in found.tolist() if i != ids[number]][:k]))
    return hits / (k * len(rows))


def test_a_flat_index_is_exact_search(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="Flat", k=5))
    assert (receipt.recall, receipt.nprobe, receipt.queries, receipt.k) == (1.0, None, 400, 5)
    ids, rows = matrix(VECTORS)
    queries = np.random.default_rng(5).standard_normal((20, DIM)).astype(np.float32)
    scores, found = stored(receipt).search(queries, 7)
    expected = np.argsort(-(queries @ rows.T), axis=1)[:, :7]
    np.testing.assert_array_equal(found, ids[expected])
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ rows.T, expected, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF4,Flat", "HNSW8", "PQ4x4", "SQ8", "PCA4,Flat", "OPQ4,IVF4,PQ4x4", "IVF8,SQ8", "IDMap2,Flat"]
)
def test_the_reported_recall_is_what_a_naive_search_measures(encoded: Encoded, factory: str) -> None:
    receipt = encoded.index(IndexSettings(factory=factory, k=6, target_recall=LOOSE))
    index = stored(receipt)
    assert (receipt.factory, index.ntotal, receipt.files[0].rows) == (factory, 400, 400)
    assert receipt.recall == pytest.approx(naive_recall(index, VECTORS, 6), abs=1e-9)
    assert check_file(encoded.site.storage, receipt.uri, receipt.files[0]) is None
    assert (receipt.plan_id, receipt.receipts_digest) == (encoded.plan.plan_id, encoded.digest)


def test_lists_are_probed_no_wider_than_the_target_asks(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="IVF16,Flat", target_recall=0.9))
    assert receipt.nprobe is not None
    assert receipt.recall >= 0.9
    index = stored(receipt)
    assert index.nprobe == receipt.nprobe > 1
    index.nprobe = receipt.nprobe // 2
    assert naive_recall(index, VECTORS, 10) < 0.9


def test_probing_every_list_is_exact(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="IVF16,Flat", target_recall=1.0))
    assert (receipt.recall, receipt.nprobe) == (1.0, 16)


def test_a_graph_is_searched_no_wider_than_the_target_asks(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="HNSW2", target_recall=0.9))
    index = stored(receipt)
    assert receipt.recall >= 0.9
    assert receipt.recall == pytest.approx(naive_recall(index, VECTORS, 10), abs=1e-9)
    graph: Any = faiss.downcast_index(index.index)
    width = graph.hnsw.efSearch
    assert width > 16
    faiss.ParameterSpace().set_index_parameter(index, "efSearch", width // 2)
    assert naive_recall(index, VECTORS, 10) < 0.9


def test_recall_is_measured_on_as_many_items_as_asked_and_the_same_every_time(encoded: Encoded) -> None:
    settings = IndexSettings(factory="PQ4x4", recall_queries=50, target_recall=LOOSE)
    first, again = encoded.index(settings), encoded.index(settings)
    assert first.queries == 50
    assert (first.recall, first.files) == (again.recall, again.files)


@pytest.mark.parametrize(
    "factory",
    ["Nonsense", "", "PQ3", "IVF500,Flat", "IVF4,PQ3", "PQ8x12", "LSH", "BFlat"],
)
def test_a_factory_that_faiss_cannot_use_is_the_users_mistake(encoded: Encoded, factory: str) -> None:
    with pytest.raises(UserError, match=r"index\.factory"):
        encoded.index(IndexSettings(factory=factory, target_recall=LOOSE))


@pytest.mark.parametrize("factory", ["IVF4,PQ4x4,RFlat", "NSG8", "PCA4,IDMap,Flat", "Flat,IDMap"])
def test_a_factory_that_only_fails_when_vectors_are_added_is_the_users_mistake(encoded: Encoded, factory: str) -> None:
    with pytest.raises(UserError, match=r"index\.factory"):
        encoded.index(IndexSettings(factory=factory, target_recall=LOOSE))


def test_a_factory_string_that_cannot_be_parsed_is_refused_without_the_location_in_c_plus_plus(
    encoded: Encoded,
) -> None:
    with pytest.raises(UserError) as refused:
        encoded.index(IndexSettings(factory="Nonsense"))
    assert ".cpp" not in str(refused.value)


def test_recall_below_the_target_is_refused_and_leaves_no_index(tmp_path: Path) -> None:
    encoded = Site(tmp_path).encoded(VECTORS)
    with pytest.raises(GateRefused, match=r"recall@10 of PQ2x4 is 0\.\d{4} over 400 queries.* asks for 0.95"):
        encoded.index(IndexSettings(factory="PQ2x4"))
    assert not Path(encoded.site.index_uri).exists()
    assert encoded.workspace.read_index() is None


def test_a_single_item_has_an_index_and_nothing_to_recall(tmp_path: Path) -> None:
    receipt = Site(tmp_path).encoded(items(1)).index()
    assert (receipt.recall, receipt.queries, stored(receipt).ntotal) == (1.0, 1, 1)


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11])
def test_k_may_exceed_the_number_of_items(tmp_path: Path, count: int) -> None:
    vectors = items(count)
    receipt = Site(tmp_path).encoded(vectors).index(IndexSettings(k=10))
    assert (receipt.recall, receipt.k) == (1.0, 10)
    assert naive_recall(stored(receipt), vectors, min(10, count - 1)) == 1.0


def test_neighbours_that_tie_with_the_last_place_all_count(tmp_path: Path) -> None:
    same = items(1)["item-0"]
    vectors = {**items(30), **{f"copy-{number}": same for number in range(25)}}
    for factory in ("Flat", "IVF1,Flat"):
        receipt = Site(tmp_path / factory).encoded(vectors).index(IndexSettings(factory=factory, k=3))
        assert receipt.recall == 1.0


def test_a_damaged_table_file_is_no_source_of_an_index(tmp_path: Path) -> None:
    encoded = Site(tmp_path).encoded(VECTORS)
    file = encoded.receipts[1].file
    assert file is not None
    path = Path(encoded.site.table_uri) / file.path
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptFile, match=file.path):
        encoded.index()


def test_small_tables_are_searched_exactly_and_large_ones_by_lists_of_about_four_roots() -> None:
    settings = IndexSettings()
    assert choose_factory(0, settings) == choose_factory(EXACT_BELOW - 1, settings) == "Flat"
    for count in (EXACT_BELOW, 100_000, 1_000_000, 7_654_321, 10**9):
        name, kind = choose_factory(count, settings).split(",")
        lists = int(name.removeprefix("IVF"))
        assert kind == "Flat"
        assert lists.bit_count() == 1
        assert 1 / math.sqrt(2) <= lists / (4 * math.sqrt(count)) <= math.sqrt(2)
    assert choose_factory(10**9, IndexSettings(factory="HNSW32")) == "HNSW32"


def test_an_index_stands_only_while_it_is_what_the_settings_ask_for(encoded: Encoded) -> None:
    built = encoded.index(IndexSettings())
    storage = encoded.site.storage
    assert satisfies(built, IndexSettings(), storage=storage)
    for other in (IndexSettings(factory="IVF4,Flat"), IndexSettings(k=5)):
        assert not satisfies(built, other, storage=storage)
    worse = built.model_copy(update={"recall": 0.9})
    assert not satisfies(worse, IndexSettings(), storage=storage)
    Path(built.uri, built.files[0].path).unlink()
    assert not satisfies(built, IndexSettings(), storage=storage)

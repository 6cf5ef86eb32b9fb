"""The index stage: it holds the day's vectors, its recall is what a naive search measures, bad settings are refused."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from example_counts import slow
from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.errors import CorruptFile, GateRefused, UserError
from marc_pipeline.index import satisfies
from marc_pipeline.reader.release import open_release
from marc_pipeline.reader.verify import verify
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.commit import day_files
from marc_schemas.identity import files_digest, row_id
from marc_schemas.receipt import IndexReceipt
from marc_schemas.release import Release
from published import BUCKETS, DIM, NOON, Alter, Encoded, Site, Vector, Vectors, flip, in_buckets, items
from release_cases import altered

VECTORS = items(400)
LOOSE = 0.01


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Site(tmp_path_factory.mktemp("index")).encoded(VECTORS)


def stored(receipt: IndexReceipt) -> Any:
    (file,) = receipt.index.files
    return faiss.read_index(str(Path(receipt.index.uri) / file.path))


def matrix(vectors: Vectors) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array([row_id(item) for item in vectors]), np.stack(list(vectors.values()))


def naive_recall(index: Any, vectors: Vectors, k: int) -> float:
    """Recall@k of every item as a query, itself left out; exact search in float64, the index one query at a time."""
    ids, rows = matrix(vectors)
    wide = rows.astype(np.float64)
    scores = wide @ wide.T
    np.fill_diagonal(scores, -np.inf)
    nearest = ids[np.argpartition(-scores, range(min(k, len(rows) - 1)))[:, :k]].tolist()
    hits = 0
    for number, true in enumerate(nearest):
        _, (found,) = index.search(rows[number][None], k + 1)
        hits += len(set(true) & set([i for i in found.tolist() if i != ids[number]][:k]))
    return hits / (k * len(rows))


def test_a_flat_index_is_exact_search(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="Flat", k=5))
    built = receipt.index
    assert (built.recall, built.nprobe, built.recall_queries, built.k) == (1.0, None, 400, 5)
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
    assert (receipt.index.factory, index.ntotal, receipt.index.files[0].rows) == (factory, 400, 400)
    assert receipt.index.recall == pytest.approx(naive_recall(index, VECTORS, 6), abs=1e-9)
    assert check_file(encoded.site.storage, receipt.index.uri, receipt.index.files[0]) is None
    files = day_files(encoded.plan, encoded.receipts, None)
    assert (receipt.plan_id, receipt.files_digest) == (encoded.plan.plan_id, files_digest(files))
    mean = np.stack(list(VECTORS.values())).astype(np.float64).mean(axis=0)
    build = receipt.index.build
    assert (build.items, build.nprobe, build.changed) == (400, receipt.index.nprobe, 0)
    np.testing.assert_allclose(build.mean, mean, rtol=0, atol=1e-9)


def test_lists_are_probed_no_wider_than_the_target_asks(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="IVF16,Flat", target_recall=0.9))
    assert receipt.index.nprobe is not None
    assert receipt.index.recall >= 0.9
    index = stored(receipt)
    assert index.nprobe == receipt.index.nprobe > 1
    index.nprobe = receipt.index.nprobe // 2
    assert naive_recall(index, VECTORS, 10) < 0.9


def test_probing_every_list_is_exact(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="IVF16,Flat", target_recall=1.0))
    assert receipt.index.recall == 1.0
    index = stored(receipt)
    index.nprobe = 16
    assert naive_recall(index, VECTORS, 10) == 1.0


def test_a_graph_is_searched_no_wider_than_the_target_asks(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="HNSW2", target_recall=0.9))
    index = stored(receipt)
    assert receipt.index.recall >= 0.9
    assert receipt.index.recall == pytest.approx(naive_recall(index, VECTORS, 10), abs=1e-9)
    graph: Any = faiss.downcast_index(index.index)
    width = graph.hnsw.efSearch
    assert width > 16
    faiss.ParameterSpace().set_index_parameter(index, "efSearch", width // 2)
    assert naive_recall(index, VECTORS, 10) < 0.9


def test_recall_is_measured_on_as_many_items_as_asked_and_the_same_every_time(encoded: Encoded) -> None:
    settings = IndexSettings(factory="PQ4x4", recall_queries=50, target_recall=LOOSE)
    first, again = encoded.index(settings), encoded.index(settings)
    assert first.index.recall_queries == 50
    assert (first.index.recall, first.index.files) == (again.index.recall, again.index.files)


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
    assert (receipt.index.recall, receipt.index.recall_queries, stored(receipt).ntotal) == (1.0, 1, 1)


@pytest.mark.parametrize("count", [2, 3, 9, 10, 11])
def test_k_may_exceed_the_number_of_items(tmp_path: Path, count: int) -> None:
    vectors = items(count)
    receipt = Site(tmp_path).encoded(vectors).index(IndexSettings(k=10))
    assert (receipt.index.recall, receipt.index.k) == (1.0, 10)
    assert naive_recall(stored(receipt), vectors, min(10, count - 1)) == 1.0


def test_neighbours_that_tie_with_the_last_place_all_count(tmp_path: Path) -> None:
    same = items(1)["item-0"]
    vectors = {**items(30), **{f"copy-{number}": same for number in range(25)}}
    for factory in ("Flat", "IVF1,Flat"):
        receipt = Site(tmp_path / factory).encoded(vectors).index(IndexSettings(factory=factory, k=3))
        assert receipt.index.recall == 1.0


def test_a_damaged_table_file_is_no_source_of_an_index(tmp_path: Path) -> None:
    encoded = Site(tmp_path).encoded(VECTORS)
    file = encoded.receipts[1].file
    assert file is not None
    path = Path(encoded.site.table_uri) / file.path
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptFile, match=file.path):
        encoded.index()


def test_an_index_stands_only_while_it_is_what_the_settings_ask_for(encoded: Encoded) -> None:
    built = encoded.index(IndexSettings())
    storage = encoded.site.storage
    assert satisfies(built, IndexSettings(), dim=DIM, storage=storage)
    for other in (IndexSettings(factory="IVF4,Flat"), IndexSettings(k=5)):
        assert not satisfies(built, other, dim=DIM, storage=storage)
    worse = altered(built, index__recall=0.9)
    assert not satisfies(worse, IndexSettings(), dim=DIM, storage=storage)
    Path(built.index.uri, built.index.files[0].path).unlink()
    assert not satisfies(built, IndexSettings(), dim=DIM, storage=storage)


# --- an index that is patched, or built anew

YESTERDAY = "2026-11-19"
LISTS = IndexSettings(factory="IVF16,Flat", recall_queries=4000)
LAX = AuditSettings(max_deleted_fraction=1, max_drift=99)
FIRST = items(2000)


def today() -> dict[str, Vector]:
    """50 items of the first day gone, 30 with other vectors, 40 new."""
    ids = list(FIRST)
    kept = {item: FIRST[item] for item in ids[50:]}
    changed = dict(zip(ids[100:130], items(30, seed=7).values(), strict=True))
    return kept | changed | items(40, seed=8, prefix="new-")


CHANGED = 50 + 2 * 30 + 40


def contents(index: Any) -> dict[int, list[float]]:
    """Vectors by row id as they are stored: of a flat index, or of flat lists."""
    if hasattr(index, "id_map"):
        ids = faiss.vector_to_array(index.id_map)
        rows = faiss.downcast_index(index.index).reconstruct_n(0, index.ntotal)
    else:
        lists = faiss.extract_index_ivf(index).invlists
        sizes = [(number, lists.list_size(number)) for number in range(lists.nlist)]
        ids = np.concatenate([np.array(faiss.rev_swig_ptr(lists.get_ids(n), size)) for n, size in sizes if size])
        codes = [np.array(faiss.rev_swig_ptr(lists.get_codes(n), size * lists.code_size)) for n, size in sizes if size]
        rows = np.concatenate(codes).view(np.float32).reshape(len(ids), -1)
    found = dict(zip(ids.tolist(), rows.tolist(), strict=True))
    assert len(found) == len(ids) == index.ntotal
    return found


def by_row(vectors: Vectors) -> dict[int, list[float]]:
    return {row_id(item): vector.tolist() for item, vector in vectors.items()}


def centroids(index: Any) -> NDArray[np.float32]:
    lists = faiss.extract_index_ivf(index)
    found: NDArray[np.float32] = faiss.downcast_index(lists.quantizer).reconstruct_n(0, lists.nlist)
    return found


def of_release(release: Release) -> Any:
    return faiss.read_index(str(Path(release.index.uri) / release.index.files[0].path))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def base(site: Site) -> Release:
    return site.publish(FIRST, ds=YESTERDAY, index=LISTS)


def next_day(
    base: Release,
    site: Site,
    vectors: Vectors | None = None,
    *,
    settings: IndexSettings = LISTS,
    buckets: int = BUCKETS,
    weights: str = "weights",
) -> IndexReceipt:
    encoded = site.encoded(today() if vectors is None else vectors, base=base, buckets=buckets, weights=weights)
    assert encoded.audit(LAX).problems == ()
    return encoded.index(settings)


def test_few_changes_patch_the_index_of_the_release_before(site: Site, base: Release) -> None:
    receipt = next_day(base, site)
    index = stored(receipt)
    np.testing.assert_array_equal(centroids(index), centroids(of_release(base)))
    assert contents(index) == by_row(today())
    assert receipt.index.build == base.index.build.model_copy(update={"changed": CHANGED})
    assert (receipt.index.build.items, receipt.index.files[0].rows) == (2000, 1990)
    assert receipt.index.recall == pytest.approx(naive_recall(index, today(), 10), abs=1e-9)
    assert receipt.index.recall >= 0.95
    assert receipt.index.recall_queries == 1990
    assert index.nprobe == receipt.index.nprobe
    # The release before keeps its own.
    assert contents(of_release(base)) == by_row(FIRST)


def test_an_index_whose_vectors_all_stay_is_the_same(site: Site, base: Release) -> None:
    receipt = next_day(base, site, FIRST)
    assert receipt.index.build == base.index.build
    assert contents(stored(receipt)) == by_row(FIRST)
    never = LISTS.model_copy(update={"max_changed": 0.0, "max_drift": 0.0})
    assert next_day(base, site, FIRST, settings=never).index.build == base.index.build


def assert_built_anew(receipt: IndexReceipt, vectors: Vectors, *, ties: bool = False) -> None:
    """With ``ties``, which of some vectors are neighbours is not FAISS's to say, nor float64's."""
    index = stored(receipt)
    assert index.ntotal == len(vectors)
    assert receipt.index.build.changed == 0
    assert receipt.index.build.items == len(vectors)
    assert receipt.index.build.nprobe == receipt.index.nprobe
    mean = np.stack(list(vectors.values())).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(receipt.index.build.mean, mean, rtol=0, atol=1e-9)
    if receipt.index.factory in {"Flat", "IVF16,Flat"}:
        assert contents(index) == by_row(vectors)
    if not ties:
        assert receipt.index.recall == pytest.approx(naive_recall(index, vectors, 10), abs=1e-9)


@pytest.mark.parametrize(("share", "patched"), [(CHANGED / 2000, True), (CHANGED / 2000 - 1e-6, False)])
def test_too_many_changes_build_it_anew(site: Site, base: Release, share: float, patched: bool) -> None:
    receipt = next_day(base, site, settings=LISTS.model_copy(update={"max_changed": share}))
    if patched:
        assert receipt.index.build.changed == CHANGED
    else:
        assert_built_anew(receipt, today())
        assert not np.array_equal(centroids(stored(receipt)), centroids(of_release(base)))


def test_a_mean_that_moved_too_far_builds_it_anew(site: Site, base: Release) -> None:
    pulled = FIRST | {item: np.eye(DIM, dtype=np.float32)[0] for item in list(FIRST)[:190]}
    rows = np.stack(list(pulled.values())).astype(np.float64)
    moved = math.dist(rows.mean(axis=0), base.index.build.mean) / math.sqrt(rows.var(axis=0).sum())
    assert 0.05 < moved < 0.15
    near, far = (LISTS.model_copy(update={"max_drift": limit}) for limit in (moved + 1e-6, moved - 1e-6))
    assert next_day(base, site, pulled, settings=near).index.build.changed == 380
    assert_built_anew(next_day(base, site, pulled, settings=far), pulled, ties=True)


def patched_once(site: Site, base: Release) -> Release:
    """A release whose index has a patch behind it, so that one built anew can be told from it."""
    day = dict(list(FIRST.items())[10:])
    encoded = site.encoded(day, ds=base.ds, plan_id="patched once", base=base)
    encoded.audit(LAX)
    encoded.index(LISTS)
    made = encoded.release()
    assert made.index.build.changed == 10
    return made


def test_changes_add_up_until_it_is_built_anew_and_then_count_from_there(site: Site) -> None:
    settings = LISTS.model_copy(update={"max_changed": 0.1, "recall_queries": 300})
    day = dict(FIRST)
    release = site.publish(day, ds="2026-11-01", index=settings)
    counted = []
    for number in range(2, 8):
        gone = list(day)[:40]
        day = {item: day[item] for item in list(day)[40:]} | items(40, seed=number, prefix=f"day-{number}-")
        encoded = site.encoded(day, ds=f"2026-11-0{number}", base=release)
        assert encoded.audit(LAX).problems == ()
        encoded.index(settings)
        release = encoded.release()
        counted.append(release.index.build.changed)
        assert contents(of_release(release)) == by_row(day)
        assert not {row_id(item) for item in gone} & contents(of_release(release)).keys()
    assert counted == [80, 160, 0, 80, 160, 0]


def flip_index(release: Release, _: Site) -> None:
    flip(Path(release.index.uri) / release.index.files[0].path, 5000)


def remove_index(release: Release, _: Site) -> None:
    (Path(release.index.uri) / release.index.files[0].path).unlink()


def flip_table(release: Release, site: Site) -> None:
    file = release.table.files[1]
    flip(Path(site.table_uri) / file.path, file.bytes // 2)


def remove_table(release: Release, site: Site) -> None:
    (Path(site.table_uri) / release.table.files[1].path).unlink()


@pytest.mark.parametrize("harm", [flip_index, remove_index, flip_table, remove_table])
def test_damage_of_the_release_before_builds_it_anew(
    site: Site, base: Release, harm: Callable[[Release, Site], None]
) -> None:
    base = patched_once(site, base)
    encoded = site.encoded(today(), base=base)
    encoded.audit(LAX)
    assert encoded.index(LISTS).index.build.changed > 0
    harm(base, site)
    assert_built_anew(encoded.index(LISTS), today())


def test_vectors_of_another_bundle_build_it_anew(site: Site, base: Release) -> None:
    base = patched_once(site, base)
    assert next_day(base, site).index.build.changed == 10 + (CHANGED - 10)
    assert_built_anew(next_day(base, site, weights="other weights"), today())


def test_another_number_of_buckets_builds_it_anew(site: Site, base: Release) -> None:
    base = patched_once(site, base)
    # However many may change: hardly a vector is where it was.
    freely = LISTS.model_copy(update={"max_changed": 9.0})
    assert_built_anew(next_day(base, site, buckets=BUCKETS + 1, settings=freely), today())


@pytest.mark.parametrize("factory", ["IVF32,Flat", "Flat", *slow("SQ8")])
def test_another_factory_builds_it_anew(site: Site, base: Release, factory: str) -> None:
    base = patched_once(site, base)
    wanted = IndexSettings(factory=factory, recall_queries=4000, target_recall=0.9)
    receipt = next_day(base, site, settings=wanted)
    assert receipt.index.factory == factory
    assert_built_anew(receipt, today())


# A map over inverted lists confuses its ids once vectors were removed; fast-scan's blocks cannot be read one by one.
@pytest.mark.parametrize("factory", ["IDMap,IVF16,Flat", *slow("IDMap2,IVF16,Flat")])
def test_what_cannot_be_patched_is_built_anew(tmp_path: Path, factory: str) -> None:
    site = Site(tmp_path)
    wanted = IndexSettings(factory=factory, recall_queries=4000)
    base = site.publish(FIRST, ds=YESTERDAY, index=wanted)
    assert_built_anew(next_day(base, site, settings=wanted), today())


@pytest.mark.parametrize(
    "factory",
    [
        "Flat", "IDMap,Flat", "PQ4x4", "IVF16,SQ8", "OPQ4,IVF16,PQ4x4",
        *slow("SQ8", "PCA4,Flat", "IVF16,PQ4x4", "PCA4,IVF16,Flat"),
    ],
)  # fmt: skip
def test_whatever_is_patched_finds_every_vector_under_its_own_id(tmp_path: Path, factory: str) -> None:
    site = Site(tmp_path)
    wanted = IndexSettings(factory=factory, target_recall=LOOSE, recall_queries=4000)
    base = site.publish(FIRST, ds=YESTERDAY, index=wanted)
    # At the end of the table, where ids that slip would go unnoticed by the recall.
    last = sorted(FIRST, key=lambda item: (row_id(item) % BUCKETS, item.encode()))[-3:]
    day = {item: vector for item, vector in FIRST.items() if item not in last[:2]} | items(3, seed=8, prefix="new-")
    receipt = next_day(base, site, day, settings=wanted)
    assert (receipt.index.build.items, receipt.index.build.changed) == (2000, 5)
    ids, rows = matrix(day)
    # The same lists and codebooks, filled at once.
    filled = of_release(base)
    filled.reset()
    filled.add_with_ids(rows, ids)
    assert scores_by_id(stored(receipt), rows[::50]) == scores_by_id(filled, rows[::50])


def scores_by_id(index: Any, queries: NDArray[np.float32]) -> list[dict[int, float]]:
    """Of every vector in the index, per query."""
    if lists := faiss.try_extract_index_ivf(index):
        lists.nprobe = lists.nlist
    scores, found = index.search(queries, index.ntotal)
    return [dict(zip(ids, near, strict=True)) for ids, near in zip(found.tolist(), scores.tolist(), strict=True)]


def test_an_index_that_would_need_far_wider_searches_is_built_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # Sixteen narrow clusters: one list answers. Then nearly half of the items lies anywhere.
    centres = np.stack(list(items(16, seed=3).values()))
    drawn = np.repeat(centres, 125, axis=0) + 0.02 * np.stack(list(items(2000, seed=4).values()))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors = dict(zip(FIRST, drawn.astype(np.float32), strict=True))
    site, settings = Site(tmp_path), LISTS.model_copy(update={"max_changed": 1.0, "max_drift": 9.0})
    base = site.publish(vectors, ds=YESTERDAY, index=settings)
    assert base.index.nprobe == base.index.build.nprobe == 1
    few = vectors | dict(zip(list(vectors)[:20], items(20, seed=5).values(), strict=True))
    assert next_day(base, site, few, settings=settings).index.build.changed == 40
    many = vectors | dict(zip(list(vectors)[:900], items(900, seed=5).values(), strict=True))
    with caplog.at_level("INFO"):
        receipt = next_day(base, site, many, settings=settings)
    assert "patched, it needs" in caplog.text
    assert_built_anew(receipt, many, ties=True)


def test_a_patched_index_whose_recall_is_too_low_is_built_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The codebook of one corner knows nothing of the rest.
    corner = np.abs(np.stack(list(items(600).values())))
    vectors = dict(zip(items(600), corner, strict=True))
    site = Site(tmp_path)
    wanted = IndexSettings(factory="PQ4x5", target_recall=0.4, max_changed=9, max_drift=9)
    base = site.publish(vectors, ds=YESTERDAY, index=wanted)
    day = {item: -vector for item, vector in vectors.items()}
    with caplog.at_level("INFO"):
        receipt = next_day(base, site, day, settings=wanted)
    assert "patched, its recall@10 is" in caplog.text
    assert (receipt.index.build.changed, receipt.index.build.items) == (0, 600)
    assert receipt.index.recall >= 0.4


def computed_anew(chosen: dict[str, tuple[Vector, datetime]]) -> Alter:
    """The same texts with other vectors and their moments, as a recomputation leaves them."""

    def alter(_: int, rows: pa.Table) -> pa.Table:
        found = rows.to_pylist()
        for row in found:
            if row["item_id"] in chosen:
                vector, row["encoded_at"] = chosen[row["item_id"]]
                row["vector"] = vector.tolist()
        return pa.Table.from_pylist(found, schema=rows.schema)

    return alter


def test_vectors_that_were_computed_anew_of_the_same_texts_are_exchanged(site: Site) -> None:
    base = site.publish(FIRST, index=LISTS)
    other = dict(zip(list(FIRST)[:60], items(60, seed=6).values(), strict=True))
    anew = {item: (vector, NOON + timedelta(seconds=1)) for item, vector in other.items()}
    encoded = site.encoded(FIRST, plan_id="again", base=base, alter=computed_anew(anew))
    assert (encoded.plan.unchanged, encoded.audit(LAX).problems) == (2000, ())
    receipt = encoded.index(LISTS)
    assert receipt.index.build.changed == 120
    assert contents(stored(receipt)) == by_row(FIRST | other)


@dataclass
class Days:
    """Days of random changes, and what each of them must hold."""

    site: Site
    random: random.Random
    settings: IndexSettings
    texts: dict[str, Vector] = field(default_factory=dict)
    anew: dict[str, tuple[Vector, datetime]] = field(default_factory=dict)
    release: Release | None = None
    made: int = 0
    day: int = 1

    @property
    def vectors(self) -> dict[str, Vector]:
        """What readers must find."""
        return self.texts | {item: vector for item, (vector, _) in self.anew.items()}

    def change(self, bucket: int | None) -> None:
        """Some items of one bucket or of all leave, change, are computed anew, or come."""
        self.made += 1
        mine = list(self.texts if bucket is None else in_buckets(self.texts, bucket))
        fresh = items(99, seed=1000 + self.made, prefix=f"{self.made}-")
        come = list(fresh if bucket is None else in_buckets(fresh, bucket))
        drawn = iter(items(400, seed=2000 + self.made).values())
        for item in self.random.sample(mine, min(len(mine), self.random.randrange(30))):
            kind = self.random.choice(["leave", "change", "anew", "return"])
            if kind == "anew":
                self.anew[item] = (next(drawn), NOON + timedelta(seconds=self.made))
                continue
            self.anew.pop(item, None)
            if kind == "leave" and len(mine) > 5:
                del self.texts[item]
            elif kind == "change":
                self.texts[item] = next(drawn)
        self.texts |= {
            item: fresh[item] for item in self.random.sample(come, self.random.randrange(len(come) + 1) // 3)
        }

    def publish(self, bucket: int | None) -> Release:
        chosen = None if bucket is None else (bucket,)
        mine = self.texts if bucket is None else in_buckets(self.texts, bucket)
        encoded = self.site.encoded(
            mine,
            ds=f"2026-11-{self.day:02d}",
            plan_id=f"plan-{self.made}",
            base=self.release,
            chosen=chosen,
            alter=computed_anew(dict(self.anew)),
        )
        assert encoded.audit(LAX).problems == ()
        encoded.index(self.settings)
        return encoded.release()


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
@pytest.mark.parametrize("seed", [0, *slow(1, 2, 3)])
def test_after_any_days_of_changes_the_index_holds_the_tables_vectors(tmp_path: Path, factory: str, seed: int) -> None:
    # Seldom built anew: what patches leave behind would pile up.
    settings = IndexSettings(factory=factory, max_changed=3, max_drift=9)
    days = Days(Site(tmp_path), random.Random(seed), settings, texts=items(200))  # noqa: S311 - no secret
    days.release = days.publish(None)
    patched = 0
    for _ in range(10):
        kind = days.random.choice(["next day", "same day", "bucket", "bucket"])
        bucket = days.random.randrange(BUCKETS) if kind == "bucket" else None
        days.day += kind == "next day"
        days.change(bucket)
        days.release = days.publish(bucket)
        index = of_release(days.release)
        table = open_release(days.site.table_uri).dataset().to_table().to_pylist()
        assert {row["item_id"]: row["vector"] for row in table} == {i: v.tolist() for i, v in days.vectors.items()}
        assert contents(index) == {row["row_id"]: row["vector"] for row in table}
        assert verify(days.site.storage, days.release, table_uri=days.site.table_uri) == []
        assert days.release.index.recall == pytest.approx(naive_recall(index, days.vectors, 10), abs=1e-9)
        if factory != "Flat":
            index.nprobe = 4
        ids, rows = matrix(days.vectors)
        scores, found = index.search(rows, 1)
        np.testing.assert_array_equal(found[:, 0], ids)
        np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
        patched += days.release.index.build.changed > 0
    assert patched >= 8

"""The index stage: content, recall and search width, refused settings, and when an index is patched or rebuilt."""

import math
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from exact_search import exact_recall, ids_and_rows
from example_counts import slow
from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.errors import CorruptFile, GateRefused, UserError
from marc_pipeline.index.make import satisfies
from marc_pipeline.index.search import search_width, set_search_width
from marc_pipeline.releases.ownership import OWNER
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.commit import day_files
from marc_schemas.identity import files_digest, row_id
from marc_schemas.receipt import IndexReceipt
from marc_schemas.release import Release
from published import BUCKETS, DIM, NOON, Alter, Encoded, Site, Vector, Vectors, flip, items
from release_cases import altered

VECTORS = items(400)
LOOSE = 0.01


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Encoded:
    return Site(tmp_path_factory.mktemp("index")).encoded(VECTORS)


def stored(receipt: IndexReceipt) -> Any:
    (file,) = receipt.index.files
    return faiss.read_index(str(Path(receipt.index.uri) / file.path))


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF4,Flat", "HNSW8", "PQ4x4", "SQ8", "PCA4,Flat", "OPQ4,IVF4,PQ4x4", "IVF8,SQ8", "IDMap2,Flat"]
)
def test_the_reported_recall_is_what_a_naive_search_measures(encoded: Encoded, factory: str) -> None:
    receipt = encoded.index(IndexSettings(factory=factory, k=6, target_recall=LOOSE))
    index = stored(receipt)
    assert (receipt.index.factory, index.ntotal, receipt.index.files[0].rows) == (factory, 400, 400)
    assert receipt.index.recall == pytest.approx(exact_recall(index, VECTORS, 6), abs=1e-9)
    assert (receipt.index.recall_queries, receipt.index.k) == (400, 6)
    assert (receipt.index.nprobe is None) == ("IVF" not in factory)
    assert receipt.index.recall == 1 or factory != "Flat"
    assert check_file(encoded.site.storage, receipt.index.uri, receipt.index.files[0]) is None
    files = day_files(encoded.plan, encoded.receipts, None)
    assert (receipt.plan_id, receipt.files_digest) == (encoded.plan.plan_id, files_digest(files))
    mean = np.stack(list(VECTORS.values())).astype(np.float64).mean(axis=0)
    build = receipt.index.build
    assert (build.items, build.nprobe, build.changed) == (400, receipt.index.nprobe, 0)
    np.testing.assert_allclose(build.mean, mean, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("factory", "narrowest"), [("IVF16,Flat", 1), ("HNSW2", 16)])
def test_the_search_is_no_wider_than_the_target_recall_requires(encoded: Encoded, factory: str, narrowest: int) -> None:
    built = encoded.index(IndexSettings(factory=factory, target_recall=0.9))
    index = stored(built)
    width = search_width(index)
    assert width is not None
    assert width == (built.index.nprobe or built.index.ef_search) > narrowest
    assert built.index.recall >= 0.9
    assert built.index.recall == pytest.approx(exact_recall(index, VECTORS, 10), abs=1e-9)
    set_search_width(index, width // 2)
    assert exact_recall(index, VECTORS, 10) < 0.9


def test_probing_every_list_is_exact(encoded: Encoded) -> None:
    receipt = encoded.index(IndexSettings(factory="IVF16,Flat", target_recall=1.0))
    index = stored(receipt)
    index.nprobe = 16
    assert receipt.index.recall == exact_recall(index, VECTORS, 10) == 1.0


def test_recall_is_measured_on_as_many_items_as_asked_and_the_same_every_time(encoded: Encoded) -> None:
    settings = IndexSettings(factory="PQ4x4", recall_queries=50, target_recall=LOOSE)
    first, again = encoded.index(settings), encoded.index(settings)
    assert first.index.recall_queries == 50
    assert (first.index.recall, first.index.files) == (again.index.recall, again.index.files)


REFUSED = ["Nonsense", "", "PQ3", "IVF500,Flat", "IVF4,PQ3", "PQ8x12", "LSH", "BFlat"]
REFUSED_WHEN_FILLED = ["IVF4,PQ4x4,RFlat", "NSG8", "PCA4,IDMap,Flat", "Flat,IDMap"]


@pytest.mark.parametrize("factory", [*REFUSED, *REFUSED_WHEN_FILLED])
def test_an_unusable_factory_string_is_a_user_error_without_a_c_plus_plus_location(
    encoded: Encoded, factory: str
) -> None:
    with pytest.raises(UserError, match=r"index\.factory") as refused:
        encoded.index(IndexSettings(factory=factory, target_recall=LOOSE))
    assert ".cpp" not in str(refused.value)


def test_recall_below_the_target_is_refused_and_leaves_no_index(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    with pytest.raises(
        GateRefused, match=r"recall@10 of PQ2x4 is 0\.\d{4} over 400 queries.* index.target_recall is 0.95"
    ):
        encoded.index(IndexSettings(factory="PQ2x4"))
    assert not [path for path in Path(encoded.site.index_uri).iterdir() if path.name != OWNER]
    assert encoded.workspace.read_index() is None


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11])
def test_k_may_exceed_the_number_of_items(site: Site, count: int) -> None:
    vectors = items(count)
    receipt = site.encoded(vectors).index(IndexSettings(k=10))
    assert (receipt.index.recall, receipt.index.k, receipt.index.recall_queries) == (1.0, 10, count)
    assert stored(receipt).ntotal == count
    assert count == 1 or exact_recall(stored(receipt), vectors, min(10, count - 1)) == 1.0


def test_every_neighbour_that_ties_with_the_last_one_counts(tmp_path: Path) -> None:
    same = items(1)["item-0"]
    vectors = {**items(30), **{f"copy-{number}": same for number in range(25)}}
    for factory in ("Flat", "IVF1,Flat"):
        receipt = Site(tmp_path / factory).encoded(vectors).index(IndexSettings(factory=factory, k=3))
        assert receipt.index.recall == 1.0


def test_a_damaged_table_file_stops_the_index_stage(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    file = encoded.receipts[1].file
    assert file is not None
    path = Path(encoded.site.table_uri) / file.path
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(CorruptFile, match=file.path):
        encoded.index()


def test_an_index_is_kept_only_while_it_satisfies_the_settings(encoded: Encoded) -> None:
    built = encoded.index(IndexSettings())
    storage = encoded.site.storage
    assert satisfies(built, IndexSettings(), dim=DIM, storage=storage)
    for other in (IndexSettings(factory="IVF4,Flat"), IndexSettings(k=5)):
        assert not satisfies(built, other, dim=DIM, storage=storage)
    worse = altered(built, index__recall=0.9)
    assert not satisfies(worse, IndexSettings(), dim=DIM, storage=storage)
    Path(built.index.uri, built.index.files[0].path).unlink()
    assert not satisfies(built, IndexSettings(), dim=DIM, storage=storage)


YESTERDAY = "2026-11-19"
LISTS = IndexSettings(factory="IVF16,Flat", recall_queries=4000)
LAX = AuditSettings(max_deleted_fraction=1, max_drift=99)
FIRST = items(2000)


def today() -> dict[str, Vector]:
    """The first day after 50 deletions, 30 changed vectors and 40 additions."""
    ids = list(FIRST)
    kept = {item: FIRST[item] for item in ids[50:]}
    changed = dict(zip(ids[100:130], items(30, seed=7).values(), strict=True))
    return kept | changed | items(40, seed=8, prefix="new-")


CHANGED = 50 + 2 * 30 + 40


def contents(index: Any) -> dict[int, list[float]]:
    """Stored vectors by row id, of a flat index or flat lists."""
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


def test_few_changes_patch_the_previous_index(site: Site, base: Release) -> None:
    receipt = next_day(base, site)
    index = stored(receipt)
    np.testing.assert_array_equal(centroids(index), centroids(of_release(base)))
    assert contents(index) == by_row(today())
    assert receipt.index.build == base.index.build.model_copy(update={"changed": CHANGED})
    assert (receipt.index.build.items, receipt.index.files[0].rows) == (2000, 1990)
    assert receipt.index.recall == pytest.approx(exact_recall(index, today(), 10), abs=1e-9)
    assert receipt.index.recall >= 0.95
    assert receipt.index.recall_queries == 1990
    assert index.nprobe == receipt.index.nprobe
    # The previous release keeps its own index.
    assert contents(of_release(base)) == by_row(FIRST)


def test_an_index_without_changes_stays_the_same(site: Site, base: Release) -> None:
    receipt = next_day(base, site, FIRST)
    assert receipt.index.build == base.index.build
    assert contents(stored(receipt)) == by_row(FIRST)
    never = LISTS.model_copy(update={"max_changed": 0.0, "max_drift": 0.0})
    assert next_day(base, site, FIRST, settings=never).index.build == base.index.build


def assert_rebuilt(receipt: IndexReceipt, vectors: Vectors, *, ties: bool = False) -> None:
    """Check a full rebuild. With ``ties`` the recall is not compared: FAISS and float64 order ties differently."""
    index = stored(receipt)
    assert index.ntotal == len(vectors)
    build = receipt.index.build
    assert (build.changed, build.items, build.nprobe) == (0, len(vectors), receipt.index.nprobe)
    mean = np.stack(list(vectors.values())).astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(build.mean, mean, rtol=0, atol=1e-9)
    if receipt.index.factory in {"Flat", "IVF16,Flat"}:
        assert contents(index) == by_row(vectors)
    if not ties:
        assert receipt.index.recall == pytest.approx(exact_recall(index, vectors, 10), abs=1e-9)


@pytest.mark.parametrize(("share", "patched"), [(CHANGED / 2000, True), (CHANGED / 2000 - 1e-6, False)])
def test_too_many_changes_rebuild_the_index(site: Site, base: Release, share: float, patched: bool) -> None:
    receipt = next_day(base, site, settings=LISTS.model_copy(update={"max_changed": share}))
    if patched:
        assert receipt.index.build.changed == CHANGED
    else:
        assert_rebuilt(receipt, today())
        assert not np.array_equal(centroids(stored(receipt)), centroids(of_release(base)))


def test_drift_of_the_mean_vector_rebuilds_the_index(site: Site, base: Release) -> None:
    pulled = FIRST | {item: np.eye(DIM, dtype=np.float32)[0] for item in list(FIRST)[:190]}
    rows = np.stack(list(pulled.values())).astype(np.float64)
    moved = math.dist(rows.mean(axis=0), base.index.build.mean) / math.sqrt(rows.var(axis=0).sum())
    assert 0.05 < moved < 0.15
    near, far = (LISTS.model_copy(update={"max_drift": limit}) for limit in (moved + 1e-6, moved - 1e-6))
    assert next_day(base, site, pulled, settings=near).index.build.changed == 380
    assert_rebuilt(next_day(base, site, pulled, settings=far), pulled, ties=True)


def patched_once(site: Site, base: Release) -> Release:
    """A release with a patched index, so that a rebuilt one differs from it."""
    day = dict(list(FIRST.items())[10:])
    encoded = site.encoded(day, ds=base.ds, plan_id="patched once", base=base)
    encoded.audit(LAX)
    encoded.index(LISTS)
    made = encoded.release()
    assert made.index.build.changed == 10
    return made


def test_changes_accumulate_until_the_index_is_rebuilt(site: Site) -> None:
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


HARMS: dict[str, tuple[bool, Callable[[Path], None]]] = {
    "index flipped": (True, lambda path: flip(path, 5000)),
    "index missing": (True, Path.unlink),
    "table flipped": (False, lambda path: flip(path, path.stat().st_size // 2)),
    "table missing": (False, Path.unlink),
}


@pytest.mark.parametrize(("in_index", "harm"), HARMS.values(), ids=HARMS)
def test_damage_of_the_previous_release_rebuilds_the_index(
    site: Site, base: Release, in_index: bool, harm: Callable[[Path], None]
) -> None:
    base = patched_once(site, base)
    encoded = site.encoded(today(), base=base)
    encoded.audit(LAX)
    assert encoded.index(LISTS).index.build.changed == CHANGED
    index, table = base.index, base.table
    harm(Path(index.uri, index.files[0].path) if in_index else Path(site.table_uri, table.files[1].path))
    assert_rebuilt(encoded.index(LISTS), today())


def another(factory: str) -> dict[str, Any]:
    return {"settings": IndexSettings(factory=factory, recall_queries=4000, target_recall=0.9)}


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"weights": "other weights"}, id="bundle"),
        # Any number of changes is allowed, because nearly every vector moves to another bucket.
        pytest.param({"buckets": BUCKETS + 1, "settings": LISTS.model_copy(update={"max_changed": 9.0})}, id="buckets"),
        *(pytest.param(another(factory), id=factory) for factory in ("IVF32,Flat", "Flat")),
        pytest.param(another("SQ8"), id="SQ8", marks=pytest.mark.slow),
    ],
)
def test_another_bundle_bucket_count_or_factory_rebuilds_the_index(
    site: Site, base: Release, other: dict[str, Any]
) -> None:
    receipt = next_day(patched_once(site, base), site, **other)
    assert receipt.index.factory == other.get("settings", LISTS).factory
    assert_rebuilt(receipt, today())


# IDMap over inverted lists returns wrong ids after a deletion.
@pytest.mark.parametrize("factory", ["IDMap,IVF16,Flat", *slow("IDMap2,IVF16,Flat")])
def test_an_unpatchable_index_type_is_rebuilt(site: Site, factory: str) -> None:
    wanted = IndexSettings(factory=factory, recall_queries=4000)
    base = site.publish(FIRST, ds=YESTERDAY, index=wanted)
    assert_rebuilt(next_day(base, site, settings=wanted), today())


@pytest.mark.parametrize(
    "factory",
    [
        "Flat", "IDMap,Flat", "PQ4x4", "IVF16,SQ8", "OPQ4,IVF16,PQ4x4",
        *slow("SQ8", "PCA4,Flat", "IVF16,PQ4x4", "PCA4,IVF16,Flat"),
    ],
)  # fmt: skip
def test_a_patched_index_finds_every_vector_under_its_own_id(site: Site, factory: str) -> None:
    wanted = IndexSettings(factory=factory, target_recall=LOOSE, recall_queries=4000)
    base = site.publish(FIRST, ds=YESTERDAY, index=wanted)
    # At the end of the table, where shifted ids would not change the recall.
    last = sorted(FIRST, key=lambda item: (row_id(item) % BUCKETS, item.encode()))[-3:]
    day = {item: vector for item, vector in FIRST.items() if item not in last[:2]} | items(3, seed=8, prefix="new-")
    receipt = next_day(base, site, day, settings=wanted)
    assert (receipt.index.build.items, receipt.index.build.changed) == (2000, 5)
    ids, rows = ids_and_rows(day)
    # The same lists and codebooks, filled in one call.
    filled = of_release(base)
    filled.reset()
    filled.add_with_ids(rows, ids)
    assert scores_by_id(stored(receipt), rows[::50]) == scores_by_id(filled, rows[::50])


def scores_by_id(index: Any, queries: NDArray[np.float32]) -> list[dict[int, float]]:
    """Scores of all vectors in the index, per query."""
    if lists := faiss.try_extract_index_ivf(index):
        lists.nprobe = lists.nlist
    scores, found = index.search(queries, index.ntotal)
    return [dict(zip(ids, near, strict=True)) for ids, near in zip(found.tolist(), scores.tolist(), strict=True)]


def test_an_index_that_needs_a_far_wider_search_is_rebuilt(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    # Sixteen narrow clusters, so that one probe suffices. Then 45 % of the items move to random places.
    centres = np.stack(list(items(16, seed=3).values()))
    drawn = np.repeat(centres, 125, axis=0) + 0.02 * np.stack(list(items(2000, seed=4).values()))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    vectors = dict(zip(FIRST, drawn.astype(np.float32), strict=True))
    settings = LISTS.model_copy(update={"max_changed": 1.0, "max_drift": 9.0})
    base = site.publish(vectors, ds=YESTERDAY, index=settings)
    assert base.index.nprobe == base.index.build.nprobe == 1
    few = vectors | dict(zip(list(vectors)[:20], items(20, seed=5).values(), strict=True))
    assert next_day(base, site, few, settings=settings).index.build.changed == 40
    many = vectors | dict(zip(list(vectors)[:900], items(900, seed=5).values(), strict=True))
    with caplog.at_level("INFO"):
        receipt = next_day(base, site, many, settings=settings)
    assert "the patched index needs" in caplog.text
    assert_rebuilt(receipt, many, ties=True)


def test_a_patched_index_with_low_recall_is_rebuilt(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    # The codebook is trained on one corner of the space only.
    corner = np.abs(np.stack(list(items(600).values())))
    vectors = dict(zip(items(600), corner, strict=True))
    wanted = IndexSettings(factory="PQ4x5", target_recall=0.4, max_changed=9, max_drift=9)
    base = site.publish(vectors, ds=YESTERDAY, index=wanted)
    day = {item: -vector for item, vector in vectors.items()}
    with caplog.at_level("INFO"):
        receipt = next_day(base, site, day, settings=wanted)
    assert "recall@10 of the patched index is" in caplog.text
    assert (receipt.index.build.changed, receipt.index.build.items) == (0, 600)
    assert receipt.index.recall >= 0.4


def recomputed(chosen: Vectors, at: datetime) -> Alter:
    """The same texts with recomputed vectors."""

    def alter(_: int, rows: pa.Table) -> pa.Table:
        found = rows.to_pylist()
        for row in found:
            if row["item_id"] in chosen:
                row["vector"], row["encoded_at"] = chosen[row["item_id"]].tolist(), at
        return pa.Table.from_pylist(found, schema=rows.schema)

    return alter


def test_recomputed_vectors_of_unchanged_texts_are_replaced(site: Site) -> None:
    base = site.publish(FIRST, index=LISTS)
    other = dict(zip(list(FIRST)[:60], items(60, seed=6).values(), strict=True))
    encoded = site.encoded(FIRST, plan_id="again", base=base, alter=recomputed(other, NOON + timedelta(seconds=1)))
    assert (encoded.plan.unchanged, encoded.audit(LAX).problems) == (2000, ())
    receipt = encoded.index(LISTS)
    assert receipt.index.build.changed == 120
    assert contents(stored(receipt)) == by_row(FIRST | other)

"""Sharded indexes: equal to one index, resumed after a crash, merged if small, patched by shard; tombstones."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from exact_search import ids_and_rows
from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.index.choice import predict
from marc_pipeline.index.faiss_index import fill, new_index
from marc_pipeline.index.make import satisfies
from marc_pipeline.index.search import IndexSearch
from marc_pipeline.index.shards import shard_files, shard_of
from marc_pipeline.nightly.stages import index_stage
from marc_pipeline.reader.release import open_release
from marc_pipeline.reader.verify import verify
from marc_pipeline.releases.ownership import OWNER
from marc_pipeline.releases.roll_back import roll_back
from marc_pipeline.resources import TaskResources
from marc_pipeline.table.commit import day_files
from marc_schemas.feature_table import bucket_number
from marc_schemas.identity import row_id
from marc_schemas.receipt import IndexReceipt
from marc_schemas.release import Release
from published import BUCKETS, DIM, Encoded, Site, Vectors, flip, in_buckets, items

VECTORS = items(2000)
LAX = AuditSettings(max_deleted_fraction=1, max_drift=99)
# Two shards of two buckets each; 2,000 × (32 + 8) bytes are .08 MiB.
SHARDS = {"shard_mib": 0.05, "merge_mib": 0.0}
LISTS = IndexSettings(factory="IVF16,Flat", recall_queries=4000, **SHARDS)


class Tasks:
    """Runs tasks one after the other and records them; is interrupted after ``fails`` tasks."""

    def __init__(self, *, fails: int | None = None) -> None:
        self.done: list[Any] = []
        self._fails = fails

    def __call__(
        self, function: Callable[[Any, TaskResources], Any], tasks: Sequence[Any], *, weight: Callable[[Any], int]
    ) -> list[Any]:
        assert all(weight(task) > 0 for task in tasks)
        found = []
        for task in tasks:
            if len(self.done) == self._fails:
                raise KeyboardInterrupt
            found.append(function(task, TaskResources()))
            self.done.append(task)
        return found[::-1]


def made(encoded: Encoded, settings: IndexSettings, tasks: Tasks | None = None) -> IndexReceipt:
    return encoded.index(settings, run=tasks or Tasks())


def in_two(settings: IndexSettings) -> IndexSettings:
    """Two shards of the index of all items."""
    whole = predict(settings.factory, len(VECTORS), DIM).index_bytes / 2**20
    return settings.model_copy(update={"shard_mib": 0.6 * whole, "merge_mib": 0.0})


def files_below(folder: str) -> set[str]:
    found = (path for path in Path(folder).rglob("*") if path.is_file() and path.name != OWNER)
    return {str(path.relative_to(folder)) for path in found}


def audited(site: Site, vectors: Vectors, **given: Any) -> Encoded:
    encoded = site.encoded(vectors, **given)
    assert encoded.audit(LAX).problems == ()
    return encoded


def release_of(site: Site, vectors: Vectors, settings: IndexSettings, **given: Any) -> Release:
    encoded = audited(site, vectors, **given)
    encoded.index(settings)
    return encoded.release()


def assert_intact(site: Site, release: Release) -> None:
    assert verify(site.storage, release, table_uri=site.table_uri) == []


def test_every_bucket_is_in_one_shard_and_shards_have_similar_sizes() -> None:
    for buckets, shards in ((4, 2), (16, 5), (7, 7), (64, 3), (5, 1)):
        numbers = [shard_of(bucket, buckets, shards) for bucket in range(buckets)]
        assert numbers == sorted(numbers)
        assert set(numbers) == set(range(shards))
        assert max(map(numbers.count, range(shards))) - min(map(numbers.count, range(shards))) <= 1


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "Flat", "HNSW16", "PCA4,IVF8,Flat"])
def test_a_sharded_index_answers_like_a_single_one(site: Site, factory: str) -> None:
    several = release_of(site, VECTORS, in_two(IndexSettings(factory=factory, target_recall=0.01, recall_queries=4000)))
    assert len(several.index.files) == 2
    assert sum(file.rows for file in several.index.files) == 2000
    release = open_release(site.table_uri)
    assert sorted(release.index_row_ids()) == sorted(map(row_id, VECTORS))
    assert_intact(site, several)
    queries = np.random.default_rng(4).standard_normal((30, DIM)).astype(np.float32)
    shards = [faiss.read_index(f"{several.index.uri}/{file.path}") for file in several.index.files]
    for shard in shards:
        if lists := faiss.try_extract_index_ivf(shard):
            lists.nprobe = several.index.nprobe
    scores, found = IndexSearch(shards, items=2000, tombstones=0).nearest(queries, 10)
    names, same = release.search(queries, 10)
    by_row = {row_id(item): item for item in VECTORS}
    np.testing.assert_allclose(same, scores, rtol=1e-6)
    assert [{by_row[row] for row in rows} for rows in found.tolist()] == [set(row) for row in names]
    if "IVF" in factory:
        # The same lists, filled with all vectors.
        whole = shards[0]
        whole.reset()
        ids, rows = ids_and_rows(VECTORS)
        fill(whole, lambda: [(ids, rows)])
        np.testing.assert_allclose(whole.search(queries, 10)[0], scores, rtol=1e-6)


def test_small_shards_are_merged_into_one_file_and_deleted(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    tasks = Tasks()
    merged = made(encoded, LISTS.model_copy(update={"merge_mib": 1.0}), tasks)
    assert [task.number for task in tasks.done] == [0, 1]
    assert files_below(site.index_uri) == {file.path for file in merged.index.all_files}
    assert not list(Path(encoded.workspace.uri).rglob("shard-*.faiss"))
    (file,) = merged.index.files
    one = faiss.read_index(f"{site.index_uri}/{file.path}")
    several = made(encoded, LISTS)
    shards = [faiss.read_index(f"{site.index_uri}/{file.path}") for file in several.index.files]
    queries = np.stack(list(VECTORS.values())[:50])
    for part in (one, *shards):
        faiss.extract_index_ivf(part).nprobe = 16
    np.testing.assert_array_equal(
        one.search(queries, 12)[0], IndexSearch(shards, items=2000, tombstones=0).nearest(queries, 12)[0]
    )
    assert one.ntotal == 2000


def test_an_interrupted_build_resumes_with_the_missing_shards(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    settings = LISTS.model_copy(update={"shard_mib": 0.025})
    with pytest.raises(KeyboardInterrupt):
        made(encoded, settings, killed := Tasks(fails=2))
    assert len(killed.done) == 2
    before = {path: Path(site.index_uri, path).stat().st_mtime_ns for path in files_below(site.index_uri)}
    receipt = made(encoded, settings)
    assert len(receipt.index.files) == 4
    kept = {path: Path(site.index_uri, path).stat().st_mtime_ns for path in before}
    assert kept == before
    assert before.keys() <= {file.path for file in receipt.index.files}
    again = made(site.encoded(VECTORS), settings)
    assert (again.index.files, again.index.recall) == (receipt.index.files, receipt.index.recall)


@pytest.mark.parametrize("what", ["shard", "note", "trained"])
def test_damaged_files_of_an_earlier_attempt_are_not_reused(site: Site, what: str) -> None:
    encoded = site.encoded(VECTORS)
    work = Path(encoded.workspace.uri) / "index"
    first = made(encoded, LISTS)
    if what == "shard":
        flip(Path(site.index_uri) / first.index.files[0].path, 4000)
        assert not satisfies(first, LISTS, dim=DIM, storage=site.storage)
    elif what == "note":
        (path,) = work.glob("shard-0000*.npz")
        path.write_bytes(b"torn")
    else:
        (path,) = work.glob("trained/*.faiss")
        flip(path, 300)
    again = made(encoded, LISTS)
    assert satisfies(again, LISTS, dim=DIM, storage=site.storage)
    assert again.index.recall >= 0.95


def test_shards_of_other_settings_are_not_reused(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    first = made(encoded, LISTS)
    for other in ({"factory": "IVF8,Flat"}, {"k": 5}, {"seed": 9}):
        receipt = made(encoded, LISTS.model_copy(update=other))
        assert receipt.index.k == other.get("k", 10)
        assert receipt.index.recall_queries == 2000
    assert made(encoded, LISTS).index.files == first.index.files


def test_a_backfilled_bucket_changes_only_its_shard(site: Site) -> None:
    base = release_of(site, VECTORS, LISTS)
    assert len(base.index.files) == 2
    fresh = {item: -vector for item, vector in list(in_buckets(VECTORS, 3).items())[:40]}
    encoded = audited(site, in_buckets(VECTORS, 3) | fresh, plan_id="again", base=base, chosen=(3,))
    tasks = Tasks()
    receipt = made(encoded, LISTS, tasks)
    assert receipt.index.build.changed == 80
    assert receipt.index.files[0] == base.index.files[0]
    assert receipt.index.files[1] != base.index.files[1]
    release = encoded.release()
    assert_intact(site, release)
    reader = open_release(site.table_uri)
    for item, vector in fresh.items():
        assert reader.search(vector, 1)[0].item() == item


@pytest.mark.parametrize("shards", [1, 2])
def test_a_night_without_changes_copies_the_previous_index(site: Site, shards: int) -> None:
    settings = LISTS if shards == 2 else LISTS.model_copy(update={"shard_mib": 9})
    base = release_of(site, VECTORS, settings, ds="2026-11-19")
    night = release_of(site, VECTORS, settings, base=base)
    assert len(base.index.files) == shards
    assert [file.sha256 for file in night.index.files] == [file.sha256 for file in base.index.files]
    assert not {file.path for file in night.index.files} & {file.path for file in base.index.files}
    assert_intact(site, night)


def test_too_many_changes_stop_the_patch_and_rebuild_the_index(site: Site) -> None:
    base = release_of(site, VECTORS, LISTS, ds="2026-11-19")
    encoded = audited(site, {item: -vector for item, vector in VECTORS.items()}, base=base)
    receipt = made(encoded, LISTS)
    assert (receipt.index.build.changed, receipt.index.build.items) == (0, 2000)


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_backfill_of_any_bucket_rebuilds_a_damaged_index(site: Site, shards: int, damaged: int) -> None:
    settings = LISTS if shards == 2 else LISTS.model_copy(update={"shard_mib": 9.0})
    base = release_of(site, VECTORS, settings)
    flip(Path(base.index.uri) / base.index.files[damaged % shards].path, 4000)
    encoded = audited(site, in_buckets(VECTORS, 0), plan_id="again", base=base, chosen=(0,))
    receipt = made(encoded, settings)
    assert (receipt.index.build.changed, len(receipt.index.files)) == (0, shards)
    assert_intact(site, encoded.release())


@pytest.mark.parametrize("factory", ["IVF4,Flat", "Flat", "HNSW8"])
def test_an_empty_shard_is_searched_and_verified(site: Site, factory: str) -> None:
    vectors = {item: vector for item, vector in items(60).items() if row_id(item) % BUCKETS != 2}
    settings = IndexSettings(factory=factory, target_recall=0.5, shard_mib=1e-4, merge_mib=0)
    release = release_of(site, vectors, settings)
    assert [file.rows > 0 for file in release.index.files] == [True, True, False, True]
    assert_intact(site, release)
    reader = open_release(site.table_uri)
    some = list(vectors)[:5]
    assert set(reader.search(vectors[some[0]], 5, within=some)[0].ravel()) == set(some)


def test_shards_deleted_by_a_competing_run_are_built_again(site: Site) -> None:
    encoded, settings = site.encoded(VECTORS), LISTS.model_copy(update={"merge_mib": 1.0})
    tasks = Tasks()

    def tidied(function: Any, given: Sequence[Any], *, weight: Any) -> list[Any]:
        found = tasks(function, given, weight=weight)
        if len(tasks.done) == 2:
            for path in Path(encoded.workspace.uri, "index").rglob("shard-*.faiss"):
                path.unlink()
        return found

    receipt = encoded.index(settings, run=tidied)
    assert len(tasks.done) == 4
    assert satisfies(receipt, settings, dim=DIM, storage=site.storage)
    assert not list(Path(encoded.workspace.uri, "index").rglob("shard-*.faiss"))


GRAPH = IndexSettings(factory="HNSW16", recall_queries=4000, max_changed=1, max_drift=9)


@pytest.mark.parametrize("shards", [1, 2])
def test_items_removed_from_a_graph_become_tombstones_and_are_never_found(site: Site, shards: int) -> None:
    settings = GRAPH if shards == 1 else in_two(GRAPH)
    base = release_of(site, VECTORS, settings, ds="2026-11-18")
    assert len(base.index.files) == shards
    gone, changed = list(VECTORS)[:60], list(VECTORS)[60:90]
    day = {item: -vector if item in changed else vector for item, vector in VECTORS.items() if item not in gone}
    night = release_of(site, day, settings, ds="2026-11-19", base=base)
    assert (night.index.build.tombstones, night.index.build.changed) == (90, 120)
    assert sum(file.rows for file in night.index.files) == 2000 + 30
    assert night.index.recall >= 0.95
    release = open_release(site.table_uri)
    assert sorted(release.index_row_ids()) == sorted(map(row_id, day))
    assert_intact(site, night)
    names, _ = release.search(np.stack([VECTORS[item] for item in gone]), 10)
    assert not set(names.ravel()) & set(gone)
    assert None not in set(names.ravel())
    for item in changed:
        assert release.search(day[item], 1)[0].item() == item
    # Tombstones accumulate until the index is rebuilt.
    rest = dict(list(day.items())[100:])
    third = release_of(site, rest, settings, ds="2026-11-20", base=night)
    assert third.index.build.tombstones == 190
    anew = release_of(site, rest, settings.model_copy(update={"max_changed": 0.05}), ds="2026-11-21", base=third)
    assert (anew.index.build.tombstones, anew.index.build.changed) == (0, 0)
    assert index_size(anew) == len(rest)


def index_size(release: Release) -> int:
    return sum(faiss.read_index(f"{release.index.uri}/{file.path}").ntotal for file in release.index.files)


def test_a_rollback_restores_items_that_a_later_night_removed(site: Site) -> None:
    base = release_of(site, VECTORS, GRAPH, ds="2026-11-19")
    release_of(site, dict(list(VECTORS.items())[50:]), GRAPH, ds="2026-11-20", base=base)
    roll_back(site.storage, site.table_uri, base.release_id)
    release = open_release(site.table_uri)
    first = next(iter(VECTORS))
    assert release.search(VECTORS[first], 1)[0].item() == first


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "OPQ4,IVF16,PQ4x4", "PCA4,IVF16,Flat", "Flat", "SQ8"])
def test_filling_in_batches_equals_filling_at_once(factory: str) -> None:
    ids, rows = ids_and_rows(VECTORS)
    filled = new_index(factory, DIM)
    if not filled.is_trained:
        filled.train(rows)
    expected = faiss.clone_index(filled)
    expected.add_with_ids(rows, ids)
    fill(filled, lambda: [(ids[n : n + 300], rows[n : n + 300]) for n in range(0, 2000, 300)])
    assert filled.ntotal == 2000
    for part in (filled, expected):
        if lists := faiss.try_extract_index_ivf(part):
            lists.nprobe = 16
    scores, found = filled.search(rows[:100], 10)
    np.testing.assert_array_equal(scores, expected.search(rows[:100], 10)[0])
    assert found[:, 0].tolist() == expected.search(rows[:100], 10)[1][:, 0].tolist()


def test_a_shard_has_the_files_of_its_buckets(site: Site) -> None:
    encoded = site.encoded(VECTORS)
    files = day_files(encoded.plan, encoded.receipts, None)
    parts = [shard_files(files, number, buckets=BUCKETS, of=3) for number in range(3)]
    assert [file for part in parts for file in part] == list(files)
    assert [[bucket_number(file.path) for file in part] for part in parts] == [[0, 1], [2], [3]]


@pytest.mark.spark
def test_spark_tasks_build_and_patch_shards(site: Site, spark: Any) -> None:
    encoded = audited(site, VECTORS)
    settings = site.settings.model_copy(update={"index": LISTS})
    receipt = index_stage(open_deployment(settings), encoded.plan.plan_id)
    assert len(receipt.index.files) == 2
    assert spark.sparkContext.statusTracker().getJobIdsForGroup(None)
    release = encoded.release()
    assert_intact(site, release)
    # The next night patches both shards in Spark tasks.
    day = {item: -vector if number < 20 else vector for number, (item, vector) in enumerate(VECTORS.items())}
    encoded = audited(site, day, ds="2026-11-21", base=release)
    receipt = index_stage(open_deployment(settings), encoded.plan.plan_id)
    assert (len(receipt.index.files), receipt.index.build.changed) == (2, 40)
    assert_intact(site, encoded.release())

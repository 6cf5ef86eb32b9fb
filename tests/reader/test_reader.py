"""Reading a release: rows, vectors, neighbours and batches, damage, pinning, and closing."""

import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exact_search import exact_neighbours
from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import CorruptFile, MissingFile, ReleaseGone, UserError
from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.roll_back import roll_back
from marc_schemas.feature_table import table_schema
from marc_schemas.files import BLOCK_BYTES, PublishedFile
from marc_schemas.identity import row_id
from published import BUCKETS, DIM, DS, Site, Vectors, bucket_rows, flip, in_buckets, items

QUICK = settings(deadline=None, database=None, max_examples=50)

# Several row groups in each of two buckets, and more than one verified block in each file.
LARGE_DIM = 32
LARGE = items(6000, dim=LARGE_DIM)
LARGE_IDS = list(LARGE)

# Small whole numbers: products are exact in float32.
DRAWN = np.random.default_rng(3).integers(-4, 5, (300, DIM)).astype(np.float32)
WHOLE = {f"item-{number:03d}": row for number, row in enumerate(DRAWN)}


@pytest.fixture(scope="module")
def large_site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("large"), dim=LARGE_DIM)
    site.publish(LARGE, buckets=2)
    return site


@pytest.fixture(scope="module")
def large(large_site: Site) -> OpenRelease:
    return open_release(large_site.table_uri)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> OpenRelease:
    site = Site(tmp_path_factory.mktemp("whole"), normalised=False)
    site.publish(WHOLE)
    return open_release(site.table_uri)


@pytest.fixture
def small(site: Site) -> OpenRelease:
    site.publish(items(40))
    return open_release(site.table_uri)


def test_repr_and_length_describe_the_release(large: OpenRelease) -> None:
    assert len(large) == 6000
    assert repr(large) == f"<release {large.facts.release_id} of {DS}: 6,000 items × 32>"


@QUICK
@given(st.lists(st.sampled_from(LARGE_IDS), max_size=40))
def test_vectors_come_in_the_order_of_the_ids_with_repeats(large: OpenRelease, ids: list[str]) -> None:
    found = large.vectors(ids)
    assert found.shape == (len(ids), LARGE_DIM)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([LARGE[i] for i in ids], np.float32).reshape(-1, LARGE_DIM))


def test_every_vector_equals_the_written_one(large: OpenRelease) -> None:
    np.testing.assert_array_equal(large.vectors(LARGE_IDS), np.stack(list(LARGE.values())))


@QUICK
@given(
    known=st.lists(st.sampled_from(LARGE_IDS), max_size=8),
    unknown=st.lists(st.text(max_size=6).filter(lambda i: i not in LARGE), min_size=1, max_size=14),
    order=st.randoms(use_true_random=False),
)
def test_the_error_names_every_unknown_id_and_no_known_one(
    large: OpenRelease, known: list[str], unknown: list[str], order: random.Random
) -> None:
    asked = [*known, *unknown]
    order.shuffle(asked)
    with pytest.raises(UnknownItems) as refused:
        large.vectors(asked)
    assert sorted(refused.value.ids) == sorted(unknown)
    assert large.facts.release_id in str(refused.value)
    assert f"({len(unknown)} missing)" in str(refused.value)
    assert {KeyError, UserError} <= set(UnknownItems.__mro__)


def test_the_error_lists_at_most_ten_unknown_ids(small: OpenRelease) -> None:
    asked = [f"x{number}" for number in range(12)]
    with pytest.raises(UnknownItems, match=r", … \(12 missing\)$") as refused:
        small.vectors(asked)
    assert sum(f"{item!r}," in str(refused.value) for item in asked) == 10
    assert sorted(refused.value.ids) == sorted(asked)


@settings(deadline=None, database=None, max_examples=12)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=12, unique=True))
def test_any_text_can_be_an_id(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    site = Site(tmp_path_factory.mktemp("ids"))
    vectors = dict(zip(ids, items(len(ids)).values(), strict=True))
    site.publish(vectors)
    release = open_release(site.table_uri)
    np.testing.assert_array_equal(release.vectors(ids), np.stack([vectors[i] for i in ids]))
    assert sorted(release.dataset().to_table(columns=["item_id"])["item_id"].to_pylist()) == sorted(ids)
    names, _ = release.search(vectors[ids[0]], k=len(ids))
    assert sorted(names[0]) == sorted(ids)


def test_one_id_is_read_from_its_bucket_only(site: Site) -> None:
    site.publish(items(40))
    release = open_release(site.table_uri)
    bucket = row_id("item-7") % BUCKETS
    for file in release.facts.table.files:
        if f"bucket={bucket}/" not in file.path:
            (Path(site.table_uri) / file.path).unlink()
    np.testing.assert_array_equal(release.vectors(["item-7"]), [items(40)["item-7"]])


@QUICK
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 20))
def test_search_equals_naive_search_if_all_scores_differ(large: OpenRelease, seed: int, k: int) -> None:
    queries = np.random.default_rng(seed).standard_normal((2, LARGE_DIM)).astype(np.float32)
    names, scores = large.search(queries, k)
    for query, found, own in zip(queries, names, scores, strict=True):
        expected, best = zip(*exact_neighbours(query, LARGE, k + 1), strict=True)
        np.testing.assert_allclose(own, best[:k], rtol=1e-4, atol=1e-5)
        if np.diff(np.negative(best)).min() > 1e-5:
            assert tuple(found) == expected[:k]


def test_one_vector_equals_a_batch_of_one_query(whole: OpenRelease) -> None:
    names, scores = whole.search(WHOLE["item-007"], k=4)
    again, same = whole.search(WHOLE["item-007"][None].astype(np.float64), k=4)
    assert names.shape == (1, 4)
    np.testing.assert_array_equal(names, again)
    np.testing.assert_array_equal(scores, same)


def test_narrow_lists_leave_the_last_places_empty(site: Site) -> None:
    site.publish(items(200), index=IndexSettings(factory="IVF8,Flat", target_recall=0.1))
    release = open_release(site.table_uri)
    assert release.facts.index.nprobe == 1
    names, scores = release.search(items(200)["item-3"], k=200)
    found = [name for name in names[0] if name is not None]
    assert 0 < len(found) < 200
    assert names[0, len(found) :].tolist() == [None] * (200 - len(found))
    assert len(set(found)) == len(found)
    expected = [float(items(200)["item-3"] @ items(200)[name]) for name in found]
    np.testing.assert_allclose(scores[0, : len(found)], expected, rtol=1e-5)
    assert (np.diff(scores[0, : len(found)]) <= 0).all()


def by_id(table: pa.Table) -> pa.Table:
    return table.sort_by("item_id").combine_chunks()


def test_the_dataset_has_the_columns_of_the_table_with_ds_and_bucket(large: OpenRelease) -> None:
    table = large.dataset().to_table()
    assert table.schema == table_schema(LARGE_DIM)
    assert table.num_rows == large.dataset().count_rows() == 6000
    rows = by_id(table)
    expected = by_id(bucket_rows(LARGE, bundle=large.facts.bundle.version, dim=LARGE_DIM))
    assert rows.select(expected.column_names).cast(expected.schema) == expected
    assert set(rows["ds"].to_pylist()) == {DS}
    assert rows["bucket"].to_pylist() == [number % 2 for number in rows["row_id"].to_pylist()]


def test_the_dataset_filters_by_columns_and_partitions(large: OpenRelease) -> None:
    dataset = large.dataset()
    assert dataset.count_rows(filter=pc.field("bucket") == 1) == sum(row_id(i) % 2 for i in LARGE)
    assert dataset.count_rows(filter=pc.field("ds") != DS) == 0
    (row,) = dataset.to_table(filter=pc.field("item_id") == "item-77", columns=["vector", "bucket"]).to_pylist()
    assert (row["vector"], row["bucket"]) == (LARGE["item-77"].tolist(), row_id("item-77") % 2)


def test_pyarrow_pandas_polars_and_duckdb_read_the_same_rows_from_the_files(whole: OpenRelease) -> None:
    expected = by_id(whole.dataset().to_table()).select(["item_id", "row_id", "vector", "content_hash"])
    wanted = list(zip(*expected.to_pydict().values(), strict=True))
    files = whole.files()
    assert len(files) == BUCKETS
    assert all(Path(file).is_file() for file in files)

    arrow = pa.concat_tables([pq.read_table(file, partitioning=None) for file in files])
    assert list(zip(*by_id(arrow).select(expected.column_names).to_pydict().values(), strict=True)) == wanted

    frame = pd.concat([pd.read_parquet(file, columns=expected.column_names, partitioning=None) for file in files])
    frame["vector"] = frame["vector"].map(lambda vector: vector.tolist())
    assert list(frame.sort_values("item_id").itertuples(index=False, name=None)) == wanted

    lazy = pl.scan_parquet(files, hive_partitioning=False).select(expected.column_names).sort("item_id").collect()
    assert [(*row[:2], list(row[2]), row[3]) for row in lazy.iter_rows()] == wanted

    columns = ", ".join(expected.column_names)
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT {columns} FROM read_parquet(?) ORDER BY item_id", [files]).fetchall()  # noqa: S608
        assert [(*row[:2], list(row[2]), row[3]) for row in found] == wanted
        dataset = whole.dataset()  # noqa: F841 - DuckDB finds it by its name
        assert connection.execute("SELECT count(*), min(ds), max(bucket) FROM dataset").fetchall() == [(300, DS, 3)]


def test_hive_partitioning_finds_the_bucket_in_the_paths(whole: OpenRelease) -> None:
    root = whole.files()[0].split("/ds=")[0]
    rows = pads.dataset(whole.files(), partition_base_dir=root, partitioning="hive").to_table(
        columns=["row_id", "bucket"]
    )
    assert rows["bucket"].to_pylist() == [number % BUCKETS for number in rows["row_id"].to_pylist()]


def test_numpy_returns_every_row_in_file_order(large: OpenRelease) -> None:
    ids, vectors = large.numpy()
    assert ids.to_pylist() == large.dataset().to_table(columns=["item_id"])["item_id"].to_pylist()
    assert sorted(ids.to_pylist()) == sorted(LARGE_IDS)
    assert (vectors.dtype, vectors.flags.c_contiguous, vectors.flags.owndata) == (np.float32, True, True)
    np.testing.assert_array_equal(vectors, np.stack([LARGE[i] for i in ids.to_pylist()]))
    vectors[:] = 0
    np.testing.assert_array_equal(large.numpy()[1], np.stack([LARGE[i] for i in ids.to_pylist()]))


def test_the_table_equals_the_dataset(large: OpenRelease) -> None:
    assert large.table() == large.dataset().to_table()
    columns = ["bucket", "vector", "item_id"]
    assert large.table(columns) == large.dataset().to_table(columns=columns)
    assert large.table(["ds"]) == large.dataset().to_table(columns=["ds"])
    assert large.table([]).num_columns == 0
    with pytest.raises(UserError, match=r"the table has no column price; it has item_id, row_id, vector, "):
        large.table(["item_id", "price"])


def test_torch_polars_and_numpy_share_memory(large: OpenRelease) -> None:
    import torch

    _, vectors = large.numpy()
    assert torch.from_numpy(vectors).data_ptr() == vectors.ctypes.data
    table = large.table(["item_id", "vector"])
    frame = pl.from_arrow(table, rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    parts = zip(table["vector"].chunks, frame["vector"].get_chunks(), strict=True)
    for chunk, series in parts:
        assert np.shares_memory(chunk.flatten().to_numpy(), series.to_numpy(allow_copy=False))
    assert frame["item_id"].to_list() == table["item_id"].to_pylist()


@QUICK
@given(size=st.integers(1, 7000), seed=st.none() | st.integers(0, 2**32))
def test_batches_contain_every_item_once_with_its_vector(large: OpenRelease, size: int, seed: int | None) -> None:
    size = max(size, 20)
    sizes, ids = [], []
    for names, vectors in large.batches(size, seed=seed):
        assert (vectors.dtype, vectors.shape) == (np.float32, (len(names), LARGE_DIM))
        np.testing.assert_array_equal(vectors, np.stack([LARGE[i] for i in names.to_pylist()]))
        sizes.append(len(names))
        ids += names.to_pylist()
    assert sizes == [size] * (6000 // size) + [6000 % size] * (6000 % size > 0)
    assert sorted(ids) == sorted(LARGE_IDS)
    assert (ids == large.numpy()[0].to_pylist()) == (seed is None)


def test_the_seed_decides_the_order_of_batches(large_site: Site, large: OpenRelease) -> None:
    def order(release: OpenRelease, seed: int, size: int = 100) -> list[str]:
        return [item for names, _ in release.batches(size, seed=seed) for item in names.to_pylist()]

    assert order(large, 7) == order(open_release(large_site.table_uri), 7) == order(large, 7, size=999)
    assert order(large, 7) != order(large, 8)
    # Either bucket can come first.
    assert {row_id(order(large, seed)[0]) % 2 for seed in range(8)} == {0, 1}


def test_a_batch_size_of_zero_is_refused_at_once(large: OpenRelease) -> None:
    with pytest.raises(UserError, match="size is 0; it must be at least 1"):
        large.batches(0)


def test_an_open_release_can_be_pickled(large: OpenRelease) -> None:
    large.vectors(LARGE_IDS[:3])
    large.search(LARGE[LARGE_IDS[0]], k=1)
    there = pickle.loads(pickle.dumps(large))  # noqa: S301
    assert there.facts == large.facts
    np.testing.assert_array_equal(there.vectors(LARGE_IDS[:3]), large.vectors(LARGE_IDS[:3]))


@contextmanager
def flipped(site: Site, file: PublishedFile, offset: int, mask: int = 0xFF) -> Iterator[None]:
    """A table file with one damaged byte."""
    path = Path(site.table_uri) / file.path
    flip(path, offset, mask)
    try:
        yield
    finally:
        flip(path, offset, mask)


def read_batches(release: OpenRelease) -> list[Any]:
    return list(release.batches(100, seed=1))


def assert_refused(site: Site, file: PublishedFile, *reads: Callable[[OpenRelease], Any]) -> None:
    for read in reads:
        with pytest.raises(CorruptFile, match=f"{file.path} differs from its checksum in block"):
            read(open_release(site.table_uri))


@QUICK
@given(file=st.integers(0, 1), place=st.floats(0, 1, exclude_max=True))
def test_a_damaged_byte_anywhere_in_a_table_file_is_found_when_all_rows_are_read(
    large_site: Site, large: OpenRelease, file: int, place: float
) -> None:
    published = large.facts.table.files[file]
    assert published.bytes > BLOCK_BYTES
    with flipped(large_site, published, int(place * published.bytes)):
        reads = (OpenRelease.dataset, OpenRelease.numpy, OpenRelease.table, lambda release: release.vectors(LARGE_IDS))
        assert_refused(large_site, published, *reads)


@QUICK
@given(item=st.sampled_from(LARGE_IDS), place=st.floats(0, 1, exclude_max=True))
def test_with_a_damaged_byte_vectors_are_correct_or_refused(
    large_site: Site, large: OpenRelease, item: str, place: float
) -> None:
    published = next(f for f in large.facts.table.files if f"bucket={row_id(item) % 2}/" in f.path)
    with flipped(large_site, published, int(place * published.bytes), 1):
        try:
            found = open_release(large_site.table_uri).vectors([item])
        except CorruptFile as error:
            assert published.path in str(error)  # noqa: PT017 - either outcome is right
        else:
            np.testing.assert_array_equal(found[0], LARGE[item])


def test_damage_in_one_bucket_does_not_affect_vectors_of_another(large_site: Site, large: OpenRelease) -> None:
    ids = [item for item in LARGE_IDS if row_id(item) % 2 == 0][:50]
    published = next(f for f in large.facts.table.files if "bucket=1/" in f.path)
    with flipped(large_site, published, 100):
        found = open_release(large_site.table_uri).vectors(ids)
    np.testing.assert_array_equal(found, np.stack([LARGE[i] for i in ids]))


def test_every_way_to_read_all_rows_verifies_the_vector_pages(large_site: Site, large: OpenRelease) -> None:
    published = large.facts.table.files[1]
    group = pq.read_metadata(Path(large_site.table_uri) / published.path).row_group(0)
    chunk = next(group.column(n) for n in range(6) if group.column(n).path_in_schema == "vector.list.element")
    with flipped(large_site, published, chunk.data_page_offset + chunk.total_compressed_size - 1):
        assert_refused(large_site, published, OpenRelease.numpy, OpenRelease.table, read_batches)


def test_a_missing_table_file_is_named(small: OpenRelease) -> None:
    Path(small.files()[2]).unlink()
    reads = (OpenRelease.dataset, OpenRelease.numpy, OpenRelease.table, read_batches)
    for read in (*reads, lambda release: release.vectors(list(items(40)))):
        with pytest.raises(CorruptFile, match=r"bucket=2/.* is missing"):
            read(small)


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.77, 0.999, None])
def test_a_damaged_or_missing_index_file_is_named_before_faiss_reads_it(
    small: OpenRelease, place: float | None
) -> None:
    file = small.facts.index.files[0]
    path = Path(small.facts.index.uri) / file.path
    if place is None:
        path.unlink()
    else:
        flip(path, int(place * file.bytes))
    message = f"{file.path} is missing" if place is None else f"{file.path} differs from its checksum in block"
    for read in (lambda: small.search(items(40)["item-0"]), small.index_row_ids):
        with pytest.raises(CorruptFile, match=message):
            read()


def test_a_new_release_does_not_change_an_open_one(site: Site) -> None:
    old = items(40)
    site.publish(old, plan_id="one")
    opened = open_release(site.table_uri)
    new = items(30, seed=9, prefix="new-")
    site.publish(new, plan_id="two")
    assert_holds(opened, old)
    newest = open_release(site.table_uri)
    assert_holds(newest, new)
    with pytest.raises(UnknownItems):
        newest.vectors(["item-5"])


def assert_holds(opened: OpenRelease, vectors: Vectors) -> None:
    """Check that every way to read returns exactly these vectors."""
    ids = list(vectors)
    assert len(opened) == opened.dataset().count_rows() == len(ids)
    np.testing.assert_array_equal(opened.vectors(ids), np.stack(list(vectors.values())))
    names, _ = opened.search(np.stack(list(vectors.values())), k=1)
    assert names[:, 0].tolist() == ids
    assert set(opened.index_row_ids().tolist()) == {row_id(item) for item in ids}


@pytest.mark.parametrize("warm", [False, True])
def test_backfill_and_rollback_do_not_change_an_open_release(site: Site, warm: bool) -> None:
    old = items(200)
    first = site.publish(old)
    opened = open_release(site.table_uri)
    ids = sorted(in_buckets(old, 2))
    new = {item: old[item] for item in ids[2:]} | dict(zip(ids[2:5], items(3, seed=9).values(), strict=True))
    if warm:
        assert_holds(opened, old)
    second = site.publish(new, plan_id="some", chosen=(2,))
    between = open_release(site.table_uri)
    assert_holds(opened, old)
    assert_holds(between, in_buckets(old, 0, 1, 3) | new)
    (back,) = roll_back(site.storage, site.table_uri, first.release_id)
    assert_holds(opened, old)
    assert_holds(between, in_buckets(old, 0, 1, 3) | new)
    assert_holds(open_release(site.table_uri), old)
    assert [one.facts for one in (opened, between, open_release(site.table_uri))] == [first, second, back]


def test_withdrawing_a_date_does_not_change_an_open_release(site: Site) -> None:
    yesterday = site.publish(items(30), ds="2026-11-19")
    today = site.publish(items(40, seed=1))
    opened = open_release(site.table_uri)
    assert opened.facts == today
    roll_back(site.storage, site.table_uri, yesterday.release_id)
    assert_holds(opened, items(40, seed=1))
    assert open_release(site.table_uri).facts == yesterday
    with pytest.raises(UserError, match=f"no release of {DS}"):
        open_release(site.table_uri, ds=DS)
    assert_holds(open_release(site.table_uri, release_id=today.release_id), items(40, seed=1))


READS: dict[str, Callable[[OpenRelease], Any]] = {
    "dataset": OpenRelease.dataset,
    "first_item": OpenRelease.first_item,
    "vectors": lambda release: release.vectors(["item-1"]),
    "numpy": OpenRelease.numpy,
    "table": OpenRelease.table,
    "batches": read_batches,
    "search": lambda release: release.search(np.ones((1, DIM), np.float32), 3),
    "similar": lambda release: release.similar(["item-1"], 3),
    "index_row_ids": OpenRelease.index_row_ids,
}


def superseded(site: Site) -> tuple[OpenRelease, Callable[[], None]]:
    """An open release with a newer one beside it, and a function that deletes its row from the log."""
    site.publish(items(40), plan_id="old")
    opened = open_release(site.table_uri)
    newer = site.publish(items(30), plan_id="new")

    def retire() -> None:
        assert release_log.replace(site.storage, release_log.read_log(site.storage, site.table_uri), [newer])

    return opened, retire


def remove_files(release: OpenRelease) -> None:
    index = release.facts.index
    for path in (*release.files(), f"{index.uri}/{index.files[0].path}"):
        Path(path).unlink()


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_release_deleted_by_retention_is_gone_and_not_damaged(site: Site, read: Callable[[OpenRelease], Any]) -> None:
    opened, retire = superseded(site)
    remove_files(opened)
    # While the log lists the release, missing files are damage.
    with pytest.raises(MissingFile, match="is missing"):
        read(opened)
    retire()
    with pytest.raises(ReleaseGone, match=f"release {opened.facts.release_id} of {DS} is gone: retention deleted it"):
        read(opened)
    with pytest.raises(UserError, match=f"no release {opened.facts.release_id}"):
        open_release(site.table_uri, release_id=opened.facts.release_id)


def test_a_second_dataset_checks_again_that_files_exist(site: Site) -> None:
    opened, retire = superseded(site)
    assert opened.dataset().count_rows() == 40
    remove_files(opened)
    with pytest.raises(MissingFile, match="is missing"):
        opened.dataset()
    retire()
    with pytest.raises(ReleaseGone):
        opened.dataset()


def test_a_damaged_file_of_a_deleted_release_is_reported_as_damage(site: Site) -> None:
    opened, retire = superseded(site)
    for path in opened.files():
        flip(path, Path(path).stat().st_size // 2)
    retire()
    with pytest.raises(CorruptFile, match="differs from its checksum") as refused:
        opened.dataset()
    assert not isinstance(refused.value, MissingFile)


def test_a_release_opens_by_date_or_id_from_an_absolute_or_relative_path(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = site.publish(items(5), ds="2026-11-19")
    second = site.publish(items(6))
    monkeypatch.chdir(site.root)
    assert open_release(Path(site.table_uri)).facts == open_release("item_vectors").facts == second
    assert open_release("item_vectors", ds="2026-11-19").facts == first
    assert open_release("item_vectors", release_id=first.release_id).vectors(["item-4"]).shape == (1, DIM)
    with pytest.raises(UserError, match="no release of 2026-11-18"):
        open_release("item_vectors", ds="2026-11-18")
    with pytest.raises(UserError, match=r"no release at .* yet"):
        open_release("elsewhere")


def test_dates_may_have_different_dimensions_and_bucket_counts(site: Site) -> None:
    site.publish(items(20), ds="2026-11-19")
    wide = Site(site.root, dim=12)
    wide.publish(items(20, dim=12), buckets=3)
    for day, dim in (("2026-11-19", DIM), (DS, 12)):
        release = open_release(site.table_uri, ds=day)
        vectors = items(20, dim=dim)
        np.testing.assert_array_equal(release.vectors(list(vectors)), np.stack(list(vectors.values())))
        assert release.dataset().to_table().schema == table_schema(dim)
        assert release.search(vectors["item-3"], k=1)[0][0, 0] == "item-3"


def test_reading_needs_no_torch_no_spark_and_no_airflow(small: OpenRelease, repository: Path) -> None:
    program = (
        "import sys, numpy\n"
        "from marc_pipeline.reader.release import open_release\n"
        "release = open_release(sys.argv[1])\n"
        "names, _ = release.search(release.vectors(['item-3']), k=1)\n"
        "release.numpy(), release.table(), list(release.batches(9, seed=1))\n"
        "heavy = {'torch', 'pyspark', 'airflow', 'transformers', 'boto3', 'polars'} & set(sys.modules)\n"
        "print(names[0, 0], release.dataset().count_rows(), sorted(heavy))\n"
    )
    uri = small.files()[0].split("/ds=")[0]
    ran = subprocess.run(
        [sys.executable, "-c", program, uri], cwd=repository, capture_output=True, text=True, check=True
    )
    assert ran.stdout == "item-3 40 []\n"


def test_every_way_to_read_is_tried_on_a_closed_release() -> None:
    usable = {"close", "facts", "files", "storage"}
    assert {name for name in dir(OpenRelease) if not name.startswith("_")} - usable == READS.keys()


@pytest.mark.parametrize("name", READS)
def test_a_closed_release_refuses_to_read_and_keeps_its_facts(small: OpenRelease, name: str) -> None:
    with small as opened:
        READS[name](opened)
    small.close()
    with pytest.raises(UserError, match=f"release {small.facts.release_id} is closed; open it again with `open_relea"):
        READS[name](small)
    assert (len(small), len(small.files())) == (40, BUCKETS)
    READS[name](pickle.loads(pickle.dumps(small)))  # noqa: S301


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_closing_releases_maps_and_files_and_keeps_returned_data(site: Site, factory: str) -> None:
    site.publish(items(600), index=IndexSettings(factory=factory))

    def held() -> int:
        maps = Path("/proc/self/maps").read_text().count(str(site.root))
        return maps + sum(str(site.root) in str(path.resolve()) for path in Path("/proc/self/fd").iterdir())

    with open_release(site.table_uri) as release:
        read = {name: call(release) for name, call in READS.items()}
        batches = release.batches(7)
        next(batches)
        assert held() > 0
    assert held() == 0
    with pytest.raises(UserError, match="is closed"):
        next(batches)
    with open_release(site.table_uri) as release:
        assert np.array_equal(read["vectors"], release.vectors(["item-1"]))
        assert read["table"].equals(release.table())
        assert read["dataset"].to_table().equals(release.dataset().to_table())
        assert np.array_equal(read["index_row_ids"], release.index_row_ids())
        assert read["numpy"][0].equals(release.numpy()[0])


def test_the_first_item_is_the_first_of_the_dataset(large: OpenRelease) -> None:
    assert large.first_item() == large.dataset().head(1, columns=["item_id"])["item_id"][0].as_py()

"""What a ranker relies on: the rows, vectors and neighbours of one release, every byte verified."""

import itertools
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import faiss
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
from numpy.typing import NDArray

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import CorruptFile, MissingFile, ReleaseGone, UserError
from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.roll_back import roll_back
from marc_pipeline.storage.checksums import describe_file
from marc_schemas.feature_table import table_schema
from marc_schemas.files import BLOCK_BYTES
from marc_schemas.identity import row_id
from marc_schemas.release import Release
from published import BUCKETS, DIM, DS, Site, Vector, Vectors, bucket_rows, flip, in_buckets, items
from release_cases import altered

QUICK = settings(deadline=None, database=None, max_examples=50)

# Several row groups in each of two buckets, and more than one verified block in each file.
LARGE_DIM = 32
LARGE = items(6000, dim=LARGE_DIM)
LARGE_IDS = list(LARGE)

# Small whole numbers: products are exact in float32, and many scores are equal.
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
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
def small(site: Site) -> OpenRelease:
    site.publish(items(40))
    return open_release(site.table_uri)


def test_a_release_says_what_it_is(large: OpenRelease) -> None:
    assert len(large) == 6000
    assert repr(large) == f"<release {large.facts.release_id} of {DS}: 6,000 items × 32>"


# --- vectors


@QUICK
@given(st.lists(st.sampled_from(LARGE_IDS), max_size=40))
def test_vectors_come_in_the_order_asked_repeats_and_all(large: OpenRelease, ids: list[str]) -> None:
    found = large.vectors(ids)
    assert found.shape == (len(ids), LARGE_DIM)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([LARGE[i] for i in ids], np.float32).reshape(-1, LARGE_DIM))


def test_every_vector_is_the_one_that_was_written(large: OpenRelease) -> None:
    np.testing.assert_array_equal(large.vectors(LARGE_IDS), np.stack(list(LARGE.values())))


@QUICK
@given(
    known=st.lists(st.sampled_from(LARGE_IDS), max_size=8),
    unknown=st.lists(st.text(max_size=6).filter(lambda i: i not in LARGE), min_size=1, max_size=14),
    order=st.randoms(use_true_random=False),
)
def test_every_unknown_id_is_named_and_no_known_one(
    large: OpenRelease, known: list[str], unknown: list[str], order: random.Random
) -> None:
    asked = [*known, *unknown]
    order.shuffle(asked)
    with pytest.raises(UnknownItems) as refused:
        large.vectors(asked)
    assert sorted(refused.value.ids) == sorted(unknown)
    assert large.facts.release_id in str(refused.value)
    assert f"({len(unknown)} missing)" in str(refused.value)
    assert isinstance(refused.value, KeyError)
    assert isinstance(refused.value, UserError)


def test_of_many_unknown_ids_ten_are_shown(small: OpenRelease) -> None:
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


def test_a_lookup_of_one_id_opens_one_bucket(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.publish(items(40))
    release = open_release(site.table_uri)
    bucket = row_id("item-7") % BUCKETS
    for file in release.facts.table.files:
        if f"bucket={bucket}/" not in file.path:
            (Path(site.table_uri) / file.path).unlink()
    np.testing.assert_array_equal(release.vectors(["item-7"]), [items(40)["item-7"]])


def test_no_ids_give_no_rows(small: OpenRelease) -> None:
    assert small.vectors([]).shape == (0, DIM)


# --- search


def naive(queries: NDArray[np.float32], vectors: Vectors, k: int) -> tuple[list[list[str]], NDArray[np.float64]]:
    """Exact neighbours, best first, equal scores in the order of their ids."""
    names = sorted(vectors)
    rows = np.stack([vectors[name] for name in names]).astype(np.float64)
    scores = queries.astype(np.float64) @ rows.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[names[i] for i in row] for row in order], np.take_along_axis(scores, order, axis=1)


whole_queries = st.lists(st.lists(st.integers(-4, 4), min_size=DIM, max_size=DIM), min_size=1, max_size=4).map(
    lambda rows: np.array(rows, np.float32)
)


@QUICK
@given(queries=whole_queries, k=st.integers(1, len(WHOLE)))
def test_search_finds_the_best_scores_with_ties_in_the_order_of_ids(
    whole: OpenRelease, queries: NDArray[np.float32], k: int
) -> None:
    names, scores = whole.search(queries, k)
    expected, best = naive(queries, WHOLE, k)
    assert names.shape == (len(queries), k)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, best)
    for row in range(len(queries)):
        own = [float(queries[row] @ WHOLE[name]) for name in names[row]]
        assert own == scores[row].tolist()
        assert len(set(names[row])) == k
        assert names[row].tolist() == sorted(names[row], key=lambda name: (-float(queries[row] @ WHOLE[name]), name))
        inside = int((best[row] > best[row, -1]).sum())  # those that the last place does not tie with
        assert names[row, :inside].tolist() == expected[row][:inside]


def test_of_items_that_tie_for_the_last_places_those_with_the_smallest_ids_are_found(site: Site) -> None:
    same: Vector = np.eye(DIM, dtype=np.float32)[0]
    site.publish({f"item-{number:02d}": same for number in range(40)})
    names, _ = open_release(site.table_uri).search(same, k=3)
    assert names.tolist() == [["item-00", "item-01", "item-02"]]


@QUICK
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 20))
def test_search_equals_naive_search_where_no_two_scores_are_equal(large: OpenRelease, seed: int, k: int) -> None:
    queries = np.random.default_rng(seed).standard_normal((2, LARGE_DIM)).astype(np.float32)
    names, scores = large.search(queries, k)
    expected, best = naive(queries, LARGE, k + 1)
    np.testing.assert_allclose(scores, best[:, :k], rtol=1e-4, atol=1e-5)
    for row in range(2):
        if np.diff(-best[row]).min() > 1e-5:
            assert names[row].tolist() == expected[row][:k]


def test_one_vector_is_one_query(whole: OpenRelease) -> None:
    names, scores = whole.search(WHOLE["item-007"], k=4)
    again, same = whole.search(WHOLE["item-007"][None].astype(np.float64), k=4)
    assert names.shape == (1, 4)
    np.testing.assert_array_equal(names, again)
    np.testing.assert_array_equal(scores, same)


def test_all_items_can_be_asked_for(whole: OpenRelease) -> None:
    queries = DRAWN[:3]
    assert whole.search(queries, k=len(WHOLE))[0].tolist() == naive(queries, WHOLE, len(WHOLE))[0]


def test_no_queries_have_no_neighbours(whole: OpenRelease) -> None:
    names, scores = whole.search(np.empty((0, DIM), np.float32), k=3)
    assert names.shape == scores.shape == (0, 3)


@pytest.mark.parametrize("shape", [(DIM + 1,), (2, DIM - 1), (1, 1, DIM), (), (0,)])
def test_queries_of_another_shape_are_refused(whole: OpenRelease, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"queries have shape \(.*\), the release needs \[n, 8\]"):
        whole.search(np.zeros(shape, np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_queries_with_nan_or_infinity_are_refused(whole: OpenRelease, value: float) -> None:
    queries = DRAWN[:2].copy()
    queries[1, 3] = value
    with pytest.raises(UserError, match="queries hold NaN or infinity"):
        whole.search(queries)


@pytest.mark.parametrize("k", [0, -1, len(WHOLE) + 1])
def test_k_out_of_range_is_refused(whole: OpenRelease, k: int) -> None:
    with pytest.raises(UserError, match=f"k is {k}, the release holds 300 items"):
        whole.search(DRAWN[:1], k)


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


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8", "SQ8", "PCA6,Flat"])
def test_the_index_holds_the_row_ids_of_the_table(site: Site, factory: str) -> None:
    site.publish(items(50), index=IndexSettings(factory=factory, target_recall=0.01))
    assert sorted(open_release(site.table_uri).index_row_ids()) == sorted(map(row_id, items(50)))


def with_other_index(site: Site, shards: list[dict[str, int]]) -> Release:
    """A release of 60 items whose index files were made by hand: row ids by item, one dict per file."""
    vectors = items(60)
    encoded = site.encoded(vectors)
    encoded.audit()
    receipt = encoded.index()
    files = []
    for number, shard in enumerate(shards):
        index = faiss.index_factory(DIM, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
        index.add_with_ids(np.stack([vectors[i] for i in shard]), np.array(list(shard.values())))
        path = Path(receipt.index.uri) / f"shard-{number}.faiss"
        faiss.write_index(index, str(path))
        files.append(describe_file(path, path=path.name, rows=len(shard)))
    encoded.workspace.write_index(altered(receipt, index__files=tuple(files)))
    return encoded.release()


def test_several_index_files_are_searched_as_one(site: Site) -> None:
    ids = {item: row_id(item) for item in items(60)}
    halves = [dict(itertools.islice(ids.items(), start, start + 30)) for start in (0, 30)]
    with_other_index(site, halves)
    release = open_release(site.table_uri)
    assert sorted(release.index_row_ids()) == sorted(ids.values())
    queries = np.stack(list(items(60).values()))
    assert release.search(queries, k=5)[0].tolist() == naive(queries, items(60), 5)[0]


@pytest.mark.parametrize("step", [4, -4])
def test_an_id_of_the_index_that_the_table_lacks_is_no_other_item(site: Site, step: int) -> None:
    ids = {item: row_id(item) for item in items(60)}
    for item, number in ids.items():
        if item not in ("item-3", "item-9"):
            ids[item] = number + step
    with_other_index(site, [ids])
    with pytest.raises(CorruptFile, match="index"):
        open_release(site.table_uri).search(items(60)["item-30"], k=3)


# --- rows


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


def test_readers_that_know_partitions_find_ds_and_bucket_in_the_paths(whole: OpenRelease) -> None:
    root = whole.files()[0].split("/ds=")[0]
    rows = pads.dataset(whole.files(), partition_base_dir=root, partitioning="hive").to_table(
        columns=["row_id", "bucket"]
    )
    assert rows["bucket"].to_pylist() == [number % BUCKETS for number in rows["row_id"].to_pylist()]


# --- everything


def test_everything_as_numpy_is_every_row_in_the_order_of_the_files(large: OpenRelease) -> None:
    ids, vectors = large.numpy()
    assert ids.to_pylist() == large.dataset().to_table(columns=["item_id"])["item_id"].to_pylist()
    assert sorted(ids.to_pylist()) == sorted(LARGE_IDS)
    assert (vectors.dtype, vectors.flags.c_contiguous, vectors.flags.owndata) == (np.float32, True, True)
    np.testing.assert_array_equal(vectors, np.stack([LARGE[i] for i in ids.to_pylist()]))
    vectors[:] = 0
    np.testing.assert_array_equal(large.numpy()[1], np.stack([LARGE[i] for i in ids.to_pylist()]))


def test_the_table_is_the_dataset_read_whole(large: OpenRelease) -> None:
    assert large.table() == large.dataset().to_table()
    columns = ["bucket", "vector", "item_id"]
    assert large.table(columns) == large.dataset().to_table(columns=columns)
    assert large.table(["ds"]) == large.dataset().to_table(columns=["ds"])
    assert large.table([]).num_columns == 0
    with pytest.raises(UserError, match=r"the table has no column price; it has item_id, row_id, vector, "):
        large.table(["item_id", "price"])


def test_torch_polars_and_numpy_share_the_memory_that_was_read(large: OpenRelease) -> None:
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
def test_batches_hold_every_item_once_with_its_own_vector(large: OpenRelease, size: int, seed: int | None) -> None:
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


def test_the_same_seed_gives_the_same_order_and_another_another(large_site: Site, large: OpenRelease) -> None:
    def order(release: OpenRelease, seed: int, size: int = 100) -> list[str]:
        return [item for names, _ in release.batches(size, seed=seed) for item in names.to_pylist()]

    assert order(large, 7) == order(open_release(large_site.table_uri), 7) == order(large, 7, size=999)
    assert order(large, 7) != order(large, 8)
    # Bucket after bucket, either of them first.
    assert {row_id(order(large, seed)[0]) % 2 for seed in range(8)} == {0, 1}


def test_batches_of_no_rows_are_refused_at_once(large: OpenRelease) -> None:
    with pytest.raises(UserError, match="size is 0; a batch has at least one row"):
        large.batches(0)


def test_an_open_release_travels_to_another_process(large: OpenRelease) -> None:
    large.vectors(LARGE_IDS[:3])
    large.search(LARGE[LARGE_IDS[0]], k=1)
    there = pickle.loads(pickle.dumps(large))  # noqa: S301
    assert there.facts == large.facts
    np.testing.assert_array_equal(there.vectors(LARGE_IDS[:3]), large.vectors(LARGE_IDS[:3]))


# --- damage


@QUICK
@given(file=st.integers(0, 1), place=st.floats(0, 1, exclude_max=True))
def test_a_flipped_byte_anywhere_in_a_table_file_is_refused_when_all_is_read(
    large_site: Site, large: OpenRelease, file: int, place: float
) -> None:
    published = large.facts.table.files[file]
    assert published.bytes > BLOCK_BYTES
    path, offset = Path(large_site.table_uri) / published.path, int(place * published.bytes)
    flip(path, offset)
    try:
        with pytest.raises(CorruptFile, match=f"{published.path} differs from its checksum in block"):
            open_release(large_site.table_uri).dataset()
        for read in (OpenRelease.numpy, OpenRelease.table, lambda release: release.vectors(LARGE_IDS)):
            with pytest.raises(CorruptFile, match=f"{published.path} differs from its checksum in block"):
                read(open_release(large_site.table_uri))
    finally:
        flip(path, offset)


@QUICK
@given(item=st.sampled_from(LARGE_IDS), place=st.floats(0, 1, exclude_max=True))
def test_with_a_flipped_byte_a_lookup_gives_the_true_vector_or_refuses(
    large_site: Site, large: OpenRelease, item: str, place: float
) -> None:
    published = next(f for f in large.facts.table.files if f"bucket={row_id(item) % 2}/" in f.path)
    path, offset = Path(large_site.table_uri) / published.path, int(place * published.bytes)
    flip(path, offset, 1)
    try:
        found = open_release(large_site.table_uri).vectors([item])
    except CorruptFile as error:
        assert published.path in str(error)  # noqa: PT017 - either outcome is right
    else:
        np.testing.assert_array_equal(found[0], LARGE[item])
    finally:
        flip(path, offset, 1)


def test_a_flipped_byte_in_the_other_bucket_disturbs_no_lookup(large_site: Site, large: OpenRelease) -> None:
    ids = [item for item in LARGE_IDS if row_id(item) % 2 == 0][:50]
    published = next(f for f in large.facts.table.files if "bucket=1/" in f.path)
    flip(Path(large_site.table_uri) / published.path, 100)
    try:
        fresh = open_release(large_site.table_uri)
        np.testing.assert_array_equal(fresh.vectors(ids), np.stack([LARGE[i] for i in ids]))
    finally:
        flip(Path(large_site.table_uri) / published.path, 100)


def test_every_way_to_read_everything_verifies_every_byte_that_it_hands_out(
    large_site: Site, large: OpenRelease
) -> None:
    published = large.facts.table.files[1]
    group = pq.read_metadata(Path(large_site.table_uri) / published.path).row_group(0)
    chunk = next(group.column(n) for n in range(6) if group.column(n).path_in_schema == "vector.list.element")
    path, offset = Path(large_site.table_uri) / published.path, chunk.data_page_offset + chunk.total_compressed_size - 1
    flip(path, offset)
    try:
        for read in (OpenRelease.numpy, OpenRelease.table, lambda release: list(release.batches(100, seed=1))):
            with pytest.raises(CorruptFile, match=f"{published.path} differs from its checksum in block"):
                read(open_release(large_site.table_uri))
    finally:
        flip(path, offset)


def test_a_missing_table_file_is_named(small: OpenRelease) -> None:
    Path(small.files()[2]).unlink()
    with pytest.raises(CorruptFile, match=r"bucket=2/.* is missing"):
        small.dataset().to_table()
    for read in (
        lambda: small.vectors(list(items(40))),
        small.numpy,
        small.table,
        lambda: list(small.batches(7)),
    ):
        with pytest.raises(CorruptFile, match=r"bucket=2/.* is missing"):
            read()


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.77, 0.999])
def test_a_flipped_byte_in_the_index_is_refused_before_faiss_reads_it(small: OpenRelease, place: float) -> None:
    file = small.facts.index.files[0]
    flip(Path(small.facts.index.uri) / file.path, int(place * file.bytes))
    with pytest.raises(CorruptFile, match=f"{file.path} differs from its checksum in block"):
        small.search(items(40)["item-0"])
    with pytest.raises(CorruptFile, match=file.path):
        small.index_row_ids()


def test_a_missing_index_file_is_named(small: OpenRelease) -> None:
    file = small.facts.index.files[0]
    (Path(small.facts.index.uri) / file.path).unlink()
    with pytest.raises(CorruptFile, match=f"{file.path} is missing"):
        small.search(items(40)["item-0"])


# --- which release


def test_an_open_release_stays_what_it_was_while_others_are_published(site: Site) -> None:
    old = items(40)
    site.publish(old, plan_id="one")
    opened = open_release(site.table_uri)
    site.publish(items(30, seed=9, prefix="new-"), plan_id="two")
    np.testing.assert_array_equal(opened.vectors(list(old)), np.stack(list(old.values())))
    assert opened.dataset().count_rows() == 40
    assert opened.search(old["item-5"], k=1)[0].tolist() == [["item-5"]]
    newest = open_release(site.table_uri)
    assert newest.search(items(30, seed=9)["item-5"], k=1)[0].tolist() == [["new-5"]]
    with pytest.raises(UnknownItems):
        newest.vectors(["item-5"])


def assert_holds(opened: OpenRelease, vectors: Vectors) -> None:
    """Every way to read gives exactly these vectors."""
    ids = list(vectors)
    assert len(opened) == opened.dataset().count_rows() == len(ids)
    np.testing.assert_array_equal(opened.vectors(ids), np.stack(list(vectors.values())))
    names, _ = opened.search(np.stack(list(vectors.values())), k=1)
    assert names[:, 0].tolist() == ids
    assert set(opened.index_row_ids().tolist()) == {row_id(item) for item in ids}


@pytest.mark.parametrize("warm", [False, True])
def test_an_open_release_stays_what_it_was_while_buckets_are_replaced_and_rolled_back(site: Site, warm: bool) -> None:
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


def test_an_open_release_stays_what_it_was_when_its_date_is_withdrawn(site: Site) -> None:
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


def remove_files(release: OpenRelease, *, index: bool = True) -> None:
    for path in release.files():
        Path(path).unlink()
    if index:
        (Path(release.facts.index.uri) / release.facts.index.files[0].path).unlink()


WAYS_TO_READ = {
    "vectors": lambda release: release.vectors(["item-0"]),
    "dataset": lambda release: release.dataset(),
    "search": lambda release: release.search(items(40)["item-0"]),
    "numpy": lambda release: release.numpy(),
    "table": lambda release: release.table(["item_id"]),
    "batches": lambda release: list(release.batches(5)),
}


@pytest.mark.parametrize("read", WAYS_TO_READ.values(), ids=WAYS_TO_READ.keys())
def test_a_release_that_retention_gave_up_is_gone_and_not_damaged(
    site: Site, read: Callable[[OpenRelease], Any]
) -> None:
    site.publish(items(40), plan_id="old")
    opened = open_release(site.table_uri)
    newer = site.publish(items(30), plan_id="new")
    remove_files(opened)
    # The row first: while the log names it, files that are missing are lost.
    with pytest.raises(MissingFile, match="is missing"):
        read(opened)
    found = release_log.read_log(site.storage, site.table_uri)
    assert release_log.replace(site.storage, found, [newer])
    with pytest.raises(ReleaseGone, match=f"release {opened.facts.release_id} of {DS} is gone: retention gave it up"):
        read(opened)
    with pytest.raises(UserError, match=f"no release {opened.facts.release_id}"):
        open_release(site.table_uri, release_id=opened.facts.release_id)


def test_a_dataset_is_not_handed_out_again_of_files_that_are_gone(site: Site) -> None:
    site.publish(items(40), plan_id="old")
    opened = open_release(site.table_uri)
    assert opened.dataset().count_rows() == 40
    newer = site.publish(items(30), plan_id="new")
    remove_files(opened)
    with pytest.raises(MissingFile, match="is missing"):
        opened.dataset()
    release_log.replace(site.storage, release_log.read_log(site.storage, site.table_uri), [newer])
    with pytest.raises(ReleaseGone):
        opened.dataset()


def test_a_damaged_file_of_a_release_that_is_gone_is_damaged(site: Site) -> None:
    site.publish(items(40), plan_id="old")
    opened = open_release(site.table_uri)
    newer = site.publish(items(30), plan_id="new")
    for path in opened.files():
        flip(path, Path(path).stat().st_size // 2)
    release_log.replace(site.storage, release_log.read_log(site.storage, site.table_uri), [newer])
    with pytest.raises(CorruptFile, match="differs from its checksum") as refused:
        opened.dataset()
    assert not isinstance(refused.value, MissingFile)


def test_releases_open_by_day_by_id_from_a_path_and_from_a_relative_one(
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


def test_days_may_have_other_dimensions_and_other_numbers_of_buckets(site: Site) -> None:
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


# --- closing


READS: dict[str, Callable[[OpenRelease], Any]] = {
    "dataset": lambda release: release.dataset(),
    "first_item": lambda release: release.first_item(),
    "vectors": lambda release: release.vectors(["item-1"]),
    "numpy": lambda release: release.numpy(),
    "table": lambda release: release.table(),
    "batches": lambda release: list(release.batches(7)),
    "search": lambda release: release.search(np.ones((1, DIM), np.float32), 3),
    "similar": lambda release: release.similar(["item-1"], 3),
    "index_row_ids": lambda release: release.index_row_ids(),
}


def test_every_way_to_read_is_tried_on_a_closed_release() -> None:
    told = {"close", "facts", "files", "storage"}
    assert {name for name in dir(OpenRelease) if not name.startswith("_")} - told == READS.keys()


@pytest.mark.parametrize("name", READS)
def test_a_closed_release_says_so_and_keeps_its_facts(small: OpenRelease, name: str) -> None:
    with small as opened:
        READS[name](opened)
    small.close()
    with pytest.raises(UserError, match=f"release {small.facts.release_id} is closed; open it again with `open_relea"):
        READS[name](small)
    assert (len(small), len(small.files())) == (40, BUCKETS)
    READS[name](pickle.loads(pickle.dumps(small)))  # noqa: S301


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "HNSW8"])
def test_closing_gives_maps_and_files_back_and_what_was_read_stays(site: Site, factory: str) -> None:
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


def test_the_first_item_is_that_of_the_dataset(large: OpenRelease) -> None:
    assert large.first_item() == large.dataset().head(1, columns=["item_id"])["item_id"][0].as_py()

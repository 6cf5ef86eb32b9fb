"""Files of the feature table, and commits that replace one date."""

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.errors import CorruptFile, Superseded
from marc_pipeline.storage import STAGED_PREFIX, Storage
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.commit import commit_day, committed_files, day_files, plan_of
from marc_pipeline.table.rows import empty_rows, plan_id_of, read_rows
from marc_pipeline.table.write import ROW_GROUP_ROWS, row_group_rows, write_bucket_file
from marc_schemas.feature_table import bucket_number, file_schema, partition_path
from marc_schemas.files import PublishedFile
from published import BUCKETS, DIM, DS, Encoded, Meeting, Site, Vectors, bucket_rows, flip, items

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

T = TypeVar("T")
OTHER_DS = "2026-11-19"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def files_of(encoded: Encoded) -> list[PublishedFile]:
    return [receipt.file for receipt in encoded.receipts if receipt.file is not None]


def commit(encoded: Encoded) -> int:
    site, ds = encoded.site, encoded.plan.ds
    return commit_day(site.storage, site.table_uri, files_of(encoded), dim=DIM, ds=ds)


def actions(site: Site, version: int) -> tuple[set[str], set[str]]:
    """Paths that one commit added and removed, from its file in the log."""
    lines = (Path(site.table_uri) / "_delta_log" / f"{version:020d}.json").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return (
        {unquote(action["add"]["path"]) for action in found if "add" in action},
        {unquote(action["remove"]["path"]) for action in found if "remove" in action},
    )


def snapshot(site: Site, version: int | None = None) -> dict[tuple[str, str], list[float]]:
    """Vectors by (ds, item_id), as a Delta reader reads them."""
    rows = DeltaTable(site.table_uri, version=version).to_pyarrow_table().to_pylist()
    found = {(row["ds"], row["item_id"]): row["vector"] for row in rows}
    assert len(found) == len(rows)
    return found


def expected(ds: str, vectors: Vectors) -> dict[tuple[str, str], list[float]]:
    return {(ds, item): vector.tolist() for item, vector in vectors.items()}


def at_once(count: int, call: Callable[[int], T]) -> list[T | Exception]:
    """Result or error of ``call(0)``, ``call(1)``, … in threads that start together."""
    barrier = threading.Barrier(count)

    def run(number: int) -> T | Exception:
        barrier.wait()
        try:
            return call(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def write(site: Site, rows: pa.Table, *, plan_id: str = "plan-0123456789abcdef", **footer: str) -> PublishedFile:
    facts: dict[str, Any] = {"dim": DIM, "ds": DS, "bucket": 3, "plan_id": plan_id}
    footer = {"marc.bundle": "b", "marc.dim": "8", **footer}
    written = write_bucket_file(site.storage, site.table_uri, [rows], **facts, footer=footer)
    assert written is not None
    return written


def test_a_written_file_reads_back_and_a_flipped_byte_is_refused(site: Site) -> None:
    rows = bucket_rows(items(50), bundle="b")
    file = write(site, rows)
    assert file.path.startswith(f"ds={DS}/bucket=3/part-plan-0123456789a-")
    assert file.rows == 50
    assert check_file(site.storage, site.table_uri, file) is None
    assert read_rows(site.storage, site.table_uri, file).replace_schema_metadata() == rows
    chosen = read_rows(site.storage, site.table_uri, file, columns=["vector", "item_id"])
    assert chosen.replace_schema_metadata() == rows.select(["vector", "item_id"])
    schema = pq.read_schema(Path(site.table_uri) / file.path)
    assert schema.remove_metadata() == file_schema(DIM) == empty_rows(DIM).schema
    assert empty_rows(DIM).num_rows == 0
    assert schema.field("vector").type.list_size == DIM
    assert not any(field.nullable for field in schema)
    flip(Path(site.table_uri) / file.path, file.bytes // 2)
    with pytest.raises(CorruptFile, match=file.path):
        read_rows(site.storage, site.table_uri, file)


def groups_of(path: Path) -> list[pq.RowGroupMetaData]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number) for number in range(metadata.num_row_groups)]


def test_row_ids_and_vectors_are_uncompressed_and_the_other_columns_use_zstd(site: Site) -> None:
    file = write(site, bucket_rows(items(2 * ROW_GROUP_ROWS + 5), bundle="b"))
    groups = groups_of(Path(site.table_uri) / file.path)
    assert [group.num_rows for group in groups] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 5]
    for group in groups:
        columns = [group.column(number) for number in range(group.num_columns)]
        uncompressed = {column.path_in_schema for column in columns if column.compression == "UNCOMPRESSED"}
        assert uncompressed == {"row_id", "vector.list.element"}
        assert {column.compression for column in columns} == {"ZSTD", "UNCOMPRESSED"}
        assert not any(column.has_dictionary_page for column in columns)
        assert {encoding for column in columns for encoding in column.encodings} <= {"PLAIN", "RLE"}
    metadata = pq.read_metadata(Path(site.table_uri) / file.path).metadata
    assert {b"marc.bundle": b"b", b"marc.dim": b"8", b"marc.layout": b"plain-pages"}.items() <= metadata.items()
    # Row-group statistics let a look-up skip row groups.
    assert groups[0].column(0).path_in_schema == "item_id"
    for before, after in itertools.pairwise(group.column(0).statistics for group in groups):
        assert before.max.encode() < after.min.encode()


def test_the_vectors_of_a_row_group_fit_into_one_page() -> None:
    expected = {1: 16_384, 64: 16_384, 256: 4096, 1024: 1024, 4096: 256, 2**21: 1}
    assert {dim: row_group_rows(dim) for dim in expected} == expected


@settings(deadline=None, database=None, max_examples=30)
@given(sizes=st.lists(st.integers(0, 11), max_size=8), group=st.integers(1, 7))
def test_row_groups_do_not_depend_on_the_input_tables(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], group: int
) -> None:
    site = Site(tmp_path_factory.mktemp("groups"))
    rows = bucket_rows(items(sum(sizes)), bundle="b")
    edges = [0, *itertools.accumulate(sizes)]
    tables = [rows.slice(start, end - start) for start, end in itertools.pairwise(edges)]
    facts: dict[str, Any] = {"dim": DIM, "ds": DS, "bucket": 0, "plan_id": "p" * 16, "footer": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marc_pipeline.table.write.ROW_GROUP_ROWS", group)
        file = write_bucket_file(site.storage, site.table_uri, iter(tables), **facts)
        whole = write_bucket_file(site.storage, site.table_uri, [rows], **facts)
    assert file == whole
    if file is None:
        assert rows.num_rows == 0
        return
    assert read_rows(site.storage, site.table_uri, file).replace_schema_metadata() == rows
    *full, last = [part.num_rows for part in groups_of(Path(site.table_uri) / file.path)]
    assert full == [group] * len(full)
    assert 0 < last <= group


@pytest.mark.spark
def test_spark_reads_the_files_with_its_default_reader(site: Site, spark: "SparkSession") -> None:
    vectors = items(ROW_GROUP_ROWS + 5)
    rows = bucket_rows(vectors, bundle="b")
    file = write(site, rows)
    read = spark.read.parquet(f"{site.table_uri}/{file.path}")
    assert "ColumnarToRow" in read._jdf.queryExecution().executedPlan().toString()  # type: ignore[operator]
    assert [(row["row_id"], row["item_id"], row["vector"]) for row in read.collect()] == list(
        zip(*(rows[name].to_pylist() for name in ("row_id", "item_id", "vector")), strict=True)
    )


def test_pages_have_their_own_checksums(site: Site) -> None:
    rows = bucket_rows(items(2000), bundle="b")
    path = Path(site.table_uri) / write(site, rows).path
    assert pq.read_table(path, page_checksum_verification=True, partitioning=None).num_rows == 2000
    column = pq.read_metadata(path).row_group(0).column(2)
    flip(path, column.data_page_offset + column.total_compressed_size - 10)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(path, columns=["vector"], page_checksum_verification=True, partitioning=None)


def test_other_rows_get_another_file_name(site: Site) -> None:
    first, again = (write(site, bucket_rows(items(20), bundle="b")) for _ in range(2))
    other = write(site, bucket_rows(items(20, seed=1), bundle="b"))
    assert again == first
    assert other.path != first.path
    assert check_file(site.storage, site.table_uri, first) is None


def test_a_failed_write_leaves_no_file(site: Site) -> None:
    with pytest.raises((pa.ArrowException, OSError, ValueError)):
        write(site, pa.table({"item_id": [b"x"], "odd": pa.array([{}], pa.struct([]))}))
    assert [path for path in Path(site.table_uri).rglob("*") if path.is_file()] == []


def test_a_commit_makes_files_visible_and_replaces_those_of_its_date_only(site: Site) -> None:
    commit(site.encoded(items(30, seed=1), ds=OTHER_DS))
    encoded = site.encoded(items(30))
    assert snapshot(site) == expected(OTHER_DS, items(30, seed=1))
    first = commit(encoded)
    before = committed_files(DeltaTable(site.table_uri), ds=OTHER_DS)
    commit(site.encoded(items(25, seed=2), plan_id="again"))
    assert committed_files(DeltaTable(site.table_uri), ds=OTHER_DS) == before != set()
    assert snapshot(site) == expected(OTHER_DS, items(30, seed=1)) | expected(DS, items(25, seed=2))
    assert snapshot(site, first) == expected(OTHER_DS, items(30, seed=1)) | expected(DS, items(30))


def test_a_delta_reader_reads_the_committed_version(site: Site) -> None:
    vectors = items(40)
    version = commit(site.encoded(vectors))
    table = DeltaTable(site.table_uri, version=version)
    assert table.metadata().partition_columns == ["ds", "bucket"]
    rows = table.to_pyarrow_table()
    assert set(rows.column_names) == {*file_schema(DIM).names, "ds", "bucket"}
    assert snapshot(site, version) == expected(DS, vectors)
    only = table.to_pyarrow_table(partitions=[("bucket", "=", "2")])
    assert set(only["bucket"].to_pylist()) == {2}
    assert all(number % BUCKETS == 2 for number in only["row_id"].to_pylist())


def test_the_same_files_are_not_committed_again(site: Site) -> None:
    encoded = site.encoded(items(10))
    version = commit(encoded)
    assert commit(encoded) == version == DeltaTable(site.table_uri).version()
    later = commit(site.encoded(items(10, seed=1), ds=OTHER_DS))
    assert later == version + 1
    # After another commit, the newest version is returned.
    assert commit(encoded) == later == DeltaTable(site.table_uri).version()
    assert snapshot(site, later) == expected(DS, items(10)) | expected(OTHER_DS, items(10, seed=1))


def test_a_commit_adds_and_removes_exactly_the_difference(site: Site) -> None:
    old, new = files_of(site.encoded(items(30))), files_of(site.encoded(items(30, seed=1), plan_id="again"))
    storage, uri = site.storage, site.table_uri
    version = commit_day(storage, uri, old, dim=DIM, ds=DS)
    assert actions(site, version) == ({file.path for file in old}, set())
    version = commit_day(storage, uri, [old[0], new[1], *old[2:]], dim=DIM, ds=DS)
    assert actions(site, version) == ({new[1].path}, {old[1].path})
    version = commit_day(storage, uri, [old[0], new[1]], dim=DIM, ds=DS)
    assert actions(site, version) == (set(), {old[2].path, old[3].path})
    # A removed file can be added again, because it was not deleted.
    version = commit_day(storage, uri, old, dim=DIM, ds=DS)
    assert actions(site, version) == ({old[1].path, old[2].path, old[3].path}, {new[1].path})
    assert snapshot(site) == expected(DS, items(30))
    version = commit_day(storage, uri, (), dim=DIM, ds=DS)
    assert actions(site, version) == (set(), {file.path for file in old})
    assert snapshot(site) == {}


def test_empty_buckets_and_vectors_of_another_length_are_committed(site: Site) -> None:
    commit(site.encoded(items(30)))
    one = {"item-0": items(30)["item-0"]}
    commit(site.encoded(one, plan_id="again"))
    assert snapshot(site) == expected(DS, one)
    wide = Site(site.root, dim=12)
    files = files_of(wide.encoded(items(10, dim=12), ds=OTHER_DS))
    version = commit_day(wide.storage, wide.table_uri, files, dim=12, ds=OTHER_DS)
    assert snapshot(site, version) == expected(DS, one) | expected(OTHER_DS, items(10, dim=12))


def test_concurrent_commits_of_different_dates_all_succeed_with_their_own_versions(tmp_path: Path) -> None:
    days = [f"2026-11-1{n}" for n in range(4)]
    for attempt in range(8):
        site = Site(tmp_path / str(attempt))
        commit(site.encoded(items(5), ds="2026-01-01"))
        encoded = [site.encoded(items(10, seed=n), ds=day) for n, day in enumerate(days)]
        versions = at_once(4, lambda n, encoded=encoded: commit(encoded[n]))  # type: ignore[misc]
        added = [{file.path for file in files_of(one)} for one in encoded]
        assert [actions(site, version)[0] for version in versions] == added  # type: ignore[arg-type]
        assert DeltaTable(site.table_uri).version() == 5
        assert snapshot(site) == expected("2026-01-01", items(5)) | {
            key: vector for n, day in enumerate(days) for key, vector in expected(day, items(10, seed=n)).items()
        }


def test_the_same_concurrent_commit_is_made_once(site: Site) -> None:
    commit(site.encoded(items(5), ds="2026-01-01"))
    encoded = site.encoded(items(10))
    assert at_once(4, lambda _: commit(encoded)) == [2, 2, 2, 2]
    assert DeltaTable(site.table_uri).version() == 2


@pytest.mark.parametrize("base_ds", ["2026-01-01", DS])
def test_concurrent_commits_of_one_date_replace_one_another(tmp_path: Path, base_ds: str) -> None:
    for attempt in range(8):
        site = Site(tmp_path / str(attempt))
        commit(site.encoded(items(20), ds=base_ds))
        rivals = [items(20 + n, seed=n + 1) for n in range(4)]
        encoded = [site.encoded(vectors, plan_id=f"rival-{n}") for n, vectors in enumerate(rivals)]
        versions = at_once(4, lambda n, encoded=encoded: commit(encoded[n]))  # type: ignore[misc]
        assert sorted(versions) == [2, 3, 4, 5]  # type: ignore[type-var]
        for version, rival, vectors in zip(versions, encoded, rivals, strict=True):
            assert isinstance(version, int)
            assert committed_files(DeltaTable(site.table_uri, version=version), ds=DS) == {
                file.path for file in files_of(rival)
            }
            others = {} if base_ds == DS else expected(base_ds, items(20))
            assert snapshot(site, version) == others | expected(DS, vectors)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (files_of(site.encoded(items(5, seed=n), plan_id=f"plan-{n}")) for n in range(2))
    commit = DeltaTable.create_write_transaction

    def answer_is_lost(*arguments: Any, **named: Any) -> None:
        commit(*arguments, **named)
        raise OSError("the answer was lost")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", answer_is_lost)
    for version, files in enumerate([first, second, first], start=1):
        assert commit_day(site.storage, site.table_uri, files, dim=DIM, ds=DS) == version
        assert committed_files(DeltaTable(site.table_uri)) == {file.path for file in files}


def test_a_commit_that_always_fails_is_an_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    files, tries = files_of(site.encoded(items(5))), []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(1)
        raise CommitFailedError("no")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", fail)
    with pytest.raises(OSError, match="failed 3 times"):
        commit_day(Storage(attempts=3), site.table_uri, files, dim=DIM, ds=DS)
    assert len(tries) == 3


def test_a_commit_that_left_the_log_is_superseded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of(site.encoded(items(5)))
    monkeypatch.setattr(Storage, "list", lambda *_, **__: [])
    with pytest.raises(Superseded, match="is no longer in the log"):
        commit_day(site.storage, site.table_uri, files, dim=DIM, ds=DS)


def test_the_first_commits_of_a_new_table_may_be_concurrent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, rivals = DeltaTable.create, 6

    def commit_first(number: int, site: Site) -> int:
        path = f"{partition_path(f'2026-11-1{number}', 0)}/part-{'0' * 16}-{'0' * 16}.parquet"
        file = PublishedFile(path=path, bytes=1, sha256="0" * 64, blocks="0" * 16)
        return commit_day(site.storage, site.table_uri, [file], dim=DIM, ds=f"2026-11-1{number}")

    for attempt in range(10):
        all_create = Meeting(rivals)

        def create_together(*arguments: Any, meeting: Meeting = all_create, **named: Any) -> DeltaTable:
            meeting.wait()
            return create(*arguments, **named)

        monkeypatch.setattr(DeltaTable, "create", create_together)
        site = Site(tmp_path / str(attempt))
        outcomes = at_once(rivals, lambda number, site=site: commit_first(number, site))  # type: ignore[misc]
        assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
        assert len(set(outcomes)) == rivals
        assert len(committed_files(DeltaTable(site.table_uri))) == rivals


# --- file names, and the files of a date


def test_name_and_footer_of_a_file_name_its_plan(site: Site) -> None:
    rows = bucket_rows(items(5), bundle="b")
    plan = "0123456789abcdef" * 2
    file = write(site, rows, plan_id=plan, **{"marc.plan_id": plan})
    assert plan_of(file.path) == plan_of(f"{site.table_uri}/{file.path}") == plan[:16]
    assert plan_id_of(site.storage, site.table_uri, file) == plan
    assert plan_id_of(site.storage, site.table_uri, write(site, rows)) == ""


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        (".staged-abc.parquet", ""),
        ("part-0123456789abcdef-0123456789abcdef.parquet", "0123456789abcdef"),
        ("part-0123456789abcdef-0123456789abcdef.parquet.crc", None),
        ("part-0123456789abcdef-0123456789abcde.parquet", None),
        ("part-00000-0b5c1a1e-c000.snappy.parquet", None),
        ("notes.txt", None),
    ],
)
def test_only_names_of_our_files_contain_a_plan(name: str, plan: str | None) -> None:
    name = name.replace(".staged-", STAGED_PREFIX)
    assert plan_of(f"/somewhere/ds={DS}/bucket=0/{name}") == plan


def test_a_backfill_keeps_the_files_of_other_buckets(site: Site) -> None:
    live = site.publish(items(40))
    others = items(40, seed=1)
    whole = site.encoded(others, plan_id="whole")
    made = {bucket_number(file.path): file for file in files_of(whole)}
    assert day_files(whole.plan, whole.receipts, live) == tuple(made[number] for number in range(BUCKETS))
    some = site.encoded(others, plan_id="some", chosen=(2, 1))
    made = {bucket_number(file.path): file for file in files_of(some)}
    assert day_files(some.plan, some.receipts, live) == (live.table.files[0], made[1], made[2], live.table.files[3])
    none = site.encoded({}, plan_id="none", chosen=(3,))
    assert day_files(none.plan, none.receipts, live) == live.table.files[:3]

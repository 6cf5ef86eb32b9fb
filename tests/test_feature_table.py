"""The feature table on disk: what a file holds, and commits that replace one date and nothing else."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from published import BUCKETS, DIM, DS, Encoded, Meeting, Site, Vectors, bucket_rows, flip, items

from pipeline.errors import CorruptFile, PipelineError, Superseded
from pipeline.feature_table import ROW_GROUP_ROWS, commit_partitions, empty_rows, read_rows, write_bucket_file
from pipeline.integrity import check_file
from schemas.feature_table import file_schema
from schemas.files import PublishedFile

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

T = TypeVar("T")
OTHER_DS = "2026-11-19"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def files_of(encoded: Encoded) -> list[PublishedFile]:
    return [receipt.file for receipt in encoded.receipts if receipt.file is not None]


def commit(encoded: Encoded, key: str) -> int:
    site, ds = encoded.site, encoded.plan.ds
    return commit_partitions(site.storage, site.table_uri, files_of(encoded), dim=DIM, ds=ds, key=key)


def snapshot(site: Site, version: int | None = None) -> dict[tuple[str, str], list[float]]:
    """The table as any Delta reader sees it: vectors by (ds, item_id)."""
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


def write(site: Site, rows: pa.Table, *, plan_id: str = "plan-0123456789abcdef") -> PublishedFile:
    return write_bucket_file(
        site.storage,
        site.table_uri,
        rows,
        ds=DS,
        bucket=3,
        plan_id=plan_id,
        footer={"marc.bundle": "b", "marc.dim": "8"},
    )


def test_a_written_file_reads_back_row_for_row(site: Site) -> None:
    rows = bucket_rows(items(50), bundle="b")
    file = write(site, rows)
    assert file.path.startswith(f"ds={DS}/bucket=3/part-plan-0123456789a-")
    assert file.rows == 50
    assert check_file(site.storage, site.table_uri, file) is None
    assert read_rows(site.storage, site.table_uri, file).replace_schema_metadata() == rows
    chosen = read_rows(site.storage, site.table_uri, file, columns=["vector", "item_id"])
    assert chosen.replace_schema_metadata() == rows.select(["vector", "item_id"])


def test_columns_are_packed_with_zstd_in_small_row_groups_and_nothing_is_a_dictionary(site: Site) -> None:
    rows = bucket_rows(items(2 * ROW_GROUP_ROWS + 5), bundle="b")
    file = write(site, rows)
    parquet = pq.ParquetFile(Path(site.table_uri) / file.path)
    metadata = parquet.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 5]
    for group in groups:
        columns = [group.column(number) for number in range(group.num_columns)]
        assert {column.compression for column in columns} == {"ZSTD"}
        assert not any(column.has_dictionary_page for column in columns)
        assert {encoding for column in columns for encoding in column.encodings} <= {"PLAIN", "RLE"}
    assert {b"marc.bundle": b"b", b"marc.dim": b"8"}.items() <= parquet.metadata.metadata.items()


@pytest.mark.spark
def test_spark_reads_the_files_with_its_default_reader(site: Site, spark: "SparkSession") -> None:
    # It refuses BYTE_STREAM_SPLIT: "Unsupported encoding".
    vectors = items(ROW_GROUP_ROWS + 5)
    file = write(site, bucket_rows(vectors, bundle="b"))
    rows = spark.read.parquet(f"{site.table_uri}/{file.path}").collect()
    assert {row["item_id"]: row["vector"] for row in rows} == {item: row.tolist() for item, row in vectors.items()}


def test_vectors_are_fixed_size_lists_on_disk_and_nothing_may_be_null(site: Site) -> None:
    file = write(site, bucket_rows(items(5), bundle="b"))
    schema = pq.read_schema(Path(site.table_uri) / file.path)
    assert schema.remove_metadata() == file_schema(DIM)
    assert schema.field("vector").type.list_size == DIM
    assert not any(field.nullable for field in schema)


def test_statistics_let_a_lookup_skip_row_groups(site: Site) -> None:
    file = write(site, bucket_rows(items(3 * ROW_GROUP_ROWS), bundle="b"))
    metadata = pq.read_metadata(Path(site.table_uri) / file.path)
    ranges = [metadata.row_group(n).column(0).statistics for n in range(metadata.num_row_groups)]
    assert [metadata.row_group(0).column(0).path_in_schema] == ["item_id"]
    for before, after in itertools.pairwise(ranges):
        assert before.max.encode() < after.min.encode()


def test_pages_carry_checksums_of_their_own(site: Site) -> None:
    rows = bucket_rows(items(2000), bundle="b")
    path = Path(site.table_uri) / write(site, rows).path
    assert pq.read_table(path, page_checksum_verification=True, partitioning=None).num_rows == 2000
    column = pq.read_metadata(path).row_group(0).column(2)
    flip(path, column.data_page_offset + column.total_compressed_size - 10)
    with pytest.raises(OSError, match=r"(?i)crc|checksum"):
        pq.read_table(path, columns=["vector"], page_checksum_verification=True, partitioning=None)


def test_other_rows_never_replace_a_file_that_somebody_may_trust(site: Site) -> None:
    first = write(site, bucket_rows(items(20), bundle="b"))
    again = write(site, bucket_rows(items(20), bundle="b"))
    other = write(site, bucket_rows(items(20, seed=1), bundle="b"))
    assert again == first
    assert other.path != first.path
    assert check_file(site.storage, site.table_uri, first) is None


def test_nothing_is_left_when_rows_cannot_be_written(site: Site) -> None:
    with pytest.raises((pa.ArrowException, OSError, ValueError)):
        write(site, pa.table({"item_id": [b"x"], "odd": pa.array([{}], pa.struct([]))}))
    assert [path for path in Path(site.table_uri).rglob("*") if path.is_file()] == []


def test_a_flipped_byte_is_refused_when_rows_are_read(site: Site) -> None:
    file = write(site, bucket_rows(items(20), bundle="b"))
    flip(Path(site.table_uri) / file.path, file.bytes // 2)
    with pytest.raises(CorruptFile, match=file.path):
        read_rows(site.storage, site.table_uri, file)


def test_an_empty_bucket_has_the_columns_of_a_file() -> None:
    assert empty_rows(DIM).schema == file_schema(DIM)
    assert empty_rows(DIM).num_rows == 0


def test_written_files_are_invisible_until_they_are_committed(site: Site) -> None:
    commit(site.encoded(items(10), ds=OTHER_DS), "first")
    encoded = site.encoded(items(20), ds=DS)
    assert snapshot(site) == expected(OTHER_DS, items(10))
    commit(encoded, "second")
    assert snapshot(site) == expected(OTHER_DS, items(10)) | expected(DS, items(20))


def test_any_delta_reader_reads_the_committed_version(site: Site) -> None:
    vectors = items(40)
    version = commit(site.encoded(vectors), "first")
    table = DeltaTable(site.table_uri, version=version)
    assert table.metadata().partition_columns == ["ds", "bucket"]
    rows = table.to_pyarrow_table()
    assert set(rows.column_names) == {*file_schema(DIM).names, "ds", "bucket"}
    assert snapshot(site, version) == expected(DS, vectors)
    only = table.to_pyarrow_table(partitions=[("bucket", "=", "2")])
    assert set(only["bucket"].to_pylist()) == {2}
    assert all(number % BUCKETS == 2 for number in only["row_id"].to_pylist())


def test_a_repeated_commit_is_a_no_op_also_after_others_have_committed(site: Site) -> None:
    encoded = site.encoded(items(10))
    version = commit(encoded, "first")
    assert commit(encoded, "first") == version
    later = commit(site.encoded(items(10, seed=1), ds=OTHER_DS), "other")
    assert commit(encoded, "first") == version
    assert DeltaTable(site.table_uri).version() == later == version + 1


def test_a_commit_replaces_the_files_of_its_date_and_no_others(site: Site) -> None:
    first = commit(site.encoded(items(30)), "first")
    commit(site.encoded(items(30, seed=1), ds=OTHER_DS), "other")
    before = {
        a["path"] for a in pa.table(DeltaTable(site.table_uri).get_add_actions()).to_pylist() if OTHER_DS in a["path"]
    }
    commit(site.encoded(items(25, seed=2), plan_id="again"), "second")
    after = {
        a["path"] for a in pa.table(DeltaTable(site.table_uri).get_add_actions()).to_pylist() if OTHER_DS in a["path"]
    }
    assert before == after != set()
    assert snapshot(site) == expected(OTHER_DS, items(30, seed=1)) | expected(DS, items(25, seed=2))
    assert snapshot(site, first) == expected(DS, items(30))


def test_a_bucket_that_became_empty_leaves_the_table(site: Site) -> None:
    commit(site.encoded(items(30)), "first")
    one = {"item-0": items(30)["item-0"]}
    commit(site.encoded(one, plan_id="again"), "second")
    assert snapshot(site) == expected(DS, one)


def test_another_bundle_may_bring_vectors_of_another_length(site: Site) -> None:
    commit(site.encoded(items(10)), "first")
    wide = Site(site.root, dim=12)
    version = commit_partitions(
        wide.storage,
        wide.table_uri,
        files_of(wide.encoded(items(10, dim=12), ds=OTHER_DS)),
        dim=12,
        ds=OTHER_DS,
        key="second",
    )
    assert snapshot(site, version) == expected(DS, items(10)) | expected(OTHER_DS, items(10, dim=12))


def test_dates_that_are_committed_at_once_all_arrive(site: Site) -> None:
    commit(site.encoded(items(5), ds="2026-01-01"), "there already")
    days = [f"2026-11-{day}" for day in range(10, 14)]
    encoded = [site.encoded(items(10, seed=n), ds=day) for n, day in enumerate(days)]
    outcomes = at_once(4, lambda n: commit(encoded[n], f"key-{n}"))
    assert [outcome for outcome in outcomes if isinstance(outcome, Exception)] == []
    assert DeltaTable(site.table_uri).version() == 5
    found = snapshot(site)
    assert found == expected("2026-01-01", items(5)) | {
        key: vector for n, day in enumerate(days) for key, vector in expected(day, items(10, seed=n)).items()
    }


def test_commits_at_one_moment_each_learn_their_own_version(tmp_path: Path) -> None:
    for attempt in range(8):
        site = Site(tmp_path / str(attempt))
        commit(site.encoded(items(1), ds="2026-01-01"), "there already")
        encoded = [site.encoded(items(2), ds=f"2026-11-1{n}") for n in range(4)]
        found = at_once(4, lambda n, encoded=encoded: commit(encoded[n], f"key-{n}"))  # type: ignore[misc]
        assert dict(enumerate(found)) == {n: version_in_the_log(site, f"key-{n}") for n in range(4)}


def version_in_the_log(site: Site, key: str) -> int:
    """Where a commit lies in the log's own files."""
    files = (Path(site.table_uri) / "_delta_log").glob("*.json")
    return next(int(path.stem) for path in files if f'"commit":"{key}"' in path.read_text())


def test_the_same_commit_at_once_is_made_once(site: Site) -> None:
    commit(site.encoded(items(5), ds="2026-01-01"), "there already")
    encoded = site.encoded(items(10))
    assert at_once(4, lambda _: commit(encoded, "same")) == [2, 2, 2, 2]
    assert DeltaTable(site.table_uri).version() == 2


def test_of_rivals_for_one_date_any_version_holds_exactly_one_and_the_losers_are_told(tmp_path: Path) -> None:
    for attempt in range(8):
        site = Site(tmp_path / str(attempt))
        commit(site.encoded(items(1), ds="2026-01-01"), "there already")
        rivals = [items(3 + n, seed=n, prefix=f"rival-{n}-") for n in range(4)]
        encoded = [site.encoded(vectors, plan_id=f"rival-{n}") for n, vectors in enumerate(rivals)]
        outcomes = at_once(4, lambda n, encoded=encoded: commit(encoded[n], f"key-{n}"))  # type: ignore[misc]
        lost = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        assert all(isinstance(error, Superseded) for error in lost)
        for version in range(2, DeltaTable(site.table_uri).version() + 1):
            rows = {item for ds, item in snapshot(site, version) if ds == DS}
            assert rows in [set(vectors) for vectors in rivals]


def test_the_first_commits_of_a_new_table_may_come_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, rivals = DeltaTable.create, 6

    def commit_first(number: int, site: Site) -> int:
        return commit_partitions(
            site.storage, site.table_uri, [], dim=DIM, ds=f"2026-11-1{number}", key=f"key-{number}"
        )

    for attempt in range(10):
        all_create = Meeting(rivals)

        def create_together(*arguments: Any, meeting: Meeting = all_create, **named: Any) -> DeltaTable:
            meeting.wait()
            return create(*arguments, **named)

        monkeypatch.setattr(DeltaTable, "create", create_together)
        site = Site(tmp_path / str(attempt))
        outcomes = at_once(rivals, lambda number, site=site: commit_first(number, site))  # type: ignore[misc]
        strange = [o for o in outcomes if isinstance(o, Exception) and not isinstance(o, PipelineError)]
        assert strange == []

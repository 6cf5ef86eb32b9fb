"""Reader of one release: files in both layouts, local or on S3, by item id and by row id."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import published
from folder_as_s3 import FolderAsS3
from marc_pipeline.errors import CorruptFile
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import describe_file
from marc_pipeline.storage.mapped_file import MappedFile
from marc_pipeline.table import read as table_reader
from marc_pipeline.table.read import TableReader, UnknownItems
from marc_pipeline.table.write import write_bucket_file
from marc_schemas.feature_table import partition_path
from marc_schemas.files import PublishedFile
from marc_schemas.identity import row_id
from marc_schemas.release import Release
from published import DS, Site, flip, items

QUICK = settings(deadline=None, database=None, max_examples=40)
DIM = 16
VECTORS = items(4000, dim=DIM)
IDS = list(VECTORS)
BUCKETS = 3


def write_older(storage: Storage, table_uri: str, tables: Any, *, ds: str, bucket: int, **_: Any) -> PublishedFile:
    """Write a file in the earlier layout with compressed vectors."""
    (rows,) = tables
    path = f"{partition_path(ds, bucket)}/part-{'0' * 16}-{bucket:016x}.parquet"
    target = Path(table_uri) / path
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, target, row_group_size=1024, compression="zstd", use_dictionary=False)
    return describe_file(target, path=path, rows=rows.num_rows)


def write_small_groups(*given: Any, **named: Any) -> PublishedFile | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marc_pipeline.table.write.ROW_GROUP_ROWS", 100)
        return write_bucket_file(*given, **named)


WRITERS: dict[str, Callable[..., PublishedFile | None]] = {
    "one row group": write_bucket_file,
    "many row groups": write_small_groups,
    "older": write_older,
}


@pytest.fixture(scope="module", params=WRITERS)
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    site = Site(tmp_path_factory.mktemp("site"), dim=DIM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "write_bucket_file", WRITERS[request.param])
        site.publish(VECTORS, buckets=BUCKETS)
    return site


@pytest.fixture(scope="module")
def facts(site: Site) -> Release:
    return open_release(site.table_uri).facts


@pytest.fixture(scope="module", params=["local", "s3"])
def reader(request: pytest.FixtureRequest, site: Site, facts: Release) -> TableReader:
    return table_at(request.param, site, facts)


def table_at(place: str, site: Site, facts: Release) -> TableReader:
    uri = site.table_uri if place == "local" else "s3://bucket"
    return TableReader(facts, uri=uri, storage=FolderAsS3(folder=site.table_uri))


@QUICK
@given(ids=st.lists(st.sampled_from(IDS), max_size=60))
def test_vectors_by_item_id_and_by_row_id_are_those_written(reader: TableReader, ids: list[str]) -> None:
    expected = np.array([VECTORS[item] for item in ids], np.float32).reshape(-1, DIM)
    np.testing.assert_array_equal(reader.vectors(ids), expected)
    row_ids = np.array([row_id(item) for item in ids], np.int64)
    np.testing.assert_array_equal(reader.vectors_of_rows(row_ids), expected)
    assert reader.item_ids(row_ids).tolist() == ids


def test_all_rows_are_read_from_every_layout_and_place(reader: TableReader) -> None:
    ids, vectors = reader.numpy()
    np.testing.assert_array_equal(vectors, np.stack([VECTORS[item] for item in ids.to_pylist()]))
    assert sorted(ids.to_pylist()) == sorted(IDS)
    table = reader.table(["bucket", "item_id", "vector", "content_hash", "encoded_at", "ds"])
    assert table["item_id"] == ids
    assert table["bucket"].to_pylist() == [row_id(item) % BUCKETS for item in ids.to_pylist()]
    np.testing.assert_array_equal(
        np.concatenate([chunk.flatten() for chunk in table["vector"].chunks]), vectors.ravel()
    )
    batches = list(reader.batches(1001, seed=3))
    assert [len(names) for names, _ in batches] == [1001, 1001, 1001, 997]
    shuffled = dict(zip(pa.concat_arrays([names for names, _ in batches]).to_pylist(), range(4000), strict=True))
    order = [shuffled[item] for item in IDS]
    np.testing.assert_array_equal(
        np.concatenate([part for _, part in batches])[order], np.stack(list(VECTORS.values()))
    )


def test_missing_ids_are_named_in_the_given_order(reader: TableReader) -> None:
    with pytest.raises(UnknownItems) as refused:
        reader.vectors(["z", IDS[0], "y", "", IDS[1], "z"])
    assert refused.value.ids == ["z", "y", "", "z"]


def test_item_ids_of_row_ids_keep_their_shape_and_give_none_for_minus_one(reader: TableReader) -> None:
    rows = np.array([[row_id(IDS[0]), -1], [-1, row_id(IDS[9])], [row_id(IDS[0]), row_id(IDS[5])]])
    assert reader.item_ids(rows).tolist() == [[IDS[0], None], [None, IDS[9]], [IDS[0], IDS[5]]]
    assert reader.item_ids(np.full((2, 3), -1)).tolist() == [[None] * 3] * 2
    assert reader.item_ids(np.empty((0, 3), np.int64)).shape == (0, 3)


@pytest.mark.parametrize("other", [-1, 0, row_id(IDS[0]) + BUCKETS, row_id(IDS[0]) + 1, 2**63 - 1])
def test_unknown_row_ids_are_an_error_of_the_index(reader: TableReader, other: int) -> None:
    with pytest.raises(CorruptFile, match="contains ids that its table lacks; run `marc verify`"):
        reader.vectors_of_rows(np.array([row_id(IDS[0]), other]))
    if other >= 0:
        with pytest.raises(CorruptFile, match="contains ids that its table lacks"):
            reader.item_ids(np.array([other, row_id(IDS[0])]))


def test_an_unknown_id_with_the_hash_of_an_item_is_unknown(
    reader: TableReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_reader, "row_id", lambda item: row_id(IDS[3] if item == "forged" else item))
    with pytest.raises(UnknownItems) as refused:
        reader.vectors([IDS[3], "forged"])
    assert refused.value.ids == ["forged"]


# --- how much is read


def test_a_lookup_fetches_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = Site(tmp_path, dim=512)
    wide.publish(items(4000, dim=512), buckets=2)
    facts = open_release(wide.table_uri).facts
    touched: set[tuple[str, int]] = set()

    def note(self: MappedFile, _source: Any, blocks: range) -> None:
        touched.update((self.uri, block) for block in blocks)
        fetch(self, _source, blocks)

    fetch = MappedFile._fetch
    monkeypatch.setattr(MappedFile, "_fetch", note)
    reader = table_at("s3", wide, facts)
    reader.vectors(["item-7"])
    assert {uri.split("bucket=")[1][0] for uri, _ in touched} == {str(row_id("item-7") % 2)}
    # Of 16 blocks: the ids, the header of the page of vectors, and one row.
    assert len(touched) <= 6
    before = len(touched)
    reader.vectors(["item-7"])
    assert len(touched) == before


def test_files_that_are_read_whole_from_s3_are_not_kept_on_disk(site: Site, facts: Release) -> None:
    reader = table_at("s3", site, facts)
    reader.numpy()
    for _ in reader.batches(500):
        pass
    assert reader._opened == {}
    reader.vectors(IDS[:1])
    assert len(reader._opened) == 1


def test_a_release_may_have_files_in_both_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    old = items(300)
    monkeypatch.setattr(published, "write_bucket_file", write_older)
    site.publish(old)
    monkeypatch.undo()
    site.publish(old, plan_id="some", chosen=(1, 2))
    release: OpenRelease = open_release(site.table_uri, ds=DS)
    marks = [(pq.read_metadata(file).metadata or {}).get(b"marc.layout") for file in release.files()]
    assert marks == [None, b"plain-pages", b"plain-pages", None]
    np.testing.assert_array_equal(release.vectors(list(old)), np.stack(list(old.values())))
    ids, vectors = release.numpy()
    np.testing.assert_array_equal(vectors, np.stack([old[item] for item in ids.to_pylist()]))


def test_a_flipped_byte_of_an_older_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(tmp_path)
    monkeypatch.setattr(published, "write_bucket_file", write_older)
    site.publish(items(50))
    file = open_release(site.table_uri).files()[0]
    flip(file, Path(file).stat().st_size // 3)
    for read in (OpenRelease.numpy, OpenRelease.table, lambda release: release.vectors(list(items(50)))):
        with pytest.raises(CorruptFile, match="differs from its checksum in block 0"):
            read(open_release(site.table_uri))

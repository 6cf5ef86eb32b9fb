"""One file of the table: the same rows, bit for bit, in every layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.errors import CorruptFile
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import describe_file
from marc_pipeline.storage.mapped_file import MappedFile
from marc_pipeline.table.file import TableFile
from marc_pipeline.table.write import write_bucket_file
from marc_schemas.feature_table import LAYOUT_FOOTER, PLAIN_LAYOUT, VECTOR_COLUMN, file_schema
from marc_schemas.files import BLOCK_BYTES, PublishedFile
from published import DS, bucket_rows, flip, unit_vectors

STORAGE = Storage()
QUICK = settings(deadline=None, database=None, max_examples=40)
Write = Callable[[Path, pa.Table, int], PublishedFile]


def present(root: Path, rows: pa.Table, group: int) -> PublishedFile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("marc_pipeline.table.write.ROW_GROUP_ROWS", group)
        dim = rows.schema.field("vector").type.list_size
        given: dict[str, Any] = {"dim": dim, "ds": DS, "bucket": 0, "plan_id": "p" * 16, "footer": {}}
        written = write_bucket_file(STORAGE, str(root), [rows], **given)
    assert written is not None
    return written


def older(root: Path, rows: pa.Table, group: int, *, footer: dict[str, str] | None = None) -> PublishedFile:
    """Write a file in the earlier layout: all columns compressed, no footer entry."""
    path = root / f"older-{footer}.parquet"
    rows = rows.replace_schema_metadata(footer or {})
    pq.write_table(rows, path, row_group_size=group, compression="zstd", use_dictionary=False)
    return describe_file(path, path=path.name, rows=rows.num_rows)


def mislabelled(root: Path, rows: pa.Table, group: int) -> PublishedFile:
    """Write a file whose footer claims uncompressed vectors wrongly."""
    return older(root, rows, group, footer={LAYOUT_FOOTER: PLAIN_LAYOUT})


LAYOUTS: dict[str, Write] = {"present": present, "older": older, "mislabelled": mislabelled}


def opened(root: Path, file: PublishedFile, dim: int) -> TableFile:
    return TableFile(MappedFile(STORAGE, str(root), file), rows=file.rows, dim=dim)


def with_bits(count: int, dim: int, bits: NDArray[np.uint32]) -> pa.Table:
    """Rows whose vectors have these bits, among them NaN with any payload, −0 and denormals."""
    rows = bucket_rows(unit_vectors([f"item-{number}" for number in range(count)], dim=dim), bundle="b", dim=dim)
    column = pa.FixedSizeListArray.from_arrays(pa.array(bits.view(np.float32)), type=rows.schema.field("vector").type)
    return rows.set_column(2, rows.schema.field("vector"), column)


@pytest.mark.parametrize("layout", LAYOUTS)
@QUICK
@given(data=st.data(), count=st.integers(1, 40), dim=st.sampled_from([1, 2, 3, 8, 17]), group=st.integers(1, 50))
def test_rows_read_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, layout: str, data: st.DataObject, count: int, dim: int, group: int
) -> None:
    special = st.sampled_from([0x80000000, 1, 0x7FC00001, 0xFFFFFFFF, 0x7F800000, 0x3F800000])
    bits = np.array(data.draw(st.lists(special | st.integers(0, 2**32 - 1), min_size=1, max_size=20)), np.uint32)
    bits = np.resize(bits, count * dim)
    root = tmp_path_factory.mktemp("bits")
    rows = with_bits(count, dim, bits)
    file = opened(root, LAYOUTS[layout](root, rows, group), dim)
    expected = bits.reshape(count, dim)
    np.testing.assert_array_equal(file.vectors().view(np.uint32), expected)
    at = np.array(data.draw(st.lists(st.integers(0, count - 1), max_size=30)), np.int64)
    places = np.random.default_rng(count).permutation(len(at))
    out = np.empty((len(at), dim), np.float32)
    file.take_vectors(at, out, places)
    np.testing.assert_array_equal(out.view(np.uint32)[places], expected[at])
    row_ids = rows["row_id"].to_numpy()
    np.testing.assert_array_equal(file.find(row_ids[at]), at)
    unknown = np.setdiff1d([0, 1, 2**63 - 1, -1, *(row_ids + 1)], row_ids)
    np.testing.assert_array_equal(file.find(unknown), np.full(len(unknown), -1))
    assert file.item_ids.equals(rows["item_id"].combine_chunks())
    columns = ["encoded_at", "content_hash", "row_id"]
    assert file.read(columns).select(columns) == rows.select(columns).replace_schema_metadata()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_vectors_in_several_row_groups_read_back(tmp_path: Path, layout: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 2500 * 1024, np.uint32)
    file = opened(tmp_path, LAYOUTS[layout](tmp_path, with_bits(2500, 1024, bits), 1024), 1024)
    np.testing.assert_array_equal(file.vectors().view(np.uint32), bits.reshape(2500, 1024))
    at = np.random.default_rng(1).integers(0, 2500, 99)
    out = np.empty((99, 1024), np.float32)
    file.take_vectors(at, out, np.arange(99))
    np.testing.assert_array_equal(out.view(np.uint32), bits.reshape(2500, 1024)[at])


@pytest.fixture
def large(tmp_path: Path) -> PublishedFile:
    """3 MiB of vectors in three row groups."""
    return present(tmp_path, with_bits(3000, 256, np.arange(3000 * 256, dtype=np.uint32)), 1024)


def vector_chunk(path: Path, group: int) -> tuple[int, int]:
    metadata = pq.read_metadata(path)
    leaf = [metadata.schema.column(number).path for number in range(metadata.num_columns)].index(VECTOR_COLUMN)
    chunk = metadata.row_group(group).column(leaf)
    return chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_flipped_byte_is_refused_only_for_rows_of_its_block(tmp_path: Path, large: PublishedFile, group: int) -> None:
    begin, end = vector_chunk(tmp_path / large.path, group)
    offset = (begin + end) // 2
    # The first row in the damaged block, and a row of another row group.
    hit = int(np.searchsorted(end - np.arange(1024, 0, -1) * 1024, offset // BLOCK_BYTES * BLOCK_BYTES)) + group * 1024
    other = (hit + 1024) % 3000
    flip(tmp_path / large.path, offset, 1)
    file = opened(tmp_path, large, 256)
    out = np.empty((1, 256), np.float32)
    with pytest.raises(CorruptFile, match=f"{large.path} differs from its checksum in block {offset // BLOCK_BYTES} "):
        file.take_vectors(np.array([hit]), out, np.array([0]))
    with pytest.raises(CorruptFile, match="differs from its checksum"):
        file.vectors()
    file.take_vectors(np.array([other]), out, np.array([0]))
    np.testing.assert_array_equal(out.view(np.uint32)[0], np.arange(other * 256, (other + 1) * 256))


def test_only_compressed_vectors_are_read_by_row_group(
    tmp_path: Path, large: PublishedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = opened(tmp_path, large, 256)
    compressed = opened(tmp_path, mislabelled(tmp_path, with_bits(3, 4, np.arange(12, dtype=np.uint32)), 2), 4)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a row group is read")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", refuse)
    out = np.empty((2, 256), np.float32)
    plain.take_vectors(np.array([2999, 0]), out, np.array([0, 1]))
    assert plain.vectors().shape == (3000, 256)
    with pytest.raises(AssertionError, match="a row group is read"):
        compressed.take_vectors(np.array([0]), np.empty((1, 4), np.float32), np.array([0]))


def test_a_file_that_differs_from_its_release_is_refused(tmp_path: Path) -> None:
    rows = bucket_rows(unit_vectors(["a", "b"]), bundle="b")
    file = present(tmp_path, rows, 10)
    with pytest.raises(CorruptFile, match=r"has 2 rows with columns .*, not those of its release"):
        opened(tmp_path, file.model_copy(update={"rows": 3}), 8)
    with pytest.raises(CorruptFile, match="not those of its release"):
        opened(tmp_path, file, 4)
    assert file_schema(8).names == rows.column_names

"""Offsets of uncompressed values: found only in the plain layout, whatever the footer claims."""

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marc_pipeline.table.plain_pages import values_start

PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False, "data_page_size": 1 << 30}
ELEMENT = pa.field("element", pa.float32(), nullable=False)
QUICK = settings(deadline=None, database=None, max_examples=60)


def written(column: pa.Array, *, nullable: bool = False, rows: int | None = None, **options: Any) -> bytes:
    """A file of one column in the plain layout, changed by options."""
    schema = pa.schema([pa.field("x", column.type, nullable=nullable)])
    target = io.BytesIO()
    given = {**PLAIN, "row_group_size": rows or max(1, len(column)), **options}
    pq.write_table(pa.table([column], schema=schema), target, **given)
    return target.getvalue()


def starts(file: bytes, row_bytes: int) -> list[int | None]:
    metadata = pq.read_metadata(io.BytesIO(file))
    view = memoryview(file)
    return [
        values_start(metadata, group, 0, row_bytes=row_bytes, read=lambda start, end: view[start:end])
        for group in range(metadata.num_row_groups)
    ]


def vectors(count: int, dim: int) -> tuple[pa.Array, bytes]:
    bits = np.random.default_rng(count).integers(0, 2**32, count * dim, np.uint32)
    return pa.FixedSizeListArray.from_arrays(
        pa.array(bits.view(np.float32)), type=pa.list_(ELEMENT, dim)
    ), bits.tobytes()


@QUICK
@given(count=st.integers(1, 200), dim=st.sampled_from([1, 2, 7, 8, 9, 64, 1024]), rows=st.integers(1, 200))
def test_the_offset_of_vectors_is_right(count: int, dim: int, rows: int) -> None:
    column, expected = vectors(count, dim)
    file = written(column, rows=rows)
    found = b""
    for number, start in enumerate(starts(file, 4 * dim)):
        assert start is not None
        found += file[start : start + 4 * dim * min(rows, count - number * rows)]
    assert found == expected


@QUICK
@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=300), statistics=st.booleans())
def test_the_offset_of_numbers_is_right(values: list[int], statistics: bool) -> None:
    file = written(pa.array(values), write_statistics=statistics, write_page_checksum=statistics)
    (start,) = starts(file, 8)
    assert start is not None
    assert np.frombuffer(file, np.int64, len(values), start).tolist() == values


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        pytest.param({"compression": "zstd"}, False, id="compressed"),
        pytest.param({"use_dictionary": True}, False, id="a dictionary"),
        pytest.param({"column_encoding": {"x.list.element": "BYTE_STREAM_SPLIT"}}, False, id="byte stream split"),
        pytest.param({"column_encoding": {"x": "DELTA_BINARY_PACKED"}}, True, id="packed differences"),
        pytest.param({"data_page_version": "2.0"}, False, id="data pages v2"),
        pytest.param({"data_page_size": 4096, "write_batch_size": 16}, False, id="several pages"),
    ],
)
def test_other_layouts_have_no_offset(options: dict[str, Any], numbers: bool) -> None:
    column = pa.array(np.random.default_rng(0).integers(0, 100, 4000)) if numbers else vectors(4000, 8)[0]
    size = 8 if numbers else 32
    assert None not in starts(written(column), size)
    assert starts(written(column, **options), size) == [None]


def test_missing_values_and_lists_of_other_lengths_have_no_offset() -> None:
    assert starts(written(pa.array([1, None, 3]), nullable=True), 8) == [None]
    assert starts(written(pa.array([1, 2, 3]), nullable=True), 8) != [None]
    ragged = pa.array([[1.0, 2.0], [], [3.0, 4.0]], pa.list_(ELEMENT))
    assert starts(written(ragged), 8) == [None]
    assert starts(written(vectors(5, 3)[0]), 16) == [None]


@QUICK
@given(
    noise=st.lists(st.tuples(st.integers(0, 79), st.integers(0, 255)), min_size=1, max_size=20),
    cut=st.integers(0, 80),
)
def test_a_damaged_page_header_has_no_offset(noise: list[tuple[int, int]], cut: int) -> None:
    file = bytearray(written(vectors(50, 4)[0]))
    truth = starts(bytes(file), 16)
    metadata = pq.read_metadata(io.BytesIO(bytes(file)))
    begin = metadata.row_group(0).column(0).data_page_offset
    for place, byte in noise:
        file[begin + place] = byte
    file[begin + cut : begin + 80] = bytes(80 - cut)
    assert starts(bytes(file), 16) in ([None], truth)

"""The verified memory map: every returned byte is verified once and fetched in few requests."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folder_as_s3 import FolderAsS3
from marc_pipeline.errors import CorruptFile, DiskFull, MissingFile
from marc_pipeline.storage import mapped_file
from marc_pipeline.storage.checksums import describe_file
from marc_pipeline.storage.mapped_file import GAP_BLOCKS, REQUEST_BLOCKS, MappedFile, requests
from marc_schemas.files import BLOCK_BYTES, PublishedFile
from published import flip

NAME = "folder/blocks.bin"
BLOCKS = 100
SIZE = BLOCKS * BLOCK_BYTES + 17
CONTENT = np.random.default_rng(0).bytes(SIZE)
QUICK = settings(deadline=None, database=None, max_examples=40)
ROOTS = {"local": "{folder}", "s3": "s3://bucket"}

ranges = st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK_BYTES)), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped")
    (folder / "folder").mkdir()
    (folder / NAME).write_bytes(CONTENT)
    return folder


@pytest.fixture(scope="module")
def published(folder: Path) -> PublishedFile:
    return describe_file(folder / NAME, path=NAME)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with the same file that the test may change."""
    (tmp_path / "folder").mkdir()
    (tmp_path / NAME).write_bytes(CONTENT)
    return tmp_path


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the verified blocks."""
    seen: list[int] = []
    verify = mapped_file.require_block

    def note(data: memoryview, block: int, *rest: Any) -> None:
        seen.append(block)
        verify(data, block, *rest)

    monkeypatch.setattr(mapped_file, "require_block", note)
    return seen


def mapped(root: Path, published: PublishedFile, kind: str) -> MappedFile:
    return MappedFile(FolderAsS3(folder=str(root)), ROOTS[kind].format(folder=root), published)


@pytest.mark.parametrize("kind", ROOTS)
@QUICK
@given(places=ranges)
def test_any_range_is_read_correctly(
    folder: Path, published: PublishedFile, kind: str, places: list[tuple[int, int]]
) -> None:
    file = mapped(folder, published, kind)
    for start, length in places:
        end = min(start + length, SIZE)
        assert file.view(start, end) == CONTENT[start:end]
        with file.open() as source:
            assert source.read_at(length, start) == CONTENT[start:end]


@pytest.mark.parametrize("kind", ROOTS)
@QUICK
@given(begin=st.lists(st.integers(0, SIZE - 300), min_size=1, max_size=50), size=st.integers(1, 300))
def test_records_at_any_offset_are_the_bytes_of_the_file(
    folder: Path, published: PublishedFile, kind: str, begin: list[int], size: int
) -> None:
    file = mapped(folder, published, kind)
    starts = np.array(begin)
    file.require(starts, starts + size)
    assert [bytes(record) for record in file.records(size)[starts]] == [CONTENT[at : at + size] for at in begin]


@pytest.mark.parametrize("kind", ROOTS)
def test_a_block_is_verified_on_its_first_access_only(
    folder: Path, published: PublishedFile, kind: str, verified: list[int]
) -> None:
    file = mapped(folder, published, kind)
    assert verified == []
    file.view(BLOCK_BYTES - 1, BLOCK_BYTES + 1)
    assert verified == [0, 1]
    file.view(0, 2 * BLOCK_BYTES)
    file.require([5, 30 * BLOCK_BYTES], [9, 31 * BLOCK_BYTES])
    assert verified == [0, 1, 30]
    file.view(0, SIZE)
    # A block in a gap between others may be fetched again from S3.
    assert set(verified) == set(range(BLOCKS + 1))
    assert kind == "s3" or len(verified) == BLOCKS + 1


@pytest.mark.parametrize("kind", ROOTS)
@pytest.mark.parametrize("offset", [0, BLOCK_BYTES - 1, 40 * BLOCK_BYTES + 7, SIZE - 1])
def test_every_read_of_a_damaged_block_is_refused(own: Path, published: PublishedFile, kind: str, offset: int) -> None:
    flip(own / NAME, offset)
    file = mapped(own, published, kind)
    hit = offset // BLOCK_BYTES
    for _ in range(2):
        with pytest.raises(CorruptFile, match=rf"blocks.bin differs from its checksum in block {hit} "):
            file.view(hit * BLOCK_BYTES, hit * BLOCK_BYTES + 1)
        with pytest.raises(CorruptFile, match=f"in block {hit} "):
            file.require([0, offset], [1, offset + 1])
    other = (hit + 20) % BLOCKS * BLOCK_BYTES
    assert file.view(other, other + 10) == CONTENT[other : other + 10]
    flip(own / NAME, offset)
    assert file.view(offset, offset + 1) == CONTENT[offset : offset + 1]


@pytest.mark.parametrize("kind", ROOTS)
def test_a_missing_or_resized_file_is_refused_unless_it_is_open_already(
    own: Path, published: PublishedFile, kind: str
) -> None:
    file = mapped(own, published, kind)
    (own / NAME).unlink()
    assert file.view(0, SIZE) == CONTENT
    with pytest.raises(MissingFile, match=r"blocks.bin is missing"):
        mapped(own, published, kind)
    (own / NAME).write_bytes(CONTENT[:-1])
    with pytest.raises(CorruptFile, match=f"has {SIZE - 1:,} bytes, the release lists {SIZE:,}"):
        mapped(own, published, kind)


@pytest.mark.parametrize("kind", ROOTS)
@pytest.mark.parametrize("has_view", [False, True], ids=["no view", "a view"])
def test_close_releases_map_and_files_and_views_stay_valid(
    own: Path, published: PublishedFile, kind: str, has_view: bool
) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    file = mapped(own, published, kind)
    view = file.view(0, SIZE) if has_view else b""
    for _ in range(2):
        file.close()
    assert view == (CONTENT if has_view else b"")
    if not has_view:
        assert set(Path("/proc/self/fd").iterdir()) == before
        with pytest.raises(ValueError, match="closed"):
            file.view(0, 1)


def test_threads_may_read_the_same_file(folder: Path, published: PublishedFile) -> None:
    file = mapped(folder, published, "s3")
    together = threading.Barrier(4)

    def read(number: int) -> bool:
        together.wait()
        return file.view(number * BLOCK_BYTES, SIZE) == CONTENT[number * BLOCK_BYTES :]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [True] * 4


# --- requests to S3


@QUICK
@given(st.sets(st.integers(0, 400), min_size=1))
def test_requests_contain_every_block_once_in_few_ranges(wanted: set[int]) -> None:
    blocks = np.array(sorted(wanted))
    asked = requests(blocks)
    seen = [block for one in asked for block in one]
    assert len(seen) == len(set(seen))
    assert wanted <= set(seen)
    assert all(0 < len(one) <= REQUEST_BLOCKS for one in asked)
    for before, after in pairwise(asked):
        assert len(before) == REQUEST_BLOCKS or after.start - before.stop >= GAP_BLOCKS
    # Only blocks in narrow gaps are read in addition.
    assert all({*range(block - GAP_BLOCKS, block)} & wanted for block in set(seen) - wanted)


def test_a_thousand_ranges_are_few_requests_without_repetition(
    folder: Path, published: PublishedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[range] = []
    fetch = MappedFile._fetch

    def note(self: MappedFile, source: Any, blocks: range) -> None:
        fetched.append(blocks)
        fetch(self, source, blocks)

    monkeypatch.setattr(MappedFile, "_fetch", note)
    file = mapped(folder, published, "s3")
    starts = np.random.default_rng(1).integers(0, SIZE - 256, 1000)
    file.require(starts, starts + 256)
    assert len(fetched) <= -(-BLOCKS // REQUEST_BLOCKS) + 1
    seen = [block for one in fetched for block in one]
    assert len(seen) == len(set(seen)) <= BLOCKS + 1
    count = len(fetched)
    file.require(starts, starts + 256)
    assert len(fetched) == count


def test_a_full_disk_is_an_error_that_names_the_temporary_copy(
    folder: Path, published: PublishedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    file = mapped(folder, published, "s3")
    monkeypatch.setattr(mapped_file.os, "pwrite", full)
    with pytest.raises(DiskFull, match=r"temporary copy of s3://bucket/folder/blocks.bin"):
        file.view(0, 10)


def test_a_deleted_object_is_missing_and_an_unreadable_one_is_not(own: Path, published: PublishedFile) -> None:
    class Broken:
        def read_at(self, *_: Any) -> bytes:
            raise OSError("AWS Error NO_SUCH_KEY during GetObject operation")

    file = mapped(own, published, "s3")
    file._source = Broken()
    with pytest.raises(OSError, match="NO_SUCH_KEY"):
        file.view(0, 1)
    (own / NAME).unlink()
    with pytest.raises(MissingFile, match=r"blocks.bin is missing"):
        file.view(0, 1)

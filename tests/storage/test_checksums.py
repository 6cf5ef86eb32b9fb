"""Checksums: readers get verified bytes only, and every difference is refused."""

import hashlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from folder_as_s3 import BUCKET, FolderAsS3
from marc_pipeline.errors import CorruptFile
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import check_file, describe_file, open_verified, require_blocks, verified_folder
from marc_schemas.files import BLOCK_BYTES, PublishedFile
from published import flip

STORAGE = Storage()
NAME = "folder/blocks.bin"
SIZE = 3 * BLOCK_BYTES + 17
CONTENT = np.random.default_rng(0).bytes(SIZE)
QUICK = settings(deadline=None, database=None, max_examples=80)

# Boundaries of blocks, and the bytes on either side.
EDGES = sorted({max(0, edge + step) for edge in (*range(0, SIZE, BLOCK_BYTES), SIZE) for step in (-1, 0, 1)})
offsets = st.one_of(st.sampled_from(EDGES), st.integers(0, SIZE + 10))
lengths = st.one_of(st.sampled_from([0, 1, 16, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1]), st.integers(0, SIZE))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file of three whole blocks and a short one."""
    folder = tmp_path_factory.mktemp("integrity")
    (folder / "folder").mkdir()
    (folder / NAME).write_bytes(CONTENT)
    return folder


@pytest.fixture(scope="module")
def published(root: Path) -> PublishedFile:
    return describe_file(root / NAME, path=NAME, rows=7)


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, SIZE])
def test_a_description_has_size_sha256_and_block_digests_and_the_file_passes(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT[:size])
    described = describe_file(path, path="a/b", rows=3)
    digests = [xxhash.xxh3_64(CONTENT[i : min(i + BLOCK_BYTES, size)]).hexdigest() for i in range(0, size, BLOCK_BYTES)]
    assert described == PublishedFile(
        path="a/b", bytes=size, rows=3, sha256=hashlib.sha256(CONTENT[:size]).hexdigest(), blocks="".join(digests)
    )
    described = described.model_copy(update={"path": "file"})
    assert check_file(STORAGE, str(tmp_path), described) is None
    for _ in range(2):
        require_blocks(STORAGE, str(tmp_path), described)
    with open_verified(STORAGE, str(tmp_path), described) as file:
        assert file.read() == CONTENT[:size]
        file.seek(0)
        assert b"".join(iter(lambda: file.read(100_000), b"")) == CONTENT[:size]


@QUICK
@given(steps=st.lists(st.tuples(st.booleans(), offsets, lengths), max_size=12))
def test_seeks_and_reads_agree_with_a_file_in_memory(
    root: Path, published: PublishedFile, steps: list[tuple[bool, int, int]]
) -> None:
    plain = io.BytesIO(CONTENT)
    with open_verified(STORAGE, str(root), published) as file:
        assert file.size() == SIZE
        for from_end, offset, length in steps:
            if from_end:
                assert file.seek(-min(offset, SIZE), io.SEEK_END) == plain.seek(-min(offset, SIZE), io.SEEK_END)
            else:
                assert file.seek(offset) == plain.seek(offset)
            assert file.read(length) == plain.read(length)
            assert file.tell() == plain.tell()
            assert file.read_at(length, offset) == CONTENT[offset : offset + length]
            file.seek(plain.tell())


@QUICK
@given(
    offset=st.one_of(st.sampled_from([e for e in EDGES if e < SIZE]), st.integers(0, SIZE - 1)), bit=st.integers(0, 7)
)
def test_a_flipped_bit_is_refused_in_its_block_only(
    root: Path, published: PublishedFile, offset: int, bit: int
) -> None:
    path, hit = root / NAME, offset // BLOCK_BYTES
    flip(path, offset, 1 << bit)
    try:
        with open_verified(STORAGE, str(root), published) as file:
            for block in range(4):
                file.seek(block * BLOCK_BYTES)
                if block == hit:
                    with pytest.raises(CorruptFile, match=rf"blocks.bin differs from its checksum in block {hit} "):
                        file.read(1)
                else:
                    assert file.read(10) == CONTENT[block * BLOCK_BYTES : block * BLOCK_BYTES + 10]
        assert "blocks.bin does not match its SHA-256" in (check_file(STORAGE, str(root), published) or "")
        with pytest.raises(CorruptFile, match="marc verify"):
            require_blocks(STORAGE, str(root), published)
        with pytest.raises(CorruptFile, match=rf"blocks.bin differs from its checksum in block {hit} "):
            require_blocks(STORAGE, str(root), published)
    finally:
        flip(path, offset, 1 << bit)


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, PublishedFile]:
    """A file that the test may change, and its description."""
    path = tmp_path / "blocks.bin"
    path.write_bytes(CONTENT)
    return path, describe_file(path, path=path.name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.write_bytes(CONTENT[:-1]), "has 786,448 bytes", id="short"),
        pytest.param(lambda path: path.write_bytes(CONTENT + b"x"), "has 786,450 bytes", id="long"),
        pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
    ],
)
def test_a_file_of_another_size_is_refused_before_it_is_read(
    own: tuple[Path, PublishedFile], damage: Callable[[Path], None], message: str
) -> None:
    path, described = own
    damage(path)
    assert message in (check_file(STORAGE, str(path.parent), described) or "")
    for read in (open_verified, require_blocks):
        with pytest.raises(CorruptFile, match=message):
            read(STORAGE, str(path.parent), described)


def test_damage_after_opening_or_after_a_first_read_is_refused(own: tuple[Path, PublishedFile]) -> None:
    path, described = own
    with open_verified(STORAGE, str(path.parent), described) as file:
        assert file.read(10) == CONTENT[:10]
        flip(path, 3)
        file.seek(0)
        with pytest.raises(CorruptFile):
            file.read(10)
        path.write_bytes(CONTENT[: BLOCK_BYTES + 5])
        file.seek(2 * BLOCK_BYTES)
        with pytest.raises(CorruptFile):
            file.read(10)


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".zst"])
def test_check_file_does_not_decompress(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"file{ending}"
    path.write_bytes(CONTENT[:1000])
    assert check_file(STORAGE, str(tmp_path), describe_file(path, path=path.name)) is None


# --- verified local copies of folders

FILES = {"card.json": b"card", "deep/er/weights": bytes(range(256))}
DIGESTS = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}


@dataclass(frozen=True)
class Remote(FolderAsS3):
    """A bucket that counts downloads."""

    fetched: list[str] = field(default_factory=list, compare=False)

    def fetch(self, uri: str, path: Path) -> None:
        self.fetched.append(uri.removeprefix(f"{BUCKET}set/"))
        super().fetch(uri, path)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """A bucket with the files in ``set/``, and an empty folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    for name, data in FILES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    return Remote(folder=str(tmp_path))


def opened(storage: Storage, uri: str = f"{BUCKET}set") -> dict[str, bytes]:
    folder = verified_folder(storage, uri, DIGESTS, key="kind/content", remedy="do this")
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_on_s3_are_downloaded_once_into_a_private_folder(remote: Remote, tmp_path: Path) -> None:
    assert opened(remote) == opened(remote) == FILES
    assert remote.fetched == list(FILES)
    (folder,) = (tmp_path / "tmp").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


def damage(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


def gone(path: Path) -> None:
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("harm", [damage, Path.unlink, gone, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_local_copy_is_repaired(
    remote: Remote, tmp_path: Path, harm: Callable[[Path], None], name: str
) -> None:
    opened(remote)
    remote.fetched.clear()
    (path,) = (tmp_path / "tmp").rglob(name)
    harm(path)
    assert opened(remote) == FILES
    assert remote.fetched == ([name] if harm is not gone or name != "card.json" else list(FILES))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_stored_file_is_named_with_the_remedy(remote: Remote, tmp_path: Path, name: str) -> None:
    path = tmp_path / "set" / name
    for harm, found in ((damage, f"does not match its SHA-256 {DIGESTS[name][:12]}…"), (Path.unlink, "is missing")):
        harm(path)
        for storage, uri in ((remote, f"{BUCKET}set"), (STORAGE, str(tmp_path / "set"))):
            with pytest.raises(CorruptFile) as refused:
                opened(storage, uri)
            assert str(refused.value) == f"{uri}/{name} {found}; do this"
    path.write_bytes(FILES[name])
    assert opened(remote) == opened(STORAGE, str(tmp_path / "set")) == FILES
    # No staged file is left behind.
    assert sorted(one.name for one in (tmp_path / "tmp").rglob("*") if one.is_file()) == ["card.json", "weights"]

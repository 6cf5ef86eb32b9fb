"""Checksums of published files: compute them, check whole files, and verify every block that is read.

Each block has a checksum of its own, so that a reader can verify the blocks that it needs without reading the file.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from marc_pipeline.errors import CorruptFile, MissingFile
from marc_pipeline.storage import STAGED_PREFIX, Storage, is_s3, join
from marc_schemas.files import BLOCK_BYTES, BLOCK_DIGEST_CHARS, PublishedFile

READ_BLOCKS = 16
FOREIGN = "is not listed there: a foreign file may change the result; delete it"


def describe_file(local: Path, *, path: str, rows: int = 0) -> PublishedFile:
    """Return size and checksums of a finished local file; ``path`` is its published path, relative to its root."""
    sha, blocks, size = hashlib.sha256(), [], 0
    with local.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha.update(block)
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            size += len(block)
    return PublishedFile(path=path, bytes=size, rows=rows, sha256=sha.hexdigest(), blocks="".join(blocks))


def check_file(storage: Storage, root: str, published: PublishedFile) -> str | None:
    """Read a whole published file; return its fault as one line, or None if it is intact."""
    uri = join(root, published.path)
    filesystem, path = storage.filesystem(uri)
    sha, size = hashlib.sha256(), 0
    try:
        with filesystem.open_input_stream(path, compression=None) as stream:
            while block := stream.read(BLOCK_BYTES):
                sha.update(block)
                size += len(block)
    except FileNotFoundError:
        return f"{uri} is missing"
    if size != published.bytes:
        return f"{uri} has {size:,} bytes, the release lists {published.bytes:,}"
    if sha.hexdigest() != published.sha256:
        return f"{uri} does not match its SHA-256 {published.sha256[:12]}…"
    return None


def verified_folder(
    storage: Storage, uri: str, sha256: Mapping[str, str], *, key: str, remedy: str, closed: bool = False
) -> Path:
    """Return a local folder with the files of a stored folder, each file verified.

    A local folder is used directly. Files on S3 are downloaded once per machine, into a temporary folder that all
    processes of the user share. A file that is missing or damaged in that folder is downloaded again.

    Args:
        storage: access to ``uri``.
        uri: the stored folder; its files never change.
        sha256: checksum of each file, by its name relative to ``uri``.
        key: path of the local copy within the temporary folder; it identifies the content.
        remedy: end of the error message, for a stored file that is missing or damaged.
        closed: whether the folder may have no other files, because a library would read them.

    Raises:
        CorruptFile: a stored file is missing or differs from its checksum, or a closed folder has another file.
    """
    folder = _copies() / key if is_s3(uri) else Path(uri)
    problems = []
    for name, digest in sha256.items():
        found = _difference(folder / name, digest)
        if found and is_s3(uri):
            found = _downloaded(storage, join(uri, name), folder / name, digest)
        if found:
            problems.append(f"{join(uri, name)} {found}")
    if closed:
        present = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        problems += [f"{folder / name} {FOREIGN}" for name in foreign(present, sha256)]
    if problems:
        raise CorruptFile(f"{'; '.join(problems)}; {remedy}")
    return folder


def foreign(present: Iterable[str], listed: Container[str]) -> list[str]:
    """Return the names of files that are not listed, without unfinished files."""
    return sorted(name for name in present if name not in listed and not Path(name).name.startswith(STAGED_PREFIX))


def _copies() -> Path:
    """Folder of this user's local copies; other users cannot read it."""
    folder = Path(tempfile.gettempdir()) / f"marc-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _downloaded(storage: Storage, uri: str, path: Path, sha256: str) -> str | None:
    """Download one file; return its fault as one line, or None if it matches its checksum."""
    try:
        storage.fetch(uri, path)
    except FileNotFoundError:
        return "is missing"
    return _difference(path, sha256)


def _difference(path: Path, sha256: str) -> str | None:
    """Return the fault of a local file as one line; None if it matches its checksum."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    return None if digest == sha256 else f"does not match its SHA-256 {sha256[:12]}…"


def require_block(data: memoryview, block: int, uri: str, published: PublishedFile) -> None:
    """Verify the bytes of one block of a published file.

    Raises:
        CorruptFile: the block differs; the error names ``uri``.
    """
    expected = published.blocks[block * BLOCK_DIGEST_CHARS : (block + 1) * BLOCK_DIGEST_CHARS]
    if xxhash.xxh3_64_hexdigest(data) != expected:
        raise CorruptFile(
            f"{uri} differs from its checksum in block {block} (bytes from {block * BLOCK_BYTES:,}); "
            "run `marc verify` and restore the file"
        )


def require_size(size: int, uri: str, published: PublishedFile) -> None:
    """Refuse a file whose size differs from its release.

    Raises:
        CorruptFile: the size differs.
    """
    if size != published.bytes:
        raise CorruptFile(f"{uri} has {size:,} bytes, the release lists {published.bytes:,}")


@contextmanager
def missing_named(uri: str) -> Iterator[None]:
    """Turn FileNotFoundError into an error that names the file of the release.

    Raises:
        MissingFile: the file is missing.
    """
    try:
        yield
    except FileNotFoundError:
        raise MissingFile(f"{uri} is missing; the release cannot be read without it") from None


def open_published(storage: Storage, root: str, published: PublishedFile) -> pa.NativeFile:
    """Open one published file without verifying its content.

    Raises:
        CorruptFile: the file is missing or has another size.
    """
    uri = join(root, published.path)
    filesystem, path = storage.filesystem(uri)
    with missing_named(uri):
        source = filesystem.open_input_file(path)
    require_size(source.size(), uri, published)
    return source


class RandomAccess(io.RawIOBase):
    """Seeking and reading for pyarrow in a file of ``size`` bytes. Subclasses implement :meth:`view`."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def view(self, start: int, end: int) -> memoryview:
        """Return the bytes in [``start``, ``end``), a range within the file, without a copy where possible."""
        raise NotImplementedError

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def read(self, count: int | None = -1) -> Any:  # noqa: ANN401 - bytes or, without a copy, a buffer's slice
        end = self._size
        if count is not None and count >= 0:
            end = min(end, self._position + count)
        if end <= self._position:
            return b""
        found = self.view(self._position, end)
        self._position = end
        return found


class _VerifiedFile(RandomAccess):
    """Random access to one file; every block is verified on every read."""

    def __init__(self, source: pa.NativeFile, uri: str, published: PublishedFile) -> None:
        super().__init__(published.bytes)
        self._source, self._uri, self._published = source, uri, published

    def view(self, start: int, end: int) -> memoryview:
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        offset = first * BLOCK_BYTES
        size = min((last + 1) * BLOCK_BYTES, self._published.bytes) - offset
        data = memoryview(self._source.read_at(size, offset))
        for block in range(first, last + 1):
            piece = data[(block - first) * BLOCK_BYTES : (block - first + 1) * BLOCK_BYTES]
            require_block(piece, block, self._uri, self._published)
        return data[start - offset : end - offset]

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()


def open_verified(storage: Storage, root: str, published: PublishedFile) -> pa.PythonFile:
    """Open one published file; every block is verified on every read.

    Use it with :class:`pyarrow.parquet.ParquetFile`, not with datasets. Threads of a dataset scan can outlive the
    scan; a thread that releases a Python file while the interpreter exits aborts the process (apache/arrow issues
    34314, 39862).

    Raises:
        CorruptFile: the file is missing or has another size; during a read: a block differs.
    """
    return pa.PythonFile(_verified_file(storage, root, published), mode="r")


def require_blocks(storage: Storage, root: str, published: PublishedFile) -> None:
    """Verify every block of one published file.

    Raises:
        CorruptFile: the file is missing, has another size, or a block differs.
    """
    with _verified_file(storage, root, published) as file:
        while file.read(READ_BLOCKS * BLOCK_BYTES):
            pass


def _verified_file(storage: Storage, root: str, published: PublishedFile) -> _VerifiedFile:
    return _VerifiedFile(open_published(storage, root, published), join(root, published.path), published)

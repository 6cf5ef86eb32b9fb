"""Objects on a local disk: atomic writes; folders are created and removed with their files."""

import builtins
import errno
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs

from marc_pipeline.storage.retry import disk_full_names
from marc_pipeline.storage.stored_object import StoredObject, is_hidden

R = TypeVar("R")

# Delta, Spark and our own listings skip names that begin with a dot, so that they skip unfinished files.
STAGED_PREFIX = ".staged-"
FOLDER_TRIES = 100
# A system writes changes to the disk after this time at the latest, by far.
UNFLUSHED_S = 3600.0
# Levels of empty folders above a removed file that are removed too; folders of the user stay.
PRUNED_LEVELS = 2


class LocalObjects:
    """Files on a local disk; :class:`marc_pipeline.storage.Storage` documents the methods."""

    def staging_folder(self, uri: str) -> Path:
        """Return the folder for unfinished files: the target's folder, so that a rename publishes."""
        return Path(uri).parent

    def read(self, uri: str) -> bytes:
        """Content of one file."""
        return Path(uri).read_bytes()

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace one file atomically."""
        with staged_file(self.staging_folder(uri), uri) as path:
            path.write_bytes(data)
            self.publish(path, uri)

    def create(self, uri: str, data: bytes) -> bool:
        """Write one file unless it exists."""
        with staged_file(self.staging_folder(uri), uri) as path:
            path.write_bytes(data)
            _flush(path)

            def link() -> bool:
                try:
                    os.link(path, uri)
                except FileExistsError:
                    return False
                return True

            created = _in_folder(Path(uri).parent, link)
            _flush_folder(Path(uri).parent)
            return created

    def require_conditional_writes(self, uri: str) -> None:
        """A local disk creates a file once."""

    def publish(self, staged: Path, uri: str) -> None:
        """Rename a staged file."""
        _flush(staged)
        _in_folder(Path(uri).parent, lambda: staged.replace(uri))
        _flush_folder(Path(uri).parent)

    def flush(self, uri: str) -> None:
        """Flush the latest files below a folder, and the folders with its parent."""
        written: dict[Path, float] = {}
        folders = [Path(uri).parent]
        for folder, _, names in os.walk(uri):
            folders.append(Path(folder))
            for path in (Path(folder, name) for name in names):
                # Other processes remove their staged files.
                with suppress(FileNotFoundError):
                    written[path] = path.stat().st_mtime
        latest = max(written.values(), default=0.0)
        for path, time_of in written.items():
            # The system has written older ones long ago, and every flush waits for the disk.
            if time_of >= latest - UNFLUSHED_S:
                with suppress(FileNotFoundError):
                    _flush(path)
        for path in folders:
            _flush_folder(path)

    def list(self, uri: str, *, hidden: bool) -> Iterator[StoredObject]:
        """Yield every file below a folder."""
        root = Path(uri)
        if not root.is_dir():
            return
        # Follow links and raise for unreadable folders, because a skipped folder would look like deleted files.
        for folder, _, names in os.walk(root, followlinks=True, onerror=_raise_unless_gone):
            for path in (Path(folder) / name for name in names):
                # Skip a file that is deleted during the walk.
                with suppress(FileNotFoundError):
                    if (hidden or not is_hidden(str(path.relative_to(root)))) and path.is_file():
                        yield _stored(str(path), path.stat())

    def stat(self, uri: str) -> StoredObject | None:
        """Return one file, or None if it does not exist."""
        path = Path(uri)
        return _stored(uri, path.stat()) if path.is_file() else None

    def remove(self, uris: Iterable[str]) -> builtins.list[str]:
        """Delete files and the folders that become empty; the list of failures is empty."""
        folders: set[Path] = set()
        for path in map(Path, uris):
            path.unlink(missing_ok=True)
            folders.update(islice(path.parents, PRUNED_LEVELS))
        for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
            # The system refuses to remove a folder into which another process has written.
            with suppress(OSError):
                folder.rmdir()
        return []

    def abort_uploads(self, uri: str, *, before: float) -> int:
        """A local disk has no multipart uploads."""
        return 0

    def copy(self, uri: str, path: Path) -> None:
        """Copy one file."""
        shutil.copyfile(uri, path)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return the pyarrow file system, and the path inside it."""
        return pafs.LocalFileSystem(), uri


@contextmanager
def staged_file(folder: Path, uri: str) -> Iterator[Path]:
    """Yield a new file in a folder, to be published as ``uri``; it is removed afterwards in any case.

    Raises:
        DiskFull: the error names ``uri``, whose content is unchanged.
    """
    path = folder / f"{STAGED_PREFIX}{uuid.uuid4().hex}"
    try:
        with disk_full_names(uri):
            # Create the file now, so that no other process removes the folder as empty.
            _in_folder(folder, path.touch)
            yield path
    finally:
        path.unlink(missing_ok=True)


def _stored(uri: str, stat: os.stat_result) -> StoredObject:
    return StoredObject(uri=uri, bytes=stat.st_size, modified=stat.st_mtime)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _in_folder(folder: Path, action: Callable[[], R]) -> R:
    """Create a folder and run an action in it; repeat both if another process removes the folder in between."""
    for _ in range(FOLDER_TRIES):
        with suppress(FileNotFoundError, FileExistsError):
            return _in_new_folder(folder, action)
        # A random pause, so that two processes do not stay in step.
        time.sleep(random.uniform(0, 0.001))  # noqa: S311
    return _in_new_folder(folder, action)


def _in_new_folder(folder: Path, action: Callable[[], R]) -> R:
    missing = list(takewhile(lambda path: not path.is_dir(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    result = action()
    # Flushed last, because until the action another process may remove the empty folder.
    for made in missing:
        _flush_folder(made.parent)
    return result


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Flush the names in a folder. Without it, a power cut may take back a file that was created or renamed."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot flush a folder, and keep its names in another way.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)

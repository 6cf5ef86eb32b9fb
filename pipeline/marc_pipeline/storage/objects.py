"""The one interface to stored objects: every uri, on a local disk or in an S3 store, is used in the same way."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pyarrow.fs as pafs

from marc_pipeline.storage.local import LocalObjects, staged_file
from marc_pipeline.storage.retry import repeated
from marc_pipeline.storage.s3 import S3Objects
from marc_pipeline.storage.stored import StoredObject
from marc_pipeline.uris import is_s3, refuse_credentials

R = TypeVar("R")


@dataclass(frozen=True)
class Storage:
    """Access to uris; picklable, so that Spark tasks carry it. Credentials come from the AWS chain only.

    Every call is retried ``attempts`` times, with growing random pauses, when the store throttles, fails, stalls or
    drops connections. ``read_timeout_s`` limits a pause of boto3's transfers, and a whole request of pyarrow and
    delta-rs.
    """

    endpoint_url: str | None = None
    region: str | None = None
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 60.0
    attempts: int = 8

    def __post_init__(self) -> None:
        refuse_credentials("endpoint_url", self.endpoint_url)

    def read(self, uri: str) -> bytes:
        """Content of one object.

        Raises:
            FileNotFoundError: there is none.
        """
        return self._objects(uri).read(uri)

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace one object atomically."""
        self._objects(uri).write(uri, data)

    def create(self, uri: str, data: bytes) -> bool:
        """Write one object unless it exists; returns whether this call created it. The first writer wins.

        On S3 the answer to our own write may be lost. The repeated write then finds an object, and takes it for ours if
        the content is equal. A caller that must be the only creator therefore writes unique content.
        """
        return self._objects(uri).create(uri, data)

    @contextmanager
    def staged(self, uri: str) -> Iterator[Path]:
        """A local file to write before :meth:`publish`; removed afterwards in any case.

        Raises:
            DiskFull: the error names ``uri``, whose content is unchanged.
        """
        with staged_file(self._objects(uri).staging_folder(uri), uri) as path:
            yield path

    def publish(self, staged: Path, uri: str) -> None:
        """Make a staged file the content of ``uri``: whole or not at all."""
        self._objects(uri).publish(staged, uri)

    def list(self, uri: str, *, hidden: bool = False) -> list[StoredObject]:
        """Every file below a folder uri, sorted by uri; empty where there is none.

        Args:
            uri: the folder.
            hidden: also names that begin with a dot or an underscore, or lie in a folder that does.
        """
        return sorted(self._objects(uri).list(uri, hidden=hidden), key=lambda stored: stored.uri)

    def stat(self, uri: str) -> StoredObject | None:
        """One file, or None where there is none."""
        return self._objects(uri).stat(uri)

    def remove(self, uris: Iterable[str]) -> None:
        """Delete objects. A missing object is no error; local folders that become empty are deleted as well.

        Raises:
            OSError: some could not be deleted; the others were.
        """
        unique = dict.fromkeys(uris)
        LocalObjects().remove(uri for uri in unique if not is_s3(uri))
        failed = self._s3.remove(uri for uri in unique if is_s3(uri))
        if failed:
            raise OSError(f"{len(failed):,} objects could not be deleted, the first one: {failed[0]}")

    def abort_uploads(self, uri: str, *, before: float) -> int:
        """Abort multipart uploads that killed processes left below a folder; returns how many.

        Args:
            uri: the folder.
            before: only uploads that began before this time, in seconds since 1970.
        """
        return self._objects(uri).abort_uploads(uri, before=before)

    def content_digest(self, stored: StoredObject) -> str:
        """Changes whenever the content does: SHA-256 of a local file, ETag of an object."""
        if stored.etag is not None:
            return stored.etag.strip('"')
        with Path(stored.uri).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fetch(self, uri: str, path: Path) -> None:
        """Copy one object to a local file.

        Raises:
            FileNotFoundError: there is none.
            OSError: the disk is full, or the object cannot be read; the file is unchanged.
        """
        with self.staged(str(path)) as staged:
            self._objects(uri).copy(uri, staged)
            staged.replace(path)

    def repeated(self, uri: str, action: Callable[[], R], *, on: tuple[type[Exception], ...]) -> R:
        """Result of an action, which is tried again after errors that may pass.

        Args:
            uri: what the action works on.
            action: must be safe to repeat.
            on: the errors.

        Raises:
            OSError: every attempt failed with one of the errors.
            DiskFull: at once.
        """
        return repeated(uri, action, on=on, attempts=self.attempts)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system of a uri, and the path inside it."""
        return self._objects(uri).filesystem(uri)

    def delta_options(self) -> dict[str, str]:
        """Storage options for delta-rs."""
        return self._s3.delta_options()

    @property
    def _s3(self) -> S3Objects:
        return S3Objects(**vars(self))

    def _objects(self, uri: str) -> LocalObjects | S3Objects:
        return self._s3 if is_s3(uri) else LocalObjects()

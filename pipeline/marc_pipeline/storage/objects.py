"""The one interface to stored objects, the same for local paths and S3 uris."""

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
from marc_pipeline.storage.stored_object import StoredObject
from marc_pipeline.uris import is_s3, refuse_credentials

R = TypeVar("R")


@dataclass(frozen=True)
class Storage:
    """Access to uris. Credentials come from the AWS chain only. It is picklable, so that Spark tasks can carry it.

    Every call is tried up to ``attempts`` times, with growing random pauses, when the store throttles, fails, stalls
    or drops connections. ``read_timeout_s`` limits a pause in boto3's transfers, and a whole request of pyarrow and
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
        """Return the content of one object.

        Raises:
            FileNotFoundError: the object does not exist.
        """
        return self._objects(uri).read(uri)

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace one object atomically."""
        self._objects(uri).write(uri, data)

    def create(self, uri: str, data: bytes) -> bool:
        """Write one object unless it exists; return whether this call created it. The first writer wins.

        On S3 the response to a successful write may be lost. The retry then finds an object and treats equal content as
        its own. A caller that must be the only creator therefore writes unique content.
        """
        return self._objects(uri).create(uri, data)

    def require_conditional_writes(self, uri: str) -> None:
        """Require that :meth:`create` below a folder never replaces an object.

        Raises:
            UserError: the store ignores If-None-Match, so that commits of two runs could be lost.
        """
        self._objects(uri).require_conditional_writes(uri)

    @contextmanager
    def staged(self, uri: str) -> Iterator[Path]:
        """Yield a local file to write before :meth:`publish`; it is removed afterwards in any case.

        Raises:
            DiskFull: the error names ``uri``, whose content is unchanged.
        """
        with staged_file(self._objects(uri).staging_folder(uri), uri) as path:
            yield path

    def publish(self, staged: Path, uri: str) -> None:
        """Make a staged file the content of ``uri``, atomically."""
        self._objects(uri).publish(staged, uri)

    def flush(self, uri: str) -> None:
        """Make what was just written below a folder survive a power cut, also by libraries that do not flush files."""
        self._objects(uri).flush(uri)

    def list(self, uri: str, *, hidden: bool = False) -> list[StoredObject]:
        """Return every file below a folder uri, sorted by uri; an empty list if the folder does not exist.

        Files whose name, or a folder of it, begins with a dot or an underscore are included only with ``hidden``.
        """
        return sorted(self._objects(uri).list(uri, hidden=hidden), key=lambda stored: stored.uri)

    def stat(self, uri: str) -> StoredObject | None:
        """Return one file, or None if it does not exist."""
        return self._objects(uri).stat(uri)

    def remove(self, uris: Iterable[str]) -> None:
        """Delete objects. A missing object is not an error; local folders that become empty are deleted as well.

        Raises:
            OSError: some could not be deleted; the others were.
        """
        unique = dict.fromkeys(uris)
        LocalObjects().remove(uri for uri in unique if not is_s3(uri))
        failed = self._s3.remove(uri for uri in unique if is_s3(uri))
        if failed:
            raise OSError(f"{len(failed):,} objects could not be deleted, the first one: {failed[0]}")

    def abort_uploads(self, uri: str, *, before: float) -> int:
        """Abort multipart uploads that began before a time (seconds since 1970), and return their number."""
        return self._objects(uri).abort_uploads(uri, before=before)

    def content_digest(self, stored: StoredObject) -> str:
        """Return a digest of the content: SHA-256 of a local file, ETag of an object on S3."""
        if stored.etag is not None:
            return stored.etag.strip('"')
        with Path(stored.uri).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fetch(self, uri: str, path: Path) -> None:
        """Copy one object to a local file.

        Raises:
            FileNotFoundError: the object does not exist.
            OSError: the disk is full, or the object cannot be read; the file is unchanged.
        """
        with self.staged(str(path)) as staged:
            self._objects(uri).copy(uri, staged)
            staged.replace(path)

    def repeated(self, uri: str, action: Callable[[], R], *, on: tuple[type[Exception], ...]) -> R:
        """Return the result of an action, retried up to ``attempts`` times; see :func:`.retry.repeated`."""
        return repeated(uri, action, on=on, attempts=self.attempts)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return the pyarrow file system of a uri, and the path inside it."""
        return self._objects(uri).filesystem(uri)

    def delta_options(self) -> dict[str, str]:
        """Return the storage options for delta-rs."""
        return self._s3.delta_options()

    @property
    def _s3(self) -> S3Objects:
        return S3Objects(**vars(self))

    def _objects(self, uri: str) -> LocalObjects | S3Objects:
        return self._s3 if is_s3(uri) else LocalObjects()

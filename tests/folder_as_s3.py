"""A store for tests without a server: what ``s3://bucket/`` holds lies in a local folder."""

from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from pipeline.storage import Storage, StoredObject

BUCKET = "s3://bucket/"


@dataclass(frozen=True)
class FolderAsS3(Storage):
    """A store whose bucket is a folder."""

    folder: str = ""

    def stat(self, uri: str) -> StoredObject | None:
        path = self._path(uri)
        return StoredObject(uri=uri, bytes=path.stat().st_size) if path.is_file() else None

    def read(self, uri: str) -> bytes:
        return self._path(uri).read_bytes()

    def fetch(self, uri: str, path: Path) -> None:
        super().fetch(str(self._path(uri)), path)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        local = pafs.SubTreeFileSystem(self.folder, pafs.LocalFileSystem())
        return local, uri.removeprefix(BUCKET)

    def _path(self, uri: str) -> Path:
        return Path(self.folder, uri.removeprefix(BUCKET))

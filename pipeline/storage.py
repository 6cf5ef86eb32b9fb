"""Whole objects and columnar files under one uri scheme: a local path or ``s3://bucket/key``."""

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from pipeline.errors import UserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

S3_SCHEME = "s3://"
ATTEMPTS = 8
CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
# Delta, Spark and our own listings skip names that begin with a dot: a staged file is nobody's file.
STAGED_PREFIX = ".staged-"


def is_s3(uri: str) -> bool:
    """Whether the uri names an object of an S3 store."""
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    """Append path parts to a uri."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@dataclass(frozen=True)
class StoredObject:
    """One file below a listed uri: its full uri, size, and what changes when its content does."""

    uri: str
    bytes: int
    etag: str | None = None


@dataclass(frozen=True)
class Storage:
    """Access to uris; picklable, so that Spark tasks carry it. Credentials come from the AWS chain only."""

    endpoint_url: str | None = None
    region: str | None = None

    def read(self, uri: str) -> bytes:
        """Content of one object.

        Raises:
            FileNotFoundError: there is none.
        """
        if not is_s3(uri):
            return Path(uri).read_bytes()
        client, (bucket, key) = self._client(), _bucket_and_key(uri)
        try:
            return client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            raise FileNotFoundError(uri) from None

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace one object atomically."""
        if is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            self._client().put_object(Bucket=bucket, Key=key, Body=data)
            return
        with self.staged(uri) as path:
            path.write_bytes(data)
            self.publish(path, uri)

    def create(self, uri: str, data: bytes) -> bool:
        """Write one object unless it exists; says whether this call created it. The first writer wins."""
        if is_s3(uri):
            client, (bucket, key) = self._client(), _bucket_and_key(uri)
            try:
                client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                if error.response["ResponseMetadata"]["HTTPStatusCode"] in {409, 412}:
                    return False
                raise
            return True
        with self.staged(uri) as path:
            path.write_bytes(data)
            _flush(path)
            try:
                os.link(path, uri)
            except FileExistsError:
                return False
        return True

    @contextmanager
    def staged(self, uri: str) -> Iterator[Path]:
        """A local file to write before :meth:`publish`; removed afterwards whatever happens."""
        if is_s3(uri):
            folder = Path(tempfile.gettempdir())
        else:
            folder = Path(uri).parent
            folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{STAGED_PREFIX}{uuid.uuid4().hex}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, staged: Path, uri: str) -> None:
        """Make a staged file the content of ``uri``: whole or not at all."""
        if is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            self._client().upload_file(str(staged), bucket, key)
            return
        _flush(staged)
        Path(uri).parent.mkdir(parents=True, exist_ok=True)
        staged.replace(uri)

    def list(self, uri: str) -> list[StoredObject]:
        """Every file below a folder uri, sorted by uri; hidden names are skipped; empty where nothing is."""
        found = self._list_s3(uri.rstrip("/") + "/") if is_s3(uri) else _list_local(Path(uri))
        return sorted(found, key=lambda o: o.uri)

    def stat(self, uri: str) -> StoredObject | None:
        """One file, or None where there is none."""
        if not is_s3(uri):
            path = Path(uri)
            return StoredObject(uri=uri, bytes=path.stat().st_size) if path.is_file() else None
        client, (bucket, key) = self._client(), _bucket_and_key(uri)
        try:
            head = client.head_object(Bucket=bucket, Key=key)
        except client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        return StoredObject(uri=uri, bytes=head["ContentLength"], etag=head["ETag"])

    def content_digest(self, stored: StoredObject) -> str:
        """What changes whenever the content does: SHA-256 of a local file, ETag of an object."""
        if stored.etag is not None:
            return stored.etag.strip('"')
        with Path(stored.uri).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fetch(self, uri: str, path: Path) -> None:
        """Copy one object to a local file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_s3(uri):
            bucket, key = _bucket_and_key(uri)
            self._client().download_file(bucket, key, str(path))
        else:
            path.write_bytes(Path(uri).read_bytes())

    def local_copy(self, uri: str, names: Iterable[str], *, key: str) -> Path:
        """A folder on this machine with some objects below ``uri``, shared by its processes: whole or not at all.

        Args:
            uri: what the names are relative to.
            names: of the objects.
            key: names the content, which never changes: copied once.
        """
        folder = Path(tempfile.gettempdir()) / f"marc-{os.getuid()}" / key
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            staged = Path(tempfile.mkdtemp(prefix=STAGED_PREFIX, dir=folder.parent))
            for name in names:
                self.fetch(join(uri, name), staged / name)
            try:
                staged.rename(folder)
            except OSError:
                # Another process was faster.
                shutil.rmtree(staged, ignore_errors=True)
        return folder

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system of a uri, and the path inside it."""
        if not is_s3(uri):
            return pafs.LocalFileSystem(), uri
        return _arrow_s3(self.endpoint_url or os.environ.get("AWS_ENDPOINT_URL"), self.region), uri.removeprefix(
            S3_SCHEME
        )

    def delta_options(self) -> dict[str, str]:
        """Storage options for delta-rs."""
        options: dict[str, str] = {}
        if self.endpoint_url:
            options["AWS_ENDPOINT_URL"] = self.endpoint_url
            options["AWS_ALLOW_HTTP"] = str(self.endpoint_url.startswith("http://")).lower()
        if self.region:
            options["AWS_REGION"] = self.region
        return options

    def _client(self) -> "S3Client":
        return _boto3_s3(self.endpoint_url, self.region)

    def _list_s3(self, uri: str) -> Iterator[StoredObject]:
        bucket, prefix = _bucket_and_key(uri)
        for page in self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                if not _is_hidden(item["Key"].removeprefix(prefix)):
                    yield StoredObject(uri=f"{S3_SCHEME}{bucket}/{item['Key']}", bytes=item["Size"], etag=item["ETag"])


def _list_local(root: Path) -> Iterator[StoredObject]:
    if not root.is_dir():
        return
    # Links are followed and what cannot be read is an error: a folder that is skipped would look like deletions.
    for folder, _, names in os.walk(root, followlinks=True, onerror=_raise_unless_gone):
        for path in (Path(folder) / name for name in names):
            # What is deleted while we look was not there.
            with suppress(FileNotFoundError):
                if not _is_hidden(str(path.relative_to(root))) and path.is_file():
                    yield StoredObject(uri=str(path), bytes=path.stat().st_size)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    if not bucket:
        raise UserError(f"{uri!r} names no bucket; write s3://bucket/key")
    return bucket, key


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@lru_cache(maxsize=8)
def _boto3_s3(endpoint_url: str | None, region: str | None) -> "S3Client":
    # Imported here: most runs are local, and boto3 takes longer to import than the reader takes to open.
    import boto3  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    config = Config(
        retries={"mode": "adaptive", "max_attempts": ATTEMPTS},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
    )
    return boto3.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)


@lru_cache(maxsize=8)
def _arrow_s3(endpoint_url: str | None, region: str | None) -> pafs.FileSystem:
    options: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "request_timeout": READ_TIMEOUT_S,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
    }
    if endpoint_url:
        parts = urlsplit(endpoint_url)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)

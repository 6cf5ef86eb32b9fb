"""Whole objects and columnar files under one uri scheme: a local path or ``s3://bucket/key``."""

import errno
import hashlib
import logging
import os
import random
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from pipeline.errors import DiskFull, UserError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import DeleteTypeDef

R = TypeVar("R")

log = logging.getLogger(__name__)

S3_SCHEME = "s3://"
ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"
# Delta, Spark and our own listings skip names that begin with a dot: a staged file is nobody's file.
STAGED_PREFIX = ".staged-"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 20.0
MULTIPART_BYTES, PART_BYTES, CHUNK_BYTES, PARTS_AT_ONCE = 64 << 20, 32 << 20, 1 << 20, 4
DELETE_BATCH = 1000
PASSING_ERRORS = {"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout"}
FOLDER_TRIES = 100
# Folders above a removed file that are removed as well once empty; what a user made for us stays.
PRUNED_LEVELS = 2
# delta-rs colours its messages.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_s3(uri: str) -> bool:
    """Whether the uri names an object of an S3 store."""
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    """Append path parts to a uri."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


@dataclass(frozen=True)
class StoredObject:
    """One file below a listed uri: its full uri, size, what changes when its content does, and when it last did."""

    uri: str
    bytes: int
    etag: str | None = None
    modified: float = 0.0  # seconds since 1970


@dataclass(frozen=True)
class Storage:
    """Access to uris; picklable, so that Spark tasks carry it. Credentials come from the AWS chain only.

    Every call bears a store that throttles, fails, stalls or drops connections for a while: it is tried ``attempts``
    times, with growing random pauses. Of pyarrow and delta-rs, ``read_timeout_s`` bounds a pause of the transfer and a
    whole request.
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
        if not is_s3(uri):
            return Path(uri).read_bytes()
        client, (bucket, key) = self._client(), _bucket_and_key(uri)

        def get() -> bytes:
            try:
                answer = client.get_object(Bucket=bucket, Key=key)
            except client.exceptions.ClientError as error:
                # The status says it, also where the error's own document broke off.
                if _status(error) == 404 and error.response["Error"]["Code"] != "NoSuchBucket":
                    raise FileNotFoundError(uri) from None
                raise
            _require_whole_head(answer)
            return answer["Body"].read()

        # boto3 itself repeats requests, not what breaks off after the answer has begun.
        return self.repeated(uri, get, on=_broken_bodies())

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
        """Write one object unless it exists; says whether this call created it. The first writer wins.

        On S3 the answer to our own write may be lost; its repetition finds an object, and takes it for ours when the
        content is. Who must be the only one (a lock, say) therefore writes something that nobody else does.
        """
        if is_s3(uri):
            return self._create_s3(uri, data)
        with self.staged(uri) as path:
            path.write_bytes(data)
            _flush(path)

            def link() -> bool:
                try:
                    os.link(path, uri)
                except FileExistsError:
                    return False
                return True

            return _in_folder(Path(uri).parent, link)

    @contextmanager
    def staged(self, uri: str) -> Iterator[Path]:
        """A local file to write before :meth:`publish`; removed afterwards whatever happens.

        Raises:
            DiskFull: the error names ``uri``, whose content is what it was.
        """
        folder = Path(tempfile.gettempdir()) if is_s3(uri) else Path(uri).parent
        path = folder / f"{STAGED_PREFIX}{uuid.uuid4().hex}"
        try:
            with disk_full_names(uri):
                # It exists from here on, so that nobody removes the folder as empty.
                _in_folder(folder, path.touch)
                yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, staged: Path, uri: str) -> None:
        """Make a staged file the content of ``uri``: whole or not at all."""
        if is_s3(uri):
            self._upload(staged, uri)
            return
        _flush(staged)
        _in_folder(Path(uri).parent, lambda: staged.replace(uri))

    def list(self, uri: str, *, hidden: bool = False) -> list[StoredObject]:
        """Every file below a folder uri, sorted by uri; empty where nothing is.

        Args:
            uri: the folder.
            hidden: also names that begin with a dot or an underscore, or lie in a folder that does.
        """
        if is_s3(uri):
            found: Iterable[StoredObject] = self._list_s3(uri.rstrip("/") + "/", hidden=hidden)
        else:
            found = _list_local(Path(uri), hidden=hidden)
        return sorted(found, key=lambda o: o.uri)

    def stat(self, uri: str) -> StoredObject | None:
        """One file, or None where there is none."""
        if not is_s3(uri):
            path = Path(uri)
            return _stored(uri, path.stat()) if path.is_file() else None
        client, (bucket, key) = self._client(), _bucket_and_key(uri)

        def head() -> StoredObject | None:
            try:
                answer = client.head_object(Bucket=bucket, Key=key)
            except client.exceptions.ClientError as error:
                if _status(error) == 404:
                    return None
                raise
            _require_whole_head(answer)
            modified = answer["LastModified"].timestamp()
            return StoredObject(uri=uri, bytes=answer["ContentLength"], etag=answer["ETag"], modified=modified)

        return self.repeated(uri, head, on=(_BrokenAnswer,))

    def remove(self, uris: Iterable[str]) -> None:
        """Delete objects. What is not there is no error; local folders that become empty go as well.

        Raises:
            OSError: some could not be deleted; the others were.
        """
        buckets: dict[str, list[str]] = {}
        local = []
        for uri in dict.fromkeys(uris):
            if is_s3(uri):
                bucket, key = _bucket_and_key(uri)
                buckets.setdefault(bucket, []).append(key)
            else:
                local.append(Path(uri))
        _remove_local(local)
        failed = [error for bucket, keys in buckets.items() for error in self._remove_s3(bucket, keys)]
        if failed:
            raise OSError(f"{len(failed):,} objects could not be deleted, the first one: {failed[0]}")

    def abort_uploads(self, uri: str, *, before: float) -> int:
        """Abort multipart uploads below a folder that began before a time; how many. Killed processes leave them.

        Args:
            uri: the folder.
            before: seconds since 1970.
        """
        if not is_s3(uri):
            return 0
        client, (bucket, prefix) = self._client(), _bucket_and_key(uri.rstrip("/") + "/")
        aborted = 0
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if upload["Initiated"].timestamp() < before:
                    with suppress(client.exceptions.NoSuchUpload):
                        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                        aborted += 1
        return aborted

    def content_digest(self, stored: StoredObject) -> str:
        """What changes whenever the content does: SHA-256 of a local file, ETag of an object."""
        if stored.etag is not None:
            return stored.etag.strip('"')
        with Path(stored.uri).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def fetch(self, uri: str, path: Path) -> None:
        """Copy one object to a local file.

        Raises:
            FileNotFoundError: there is none.
            OSError: the disk is full, or the object cannot be read; the file is what it was.
        """
        with self.staged(str(path)) as staged:
            if is_s3(uri):
                self._download(uri, staged)
            else:
                shutil.copyfile(uri, staged)
            staged.replace(path)

    def repeated(self, uri: str, action: Callable[[], R], *, on: tuple[type[Exception], ...]) -> R:
        """What an action gives; it is tried again after errors that may pass.

        Args:
            uri: what it is about.
            action: changes nothing when it is done twice.
            on: the errors.

        Raises:
            OSError: it failed so every time.
            DiskFull: at once.
        """
        for attempt in range(self.attempts):
            try:
                with disk_full_names(uri):
                    return action()
            except DiskFull:
                raise
            except on as error:
                reason = " ".join(COLOURS.sub("", str(error)).split())
                if attempt + 1 >= self.attempts:
                    raise OSError(f"{uri}: failed {self.attempts} times, at last: {reason}") from error
                log.info("%s: %s; trying again", uri, reason)
            _back_off(attempt)
        raise ValueError(f"attempts is {self.attempts}; at least one is needed")

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """The pyarrow file system of a uri, and the path inside it."""
        if not is_s3(uri):
            return pafs.LocalFileSystem(), uri
        require_bare(uri)
        endpoint = self.endpoint_url or os.environ.get(ENDPOINT_VARIABLE)
        return _arrow_s3(os.getpid(), endpoint, *self._how()), uri.removeprefix(S3_SCHEME)

    def delta_options(self) -> dict[str, str]:
        """Storage options for delta-rs."""
        options = {
            "connect_timeout": _milliseconds(self.connect_timeout_s),
            "timeout": _milliseconds(self.read_timeout_s),
            "max_retries": str(self.attempts - 1),
            "retry_timeout": _milliseconds(self.attempts * (self.read_timeout_s + LONGEST_PAUSE_S)),
            "backoff_config.init_backoff": _milliseconds(FIRST_PAUSE_S),
            "backoff_config.max_backoff": _milliseconds(LONGEST_PAUSE_S),
        }
        if self.endpoint_url:
            options["AWS_ENDPOINT_URL"] = self.endpoint_url
            options["AWS_ALLOW_HTTP"] = str(self.endpoint_url.startswith("http://")).lower()
        if self.region:
            options["AWS_REGION"] = self.region
        return options

    def _client(self) -> "S3Client":
        _refuse_credentials_in_environment()
        client = _boto3_s3(os.getpid(), self.endpoint_url, *self._how())
        # It may also come from a profile.
        refuse_credentials("the endpoint of S3", client.meta.endpoint_url)
        return client

    def _how(self) -> tuple[str | None, float, float, int]:
        return self.region, self.connect_timeout_s, self.read_timeout_s, self.attempts

    def _create_s3(self, uri: str, data: bytes) -> bool:
        client, (bucket, key) = self._client(), _bucket_and_key(uri)
        repeated = False

        def put() -> bool:
            nonlocal repeated
            try:
                client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                repeated = repeated or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                if _status(error) == 412:
                    return repeated and self._holds(uri, data)
                if _status(error) != 409:
                    raise
                # Somebody writes or deletes the object at this moment: whether it will exist is not known yet.
                repeated = True
                raise _BrokenAnswer(str(error)) from error
            return True

        return self.repeated(uri, put, on=(_BrokenAnswer,))

    def _holds(self, uri: str, data: bytes) -> bool:
        try:
            return self.read(uri) == data
        except FileNotFoundError:
            return False

    def _upload(self, staged: Path, uri: str) -> None:
        from boto3.exceptions import S3UploadFailedError  # noqa: PLC0415
        from boto3.s3.transfer import TransferConfig  # noqa: PLC0415

        client, (bucket, key) = self._client(), _bucket_and_key(uri)
        config = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )

        def upload() -> None:
            try:
                client.upload_file(str(staged), bucket, key, Config=config)
            except S3UploadFailedError as error:
                if "NoSuchUpload" not in str(error):
                    raise
                # The upload was completed and the answer lost, or somebody aborted it.
                raise _BrokenAnswer(str(error)) from error

        # KeyError: of an answer that broke off within its head.
        self.repeated(uri, upload, on=(_BrokenAnswer, KeyError))

    def _download(self, uri: str, path: Path) -> None:
        """Not by boto3's transfers: they wait for ever when an answer breaks off within its head."""
        stored = self.stat(uri)
        if stored is None:
            raise FileNotFoundError(uri)
        with path.open("wb") as file, ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            file.truncate(stored.bytes)
            parts = range(0, stored.bytes, PART_BYTES)
            list(pool.map(lambda start: self._download_part(stored, start, file.fileno()), parts))

    def _download_part(self, stored: StoredObject, start: int, file: int) -> None:
        client, (bucket, key) = self._client(), _bucket_and_key(stored.uri)
        end = min(start + PART_BYTES, stored.bytes)

        def download() -> None:
            try:
                answer = client.get_object(
                    Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=stored.etag or ""
                )
            except client.exceptions.ClientError as error:
                if _status(error) not in {404, 412}:
                    raise
                raise OSError(f"{stored.uri} changed while it was read") from error
            place = start
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                os.pwrite(file, chunk, place)
                place += len(chunk)
            if place != end:
                raise _BrokenAnswer(f"{place - start:,} of {end - start:,} bytes came")

        self.repeated(stored.uri, download, on=_broken_bodies())

    def _list_s3(self, uri: str, *, hidden: bool) -> Sequence[StoredObject]:
        bucket, prefix = _bucket_and_key(uri)
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)

        def listed() -> Sequence[StoredObject]:
            found = []
            for page in pages:
                _require_whole_head(page)
                found += [
                    StoredObject(
                        uri=f"{S3_SCHEME}{bucket}/{item['Key']}",
                        bytes=item["Size"],
                        etag=item["ETag"],
                        modified=item["LastModified"].timestamp(),
                    )
                    for item in page.get("Contents", [])
                    if hidden or not _is_hidden(item["Key"].removeprefix(prefix))
                ]
            return found

        return self.repeated(uri, listed, on=(_BrokenAnswer,))

    def _remove_s3(self, bucket: str, keys: Sequence[str]) -> Iterator[str]:
        """Delete; one line for each object that could not be."""
        client = self._client()
        for start in range(0, len(keys), DELETE_BATCH):
            batch = list(keys[start : start + DELETE_BATCH])
            for attempt in range(self.attempts):
                wanted: DeleteTypeDef = {"Objects": [{"Key": key} for key in batch], "Quiet": True}
                errors = client.delete_objects(Bucket=bucket, Delete=wanted).get("Errors", [])
                last = attempt + 1 >= self.attempts
                batch = [error["Key"] for error in errors if error.get("Code") in PASSING_ERRORS and not last]
                for error in errors:
                    key, code = error["Key"], error.get("Code", "no reason given")
                    if key not in batch and code != "NoSuchKey":
                        yield f"{S3_SCHEME}{bucket}/{key}: {code} {error.get('Message', '')}".rstrip()
                if not batch:
                    break
                _back_off(attempt)


class _BrokenAnswer(Exception):
    """What the store said is not all of it, or not its last word: ask again."""


def refuse_credentials(name: str, url: str | None) -> None:
    """Credentials have no place in a url: it is recorded, logged and shown.

    Raises:
        UserError: the url brings a user, a password or a query; the message does not repeat them.
    """
    if url is not None and any(mark in url for mark in "@?#"):
        raise UserError(
            f"{name} must be the bare address of the store, without user, password or query; "
            "credentials come from the standard AWS chain only"
        )


def require_bare(uri: str) -> None:
    """Refuse credentials in a uri, or in the address that the environment gives for the store.

    Raises:
        UserError: there are some; the message does not repeat them.
    """
    if is_s3(uri):
        _bucket_and_key(uri)
        _refuse_credentials_in_environment()


def _refuse_credentials_in_environment() -> None:
    for name in (ENDPOINT_VARIABLE, f"{ENDPOINT_VARIABLE}_S3"):
        refuse_credentials(name, os.environ.get(name))


def _list_local(root: Path, *, hidden: bool) -> Iterator[StoredObject]:
    if not root.is_dir():
        return
    # Links are followed and what cannot be read is an error: a folder that is skipped would look like deletions.
    for folder, _, names in os.walk(root, followlinks=True, onerror=_raise_unless_gone):
        for path in (Path(folder) / name for name in names):
            # What is deleted while we look was not there.
            with suppress(FileNotFoundError):
                if (hidden or not _is_hidden(str(path.relative_to(root)))) and path.is_file():
                    yield _stored(str(path), path.stat())


def _stored(uri: str, stat: os.stat_result) -> StoredObject:
    return StoredObject(uri=uri, bytes=stat.st_size, modified=stat.st_mtime)


def _raise_unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _is_hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.split("/"))


def _remove_local(paths: Iterable[Path]) -> None:
    folders: set[Path] = set()
    for path in paths:
        path.unlink(missing_ok=True)
        folders.update(islice(path.parents, PRUNED_LEVELS))
    for folder in sorted(folders, key=lambda f: len(f.parts), reverse=True):
        # Refused where somebody else keeps or has just put something.
        with suppress(OSError):
            folder.rmdir()


def _in_folder(folder: Path, action: Callable[[], R]) -> R:
    """Do what needs a folder to be there; somebody may remove it, being empty, the moment it is made."""
    for _ in range(FOLDER_TRIES):
        with suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(parents=True, exist_ok=True)
            return action()
        # Out of step with whoever removes it.
        time.sleep(random.uniform(0, 0.001))  # noqa: S311
    folder.mkdir(parents=True, exist_ok=True)
    return action()


@contextmanager
def disk_full_names(uri: str) -> Iterator[None]:
    """Say what could not be written when the disk is full, whichever library found out and however it says so."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None)
        if full not in DISK_FULL:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            full = errno.ENOSPC
        raise DiskFull(full, os.strerror(full), uri) from error


def _bucket_and_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    if ":" in bucket or "@" in bucket:
        raise UserError(
            "an s3:// uri must not bring credentials, they come from the standard AWS chain only; write s3://bucket/key"
        )
    if not bucket:
        raise UserError(f"{uri!r} names no bucket; write s3://bucket/key")
    return bucket, key


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _back_off(attempt: int) -> None:
    # Random, so that workers that failed together do not come back together.
    time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)))  # noqa: S311


def _require_whole_head(answer: Any) -> None:  # noqa: ANN401 - any of boto3's typed dictionaries
    """A connection that ends within the headers passes for an answer without the rest of them, and without a body."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    if "content-length" not in headers and "transfer-encoding" not in headers:
        raise _BrokenAnswer("the answer broke off")


def _status(error: Any) -> int:  # noqa: ANN401 - boto3's ClientError, made at run time
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _broken_bodies() -> tuple[type[Exception], ...]:
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError  # noqa: PLC0415

    return _BrokenAnswer, HTTPClientError, IncompleteReadError, FlexibleChecksumError


# Clients are kept per process: one that was made before a fork shares its connections with the parent. Nothing is
# ever dropped, so that a child does not close what the parent uses.
@cache
def _boto3_s3(
    _pid: int, endpoint_url: str | None, region: str | None, connect_s: float, read_s: float, attempts: int
) -> "S3Client":
    # Imported here: most runs are local, and boto3 takes longer to import than the reader takes to open.
    from boto3.session import Session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=connect_s,
        read_timeout=read_s,
    )
    # A session of its own: the default one must not be used by threads at once.
    return Session().client("s3", endpoint_url=endpoint_url, region_name=region, config=config)


@cache
def _arrow_s3(
    _pid: int, endpoint_url: str | None, region: str | None, connect_s: float, read_s: float, attempts: int
) -> pafs.FileSystem:
    options: dict[str, Any] = {
        "connect_timeout": connect_s,
        "request_timeout": read_s,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    }
    if endpoint_url:
        parts = urlsplit(endpoint_url)
        options |= {"scheme": parts.scheme, "endpoint_override": parts.netloc}
    if region:
        options["region"] = region
    return pafs.S3FileSystem(**options)

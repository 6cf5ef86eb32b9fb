"""Objects in an S3 store: boto3 for whole objects, pyarrow and delta-rs for columnar files."""

import builtins
import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs as pafs

from marc_pipeline.errors import UserError
from marc_pipeline.storage.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, back_off, repeated
from marc_pipeline.storage.s3_clients import arrow_s3, boto3_s3
from marc_pipeline.storage.stored_object import StoredObject, is_hidden
from marc_pipeline.uris import (
    ENDPOINT_VARIABLE,
    S3_SCHEME,
    bucket_and_key,
    join,
    refuse_credentials,
    refuse_credentials_in_environment,
    require_no_credentials,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import DeleteTypeDef

MULTIPART_BYTES, PART_BYTES, CHUNK_BYTES, PARTS_AT_ONCE = 64 << 20, 32 << 20, 1 << 20, 4
DELETE_BATCH = 1000
PROBE_PREFIX = ".probe-"
PASSING_ERRORS = {"InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout"}


class _BrokenAnswer(Exception):
    """The store's response is incomplete or not final; the request must be repeated."""


@dataclass(frozen=True)
class S3Objects:
    """Objects of an S3 store; :class:`marc_pipeline.storage.Storage` documents the fields and methods."""

    endpoint_url: str | None
    region: str | None
    connect_timeout_s: float
    read_timeout_s: float
    attempts: int

    def staging_folder(self, uri: str) -> Path:
        """Return the folder for files that are not uploaded yet."""
        return Path(tempfile.gettempdir())

    def read(self, uri: str) -> bytes:
        """Return the content of one object."""
        client, (bucket, key) = self._client(), bucket_and_key(uri)

        def get() -> bytes:
            try:
                answer = client.get_object(Bucket=bucket, Key=key)
            except client.exceptions.ClientError as error:
                # The status is reliable even if the error document is cut off.
                if _status(error) == 404 and error.response["Error"]["Code"] != "NoSuchBucket":
                    raise FileNotFoundError(uri) from None
                raise
            _require_whole_head(answer)
            return answer["Body"].read()

        # boto3 retries requests, but not a response that is cut off.
        return repeated(uri, get, on=_broken_bodies(), attempts=self.attempts)

    def write(self, uri: str, data: bytes) -> None:
        """Create or replace one object."""
        bucket, key = bucket_and_key(uri)
        self._client().put_object(Bucket=bucket, Key=key, Body=data)

    def create(self, uri: str, data: bytes) -> bool:
        """Write one object unless it exists, by a conditional put."""
        client, (bucket, key) = self._client(), bucket_and_key(uri)
        again = False

        def put() -> bool:
            nonlocal again
            try:
                client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            except client.exceptions.ClientError as error:
                again = again or error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                if _status(error) == 412:
                    # An earlier try of this call may have created the object.
                    with suppress(FileNotFoundError):
                        return again and self.read(uri) == data
                    return False
                if _status(error) != 409:
                    raise
                # Another client is writing or deleting the object, so the outcome is open.
                again = True
                raise _BrokenAnswer(str(error)) from error
            return True

        return repeated(uri, put, on=(_BrokenAnswer,), attempts=self.attempts)

    def require_conditional_writes(self, uri: str) -> None:
        """Require that a second conditional put below a folder fails; asked once per process and folder."""
        _probe(self, uri)

    def publish(self, staged: Path, uri: str) -> None:
        """Upload a staged file."""
        from boto3.exceptions import S3UploadFailedError  # noqa: PLC0415
        from boto3.s3.transfer import TransferConfig  # noqa: PLC0415

        client, (bucket, key) = self._client(), bucket_and_key(uri)
        config = TransferConfig(
            multipart_threshold=MULTIPART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=PARTS_AT_ONCE
        )

        def upload() -> None:
            try:
                client.upload_file(str(staged), bucket, key, Config=config)
            except S3UploadFailedError as error:
                if "NoSuchUpload" not in str(error):
                    raise
                # The upload was completed and the response lost, or another client aborted the upload.
                raise _BrokenAnswer(str(error)) from error

        # boto3 raises KeyError for a response that is cut off within its headers.
        repeated(uri, upload, on=(_BrokenAnswer, KeyError), attempts=self.attempts)

    def flush(self, uri: str) -> None:
        """A store keeps what it has acknowledged."""

    def list(self, uri: str, *, hidden: bool) -> Sequence[StoredObject]:
        """Return every object below a folder uri."""
        bucket, prefix = bucket_and_key(uri.rstrip("/") + "/")
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
                    if hidden or not is_hidden(item["Key"].removeprefix(prefix))
                ]
            return found

        return repeated(uri, listed, on=(_BrokenAnswer,), attempts=self.attempts)

    def stat(self, uri: str) -> StoredObject | None:
        """Return one object, or None if it does not exist."""
        client, (bucket, key) = self._client(), bucket_and_key(uri)

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

        return repeated(uri, head, on=(_BrokenAnswer,), attempts=self.attempts)

    def remove(self, uris: Iterable[str]) -> builtins.list[str]:
        """Delete objects; return one line for each object that could not be deleted."""
        buckets: dict[str, builtins.list[str]] = {}
        for uri in uris:
            bucket, key = bucket_and_key(uri)
            buckets.setdefault(bucket, []).append(key)
        return [failure for bucket, keys in buckets.items() for failure in self._remove(bucket, keys)]

    def _remove(self, bucket: str, keys: Sequence[str]) -> Iterator[str]:
        client = self._client()
        for start in range(0, len(keys), DELETE_BATCH):
            batch = [*keys[start : start + DELETE_BATCH]]
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
                back_off(attempt)

    def abort_uploads(self, uri: str, *, before: float) -> int:
        """Abort multipart uploads below a folder that began before a time."""
        client, (bucket, prefix) = self._client(), bucket_and_key(uri.rstrip("/") + "/")
        aborted = 0
        for page in client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for upload in page.get("Uploads", []):
                if upload["Initiated"].timestamp() < before:
                    with suppress(client.exceptions.NoSuchUpload):
                        client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
                        aborted += 1
        return aborted

    def copy(self, uri: str, path: Path) -> None:
        """Download one object in parts. boto3's own transfer hangs if a response is cut off in its headers."""
        stored = self.stat(uri)
        if stored is None:
            raise FileNotFoundError(uri)
        with path.open("wb") as file, ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            file.truncate(stored.bytes)
            parts = range(0, stored.bytes, PART_BYTES)
            # list() raises the errors of the parts.
            list(pool.map(lambda start: self._download_part(stored, start, file.fileno()), parts))

    def _download_part(self, stored: StoredObject, start: int, file: int) -> None:
        client, (bucket, key) = self._client(), bucket_and_key(stored.uri)
        end = min(start + PART_BYTES, stored.bytes)

        def download() -> None:
            try:
                answer = client.get_object(
                    Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=stored.etag or ""
                )
            except client.exceptions.ClientError as error:
                if _status(error) not in {404, 412}:
                    raise
                raise OSError(f"{stored.uri} changed while it was downloaded; run again") from error
            place = start
            for chunk in answer["Body"].iter_chunks(CHUNK_BYTES):
                os.pwrite(file, chunk, place)
                place += len(chunk)
            if place != end:
                raise _BrokenAnswer(f"received {place - start:,} of {end - start:,} bytes")

        repeated(stored.uri, download, on=_broken_bodies(), attempts=self.attempts)

    def filesystem(self, uri: str) -> tuple[pafs.FileSystem, str]:
        """Return the pyarrow file system, and the path inside it."""
        require_no_credentials(uri)
        endpoint = self.endpoint_url or os.environ.get(ENDPOINT_VARIABLE)
        return arrow_s3(os.getpid(), endpoint, *self._connection()), uri.removeprefix(S3_SCHEME)

    def delta_options(self) -> dict[str, str]:
        """Return the storage options for delta-rs."""
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
        refuse_credentials_in_environment()
        client = boto3_s3(os.getpid(), self.endpoint_url, *self._connection())
        # The address may also come from a profile.
        refuse_credentials("the endpoint of S3", client.meta.endpoint_url)
        return client

    def _connection(self) -> tuple[str | None, float, float, int]:
        return self.region, self.connect_timeout_s, self.read_timeout_s, self.attempts


@lru_cache
def _probe(objects: S3Objects, uri: str) -> None:
    place = join(uri, f"{PROBE_PREFIX}{uuid.uuid4().hex}")
    try:
        held = objects.create(place, b"first") and not objects.create(place, b"second")
    finally:
        objects.remove([place])
    if not held:
        raise UserError(
            f"the store of {uri} ignores If-None-Match: two runs could overwrite each other's commit; use a store with "
            "conditional writes, or a local disk"
        )


def _require_whole_head(answer: Any) -> None:  # noqa: ANN401 - any of boto3's typed dictionaries
    """Refuse a response whose headers are cut off; boto3 treats it as a response without a body."""
    headers = answer["ResponseMetadata"]["HTTPHeaders"]
    if "content-length" not in headers and "transfer-encoding" not in headers:
        raise _BrokenAnswer("the response is cut off")


def _status(error: Any) -> int:  # noqa: ANN401 - boto3's ClientError, made at run time
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _milliseconds(seconds: float) -> str:
    return f"{round(seconds * 1000)}ms"


def _broken_bodies() -> tuple[type[Exception], ...]:
    from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError  # noqa: PLC0415

    return _BrokenAnswer, HTTPClientError, IncompleteReadError, FlexibleChecksumError

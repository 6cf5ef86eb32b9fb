"""Uris: local paths and ``s3://bucket/key``. Credentials in a uri or in a store's address are refused."""

import os
from pathlib import Path, PurePosixPath

from marc_pipeline.errors import UserError

S3_SCHEME = "s3://"
ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"


def is_s3(uri: str) -> bool:
    """Return whether the uri is on S3."""
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    """Append path parts to a uri."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def absolute_uri(uri: str, folder: Path) -> str:
    """Return a local path as an absolute path against ``folder``, and any other uri without a trailing slash."""
    if "://" in uri:
        return uri.removeprefix("file://").rstrip("/")
    return str((folder / Path(uri).expanduser()).absolute())


def overlap(uri: str, other: str) -> bool:
    """Return whether one folder is the other or lies in it; links of a local disk are followed."""
    folders = [PurePosixPath(each if is_s3(each) else os.path.realpath(each)) for each in (uri, other)]
    return folders[0].is_relative_to(folders[1]) or folders[1].is_relative_to(folders[0])


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Return bucket and key of an ``s3://`` uri.

    Raises:
        UserError: the uri contains credentials, or has no bucket.
    """
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    if ":" in bucket or "@" in bucket:
        raise UserError(
            "an s3:// uri must not contain credentials, which come from the standard AWS chain; write s3://bucket/key"
        )
    if not bucket:
        raise UserError(f"{uri!r} has no bucket; write s3://bucket/key")
    return bucket, key


def require_no_credentials(uri: str) -> None:
    """Refuse credentials in a uri and in the environment's address of the store.

    Raises:
        UserError: there are credentials; the message does not repeat them.
    """
    if is_s3(uri):
        bucket_and_key(uri)
        refuse_credentials_in_environment()


def refuse_credentials(name: str, url: str | None) -> None:
    """Refuse credentials in the address of a store, because addresses are recorded and logged.

    Raises:
        UserError: the address has a user, a password or a query; the message does not repeat them.
    """
    if url is not None and any(mark in url for mark in "@?#"):
        raise UserError(
            f"{name} must be the address of the store without user, password or query; "
            "credentials come from the standard AWS chain"
        )


def refuse_credentials_in_environment() -> None:
    """Refuse credentials in the environment's address of the store.

    Raises:
        UserError: see :func:`refuse_credentials`.
    """
    for name in (ENDPOINT_VARIABLE, f"{ENDPOINT_VARIABLE}_S3"):
        refuse_credentials(name, os.environ.get(name))

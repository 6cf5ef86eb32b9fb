"""Uris: local paths and ``s3://bucket/key``. No uri or address may carry credentials."""

import os

from marc_pipeline.errors import UserError

S3_SCHEME = "s3://"
ENDPOINT_VARIABLE = "AWS_ENDPOINT_URL"


def is_s3(uri: str) -> bool:
    """Whether the uri names an object of an S3 store."""
    return uri.startswith(S3_SCHEME)


def join(uri: str, *parts: str) -> str:
    """Append path parts to a uri."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Bucket and key of an ``s3://`` uri.

    Raises:
        UserError: the uri carries credentials, or names no bucket.
    """
    bucket, _, key = uri.removeprefix(S3_SCHEME).partition("/")
    if ":" in bucket or "@" in bucket:
        raise UserError(
            "an s3:// uri must not bring credentials, they come from the standard AWS chain only; write s3://bucket/key"
        )
    if not bucket:
        raise UserError(f"{uri!r} names no bucket; write s3://bucket/key")
    return bucket, key


def require_bare(uri: str) -> None:
    """Refuse credentials in a uri, or in the store's address that the environment gives.

    Raises:
        UserError: there are credentials; the message does not repeat them.
    """
    if is_s3(uri):
        bucket_and_key(uri)
        refuse_credentials_in_environment()


def refuse_credentials(name: str, url: str | None) -> None:
    """Refuse credentials in the address of a store, because addresses are recorded, logged and shown.

    Raises:
        UserError: the address has a user, a password or a query; the message does not repeat them.
    """
    if url is not None and any(mark in url for mark in "@?#"):
        raise UserError(
            f"{name} must be the bare address of the store, without user, password or query; "
            "credentials come from the standard AWS chain only"
        )


def refuse_credentials_in_environment() -> None:
    """Refuse credentials in the store's address that the environment gives.

    Raises:
        UserError: see :func:`refuse_credentials`.
    """
    for name in (ENDPOINT_VARIABLE, f"{ENDPOINT_VARIABLE}_S3"):
        refuse_credentials(name, os.environ.get(name))

"""S3 clients of boto3 and pyarrow with their timeouts and own retries, cached per process and connection."""

from functools import cache
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


# Clients are cached per process: a client from before a fork shares its connections with the parent. Clients are never
# dropped, so that a child does not close the connections of its parent.
@cache
def boto3_s3(
    _pid: int, endpoint_url: str | None, region: str | None, connect_s: float, read_s: float, attempts: int
) -> "S3Client":
    """Return the boto3 client of a process."""
    # Imported here, because importing boto3 takes longer than opening a release, and most runs are local.
    from boto3.session import Session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    config = Config(
        retries={"mode": "standard", "total_max_attempts": attempts},
        connect_timeout=connect_s,
        read_timeout=read_s,
    )
    # Threads must not share boto3's default session.
    return Session().client("s3", endpoint_url=endpoint_url, region_name=region, config=config)


@cache
def arrow_s3(
    _pid: int, endpoint_url: str | None, region: str | None, connect_s: float, read_s: float, attempts: int
) -> pafs.FileSystem:
    """Return the pyarrow file system of a process."""
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

"""Create the bucket of the configuration's root if it does not exist: the first step of the compose system."""

import sys
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from marc_pipeline.config import load_settings


def create_bucket(*, name: str, endpoint_url: str | None, region: str | None) -> bool:
    """Create a bucket if it does not exist; returns True if it was created."""
    # The S3 gateway answers before its store is ready.
    patience = Config(retries={"max_attempts": 10, "mode": "standard"}, s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=endpoint_url, region_name=region, config=patience)
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
            raise
        client.create_bucket(Bucket=name)
        return True
    return False


def main() -> None:
    """Create the bucket of the configuration given as the only argument."""
    settings = load_settings(sys.argv[1])
    root = urlsplit(settings.root)
    if root.scheme != "s3":
        raise SystemExit(f"root is {settings.root}, which has no bucket; set root to an s3:// uri")
    created = create_bucket(
        name=root.netloc, endpoint_url=settings.storage.endpoint_url, region=settings.storage.region
    )
    sys.stdout.write(f"bucket {root.netloc} {'created' if created else 'exists'}\n")


if __name__ == "__main__":
    main()

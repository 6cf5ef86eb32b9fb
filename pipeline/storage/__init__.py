"""Whole objects and columnar files under one uri scheme: a local path or ``s3://bucket/key``."""

from pipeline.storage.local import STAGED_PREFIX
from pipeline.storage.objects import Storage
from pipeline.storage.retry import disk_full_names
from pipeline.storage.s3 import MULTIPART_BYTES
from pipeline.storage.stored import StoredObject
from pipeline.uris import is_s3, join, require_bare

__all__ = [
    "MULTIPART_BYTES",
    "STAGED_PREFIX",
    "Storage",
    "StoredObject",
    "disk_full_names",
    "is_s3",
    "join",
    "require_bare",
]

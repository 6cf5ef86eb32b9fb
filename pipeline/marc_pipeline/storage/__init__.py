"""Access to local disks and S3 stores: one interface for whole objects and columnar files."""

from marc_pipeline.storage.local import STAGED_PREFIX
from marc_pipeline.storage.objects import Storage
from marc_pipeline.storage.retry import disk_full_names
from marc_pipeline.storage.s3 import MULTIPART_BYTES
from marc_pipeline.storage.stored_object import StoredObject
from marc_pipeline.uris import is_s3, join, require_no_credentials

__all__ = [
    "MULTIPART_BYTES",
    "STAGED_PREFIX",
    "Storage",
    "StoredObject",
    "disk_full_names",
    "is_s3",
    "join",
    "require_no_credentials",
]

"""Hashes that identify items, texts, plans, receipts and table files; every part must compute the same ones."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from marc_schemas.files import PublishedFile
    from marc_schemas.receipt import Receipt

# Seed of Spark's xxhash64(), because Python and SQL must compute equal row ids.
XXHASH_SEED = 42
ROW_ID_MASK = 0x7FFF_FFFF_FFFF_FFFF
CONTENT_HASH_CHARS = 32
# Number of characters of a plan_id in the names of table files: 64 bits.
PLAN_KEY_CHARS = 16


def row_id(item_id: str) -> int:
    """Return the stable 63-bit hash of an item id: the id in FAISS, and the bucket modulo the number of buckets."""
    return xxhash.xxh64_intdigest(item_id.encode(), seed=XXHASH_SEED) & ROW_ID_MASK


def content_hash(text: str) -> str:
    """Return the first 128 bits of the SHA-256 of a rendered text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:CONTENT_HASH_CHARS]


def plan_key(plan_id: str) -> str:
    """Return the part of a plan_id that the names of its table files contain."""
    return plan_id[:PLAN_KEY_CHARS]


def digest(parts: object, *, chars: int = 32) -> str:
    """Return the first characters of the SHA-256 of a value's JSON, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:chars]


def receipts_digest(receipts: "Sequence[Receipt]") -> str:
    """Return a digest of a set of receipts. The release requires that the audit checked the same set."""
    return digest(sorted((receipt.bucket, receipt.file.sha256 if receipt.file else "") for receipt in receipts))


def files_digest(files: "Sequence[PublishedFile]") -> str:
    """Return a digest of a set of table files. The release requires that the index was built from the same set."""
    return digest(sorted((file.path, file.sha256) for file in files))

"""How items, texts, plans and sets of files are named: the hashes that every part of the system must agree on."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from marc_schemas.files import PublishedFile
    from marc_schemas.receipt import Receipt

# Spark's xxhash64() uses this seed; ids hashed in Python and in SQL must be equal.
XXHASH_SEED = 42
ROW_ID_MASK = 0x7FFF_FFFF_FFFF_FFFF
CONTENT_HASH_CHARS = 32
# Characters of a plan_id that the names of table files carry; 64 bits.
PLAN_KEY_CHARS = 16


def row_id(item_id: str) -> int:
    """Stable 63-bit hash of an item id: FAISS's id and the source of the bucket."""
    return xxhash.xxh64_intdigest(item_id.encode(), seed=XXHASH_SEED) & ROW_ID_MASK


def content_hash(text: str) -> str:
    """First 128 bits of the SHA-256 of a rendered text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:CONTENT_HASH_CHARS]


def plan_key(plan_id: str) -> str:
    """The first characters of a plan_id, which the names of its table files carry."""
    return plan_id[:PLAN_KEY_CHARS]


def digest(parts: object, *, chars: int = 32) -> str:
    """First characters of the SHA-256 of a value's JSON, as hex: names whatever the value describes."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:chars]


def receipts_digest(receipts: "Sequence[Receipt]") -> str:
    """Names an exact set of receipts. The release requires that the audit saw the same set."""
    return digest(sorted((receipt.bucket, receipt.file.sha256 if receipt.file else "") for receipt in receipts))


def files_digest(files: "Sequence[PublishedFile]") -> str:
    """Names an exact set of table files. The release requires that the index was made of the same set."""
    return digest(sorted((file.path, file.sha256) for file in files))

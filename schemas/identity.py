"""How items, texts and plans are named: the hashes that every part of the system must agree on."""

import hashlib

import xxhash

# Spark's xxhash64() uses this seed; ids hashed in Python and in SQL must be equal.
XXHASH_SEED = 42
ROW_ID_MASK = 0x7FFF_FFFF_FFFF_FFFF
CONTENT_HASH_CHARS = 32


def row_id(item_id: str) -> int:
    """Stable 63-bit hash of an item id: FAISS's id and the source of the bucket."""
    return xxhash.xxh64_intdigest(item_id.encode(), seed=XXHASH_SEED) & ROW_ID_MASK


def content_hash(text: str) -> str:
    """First 128 bits of the SHA-256 of a rendered text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()[:CONTENT_HASH_CHARS]

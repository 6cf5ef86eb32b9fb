"""Tokens without the model: ids for the encoder, counts for the plan. Needs no torch."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pipeline.storage import Storage, join

TOKENIZER = "backbone/tokenizer.json"
TOKENISE_TEXTS = 1024


@lru_cache(maxsize=4)
def load_tokenizer(storage: Storage, bundle_uri: str, max_tokens: int) -> Tokenizer:
    """The bundle's tokenizer, truncating at ``max_tokens`` with special tokens included, never padding."""
    tokenizer = Tokenizer.from_str(storage.read(join(bundle_uri, TOKENIZER)).decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Token ids of each text."""
    found: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), TOKENISE_TEXTS):
        # In pieces: the tokenizer's own records take a hundred times the room of the ids.
        encodings = tokenizer.encode_batch(list(texts[start : start + TOKENISE_TEXTS]))
        found += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    return found


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, sample: int) -> tuple[int, bool]:
    """Tokens that the texts cost.

    Args:
        tokenizer: from :func:`load_tokenizer`.
        texts: what would be encoded.
        sample: beyond this many texts, an even sample is counted and scaled.

    Returns:
        The count, and whether it is exact.
    """
    step = max(1, -(-len(texts) // sample))
    chosen = texts[::step]
    counted = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(list(chosen)))
    if step == 1:
        return counted, True
    return round(counted * len(texts) / len(chosen)), False

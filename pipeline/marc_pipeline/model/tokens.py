"""Tokens without the model: ids for the encoder, counts for the plan. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from marc_pipeline.storage import Storage, join

TOKENIZER = "backbone/tokenizer.json"
Z_95 = 1.96
# Most tokens are shorter: of a text that is longer, the first so many characters per token settle the count.
CHARACTERS_PER_TOKEN = 16
TEXTS_AT_ONCE = 1024
BY_CHARACTER = (
    normalizers.BertNormalizer, normalizers.Lowercase, normalizers.NFC, normalizers.NFD, normalizers.NFKC,
    normalizers.NFKD,
)  # fmt: skip
"""Normalizers for which what follows a space changes nothing before it."""
BY_WORD = (pre_tokenizers.BertPreTokenizer, pre_tokenizers.Whitespace, pre_tokenizers.WhitespaceSplit)
"""Pre-tokenizers that end a word at every space, whatever stands around it."""


@dataclass(frozen=True)
class TokenCount:
    """Tokens that texts cost.

    Attributes:
        tokens: the count.
        error: half-width of its 95 % interval, in tokens; 0 where the count is exact.
        exact: whether every text was counted.
    """

    tokens: int
    error: float = 0.0
    exact: bool = True


@lru_cache(maxsize=4)
def load_tokenizer(storage: Storage, bundle_uri: str, max_tokens: int) -> Tokenizer:
    """The bundle's tokenizer, truncating at ``max_tokens`` with special tokens included, never padding."""
    tokenizer = Tokenizer.from_str(storage.read(join(bundle_uri, TOKENIZER)).decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)
    return tokenizer


def sample_of(count: int, sample: int) -> NDArray[np.int64]:
    """Which of ``count`` texts to count: all up to ``sample`` (at least 2), else so many by chance, always the same."""
    if count <= sample:
        return np.arange(count)
    return np.sort(np.random.default_rng(count).choice(count, sample, replace=False, shuffle=False))


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, of: int) -> TokenCount:
    """Tokens that ``of`` texts cost.

    Args:
        tokenizer: from :func:`load_tokenizer`.
        texts: all of them, or those that :func:`sample_of` chose.
        of: how many there are.
    """
    lengths = np.array([len(ids) for ids in token_ids(tokenizer, texts)], np.int64)
    if len(texts) == of:
        return TokenCount(int(lengths.sum()))
    # Without replacement: the more of the texts are in the sample, the less is unknown.
    deviation = lengths.std(ddof=1) * math.sqrt((1 - len(texts) / of) / len(texts))
    return TokenCount(round(lengths.mean() * of), error=float(Z_95 * of * deviation), exact=False)


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Token ids of each text, truncated; no more of a long text is read than it takes to know them."""
    found: list[NDArray[np.int32]] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        # In pieces: the tokenizer's own records take a hundred times the room of the ids.
        found += _token_ids(tokenizer, texts[start : start + TEXTS_AT_ONCE])
    return found


def _token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    limit: int = (tokenizer.truncation or {}).get("max_length", 0)
    cuts = limit > 0 and _ends_words_at_spaces(tokenizer)
    characters = CHARACTERS_PER_TOKEN * limit if cuts else max(map(len, texts), default=0)
    heads = [_head(text, characters) for text in texts]
    ids = [np.array(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(heads)]
    while open_ends := [
        n for n, (text, head) in enumerate(zip(texts, heads, strict=True)) if head != text and len(ids[n]) < limit
    ]:
        characters *= 8
        for number in open_ends:
            heads[number] = _head(texts[number], characters)
            ids[number] = np.array(tokenizer.encode(heads[number]).ids, np.int32)
    return ids


def _head(text: str, characters: int) -> str:
    """The words of a text that end within so many characters; all of it where no word ends."""
    if len(text) <= characters:
        return text
    end = text.rfind(" ", 1, characters)
    # Before the whole blank: how one is cut into tokens depends on its length.
    return text[:end].rstrip() if end > 0 else text


def _ends_words_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text begin with those of its head, where a space follows the head.

    So it is where each word is normalised and cut into tokens on its own, and no token reaches over a space.
    """
    words = tokenizer.pre_tokenizer
    return (
        # GPT-2's pattern takes a space together with the word behind it, never with the one before.
        (isinstance(words, BY_WORD) or (isinstance(words, pre_tokenizers.ByteLevel) and words.use_regex))
        and (tokenizer.normalizer is None or isinstance(tokenizer.normalizer, BY_CHARACTER))
        and (tokenizer.truncation or {})["direction"] == "right"
        and not any(" " in token.content or token.lstrip for token in tokenizer.get_added_tokens_decoder().values())
    )

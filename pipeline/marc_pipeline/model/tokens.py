"""Tokens of texts, without the model and without torch: ids for the encoder, counts for the plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer, normalizers, pre_tokenizers

from marc_pipeline.storage import Storage, join
from marc_schemas.bundle import LongTexts

TOKENIZER = "backbone/tokenizer.json"
Z_95 = 1.96
# Most tokens are shorter. This many characters per token usually suffice to fill the token limit of a long text.
CHARACTERS_PER_TOKEN = 16
TEXTS_AT_ONCE = 1024
GOOD_TEXT = "a plain text of a few words"
"""Every working tokenizer and model accepts this text. If it fails too, the error does not concern other texts."""
BY_CHARACTER = (
    normalizers.BertNormalizer, normalizers.Lowercase, normalizers.NFC, normalizers.NFD, normalizers.NFKC,
    normalizers.NFKD,
)  # fmt: skip
"""Normalizers whose result before a space does not depend on the characters after it."""
BY_WORD = (pre_tokenizers.BertPreTokenizer, pre_tokenizers.Whitespace, pre_tokenizers.WhitespaceSplit)
"""Pre-tokenizers that end a word at every space."""


@dataclass(frozen=True)
class TokenCount:
    """Number of tokens of some texts.

    Attributes:
        tokens: the count, or its estimate.
        error: half-width of its 95 % interval, in tokens; 0 for an exact count.
        exact: whether every text was counted.
        cut_texts: number of texts that are longer than the limit, or its estimate.
        lost_tokens: estimated number of tokens beyond the limit.
    """

    tokens: int
    error: float = 0.0
    exact: bool = True
    cut_texts: int = 0
    lost_tokens: int = 0


@dataclass(frozen=True)
class TextTokens:
    """Tokens of one text.

    Attributes:
        chunks: token ids, special tokens included, int32 [t] each. One chunk if long texts are cut. Otherwise as many
            chunks as the text needs; each has as many tokens as the limit, except the last.
        lost: number of tokens beyond the limit; more than 0 exactly for a text that is cut. It is estimated for the
            part of a text that is not tokenised: that part has as many tokens per character as the rest.
    """

    chunks: list[NDArray[np.int32]]
    lost: int = 0

    @property
    def count(self) -> int:
        """Number of tokens that are encoded."""
        return sum(map(len, self.chunks))


@dataclass(frozen=True)
class TokenisedTexts:
    """Tokens of texts, and the rows and reasons of failed texts, which have no tokens."""

    texts: list[TextTokens]
    failed: dict[int, str]


@lru_cache(maxsize=4)
def load_tokenizer(storage: Storage, bundle_uri: str, max_tokens: int) -> Tokenizer:
    """Return the bundle's tokenizer. It truncates to ``max_tokens``, special tokens included, and does not pad."""
    tokenizer = Tokenizer.from_str(storage.read(join(bundle_uri, TOKENIZER)).decode())
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)
    return tokenizer


def sample_of(count: int, sample: int) -> NDArray[np.int64]:
    """Return the rows of a fixed random sample of ``count`` texts; all rows up to ``sample``, which is at least 2."""
    if count <= sample:
        return np.arange(count)
    return np.sort(np.random.default_rng(count).choice(count, sample, replace=False, shuffle=False))


def count_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, of: int, long_texts: LongTexts = "cut") -> TokenCount:
    """Return the number of tokens of ``of`` texts, estimated if ``texts`` is a sample by :func:`sample_of`."""
    found = text_tokens(tokenizer, texts, long_texts)
    lengths, lost = (np.array(values, np.int64) for values in ([t.count for t in found], [t.lost for t in found]))
    if len(texts) == of:
        return TokenCount(int(lengths.sum()), cut_texts=int((lost > 0).sum()), lost_tokens=int(lost.sum()))
    # The factor 1 − n/N is the correction for sampling without replacement.
    deviation = lengths.std(ddof=1) * math.sqrt((1 - len(texts) / of) / len(texts))
    return TokenCount(
        round(lengths.mean() * of),
        error=float(Z_95 * of * deviation),
        exact=False,
        cut_texts=round((lost > 0).mean() * of),
        lost_tokens=round(lost.mean() * of),
    )


def text_tokens(tokenizer: Tokenizer, texts: Sequence[str], long_texts: LongTexts = "cut") -> list[TextTokens]:
    """Return the tokens of each text. With ``cut``, only the necessary beginning of a long text is tokenised."""
    found: list[TextTokens] = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        # The tokenizer's own records take a hundred times the memory of the ids.
        found += _tokens_of_block(tokenizer, texts[start : start + TEXTS_AT_ONCE], long_texts)
    return found


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[NDArray[np.int32]]:
    """Return the truncated token ids of each text."""
    return [tokens.chunks[0] for tokens in text_tokens(tokenizer, texts)]


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], long_texts: LongTexts = "cut") -> TokenisedTexts:
    """Return the tokens of each text, and the reason for each text that the tokenizer fails on.

    Raises:
        Exception: the tokenizer's own error, if it fails on a known good text too.
    """
    failed: dict[int, str] = {}
    found = _tokens_or_failures(tokenizer, list(texts), long_texts, failed)
    if failed:
        text_tokens(tokenizer, [GOOD_TEXT])
    return TokenisedTexts(found, failed)


def error_line(error: BaseException) -> str:
    """Return type and first line of an error, as the reason of a failed text."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def _tokens_or_failures(
    tokenizer: Tokenizer, texts: list[str], long_texts: LongTexts, failed: dict[int, str], first: int = 0
) -> list[TextTokens]:
    """Halve a failing list of texts until each failing text is alone; ``first`` is the row of the first text."""
    try:
        return text_tokens(tokenizer, texts, long_texts)
    except BaseException as error:
        # A Rust panic in the tokenizer is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if len(texts) == 1:
            failed[first] = f"tokenizer: {error_line(error)}"
            return [TextTokens([np.empty(0, np.int32)])]
    half = len(texts) // 2
    left = _tokens_or_failures(tokenizer, texts[:half], long_texts, failed, first)
    return left + _tokens_or_failures(tokenizer, texts[half:], long_texts, failed, first + half)


def _tokens_of_block(tokenizer: Tokenizer, texts: Sequence[str], long_texts: LongTexts) -> list[TextTokens]:
    if long_texts == "pool":
        return [
            TextTokens([np.array(chunk.ids, np.int32) for chunk in (encoding, *encoding.overflowing)])
            for encoding in tokenizer.encode_batch(list(texts))
        ]
    limit: int = (tokenizer.truncation or {}).get("max_length", 0)
    cuts = limit > 0 and _ends_words_at_spaces(tokenizer)
    characters = CHARACTERS_PER_TOKEN * limit if cuts else max(map(len, texts), default=0)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    heads = [_head(text, characters) for text in texts]
    found = [
        _tokens_of(encoding, head, text, special=special)
        for encoding, head, text in zip(tokenizer.encode_batch(heads), heads, texts, strict=True)
    ]
    # A head that fills the limit without a token beyond it does not show whether its text is cut.
    while open_ends := [
        n for n, (text, head) in enumerate(zip(texts, heads, strict=True)) if head != text and not found[n].lost
    ]:
        characters *= 8
        for number in open_ends:
            text = texts[number]
            heads[number] = head = _head(text, characters)
            found[number] = _tokens_of(tokenizer.encode(head), head, text, special=special)
    return found


def _tokens_of(encoding: Encoding, head: str, text: str, *, special: int) -> TextTokens:
    """The tokens of a text, from the encoding of its head; ``special`` tokens are added to every chunk of a text."""
    ids = np.array(encoding.ids, np.int32)
    lost = sum(len(chunk) - special for chunk in encoding.overflowing)
    if lost and len(head) < len(text):
        lost += round((len(ids) - special + lost) / len(head) * (len(text) - len(head)))
    return TextTokens([ids], lost)


def _head(text: str, characters: int) -> str:
    """The words of a text that end within this number of characters; the whole text if none does."""
    if len(text) <= characters:
        return text
    end = text.rfind(" ", 1, characters)
    # The tokens of several spaces depend on their number, so that all of them are removed.
    return text[:end].rstrip() if end > 0 else text


def _ends_words_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether the tokens of a text begin with the tokens of its words before a space.

    This holds if the tokenizer normalises and splits each word on its own, and no token contains an inner space.
    """
    words = tokenizer.pre_tokenizer
    return (
        # GPT-2's pattern joins a space with the word after it, never with the word before it.
        (isinstance(words, BY_WORD) or (isinstance(words, pre_tokenizers.ByteLevel) and words.use_regex))
        and (tokenizer.normalizer is None or isinstance(tokenizer.normalizer, BY_CHARACTER))
        and (tokenizer.truncation or {})["direction"] == "right"
        and not any(" " in token.content or token.lstrip for token in tokenizer.get_added_tokens_decoder().values())
    )

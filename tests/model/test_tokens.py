"""Token counts: exact for few texts, estimates for many, and the same tokens as the encoder's."""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from marc_pipeline.model.tokens import TokenCount, count_tokens, load_tokenizer, sample_of, text_tokens, token_ids
from marc_pipeline.storage import Storage
from tiny_models import MAX_TOKENS, TEXTS, save_tiny_backbone, tiny_tokenizer

LONG = "river " * 500


@pytest.fixture(scope="module")
def bundle_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a bundle that has a backbone only."""
    folder = tmp_path_factory.mktemp("bundle")
    save_tiny_backbone(folder / "backbone")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(bundle_uri: str) -> Tokenizer:
    return load_tokenizer(Storage(), bundle_uri, MAX_TOKENS)


def test_ids_equal_those_of_transformers_with_truncation_and_special_tokens(
    tokenizer: Tokenizer, bundle_uri: str
) -> None:
    reference = AutoTokenizer.from_pretrained(str(Path(bundle_uri) / "backbone"))
    for text in [*TEXTS, "", " ", "naïve 😀", LONG]:
        expected = reference(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        assert tokenizer.encode(text).ids == expected
    assert len(tokenizer.encode(LONG).ids) == MAX_TOKENS
    assert tokenizer.encode(LONG).ids[-1] == tokenizer.token_to_id("[SEP]")


def test_padding_and_truncation_of_the_bundle_are_ignored(tmp_path: Path) -> None:
    saved = tiny_tokenizer("bert")
    saved.enable_padding(length=20)
    saved.enable_truncation(max_length=5)
    (tmp_path / "backbone").mkdir()
    saved.save(str(tmp_path / "backbone" / "tokenizer.json"))
    tokenizer = load_tokenizer(Storage(), str(tmp_path), 10)
    assert [len(encoding.ids) for encoding in tokenizer.encode_batch(["river", "river " * 30])] == [3, 10]


def naive_count(texts: list[str]) -> int:
    tokenizer = tiny_tokenizer("bert")
    return sum(min(MAX_TOKENS, len(tokenizer.encode(text).ids)) for text in texts)


def naive_lost(texts: list[str]) -> list[int]:
    """The number of tokens of each text beyond the limit, from a tokenizer without a limit."""
    tokenizer = tiny_tokenizer("bert")
    return [max(0, len(tokenizer.encode(text).ids) - MAX_TOKENS) for text in texts]


def estimate(tokenizer: Tokenizer, texts: list[str], sample: int) -> TokenCount:
    chosen = [texts[n] for n in sample_of(len(texts), sample)]
    return count_tokens(tokenizer, chosen, of=len(texts))


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=80) | st.sampled_from(["river " * n for n in (3, 30, 70)]), max_size=20))
def test_few_texts_are_counted_exactly(tokenizer: Tokenizer, texts: list[str]) -> None:
    lost = naive_lost(texts)
    expected = TokenCount(naive_count(texts), cut_texts=sum(map(bool, lost)), lost_tokens=sum(lost))
    assert estimate(tokenizer, texts, 20) == expected


def test_counts_of_no_text_and_of_truncated_texts(tokenizer: Tokenizer) -> None:
    assert count_tokens(tokenizer, [], of=0) == TokenCount(0)
    found = estimate(tokenizer, [LONG] * 3, 10)
    assert (found.tokens, found.cut_texts) == (3 * MAX_TOKENS, 3)


@pytest.mark.parametrize("sample", [100, 333, 1000])
def test_an_estimate_from_a_sample_is_close_and_not_exact(tokenizer: Tokenizer, sample: int) -> None:
    texts = random.Random(0).choices(TEXTS, k=2500)  # noqa: S311 - no secret
    found = estimate(tokenizer, texts, sample)
    assert not found.exact
    assert found.tokens == pytest.approx(naive_count(texts), rel=0.1)


def test_95_percent_of_the_intervals_contain_the_true_count(tokenizer: Tokenizer) -> None:
    chance = random.Random(1)  # noqa: S311 - no secret
    words = [chance.choice(["a", "river", "seven river"]) + " river" * chance.randrange(9) for _ in range(300)]
    inside, widths = 0, []
    # The number of texts determines the sample.
    for count in range(400, 1000, 3):
        texts = chance.choices(words, k=count)
        found = estimate(tokenizer, texts, 100)
        inside += abs(found.tokens - naive_count(texts)) <= found.error
        widths.append(found.error / found.tokens)
    assert 0.90 <= inside / len(widths) <= 0.99
    assert 0.02 < sum(widths) / len(widths) < 0.2


@pytest.mark.parametrize("sample", [10, 11, 99])
def test_an_estimate_over_texts_of_one_length_is_right(tokenizer: Tokenizer, sample: int) -> None:
    assert estimate(tokenizer, ["seven river"] * 100, sample) == TokenCount(400, error=0, exact=False)


@given(count=st.integers(0, 3000), sample=st.integers(2, 500))
def test_a_sample_is_reproducible_and_has_no_text_twice(count: int, sample: int) -> None:
    chosen = sample_of(count, sample).tolist()
    assert len(chosen) == min(count, sample)
    assert sorted(set(chosen)) == chosen
    assert set(chosen) <= set(range(count))
    assert sample_of(count, sample).tolist() == chosen


# Long texts


class Counting:
    """A tokenizer that counts the characters of its inputs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.seen = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, text: str) -> Any:
        self.seen += len(text)
        return self.tokenizer.encode(text)

    def encode_batch(self, texts: list[str]) -> Any:
        self.seen += sum(map(len, texts))
        return self.tokenizer.encode_batch(texts)


def test_only_the_beginning_of_a_long_text_is_tokenised(tokenizer: Tokenizer) -> None:
    counting = Counting(tokenizer)
    texts = ["seven river " * 100_000, "river"]
    assert count_tokens(counting, texts, of=2).tokens == MAX_TOKENS + 3  # type: ignore[arg-type]
    assert counting.seen < 100 * MAX_TOKENS


HEADS = st.sampled_from(
    [
        "", " ", "  \n", "river", "seven", "naïve", "e", "\u0301", "\x00", "\x00 ", "漢字", "[SEP]", "[MASK]", "...",
        "x" * 200, "😀", "Σ", "\u200d", " " * 300, "\x01 " * 300,
    ]
)  # fmt: skip


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@pytest.mark.parametrize("between", [" ", "", "\n", "  "])
@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(st.tuples(HEADS, st.sampled_from([1, 1, 2, 50, 400])), max_size=12))
def test_a_shortened_text_has_the_tokens_of_the_whole_text(
    architecture: str, between: str, pieces: list[tuple[str, int]]
) -> None:
    tokenizer = tiny_tokenizer(architecture)
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    text = between.join(f"{piece}{between} " * times for piece, times in pieces)
    (found,) = token_ids(tokenizer, [text])
    assert found.tolist() == tokenizer.encode(text).ids
    assert count_tokens(tokenizer, [text], of=1).tokens == len(found)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("river " * (MAX_TOKENS - 2) + " " * 9999, 0, id="only spaces beyond the limit"),
        pytest.param("x" * 9999 + " river" * 99, 0, id="one long word is tokenised whole"),
        pytest.param("river " * 9999, 0.01, id="one word again and again"),
        pytest.param(" ".join(random.Random(3).choices(TEXTS, k=999)), 0.1, id="texts in random order"),  # noqa: S311
    ],
)
def test_cut_texts_are_exact_and_lost_tokens_are_close(tokenizer: Tokenizer, text: str, error: float) -> None:
    (true,) = naive_lost([text])
    found = count_tokens(tokenizer, [text], of=1)
    assert found.cut_texts == (true > 0)
    assert found.lost_tokens == pytest.approx(true, rel=error)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(["river", "seven", "naïve", "漢字", "x" * 70, "😀", " "]), max_size=150))
def test_chunks_contain_every_token_once_and_nothing_is_lost(architecture: str, words: list[str]) -> None:
    text, tokenizer = " ".join(words), tiny_tokenizer(architecture)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    whole = tokenizer.encode(text).ids
    tokenizer.enable_truncation(max_length=MAX_TOKENS)
    (found,) = text_tokens(tokenizer, [text], "pool")
    # BERT has one special token at each end, and the tiny Llama has none.
    first, last = special // 2, special - special // 2
    content = [token for chunk in found.chunks for token in chunk.tolist()[first : len(chunk) - last]]
    assert content == whole[first : len(whole) - last]
    assert all(len(chunk) == MAX_TOKENS for chunk in found.chunks[:-1])
    assert len(found.chunks[-1]) <= MAX_TOKENS
    counted = count_tokens(tokenizer, [text], of=1, long_texts="pool")
    assert counted == TokenCount(sum(map(len, found.chunks)), cut_texts=0, lost_tokens=0)
    (cut,) = text_tokens(tokenizer, [text])
    assert cut.chunks[0].tolist() == found.chunks[0].tolist()
    assert (cut.lost > 0) == (len(found.chunks) > 1)


def test_cut_texts_of_a_sample_are_scaled_to_all_texts(tokenizer: Tokenizer) -> None:
    texts = random.Random(2).choices([*TEXTS, "river " * 30], k=2500)  # noqa: S311 - no secret
    found, lost = estimate(tokenizer, texts, 1000), naive_lost(texts)
    assert found.cut_texts == pytest.approx(sum(map(bool, lost)), rel=0.2)
    assert found.lost_tokens == pytest.approx(sum(lost), rel=0.2)


@pytest.mark.parametrize("kind", ["added token with a space", "other words", "other normalizer", "left"])
def test_a_text_is_not_shortened_if_its_first_tokens_depend_on_the_rest(kind: str) -> None:
    tokenizer = tiny_tokenizer("bert")
    tokenizer.enable_truncation(max_length=8, direction="left" if kind == "left" else "right")
    if kind == "added token with a space":
        tokenizer.add_tokens(["seven river"])
    if kind == "other words":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("river river"), "isolated")
    if kind == "other normalizer":
        tokenizer.normalizer = normalizers.Replace(Regex("river .*"), "")
    counting = Counting(tokenizer)
    text = "seven river " * 1000
    assert count_tokens(counting, [text], of=1).tokens == len(tokenizer.encode(text).ids)  # type: ignore[arg-type]
    assert counting.seen == len(text)

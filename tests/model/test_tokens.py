"""Token counts: exact for few texts, close for many, and the same tokens that the encoder will see."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import MAX_TOKENS, TEXTS, save_tiny_backbone, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from pipeline.model.tokens import count_tokens, load_tokenizer
from pipeline.storage import Storage

LONG = "river " * 500


@pytest.fixture(scope="module")
def bundle_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with nothing of a bundle but its backbone."""
    folder = tmp_path_factory.mktemp("bundle")
    save_tiny_backbone(folder / "backbone")
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(bundle_uri: str) -> Tokenizer:
    return load_tokenizer(Storage(), bundle_uri, MAX_TOKENS)


def test_ids_are_those_of_transformers_truncated_with_special_tokens(tokenizer: Tokenizer, bundle_uri: str) -> None:
    reference = AutoTokenizer.from_pretrained(str(Path(bundle_uri) / "backbone"))
    for text in [*TEXTS, "", " ", "naïve 😀", LONG]:
        expected = reference(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        assert tokenizer.encode(text).ids == expected
    assert len(tokenizer.encode(LONG).ids) == MAX_TOKENS
    assert tokenizer.encode(LONG).ids[-1] == tokenizer.token_to_id("[SEP]")


def test_a_batch_is_not_padded(tokenizer: Tokenizer) -> None:
    short, long = tokenizer.encode_batch(["river", LONG])
    assert len(short.ids) == 3 < len(long.ids)


def test_the_bundles_own_padding_and_truncation_do_not_count(tmp_path: Path) -> None:
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


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=80), max_size=20))
def test_few_texts_are_counted_exactly(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert count_tokens(tokenizer, texts, sample=20) == (naive_count(texts), True)


def test_no_text_costs_nothing(tokenizer: Tokenizer) -> None:
    assert count_tokens(tokenizer, [], sample=10) == (0, True)


def test_truncated_text_counts_what_is_encoded(tokenizer: Tokenizer) -> None:
    assert count_tokens(tokenizer, [LONG] * 3, sample=10) == (3 * MAX_TOKENS, True)


@pytest.mark.parametrize("sample", [100, 333, 1000])
def test_an_estimate_from_a_sample_is_close_and_says_that_it_is_one(tokenizer: Tokenizer, sample: int) -> None:
    texts = random.Random(0).choices(TEXTS, k=2500)  # noqa: S311 - no secret
    estimate, exact = count_tokens(tokenizer, texts, sample=sample)
    assert not exact
    assert estimate == pytest.approx(naive_count(texts), rel=0.1)


@pytest.mark.parametrize("sample", [10, 11, 99])
def test_an_estimate_over_texts_of_one_length_is_right(tokenizer: Tokenizer, sample: int) -> None:
    assert count_tokens(tokenizer, ["seven river"] * 100, sample=sample) == (400, False)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 300), sample=st.integers(1, 50))
def test_no_more_than_the_sample_is_tokenized(tokenizer: Tokenizer, count: int, sample: int) -> None:
    class Counting:
        """Stands in for the tokenizer and remembers how many texts it was given."""

        seen = 0

        def encode_batch(self, texts: list[str]) -> list[object]:
            Counting.seen = len(texts)
            return list(tokenizer.encode_batch(texts))

    count_tokens(Counting(), ["seven"] * count, sample=sample)  # type: ignore[arg-type]
    assert 1 <= Counting.seen <= sample

"""The words of the example shop, read from ``vocabulary.yaml``."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

Words = tuple[str, ...]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Style(_Entry):
    """The adjectives of a style, and sentences about an item of that style."""

    words: Words
    sentences: Words


class Kind(_Entry):
    """Similar articles: their names, materials and sizes, and sentences about their features."""

    nouns: Words
    materials: Words
    sizes: Words
    features: Words


class Department(_Entry):
    """A top-level category: sentences about all of its articles, and its kinds by name."""

    features: Words
    kinds: dict[str, Kind]


class Vocabulary(_Entry):
    """All words and sentences; ``vocabulary.yaml`` explains each list."""

    styles: dict[str, Style]
    prices: dict[str, Words]
    price_sentences: Words
    uses: dict[str, Words]
    use_sentences: Words
    titles: Words
    phrases: Words
    leads: Words
    generic: Words
    bullets: Words
    edit_titles: Words
    edit_sentences: Words
    colours: Words
    towns: Words
    models: Words
    brands: Words
    emoji: Words
    departments: dict[str, Department]


@cache
def vocabulary() -> Vocabulary:
    """The vocabulary; the file is read at the first call only."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return Vocabulary.model_validate(yaml.safe_load(text))

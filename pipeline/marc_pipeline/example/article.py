"""One article of the example shop: its traits, title and description."""

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from marc_pipeline.example.vocabulary import Style, vocabulary

T = TypeVar("T")


class Item(NamedTuple):
    """One row of the catalogue; the fields are the columns of the file, in order."""

    item_id: str
    title: str
    brand: str
    category: str
    description: str
    updated_at: str


class Traits(NamedTuple):
    """The words that fill an item's sentences."""

    noun: str
    adj: str
    material: str
    colour: str
    size: str
    use: str
    town: str
    number: int


class Dice:
    """Seeded draws, made in blocks: a scalar draw from numpy takes twenty times as long."""

    def __init__(self, *key: int) -> None:
        self._rng = np.random.default_rng(key)
        self._draws: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._draws:
            self._draws = self._rng.random(4096).tolist()
        return self._draws.pop()

    def below(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self.uniform() * stop)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each as likely as the others."""
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """``count`` different options (all of them where there are fewer), in random order."""
        pool = list(options)
        for position in range(min(count, len(pool))):
            other = position + self.below(len(pool) - position)
            pool[position], pool[other] = pool[other], pool[position]
        return pool[:count]


def invent(dice: Dice, *, item_id: str, updated_at: str) -> Item:
    """An invented article of the shop."""
    words = vocabulary()
    departments = tuple(words.departments)
    # The smaller of two draws: the first departments get more articles.
    name = departments[min(dice.below(len(departments)), dice.below(len(departments) + 4))]
    department = words.departments[name]
    kind_name = dice.pick(tuple(department.kinds))
    kind = department.kinds[kind_name]
    style = words.styles[dice.pick(tuple(words.styles))]
    traits = Traits(
        noun=dice.pick(kind.nouns),
        adj=dice.pick(style.words),
        material=dice.pick(kind.materials),
        colour=dice.pick(words.colours),
        size=dice.pick(kind.sizes),
        use=dice.pick(words.uses[dice.pick(tuple(words.uses))]),
        town=dice.pick(words.towns),
        number=1000 + dice.below(9000),
    )
    brand = "" if dice.uniform() < 0.08 else dice.pick(words.brands)
    title = _title(traits, brand=brand, dice=dice)
    description = _description(traits, style=style, features=kind.features + department.features, dice=dice)
    return Item(item_id, title, brand, f"{name} > {kind_name}", description, updated_at)


def _title(traits: Traits, *, brand: str, dice: Dice) -> str:
    """A title as shops write them; it always names the style and the kind."""
    words = vocabulary()
    fields = {"model": dice.pick(words.models), "brand": brand, **traits._asdict()}
    title = _capitalised(dice.pick(words.titles).format_map(fields).strip())
    return f"{title} {dice.pick(words.emoji)}" if dice.uniform() < 0.01 else title


def _description(traits: Traits, *, style: Style, features: tuple[str, ...], dice: Dice) -> str:
    """One short phrase, a few sentences or, rarely, several hundred words."""
    words = vocabulary()
    fields = traits._asdict() | {
        "Adj": _capitalised(traits.adj),
        "Noun": _capitalised(traits.noun),
        "Material": _capitalised(traits.material),
        "price": dice.pick(words.prices[dice.pick(tuple(words.prices))]),
    }
    length = dice.uniform()
    if length < 0.10:
        return dice.pick(words.phrases).format_map(fields)
    told = [dice.pick(style.sentences), dice.pick(words.price_sentences), dice.pick(words.use_sentences)]
    # What users judge comes first, then features; generic sentences make long texts longer.
    specific = dice.sample(told, 3) + dice.sample(features, 3)
    lead = dice.pick(words.leads)
    if length < 0.84:
        sentences = [lead, *specific[: 1 + dice.below(3)]]
    elif length < 0.96:
        sentences = [lead, *specific, *dice.sample(words.generic, dice.below(5))]
    else:
        sentences = [lead, *specific, *dice.sample(words.generic, 4 + dice.below(len(words.generic) - 3))]
    written = [sentence.format_map(fields) for sentence in sentences]
    text = " ".join(written) if length < 0.96 else _article(written, [b.format_map(fields) for b in words.bullets])
    return f"{text} {dice.pick(words.emoji)}" if dice.uniform() < 0.04 else text


def _article(sentences: list[str], bullets: list[str]) -> str:
    """A long description: paragraphs of four sentences with a list after the first."""
    rest = iter(sentences)
    paragraphs = []
    while paragraph := " ".join(islice(rest, 4)):
        paragraphs.append(paragraph)
    facts = "\n".join(f"- {bullet}" for bullet in bullets)
    return "\n\n".join([paragraphs[0], facts, *paragraphs[1:]])


def _capitalised(text: str) -> str:
    """The text with its first letter in upper case; the other letters stay as they are."""
    return text[:1].upper() + text[1:]

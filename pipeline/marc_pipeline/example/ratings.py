"""The example shop's ratings: seeded users whose tastes follow the texts of the items."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.errors import UserError
from marc_pipeline.example.article import Item
from marc_pipeline.example.shop import read_good_items
from marc_pipeline.example.vocabulary import Words, vocabulary
from marc_pipeline.storage import Storage

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

INTERACTIONS_END: Final = datetime(2026, 11, 1, tzinfo=UTC)
INTERACTIONS_DAYS: Final = 365
MEAN_INTERACTIONS, FEWEST_INTERACTIONS, MOST_INTERACTIONS = 40, 5, 400

INTERACTIONS: Final = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("rating", pa.float32(), nullable=False),
        pa.field("timestamp", pa.timestamp("us", tz="UTC"), nullable=False),
    ]
)
"""One row per rating, sorted by time."""


def write_interactions(path: Path, catalogue: Path, *, users: int = 600, seed: int = 7) -> Path:
    """Write the ratings of invented users as Parquet (``INTERACTIONS``); an existing file is kept.

    A rating depends on the user's taste, the item's quality and chance. Tastes are about the categories, styles, prices
    and uses that the item's text names. A user rates an item at most once. Users rate about 40 items on average and
    never more than half of the catalogue. Popularity has a long tail; at least one item in twelve is never rated.

    Args:
        path: file to write.
        catalogue: a file that ``write_catalogue`` wrote.
        users: number of users, at least 1.
        seed: the same seed, users and catalogue give the same bytes.

    Raises:
        UserError: the catalogue does not exist, or ``users`` is below 1.
    """
    if path.exists():
        return path
    if users < 1:
        raise UserError(f"{users} users have no ratings; ask for 1 or more")
    if not catalogue.is_file():
        raise UserError(f"no catalogue at {catalogue}; write it first with write_catalogue")
    table = _interactions(read_good_items(catalogue), users=users, seed=seed)
    storage = Storage()
    with storage.staged(str(path)) as staged:
        pq.write_table(table, staged, compression="zstd")
        storage.publish(staged, str(path))
    return path


def _interactions(items: list[Item], *, users: int, seed: int) -> pa.Table:
    """All ratings in order of time."""
    rng = np.random.default_rng((seed, users))
    attributes = _attributes(items)
    quality = rng.normal(0.0, 0.35, len(items))
    popularity = _log_popularity(rng, len(items))
    counts = _counts(rng, users, limit=int(np.isfinite(popularity).sum()) // 2)
    chosen, ratings = [], []
    for count in counts.tolist():
        liking = _liking(rng, attributes)
        # Gumbel noise and the largest keys: a weighted draw without replacement. Taste changes the weights.
        keys = popularity + 0.5 * liking + rng.gumbel(size=len(items))
        rated = np.argsort(-keys, kind="stable")[:count]
        opinion = 3.4 + liking[rated] + quality[rated] + rng.normal(0.0, 0.6, count)
        chosen.append(rated)
        ratings.append(np.clip(np.round(opinion * 2) / 2, 0.5, 5.0))
    user, item, rating = np.repeat(np.arange(users), counts), np.concatenate(chosen), np.concatenate(ratings)
    seconds = rng.integers(0, INTERACTIONS_DAYS * 86_400, user.size)
    order = np.lexsort((item, user, seconds))
    start = np.datetime64((INTERACTIONS_END - timedelta(days=INTERACTIONS_DAYS)).replace(tzinfo=None), "us")
    columns = [
        pa.array([f"u{n + 1:05d}" for n in user[order].tolist()], pa.string()),
        pa.array([items[n].item_id for n in item[order].tolist()], pa.string()),
        pa.array(rating[order].astype(np.float32)),
        pa.array(start + seconds[order].astype("timedelta64[s]"), pa.timestamp("us", tz="UTC")),
    ]
    return pa.table(columns, schema=INTERACTIONS)


def _log_popularity(rng: np.random.Generator, count: int) -> Floats:
    """Log-popularity of every item: Zipf's law in random order, −∞ for one item in twelve."""
    popularity = -0.8 * np.log1p(rng.permutation(count).astype(np.float64))
    popularity[rng.permutation(count)[: count // 12]] = -np.inf
    return popularity


def _counts(rng: np.random.Generator, users: int, *, limit: int) -> Ints:
    """Ratings per user: log-normal around the mean, at most ``limit``."""
    sigma = 0.8
    counts = rng.lognormal(np.log(MEAN_INTERACTIONS) - sigma**2 / 2, sigma, users).round().astype(np.int64)
    return np.minimum(np.clip(counts, FEWEST_INTERACTIONS, MOST_INTERACTIONS), limit)


def _liking(rng: np.random.Generator, attributes: list[tuple[Ints, float]]) -> Floats:
    """How much one user likes every item: the sum of the user's tastes for the values of its attributes."""
    total = np.zeros(len(attributes[0][0]))
    for codes, spread in attributes:
        total += rng.normal(0.0, spread, int(codes.max()) + 1)[codes]
    return total


def _attributes(items: list[Item]) -> list[tuple[Ints, float]]:
    """For each attribute: the value that each item's text names, as a code, and the spread of the users' tastes."""
    words, texts = vocabulary(), [f"{item.title} {item.description}".lower() for item in items]
    styles = {name: style.words for name, style in words.styles.items()}
    return [
        (_codes([item.category.partition(" > ")[0] for item in items]), 0.65),
        (_codes([item.category for item in items]), 0.35),
        (_codes([_named(text, styles) for text in texts]), 0.55),
        (_codes([_named(text, words.prices) for text in texts]), 0.25),
        (_codes([_named(text, words.uses) for text in texts]), 0.25),
    ]


def _named(text: str, wordings: Mapping[str, Words]) -> str:
    """The value that the text names first; empty if it names none."""
    found = [(text.find(word), value) for value, words in wordings.items() for word in words if word in text]
    return min(found, default=(0, ""))[1]


def _codes(values: list[str]) -> Ints:
    """Each value as a number from 0, in alphabetical order."""
    return np.unique(np.array(values), return_inverse=True)[1].astype(np.int64)

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
DEPARTMENT_TASTE, STYLE_TASTE, USE_TASTE, PRICE_TASTE = 0.6, 1.0, 0.5, 0.5
"""Spread of the users' tastes. The style weighs most: it is a few words of a text, so a PCA of hidden states, which
follows departments and kinds, sees little of it."""
FASHION: Final = 0.4
"""Correlation of a taste with the fashion that all users share; it gives a training its first steps."""
MEAN_OPINION, QUALITY, CHANCE, PULL = 3.2, 0.1, 0.4, 0.5
"""A rating before taste; spread of the items' quality and of chance; weight of taste in which items a user rates."""
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


def write_interactions(path: Path, catalogue: Path, *, users: int = 500, seed: int = 7) -> Path:
    """Write the ratings of invented users as Parquet (``INTERACTIONS``); an existing file is kept.

    A rating depends on the user's taste, the item's quality and chance. Tastes are about the departments, styles, uses
    and prices that the item's text names. They differ between users, and follow a common fashion a little. A user who
    likes a style or a use also likes similar ones, and dislikes the opposite. A user rates an item at most once. Users
    rate about 40 items on average and never more than half of the catalogue. Popularity has a long tail; at least one
    item in twelve is never rated.

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
    axes = _taste_axes(items)
    quality = rng.normal(0.0, QUALITY, len(items))
    popularity = _log_popularity(rng, len(items))
    counts = _counts(rng, users, limit=int(np.isfinite(popularity).sum()) // 2)
    fashion = rng.standard_normal(axes.shape[1])
    chosen, ratings = [], []
    for count in counts.tolist():
        own = rng.standard_normal(axes.shape[1])
        liking = axes @ (FASHION * fashion + np.sqrt(1 - FASHION**2) * own)
        # Users would otherwise differ in how generous they are, and their ids alone would predict clicks.
        liking -= np.average(liking, weights=np.exp(popularity))
        # Gumbel noise and the largest keys: a weighted draw without replacement. Taste changes the weights.
        keys = popularity + PULL * liking + rng.gumbel(size=len(items))
        rated = np.argsort(-keys, kind="stable")[:count]
        opinion = MEAN_OPINION + liking[rated] + quality[rated] + rng.normal(0.0, CHANCE, count)
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


def _taste_axes(items: list[Item]) -> Floats:
    """Position of every item on the axes of taste [items, axes], scaled with the spread of the users' tastes.

    Departments have one axis each. Styles and uses lie on a circle of two axes, prices on a line. A style, use or price
    that the text does not name is in the middle.
    """
    words, texts = vocabulary(), [f"{item.title} {item.description}".lower() for item in items]
    styles = {name: style.words for name, style in words.styles.items()}
    departments = list(words.departments)
    department = [departments.index(item.category.partition(" > ")[0]) for item in items]
    return np.hstack(
        [
            DEPARTMENT_TASTE * np.eye(len(departments))[department],
            STYLE_TASTE * _circle(len(styles))[_named(texts, styles)],
            USE_TASTE * _circle(len(words.uses))[_named(texts, words.uses)],
            PRICE_TASTE * _line(len(words.prices))[_named(texts, words.prices)],
        ]
    )


def _circle(count: int) -> Floats:
    """Equally spaced points on a circle [count, 2], and its centre as the last row."""
    angles = 2 * np.pi * np.arange(count) / count
    return np.vstack([np.column_stack([np.cos(angles), np.sin(angles)]), np.zeros(2)])


def _line(count: int) -> Floats:
    """Equally spaced points from −1 to 1 [count, 1], and 0 as the last row."""
    return np.append(np.linspace(-1, 1, count), 0.0)[:, None]


def _named(texts: list[str], wordings: Mapping[str, Words]) -> Ints:
    """Number of the value that each text names first [texts]; −1, for the middle, if it names none."""
    numbered = [(number, word) for number, words in enumerate(wordings.values()) for word in words]
    found = ([(text.find(word), number) for number, word in numbered if word in text] for text in texts)
    return np.array([min(places, default=(0, -1))[1] for places in found])

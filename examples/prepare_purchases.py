"""Turn a shop's export into a catalogue and interactions: Amazon's product metadata and reviews of 2018.

    python examples/prepare_purchases.py meta_Luxury_Beauty.json.gz Luxury_Beauty_5.json.gz --out data/beauty

A verified review counts as a purchase. Purchases are positives only, but a click model needs both labels: the
script draws one negative for each purchase, an item that the user never bought, with the same timestamp.
"""

import argparse
import gzip
import html
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Purchase = tuple[str, str, int]


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a gzip file, one per line."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def text(value: str | list[str] | None) -> str:
    """Plain text of a field that may be a list, with HTML entities decoded."""
    parts = value if isinstance(value, list) else [value or ""]
    return html.unescape(" ".join(parts)).strip()


def items(path: Path) -> dict[str, dict[str, str]]:
    """Items by id; the first record of an id counts."""
    found: dict[str, dict[str, str]] = {}
    for record in records(path):
        fields = {name: text(record.get(name)) for name in ("title", "brand", "category", "description")}
        found.setdefault(record["asin"], {"item_id": record["asin"], **fields})
    return found


def purchases(path: Path, known: set[str]) -> list[Purchase]:
    """User, item and time of every verified review of a known item, each pair once."""
    found: dict[tuple[str, str], int] = {}
    for record in records(path):
        if record.get("verified") and record["asin"] in known:
            found.setdefault((record["reviewerID"], record["asin"]), int(record["unixReviewTime"]))
    return [(user, item, when) for (user, item), when in found.items()]


def with_negatives(bought: list[Purchase], ids: list[str], *, seed: int) -> pa.Table:
    """Every purchase as 1, and one item that its user never bought, if there is one, as 0."""
    owned: defaultdict[str, set[str]] = defaultdict(set)
    for user, item, _ in bought:
        owned[user].add(item)
    draw = random.Random(seed)
    rows = []
    for user, item, when in bought:
        rows.append((user, item, when, 1))
        if len(owned[user]) == len(ids):
            continue  # the user bought every item: there is no negative
        while (other := draw.choice(ids)) in owned[user]:
            pass
        rows.append((user, other, when, 0))
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(("user_id", "item_id", "timestamp", "bought"), map(list, columns), strict=True)))


def main() -> None:
    """Write ``items.jsonl`` and ``interactions.parquet``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metadata", type=Path, help="meta_….json.gz: one product a line")
    parser.add_argument("reviews", type=Path, help="…_5.json.gz: one review a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the negatives (default: %(default)s)")
    given = parser.parse_args()
    catalogue = items(given.metadata)
    bought = purchases(given.reviews, set(catalogue))
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in catalogue.values())
    interactions = with_negatives(bought, sorted(catalogue), seed=given.seed)
    pq.write_table(interactions, given.out / "interactions.parquet")
    print(f"{len(catalogue)} items, {len(bought)} purchases, {len(interactions)} interactions in {given.out}")


if __name__ == "__main__":
    main()

"""Turn a shop's export into a catalogue and purchases: Amazon's product metadata and reviews of 2018.

    python examples/prepare_purchases.py meta_Luxury_Beauty.json.gz Luxury_Beauty_5.json.gz --out data/beauty

A verified review counts as a purchase.
"""

import argparse
import gzip
import html
import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


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


def purchases(path: Path, known: Container[str]) -> pa.Table:
    """User, item and time of every verified review of a known item."""
    bought = [record for record in records(path) if record.get("verified") and record["asin"] in known]
    names = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime"}
    return pa.table({name: [record[field] for record in bought] for name, field in names.items()})


def main() -> None:
    """Write ``items.jsonl`` and ``purchases.parquet``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metadata", type=Path, help="meta_….json.gz: one product a line")
    parser.add_argument("reviews", type=Path, help="…_5.json.gz: one review a line")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    given = parser.parse_args()
    catalogue = items(given.metadata)
    bought = purchases(given.reviews, catalogue)
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in catalogue.values())
    pq.write_table(bought, given.out / "purchases.parquet")
    print(f"{len(catalogue)} items, {len(bought)} purchases in {given.out}")


if __name__ == "__main__":
    main()

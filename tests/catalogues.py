"""Catalogues that tests make of generated ones."""

import csv
from pathlib import Path


def corrected(catalogue: Path) -> Path:
    """The same beside it, with other titles."""
    path, encoding = catalogue.with_name("corrected.csv"), {"encoding": "utf-8", "errors": "surrogateescape"}
    with catalogue.open(**encoding, newline="") as old, path.open("w", **encoding, newline="") as new:
        header, *rows = csv.reader(old)
        title = header.index("title")
        for row in rows:
            row[title] += " (corrected)" if row[title].strip() else ""
        csv.writer(new).writerows([header, *rows])
    return path

"""The scripts of examples/ run as their docstrings describe."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from published import Site, items

FAKE = """#!/bin/sh
echo "$@" >> calls
case "$*" in
  *train*) exit {train} ;;
esac
code=$(head -n 1 codes); sed -i 1d codes
echo '{{"release_id": "r1", "items": 7, "encoded": 3}}'
exit "$code"
"""


def run(repository: Path, script: str, *arguments: str, cwd: Path, path: str = "") -> tuple[int, str]:
    """Exit code and output of an example; its PATH begins with ``path``."""
    command = [sys.executable, str(repository / "examples" / script), *arguments]
    env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=env)
    return done.returncode, done.stdout + done.stderr


def test_each_docstring_shows_the_command(repository: Path) -> None:
    scripts = sorted((repository / "examples").glob("*.py"))
    assert len(scripts) == 3
    for script in scripts:
        assert f"python examples/{script.name} " in script.read_text().split('"""')[1]


def test_a_ranker_reads_a_release(repository: Path, tmp_path: Path) -> None:
    Site(tmp_path).publish(items(40))
    code, said = run(repository, "read_release.py", str(tmp_path / "item_vectors"), "-k", "3", cwd=tmp_path)
    assert code == 0, said
    assert "vectors (2, 8), norms [1.0, 1.0]" in said
    assert len(re.findall(r"^item-\d+ -> (item-\d+ -?\d\.\d{3}(, )?){3}$", said, re.MULTILINE)) == 2
    assert "40 rows in shuffled batches" in said


@pytest.mark.parametrize(
    ("train", "codes", "code", "runs"),
    [(0, [0], 0, 1), (0, [4, 0], 0, 2), (0, [4, 4, 4], 4, 3), (0, [3], 3, 1), (0, [1], 1, 1), (2, [], 2, 0)],
)
def test_a_night_without_airflow_acts_on_exit_codes(
    repository: Path, tmp_path: Path, train: int, codes: list[int], code: int, runs: int
) -> None:
    fake = tmp_path / "bin" / "marc"
    fake.parent.mkdir()
    fake.write_text(FAKE.format(train=train))
    fake.chmod(0o755)
    (tmp_path / "codes").write_text("".join(f"{one}\n" for one in codes))
    ended, said = run(repository, "run_night.py", "--ds", "2026-11-20", cwd=tmp_path, path=str(fake.parent))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ended == code, said
    assert calls[0] == "--config marc.yaml train --if-none --ds 2026-11-20 --json"
    assert calls[1:] == ["--config marc.yaml run --ds 2026-11-20 --json"] * runs
    assert ("release r1: 7 items, 3 texts encoded" in said) == (code == 0)


def test_a_shops_export_becomes_a_catalogue_and_purchases(repository: Path, tmp_path: Path) -> None:
    products = [
        {"asin": "a", "title": "Soap &amp; oil", "description": ["One.", "Two."]},
        {"asin": "b", "title": "Mask", "brand": "Maison"},
        {"asin": "b", "title": "A second record of b"},
        {"asin": "c", "title": None},
    ]
    reviews = [
        {"reviewerID": "u", "asin": "a", "verified": True, "unixReviewTime": 5},
        {"reviewerID": "u", "asin": "a", "verified": True, "unixReviewTime": 9},
        {"reviewerID": "u", "asin": "b", "verified": False, "unixReviewTime": 6},
        {"reviewerID": "v", "asin": "unknown", "verified": True, "unixReviewTime": 7},
        *({"reviewerID": "w", "asin": item, "verified": True, "unixReviewTime": 8} for item in "abc"),
    ]
    for name, rows in (("meta", products), ("reviews", reviews)):
        with gzip.open(tmp_path / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    files = ("meta.json.gz", "reviews.json.gz", "--out", "data/shop")
    done = run(repository, "prepare_purchases.py", *files, cwd=tmp_path)
    assert done == (0, "3 items, 5 purchases in data/shop\n")
    found = [json.loads(line) for line in (tmp_path / "data" / "shop" / "items.jsonl").read_text().splitlines()]
    assert found[0] == {"item_id": "a", "title": "Soap & oil", "brand": "", "category": "", "description": "One. Two."}
    assert [(item["item_id"], item["title"]) for item in found[1:]] == [("b", "Mask"), ("c", "")]
    rows = pq.read_table(tmp_path / "data" / "shop" / "purchases.parquet")
    assert rows.column_names == ["user_id", "item_id", "timestamp"]
    bought = [tuple(row.values()) for row in rows.to_pylist()]
    assert bought == [("u", "a", 5), ("u", "a", 9), ("w", "a", 8), ("w", "b", 8), ("w", "c", 8)]

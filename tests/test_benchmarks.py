"""The benchmarks of the encoder and the worker are commands that work, on a handful of texts."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def figures(command: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark measures on a small catalogue."""
    with (folder / "netflix_titles.csv").open("w", newline="") as file:
        rows = [
            ("title", "description"),
            *((f"Title {n}", f"A story about {n} rivers and {n * n} moons") for n in range(80)),
        ]
        csv.writer(file).writerows(rows)
    found = folder / "figures.json"
    subprocess.run(
        [sys.executable, str(command), "--data", str(folder), "--json", str(found), "--runs", "1", *arguments],
        check=True,
        env={**os.environ, "PYTHONPATH": str(command.parents[2])},
    )
    content: dict[str, Any] = json.loads(found.read_text())
    return content


def test_the_encoder_beside_its_peers(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="the reference of this benchmark")
    command = repository / "tests" / "benchmarks" / "encode.py"
    options = ("--items", "100", "--layers", "2,1", "--only", "ours,its default")
    tables = figures(command, tmp_path, *options)["tables"]
    assert [(table["layers"], table["texts"]) for table in tables] == [
        (layers, texts) for layers in (2, 1) for texts in ("netflix", "long-tail")
    ]
    for table in tables:
        names = [system["name"] for system in table["systems"]]
        assert "ours, float32" in names
        assert len(names) in (2, 3)
        assert all(system["texts_per_second"] > 0 and system["cosine"] > 0.99 for system in table["systems"])


@pytest.mark.spark
def test_the_worker(repository: Path, tmp_path: Path) -> None:
    command = repository / "tests" / "benchmarks" / "worker.py"
    options = ("--items", "200", "--layers", "1", "--memory", "--memory-rows", "100,200")
    found = figures(command, tmp_path, *options)
    (bucket,) = found["bucket"]
    assert bucket["texts"] == 200
    model = bucket["parts"]["model"] + bucket["parts"]["pool, compress"]
    assert model + bucket["alone"] == pytest.approx(bucket["seconds"])
    assert bucket["parts"]["tokenise"] > 0
    assert bucket["parts"]["write"] > 0
    assert all(seconds > 0 for way in found["buckets"] for seconds in way["seconds"])
    assert all(megabytes > 0 for megabytes in found["memory_mb"].values())

"""The benchmarks are commands that work, on a handful of texts."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rated_shop import DS
from tiny_models import save_tiny_backbone
from training_world import make_world

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
    assert all(bucket["parts"][name] > 0 for name in ("tokenise", "for tokens", "write"))
    assert all(seconds > 0 for way in found["buckets"] for seconds in way["seconds"])
    assert all(megabytes > 0 for megabytes in found["memory_mb"].values())


def test_the_memory_of_layers(repository: Path, tmp_path: Path) -> None:
    command, found = repository / "tests" / "benchmarks" / "layer_memory.py", tmp_path / "figures.json"
    sizes = {"layers": 2, "texts": 50, "width": 16, "block": 20, "views": 2, "tokens": 4}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, str(command), *options, "--json", str(found)], check=True, env=environment)
    figures = json.loads(found.read_text())
    assert [layer["texts"] for layer in figures["figures"]] == [50, 50, 50]
    assert figures["peak_mb"] >= figures["before_mb"] > 0
    assert figures["held_mb"] * 2**20 == 3 * 50 * (1 + 2) * 16 * 4


def test_reading(repository: Path, tmp_path: Path) -> None:
    command, found = repository / "tests" / "benchmarks" / "reading.py", tmp_path / "figures.json"
    options = ["--items=500", "--dim=8", "--buckets=2", "--asked=20", "--runs=2", "--json", str(found)]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, str(command), *options], check=True, env=environment)
    figures = json.loads(found.read_text())
    assert {len(runs) for runs in figures["seconds"].values()} == {2, 18}
    assert all(seconds > 0 for runs in figures["seconds"].values() for seconds in runs)
    assert figures["numpy_speed"] > 0


@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_the_precision_of_stored_vectors(repository: Path, tmp_path: Path) -> None:
    world = make_world(tmp_path, save_tiny_backbone(tmp_path / "backbone"))
    world.marc.json("train", "--ds", DS)
    command, found = repository / "tests" / "benchmarks" / "mantissa.py", tmp_path / "figures.json"
    options = ["--config", str(world.marc.config), "--ds", DS, "--bits", "23,10,1", "--seeds", "2"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, str(command), *options, "--json", str(found)], check=True, env=environment)
    whole, some, one = json.loads(found.read_text())
    assert [cost["bits"] for cost in (whole, some, one)] == [23, 10, 1]
    assert whole["recall"] == 1.0 >= some["recall"] > one["recall"] > 0
    assert whole["vector_bytes"] > some["vector_bytes"] > one["vector_bytes"] > 0
    assert all(cost["bytes_per_item"] > cost["vector_bytes"] and len(cost["aucs"]) == 2 for cost in (whole, some, one))


def test_the_index_beside_itself_patched(repository: Path, tmp_path: Path) -> None:
    command = repository / "tests" / "benchmarks" / "index_build.py"
    options = ("--items", "3000", "--dim", "16", "--repeats", "1", "--factory", "IVF32,Flat", "--patch", ".01")
    found = figures(command, tmp_path, *options)
    (ours,) = found["builders"]
    patched, anew = found["patch"]
    assert (patched["changed"], anew["changed"]) == (60, 0)
    for one in (ours, patched, anew):
        assert one["factory"] == "IVF32,Flat"
        assert all(seconds > 0 for seconds in one["seconds"])
        assert all(setting["recall"] >= 0.95 for setting in one["tuned"])
        assert one["typical"]["tuned one_by_one"] > 0

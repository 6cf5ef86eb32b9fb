"""Each benchmark is a command that prints one table with the processor's name; here each runs on a few inputs."""

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


@pytest.fixture
def catalogue(tmp_path: Path) -> str:
    """The option that names a folder with a small netflix_titles.csv."""
    with (tmp_path / "netflix_titles.csv").open("w", newline="") as file:
        rows = [(f"Title {n}", f"A story about {n} rivers and {n * n} moons") for n in range(80)]
        csv.writer(file).writerows([("title", "description"), *rows])
    return f"--data={tmp_path}"


def figures(repository: Path, folder: Path, script: str, *arguments: str) -> dict[str, Any]:
    """The JSON figures of a benchmark, which names cores and processor in its table."""
    found = folder / "figures.json"
    command = [sys.executable, str(repository / "tests" / "benchmarks" / script), *arguments, f"--json={found}"]
    path = os.pathsep.join(str(repository / name) for name in ("pipeline", "schemas"))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, Any] = json.loads(found.read_text())
    assert f"{content['cores']} cores of {content['cpu']}" in " ".join(done.stdout.split())
    return content


def test_import(repository: Path) -> None:
    """A renamed function is found by the default tests; the tables are slow."""
    folder = repository / "tests" / "benchmarks"
    names = sorted(path.stem for path in folder.glob("*.py"))
    path = os.pathsep.join(str(repository / name) for name in ("pipeline", "schemas", "tests/fixtures"))
    command = [sys.executable, "-c", f"import {', '.join(names)}"]
    subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, check=True)


@pytest.mark.slow
def test_encode(repository: Path, tmp_path: Path, catalogue: str) -> None:
    pytest.importorskip("sentence_transformers", reason="the reference of this benchmark")
    options = ("--items=60", "--layers=2,1", "--runs=1", "--only=marc,its default")
    tables = figures(repository, tmp_path, "encode.py", catalogue, *options)["tables"]
    assert [(table["layers"], table["texts"]) for table in tables] == [
        (layers, texts) for layers in (2, 1) for texts in ("netflix", "long-tail")
    ]
    for table in tables:
        names = [system["name"] for system in table["systems"]]
        assert "marc, float32" in names
        assert len(names) in (2, 3)
        assert all(system["texts_per_second"] > 0 and system["cosine"] > 0.99 for system in table["systems"])


@pytest.mark.slow
@pytest.mark.spark
def test_worker(repository: Path, tmp_path: Path, catalogue: str) -> None:
    options = ("--items=200", "--layers=1", "--runs=1", "--memory", "--memory-rows=100,200")
    found = figures(repository, tmp_path, "worker.py", catalogue, *options)
    (bucket,) = found["bucket"]
    assert bucket["texts"] == 200
    model = bucket["parts"]["model"] + bucket["parts"]["pool, compress"]
    assert model + bucket["alone"] == pytest.approx(bucket["seconds"])
    assert all(bucket["parts"][name] > 0 for name in ("tokenise", "for tokens", "write"))
    assert all(seconds > 0 for way in found["buckets"] for seconds in way["seconds"])
    assert all(megabytes > 0 for megabytes in found["memory_mb"].values())


@pytest.mark.slow
def test_layer_memory(repository: Path, tmp_path: Path) -> None:
    options = ("--layers=2", "--texts=50", "--width=16", "--block=20", "--views=2", "--tokens=4")
    found = figures(repository, tmp_path, "layer_memory.py", *options)
    assert [layer["texts"] for layer in found["figures"]] == [50, 50, 50]
    assert found["peak_mb"] >= found["before_mb"] > 0
    assert found["held_mb"] * 2**20 == 3 * 50 * (1 + 2) * 16 * 4


@pytest.mark.slow
def test_reading(repository: Path, tmp_path: Path) -> None:
    options = ("--items=500", "--dim=8", "--buckets=2", "--asked=20", "--runs=2")
    found = figures(repository, tmp_path, "reading.py", *options)
    assert {len(runs) for runs in found["seconds"].values()} == {2, 18}
    assert all(seconds > 0 for runs in found["seconds"].values() for seconds in runs)
    assert found["numpy_speed"] > 0


@pytest.mark.slow
@pytest.mark.spark
def test_plan(repository: Path, tmp_path: Path) -> None:
    found = figures(repository, tmp_path, "plan.py", "--rows=3000", "--buckets=4", "--runs=1", "--changed")
    write, first, again = (found[name][0] for name in ("Spark's plain write", "plan, first night", "plan, 1 % changed"))
    assert all(one["seconds"] > 0 and one["processor"] > 0 and one["jvm"] > 0 for one in (write, first, again))
    assert (write["facts"]["files"], first["facts"]["rows_read"]) == (4, 3000)
    assert first["facts"]["new"] == first["facts"]["items"] > 2900
    assert (again["facts"]["new"], 25 < again["facts"]["changed"] < 40) == (0, True)


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_mantissa(repository: Path, tmp_path: Path) -> None:
    world = make_world(tmp_path, save_tiny_backbone(tmp_path / "backbone"))
    world.marc.json("train", "--ds", DS)
    options = (f"--config={world.marc.config}", f"--ds={DS}", "--bits=23,10,1", "--seeds=2")
    whole, some, one = figures(repository, tmp_path, "mantissa.py", *options)["costs"]
    assert [cost["bits"] for cost in (whole, some, one)] == [23, 10, 1]
    assert whole["recall"] == 1.0 >= some["recall"] > one["recall"] > 0
    assert whole["vector_bytes"] > some["vector_bytes"] > one["vector_bytes"] > 0
    assert all(cost["bytes_per_item"] > cost["vector_bytes"] and len(cost["aucs"]) == 2 for cost in (whole, some, one))


@pytest.mark.slow
def test_index_build(repository: Path, tmp_path: Path, catalogue: str) -> None:
    options = ("--items=3000", "--dim=16", "--runs=1", "--factory=IVF32,Flat", "--patch=.01")
    found = figures(repository, tmp_path, "index_build.py", catalogue, *options)
    (marc,) = found["builders"]
    patched, rebuilt = found["patch"]
    assert (patched["changed"], rebuilt["changed"]) == (60, 0)
    for one in (marc, patched, rebuilt):
        assert one["factory"] == "IVF32,Flat"
        assert all(seconds > 0 for seconds in one["seconds"])
        assert all(setting["recall"] >= 0.95 for setting in one["tuned"])
        assert one["typical"]["tuned one_by_one"] > 0

"""A ranker's environment: the extra ``reader`` alone, in a fresh virtual environment."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from published import Site, items

pytestmark = [pytest.mark.slow, pytest.mark.environment, pytest.mark.timeout(600)]

NO_INDEX = ("Could not find a version", "ConnectionError", "Failed to establish", "No matching distribution")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The interpreter of the fresh environment."""
    folder = tmp_path_factory.mktemp("ranker") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    command = ["-m", "pip", "install", "--quiet", "-c", str(repository / "constraints.txt"), f"{repository}[reader]"]
    done = subprocess.run([str(interpreter), *command], capture_output=True, text=True, check=False)
    if done.returncode and any(sign in done.stderr for sign in NO_INDEX):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return interpreter


READ = """
import json, sys
from marc_pipeline.reader.release import open_release
release = open_release(sys.argv[1])
table = release.dataset().to_table(columns=["item_id", "vector"]).sort_by("item_id")
ids = table["item_id"].to_pylist()
vectors = release.vectors(ids[:3])
names, scores = release.search(vectors, k=2)
heavy = [m for m in ("torch", "pyspark", "airflow", "transformers", "pandas") if m in sys.modules]
missing = []
for name in ("torch", "pyspark", "airflow"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        missing.append(name)
answer = {"ids": ids, "vectors": vectors.tolist(), "names": names.tolist(), "heavy": heavy, "missing": missing}
print(json.dumps(answer))
"""


def test_the_reader_works_with_only_its_own_extra_installed(python: Path, tmp_path: Path) -> None:
    vectors = items(40)
    Site(tmp_path).publish(vectors)
    command = [str(python), "-c", READ, str(tmp_path / "item_vectors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ids"] == sorted(vectors)
    assert np.allclose(answer["vectors"], [vectors[item] for item in answer["ids"][:3]])
    assert [row[0] for row in answer["names"]] == answer["ids"][:3]
    assert answer["heavy"] == []
    assert answer["missing"] == ["torch", "pyspark", "airflow"]


def test_files_and_look_up_work_from_the_command_line_of_a_ranker(python: Path, tmp_path: Path) -> None:
    vectors = items(40)
    Site(tmp_path).publish(vectors)
    config = tmp_path / "marc.yaml"
    config.write_text(f'root: {tmp_path}\ncatalogue: {{uri: "none/{{ds}}.csv", template: "{{title}}"}}\n')
    marc = [str(python.parent / "marc"), "--config", str(config)]
    files = subprocess.run([*marc, "files"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert all(Path(line).is_file() for line in files.stdout.split())
    item = next(iter(vectors))
    command = [*marc, "lookup", "--item", item, "-k", "3", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    near = [row["item_id"] for row in json.loads(found.stdout)["neighbours"][0]]
    scores = {other: float(np.dot(vectors[item], vector)) for other, vector in vectors.items() if other != item}
    assert near == sorted(scores, key=lambda other: -scores[other])[:3]
    text = subprocess.run(
        [*marc, "lookup", "--text", "lamp"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (text.returncode, "marc-pipeline[model]" in text.stderr) == (2, True)

"""The shape of the project. The import layers are contracts in pyproject.toml, which `make check` runs."""

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "pipeline").rglob("*.py")) + sorted((ROOT / "schemas").rglob("*.py"))
DAGS = sorted((ROOT / "dags").glob("*.py"))
EDGE = ("cli", "jobs", "scheduler")
HEAVY = {"torch", "transformers", "pyspark", "sklearn", "mteb", "matplotlib"}


def test_modules_are_small_and_none_is_a_drawer() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in MODULES}
    assert [path for path, count in lines.items() if count > 400] == []
    assert median(lines.values()) < 150
    assert not {"utils", "helpers", "common", "misc"} & {
        part for path in MODULES for part in (path.stem, path.parent.name)
    }


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_hold_no_logic(path: Path) -> None:
    tree = ast.parse(path.read_text())
    logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try)
    assert not [node for node in ast.walk(tree) if isinstance(node, logic)]
    assert len(path.read_text().splitlines()) <= 6


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.name)
def test_dag_files_import_only_the_scheduler_package(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    ours = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and str(node.module).startswith("marc_")]
    assert ours
    assert all(str(name).startswith("marc_pipeline.scheduler.") for name in ours)


def test_only_the_edge_opens_storage() -> None:
    inner = [path for path in MODULES if not set(EDGE) & set(path.parts) and path.stem != "deployment"]
    assert [path for path in inner if "open_deployment" in path.read_text()] == []


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["marc_pipeline.reader", "marc_pipeline.cli"])
def test_reader_and_command_line_load_no_heavy_package(module: str) -> None:
    loaded = run_python(f"import sys, {module}; print(*{{m.split('.')[0] for m in sys.modules}})").split()
    assert not (HEAVY | {"airflow"}) & set(loaded)


@pytest.mark.airflow
@pytest.mark.parametrize("name", [path.stem for path in DAGS])
def test_dag_files_import_in_under_a_second_and_without_heavy_packages(name: str) -> None:
    # The time of importing Airflow is left out: the DAG processor has imported Airflow before.
    code = (
        "import sys, time; import airflow.sdk; sys.path.insert(0, 'dags'); started = time.perf_counter();"
        f"import {name}; print(time.perf_counter() - started, *{{m.split('.')[0] for m in sys.modules}})"
    )
    seconds, *loaded = run_python(code).split()[-10_000:]
    assert float(seconds) < 1.0
    assert not (HEAVY | {"faiss"}) & set(loaded)

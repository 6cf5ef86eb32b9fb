"""The import walls of the design: which room may import what, and that jobs and DAGs stay thin."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STAGES = {"plan", "encode", "audit", "index", "release", "reader", "retention"}
# Modules of one stage.
PARTS = {"plan_identity": "plan", "plan_bucket": "plan", "carried_vectors": "encode"}
EDGE = ("marc_pipeline.cli", "marc_pipeline.jobs", "marc_pipeline.scheduler")
FOUNDATIONS = {
    "errors", "config", "uris", "storage", "deployment", "integrity", "workspace", "feature_table", "release_log",
    "resources", "catalogue", "table_reader", "index_reader", "index_search", "neighbours", "table_file", "mapped_file",
    "plain_pages", "interactions", "training_set", "catalogue_text",
}  # fmt: skip
DRIVERS = {
    "run", "stages", "train", "training_run", "training_choices", "promotion", "layers", "cli", "session", "entry",
    "verify", "jobs", "scheduler",
}  # fmt: skip
HEAVY = {
    "torch": ("marc_pipeline.model",),
    "transformers": ("marc_pipeline.model",),
    "sklearn": ("marc_pipeline.model",),
    "safetensors": ("marc_pipeline.model",),
    "kornia": ("marc_pipeline.model",),
    "PIL": ("marc_pipeline.model",),
    "mteb": ("marc_pipeline.model",),
    "faiss": ("marc_pipeline.index", "marc_pipeline.index.files", "marc_pipeline.index.search"),
    "pyspark": ("marc_pipeline.spark.session",),
    "py4j": ("marc_pipeline.spark.session",),
    "airflow": ("marc_pipeline.scheduler", "dags"),
}


def modules() -> list[tuple[str, Path]]:
    found = [path for folder in ("schemas", "pipeline", "jobs", "dags") for path in (ROOT / folder).rglob("*.py")]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in found]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports at any depth, what is imported for type checking only left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        pending += ast.iter_child_nodes(node)


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_heavy_packages_are_imported_only_where_the_design_allows_them(name: str, path: Path) -> None:
    for imported in imports(path):
        package = imported.split(".")[0]
        allowed = HEAVY.get(package, (name,))
        assert name.startswith(allowed), f"{name} imports {imported}; only {allowed} may"


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_run_one_way(name: str, path: Path) -> None:
    parts = name.split(".")
    for imported in imports(path):
        target = imported.split(".")
        if target[0] != "pipeline" or len(target) < 2:
            continue
        assert parts[0] != "schemas", f"{name} imports {imported}: the contracts know nothing of the pipeline"
        own, other = (PARTS.get(room, room) for room in (parts[1] if len(parts) > 1 else "", target[1]))
        if parts[0] == "pipeline" and own in STAGES:
            assert other not in (STAGES - {own}) | DRIVERS, f"stage {own} imports {imported}"
        if parts[0] == "pipeline" and own in FOUNDATIONS | {"model"}:
            assert other not in STAGES | DRIVERS, f"{name} imports {imported}: the way goes down only"


def test_no_room_is_a_drawer() -> None:
    drawers = {"utils", "helpers", "common", "misc"}
    assert not [name for name, _ in modules() if drawers & set(name.split("."))]


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.name)
def test_jobs_hold_no_logic(path: Path) -> None:
    tree = ast.parse(path.read_text())
    logic = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try)
    assert not [node for node in ast.walk(tree) if isinstance(node, logic)]
    assert len(path.read_text().splitlines()) <= 6


@pytest.mark.parametrize("path", sorted((ROOT / "dags").glob("*.py")), ids=lambda path: path.name)
def test_dag_files_import_only_the_scheduler_package(path: Path) -> None:
    ours = [name for name in imports(path) if name.split(".")[0] in {"pipeline", "schemas", "jobs"}]
    assert ours
    assert all(name.startswith("marc_pipeline.scheduler.") for name in ours)


@pytest.mark.parametrize(("name", "path"), modules(), ids=[name for name, _ in modules()])
def test_only_the_edge_opens_storage(name: str, path: Path) -> None:
    """Command line, jobs and scheduler open it once and pass it down."""
    if name != "marc_pipeline.deployment" and not name.startswith(EDGE):
        assert "open_deployment" not in path.read_text()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_reader_loads_no_heavy_package() -> None:
    loaded = run_python(
        "import sys, marc_pipeline.reader.release; print(*{m.split('.')[0] for m in sys.modules})"
    ).split()
    assert not {"torch", "transformers", "pyspark", "airflow", "sklearn"} & set(loaded)


def test_the_command_line_opens_without_heavy_packages() -> None:
    loaded = run_python("import sys, marc_pipeline.cli.app; print(*{m.split('.')[0] for m in sys.modules})").split()
    assert not {"torch", "transformers", "pyspark", "airflow", "sklearn", "mteb", "matplotlib"} & set(loaded)


@pytest.mark.airflow
@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "dags").glob("*.py"))])
def test_dag_files_import_in_under_a_second_and_without_heavy_packages(name: str) -> None:
    # What airflow itself costs is not the file's: it is there when the DAG processor parses.
    code = (
        "import sys, time; import airflow.sdk; sys.path.insert(0, 'dags'); started = time.perf_counter();"
        f"import {name}; print(time.perf_counter() - started, *{{m.split('.')[0] for m in sys.modules}})"
    )
    seconds, *loaded = run_python(code).split()[-10_000:]
    assert float(seconds) < 1.0
    assert not {"torch", "transformers", "pyspark", "faiss", "sklearn"} & set(loaded)

"""The wheel contains only names that begin with ``marc_`` and works beside packages of other projects."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(repository)]
    subprocess.run([sys.executable, "-m", "pip", *command], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_contains_all_sources_under_names_that_begin_with_marc(wheel: Path, repository: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("marc_pipeline/", "marc_schemas/", "marc_pipeline-")) for name in names)
    for root in (repository / "pipeline", repository / "schemas"):
        sources = [path for path in root.rglob("*.*") if path.suffix in {".py", ".jinja", ".yaml", ".typed"}]
        assert {path.relative_to(root).as_posix() for path in sources} <= set(names)


def test_the_wheel_works_in_a_project_with_its_own_pipeline_and_schemas(wheel: Path, tmp_path: Path) -> None:
    installed, project = tmp_path / "installed", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(installed)
    for name in ("pipeline", "schemas", "jobs", "dags"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f"OWN = {name!r}\n")
    code = (
        "import pipeline, schemas, jobs, dags, marc_pipeline, marc_schemas, marc_pipeline.reader, marc_pipeline.cli;"
        "print(pipeline.OWN, schemas.OWN, jobs.OWN, dags.OWN, marc_pipeline.__file__, marc_schemas.__file__)"
    )
    env = {"PYTHONPATH": f"{project}:{installed}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    *own, pipeline, schemas = done.stdout.split()
    assert own == ["pipeline", "schemas", "jobs", "dags"]
    assert Path(pipeline).is_relative_to(installed)
    assert Path(schemas).is_relative_to(installed)

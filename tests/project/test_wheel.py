"""The wheel: only names that begin with ``marc_``, beside a project's own ``pipeline`` and ``schemas``."""

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


def test_the_wheel_holds_only_names_that_begin_with_marc(wheel: Path, repository: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert all(name.startswith(("marc_pipeline/", "marc_schemas/", "marc_pipeline-")) for name in names)
    sources = [path for root in ("pipeline", "schemas") for path in (repository / root).rglob("*.*")]
    wanted = {
        path.relative_to(repository / path.relative_to(repository).parts[0]).as_posix()
        for path in sources
        if path.is_file() and path.suffix in {".py", ".jinja", ".yaml", ".typed"}
    }
    assert wanted <= set(names)


def test_the_wheel_works_in_a_project_with_packages_of_the_same_names(wheel: Path, tmp_path: Path) -> None:
    installed, project = tmp_path / "installed", tmp_path / "project"
    zipfile.ZipFile(wheel).extractall(installed)
    for name in ("pipeline", "schemas", "jobs", "dags"):
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text(f"OWN = {name!r}\n")
    code = (
        "import pipeline, schemas, jobs, dags, marc_pipeline, marc_schemas, marc_pipeline.reader, marc_pipeline.cli;"
        "print(pipeline.OWN, schemas.OWN, jobs.OWN, dags.OWN, marc_pipeline.__file__, marc_schemas.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=project,
        env={"PYTHONPATH": f"{project}:{installed}"},
    )
    assert done.returncode == 0, done.stderr
    *own, pipeline, schemas = done.stdout.split()
    assert own == ["pipeline", "schemas", "jobs", "dags"]
    assert Path(pipeline).is_relative_to(installed)
    assert Path(schemas).is_relative_to(installed)

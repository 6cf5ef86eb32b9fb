"""The Spark jobs: each file calls the function of its name, which explains itself."""

import runpy
import sys
from pathlib import Path

import pytest
from pipeline.jobs import nightly, training

JOBS = sorted((Path(__file__).resolve().parent.parent / "jobs").glob("*.py"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_file_runs_the_function_of_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(path), run_name="__main__")
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    function = getattr(nightly, path.stem, None) or getattr(training, path.stem)
    assert function.__doc__ in printed
    announced = "--plan-id" if hasattr(nightly, path.stem) else "--training-id"
    assert all(name in printed for name in ("--config", "--ds", announced))

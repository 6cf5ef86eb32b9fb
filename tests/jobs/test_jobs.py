"""Each job file runs the function of its name, whose docstring is the help."""

import runpy
import sys
from pathlib import Path

import pytest

from marc_pipeline.jobs import nightly, training

NIGHTLY = ("plan", "encode", "audit", "index", "release", "backfill")
TRAINING = ("hidden_states", "evaluate_layers", "train_marc", "evaluate_marc")


@pytest.mark.parametrize("name", [*NIGHTLY, *TRAINING])
def test_a_job_file_runs_the_function_of_its_name(
    name: str, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.stem for path in (repository / "jobs").glob("*.py")} == {*NIGHTLY, *TRAINING}
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(repository / "jobs" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    module, announced = (nightly, "--plan-id") if name in NIGHTLY else (training, "--training-id")
    assert all(text in printed for text in (getattr(module, name).__doc__, "--config", "--ds", announced))

"""`make setup` names a missing program in one line, before it installs anything."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """A folder with the files that `make setup` reads."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, tmp_path / name)
    return tmp_path


def refusal(checkout: Path, *variables: str) -> str:
    # The variables that `make test` exports are not in a user's shell.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "setup", *variables]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout, env=env)
    assert done.returncode == 2
    assert not (checkout / ".venv").exists()
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("variable", "program", "script", "message"),
    [
        ("JAVA_HOME=/nonexistent", "", "", "Java 17 or newer is needed, '/nonexistent/bin/java'"),
        (
            "JAVA_HOME={}/jdk",
            "jdk/bin/java",
            "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2",
            "'{}/jdk/bin/java' is 11;",
        ),
        ("PYTHON=/nonexistent/python", "", "", "'/nonexistent/python' is not there"),
        ("PYTHON={}/python", "python", '[ "$1" = --version ] && echo "Python 3.8.1"', "'{}/python' is Python 3.8.1;"),
    ],
    ids=["no Java", "old Java", "no Python", "old Python"],
)
def test_a_missing_or_old_program_is_named_with_its_version(
    checkout: Path, variable: str, program: str, script: str, message: str
) -> None:
    if program:
        path = checkout / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    assert message.format(checkout) in refusal(checkout, variable.format(checkout))

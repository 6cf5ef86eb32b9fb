"""Set-up says in one line what a machine lacks, before anything is installed."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    """What `make setup` reads, without an environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, tmp_path / name)
    return tmp_path


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def refusal(checkout: Path, *variables: str) -> str:
    # `make test` runs these: what it tells the makes below it is not what a user's shell holds.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
    command = ["make", "setup", *variables]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=checkout, env=env)
    assert done.returncode == 2
    assert not (checkout / ".venv").exists()
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_missing_java_is_named(checkout: Path) -> None:
    assert refusal(checkout, "JAVA_HOME=/nonexistent").startswith("Java 17 or newer is needed, '/nonexistent/bin/java'")


def test_a_java_that_is_too_old_is_named_with_its_version(checkout: Path) -> None:
    java = program(checkout / "jdk" / "bin" / "java", "echo 'openjdk version \"11.0.2\" 2019-01-15' >&2")
    assert f"'{java}' is 11;" in refusal(checkout, f"JAVA_HOME={checkout / 'jdk'}")


def test_a_missing_python_is_named(checkout: Path) -> None:
    assert "'/nonexistent/python' is not there" in refusal(checkout, "PYTHON=/nonexistent/python")


def test_a_python_that_is_too_old_is_named_with_its_version(checkout: Path) -> None:
    old = program(checkout / "python", 'if [ "$1" = --version ]; then echo "Python 3.8.1"; else exit 1; fi')
    assert f"'{old}' is Python 3.8.1;" in refusal(checkout, f"PYTHON={old}")

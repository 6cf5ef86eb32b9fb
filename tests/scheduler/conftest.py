"""Airflow, and the shapes of the DAGs, for all tests of the scheduler."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from airflow_command import Airflow

SHAPE = """
import importlib, json, sys
sys.path.insert(0, "dags")
from marc_pipeline.scheduler.retries import RetryTransientFaults
dag = getattr(importlib.import_module(sys.argv[1]), sys.argv[1])()
print(json.dumps({
    "id": dag.dag_id,
    "doc": dag.doc_md,
    "schedule": str(dag.schedule),
    "runs": dag.max_active_runs,
    "catchup": dag.catchup,
    "tasks": {task.task_id: sorted(task.downstream_task_ids) for task in dag.tasks},
    "params": {name: dag.params.get_param(name).schema for name in dag.params},
    "jobs": {task.task_id: task.application for task in dag.tasks if hasattr(task, "application")},
    "arguments": {task.task_id: task.application_args for task in dag.tasks if hasattr(task, "application_args")},
    "policies": [isinstance(task.retry_policy, RetryTransientFaults) for task in dag.tasks],
}))
"""


@pytest.fixture(scope="package")
def airflow(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Airflow:
    """Airflow with an empty database."""
    called = Airflow(tmp_path_factory.mktemp("airflow"), repository)
    done = called.call("db", "migrate")
    assert done.returncode == 0, done.stderr
    return called


@pytest.fixture(scope="package")
def shape_of(repository: Path) -> Callable[[str], dict[str, Any]]:
    """Return a function that loads a DAG in a process of its own and describes it."""

    def shape(dag: str) -> dict[str, Any]:
        command = [sys.executable, "-c", SHAPE, dag]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=repository)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return shape

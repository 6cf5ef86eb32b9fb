"""The jobs on a standalone Spark cluster: one master, two workers, each with one core and one simulated GPU."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pyspark
import pytest

from marc_pipeline.bundles import run as train
from marc_pipeline.config import load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.example.shop import write_catalogue
from marc_pipeline.nightly import run
from marc_pipeline.nightly.plan_identity import identify_plan
from marc_pipeline.reader.release import open_release
from marc_schemas.receipt import Receipt
from tiny_models import save_tiny_backbone

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.spark]

DS = "2026-11-20"
SPARK_HOME = Path(pyspark.__file__).parent
JOBS = Path(__file__).resolve().parents[2] / "jobs"
START_SECONDS = 60
GPUS = """
import json, sys, time
from pathlib import Path
from marc_pipeline.config import SparkSettings
from marc_pipeline.spark.session import spark_session
from marc_pipeline.spark.tasks import run_buckets

def address(task, resources):
    time.sleep(2)  # so that both workers run tasks
    return resources.gpu

with spark_session(SparkSettings(), name="gpus", gpu_tasks=True) as spark:
    found = run_buckets(spark, address, range(6), label="gpus", weight=lambda _: 1, unit="tasks")
Path(sys.argv[1]).write_text(json.dumps(found))
"""


def free_port() -> int:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a master with two registered workers."""
    folder = tmp_path_factory.mktemp("cluster")
    port = free_port()
    url = f"spark://127.0.0.1:{port}"
    common = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": sys.executable}
    log = (folder / "cluster.log").open("wb")
    running: list[subprocess.Popen[bytes]] = []

    def start(role: str, *arguments: str, env: dict[str, str]) -> None:
        command = [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{role}", *arguments]
        running.append(subprocess.Popen(command, env={**common, **env}, stdout=log, stderr=subprocess.STDOUT))

    start("master.Master", "--host", "127.0.0.1", "--port", str(port), "--webui-port", "0", env={})
    for number in ("0", "1"):
        script = folder / f"gpu-{number}.sh"
        script.write_text(f'#!/bin/sh\necho \'{{"name": "gpu", "addresses": ["{number}"]}}\'\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        gpu = f"-Dspark.worker.resource.gpu.amount=1 -Dspark.worker.resource.gpu.discoveryScript={script}"
        place = ("--cores", "1", "--memory", "2g", "--work-dir", str(folder / f"worker-{number}"))
        start("worker.Worker", *place, url, env={"SPARK_WORKER_OPTS": f"{gpu} -Dspark.worker.webui.port=0"})
    try:
        wait_for(folder / "cluster.log", b"Registering worker", times=2)
        yield url
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=30)
        log.close()


def wait_for(log: Path, line: bytes, *, times: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while log.read_bytes().count(line) < times:
        if time.monotonic() > deadline:
            pytest.fail(f"the cluster did not start in {START_SECONDS} s:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)


def configured(root: Path, backbone: str, catalogue: Path) -> Path:
    config = root / "marc.yaml"
    config.write_text(f"""
root: {root}/data
catalogue:
  uri: {catalogue}/{{ds}}.csv
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
buckets: 4
train: {{backbone: {backbone}, dim: 8, max_tokens: 32}}
""")
    return config


def submit(script: Path, *arguments: str, master: str) -> None:
    done = subprocess.run(
        [
            str(SPARK_HOME / "bin" / "spark-submit"),
            *("--master", master),
            *("--conf", "spark.executor.resource.gpu.amount=1"),
            *("--conf", "spark.executor.cores=1", "--conf", "spark.executor.memory=1g"),
            *("--conf", f"spark.pyspark.python={sys.executable}"),
            str(script),
            *arguments,
        ],
        env={**os.environ, "SPARK_LOCAL_IP": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_jobs_publish_the_same_release_on_a_cluster_as_in_one_process(master: str, tmp_path: Path) -> None:
    backbone = save_tiny_backbone(tmp_path / "backbone")
    write_catalogue(tmp_path / "catalogue", ds=DS, items=300)
    for name in ("local", "cluster"):
        (tmp_path / name).mkdir()
    local = load_settings(configured(tmp_path / "local", backbone, tmp_path / "catalogue"))
    train.train_bundle(open_deployment(local), ds=DS)
    shutil.copytree(local.bundle_uri, tmp_path / "cluster" / "data" / "bundles")
    wanted = run.run_all(open_deployment(local), ds=DS).release

    config = configured(tmp_path / "cluster", backbone, tmp_path / "catalogue")
    settings = load_settings(config)
    plan_id = identify_plan(open_deployment(settings), ds=DS).plan_id
    for job in ("plan", "encode", "audit", "index", "release"):
        submit(JOBS / f"{job}.py", "--config", str(config), "--ds", DS, "--plan-id", plan_id, master=master)

    found = open_release(settings.table_uri)
    assert found.facts.plan_id == wanted.plan_id
    same = ("ds", "bundle", "items", "new", "quarantined", "tokens", "index_factory", "recall")
    assert {name: found.facts.facts()[name] for name in same} == {name: wanted.facts()[name] for name in same}
    rows = [open_release(s.table_uri).dataset().to_table().sort_by("item_id") for s in (settings, local)]
    for column in ("item_id", "row_id", "content_hash", "bundle", "ds", "bucket"):
        assert rows[0][column].equals(rows[1][column]), column
    vectors = [np.array(table["vector"].to_pylist(), np.float32) for table in rows]
    assert np.array_equal(vectors[0], vectors[1])

    folder = Path(settings.work_uri) / "plans" / plan_id / "receipts"
    receipts = [Receipt.model_validate_json(path.read_bytes()) for path in folder.glob("*.json")]
    assert {receipt.device for receipt in receipts} <= {"cpu", "cuda:0", "cuda:1"}


def test_each_task_gets_the_gpu_of_its_worker(master: str, tmp_path: Path) -> None:
    script, found = tmp_path / "gpus.py", tmp_path / "found.json"
    script.write_text(GPUS)
    submit(script, str(found), master=master)
    assert set(json.loads(found.read_text())) == {"0", "1"}, "tasks ran on both workers, each with its own GPU"

"""A night with every uri on S3, against a real S3 server (Ceph's RADOS gateway)."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from tiny_models import save_tiny_backbone

from pipeline.example_data import write_catalogue

pytestmark = [pytest.mark.spark]

BUCKET = "marc-tests"
FIRST, SECOND = "2026-11-20", "2026-11-21"


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that clients of a freshly started server need."""
    script = repository.parent / "shared" / "tools" / "ceph-s3"
    if not script.is_file():
        pytest.skip("shared/tools/ceph-s3 is not beside this checkout")
    if not shutil.which("radosgw"):
        pytest.skip("radosgw is not installed (Debian: ceph-mon ceph-osd ceph-mgr radosgw ceph-common)")
    env = {**os.environ, "CEPH_S3_DIR": str(tmp_path_factory.mktemp("ceph") / "run")}
    started = subprocess.run([str(script), "up"], capture_output=True, text=True, check=False, env=env)
    try:
        assert started.returncode == 0, started.stderr
        words = started.stdout.replace("export", "").split()
        yield dict(word.split("=", 1) for word in words)
    finally:
        subprocess.run([str(script), "down"], check=False, env=env)


# One process, one Spark session: its Python workers inherit the credentials from the environment.
NIGHTS = """
import json, sys
from pipeline import run, train
from pipeline.config import load_settings
from pipeline.reader import open_release
from pipeline.session import spark_session
from pipeline.verify import verify
settings = load_settings(sys.argv[1])
with spark_session(settings.spark, name="s3"):
    train.train_bundle(settings, ds=sys.argv[2])
    outcomes = [run.run_all(settings, ds=ds) for ds in (sys.argv[2], sys.argv[2], sys.argv[3])]
release = open_release(settings.table_uri)
table = release.dataset().to_table()
item = table["item_id"][0].as_py()
names, _ = release.search(release.vectors([item]), 3)
print(json.dumps({
    "facts": [outcome.release.facts() for outcome in outcomes],
    "fresh": [outcome.fresh for outcome in outcomes],
    "rows": table.num_rows,
    "found": names[0][0] == item,
    "problems": verify(run.storage_of(settings), release.facts, table_uri=settings.table_uri),
}, default=str))
"""


def test_two_nights_with_catalogue_work_area_table_index_and_bundle_on_s3(
    server: dict[str, str], tmp_path: Path
) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=server["AWS_ENDPOINT_URL"],
        aws_access_key_id=server["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=server["AWS_SECRET_ACCESS_KEY"],
        region_name=server["AWS_REGION"],
    )
    client.create_bucket(Bucket=BUCKET)
    for ds in (FIRST, SECOND):
        client.upload_file(str(write_catalogue(tmp_path, ds=ds, items=400)), BUCKET, f"catalogue/{ds}.csv")
    config = tmp_path / "marc.yaml"
    config.write_text(f"""
root: s3://{BUCKET}/site
catalogue:
  uri: s3://{BUCKET}/catalogue/{{ds}}.csv
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
buckets: 4
train: {{backbone: {save_tiny_backbone(tmp_path / "backbone")}, dim: 8, max_tokens: 32}}
""")
    env = {**os.environ, **server}
    command = [sys.executable, "-c", NIGHTS, str(config), FIRST, SECOND]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    first, again, second = answer["facts"]
    assert answer["fresh"] == [True, False, True]
    assert again["release_id"] == first["release_id"]
    assert (first["items"], first["new"], first["quarantined"]) == (400, 400, 12)
    assert second["reused"] == second["items"] - second["new"] - second["changed"] > 300
    assert (answer["rows"], answer["found"], answer["problems"]) == (second["items"], True, [])
    assert server["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr
    keys = [
        item["Key"]
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        for item in page["Contents"]
    ]
    assert {key.split("/")[1] for key in keys if key.startswith("site/")} == {
        "bundles",
        "indexes",
        "item_vectors",
        "work",
    }

"""A night with every uri on S3, against a real S3 server (Ceph's RADOS gateway)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from s3_server import client_of
from tiny_models import save_tiny_backbone

from pipeline.example_data import write_catalogue

pytestmark = [pytest.mark.spark]

BUCKET = "marc-nights"
SMALL_BYTES = 1 << 20
FIRST, SECOND = "2026-11-20", "2026-11-21"


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
    s3_server: dict[str, str], tmp_path: Path
) -> None:
    client = client_of(s3_server)
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
    env = {**os.environ, **s3_server}
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
    found = [
        item
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="site/")
        for item in page["Contents"]
    ]
    assert {item["Key"].split("/")[1] for item in found} == {"bundles", "indexes", "item_vectors", "work"}
    # Plans, receipts, cards, Delta logs, small Parquet files: everything that is not mere numbers.
    small = {item["Key"] for item in found if item["Size"] <= SMALL_BYTES}
    for part in ("plan.json", "/receipts/", "audit.json", "/_delta_log/", "bundle.json", ".parquet"):
        assert any(part in key for key in small), part
    secret = s3_server["AWS_SECRET_ACCESS_KEY"]
    assert secret not in done.stdout + done.stderr
    assert [key for key in small if secret.encode() in client.get_object(Bucket=BUCKET, Key=key)["Body"].read()] == []

"""A site with every uri on S3: a real server (Ceph's RADOS gateway), undisturbed and through a faulty proxy."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from catalogues import corrected
from faulty_proxy import PASSED, FaultyProxy
from marc_pipeline.example.shop import write_catalogue
from s3_server import client_of
from tiny_models import save_tiny_backbone

pytestmark = [pytest.mark.spark]

SMALL_BYTES = 1 << 20
FIRST, SECOND = "2026-11-20", "2026-11-21"
CHOSEN = 2

# One process, one Spark session: its Python workers inherit the credentials from the environment.
SCRIPT = """
import json, sys
from marc_pipeline.bundles.run import train_bundle
from marc_pipeline.config import load_settings
from marc_pipeline.deployment import open_deployment
from marc_pipeline.errors import ReleaseGone
from marc_pipeline.nightly.run import backfill, run_all
from marc_pipeline.reader import open_release
from marc_pipeline.releases.retention import vacuum
from marc_pipeline.releases.roll_back import roll_back
from marc_pipeline.spark.session import spark_session
from marc_pipeline.reader.verify import verify

config, first_day, second_day, corrected, chosen = sys.argv[1:]
settings = load_settings(config)
deployment = open_deployment(settings)
storage, uri = deployment.storage, settings.table_uri
opened, steps = {}, {}

def step(name, release):
    opened[name] = open_release(uri, release_id=release.release_id, storage=storage)
    steps[name] = {
        **release.facts(),
        "paths": [file.path for file in release.table.files],
        "problems": verify(storage, release, table_uri=uri),
    }

def read(name):
    try:
        rows = opened[name].dataset().to_table().num_rows
    except ReleaseGone:
        return "gone"
    item = opened[name].dataset().to_table(columns=["item_id"])["item_id"][0].as_py()
    names, _ = opened[name].search(opened[name].vectors([item]), 3)
    return [rows, names[0][0] == item]

with spark_session(settings.spark, storage=settings.storage, name="s3"):
    train_bundle(deployment, ds=first_day)
    for name, ds in (("first", first_day), ("again", first_day), ("second", second_day)):
        step(name, run_all(deployment, ds=ds).release)
    storage.write(settings.catalogue.uri.replace("{ds}", first_day), storage.read(corrected))
    step("backfill", backfill(deployment, ds=first_day, buckets=[int(chosen)]).release)
back, withdrawn = roll_back(storage, uri, opened["first"].facts.release_id)
step("back", back)
removed = vacuum(deployment)
newest = open_release(uri, storage=storage)
print(json.dumps({
    "steps": steps,
    "withdrawn": withdrawn.facts(),
    "newest": newest.facts.release_id,
    "after": {name: read(name) for name in opened},
    "left": verify(storage, newest.facts, table_uri=uri),
    "removed": removed.files,
}, default=str))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rate", [pytest.param(0.0, id="undisturbed"), pytest.param(0.05, id="disturbed")])
def test_runs_backfill_roll_back_vacuum_and_look_up_with_every_uri_on_s3(
    s3_server: dict[str, str], tmp_path: Path, rate: float
) -> None:
    client, bucket, site = client_of(s3_server), f"marc-runs-{100 * rate:.0f}", "site"
    client.create_bucket(Bucket=bucket)
    for ds in (FIRST, SECOND):
        client.upload_file(str(write_catalogue(tmp_path, ds=ds, items=400)), bucket, f"{site}/catalogue/{ds}.csv")
    client.upload_file(str(corrected(tmp_path / f"{FIRST}.csv")), bucket, f"{site}/corrected.csv")
    with ExitStack() as stack:
        endpoint = s3_server["AWS_ENDPOINT_URL"]
        proxy = stack.enter_context(FaultyProxy(endpoint, rate=rate, seed=1, stall_s=1.0)) if rate else None
        config = tmp_path / "marc.yaml"
        config.write_text(f"""
root: s3://{bucket}/{site}
catalogue:
  uri: s3://{bucket}/{site}/catalogue/{{ds}}.csv
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
buckets: 4
train: {{backbone: {save_tiny_backbone(tmp_path / "backbone")}, dim: 8, max_tokens: 32}}
retention: {{days: 1, releases_per_day: 1, grace_hours: 0}}
storage: {{endpoint_url: "{proxy.url if proxy else endpoint}"}}
""")
        command = [sys.executable, "-c", SCRIPT, str(config), FIRST, SECOND, f"s3://{bucket}/{site}/corrected.csv"]
        done = subprocess.run(
            [*command, str(CHOSEN)], capture_output=True, text=True, check=False, env={**os.environ, **s3_server}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert proxy is None or proxy.counts.total() - proxy.counts[PASSED] > 10
    answer = json.loads(done.stdout.splitlines()[-1])
    first, again, second, backfill, back = (
        answer["steps"][name] for name in ("first", "again", "second", "backfill", "back")
    )
    assert [step["problems"] for step in answer["steps"].values()] == [[]] * 5
    assert again["release_id"] == first["release_id"]
    assert (first["items"], first["new"], first["quarantined"]) == (400, 400, 12)
    assert second["reused"] == second["items"] - second["new"] - second["changed"] > 300
    changed = [path for path in backfill["paths"] if path not in first["paths"]]
    assert [f"/bucket={CHOSEN}/" in path for path in changed] == [True]
    assert 0 < backfill["encoded"] < 200
    assert (back["paths"], back["ds"]) == (first["paths"], FIRST)
    assert (answer["withdrawn"]["ds"], answer["newest"]) == (SECOND, back["release_id"])
    # The withdrawn date stays, so that it can be restored; the replaced release does not.
    assert answer["left"] == []
    assert answer["after"] == {
        "first": [400, True],
        "again": [400, True],
        "second": [second["items"], True],
        "backfill": "gone",
        "back": [400, True],
    }
    assert all(any(uri.endswith(path) for uri in answer["removed"]) for path in changed)
    found = [
        item
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{site}/")
        for item in page["Contents"]
    ]
    parts = {item["Key"].split("/")[1] for item in found}
    assert parts == {"bundles", "catalogue", "corrected.csv", "indexes", "item_vectors", "work"}
    # Plans, receipts, cards, Delta logs and small Parquet files are searched for the secret.
    small = {item["Key"] for item in found if item["Size"] <= SMALL_BYTES}
    for part in ("plan.json", "/receipts/", "audit.json", "/_delta_log/", "bundle.json", ".parquet"):
        assert any(part in key for key in small), part
    secret = s3_server["AWS_SECRET_ACCESS_KEY"]
    assert secret not in done.stdout + done.stderr
    assert [key for key in small if secret.encode() in client.get_object(Bucket=bucket, Key=key)["Body"].read()] == []

"""Ten concurrent backfills of one date, each a process of ``marc``, while a reader reads."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from catalogues import corrected
from marc_pipeline.example.shop import write_catalogue
from marc_pipeline.reader.release import open_release
from tiny_models import save_tiny_backbone

pytestmark = [pytest.mark.slow, pytest.mark.spark, pytest.mark.timeout(900)]

DS, ITEMS, BUCKETS = "2026-11-20", 600, 10
CHOSEN = (0, 1, 2, 3, 4, 5, 6, 7, 3, 3)
MARC = [sys.executable, "-c", "from marc_pipeline.cli.app import main; main()"]


def marc(*arguments: str, config: Path) -> "subprocess.Popen[str]":
    env = {**os.environ, "MARC_CONFIG": str(config)}
    return subprocess.Popen([*MARC, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def call(*arguments: str, config: Path) -> None:
    process = marc(*arguments, config=config)
    _, log = process.communicate()
    assert process.returncode == 0, log[-3000:]


def rows_of(table: Path) -> pa.Table:
    return open_release(table).dataset().to_table().sort_by("item_id")


def test_concurrent_backfills_of_different_buckets_succeed_and_those_of_one_bucket_supersede(tmp_path: Path) -> None:
    catalogue = write_catalogue(tmp_path / "catalogue", ds=DS, items=ITEMS)
    backbone = save_tiny_backbone(tmp_path / "backbone")
    for name in ("site", "whole"):
        (tmp_path / f"{name}.yaml").write_text(f"""
root: {tmp_path / name}
bundle_uri: {tmp_path / "bundles"}
catalogue:
  uri: {catalogue}
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
buckets: {BUCKETS}
train: {{backbone: {backbone}, dim: 8, max_tokens: 32}}
index: {{factory: "IVF8,Flat"}}
spark: {{master: "local[1,4]"}}
""")
    config, table = tmp_path / "site.yaml", tmp_path / "site" / "item_vectors"
    call("train", "--ds", DS, config=config)
    call("run", "--ds", DS, config=config)
    before, old = open_release(table), rows_of(table)
    corrected(catalogue).replace(catalogue)

    ended, problems, seen = threading.Event(), [], set()

    def watch() -> None:
        while not ended.is_set():
            try:
                release = open_release(table)
                found = release.dataset().to_table()
                assert len(set(found["item_id"].to_pylist())) == found.num_rows == old.num_rows
                assert np.array_equal(np.sort(release.index_row_ids()), np.sort(found["row_id"].to_numpy()))
                seen.add(release.facts.release_id)
            except Exception as error:
                problems.append(error)

    reader = threading.Thread(target=watch)
    reader.start()
    attempts = [marc("backfill", "--ds", DS, "--bucket", str(bucket), config=config) for bucket in CHOSEN]
    answers = [attempt.communicate()[1] for attempt in attempts]
    ended.set()
    reader.join()
    assert problems == []
    assert len(seen) > 1
    codes = [attempt.returncode for attempt in attempts]
    superseded = re.compile(r" ERROR superseded: [^\n]+\n\Z")
    assert all(code == 0 or superseded.search(log) for code, log in zip(codes, answers, strict=True)), answers
    assert {bucket for bucket, code in zip(CHOSEN, codes, strict=True) if code == 0} == set(range(8))

    call("verify", "--ds", DS, config=config)
    made = open_release(table)
    kept = {file for file in before.facts.table.files if re.search(r"/bucket=[89]/", file.path)}
    assert len(kept) == 2
    assert kept == set(before.facts.table.files) & set(made.facts.table.files)
    # The expected rows come from one run of the whole date.
    call("run", "--ds", DS, config=tmp_path / "whole.yaml")
    new = rows_of(tmp_path / "whole" / "item_vectors").to_pylist()
    rows = zip(new, old.to_pylist(), strict=True)
    expected = [row if row["row_id"] % BUCKETS < 8 else unchanged for row, unchanged in rows]
    found = rows_of(table).to_pylist()
    for name in ("item_id", "row_id", "content_hash", "bundle", "bucket"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    np.testing.assert_allclose([row["vector"] for row in found], [row["vector"] for row in expected], atol=1e-5)
    # The release that was opened first is still readable.
    assert before.dataset().to_table().sort_by("item_id").equals(old)

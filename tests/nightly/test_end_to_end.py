"""The pipeline through the command line, with Spark and a real model: runs, bad input, altered files."""

import csv
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from marc_command import Marc
from marc_pipeline.errors import CorruptFile
from marc_pipeline.example.shop import MESSY_ROWS, write_catalogue
from marc_pipeline.model.bundle import local_bundle, promote, save_bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.reader.release import open_release
from marc_pipeline.releases.log import read_releases
from marc_pipeline.storage import Storage
from marc_pipeline.table.precision import round_mantissas
from marc_schemas.bundle import BundleCard
from published import flip
from tiny_models import cosines

pytestmark = [pytest.mark.spark, pytest.mark.usefixtures("spark")]

Matrix = NDArray[np.float32]

ITEMS = 500
FIRST, SECOND = "2026-11-20", "2026-11-21"
CONFIG = """
root: {root}/data
catalogue:
  uri: {root}/catalogue/{{ds}}.csv
  updated_at_column: updated_at
  template: "{{title}}. {{brand}}. {{category}}. {{description}}"
buckets: 4
train: {{layers: 2, dim: 16, max_tokens: 64}}
"""


def good_rows(path: Path) -> dict[str, str]:
    """Rendered text by item id of the usable rows, read with Python's csv module."""
    newest: dict[str, tuple[str, str]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            texts = [row[name] or "" for name in ("title", "brand", "category", "description")]
            usable = row["item_id"] and any(text.strip() for text in texts) and "�" not in "".join(texts)
            if usable and row["updated_at"] >= newest.get(row["item_id"], ("", ""))[0]:
                newest[row["item_id"]] = (row["updated_at"], "{}. {}. {}. {}".format(*texts).strip())
    return {item: text for item, (_, text) in newest.items()}


class Runs:
    """Two dates, and the answers of their runs; the first date runs twice."""

    def __init__(self, root: Path) -> None:
        self.marc = Marc(root, CONFIG)
        for ds in (FIRST, SECOND):
            write_catalogue(root / "catalogue", ds=ds, items=ITEMS)
        self.bundle = self.marc.json("train", "--compressor", "pca", "--ds", FIRST)
        self.planned = self.marc.json("plan", "--ds", FIRST)
        self.first, self.again, self.second = (self.marc.json("run", "--ds", ds) for ds in (FIRST, FIRST, SECOND))

    def open(self, ds: str) -> Any:
        return open_release(self.marc.table, ds=ds)

    def rows(self, ds: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.open(ds).dataset().to_table().to_pylist()
        return found

    def usable(self, ds: str) -> dict[str, str]:
        return good_rows(self.marc.root / "catalogue" / f"{ds}.csv")

    def release_ids(self) -> list[str]:
        return [release.release_id for release in read_releases(Storage(), str(self.marc.table))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, spark: Any) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


def test_the_first_run_publishes_the_usable_items_and_quarantines_the_others(runs: Runs) -> None:
    wanted, first = runs.usable(FIRST), runs.first
    assert first["items"] == first["new"] == len(wanted) == ITEMS
    assert first["quarantined"] == sum(MESSY_ROWS.values())
    assert runs.planned["quarantined"] == MESSY_ROWS
    assert {row["item_id"] for row in runs.rows(FIRST)} == set(wanted)
    assert first["bundle"] == runs.bundle["bundle"]
    assert first["recall"] >= 0.95
    assert 1 < first["effective_rank"] <= 16
    assert 1 / 16 <= first["first_share"] < 0.9
    assert abs(first["mean_cosine"]) < 0.5
    assert first["tokens"] == runs.planned["tokens"], "a plan of this size counts tokens exactly"
    assert first.keys() >= {
        "release_id", "ds", "table_version", "bundle", "items", "new", "changed", "reused", "deleted", "quarantined",
        "tokens", "seconds",
    }  # fmt: skip
    assert first["seconds"].keys() >= {"plan", "encode", "audit", "index"}


def test_a_second_run_of_the_same_date_publishes_no_second_release(runs: Runs) -> None:
    assert runs.again["release_id"] == runs.first["release_id"]
    assert (runs.first["fresh"], runs.again["fresh"]) == (True, False)
    assert len(runs.marc.json("releases", "--ds", FIRST)["releases"]) == 1


def test_the_next_run_encodes_only_new_and_changed_items(runs: Runs) -> None:
    before, after = runs.usable(FIRST), runs.usable(SECOND)
    same = {item for item in before.keys() & after.keys() if before[item] == after[item]}
    counts = {name: runs.second[name] for name in ("new", "changed", "reused", "deleted")}
    assert counts == {
        "new": len(after.keys() - before.keys()),
        "changed": len(before.keys() & after.keys()) - len(same),
        "reused": len(same),
        "deleted": len(before.keys() - after.keys()),
    }
    assert min(counts.values()) > 0
    old, new = ({row["item_id"]: row for row in runs.rows(ds)} for ds in (FIRST, SECOND))
    for item in same:
        for name in ("vector", "encoded_at"):
            assert new[item][name] == old[item][name]


def test_deleted_items_are_absent_from_table_and_index(runs: Runs) -> None:
    gone = {row["item_id"] for row in runs.rows(FIRST)} - {row["item_id"] for row in runs.rows(SECOND)}
    names, _ = runs.open(SECOND).search(runs.open(FIRST).vectors(sorted(gone)), 20)
    assert not gone & set(names.ravel().tolist())


def test_an_open_release_is_kept_when_another_is_published(runs: Runs) -> None:
    pinned = runs.open(FIRST)
    assert len(pinned) == ITEMS
    assert pinned.dataset().count_rows() == ITEMS
    assert open_release(runs.marc.table).facts.ds == SECOND


def test_files_of_a_moment_are_those_of_its_release(runs: Runs) -> None:
    first = min(runs.marc.json("releases")["releases"], key=lambda release: str(release["created_at"]))
    then = runs.marc.json("files", "--at", first["created_at"])
    assert (then["release_id"], then["ds"]) == (first["release_id"], FIRST)
    assert then["files"] == open_release(runs.marc.table, release_id=first["release_id"]).files()
    assert then["files"] != runs.marc.json("files")["files"]


def test_pyarrow_pandas_polars_duckdb_and_spark_read_the_same_rows(runs: Runs, spark: Any) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    marc = runs.marc
    files = marc.call("files", "--ds", SECOND).stdout.split()
    wanted = runs.open(SECOND).dataset().to_table(columns=["item_id", "vector"]).sort_by("item_id")
    ids, vectors = wanted["item_id"].to_pylist(), np.array(wanted["vector"].to_pylist(), np.float32)
    query = "SELECT item_id, vector FROM read_parquet($files)"
    answers: dict[str, list[Any]] = {
        "pyarrow": pads.dataset(files, format="parquet").to_table(columns=["item_id", "vector"]).to_pylist(),
        "pandas": pd.concat([pd.read_parquet(file) for file in files])[["item_id", "vector"]].to_dict("records"),
        "polars": pl.read_parquet(files, columns=["item_id", "vector"]).to_dicts(),
        "duckdb": duckdb.sql(query, params={"files": files}).arrow().read_all().to_pylist(),
        "spark": [row.asDict() for row in spark.read.parquet(*files).select("item_id", "vector").collect()],
    }
    for engine, rows in answers.items():
        found = sorted(rows, key=lambda row: str(row["item_id"]).encode())
        assert [row["item_id"] for row in found] == ids, engine
        assert np.array_equal(np.array([list(row["vector"]) for row in found], np.float32), vectors), engine


def test_look_up_by_item_text_and_vector(runs: Runs, tmp_path: Path) -> None:
    marc, release = runs.marc, runs.open(SECOND)
    item = release.dataset().head(1)["item_id"][0].as_py()
    text = runs.usable(SECOND)[item]
    np.save(tmp_path / "q.npy", release.vectors([item]))
    by_item = marc.json("lookup", "--item", item, "-k", "5")["neighbours"][0]
    by_vector = marc.json("lookup", "--vector", str(tmp_path / "q.npy"), "-k", "6")["neighbours"][0]
    by_text = marc.json("lookup", "--text", text, "-k", "6")["neighbours"][0]
    assert [row["item_id"] for row in by_vector] == [item, *(row["item_id"] for row in by_item)]
    assert by_text[0]["item_id"] == item
    assert by_text[0]["score"] > 0.99


def test_the_program_exits_with_its_code(runs: Runs) -> None:
    marc = [str(Path(sys.executable).with_name("marc")), "--config", str(runs.marc.config)]
    call = partial(subprocess.run, capture_output=True, text=True, check=False)
    verified = call([*marc, "verify"])
    assert (verified.returncode, verified.stdout.startswith("release ")) == (0, True), verified.stderr
    refused = call([*marc, "run", "--ds", "2030-01-01", "--json"])
    assert (refused.returncode, refused.stdout) == (2, "")


@pytest.mark.parametrize(
    "part", ["table", "index", "compressor.safetensors", "backbone/model.safetensors", "bundle.json"]
)
def test_an_altered_file_is_named_and_refused(runs: Runs, part: str) -> None:
    release = runs.open(SECOND)
    facts, item = release.facts, release.dataset().head(1)["item_id"][0].as_py()
    paths = {
        "table": runs.marc.table / facts.table.files[1].path,
        "index": Path(facts.index.uri) / facts.index.files[0].path,
    }
    path = paths.get(part, Path(facts.bundle.uri) / part)
    offset = path.stat().st_size // 2
    flip(path, offset, mask=1)
    try:
        # This process has loaded the bundle before the damage.
        load_encoder.cache_clear()
        local_bundle.cache_clear()
        verified = runs.marc.call("verify")
        assert (verified.returncode, str(path) in verified.stdout) == (1, True)
        if part == "table":
            with pytest.raises(CorruptFile, match="differs from its checksum"):
                runs.open(SECOND).dataset().to_table()
        elif part == "index":
            done = runs.marc.call("lookup", "--item", item)
            assert (done.returncode, "differs from its checksum" in done.stderr) == (1, True)
        else:
            assert runs.marc.call("lookup", "--text", "a lamp").returncode != 0
    finally:
        flip(path, offset, mask=1)
    assert runs.marc.call("verify").returncode == 0


SPACE = ("space", "mars", "astronaut", "earth")
RUN = f"run --ds {FIRST}"


@pytest.mark.parametrize(
    ("old", "new", "arguments", "message"),
    [
        ("", "", "run --ds 2030-01-01", "no catalogue for 2030-01-01"),
        ("", "", "run --ds yesterday", "is not a date"),
        ("{description}", "{colour}", RUN, "'colour'"),
        ("  updated_at_column", "  id_column: sku\n  updated_at_column", RUN, "'sku'"),
        ("buckets", "bukets", RUN, "unknown key bukets"),
        ("{title}. {brand}. {category}. {description}", "item", RUN, "template"),
        ("buckets", "bundle_uri: /nonexistent/bundles\nbuckets", RUN, "no bundle at"),
        ("{ds}.csv", "empty.csv", RUN, "is empty"),
        ("{ds}.csv", "header.csv", RUN, "is empty"),
        ("", "", "lookup --item nobody", "'nobody'"),
        ("", "", "files --ds 2020-01-01", "no release of 2020-01-01"),
        ("", "", "files --at 2020-01-01T00:00:00+00:00", "existed at 2020-01-01T00:00:00"),
        ("", "", "lookup --item a --at yesterday", "'yesterday' is not a time"),
        ("", "", "files --at 2026-11-20T06:00", "has no time zone"),
        ("", "", "lookup --item a --text b", "exactly one"),
    ],
)
def test_a_user_error_has_exit_code_2_and_one_line(
    runs: Runs, old: str, new: str, arguments: str, message: str, tmp_path: Path
) -> None:
    catalogue = runs.marc.root / "catalogue"
    (catalogue / "empty.csv").write_text("")
    (catalogue / "header.csv").write_text("item_id,title,brand,category,description,updated_at\n")
    marc = Marc(tmp_path, CONFIG)
    text = CONFIG.format(root=runs.marc.root)
    assert old in text
    marc.config.write_text(text.replace(old, new) if old else text)
    before = runs.release_ids()
    done = marc.call(*arguments.split())
    lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in done.stderr
    assert runs.release_ids() == before


def test_a_refused_gate_has_exit_code_3_and_publishes_no_release(runs: Runs, tmp_path: Path) -> None:
    before = runs.release_ids()
    rows = "".join(f"x{number},,,,,2026-01-01\n" for number in range(300))
    source = runs.marc.root / "catalogue" / f"{SECOND}.csv"
    (tmp_path / "2026-11-22.csv").write_bytes(source.read_bytes() + rows.encode())
    marc = Marc(tmp_path, CONFIG)
    text = CONFIG.format(root=runs.marc.root).replace(f"{runs.marc.root}/catalogue", str(tmp_path))
    marc.config.write_text(text)
    done = marc.call("run", "--ds", "2026-11-22")
    assert done.returncode == 3, done.stderr
    assert "max_quarantined_fraction" in done.stderr
    assert runs.release_ids() == before


def collapsed(bundle_uri: Path, version: str, target: Path) -> None:
    """Promote a copy of a bundle whose compressor gives nearly the same vector for every text."""
    folder, bundle = local_bundle(Storage(), str(bundle_uri / version), version)

    def write(copy: Path) -> BundleCard:
        shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("bundle.json"))
        weights = load_file(copy / "compressor.safetensors")
        weights["mean"] += 1000  # z = W (h - mean): the same large vector for every h
        save_file(weights, copy / "compressor.safetensors")
        return bundle.card

    promote(Storage(), str(target), save_bundle(Storage(), str(target), write).version)


@pytest.mark.parametrize(("items", "refused"), [(ITEMS, True), (40, False)])
def test_a_collapsed_compressor_is_refused_except_for_few_items(
    runs: Runs, tmp_path: Path, items: int, refused: bool
) -> None:
    marc = Marc(tmp_path, CONFIG + "audit: {{max_quarantined_fraction: 1}}\n")
    write_catalogue(tmp_path / "catalogue", ds=FIRST, items=items)
    collapsed(runs.marc.root / "data" / "bundles", runs.bundle["bundle"], tmp_path / "data" / "bundles")
    done = marc.call("run", "--ds", FIRST)
    found = read_releases(Storage(), str(marc.table))
    if refused:
        assert (done.returncode, found) == (3, [])
        assert "two random vectors have a mean cosine of 1.000, audit.max_mean_cosine is 0.95" in done.stderr
    else:
        assert (done.returncode, len(found)) == (0, 1), done.stderr
        assert "mean cosine 1.000" in done.stdout


def test_runs_with_another_precision_publish_other_releases(runs: Runs, tmp_path: Path) -> None:
    marc = Marc(tmp_path, CONFIG + f"bundle_uri: {runs.marc.root}/data/bundles\n")
    for ds in (FIRST, SECOND):
        write_catalogue(tmp_path / "catalogue", ds=ds, items=ITEMS)

    def run(ds: str, bits: int) -> tuple[dict[str, Any], dict[str, Any], Matrix]:
        done = marc.call("run", "--ds", ds, "--json", env={"MARC_MANTISSA_BITS": str(bits)})
        assert done.returncode == 0, done.stderr
        rows = open_release(marc.table, ds=ds).dataset().to_table().sort_by("item_id")
        vectors = np.array(rows["vector"].to_pylist(), np.float32)
        assert np.array_equal(vectors, round_mantissas(vectors, bits))
        return json.loads(done.stdout), dict(zip(rows["item_id"].to_pylist(), vectors, strict=True)), vectors

    first, old, _ = run(FIRST, 10)
    assert (first["mantissa_bits"], first["encoded"]) == (10, runs.first["encoded"])
    assert first["bytes_per_item"] < runs.first["bytes_per_item"]
    second, new, vectors = run(SECOND, 10)
    assert [second[name] for name in ("reused", "encoded")] == [runs.second[name] for name in ("reused", "encoded")]
    assert sum(item in old and np.array_equal(new[item], old[item]) for item in new) >= second["reused"] > 0

    coarser, _, found = run(SECOND, 7)
    assert (coarser["release_id"] != second["release_id"], coarser["encoded"]) == (True, 0)
    assert np.array_equal(found, round_mantissas(vectors, 7))
    finer, _, found = run(SECOND, 12)
    # Vectors with fewer bits cannot be refined, so every item is re-encoded.
    assert (finer["reused"], finer["changed"]) == (0, finer["items"])
    whole = runs.open(SECOND).dataset().to_table().sort_by("item_id")
    assert cosines(found, np.array(whole["vector"].to_pylist(), np.float32)).min() > 0.9999
    assert not np.array_equal(found, round_mantissas(found, 11))

    refused = marc.call("backfill", "--ds", SECOND, "--bucket", "1", env={"MARC_MANTISSA_BITS": "7"})
    assert refused.returncode == 2
    assert "stores 12 mantissa bits, the configuration has 7: backfill the whole date" in refused.stderr
    shown = " ".join(re.sub("[│┃]", " ", marc.call("summary", "--ds", SECOND).stdout).split())
    assert re.search(r"[\d,]+ bytes per item, 12 mantissa bits\)", shown)
    assert marc.call("verify", "--ds", SECOND).returncode == 0


def test_variables_override_the_configuration(runs: Runs) -> None:
    done = runs.marc.call("releases", "--json", env={"MARC_TABLE_URI": "/nonexistent/table"})
    assert json.loads(done.stdout) == {"releases": []}


@pytest.mark.parametrize("count", [1500, pytest.param(7787, marks=pytest.mark.slow)])
def test_a_real_catalogue_runs_with_a_configuration_of_ten_lines(netflix: Path, tmp_path: Path, count: int) -> None:
    # A row is one line. A part of the catalogue starts with the titles that the query below asks for.
    header, *rows = netflix.read_bytes().splitlines(keepends=True)
    rows.sort(key=lambda row: not any(word.encode() in row.lower() for word in SPACE))
    (tmp_path / "c.csv").write_bytes(b"".join([header, *rows[:count]]))
    config = f"""root: {tmp_path}/netflix
catalogue:
  uri: {tmp_path}/c.csv
  id_column: show_id
  template: "{{{{title}}}}. {{{{type}}}}. {{{{listed_in}}}}. {{{{description}}}}"
"""
    assert len(config.splitlines()) <= 10
    marc = Marc(tmp_path, config)
    marc.call("train", "--ds", FIRST, env={"MARC_TRAIN__SAMPLE": str(min(count, 2500))})
    run = marc.json("run", "--ds", FIRST)
    assert run["items"] + run["quarantined"] == count
    assert run["quarantined"] < 20
    assert run["recall"] >= 0.95
    found = marc.json("lookup", "--text", "documentary about space travel", "-k", "5")["neighbours"][0]
    texts = " ".join(row["text"].lower() for row in found)
    assert sum(word in texts for word in SPACE) >= 2, texts
    assert len(marc.json("lookup", "--item", "s1")["neighbours"][0]) == 10

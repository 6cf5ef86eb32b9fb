"""The whole way of the data through the command line: nights, bad input, altered files. Real Spark, real model."""

import csv
import io
import json
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as pads
import pytest
from numpy.typing import NDArray
from tiny_models import cosines

from pipeline.cli import main
from pipeline.example_data import MESSY_ROWS, write_catalogue
from pipeline.model.bundle import local_bundle
from pipeline.model.encoder import load_encoder
from pipeline.precision import round_mantissas
from pipeline.reader import open_release
from schemas.release import Release

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


@dataclass
class Answer:
    """What a call of ``marc`` gave."""

    returncode: int
    stdout: str
    stderr: str


class Marc:
    """``marc`` as its users call it, in this process: Spark and the model start once."""

    def __init__(self, root: Path, config: str = CONFIG) -> None:
        self.root = root
        self.config = root / "marc.yaml"
        self.config.write_text(config.format(root=root))

    def call(self, *arguments: str, env: dict[str, str] | None = None) -> Answer:
        argv = ["marc", "--config", str(self.config), *arguments]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setattr(sys, "argv", argv)
            for name, value in (env or {}).items():
                patch.setenv(name, value)
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
            except Exception:
                code = 1
                traceback.print_exc(file=err)
        return Answer(code, out.getvalue(), err.getvalue())

    def json(self, *arguments: str) -> dict[str, Any]:
        done = self.call(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    @property
    def table(self) -> Path:
        return self.root / "data" / "item_vectors"


def good_rows(path: Path) -> dict[str, str]:
    """Id to rendered text of the rows that can be used, read with Python's own csv module."""
    newest: dict[str, tuple[str, str]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file):
            texts = [row[name] or "" for name in ("title", "brand", "category", "description")]
            usable = row["item_id"] and any(text.strip() for text in texts) and "�" not in "".join(texts)
            if usable and row["updated_at"] >= newest.get(row["item_id"], ("", ""))[0]:
                newest[row["item_id"]] = (row["updated_at"], "{}. {}. {}. {}".format(*texts).strip())
    return {item: text for item, (_, text) in newest.items()}


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, spark: Any) -> "Nights":
    """Two nights, the first run twice."""
    root = tmp_path_factory.mktemp("nights")
    marc = Marc(root)
    write_catalogue(root / "catalogue", ds=FIRST, items=ITEMS)
    write_catalogue(root / "catalogue", ds=SECOND, items=ITEMS)
    bundle = marc.json("train", "--compressor", "pca", "--ds", FIRST)
    planned = marc.json("plan", "--ds", FIRST)
    first, again = marc.json("run", "--ds", FIRST), marc.json("run", "--ds", FIRST)
    second = marc.json("run", "--ds", SECOND)
    return Nights(marc, bundle, planned, first, again, second)


class Nights:
    """What the two nights said."""

    def __init__(self, marc: Marc, bundle: dict[str, Any], planned: dict[str, Any], *runs: dict[str, Any]) -> None:
        self.marc, self.bundle, self.planned = marc, bundle, planned
        self.first, self.again, self.second = runs

    def open(self, ds: str) -> Any:
        return open_release(self.marc.table, ds=ds)


def test_the_first_night_publishes_every_usable_item_and_quarantines_the_rest(nights: Nights) -> None:
    wanted = good_rows(nights.marc.root / "catalogue" / f"{FIRST}.csv")
    assert nights.first["items"] == nights.first["new"] == len(wanted) == ITEMS
    assert nights.first["quarantined"] == sum(MESSY_ROWS.values())
    assert nights.planned["quarantined"] == MESSY_ROWS
    assert set(nights.open(FIRST).dataset().to_table()["item_id"].to_pylist()) == set(wanted)
    assert nights.first["bundle"] == nights.bundle["bundle"]
    assert nights.first["recall"] >= 0.95


def test_the_json_of_a_run_holds_what_the_design_promises(nights: Nights) -> None:
    promised = {
        "release_id", "ds", "table_version", "bundle", "items", "new", "changed", "reused", "deleted", "quarantined",
        "tokens", "seconds",
    }  # fmt: skip
    assert promised <= nights.first.keys()
    assert {"plan", "encode", "audit", "index"} <= nights.first["seconds"].keys()
    assert nights.first["tokens"] == nights.planned["tokens"], "the plan counts tokens exactly at this size"


def test_a_second_run_of_the_same_night_makes_no_second_release(nights: Nights) -> None:
    assert nights.again["release_id"] == nights.first["release_id"]
    assert (nights.first["fresh"], nights.again["fresh"]) == (True, False)
    assert len(nights.marc.json("releases", "--ds", FIRST)["releases"]) == 1


def test_the_next_night_encodes_only_what_changed(nights: Nights) -> None:
    before = good_rows(nights.marc.root / "catalogue" / f"{FIRST}.csv")
    after = good_rows(nights.marc.root / "catalogue" / f"{SECOND}.csv")
    changed = {item for item in before.keys() & after.keys() if before[item] != after[item]}
    counts = {name: nights.second[name] for name in ("new", "changed", "reused", "deleted")}
    assert counts == {
        "new": len(after.keys() - before.keys()),
        "changed": len(changed),
        "reused": len(before.keys() & after.keys()) - len(changed),
        "deleted": len(before.keys() - after.keys()),
    }
    assert min(counts.values()) > 0
    old, new = (nights.open(ds).dataset().to_table().to_pylist() for ds in (FIRST, SECOND))
    then = {row["item_id"]: row for row in old}
    for row in new:
        same = row["item_id"] in then and row["item_id"] not in changed
        assert (row["encoded_at"] == then[row["item_id"]]["encoded_at"]) if same else True
        if same:
            assert row["vector"] == then[row["item_id"]]["vector"]


def test_removed_items_leave_table_and_index(nights: Nights) -> None:
    old, new = nights.open(FIRST), nights.open(SECOND)
    gone = set(old.dataset().to_table()["item_id"].to_pylist()) - set(new.dataset().to_table()["item_id"].to_pylist())
    names, _ = new.search(old.vectors(sorted(gone)), 20)
    assert not gone & set(names.ravel().tolist())


def test_a_pinned_reader_keeps_its_release_when_the_next_night_is_published(nights: Nights) -> None:
    pinned = nights.open(FIRST)
    assert len(pinned) == ITEMS
    assert pinned.dataset().count_rows() == ITEMS
    assert open_release(nights.marc.table).facts.ds == SECOND


def test_files_of_a_moment_are_those_that_readers_saw_then(nights: Nights) -> None:
    """Of the moment when the first night was published, whatever came later."""
    first = min(nights.marc.json("releases")["releases"], key=lambda release: str(release["created_at"]))
    then = nights.marc.json("files", "--at", first["created_at"])
    assert (then["release_id"], then["ds"]) == (first["release_id"], FIRST)
    assert then["files"] == open_release(nights.marc.table, release_id=first["release_id"]).files()
    assert then["files"] != nights.marc.json("files")["files"]


def test_the_same_rows_come_from_pyarrow_pandas_polars_duckdb_and_spark(nights: Nights, spark: Any) -> None:
    import duckdb
    import pandas as pd
    import polars as pl

    marc = nights.marc
    files = marc.call("files", "--ds", SECOND).stdout.split()
    wanted = nights.open(SECOND).dataset().to_table(columns=["item_id", "vector"]).sort_by("item_id")
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


def test_look_up_by_item_text_and_vector(nights: Nights, tmp_path: Path) -> None:
    marc, release = nights.marc, nights.open(SECOND)
    item = release.dataset().head(1)["item_id"][0].as_py()
    text = good_rows(marc.root / "catalogue" / f"{SECOND}.csv")[item]
    np.save(tmp_path / "q.npy", release.vectors([item]))
    by_item = marc.json("lookup", "--item", item, "-k", "5")["neighbours"][0]
    by_vector = marc.json("lookup", "--vector", str(tmp_path / "q.npy"), "-k", "6")["neighbours"][0]
    by_text = marc.json("lookup", "--text", text, "-k", "6")["neighbours"][0]
    assert [row["item_id"] for row in by_vector] == [item, *(row["item_id"] for row in by_item)]
    assert by_text[0]["item_id"] == item
    assert by_text[0]["score"] > 0.99


@pytest.fixture
def altered(nights: Nights) -> Iterator[Callable[[Path], None]]:
    """Flip one byte of a file; mended afterwards."""
    touched: dict[Path, bytes] = {}

    def alter(path: Path) -> None:
        data = path.read_bytes()
        touched[path] = data
        place = len(data) // 2
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])

    yield alter
    for path, data in touched.items():
        path.write_bytes(data)
    assert nights.marc.call("verify").returncode == 0


def facts(nights: Nights) -> Release:
    found: Release = nights.open(SECOND).facts
    return found


def test_the_command_starts_as_a_program_and_exits_with_its_code(nights: Nights) -> None:
    marc = [str(Path(sys.executable).with_name("marc")), "--config", str(nights.marc.config)]
    whole = subprocess.run([*marc, "verify"], capture_output=True, text=True, check=False)
    assert (whole.returncode, whole.stdout.startswith("release ")) == (0, True), whole.stderr
    mistaken = subprocess.run(
        [*marc, "run", "--ds", "2030-01-01", "--json"], capture_output=True, text=True, check=False
    )
    assert (mistaken.returncode, mistaken.stdout) == (2, "")


def test_an_altered_table_file_is_named_and_refused(nights: Nights, altered: Callable[[Path], None]) -> None:
    path = nights.marc.table / facts(nights).table_files[1].path
    altered(path)
    done = nights.marc.call("verify")
    assert (done.returncode, str(path) in done.stdout) == (1, True)
    with pytest.raises(Exception, match="differs from its checksum"):
        nights.open(SECOND).dataset().to_table()


def test_an_altered_index_file_is_named_and_refused(nights: Nights, altered: Callable[[Path], None]) -> None:
    path = Path(facts(nights).index_uri) / facts(nights).index_files[0].path
    altered(path)
    assert str(path) in nights.marc.call("verify").stdout
    item = nights.open(SECOND).dataset().head(1)["item_id"][0].as_py()
    done = nights.marc.call("lookup", "--item", item)
    assert (done.returncode, "differs from its checksum" in done.stderr) == (1, True)


@pytest.mark.parametrize("name", ["compressor.safetensors", "backbone/model.safetensors", "bundle.json"])
def test_an_altered_bundle_file_is_named_and_refused(
    nights: Nights, altered: Callable[[Path], None], name: str
) -> None:
    path = Path(facts(nights).bundle_uri) / name
    altered(path)
    # A process that loaded the bundle before keeps what it verified then; a new one must refuse.
    load_encoder.cache_clear()
    local_bundle.cache_clear()
    assert str(path) in nights.marc.call("verify").stdout
    assert nights.marc.call("lookup", "--text", "a lamp").returncode != 0


BAD: dict[str, tuple[str, str, list[str], str]] = {
    "no catalogue": ("", "", ["run", "--ds", "2030-01-01"], "no catalogue for 2030-01-01"),
    "no date": ("", "", ["run", "--ds", "yesterday"], "no date"),
    "missing text column": ("{description}", "{colour}", ["run", "--ds", FIRST], "'colour'"),
    "missing id column": (
        "  updated_at_column",
        "  id_column: sku\n  updated_at_column",
        ["run", "--ds", FIRST],
        "'sku'",
    ),
    "unknown key": ("buckets", "bukets", ["run", "--ds", FIRST], "unknown key bukets"),
    "template without column": (
        "{title}. {brand}. {category}. {description}",
        "item",
        ["run", "--ds", FIRST],
        "template",
    ),
    "no bundle": ("buckets", "bundle_uri: /nonexistent/bundles\nbuckets", ["run", "--ds", FIRST], "no bundle at"),
    "empty catalogue": ("{{ds}}.csv", "empty.csv", ["run", "--ds", FIRST], "is empty"),
    "header only": ("{{ds}}.csv", "header.csv", ["run", "--ds", FIRST], "is empty"),
    "unknown item": ("", "", ["lookup", "--item", "nobody"], "'nobody'"),
    "no release of the date": ("", "", ["files", "--ds", "2020-01-01"], "no release of 2020-01-01"),
    "a moment before all": ("", "", ["files", "--at", "2020-01-01T00:00:00+00:00"], "was there at 2020-01-01T00:00:00"),
    "no moment": ("", "", ["lookup", "--item", "a", "--at", "yesterday"], "'yesterday' is no moment"),
    "a moment without a time zone": ("", "", ["files", "--at", "2026-11-20T06:00"], "has no time zone"),
    "two queries": ("", "", ["lookup", "--item", "a", "--text", "b"], "exactly one"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_a_users_mistake_gives_exit_code_2_and_one_clear_line(
    nights: Nights, case: tuple[str, str, list[str], str], tmp_path: Path
) -> None:
    old, new, arguments, says = case
    catalogue = nights.marc.root / "catalogue"
    (catalogue / "empty.csv").write_text("")
    (catalogue / "header.csv").write_text("item_id,title,brand,category,description,updated_at\n")
    marc = Marc(tmp_path)
    text = CONFIG.format(root=nights.marc.root)
    wanted = text.replace(old.replace("{{", "{").replace("}}", "}"), new.replace("{{", "{").replace("}}", "}"))
    assert old == "" or wanted != text
    marc.config.write_text(wanted)
    before = [release.release_id for release in releases(nights)]
    done = marc.call(*arguments)
    lines = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in done.stderr
    assert [release.release_id for release in releases(nights)] == before


def releases(nights: Nights) -> list[Release]:
    from pipeline.release_log import read_releases
    from pipeline.storage import Storage

    return read_releases(Storage(), str(nights.marc.table))


def test_a_refused_gate_gives_exit_code_3_and_publishes_nothing(nights: Nights, tmp_path: Path) -> None:
    before = [release.release_id for release in releases(nights)]
    rows = "".join(f"x{number},,,,,2026-01-01\n" for number in range(300))
    source = nights.marc.root / "catalogue" / f"{SECOND}.csv"
    (tmp_path / "2026-11-22.csv").write_bytes(source.read_bytes() + rows.encode())
    marc = Marc(tmp_path)
    text = CONFIG.format(root=nights.marc.root).replace(f"{nights.marc.root}/catalogue", str(tmp_path))
    marc.config.write_text(text)
    done = marc.call("run", "--ds", "2026-11-22")
    assert done.returncode == 3, done.stderr
    assert "max_quarantined_fraction" in done.stderr
    assert [release.release_id for release in releases(nights)] == before


def test_nights_of_other_precisions_are_other_releases_and_none_mixes_them(nights: Nights, tmp_path: Path) -> None:
    marc = Marc(tmp_path, CONFIG + f"bundle_uri: {nights.marc.root}/data/bundles\n")
    for ds in (FIRST, SECOND):
        write_catalogue(tmp_path / "catalogue", ds=ds, items=ITEMS)

    def night(ds: str, bits: int) -> tuple[dict[str, Any], dict[str, Any], Matrix]:
        done = marc.call("run", "--ds", ds, "--json", env={"MARC_MANTISSA_BITS": str(bits)})
        assert done.returncode == 0, done.stderr
        rows = open_release(marc.table, ds=ds).dataset().to_table().sort_by("item_id")
        vectors = np.array(rows["vector"].to_pylist(), np.float32)
        assert np.array_equal(vectors, round_mantissas(vectors, bits))
        return json.loads(done.stdout), dict(zip(rows["item_id"].to_pylist(), vectors, strict=True)), vectors

    first, old, _ = night(FIRST, 10)
    assert (first["mantissa_bits"], first["encoded"]) == (10, nights.first["encoded"])
    assert first["bytes_per_item"] < nights.first["bytes_per_item"]
    second, new, vectors = night(SECOND, 10)
    assert [second[name] for name in ("reused", "encoded")] == [nights.second[name] for name in ("reused", "encoded")]
    assert sum(item in old and np.array_equal(new[item], old[item]) for item in new) >= second["reused"] > 0

    coarser, _, found = night(SECOND, 7)
    assert (coarser["release_id"] != second["release_id"], coarser["encoded"]) == (True, 0)
    assert np.array_equal(found, round_mantissas(vectors, 7))
    finer, _, found = night(SECOND, 12)
    # What was stored with fewer bits is no vector of more: all is as the other nights computed it.
    assert (finer["reused"], finer["changed"]) == (0, finer["items"])
    whole = nights.open(SECOND).dataset().to_table().sort_by("item_id")
    assert cosines(found, np.array(whole["vector"].to_pylist(), np.float32)).min() > 0.9999
    assert not np.array_equal(found, round_mantissas(found, 11))

    refused = marc.call("backfill", "--ds", SECOND, "--bucket", "1", env={"MARC_MANTISSA_BITS": "7"})
    assert refused.returncode == 2
    assert "stores 12 mantissa bits, the configuration says 7: backfill the whole day" in refused.stderr
    shown = " ".join(re.sub("[│┃]", " ", marc.call("summary", "--ds", SECOND).stdout).split())
    assert re.search(r"[\d,]+ bytes per item, 12 mantissa bits\)", shown)
    assert marc.call("verify", "--ds", SECOND).returncode == 0


def test_variables_override_the_configuration(nights: Nights) -> None:
    done = nights.marc.call("releases", "--json", env={"MARC_TABLE_URI": "/nonexistent/table"})
    assert json.loads(done.stdout) == {"releases": []}


SPACE = ("space", "mars", "astronaut", "earth")


@pytest.mark.parametrize("count", [1500, pytest.param(7787, marks=pytest.mark.slow)])
def test_the_real_catalogue_goes_through_with_a_configuration_of_ten_lines(
    netflix: Path, tmp_path: Path, count: int
) -> None:
    # A row is a line. A part of the catalogue begins with the titles that the query below is about.
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

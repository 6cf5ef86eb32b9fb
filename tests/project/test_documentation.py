"""The documentation is true: generated references are complete, commands exist, examples run."""

import ast
import gzip
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference_pages
import typer
import yaml
from pydantic import Field, create_model

import marc_pipeline
from marc_pipeline.cli.app import app
from marc_pipeline.config import Settings, load_settings
from marc_pipeline.reader import open_release
from markdown_examples import Checkout, blocks, commands, pages, prose
from published import Site, items
from tiny_models import save_tiny_backbone

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PAGES = pytest.mark.parametrize("page", pages(ROOT), ids=lambda page: page.stem)
COMMANDS = (
    "plan", "run", "backfill", "rollback", "vacuum", "train", "evaluate", "layers", "promote", "demote", "scores",
    "mteb", "files", "lookup", "verify", "releases", "summary", "example",
)  # fmt: skip
# Messages of the operating system in the runbook.
OF_THE_SYSTEM = {"No space left on device", "Disk quota exceeded"}
BETWEEN = "\0"


@cache
def root_command() -> Any:
    return typer.main.get_command(app)


# --- generated references


def test_the_configuration_page_has_one_row_per_key_with_default_values_and_description() -> None:
    table = reference_pages.settings_reference()
    for name, setting in Settings.model_fields.items():
        section = getattr(setting.annotation, "model_fields", None)
        for key in [f"{name}.{key}" for key in section] if section else [name]:
            assert table.count(f"| `{key}` |") == 1, key
    for row in (
        "`catalogue.uri` | required | str | File, folder or glob of the catalogue; {ds} stands for the date. |",
        "`encode.dtype` | `auto` | `auto`, `float32`, `bfloat16` |",
        "`index.target_recall` | `0.95` | float > 0, ≤ 1 |",
        "`evaluate.dims` | `[32, 64]` |",
        "`train.refit` | `true` | bool |",
        "`spark.conf` | `{}` |",
        "`storage.region` | none | str |",
    ):
        assert f"| {row}" in table


def test_a_setting_without_a_description_fails_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_pages, "Settings", create_model("Bare", buckets=(int, Field(16))))
    with pytest.raises(ValueError, match="the setting buckets has no description"):
        reference_pages.settings_reference()


def test_the_command_page_has_every_command_with_its_options() -> None:
    page = reference_pages.command_reference()
    assert set(COMMANDS) <= set(root_command().commands)
    for name, command in root_command().commands.items():
        with redirect_stdout(io.StringIO()) as help_text:
            command.main(["--help"], prog_name=f"marc {name}", standalone_mode=False)
        assert "--json" in help_text.getvalue(), name
        section = page.split(f"## marc {name}\n")[1].split("\n## ")[0]
        assert "| `--json` |" in section, name
        for parameter in command.params:
            shown = parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper()
            assert f"`{shown}`" in section, (name, shown)
            assert parameter.help, f"marc {name}: {shown} has no help"
    assert "| `--promote`, `--no-promote` | `on` |" in page


def test_the_error_table_has_every_class_with_its_exit_code() -> None:
    table = reference_pages.error_reference()
    assert re.findall(r"\| `(\w+)` \| [234] \|", table) == ["ReleaseGone", "UserError", "GateRefused", "Superseded"]
    assert "| `CorruptFile` | 1 |" in table


# --- prose and examples


@PAGES
def test_sentences_are_short(page: Path) -> None:
    too_long = [sentence for sentence in prose(page) if len(sentence.split()) >= 35]
    assert not too_long


@PAGES
def test_every_command_exists_with_its_options(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python" and words[1] != "-m":
            # A script declares "--option" or passes option=default; scripts of a folder may share options.
            source = "".join(path.read_text() for path in (ROOT / words[1]).parent.glob("*.py"))
            for option in (word for word in words[2:] if word.startswith("--")):
                assert f'"{option}"' in source or f"{option[2:].replace('-', '_')}=" in source, words
        elif words[0] == "marc":
            name, *rest = words[3:] if words[1] == "-c" else words[1:]
            root_command().commands[name].make_context(name, rest)


@PAGES
def test_every_configuration_loads(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        (tmp_path / "marc.yaml").write_text(block)
        assert load_settings(tmp_path / "marc.yaml").catalogue.template


def test_the_examples_of_reading_run(tmp_path: Path) -> None:
    Site(tmp_path / "data" / "example").publish(items(40))
    opening, everything = blocks(ROOT / "docs" / "reading.md", "python")[:2]
    names = Checkout(tmp_path, ROOT).python(opening + everything)
    assert names["names"].shape == (2, 10)
    assert [row[0] for row in names["names"]] == names["table"]["item_id"][:2].to_pylist()
    assert (names["weights"].shape, names["frame"].shape) == ((40, 8), (40, 2))
    assert repr(names["then"]).startswith("<release ")


@pytest.mark.spark
def test_the_joins_give_every_click_its_vector(tmp_path: Path, spark: "SparkSession") -> None:
    vectors = items(40)
    clone = Checkout(tmp_path, ROOT)
    folder = tmp_path / "data" / "example"
    Site(folder).publish(vectors)
    clicked = [(f"user-{number % 7}", f"item-{number}") for number in range(0, 60, 2)]
    table = pa.table({"user_id": [user for user, _ in clicked], "item_id": [item for _, item in clicked]})
    pq.write_table(table, folder / "interactions.parquet")
    release = open_release(folder / "item_vectors")
    # Spark's relative paths are those of the folder where the JVM started.
    block = blocks(ROOT / "docs" / "reading.md", "python")[2].replace('"data/example', f'"{folder}')
    names: dict[str, Any] = clone.python(block, duckdb=duckdb, spark=spark, release=release)
    expected = [(user, item, vectors[item].tolist()) for user, item in clicked if item in vectors]
    here = [tuple(row.values()) for row in names["here"].to_pylist()]
    there = [tuple(row) for row in names["there"].collect()]
    assert len(expected) == 20
    assert sorted(here) == sorted(there) == sorted(expected)


@pytest.fixture
def small_model(tmp_path: Path) -> dict[str, str]:
    """Settings under which a training takes seconds."""
    train = {"BACKBONE": save_tiny_backbone(tmp_path / "tiny"), "MAX_TOKENS": 48, "LAYERS": 2, "DIM": 8, "EPOCHS": 1}
    evaluate = {"DIMS": [8], "SEEDS": 2, "TUNED_STEPS": 0, "TOLERANCE": 1}
    sections = {f"TRAIN__{key}": value for key, value in train.items()} | {
        f"EVALUATE__{key}": value for key, value in evaluate.items()
    }
    return {f"MARC_{key}": str(value) for key, value in {"BUCKETS": 4, **sections}.items()}


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_the_quickstart_runs(tmp_path: Path, small_model: dict[str, str]) -> None:
    page = ROOT / "docs" / "quickstart.md"
    clone = Checkout(tmp_path, ROOT, small_model)
    clone.line("marc example --ds 2026-11-20 --items 400")
    said = [clone.console(block) for block in blocks(page, "console")]
    assert "Nearest to waterproof hiking boots" in said[2]
    assert "2026-11-21" in said[3]
    names: dict[str, Any] = clone.python(blocks(page, "python")[0])
    assert names["names"].shape == (2, 5)


def raw_shop(folder: Path) -> None:
    """A small export in the format of Amazon's files of 2018."""
    draw = random.Random(0)  # noqa: S311 - no secret
    kinds = ("cream", "soap", "mask", "oil")
    products = [
        {"asin": f"B{number:04}", "title": f"Hand &amp; body {kinds[number % 4]} {number}", "brand": "Maison",
         "category": [], "description": [f"A {kinds[number % 4]} for dry skin.", "Vegan."]}
        for number in range(60)
    ]  # fmt: skip
    reviews = [
        {"reviewerID": f"U{user}", "asin": f"B{4 * draw.randrange(15) + user % 4:04}", "overall": 5.0,
         "verified": moment % 10 > 0, "unixReviewTime": 1_500_000_000 + 60 * moment}
        for moment, user in enumerate(draw.choices(range(40), k=900))
    ]  # fmt: skip
    for name, rows in (("meta_Luxury_Beauty", products), ("Luxury_Beauty_5", reviews)):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_the_tutorial_runs(tmp_path: Path, small_model: dict[str, str]) -> None:
    page = ROOT / "docs" / "tutorial.md"
    clone = Checkout(tmp_path, ROOT, small_model)
    raw_shop(tmp_path)
    (tmp_path / "beauty.yaml").write_text(blocks(page, "yaml")[0])
    said = [clone.console(block) for block in blocks(page, "console")]
    assert said[0].startswith("60 items, ")
    assert "Nearest to hand cream for dry skin" in said[3]
    assert (tmp_path / "evaluation" / "evaluation.md").is_file()
    names: dict[str, Any] = clone.python(blocks(page, "python")[0])
    assert names["names"].shape == (1, 5)


# --- the runbook


@cache
def trees() -> tuple[ast.AST, ...]:
    """The source of the program."""
    return tuple(ast.parse(source.read_text()) for source in sorted(Path(marc_pipeline.__path__[0]).rglob("*.py")))


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string below a node, with … for each value that is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def raised(*names: str) -> list[str]:
    """The messages of errors of these classes."""
    calls = [node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args]
    errors = [call for call in calls if ast.unparse(call.func).split(".")[-1] in names]
    found = [max(strings(error.args[0]), key=len, default="") for error in errors]
    return [message for message in found if len(message.replace("…", "").split()) > 3]


@cache
def phrases() -> tuple[str, ...]:
    """The messages in the first columns of the runbook's tables."""
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    return tuple(phrase for row in rows for phrase in re.findall(r"`([^`]+)`", row))


def quotes(phrase: str, text: str) -> bool:
    """Whether one message of a text contains a phrase; … and N stand for any value."""
    parts = re.split(r"…|\bN\b", phrase)
    return re.search(f"[^{BETWEEN}]*".join(re.escape(part.strip()) for part in parts), text) is not None


def test_the_runbook_quotes_messages_of_the_program() -> None:
    text = BETWEEN.join(text for tree in trees() for text in strings(tree))
    assert not [phrase for phrase in phrases() if phrase not in OF_THE_SYSTEM and not quotes(phrase, text)]


def test_the_runbook_covers_every_refusal_and_every_damage() -> None:
    kinds = ("GateRefused", "Superseded", "DayMoved", "CorruptFile", "MissingFile", "WorkerDied", "OutOfMemory")
    uncovered = [m for m in raised(*kinds) if not any(quotes(phrase, m) for phrase in phrases())]
    assert not uncovered


# --- habits


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_workflows_are_valid(workflow: str) -> None:
    path = ROOT / ".github" / "workflows" / f"{workflow}.yml"
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ".ci/run" in path.read_text()


def test_the_changelog_has_the_headings_of_its_format() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = "Added Changed Deprecated Removed Fixed Security Known"
    assert "\n## [Unreleased]\n" in text
    assert set(re.findall(r"^### (\w+)", text, re.MULTILINE)) <= set(headings.split())


def test_the_hooks_are_local_and_valid() -> None:
    path = ROOT / ".pre-commit-config.yaml"
    (repository,) = yaml.safe_load(path.read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"].split()[0] for hook in repository["hooks"]] == [
        f".venv/bin/{name}" for name in ("ruff", "ruff", "mypy", "lint-imports")
    ]
    pytest.importorskip("pre_commit", reason="it comes with the extra dev")
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", str(path)], check=True)

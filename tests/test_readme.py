"""The README tells the truth: its commands exist, its configuration loads, its Python runs."""

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from published import Site, items

from pipeline.config import Settings, load_settings
from pipeline.reader import open_release

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMMANDS = {
    "plan",
    "run",
    "backfill",
    "rollback",
    "vacuum",
    "train",
    "evaluate",
    "layers",
    "promote",
    "demote",
    "scores",
    "mteb",
    "files",
    "lookup",
    "verify",
    "releases",
    "summary",
    "example",
}


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text()


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


def test_the_two_commands_are_targets_that_make_explains(readme: str, repository: Path) -> None:
    commands = blocks(readme, "console")[0].split("\n")[:-1]
    assert commands == ["make nightly", "make test"]
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=repository).stdout
    assert all(command in shown for command in commands)


def test_ci_calls_the_test_command_of_the_readme(repository: Path) -> None:
    script = (repository / ".ci" / "run").read_text()
    assert "make check" in script.splitlines()
    assert "make test" in script.splitlines()


def test_the_example_configuration_loads(readme: str, tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(blocks(readme, "yaml")[0])
    settings = load_settings(tmp_path / "shop.yaml")
    assert settings.catalogue_uri("2026-11-20") == "/data/exports/2026-11-20/*.parquet"
    assert settings.table_uri == "/data/shop/item_vectors"


def test_the_python_example_runs(readme: str, tmp_path: Path) -> None:
    Site(tmp_path).publish(items(40))
    code = blocks(readme, "python")[0].replace("data/example/item_vectors", f"{tmp_path}/item_vectors")
    code += "print(names.shape, [row[0] for row in names] == ids)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(2, 10) True"


def test_the_examples_of_reading_everything_run(readme: str, tmp_path: Path) -> None:
    Site(tmp_path).publish(items(40))
    code = "\n".join(blocks(readme, "python")[:2])
    # The release was made now, not then.
    code = code.replace("datetime(2026, 11, 20, 12, tzinfo=UTC)", "datetime.now(UTC)")
    code = code.replace("data/example/item_vectors", f"{tmp_path}/item_vectors")
    code += "print(weights.shape, frame.shape, len(ids), then)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("torch.Size([40, 8]) (40, 2) 40 <release ")


@pytest.mark.spark
def test_the_joins_of_the_readme_give_every_click_its_vector(
    readme: str, tmp_path: Path, spark: "SparkSession"
) -> None:
    vectors = items(40)
    Site(tmp_path).publish(vectors)
    clicked = [(f"user-{number % 7}", f"item-{number}") for number in range(0, 60, 2)]
    table = pa.table({"user_id": [user for user, _ in clicked], "item_id": [item for _, item in clicked]})
    pq.write_table(table, tmp_path / "interactions.parquet")
    names = {"duckdb": duckdb, "spark": spark, "release": open_release(tmp_path / "item_vectors")}
    exec(blocks(readme, "python")[2].replace("data/example", str(tmp_path)), names)  # noqa: S102
    expected = [(user, item, vectors[item].tolist()) for user, item in clicked if item in vectors]
    here = [tuple(row.values()) for row in names["here"].to_pylist()]
    there = [tuple(row) for row in names["there"].collect()]
    assert len(expected) == 20
    assert sorted(here) == sorted(there) == sorted(expected)


def test_every_command_that_the_readme_names_exists_and_explains_itself(readme: str) -> None:
    named = set(re.findall(r"^marc (?:-c \S+ )?(\w+)", "\n".join(blocks(readme, "console")), re.MULTILINE))
    assert named <= COMMANDS
    for name in COMMANDS:
        code = f"import sys; sys.argv = ['marc', '{name}', '--help']; from pipeline.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--json" in done.stdout


def test_the_table_of_settings_names_every_key(readme: str) -> None:
    table = readme.split("## Settings")[1].split("## ", maxsplit=1)[0]
    for name, field in Settings.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        for key in section or ():
            assert re.search(rf"`{name}\.[^|]*\b{key}\b|`\.{key}`", table), f"{name}.{key}"
        if section is None:
            assert f"`{name}`" in table, name

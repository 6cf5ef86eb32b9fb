"""The README is short and plain, and every example in it runs as it is printed."""

import re
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from marc_pipeline.config import load_settings
from markdown_examples import Checkout, blocks, prose
from published import Site, items
from tiny_models import save_tiny_backbone

SMALL = {
    "MARC_TRAIN__DIM": "8",
    "MARC_TRAIN__MAX_TOKENS": "48",
    "MARC_TRAIN__COMPRESSOR": "pca",
    "MARC_BUCKETS": "8",
    # The example has 12 unusable rows, whatever its size.
    "MARC_AUDIT__MAX_QUARANTINED_FRACTION": "0.3",
}


@pytest.fixture(scope="module")
def readme(repository: Path) -> Path:
    return repository / "README.md"


def test_the_readme_and_its_sentences_are_short(readme: Path) -> None:
    assert len(readme.read_text().splitlines()) <= 150
    longest = max(prose(readme), key=lambda sentence: len(sentence.split()))
    assert len(longest.split()) < 35, longest


def test_the_two_commands_are_targets_that_make_explains(readme: Path, repository: Path) -> None:
    commands = blocks(readme, "console")[0].split("\n")[:-1]
    assert commands == ["make nightly", "make test"]
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=repository).stdout
    assert all(command in shown for command in [*commands, "make docs", "make ui"])


def test_ci_calls_the_test_command_of_the_readme(repository: Path) -> None:
    script = (repository / ".ci" / "run").read_text().splitlines()
    assert {"make check", "make docs", "make test", "make test-slow"} <= set(script)


def test_its_links_lead_to_files_and_headings(readme: Path, repository: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
        path, _, anchor = target.partition("#")
        assert (repository / path).exists(), target
        headings = re.findall(r"^#+ (.+)$", (repository / path).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}, target


def test_the_example_configuration_loads(readme: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.yaml").write_text(blocks(readme, "yaml")[0])
    settings = load_settings(tmp_path / "shop.yaml")
    assert settings.catalogue_uri("2026-11-20") == f"{tmp_path}/data/exports/2026-11-20/*.parquet"
    assert settings.table_uri == f"{tmp_path}/data/shop/item_vectors"


def test_the_python_example_runs(readme: Path, tmp_path: Path, repository: Path) -> None:
    Site(tmp_path / "data" / "example").publish(items(40))
    names = Checkout(tmp_path, repository).python(blocks(readme, "python")[0])
    assert (names["names"].shape, [row[0] for row in names["names"]]) == ((2, 10), names["ids"])
    assert not set(names["ids"]) & set(names["near"].ravel())


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.usefixtures("spark")
def test_every_command_runs_in_a_fresh_clone(readme: Path, tmp_path: Path, repository: Path) -> None:
    """With a small model and catalogue; ``make nightly`` does the first two lines here."""
    clone = Checkout(tmp_path, repository, {**SMALL, "MARC_TRAIN__BACKBONE": save_tiny_backbone(tmp_path / "tiny")})
    clone.console("marc example --ds 2026-11-20 --items 400\nmarc train --ds 2026-11-20\nmarc run --ds 2026-11-20")
    nightly, shell, shop, engineer = blocks(readme, "console")
    assert clone.console(nightly) == ""
    said = clone.console(shell)
    assert "Nearest to waterproof hiking boots" in said
    clone.env["RELEASE_ID"] = re.search(r"\d{8}T\d+-\w+", said)[0]
    clone.console("marc example --ds 2026-11-21")
    assert "superseded" not in clone.console(engineer)

    (tmp_path / "shop.yaml").write_text(blocks(readme, "yaml")[0])
    folder = tmp_path / "data" / "exports" / "2026-11-20"
    folder.mkdir(parents=True)
    columns = {name: [f"{name} {number}" for number in range(60)] for name in ("sku", "title", "category")}
    pq.write_table(pa.table(columns | {"description": columns["title"]}), folder / "part.parquet")
    assert "60" in clone.console(shop)
    assert (tmp_path / "data" / "shop" / "item_vectors").is_dir()

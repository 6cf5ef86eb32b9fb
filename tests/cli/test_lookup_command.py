"""``marc lookup``: items, files of ids, vectors, texts and filters, and refused arguments."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from command_line import marc
from marc_pipeline.config import EncodeSettings
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.model.bundle import local_bundle
from marc_pipeline.model.encoder import load_encoder
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.reader.texts import encode_texts
from marc_pipeline.resources import TaskResources
from marc_pipeline.storage import Storage
from published import DIM, Site, flip, items
from release_cases import altered
from tiny_models import train_tiny_bundle

VECTORS = items(40)
# Ids that a file with one id per line must preserve.
ODD = {" spaced ": VECTORS["item-0"], "line\u2028separator": VECTORS["item-1"], "Ünïcode": VECTORS["item-2"]}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> OpenRelease:
    site = Site(tmp_path_factory.mktemp("site"))
    site.publish({**VECTORS, **ODD})
    return open_release(site.table_uri)


@pytest.fixture(scope="module")
def look_up(release: OpenRelease) -> Callable[..., Result]:
    return partial(marc, Path(release.files()[0].split("/item_vectors/")[0]), "lookup")


def neighbours(result: Result) -> dict[str, list[tuple[str, float]]]:
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    found = [[(row["item_id"], row["score"]) for row in rows] for rows in answer["neighbours"]]
    return dict(zip(answer["queries"], found, strict=True))


def lines(path: Path, *ids: str) -> str:
    path.write_bytes("".join(f"{one}\n" for one in ids).encode())
    return str(path)


def expected(found: tuple[Any, Any]) -> list[list[tuple[str, float]]]:
    return [
        [(name, float(score)) for name, score in zip(names, scores, strict=True) if name is not None]
        for names, scores in zip(*found, strict=True)
    ]


def test_items_come_from_options_files_and_standard_input(
    release: OpenRelease, look_up: Callable[..., Result], tmp_path: Path
) -> None:
    ids = ["item-3", *ODD]
    wanted = dict(zip(ids, expected(release.similar(ids, 4)), strict=True))
    assert all(len(row) == 4 for row in wanted.values())
    options = [part for one in ids for part in ("--item", one)]
    assert neighbours(look_up(*options, "-k", "4", "--json")) == wanted
    file = lines(tmp_path / "ids.txt", *ids)
    assert neighbours(look_up("--items", file, "-k", "4", "--json")) == wanted
    windows = "\ufeff" + "".join(f"{one}\r\n\r\n" for one in ids)
    assert neighbours(look_up("--items", "-", "-k", "4", "--json", stdin=windows.encode())) == wanted


def test_vectors_filters_and_rerank_are_passed_to_the_search(
    release: OpenRelease, look_up: Callable[..., Result], tmp_path: Path
) -> None:
    asked = release.vectors(["item-5", "item-6"])
    np.save(tmp_path / "q.npy", asked)
    within = [f"item-{number}" for number in range(3, 12)]
    files = ["--within", lines(tmp_path / "in", *within, "nobody"), "--without", lines(tmp_path / "out", "item-5")]
    found = neighbours(look_up("--vector", str(tmp_path / "q.npy"), *files, "-k", "20", "--rerank", "30", "--json"))
    wanted = expected(release.search(asked, 20, within=within, without=["item-5"], rerank=30))
    assert list(found.values()) == wanted
    # Missing results are left out.
    assert [len(row) for row in wanted] == [8, 8]
    assert list(found) == [f"row {row} of {tmp_path / 'q.npy'}" for row in range(2)]
    nothing = look_up("--item", "item-3", "--without", lines(tmp_path / "none"), "-k", "60", "--json")
    assert len(neighbours(nothing)["item-3"]) == len(release) - 1


def test_each_query_prints_one_table(look_up: Callable[..., Result]) -> None:
    shown = look_up("--item", "item-3", "--item", "item-4", "-k", "2").stdout
    assert "Nearest to item-3" in shown
    assert "Nearest to item-4" in shown


BAD: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "give exactly one of --item, --items, --text and --vector"),
    "two kinds": (["--item", "item-1", "--text", "x"], "give exactly one of"),
    "a file twice": (["--items", "-", "--within", "-"], "only one of"),
    "no such file": (["--items", "{tmp}/nowhere"], "No such file"),
    "an empty file": (["--items", "{tmp}/empty"], "has no item ids; write one per line"),
    "an empty filter": (["--item", "item-1", "--within", "{tmp}/empty"], "--within {tmp}/empty has no item ids"),
    "another encoding": (["--items", "{tmp}/latin"], "is not UTF-8: byte 0xfc in line 2"),
    "unknown items": (["--items", "{tmp}/unknown"], "does not contain item 'nobody', 'no one' (2 missing)"),
    "no array": (["--vector", "{tmp}/latin"], "--vector {tmp}/latin"),
    "an empty array file": (["--vector", "{tmp}/empty"], "--vector {tmp}/empty"),
    "texts for vectors": (["--vector", "{tmp}/texts.npy"], "--vector {tmp}/texts.npy"),
    "no vectors": (["--vector", "{tmp}/none.npy"], "has no vectors"),
    "another width": (["--vector", "{tmp}/wide.npy"], "queries have shape (2, 9), the release needs [n, 8]"),
    "few candidates": (["--item", "item-1", "--rerank", "3"], "rerank is 3"),
    "an empty text": (["--text", "lamp", "--text", " "], "text 1 is empty"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_invalid_arguments_are_named(
    look_up: Callable[..., Result], tmp_path: Path, case: tuple[list[str], str]
) -> None:
    arguments, message = case
    (tmp_path / "empty").write_bytes(b"" if "--vector" in arguments else b"\n")
    (tmp_path / "latin").write_bytes(b"item-1\nm\xfcller\n")
    lines(tmp_path / "unknown", "nobody", "item-1", "no one")
    np.save(tmp_path / "texts.npy", np.array(["a", "b"]))
    np.save(tmp_path / "none.npy", np.empty((0, DIM)))
    np.save(tmp_path / "wide.npy", np.zeros((2, DIM + 1)))
    result = look_up(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert isinstance(result.exception, UserError)
    assert message.replace("{tmp}", str(tmp_path)) in str(result.exception)


@pytest.fixture(scope="module")
def with_model(release: OpenRelease, tmp_path_factory: pytest.TempPathFactory) -> OpenRelease:
    """The release with a bundle that can encode texts."""
    bundle = train_tiny_bundle(tmp_path_factory.mktemp("bundle"), dim=DIM)
    facts = altered(release.facts, bundle__version=bundle.version, bundle__uri=bundle.uri)
    return OpenRelease(facts, uri=release.files()[0].split("/ds=")[0], storage=release.storage)


def test_texts_are_encoded_with_the_bundle_of_the_release(with_model: OpenRelease) -> None:
    texts = ["a red lamp", "two books", "a red lamp", "a"]
    settings = EncodeSettings(device="cpu", dtype="float32")
    found = encode_texts(with_model, texts, settings=settings)
    bundle = with_model.facts.bundle
    encoder = load_encoder(Storage(), bundle.uri, bundle.version, settings, TaskResources())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [encoder.encode([text]).vectors[0] for text in texts], atol=1e-5)
    names, _ = with_model.search(found, k=3)
    assert names.shape == (4, 3)
    assert names[0].tolist() == names[2].tolist()


def test_long_texts_are_encoded_like_the_items_of_the_release(with_model: OpenRelease) -> None:
    cut, release = EncodeSettings(device="cpu", dtype="float32"), with_model
    pool, bundle = cut.model_copy(update={"long_texts": "pool"}), release.facts.bundle
    text = "a red lamp and two books " * 50
    vectors = [
        load_encoder(Storage(), bundle.uri, bundle.version, each, TaskResources()).encode([text]).vectors
        for each in (cut, pool)
    ]
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    pooled = altered(release.facts, table__long_texts="pool")
    of_pooled = OpenRelease(pooled, uri=release.files()[0].split("/ds=")[0], storage=release.storage)
    np.testing.assert_allclose(encode_texts(release, [text], settings=pool), vectors[0], atol=1e-5)
    np.testing.assert_allclose(encode_texts(of_pooled, [text], settings=cut), vectors[1], atol=1e-5)


def test_a_damaged_bundle_is_refused(with_model: OpenRelease) -> None:
    weights = next(Path(with_model.facts.bundle.uri).glob("*.safetensors"))
    load_encoder.cache_clear()
    local_bundle.cache_clear()
    flip(weights, 100)
    try:
        with pytest.raises(CorruptFile, match=weights.name):
            encode_texts(with_model, ["a lamp"])
    finally:
        flip(weights, 100)


def test_invalid_texts_are_refused(release: OpenRelease) -> None:
    with pytest.raises(UserError, match="text 1 is empty"):
        encode_texts(release, ["a lamp", "\t"])
    with pytest.raises(UserError, match="texts is the string 'a lamp'; pass a list"):
        encode_texts(release, "a lamp")
    assert encode_texts(release, []).shape == (0, DIM)


def test_without_the_extra_the_error_names_it(release: OpenRelease, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "marc_pipeline.model.encoder", None)
    with pytest.raises(UserError, match=r"pip install 'marc-pipeline\[model\]'"):
        encode_texts(release, ["a lamp"])

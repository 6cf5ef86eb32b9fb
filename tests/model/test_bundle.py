"""Bundles on disk: named by their content, opened through a pointer, refused if a byte differs."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from folder_as_s3 import BUCKET, FolderAsS3
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.model.bundle import Bundle, check_bundle, local_bundle, open_bundle, promote, save_bundle
from marc_pipeline.storage import Storage
from marc_schemas.bundle import BundleCard, CompressorCard
from published import flip

STORAGE = Storage()
CARD = BundleCard(
    backbone="tiny",
    layers_kept=2,
    backbone_layers=4,
    pooling="mean",
    max_tokens=16,
    width=32,
    dim=8,
    normalised=True,
    template="{title}",
    compressor=CompressorCard(kind="pca", arguments={"width": 32, "dim": 8}),
    training={"texts": 3},
    metrics={"explained_variance": 0.5},
    files={},
)
FILES = {
    "backbone/config.json": b"{}",
    "backbone/model.safetensors": bytes(range(256)) * 4,
    "compressor.safetensors": b"compressor",
}


def saved(folder: Path, files: dict[str, bytes] = FILES, card: BundleCard = CARD) -> Bundle:
    def write(target: Path) -> BundleCard:
        for name, data in files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(data)
        return card

    return save_bundle(STORAGE, str(folder), write)


def test_the_version_is_the_hash_of_a_card_that_names_every_file(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    folder = Path(bundle.uri)
    card = (folder / "bundle.json").read_bytes()
    assert folder.parent == tmp_path
    assert folder.name == bundle.version == hashlib.sha256(card).hexdigest()[:16]
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {*FILES, "bundle.json"}
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    assert json.loads(card)["files"] == expected == bundle.card.files
    assert (bundle.card_file.sha256, bundle.card_file.bytes) == (hashlib.sha256(card).hexdigest(), len(card))


def test_equal_content_has_the_same_version_and_any_other_byte_name_or_card_another_one(tmp_path: Path) -> None:
    first = saved(tmp_path)
    assert saved(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.version]
    assert saved(tmp_path / "elsewhere").version == first.version
    others = []
    for name, data in FILES.items():
        for changed in (bytes([data[0] ^ 1]) + data[1:], data[:-1] + bytes([data[-1] ^ 1])):
            others.append(saved(tmp_path, {**FILES, name: changed}))
    renamed = {f"{name}.old" if name.startswith("compressor") else name: data for name, data in FILES.items()}
    others.append(saved(tmp_path, renamed))
    for change in ({"pooling": "last"}, {"max_tokens": 17}, {"normalised": False}, {"template": "{title}."}):
        others.append(saved(tmp_path, card=CARD.model_copy(update=change)))
    assert len({bundle.version for bundle in (first, *others)}) == 1 + len(others)
    assert not any(check_bundle(STORAGE, bundle) for bundle in (first, *others))


def test_a_partly_written_bundle_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved(tmp_path / "elsewhere")
    published = []

    def dies(self: Storage, staged: Path, uri: str) -> None:
        published.append(uri)
        if len(published) == len(FILES):
            raise OSError("disk full")
        real(self, staged, uri)

    real = Storage.publish
    monkeypatch.setattr(Storage, "publish", dies)
    with pytest.raises(OSError, match="disk full"):
        saved(tmp_path / "bundles")
    monkeypatch.undo()
    with pytest.raises(UserError, match="no bundle at"):
        open_bundle(STORAGE, str(tmp_path / "bundles" / whole.version))
    assert saved(tmp_path / "bundles").version == whole.version, "the next attempt completes the bundle"


def test_a_folder_of_bundles_opens_the_promoted_one(tmp_path: Path) -> None:
    first, second = saved(tmp_path), saved(tmp_path, {**FILES, "compressor.safetensors": b"other"})
    for bundle in (first, second, first):
        promote(STORAGE, str(tmp_path), bundle.version)
        assert open_bundle(STORAGE, str(tmp_path)) == bundle
    assert open_bundle(STORAGE, second.uri) == second, "the folder of a bundle does not depend on the pointer"


def test_missing_bundles_and_broken_pointers_are_user_errors(tmp_path: Path) -> None:
    saved(tmp_path)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"no bundle at {folder}; make one with `marc train`"):
            open_bundle(STORAGE, str(folder))
    promote(STORAGE, str(tmp_path), "0123456789abcdef")
    with pytest.raises(UserError, match=r"no bundle at .*/0123456789abcdef, which the pointer names"):
        open_bundle(STORAGE, str(tmp_path))
    for content in (b"{", b"{}", b"[]"):
        (tmp_path / "current.json").write_bytes(content)
        with pytest.raises(UserError, match=r"current\.json"):
            open_bundle(STORAGE, str(tmp_path))


BAD_FIELDS: list[dict[str, object]] = [
    {"format_version": 2}, {"format_version": 0}, {"quantisation": "int8"}, {"pooling": "max"}, {"layers_kept": -1},
]  # fmt: skip
BAD_CARDS = [json.dumps(json.loads(CARD.model_dump_json()) | change) for change in BAD_FIELDS]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", *BAD_CARDS])
def test_a_card_of_an_unknown_format_is_a_user_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(UserError, match=r"bundle\.json is not a bundle card of this format"):
        open_bundle(STORAGE, str(tmp_path))


@pytest.mark.parametrize("name", sorted(FILES))
def test_check_bundle_names_an_altered_file_and_local_bundle_refuses_it(tmp_path: Path, name: str) -> None:
    bundle = saved(tmp_path)
    assert check_bundle(STORAGE, bundle) == []
    flip(Path(bundle.uri) / name, 0)
    (problem,) = check_bundle(STORAGE, bundle)
    assert f"{bundle.uri}/{name} does not match its SHA-256" in problem
    with pytest.raises(CorruptFile, match=name):
        local_bundle(STORAGE, bundle.uri, bundle.version)


@pytest.mark.parametrize("name", ["backbone/adapter_config.json", "backbone/.hidden/weights.bin", "_new.json"])
def test_a_foreign_file_in_a_bundle_is_refused(tmp_path: Path, name: str) -> None:
    """transformers would load an adapter that lies beside the weights, and so change the vectors."""
    bundle = saved(tmp_path)
    planted = Path(bundle.uri) / name
    planted.parent.mkdir(exist_ok=True)
    planted.write_text("{}")
    (problem,) = check_bundle(STORAGE, bundle)
    assert problem.startswith(f"{bundle.uri}/{name} is not listed there")
    with pytest.raises(CorruptFile, match=f"{name} is not listed there"):
        local_bundle(STORAGE, bundle.uri, bundle.version)
    planted.unlink()
    (planted.parent / ".staged-of-a-dead-run").write_bytes(b"")
    assert check_bundle(STORAGE, bundle) == []
    assert local_bundle(STORAGE, bundle.uri, bundle.version)[1] == bundle


def test_every_altered_or_missing_file_is_named(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    flip(Path(bundle.uri) / "compressor.safetensors", 0)
    (Path(bundle.uri) / "backbone" / "config.json").unlink()
    problems = check_bundle(STORAGE, bundle)
    assert len(problems) == 2
    assert any("backbone/config.json is missing" in problem for problem in problems)
    with pytest.raises(CorruptFile, match=r"config\.json is missing; .*compressor\.safetensors does not match"):
        local_bundle(STORAGE, bundle.uri, bundle.version)


def test_an_altered_card_is_refused(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    card = Path(bundle.uri) / "bundle.json"
    card.write_text(card.read_text().replace('"max_tokens": 16', '"max_tokens": 17'))
    with pytest.raises(CorruptFile, match=f"not {bundle.version}: the bundle was altered"):
        local_bundle(STORAGE, bundle.uri, bundle.version)


def test_a_valid_local_bundle_is_used_in_place_also_through_the_pointer(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    promote(STORAGE, str(tmp_path), bundle.version)
    for uri in (bundle.uri, str(tmp_path)):
        assert local_bundle(STORAGE, uri, bundle.version) == (Path(bundle.uri), bundle)


def test_an_altered_file_with_the_same_size_and_time_is_found(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    path = Path(bundle.uri) / "backbone" / "model.safetensors"
    before = path.stat()
    flip(path, 100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(check_bundle(STORAGE, bundle)) == 1


@pytest.mark.parametrize("name", ["bundle.json", *sorted(FILES)])
def test_a_local_copy_of_a_bundle_without_one_file_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    bundle = saved(tmp_path / "bundles")
    where = (FolderAsS3(folder=str(tmp_path)), f"{BUCKET}bundles/{bundle.version}", bundle.version)
    folder, opened = local_bundle(*where)
    assert (opened.card, folder.is_relative_to(tmp_path)) == (bundle.card, True)
    (folder / name).unlink()
    local_bundle.cache_clear()
    assert local_bundle(*where) == (folder, opened)
    assert (folder / name).read_bytes() == (Path(bundle.uri) / name).read_bytes()

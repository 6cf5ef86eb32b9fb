"""Bundles on disk: named by their content, opened through a pointer, refused when a byte differs."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from folder_as_s3 import BUCKET, FolderAsS3
from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.model.bundle import Bundle, check_bundle, local_bundle, open_bundle, promote, save_bundle
from marc_pipeline.storage import Storage
from marc_schemas.bundle import BundleCard, CompressorCard

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


def writer(files: dict[str, bytes] | None = None, card: BundleCard = CARD) -> Callable[[Path], BundleCard]:
    """What :func:`save_bundle` calls to fill a folder."""

    def write(folder: Path) -> BundleCard:
        for name, data in (FILES if files is None else files).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return card

    return write


def saved(folder: Path, files: dict[str, bytes] | None = None, card: BundleCard = CARD) -> Bundle:
    return save_bundle(STORAGE, str(folder), writer(files, card))


def flip(path: Path, *, byte: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


def test_the_version_is_the_hash_of_a_card_that_names_every_file(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    folder = Path(bundle.uri)
    card = (folder / "bundle.json").read_bytes()
    assert folder.parent == tmp_path
    assert folder.name == bundle.version == hashlib.sha256(card).hexdigest()[:16]
    on_disk = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "bundle.json"
    }
    assert json.loads(card)["files"] == on_disk == bundle.card.files
    assert set(on_disk) == set(FILES)
    assert bundle.card_file.sha256 == hashlib.sha256(card).hexdigest()
    assert bundle.card_file.bytes == len(card)


def test_the_same_content_has_the_same_version_wherever_it_is_saved(tmp_path: Path) -> None:
    assert saved(tmp_path / "a").version == saved(tmp_path / "b").version


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("byte", [0, -1])
def test_another_byte_in_any_file_is_another_version(tmp_path: Path, name: str, byte: int) -> None:
    changed = bytearray(FILES[name])
    changed[byte] ^= 1
    other = saved(tmp_path, {**FILES, name: bytes(changed)})
    assert other.version != saved(tmp_path).version
    assert check_bundle(STORAGE, other) == []


@pytest.mark.parametrize(
    "change", [{"pooling": "last"}, {"max_tokens": 17}, {"normalised": False}, {"template": "{title}."}]
)
def test_another_way_to_use_the_same_weights_is_another_version(tmp_path: Path, change: dict[str, object]) -> None:
    assert saved(tmp_path, card=CARD.model_copy(update=change)).version != saved(tmp_path).version


def test_a_file_under_another_name_is_another_version(tmp_path: Path) -> None:
    renamed = {f"{name}.old" if name.startswith("compressor") else name: data for name, data in FILES.items()}
    assert saved(tmp_path, renamed).version != saved(tmp_path).version


def test_saving_again_leaves_one_sound_bundle(tmp_path: Path) -> None:
    first = saved(tmp_path)
    assert saved(tmp_path) == first
    assert [path.name for path in tmp_path.iterdir()] == [first.version]
    assert check_bundle(STORAGE, first) == []


def test_a_bundle_that_was_not_written_to_the_end_is_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    # The next attempt finishes what lies there.
    assert saved(tmp_path / "bundles").version == whole.version


def test_the_promoted_bundle_is_the_one_that_its_folder_opens(tmp_path: Path) -> None:
    first, second = saved(tmp_path), saved(tmp_path, {**FILES, "compressor.safetensors": b"other"})
    for bundle in (first, second, first):
        promote(STORAGE, str(tmp_path), bundle.version)
        assert open_bundle(STORAGE, str(tmp_path)) == bundle
    # A bundle's own folder opens whatever the pointer says.
    assert open_bundle(STORAGE, second.uri) == second


def test_saving_alone_promotes_nothing(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(UserError, match="no bundle at"):
        open_bundle(STORAGE, str(tmp_path))


def test_a_missing_bundle_is_the_users_mistake_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no bundle at .*/nowhere; make one with `marc train`"):
        open_bundle(STORAGE, str(tmp_path / "nowhere"))


def test_a_pointer_to_a_bundle_that_is_gone_is_the_users_mistake(tmp_path: Path) -> None:
    promote(STORAGE, str(tmp_path), "0123456789abcdef")
    with pytest.raises(UserError, match=r"no bundle at .*/0123456789abcdef, which the pointer names"):
        open_bundle(STORAGE, str(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]"])
def test_a_pointer_that_cannot_be_read_is_the_users_mistake(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "current.json").write_bytes(content)
    with pytest.raises(UserError, match=r"current\.json"):
        open_bundle(STORAGE, str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": 0},
        {"quantisation": "int8"},
        {"pooling": "max"},
        {"layers_kept": 0},
    ],
)
def test_a_card_of_an_unknown_format_is_the_users_mistake(tmp_path: Path, change: dict[str, object]) -> None:
    card = json.loads(CARD.model_dump_json()) | change
    (tmp_path / "bundle.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"bundle\.json is no bundle card of this format"):
        open_bundle(STORAGE, str(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_a_card_that_is_no_card_is_the_users_mistake(tmp_path: Path, content: str) -> None:
    (tmp_path / "bundle.json").write_text(content)
    with pytest.raises(UserError, match=r"bundle\.json is no bundle card of this format"):
        open_bundle(STORAGE, str(tmp_path))


@pytest.mark.parametrize("name", sorted(FILES))
def test_check_bundle_names_the_flipped_file_and_local_bundle_refuses_it(tmp_path: Path, name: str) -> None:
    bundle = saved(tmp_path)
    assert check_bundle(STORAGE, bundle) == []
    flip(Path(bundle.uri) / name)
    (problem,) = check_bundle(STORAGE, bundle)
    assert f"{bundle.uri}/{name} does not match its SHA-256" in problem
    with pytest.raises(CorruptFile, match=name):
        local_bundle(STORAGE, bundle.uri, bundle.version)


def test_every_damaged_file_is_named_and_missing_ones_too(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    flip(Path(bundle.uri) / "compressor.safetensors")
    (Path(bundle.uri) / "backbone" / "config.json").unlink()
    problems = check_bundle(STORAGE, bundle)
    assert len(problems) == 2
    assert any("backbone/config.json is missing" in problem for problem in problems)
    with pytest.raises(CorruptFile, match=r"config\.json is missing; .*compressor\.safetensors does not match"):
        local_bundle(STORAGE, bundle.uri, bundle.version)


def test_a_card_that_was_altered_is_refused(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    card = Path(bundle.uri) / "bundle.json"
    card.write_text(card.read_text().replace('"max_tokens": 16', '"max_tokens": 17'))
    with pytest.raises(CorruptFile, match=f"not {bundle.version}: the bundle was altered"):
        local_bundle(STORAGE, bundle.uri, bundle.version)


def test_a_sound_local_bundle_is_used_where_it_lies(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    assert local_bundle(STORAGE, bundle.uri, bundle.version) == (Path(bundle.uri), bundle)


def test_a_local_bundle_is_found_through_the_pointer(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    promote(STORAGE, str(tmp_path), bundle.version)
    assert local_bundle(STORAGE, str(tmp_path), bundle.version) == (Path(bundle.uri), bundle)


def test_an_alteration_that_keeps_size_and_time_is_found(tmp_path: Path) -> None:
    bundle = saved(tmp_path)
    path = Path(bundle.uri) / "backbone" / "model.safetensors"
    before = path.stat()
    flip(path, byte=100)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(check_bundle(STORAGE, bundle)) == 1


@pytest.mark.parametrize("name", ["bundle.json", *sorted(FILES)])
def test_a_local_copy_of_a_bundle_that_lost_a_file_is_completed(
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

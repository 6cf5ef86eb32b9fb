"""Bundles on disk: save, hash and open immutable folders, and keep the pointer to the current bundle."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from marc_pipeline.errors import CorruptFile, UserError
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import FOREIGN, foreign, verified_folder
from marc_schemas.bundle import BundleCard
from marc_schemas.files import PublishedFile

CARD = "bundle.json"
POINTER = "current.json"
VERSION_CHARS = 16


@dataclass(frozen=True)
class Bundle:
    """Version, folder and card of a bundle, without its weights."""

    version: str
    uri: str
    card: BundleCard
    card_file: PublishedFile


def open_bundle(storage: Storage, uri: str) -> Bundle:
    """Return the bundle in a folder, or the current bundle of a folder of bundles.

    Raises:
        UserError: the folder has no bundle, or its card cannot be read.
    """
    data = _read(storage, join(uri, CARD))
    if data is None:
        versions = promoted(storage, uri)
        if not versions:
            raise UserError(f"no bundle at {uri}; make one with `marc train`")
        uri = join(uri, versions[-1])
        data = _read(storage, join(uri, CARD))
    if data is None:
        raise UserError(f"no bundle at {uri}, which the pointer names; promote one that exists")
    try:
        card = BundleCard.model_validate_json(data)
    except ValidationError as error:
        raise UserError(f"{join(uri, CARD)} is not a bundle card of this format: {error.errors()[0]['msg']}") from None
    sha = hashlib.sha256(data).hexdigest()
    return Bundle(sha[:VERSION_CHARS], uri, card, PublishedFile(path=CARD, bytes=len(data), sha256=sha))


def save_bundle(storage: Storage, uri: str, write: Callable[[Path], BundleCard]) -> Bundle:
    """Write a bundle below ``uri`` and return it; the same bundle may exist already.

    Args:
        storage: access to ``uri``.
        uri: folder of bundles.
        write: writes all files except the card to a local folder, and returns the card without checksums.
    """
    with tempfile.TemporaryDirectory(prefix="marc-bundle-") as folder:
        local = Path(folder)
        card = write(local)
        names = sorted(str(path.relative_to(local)) for path in local.rglob("*") if path.is_file())
        card = card.model_copy(update={"files": {name: _sha256(local / name) for name in names}})
        data = card.model_dump_json(indent=1).encode()
        target = join(uri, hashlib.sha256(data).hexdigest()[:VERSION_CHARS])
        for name in names:
            with storage.staged(join(target, name)) as staged:
                shutil.copyfile(local / name, staged)
                storage.publish(staged, join(target, name))
        # The card is written last: a folder with a card is a complete bundle.
        storage.write(join(target, CARD), data)
    return open_bundle(storage, target)


def promote(storage: Storage, uri: str, version: str) -> None:
    """Make a bundle of a folder the current one, in one atomic write that also records the earlier ones."""
    earlier = [one for one in promoted(storage, uri) if one != version]
    _point(storage, uri, [*earlier, version])


def demote(storage: Storage, uri: str) -> str:
    """Make the previous bundle current again, in one atomic write, and return its version.

    Raises:
        UserError: there is no previous bundle.
    """
    versions = promoted(storage, uri)
    if len(versions) < 2:
        raise UserError(f"no bundle was current at {uri} before this one")
    _point(storage, uri, versions[:-1])
    return versions[-2]


def promoted(storage: Storage, uri: str) -> list[str]:
    """Return all promoted versions; the current one is the last.

    Raises:
        UserError: the pointer cannot be read.
    """
    pointer = _read(storage, join(uri, POINTER))
    if pointer is None:
        return []
    try:
        content = json.loads(pointer)
        return [*map(str, content.get("before", [])), str(content["bundle"])]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{join(uri, POINTER)} cannot be read; promote a bundle again") from None


def _point(storage: Storage, uri: str, versions: list[str]) -> None:
    *before, current = versions
    storage.write(join(uri, POINTER), json.dumps({"bundle": current, "before": before}).encode())


def current_version(storage: Storage, uri: str) -> str | None:
    """Return the current version in a folder of bundles; None before the first promotion."""
    return next(reversed(promoted(storage, uri)), None)


def check_bundle(storage: Storage, bundle: Bundle) -> list[str]:
    """Return one line per missing, altered or foreign file of a bundle."""
    problems = []
    for name, expected in bundle.card.files.items():
        data = _read(storage, join(bundle.uri, name))
        if data is None:
            problems.append(f"{join(bundle.uri, name)} is missing")
        elif hashlib.sha256(data).hexdigest() != expected:
            problems.append(f"{join(bundle.uri, name)} does not match its SHA-256 {expected[:12]}…")
    depth = len(PurePosixPath(bundle.uri).parts)
    present = ("/".join(PurePosixPath(o.uri).parts[depth:]) for o in storage.list(bundle.uri, hidden=True))
    return problems + [f"{join(bundle.uri, name)} {FOREIGN}" for name in foreign(present, {CARD, *bundle.card.files})]


@lru_cache(maxsize=2)
def local_bundle(storage: Storage, uri: str, version: str) -> tuple[Path, Bundle]:
    """Return a bundle as a local folder, verified once per process; files on S3 are downloaded once per machine.

    Raises:
        CorruptFile: a file is missing, foreign or differs from its checksum, or the card belongs to another version.
    """
    bundle = open_bundle(storage, uri)
    if bundle.version != version:
        raise CorruptFile(f"{join(uri, CARD)} is version {bundle.version}, not {version}: the bundle was altered")
    folder = verified_folder(
        storage,
        bundle.uri,
        {CARD: bundle.card_file.sha256, **bundle.card.files},
        key=f"bundles/{bundle.version}",
        remedy="restore the bundle, or train and promote a new one",
        closed=True,
    )
    return folder, bundle


def _read(storage: Storage, uri: str) -> bytes | None:
    try:
        return storage.read(uri)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Ownership: the folder of indexes and that of plans belong to one table, so that a vacuum deletes what is its own."""

import json
import posixpath
from dataclasses import dataclass

from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, is_s3, join
from marc_pipeline.uris import bucket_and_key
from marc_pipeline.work_area import PLANS

OWNER = "_owner.json"


@dataclass(frozen=True)
class Claim:
    """A folder of a table.

    Attributes:
        since: time of the claim by the store's clock, seconds since 1970. Older files may belong to another table that
            used the folder before; None without a claim.
    """

    uri: str
    since: float | None


def claim(deployment: Deployment) -> None:
    """Claim the folders of indexes and plans for the deployment's table, before a run writes into them.

    Raises:
        UserError: a folder belongs to another table.
    """
    storage, table_uri = deployment.storage, deployment.settings.table_uri
    for key, uri in _folders(deployment):
        table = _seen_from(uri, table_uri)
        storage.create(join(uri, OWNER), json.dumps({"table": table}).encode())
        _require_own(storage, key, uri, table, table_uri)


def claims(deployment: Deployment) -> list[Claim]:
    """Return the folders of indexes and of plans with their claims, for a vacuum, which claims nothing.

    Raises:
        UserError: a folder belongs to another table.
    """
    storage, table_uri, found = deployment.storage, deployment.settings.table_uri, []
    for key, uri in _folders(deployment):
        stored = storage.stat(join(uri, OWNER))
        if stored is not None:
            _require_own(storage, key, uri, _seen_from(uri, table_uri), table_uri)
        found.append(Claim(uri, stored.modified if stored else None))
    return found


def _folders(deployment: Deployment) -> list[tuple[str, str]]:
    settings = deployment.settings
    return [("index_uri", settings.index_uri), ("work_uri", join(settings.work_uri, PLANS))]


def _require_own(storage: Storage, key: str, uri: str, table: str, table_uri: str) -> None:
    place = join(uri, OWNER)
    try:
        owner = json.loads(storage.read(place))["table"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{place} is damaged; delete it if no table but {table_uri} uses {uri}") from None
    if owner != table:
        raise UserError(
            f"{uri} belongs to another table, {owner} as seen from there: its files would be deleted with those of "
            f"{table_uri}; set {key} (or root) to a folder of its own, or delete {place} if that table is gone"
        )


def _seen_from(folder: str, table_uri: str) -> str:
    """Return the table's path relative to a folder, so that both can be moved together; across stores, its uri."""
    if is_s3(folder) != is_s3(table_uri):
        return table_uri
    if is_s3(folder):
        (bucket, key), (other, prefix) = bucket_and_key(table_uri), bucket_and_key(folder)
        return posixpath.relpath(f"/{key}", f"/{prefix}") if bucket == other else table_uri
    return posixpath.relpath(table_uri, folder)

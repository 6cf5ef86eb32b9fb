"""The release log: a small Delta table beside the feature table, where every reader starts."""

import logging
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError

from pipeline.delta import open_or_create, open_table
from pipeline.errors import UserError
from pipeline.storage import Storage, join
from schemas.release import FORMAT_VERSION, RELEASES, Release

# An underscore keeps the log out of what Delta and Spark take for data of the feature table.
FOLDER = "_releases"
COMMIT_TRIES = 5

log = logging.getLogger(__name__)


def read_releases(storage: Storage, table_uri: str) -> list[Release]:
    """Every release of a feature table, oldest first; empty before the first."""
    table = open_table(storage, join(table_uri, FOLDER))
    if table is None:
        return []
    # Names, not uris: those come percent-encoded.
    names = [uri.rsplit("/", 1)[1] for uri in table.file_uris()]
    rows = [row for name in names for row in _read_file(storage, join(table_uri, FOLDER, name))]
    newer = next((row for row in rows if row["format_version"] != FORMAT_VERSION), None)
    if newer:
        wanted = f"format {newer['format_version']}, this is format {FORMAT_VERSION}"
        raise UserError(f"release {newer['release_id']} at {table_uri} has {wanted}; upgrade marc-pipeline")
    releases = [Release.model_validate({**row, "seconds": dict(row["seconds"])}) for row in rows]
    return sorted(releases, key=lambda release: (release.created_at, release.release_id))


def newest(releases: Iterable[Release], *, ds: str | None = None) -> Release | None:
    """The release of the latest ds, or of one ds; published last among several of the same ds.

    A backfill of an old day therefore never becomes what readers of the newest day see.
    """
    matching = [release for release in releases if ds is None or release.ds == ds]
    return max(matching, key=lambda r: (r.ds, r.created_at, r.release_id), default=None)


def find_release(storage: Storage, table_uri: str, *, ds: str | None = None, release_id: str | None = None) -> Release:
    """One release by id, by date, or the newest.

    Raises:
        UserError: there is none; the message says what there is.
    """
    releases = read_releases(storage, table_uri)
    if not releases:
        raise UserError(f"no release at {table_uri} yet; the nightly run publishes one")
    if release_id is not None:
        found = next((release for release in releases if release.release_id == release_id), None)
        wanted = f"release {release_id}"
    else:
        found = newest(releases, ds=ds)
        wanted = f"release of {ds}"
    if found is None:
        days = sorted({release.ds for release in releases})
        raise UserError(f"no {wanted} at {table_uri}; there are {len(releases)} releases of {days[0]} to {days[-1]}")
    if ds is not None and found.ds != ds:
        raise UserError(f"release {release_id} is of {found.ds}, not of {ds}")
    return found


def append(storage: Storage, table_uri: str, release: Release, *, attempt: int = 1) -> bool:
    """Publish a release: one atomic commit. Says whether this call made it.

    Args:
        storage: access to ``table_uri``.
        table_uri: the feature table.
        release: the row.
        attempt: how often this plan was published before, plus one. It travels as Delta transaction
            ``(plan_id, attempt)``: of runs that publish the same plan at once, one commits, the others find it done.
    """
    properties = CommitProperties(app_transactions=[Transaction(release.plan_id, attempt)])
    for remaining in reversed(range(COMMIT_TRIES)):
        table = open_or_create(storage, join(table_uri, FOLDER), RELEASES, name="releases")
        if (table.transaction_version(release.plan_id) or 0) >= attempt:
            log.info("plan %s was published by another run a moment ago", release.plan_id)
            return False
        try:
            write_deltalake(table, _row(release), mode="append", commit_properties=properties)
        except CommitFailedError as error:
            # This plan by a rival, which the next round sees; or the very first commits of the log at once.
            if not remaining:
                raise
            log.info("commit of release %s met another one: %s", release.release_id, error)
        else:
            break
    return True


def _read_file(storage: Storage, uri: str) -> list[dict[str, Any]]:
    # Not through a dataset over delta-rs's file system: what such a scan leaves running can abort a process at exit.
    filesystem, path = storage.filesystem(uri)
    with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
        rows: list[dict[str, Any]] = parquet.read().to_pylist()
    return rows


def _row(release: Release) -> pa.Table:
    row: dict[str, Any] = release.model_dump()
    row["seconds"] = list(row["seconds"].items())
    return pa.Table.from_pylist([row], schema=RELEASES)

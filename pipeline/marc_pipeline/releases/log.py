"""The release log: a small Delta table in the feature table's folder that names the release of each date."""

import logging
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from marc_pipeline.errors import DiskFull, ReleaseGone, Superseded, UserError
from marc_pipeline.storage import Storage, disk_full_names, join
from marc_pipeline.storage.delta import COMMIT_ERRORS, NO_HOOKS, open_or_create, open_table, set_aside
from marc_pipeline.table.commit import commit_day, committed_files
from marc_schemas.arrow import from_arrow, to_arrow
from marc_schemas.release import FORMAT_VERSION, OLDEST_FORMAT, RELEASES, Release

# Delta and Spark ignore folders with an underscore, so they do not read the log as data of the table.
FOLDER = "_releases"
TRIES = 5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReleaseLog:
    """The log at one version.

    Attributes:
        table_uri: the feature table.
        releases: all records, oldest first.
        table: the Delta table at that version; None before the first release.
    """

    table_uri: str
    releases: tuple[Release, ...]
    table: DeltaTable | None

    def live(self, ds: str) -> Release | None:
        """Return the release that readers of a date see; None if it has none or was withdrawn."""
        return newest(self.releases, ds=ds)

    def last(self, ds: str) -> Release | None:
        """Return the last record of a date, which may be a withdrawal."""
        return max((release for release in self.releases if release.ds == ds), key=lambda r: r.turn, default=None)

    def find(self, release_id: str | None) -> Release | None:
        """Return a release by id."""
        return next((release for release in self.releases if release.release_id == release_id), None)

    def next_turn(self, ds: str) -> int:
        """Return the turn of the next release of a date."""
        # Delta keeps the last transaction of a date after retention has removed its records.
        taken = self.table.transaction_version(_day(ds)) if self.table else None
        return (taken or 0) + 1


def read_log(storage: Storage, table_uri: str) -> ReleaseLog:
    """Return the whole log at one version; records of an older format are migrated.

    Raises:
        UserError: a record is of a newer format, or of one that was never released.
    """
    table = open_table(storage, join(table_uri, FOLDER))
    if table is None:
        return ReleaseLog(table_uri, (), None)
    # delta-rs percent-encodes uris, but file names need no encoding.
    names = [uri.rsplit("/", 1)[1] for uri in table.file_uris()]
    rows = [row for name in names for row in _read_file(storage, join(table_uri, FOLDER, name))]
    releases = [_record(row, table_uri) for row in rows]
    ordered = sorted(releases, key=lambda release: (release.created_at, release.release_id))
    return ReleaseLog(table_uri, tuple(ordered), table)


def _record(row: Mapping[str, Any], table_uri: str) -> Release:
    """Return a row in the current format: fields that its format lacks take their defaults."""
    version = row["format_version"]
    if not OLDEST_FORMAT <= version <= FORMAT_VERSION:
        readable = f"this marc-pipeline reads formats {OLDEST_FORMAT} to {FORMAT_VERSION}"
        remedy = "upgrade marc-pipeline" if version > FORMAT_VERSION else "publish into a new table_uri"
        raise UserError(f"release {row['release_id']} at {table_uri} has format {version}, {readable}; {remedy}")
    return Release.model_validate({**row, "format_version": FORMAT_VERSION})


def read_releases(storage: Storage, table_uri: str) -> list[Release]:
    """Return every release of a feature table, oldest first."""
    return list(read_log(storage, table_uri).releases)


def new_release_id(now: datetime) -> str:
    """Return a new release id; ids sort by time of publication."""
    return f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:4]}"


def live_releases(releases: Iterable[Release]) -> dict[str, Release]:
    """Return the release that readers of each date see, in order of date: its last turn, unless it is a withdrawal."""
    last = {release.ds: release for release in sorted(releases, key=lambda release: release.turn)}
    return {ds: last[ds] for ds in sorted(last) if not last[ds].withdrawn}


def newest(releases: Iterable[Release], *, ds: str | None = None) -> Release | None:
    """Return the live release of one date, or of the latest date. A backfill of an older date is never the newest."""
    live = live_releases(releases)
    if ds is not None:
        return live.get(ds)
    return live[max(live)] if live else None


def find_release(
    storage: Storage,
    table_uri: str,
    *,
    ds: str | None = None,
    release_id: str | None = None,
    at: datetime | None = None,
) -> Release:
    """Return one release by id, by date, or the newest; with ``at``, the release that readers saw at that time.

    Raises:
        UserError: there is no such release; the message names the releases that exist.
        ReleaseGone: retention has removed the release of that time from the log.
    """
    found = read_log(storage, table_uri)
    if at is not None:
        if release_id is not None:
            raise UserError("give a release id or a time, not both")
        return _seen_at(found, at, ds=ds)
    live = live_releases(found.releases)
    if not live:
        raise UserError(f"no release at {table_uri} yet; the nightly run publishes one")
    release = found.find(release_id) if release_id is not None else newest(found.releases, ds=ds)
    if release is not None and release.withdrawn:
        raise UserError(f"release {release_id} withdrew {release.ds} and contains no vectors; choose another release")
    days = list(live)
    if release is None:
        wanted = f"release {release_id}" if release_id is not None else f"release of {ds}"
        raise UserError(
            f"no {wanted} at {table_uri}; there are {len(found.releases)} releases of {days[0]} to {days[-1]}"
        )
    if ds is not None and release.ds != ds:
        raise UserError(f"release {release_id} is of {release.ds}, not of {ds}")
    return release


def _seen_at(found: ReleaseLog, at: datetime, *, ds: str | None) -> Release:
    """Return the release that readers saw at a time, of one date or of the latest date then."""
    if at.tzinfo is None:
        raise UserError(f"the time {at} has no time zone; use datetime(..., tzinfo=UTC)")
    seen = newest((release for release in found.releases if release.created_at <= at), ds=ds)
    # The first later record of a date names, as `supersedes`, the release that readers saw until then.
    newest_first = sorted(found.releases, key=lambda release: -release.turn)
    following = {release.ds: release for release in newest_first if release.created_at > at}
    for day, release in following.items():
        concerned = day == ds if ds is not None else seen is None or day >= seen.ds
        if concerned and release.supersedes is not None and found.find(release.supersedes) is None:
            raise ReleaseGone(
                f"the release of {day} at {at.isoformat()} is not in the log any more: retention deleted release "
                f"{release.supersedes}"
            )
    if seen is None:
        wanted = f"release of {ds}" if ds is not None else "release"
        raise UserError(f"no {wanted} at {found.table_uri} existed at {at.isoformat()}")
    return seen


def append(
    storage: Storage, table_uri: str, releases: Sequence[Release], *, turns: Mapping[str, int] | None = None
) -> bool:
    """Publish releases, one per date, in one atomic commit.

    Each release takes the turn of its date, as Delta transaction ``(ds, turn)``. Of several runs that publish a date at
    the same moment, one commits. The others find the turn taken and must read the log again. Retention also takes the
    turns of the dates that it changes.

    Args:
        storage: access to ``table_uri``.
        table_uri: the feature table.
        releases: the records.
        turns: turns by date to take without a record, so that those dates cannot change before the commit.

    Returns:
        Whether the releases are in the log; False if another run took a turn first.
    """
    turns = {**(turns or {}), **{release.ds: release.turn for release in releases}}
    properties = _taking(turns)

    def commit() -> bool:
        table = open_or_create(storage, join(table_uri, FOLDER), RELEASES, name="releases")
        if any((table.transaction_version(_day(ds)) or 0) >= turn for ds, turn in turns.items()):
            # Another run took the turn, or our commit succeeded and its response was lost.
            found = read_log(storage, table_uri)
            published = bool(releases) and all(found.find(release.release_id) for release in releases)
        else:
            _write(table, releases, properties, mode="append")
            published = True
        # Nothing is acknowledged that a power cut could take back.
        storage.flush(join(table_uri, FOLDER))
        return published

    return storage.repeated(join(table_uri, FOLDER), commit, on=COMMIT_ERRORS)


def repair(storage: Storage, table_uri: str) -> list[str]:
    """Set the commits aside that a power cut left incomplete, in the release log and in the feature table.

    Returns:
        The uris under which they are kept; empty if all commits are whole.
    """
    return [place for uri in (join(table_uri, FOLDER), table_uri) for place in set_aside(storage, uri)]


def settle(storage: Storage, table_uri: str, ds: str) -> None:
    """Commit the files of a date's live release to the Delta table again if a dead run left other files there.

    Raises:
        Superseded: other runs kept publishing.
    """
    for _ in range(TRIES):
        found = read_log(storage, table_uri)
        live = found.live(ds)
        files, dim = (live.table.files, live.table.dim) if live else ((), 1)
        table = open_table(storage, table_uri)
        if table is None or committed_files(table, ds=ds) == {file.path for file in files}:
            return
        commit_day(storage, table_uri, files, dim=dim, ds=ds)
        # A run that committed its files meanwhile, but did not release them yet, will commit them again.
        if append(storage, table_uri, [], turns={ds: found.next_turn(ds)}):
            return
    raise Superseded(f"other runs keep publishing {ds} at {table_uri}; run again")


def replace(storage: Storage, found: ReleaseLog, kept: Sequence[Release]) -> bool:
    """Replace the records of a log with ``kept`` in one commit; records appended since it was read stay.

    Returns:
        False if another run changed the same dates at the same moment, or the store failed: read the log again.
    """
    if found.table is None:
        return True
    days = {ds for ds in {r.ds for r in found.releases} if _of(found.releases, ds) != _of(kept, ds)}
    try:
        properties = _taking({ds: found.next_turn(ds) for ds in days})
        with disk_full_names(found.table_uri):
            _write(found.table, kept, properties, mode="overwrite")
            storage.flush(join(found.table_uri, FOLDER))
    except DiskFull:
        raise
    except COMMIT_ERRORS as error:
        log.info("release log of %s: the commit failed or met another one: %s", found.table_uri, error)
        return False
    return True


def _of(releases: Sequence[Release], ds: str) -> list[Release]:
    return [release for release in releases if release.ds == ds]


def _taking(turns: Mapping[str, int]) -> CommitProperties:
    return CommitProperties(app_transactions=[Transaction(_day(ds), turn) for ds, turn in turns.items()])


def _day(ds: str) -> str:
    return f"ds={ds}"


def _read_file(storage: Storage, uri: str) -> list[dict[str, Any]]:
    # A dataset over delta-rs's file system leaves threads running that can abort the process at exit.
    filesystem, path = storage.filesystem(uri)
    with filesystem.open_input_file(path) as source, pq.ParquetFile(source) as parquet:
        return from_arrow(parquet.read())


def _write(
    table: DeltaTable,
    releases: Sequence[Release],
    properties: CommitProperties,
    *,
    mode: Literal["append", "overwrite"],
) -> None:
    # "merge" adds the columns that a log of an older format lacks, and otherwise keeps the schema.
    rows = to_arrow(releases, Release)
    write_deltalake(
        table, rows, mode=mode, schema_mode="merge", commit_properties=properties, post_commithook_properties=NO_HOOKS
    )

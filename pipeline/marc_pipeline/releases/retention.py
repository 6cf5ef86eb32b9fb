"""Vacuum: retire releases older than ``retention.days``, and delete files of retired releases and dead runs."""

import logging
import math
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import PurePosixPath

from marc_pipeline.config import RetentionSettings
from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import GateRefused, Superseded, UserError
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.ownership import Claim, claims
from marc_pipeline.storage import Storage, StoredObject, join
from marc_pipeline.storage.delta import COMMIT_ERRORS, NO_HOOKS, open_table, shorten_log
from marc_pipeline.table.commit import committed_files, plan_of
from marc_pipeline.work_area import PLAN_FILE
from marc_schemas.feature_table import partition_ds
from marc_schemas.identity import PLAN_KEY_CHARS, plan_key
from marc_schemas.release import Release

TRIES = 5
FEW_ORPHANS = 100
"""Number of files without a release that a vacuum always deletes."""
# Files of the log are kept at least this long, for readers that have it open.
LOG_GRACE_HOURS = 1
# Parts of a table file's path: ds, bucket and name.
PARTITION_PARTS = 3
PLAN_ID = re.compile(rf"[0-9a-f]{{{PLAN_KEY_CHARS},}}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """Result of a vacuum; of a dry run, what it would do.

    Attributes:
        retired: ids of newly retired releases; their files stay for the grace period.
        forgotten: ids of releases whose grace period is over; they left the log.
        files: uris of deleted files, of forgotten releases and of dead runs.
        bytes: size of these files.
    """

    retired: tuple[str, ...]
    forgotten: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


def vacuum(deployment: Deployment, *, now: datetime | None = None, dry_run: bool = False) -> Removal:
    """Retire releases beyond retention, and delete files that no release, reader or run needs.

    A release is retired first. The first vacuum after the grace period removes it from the log and deletes its files;
    until then, open readers can continue. A file that no release names belongs to a run. It is deleted
    when that run has written no file for the grace period. The log record is removed before the files, so the next
    vacuum finishes the work of a vacuum that was killed.

    Args:
        deployment: table, indexes and work area; its settings contain the retention rules.
        now: end of all periods; default: the present.
        dry_run: report the removals and change nothing.

    Raises:
        Superseded: other runs keep writing the release log.
        UserError: a folder belongs to another table, or is not that of the releases.
        GateRefused: too many files belong to no release.
    """
    now = now or datetime.now(UTC)
    storage, table_uri, settings = deployment.storage, deployment.settings.table_uri, deployment.settings.retention
    rows: list[Release] | None = None
    ours: set[str] = set()
    listed = partial(_unneeded, deployment, before=(now - timedelta(hours=settings.grace_hours)).timestamp())
    if not dry_run:
        release_log.repair(storage, table_uri)
    for _ in range(TRIES):
        found = release_log.read_log(storage, table_uri)
        ours |= {plan_key(release.plan_id) for release in found.releases}
        if rows == list(found.releases):
            # The last write succeeded, although its response was lost.
            break
        rows, retired, forgotten = _decide(found.releases, settings, now)
        if dry_run or rows == list(found.releases):
            break
        # Refuses wrong settings before the log forgets anything.
        listed(rows, ours=ours)
        if release_log.replace(storage, found, rows):
            break
    else:
        raise Superseded(f"other runs keep writing the release log of {table_uri}; run again")
    doomed = listed(rows, ours=ours)
    if not dry_run:
        _remove_from_table(deployment, doomed)
        # Plans are deleted first: a run without its plan cannot publish. Files of runs that wrote again are then kept.
        plans = [stored for stored in doomed if stored.uri.endswith(f"/{PLAN_FILE}")]
        storage.remove(stored.uri for stored in plans)
        still = {stored.uri for stored in listed(rows, ours=ours)}
        doomed = [stored for stored in doomed if stored in plans or stored.uri in still]
        storage.remove(stored.uri for stored in doomed)
        _shorten_logs(deployment, now)
    return Removal(
        retired=tuple(release.release_id for release in retired),
        forgotten=tuple(release.release_id for release in forgotten),
        files=tuple(stored.uri for stored in doomed),
        bytes=sum(stored.bytes for stored in doomed),
    )


def _decide(
    releases: Sequence[Release], settings: RetentionSettings, now: datetime
) -> tuple[list[Release], list[Release], list[Release]]:
    """Return the remaining records of the log, the newly retired ones, and the forgotten ones."""
    # Only live dates count. A withdrawn date is kept while it is newer than the oldest of them.
    oldest = min([*release_log.live_releases(releases)][-settings.days :], default="")
    last = sorted(releases, key=lambda release: (release.ds, -release.turn))
    place: dict[str, int] = {}
    rows, retired, forgotten = [], [], []
    for release in last:
        # A withdrawal has no files and does not count as a release. It stays as long as its date.
        place[release.ds] = place.get(release.ds, 0) + (not release.withdrawn)
        row = release
        beyond = place[release.ds] > settings.releases_per_day or release.ds < oldest
        if release.retired_at is None and beyond:
            row = release.model_copy(update={"retired_at": now})
            retired.append(row)
        if row.retired_at is not None and row.retired_at + timedelta(hours=settings.grace_hours) <= now:
            forgotten.append(row)
        else:
            rows.append(row)
    rows.sort(key=lambda release: (release.created_at, release.release_id))
    return rows, retired, forgotten


def _unneeded(deployment: Deployment, rows: Sequence[Release], *, ours: Set[str], before: float) -> list[StoredObject]:
    """Return files of table, indexes and plans that no record names, of runs without a write since ``before``.

    ``rows`` are the remaining records; ``ours`` are the keys of the plans that records named before this vacuum.

    Raises:
        UserError: the folder of indexes or plans belongs to another table, or is not that of the releases.
        GateRefused: so many files belong to no release that the settings must be wrong.
    """
    settings, storage = deployment.settings, deployment.storage
    tables = {file.path for row in rows for file in row.table.files}
    # An index that was patched may share files with an earlier index.
    indexes = {file.path for row in rows for file in row.index.all_files}
    # A plan's work area contains the quarantine and the texts. It is kept as long as any file of the plan.
    works = {plan_key(row.plan_id) for row in rows} | {plan_of(path) for path in tables}
    found = [
        (stored, plan, _within(stored, PARTITION_PARTS) in tables)
        for stored in storage.list(settings.table_uri, hidden=True)
        if (plan := plan_of(stored.uri)) is not None
    ]
    index, plans = claims(deployment)
    found += [(s, plan, _within(s, 2) in indexes or not own) for s, plan, own in _by_plan(storage, index, ours)]
    found += [(s, plan, plan in works or not own) for s, plan, own in _by_plan(storage, plans, ours)]
    _require_folders(deployment, rows, {stored.uri for stored, _, _ in found})
    active = {plan for stored, plan, _ in found if stored.modified >= before and plan}
    doomed = [(s, plan) for s, plan, needed in found if not needed and s.modified < before and plan not in active]
    orphans = sum(plan not in ours for _, plan in doomed)
    if orphans > max(FEW_ORPHANS, settings.retention.max_orphan_fraction * len(found)):
        raise GateRefused(
            f"{orphans:,} of {len(found):,} files belong to no release of {settings.table_uri}, the limit is "
            f"{settings.retention.max_orphan_fraction:g} of them; check table_uri, index_uri and work_uri, or raise "
            "retention.max_orphan_fraction for one vacuum. Nothing was deleted"
        )
    return [stored for stored, _ in doomed]


def _require_folders(deployment: Deployment, rows: Sequence[Release], found: Set[str]) -> None:
    """Require that the files of a release are where the settings look for them."""
    for name, uri, paths in (
        ("table_uri", deployment.settings.table_uri, [file.path for row in rows for file in row.table.files]),
        ("index_uri", deployment.settings.index_uri, [file.path for row in rows for file in row.index.all_files]),
    ):
        if paths and not any(join(uri, path) in found for path in paths):
            raise UserError(
                f"none of the {len(paths):,} files of releases is in {uri}, the {name} of the configuration; set it to "
                "the folder that the releases name. Nothing was deleted"
            )


def _within(stored: StoredObject, parts: int) -> str:
    """Return the last parts of a uri: the path in the table or index, whatever the spelling of its folder."""
    return "/".join(stored.uri.rsplit("/", parts)[1:])


def _by_plan(storage: Storage, folder: Claim, ours: Set[str]) -> list[tuple[StoredObject, str, bool]]:
    """Return the files in folders named after plans, the key of the plan, and whether they are this table's own.

    Files of plans that no record names are the table's own if they were written after its claim of the folder.
    """
    depth = len(PurePosixPath(folder.uri).parts)
    found = []
    for stored in storage.list(folder.uri, hidden=True):
        name, *inside = PurePosixPath(stored.uri).parts[depth:]
        if inside and PLAN_ID.fullmatch(name):
            since = folder.since is not None and stored.modified >= folder.since
            found.append((stored, plan_key(name), since or plan_key(name) in ours))
    return found


def _remove_from_table(deployment: Deployment, doomed: Sequence[StoredObject]) -> None:
    """Remove files that will be deleted from the Delta table's newest version, where a dead run committed them."""
    table = open_table(deployment.storage, deployment.settings.table_uri)
    live = committed_files(table) if table else set()
    for ds in sorted({partition_ds(path) for path in live & {_within(stored, PARTITION_PARTS) for stored in doomed}}):
        release_log.settle(deployment.storage, deployment.settings.table_uri, ds)


def _shorten_logs(deployment: Deployment, now: datetime) -> None:
    """Shorten both Delta logs, and abort multipart uploads of dead runs."""
    settings, storage = deployment.settings, deployment.storage
    releases = join(settings.table_uri, release_log.FOLDER)
    hours = max(settings.retention.grace_hours, LOG_GRACE_HOURS)

    def shorten(uri: str) -> None:
        if table := open_table(storage, uri):
            shorten_log(storage, table, uri)
            # This module deletes files of the feature table. Delta deletes replaced files of the release log.
            if uri == releases:
                table.vacuum(
                    retention_hours=math.ceil(hours), dry_run=False, enforce_retention_duration=False,
                    post_commithook_properties=NO_HOOKS,
                )  # fmt: skip
                storage.flush(releases)

    for uri in (settings.table_uri, releases):
        storage.repeated(uri, partial(shorten, uri), on=COMMIT_ERRORS)
    before = (now - timedelta(hours=hours)).timestamp()
    for uri in (settings.table_uri, settings.index_uri, settings.work_uri):
        storage.abort_uploads(uri, before=before)

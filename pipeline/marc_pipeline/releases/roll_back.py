"""Roll back: publish an earlier release again, and withdraw the dates after it. No file is deleted."""

from datetime import UTC, datetime

from marc_pipeline.errors import CorruptFile, Superseded, UserError
from marc_pipeline.releases.log import ReleaseLog, append, live_releases, new_release_id, read_log
from marc_pipeline.releases.standing import is_whole
from marc_pipeline.storage import Storage
from marc_pipeline.table.commit import commit_day
from marc_schemas.release import Release

ROLL_BACK_TRIES = 5


def roll_back(storage: Storage, table_uri: str, release_id: str) -> list[Release]:
    """Make readers see an earlier release again.

    One commit publishes the release anew for its date, unless readers of that date see it already, and withdraws all
    later dates. Rolling back to a withdrawn release publishes its date again.

    Returns:
        The new records of the log, withdrawn dates marked; empty when nothing had to change.

    Raises:
        UserError: there is no such release, or retention retired it.
        CorruptFile: a file of the release is damaged or missing. Nothing was changed.
        Superseded: other runs published during every attempt.
    """
    for _ in range(ROLL_BACK_TRIES):
        found = read_log(storage, table_uri)
        target = _require_kept(found, release_id)
        if not is_whole(storage, target, table_uri=table_uri):
            raise CorruptFile(f"release {release_id} is damaged; nothing was changed. Run `marc verify`")
        rows = [
            row.at_version(commit_day(storage, table_uri, row.table.files, dim=row.table.dim, ds=row.ds))
            for row in _records(found, target)
        ]
        # Take a turn for the target's date even without a new record, so that retention cannot retire it meanwhile.
        turns = {target.ds: found.next_turn(target.ds)}
        if not rows or append(storage, table_uri, rows, turns=turns):
            return rows
    raise Superseded(f"other runs published at {table_uri} during {ROLL_BACK_TRIES} attempts; run again")


def _require_kept(found: ReleaseLog, release_id: str) -> Release:
    target = found.find(release_id)
    if target is None or target.withdrawn:
        raise UserError(f"no release {release_id} at {found.table_uri}; see `marc releases`")
    if target.retired_at is not None:
        raise UserError(
            f"release {release_id} was retired on {target.retired_at:%Y-%m-%d %H:%M}; choose another release"
        )
    return target


def _records(found: ReleaseLog, target: Release) -> list[Release]:
    """Return the records that restore the target and withdraw the dates after it."""
    live = live_releases(found.releases)
    now = live.get(target.ds)
    rows = []
    if now is None or (now.table.files, now.index.files) != (target.table.files, target.index.files):
        restores = target.restores or target.release_id
        rows.append(_next(found, target, now, restores=restores))
    return rows + [_next(found, live[ds], live[ds], restores=None) for ds in live if ds > target.ds]


def _next(found: ReleaseLog, facts: Release, live: Release | None, *, restores: str | None) -> Release:
    """Return the next record of a date: one that restores a release, or a withdrawal."""
    now, withdrawn = datetime.now(UTC), restores is None
    update: dict[str, object] = {
        "release_id": new_release_id(now),
        "created_at": now,
        "turn": found.next_turn(facts.ds),
        "supersedes": live.release_id if live else None,
        "withdrawn": withdrawn,
        "restores": restores,
    }
    return (facts.without_files() if withdrawn else facts).model_copy(update=update)

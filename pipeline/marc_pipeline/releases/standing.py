"""The status of a plan in the release log: whether it may be published, is published, and has an intact release."""

import logging
from collections.abc import Sequence

from marc_pipeline.errors import Superseded
from marc_pipeline.releases.log import ReleaseLog, read_log
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import check_file
from marc_schemas.feature_table import bucket_number
from marc_schemas.plan import Plan
from marc_schemas.release import Release

log = logging.getLogger(__name__)


def published(
    storage: Storage, table_uri: str, *, ds: str, plan_id: str, chosen: tuple[int, ...] | None = None
) -> Release | None:
    """Return the live release of a date if it contains the result of this plan; None if the plan must run."""
    found = read_log(storage, table_uri)
    live = found.live(ds)
    return live if live is not None and holds(found, live, plan_id, chosen) else None


def holds(found: ReleaseLog, live: Release, plan_id: str, chosen: tuple[int, ...] | None) -> bool:
    """Return whether a live release contains the result of a plan, for all buckets or for the ``chosen`` ones."""
    if live.plan_id == plan_id:
        return True
    # Backfills of other buckets may have been published on top of this plan.
    made = made_by(found, live.ds, plan_id)
    return made is not None and chosen is not None and _contents(live, chosen) == _contents(made, chosen)


def made_by(found: ReleaseLog, ds: str, plan_id: str) -> Release | None:
    """Return the last release that a plan made, roll-backs excluded."""
    made = [r for r in found.releases if (r.ds, r.plan_id) == (ds, plan_id) and not (r.withdrawn or r.restores)]
    return max(made, key=lambda release: release.turn, default=None)


def is_whole(storage: Storage, release: Release, *, table_uri: str, chosen: Sequence[int] | None = None) -> bool:
    """Return whether index files and table files (of all or of ``chosen`` buckets) match their checksums."""
    files = [file for file in release.table.files if chosen is None or bucket_number(file.path) in chosen]
    problems = [problem for file in files if (problem := check_file(storage, table_uri, file))]
    index = release.index
    problems += [problem for file in index.all_files if (problem := check_file(storage, index.uri, file))]
    for problem in problems:
        log.warning("release %s is damaged: %s", release.release_id, problem)
    return not problems


def require_unmoved(found: ReleaseLog, plan: Plan) -> Release | None:
    """Return the live release of the plan's date, which the plan may supersede or has superseded.

    Raises:
        Superseded: another run published the plan's date, or its buckets, since the plan was made; or the release whose
            vectors the plan carries over was rolled back.
    """
    live, last = found.live(plan.ds), found.last(plan.ds)
    if live and holds(found, live, plan.plan_id, plan.chosen):
        return live
    base = found.find(plan.base_release)
    newest = found.last(base.ds) if base and base.ds != plan.ds else None
    if base and newest and newest.turn > base.turn and (newest.withdrawn or newest.restores):
        raise Superseded(f"superseded: {base.ds} was rolled back since plan {plan.plan_id} was made on it; run again")
    if (last and last.release_id) == plan.live_release:
        return live
    before = found.find(plan.live_release)
    if plan.chosen and live and before and _contents(live, plan.chosen) == _contents(before, plan.chosen):
        return live
    raise Superseded(
        f"superseded: {plan.ds} was published by another run since plan {plan.plan_id} was made; "
        "run again to publish on top of it"
    )


def _contents(release: Release, chosen: Sequence[int]) -> tuple[object, ...]:
    """Return the files of some buckets, and the settings that made them. Equal values mean equal content."""
    paths = {file.path for file in release.table.files if bucket_number(file.path) in chosen}
    return *release.made_with, paths

"""The release stage: one atomic commit makes files, index and bundle visible together; a roll-back is one more."""

import logging
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from pipeline import feature_table, release_log
from pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
from pipeline.integrity import check_file
from pipeline.model.bundle import check_bundle, open_bundle
from pipeline.release_log import ReleaseLog
from pipeline.storage import Storage, join
from pipeline.workspace import Workspace
from schemas.catalogue import Change
from schemas.feature_table import bucket_number
from schemas.files import PublishedFile
from schemas.identity import files_digest, receipts_digest
from schemas.plan import Plan
from schemas.receipt import AuditReport, Receipt, day_moments, quarantined_rows
from schemas.release import BundleFacts, Counts, IndexFacts, Release, TableFacts

ROLL_BACK_TRIES = 5

log = logging.getLogger(__name__)


class DayMoved(Superseded):
    """Another run published other buckets of the same date: the index must be made for what is there now."""


def published(
    storage: Storage, table_uri: str, *, ds: str, plan_id: str, chosen: tuple[int, ...] | None = None
) -> Release | None:
    """The release of a date, if it holds what this very plan makes: then there is nothing left to do."""
    found = release_log.read_log(storage, table_uri)
    live = found.live(ds)
    return live if live is not None and _holds(found, live, plan_id, chosen) else None


def _holds(found: ReleaseLog, live: Release, plan_id: str, chosen: tuple[int, ...] | None) -> bool:
    if live.plan_id == plan_id:
        return True
    # Backfills of other buckets may have been published on top of this one.
    made = made_by(found, live.ds, plan_id)
    return made is not None and chosen is not None and _contents(live, chosen) == _contents(made, chosen)


def made_by(found: ReleaseLog, ds: str, plan_id: str) -> Release | None:
    """The last release that a plan made."""
    made = [r for r in found.releases if (r.ds, r.plan_id) == (ds, plan_id) and not (r.withdrawn or r.restores)]
    return max(made, key=lambda release: release.turn, default=None)


def is_whole(storage: Storage, release: Release, *, table_uri: str, chosen: Sequence[int] | None = None) -> bool:
    """Whether every byte of a release's index, and of its table files (of some buckets), is as it was published."""
    files = [file for file in release.table.files if chosen is None or bucket_number(file.path) in chosen]
    problems = [problem for file in files if (problem := check_file(storage, table_uri, file))]
    index = release.index
    problems += [problem for file in index.all_files if (problem := check_file(storage, index.uri, file))]
    for problem in problems:
        log.warning("release %s is damaged: %s", release.release_id, problem)
    return not problems


def require_unmoved(found: ReleaseLog, plan: Plan) -> Release | None:
    """What readers of the plan's date see now; the plan may take its place, or has done so.

    Raises:
        Superseded: it is not what the plan was made to supersede, or not in the buckets that the plan replaces; or what
            the plan carries over was rolled back since.
    """
    live, last = found.live(plan.ds), found.last(plan.ds)
    if live and _holds(found, live, plan.plan_id, plan.chosen):
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
    """Files of some buckets, and the settings that made them. Equal values mean equal content."""
    paths = {file.path for file in release.table.files if bucket_number(file.path) in chosen}
    return *release.made_with, paths


def publish(workspace: Workspace, plan: Plan, *, table_uri: str) -> Release:
    """Commit the files to the feature table, then the release to the log, which is what readers see.

    Running it again, or twice at once, ends in one release.

    Raises:
        UserError: an earlier stage has not finished.
        GateRefused: the audit refused, or it saw other files than the receipts name.
        CorruptFile: a file of the index or bundle differs from its checksum, a table file is gone or cut short.
        DayMoved: the index was made for other files of the day than there are now.
        Superseded: another run published the same buckets of the date since the plan was made, or removed its files.
    """
    storage = workspace.storage
    workspace.sign_of_life()
    found = release_log.read_log(storage, table_uri)
    if made := _done(found, storage, plan, table_uri=table_uri):
        log.info("plan %s is in release %s already", plan.plan_id, made.release_id)
        return made
    live = require_unmoved(found, plan)
    receipts = workspace.require_receipts(plan)
    files = feature_table.day_files(plan, receipts, live)
    audit, index = _require_verdicts(workspace, plan, receipts, files)
    _require_files(storage, plan, receipts, index, table_uri=table_uri)
    version = feature_table.commit_day(storage, table_uri, files, dim=plan.dim, ds=plan.ds)
    release = _describe(workspace, plan, receipts, audit, index, table_uri, version, files, live, found)
    # A vacuum that takes this run for dead takes its plan first, then looks for life, then takes the files.
    if workspace.read_plan() is None:
        raise Superseded(f"superseded: a vacuum took plan {plan.plan_id} for that of a dead run; run again")
    if not release_log.append(storage, table_uri, [release]):
        raise DayMoved(f"another run published {plan.ds} at the same moment; run again to publish on top of it")
    log.info("release %s of %s: table version %d", release.release_id, release.ds, release.table.version)
    return release


def _done(found: ReleaseLog, storage: Storage, plan: Plan, *, table_uri: str) -> Release | None:
    """What a plan was published as since it was made; readers may see something newer by now."""
    live, before = found.live(plan.ds), found.find(plan.live_release)
    if live and _holds(found, live, plan.plan_id, plan.chosen):
        return live if is_whole(storage, live, table_uri=table_uri, chosen=plan.chosen) else None
    made = made_by(found, plan.ds, plan.plan_id)
    return made if made and made.turn > (before.turn if before else 0) and made.created_at > plan.created_at else None


def roll_back(storage: Storage, table_uri: str, release_id: str) -> list[Release]:
    """Make a release what readers see again: of its date, and, where later dates were published, at all.

    Publishes the release anew for its date, unless it is what readers of that date see, and withdraws the dates after
    it, all in one commit. Nothing is deleted: rolling back to a withdrawn release brings its date back.

    Args:
        storage: access to ``table_uri``.
        table_uri: the feature table.
        release_id: what to point back to.

    Returns:
        The rows that were published, withdrawn dates marked; empty where there was nothing to do.

    Raises:
        UserError: there is no such release, or retention has given it up.
        CorruptFile: a file of it is damaged or missing; nothing was changed.
        Superseded: other runs kept publishing.
    """
    for _ in range(ROLL_BACK_TRIES):
        found = release_log.read_log(storage, table_uri)
        target = _require_kept(found, release_id)
        if not is_whole(storage, target, table_uri=table_uri):
            raise CorruptFile(f"release {release_id} is damaged; nothing was changed. Run `marc verify`")
        rows = _pointing_back(found, target)
        rows = [
            row.at_version(feature_table.commit_day(storage, table_uri, row.table.files, dim=row.table.dim, ds=row.ds))
            for row in rows
        ]
        # The target's turn as well, where it needs no row: so that retention does not retire it at the same moment.
        turns = {target.ds: found.next_turn(target.ds)}
        if not rows or release_log.append(storage, table_uri, rows, turns=turns):
            return rows
    raise Superseded(f"other runs keep publishing at {table_uri}; run again")


def _require_kept(found: ReleaseLog, release_id: str) -> Release:
    target = found.find(release_id)
    if target is None or target.withdrawn:
        raise UserError(f"no release {release_id} at {found.table_uri}; see `marc releases`")
    if target.retired_at is not None:
        raise UserError(f"release {release_id} was retired on {target.retired_at:%Y-%m-%d %H:%M}: its files go soon")
    return target


def _pointing_back(found: ReleaseLog, target: Release) -> list[Release]:
    live = release_log.live_releases(found.releases)
    now = live.get(target.ds)
    rows = []
    if now is None or (now.table.files, now.index.files) != (target.table.files, target.index.files):
        restores = target.restores or target.release_id
        rows.append(_next(found, target, now, withdrawn=False, restores=restores))
    return rows + [_next(found, live[ds], live[ds], withdrawn=True, restores=None) for ds in live if ds > target.ds]


def _next(found: ReleaseLog, facts: Release, live: Release | None, *, withdrawn: bool, restores: str | None) -> Release:
    now = datetime.now(UTC)
    update: dict[str, object] = {
        "release_id": _release_id(now),
        "created_at": now,
        "turn": found.next_turn(facts.ds),
        "supersedes": live.release_id if live else None,
        "withdrawn": withdrawn,
        "restores": restores,
    }
    return (facts.without_files() if withdrawn else facts).model_copy(update=update)


def _release_id(now: datetime) -> str:
    return f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:4]}"


def _require_verdicts(
    workspace: Workspace, plan: Plan, receipts: Sequence[Receipt], files: Sequence[PublishedFile]
) -> tuple[AuditReport, IndexFacts]:
    audit, index = workspace.read_audit(), workspace.read_index()
    if audit is None or index is None:
        raise UserError(f"plan {plan.plan_id}: run the {'audit' if audit is None else 'index'} stage first")
    if audit.problems:
        raise GateRefused(f"the audit refused plan {plan.plan_id}: {audit.problems[0]}. Nothing was published")
    if audit.receipts_digest != receipts_digest(receipts):
        raise GateRefused(f"plan {plan.plan_id}: files changed after the audit; run the audit stage again")
    if index.files_digest != files_digest(files):
        raise DayMoved(f"plan {plan.plan_id}: the day's files changed after the index; run the index stage again")
    return audit, index.index


def _require_files(
    storage: Storage, plan: Plan, receipts: Sequence[Receipt], index: IndexFacts, *, table_uri: str
) -> None:
    problems = [check_file(storage, index.uri, file) for file in index.all_files]
    bundle = open_bundle(storage, plan.bundle_uri)
    problems += check_bundle(storage, bundle)
    if bundle.version != plan.bundle:
        problems.append(
            f"{plan.bundle_uri}/bundle.json is version {bundle.version}, the plan was made for {plan.bundle}"
        )
    # The audit has just verified every byte of the table's files; here it is enough that they are still there.
    for file in (receipt.file for receipt in receipts if receipt.file):
        stored = storage.stat(join(table_uri, file.path))
        if stored is None or stored.bytes != file.bytes:
            problems.append(f"{file.path} is {'missing' if stored is None else 'of another size'}")
    found = [problem for problem in problems if problem]
    if found:
        raise CorruptFile(f"plan {plan.plan_id} cannot be published: {'; '.join(found)}")


def _describe(
    workspace: Workspace,
    plan: Plan,
    receipts: Sequence[Receipt],
    audit: AuditReport,
    index: IndexFacts,
    table_uri: str,
    version: int,
    files: Sequence[PublishedFile],
    live: Release | None,
    found: ReleaseLog,
) -> Release:
    now = datetime.now(UTC)
    # Receipts from before the plan was made anew are counted in the release that was published from them.
    fresh = [receipt for receipt in receipts if receipt.finished_at >= plan.created_at]
    seconds = workspace.read_seconds()
    quarantined = quarantined_rows(plan.quarantined, receipts)
    return Release(
        release_id=_release_id(now),
        ds=plan.ds,
        turn=found.next_turn(plan.ds),
        created_at=now,
        plan_id=plan.plan_id,
        supersedes=live.release_id if live else None,
        table=TableFacts(
            uri=table_uri,
            version=version,
            files=tuple(files),
            dim=plan.dim,
            buckets=plan.buckets,
            template=plan.template,
            mantissa_bits=plan.mantissa_bits,
        ),
        index=index,
        bundle=BundleFacts(
            version=plan.bundle,
            uri=plan.bundle_uri,
            card_file=open_bundle(workspace.storage, plan.bundle_uri).card_file,
        ),
        counts=_counts(plan, receipts, fresh, items=sum(file.rows for file in files), quarantined=quarantined),
        moments=day_moments(audit.gained, audit.lost, live if plan.chosen else None),
        audit=audit.figures,
        quarantine_uri=workspace.quarantine_uri if quarantined else None,
        seconds=seconds,
        tokens_per_second=throughput(fresh, seconds.get("encode", 0.0)),
    )


def _counts(
    plan: Plan, receipts: Sequence[Receipt], fresh: Sequence[Receipt], *, items: int, quarantined: Mapping[str, int]
) -> Counts:
    lost = Counter(change for receipt in receipts for change in receipt.quarantined.values())
    new, changed = plan.new - lost[Change.NEW], plan.changed - lost[Change.CHANGED]
    return Counts(
        items=items,
        new=new,
        changed=changed,
        reused=items - new - changed,
        deleted=plan.deleted,
        quarantined=sum(quarantined.values()),
        encoded=sum(receipt.encoded for receipt in fresh),
        tokens=sum(receipt.tokens for receipt in fresh),
    )


def throughput(receipts: Sequence[Receipt], seconds: float) -> float | None:
    """Tokens per second of an encode stage, start-up apart: Spark's, and loading the model in every worker.

    What start-up took is the rest of the stage's time; a plan's estimate adds it again.

    Args:
        receipts: of the stage's buckets.
        seconds: that the stage took.

    Returns:
        None where nothing was encoded.
    """
    tokens = sum(receipt.tokens for receipt in receipts)
    if not tokens or seconds <= 0:
        return None
    began = min(receipt.finished_at.timestamp() - receipt.seconds for receipt in receipts)
    # Between two attempts at the stage nobody worked.
    span = min(max(receipt.finished_at.timestamp() for receipt in receipts) - began, seconds)
    loading = sum(receipt.load_seconds for receipt in receipts) / max(sum(r.seconds for r in receipts), 1e-9)
    return tokens / max(span * (1 - loading), 1e-9)

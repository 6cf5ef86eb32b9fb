"""The release stage: one atomic commit makes table files, index and bundle visible together."""

import logging
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

from marc_pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
from marc_pipeline.model.bundle import check_bundle, open_bundle
from marc_pipeline.releases.log import ReleaseLog, append, new_release_id, read_log
from marc_pipeline.releases.standing import holds, is_whole, made_by, require_unmoved
from marc_pipeline.storage import Storage, join
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.commit import commit_day, day_files
from marc_pipeline.work_area import Workspace
from marc_schemas.catalogue import Change
from marc_schemas.files import PublishedFile
from marc_schemas.identity import files_digest, receipts_digest
from marc_schemas.plan import Plan
from marc_schemas.receipt import AuditReport, Receipt, day_moments, quarantined_rows
from marc_schemas.release import BundleFacts, Counts, IndexFacts, Release, TableFacts

log = logging.getLogger(__name__)


class DayMoved(Superseded):
    """Another run published other buckets of the same date; the index must be built again for the current files."""


def publish(workspace: Workspace, plan: Plan, *, table_uri: str) -> Release:
    """Commit the files to the feature table, then the release to the log, where readers see it.

    Repeated and concurrent calls end in one release.

    Raises:
        UserError: an earlier stage has not finished.
        GateRefused: the audit refused the plan, or its files changed after the audit.
        CorruptFile: a file of the index or the bundle differs from its checksum, or a table file is missing or has
            another size.
        DayMoved: the files of the date changed after the index was built.
        Superseded: another run published the same buckets since the plan was made, or a vacuum deleted the plan.
    """
    storage = workspace.storage
    workspace.mark_alive()
    found = read_log(storage, table_uri)
    if made := _done(found, storage, plan, table_uri=table_uri):
        log.info("release: plan %s is already published as %s", plan.plan_id, made.release_id)
        return made
    live = require_unmoved(found, plan)
    receipts = workspace.require_receipts(plan)
    files = day_files(plan, receipts, live)
    audit, index = _require_verdicts(workspace, plan, receipts, files)
    _require_files(storage, plan, receipts, index, table_uri=table_uri)
    version = commit_day(storage, table_uri, files, dim=plan.dim, ds=plan.ds)
    release = _describe(workspace, plan, receipts, audit, index, table_uri, version, files, live, found)
    # A vacuum deletes the plan of a dead run first, then checks once more whether it is alive, then deletes its files.
    if workspace.read_plan() is None:
        raise Superseded(
            f"superseded: a vacuum deleted plan {plan.plan_id} because its run was idle for the grace period; run again"
        )
    if not append(storage, table_uri, [release]):
        raise DayMoved(f"another run published {plan.ds} at the same moment; run again to publish on top of it")
    log.info("release: published %s of %s, table version %d", release.release_id, release.ds, release.table.version)
    return release


def _done(found: ReleaseLog, storage: Storage, plan: Plan, *, table_uri: str) -> Release | None:
    """Return the release that was already published from a plan; a newer one may have superseded it since."""
    live, before = found.live(plan.ds), found.find(plan.live_release)
    if live and holds(found, live, plan.plan_id, plan.chosen):
        return live if is_whole(storage, live, table_uri=table_uri, chosen=plan.chosen) else None
    made = made_by(found, plan.ds, plan.plan_id)
    return made if made and made.turn > (before.turn if before else 0) and made.created_at > plan.created_at else None


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
    # The audit verified every byte of the table files; here, their presence and size are checked.
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
    # Receipts older than the plan were counted in the release that was published from them.
    fresh = [receipt for receipt in receipts if receipt.finished_at >= plan.created_at]
    seconds = workspace.read_seconds()
    return Release(
        release_id=new_release_id(now),
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
            long_texts=plan.long_texts,
        ),
        index=index,
        bundle=BundleFacts(
            version=plan.bundle,
            uri=plan.bundle_uri,
            card_file=open_bundle(workspace.storage, plan.bundle_uri).card_file,
        ),
        counts=_counts(plan, receipts, fresh, items=sum(file.rows for file in files)),
        moments=day_moments(audit.gained, audit.lost, live if plan.chosen else None),
        audit=audit.figures,
        quarantine_uri=workspace.quarantine_uri if quarantined_rows(plan.quarantined, receipts) else None,
        seconds=seconds,
        tokens_per_second=throughput(fresh, seconds.get("encode", 0.0)),
    )


def _counts(plan: Plan, receipts: Sequence[Receipt], fresh: Sequence[Receipt], *, items: int) -> Counts:
    lost = Counter(change for receipt in receipts for change in receipt.quarantined.values())
    new, changed = plan.new - lost[Change.NEW], plan.changed - lost[Change.CHANGED]
    return Counts(
        items=items,
        new=new,
        changed=changed,
        reused=items - new - changed,
        deleted=plan.deleted,
        quarantined=sum(quarantined_rows(plan.quarantined, receipts).values()),
        encoded=sum(receipt.encoded for receipt in fresh),
        tokens=sum(receipt.tokens for receipt in fresh),
        cut_texts=sum(receipt.cut_texts for receipt in fresh),
        lost_tokens=sum(receipt.lost_tokens for receipt in fresh),
    )


def throughput(receipts: Sequence[Receipt], seconds: float) -> float | None:
    """Return the tokens per second of an encode stage of ``seconds``; None when nothing was encoded.

    Start-up time, of Spark and of loading the model in every worker, is excluded; a plan's estimate adds it again.
    """
    tokens = sum(receipt.tokens for receipt in receipts)
    if not tokens or seconds <= 0:
        return None
    began = min(receipt.finished_at.timestamp() - receipt.seconds for receipt in receipts)
    # The time between two attempts at the stage does not count.
    span = min(max(receipt.finished_at.timestamp() for receipt in receipts) - began, seconds)
    loading = sum(receipt.load_seconds for receipt in receipts) / max(sum(r.seconds for r in receipts), 1e-9)
    return tokens / max(span * (1 - loading), 1e-9)

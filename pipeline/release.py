"""The release stage: one atomic commit makes files, index and bundle visible together."""

import logging
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime

from pipeline import feature_table, release_log
from pipeline.errors import CorruptFile, GateRefused, Superseded, UserError
from pipeline.integrity import check_file
from pipeline.model.bundle import check_bundle, open_bundle
from pipeline.storage import Storage, join
from pipeline.workspace import Workspace, receipts_digest
from schemas.plan import Plan
from schemas.receipt import AuditReport, IndexReceipt, Receipt
from schemas.release import Release

log = logging.getLogger(__name__)


def published(storage: Storage, table_uri: str, *, ds: str, plan_id: str) -> Release | None:
    """The release of a date, if it is this very plan's: then there is nothing left to do."""
    live = release_log.newest(release_log.read_releases(storage, table_uri), ds=ds)
    return live if live is not None and live.plan_id == plan_id else None


def publish(workspace: Workspace, plan: Plan, *, table_uri: str) -> Release:
    """Commit the files to the feature table, then the release to the log, which is what readers see.

    Running it again, or twice at once, ends in one release.

    Raises:
        UserError: an earlier stage has not finished.
        GateRefused: the audit refused, or audit and index saw other files than the receipts name.
        CorruptFile: a file of the index or bundle differs from its checksum, a table file is gone or cut short.
        Superseded: another run published the same date at the same moment.
    """
    storage = workspace.storage
    releases = release_log.read_releases(storage, table_uri)
    previous = release_log.newest(releases, ds=plan.ds)
    if previous is not None and previous.plan_id == plan.plan_id:
        log.info("plan %s is release %s already", plan.plan_id, previous.release_id)
        return previous
    attempt = sum(release.plan_id == plan.plan_id for release in releases) + 1
    receipts = workspace.require_receipts(plan)
    audit, index = _require_verdicts(workspace, plan, receipts)
    _require_files(storage, plan, receipts, index, table_uri=table_uri)
    files = [receipt.file for receipt in receipts if receipt.file is not None]
    version = feature_table.commit_partitions(
        storage,
        table_uri,
        files,
        dim=plan.dim,
        ds=plan.ds,
        key=f"{plan.plan_id}:{audit.receipts_digest}:{attempt}",
    )
    release = _describe(workspace, plan, receipts, audit, index, table_uri, version, previous)
    if not release_log.append(storage, table_uri, release, attempt=attempt):
        winner = published(storage, table_uri, ds=plan.ds, plan_id=plan.plan_id)
        if winner is None:
            raise Superseded(f"another run published {plan.ds} at the same moment; run again to publish on top of it")
        return winner
    return release


def _require_verdicts(
    workspace: Workspace, plan: Plan, receipts: Sequence[Receipt]
) -> tuple[AuditReport, IndexReceipt]:
    audit, index = workspace.read_audit(), workspace.read_index()
    if audit is None or index is None:
        raise UserError(f"plan {plan.plan_id}: run the {'audit' if audit is None else 'index'} stage first")
    if audit.problems:
        raise GateRefused(f"the audit refused plan {plan.plan_id}: {audit.problems[0]}. Nothing was published")
    digest = receipts_digest(receipts)
    for stage, seen in (("audit", audit.receipts_digest), ("index", index.receipts_digest)):
        if seen != digest:
            raise GateRefused(f"plan {plan.plan_id}: files changed after the {stage}; run the {stage} stage again")
    return audit, index


def _require_files(
    storage: Storage, plan: Plan, receipts: Sequence[Receipt], index: IndexReceipt, *, table_uri: str
) -> None:
    problems = [check_file(storage, index.uri, file) for file in index.files]
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
    index: IndexReceipt,
    table_uri: str,
    version: int,
    previous: Release | None,
) -> Release:
    now = datetime.now(UTC)
    encoded, tokens = sum(r.encoded for r in receipts), sum(r.tokens for r in receipts)
    seconds = workspace.read_seconds()
    return Release(
        release_id=f"{now:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:4]}",
        ds=plan.ds,
        created_at=now,
        plan_id=plan.plan_id,
        supersedes=previous.release_id if previous else None,
        table_uri=table_uri,
        table_version=version,
        table_files=tuple(r.file for r in receipts if r.file is not None),
        dim=plan.dim,
        buckets=plan.buckets,
        template=plan.template,
        bundle=plan.bundle,
        bundle_uri=plan.bundle_uri,
        bundle_file=open_bundle(workspace.storage, plan.bundle_uri).card_file,
        index_uri=index.uri,
        index_files=index.files,
        index_factory=index.factory,
        index_nprobe=index.nprobe,
        k=index.k,
        recall=index.recall,
        recall_queries=index.queries,
        items=plan.items,
        new=plan.new,
        changed=plan.changed,
        reused=plan.unchanged,
        deleted=plan.deleted,
        quarantined=sum(plan.quarantined.values()),
        encoded=encoded,
        tokens=tokens,
        quarantine_uri=workspace.quarantine_uri if plan.quarantined else None,
        mean=audit.mean,
        variance=audit.variance,
        drift=audit.drift,
        quarantined_fraction=audit.quarantined_fraction,
        seconds=seconds,
        tokens_per_second=tokens / seconds["encode"] if tokens and seconds.get("encode") else None,
    )

"""The work area of one plan, keyed by plan_id and bucket: stages exchange their results through its files."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from marc_pipeline.deployment import Deployment
from marc_pipeline.errors import UserError
from marc_pipeline.progress import SECONDS
from marc_pipeline.storage import Storage, join
from marc_schemas.files import Contract
from marc_schemas.plan import Plan
from marc_schemas.receipt import AuditReport, IndexReceipt, Receipt

PLANS = "plans"
PLAN_FILE = "plan.json"

C = TypeVar("C", bound=Contract)

_written: dict[tuple[str, int], float] = {}
"""Time of the last record of each task of this process."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProgressFiles:
    """Files in which running tasks record how much they have done, because Spark reports finished tasks only."""

    storage: Storage
    uri: str

    def write(self, task: int, done: float) -> None:
        """Record how much a running task has done; at most once in 5 s."""
        now = time.monotonic()
        if now - _written.get((self.uri, task), -math.inf) < SECONDS / 2:
            return
        _written[self.uri, task] = now
        # Progress is only logged: a failure to record it must not fail the task.
        with suppress(OSError):
            self.storage.write(join(self.uri, f"{task:05d}"), f"{done:.2f}".encode())

    def clear(self, tasks: Iterable[int] | None = None) -> None:
        """Delete the progress of tasks that are finished, or of all tasks."""
        if tasks is None:
            self.storage.remove(stored.uri for stored in self.storage.list(self.uri))
        else:
            self.storage.remove(join(self.uri, f"{task:05d}") for task in tasks)

    def total(self) -> float:
        """Return how much all running tasks have done."""
        found = 0.0
        for stored in self.storage.list(self.uri):
            with suppress(ValueError, FileNotFoundError):
                found += float(self.storage.read(stored.uri))
        return found


@dataclass(frozen=True)
class Workspace:
    """Reads and writes the files of one plan. Picklable, so that Spark tasks can carry it."""

    storage: Storage
    root: str
    plan_id: str

    @classmethod
    def of(cls, deployment: Deployment, plan_id: str) -> "Workspace":
        """Return the work area of a plan in a deployment."""
        return cls(deployment.storage, deployment.settings.work_uri, plan_id)

    @property
    def uri(self) -> str:
        """Folder of this plan."""
        return join(self.root, PLANS, self.plan_id)

    @property
    def quarantine_uri(self) -> str:
        """Folder of the quarantine's Parquet files."""
        return join(self.uri, "quarantine")

    def items_uri(self, bucket: int, base: str | None) -> str:
        """Parquet file of a bucket's planned items; a plan with another base release has another file."""
        return join(self.uri, "items", base or "nothing", f"{bucket:05d}.parquet")

    def read_plan(self) -> Plan | None:
        """Return the plan; None before the plan stage has finished."""
        return self._read(Plan, PLAN_FILE)

    def require_plan(self) -> Plan:
        """Return the plan.

        Raises:
            UserError: the plan stage has not finished.
        """
        plan = self.read_plan()
        if plan is None:
            raise UserError(f"no plan {self.plan_id} under {self.root}; run the plan stage first")
        return plan

    def write_plan(self, plan: Plan, *, replacing: Plan | None = None) -> Plan:
        """Record the plan and return the recorded one. If two runs make the same plan at once, the first one is kept.

        Args:
            plan: the new plan.
            replacing: the earlier plan that the new one may overwrite.
        """
        uri = join(self.uri, PLAN_FILE)
        if not self.storage.create(uri, _json(plan)):
            earlier = self.read_plan()
            if earlier is not None and earlier != replacing:
                return earlier
            self.storage.write(uri, _json(plan))
        return plan

    def read_receipts(self, plan: Plan) -> dict[int, Receipt]:
        """Return the receipts of the finished buckets, by bucket."""
        found = {}
        for stored in self.storage.list(join(self.uri, "receipts")):
            receipt = _parse(Receipt, self.storage.read(stored.uri))
            if receipt and (receipt.plan_id, receipt.bundle) == (plan.plan_id, plan.bundle):
                found[receipt.bucket] = receipt
        return found

    def require_receipts(self, plan: Plan) -> list[Receipt]:
        """Return the receipts of every bucket of the plan, in bucket order.

        Raises:
            UserError: the encode stage has not finished.
        """
        found = self.read_receipts(plan)
        missing = [work.bucket for work in plan.work if work.bucket not in found]
        if missing:
            raise UserError(f"plan {plan.plan_id}: no receipt for buckets {missing[:10]}; run the encode stage first")
        return [found[work.bucket] for work in plan.work]

    def write_receipt(self, receipt: Receipt, *, accepts: Callable[[Receipt], bool] = lambda _: False) -> Receipt:
        """Record a bucket's receipt after its file is written, and return the recorded receipt.

        Args:
            receipt: of this worker.
            accepts: whether a receipt of another worker is valid; a valid one is kept.
        """
        uri = join(self.uri, "receipts", f"{receipt.bucket:05d}.json")
        if not self.storage.create(uri, _json(receipt)):
            earlier = read_contract(self.storage, uri, Receipt)
            if earlier is not None and accepts(earlier):
                return earlier
            self.storage.write(uri, _json(receipt))
        return receipt

    @property
    def progress(self) -> "ProgressFiles":
        """Return the place where running buckets record how many tokens they have encoded."""
        return ProgressFiles(self.storage, join(self.uri, "progress"))

    def read_audit(self) -> AuditReport | None:
        """Return the audit's report; None before the audit."""
        return self._read(AuditReport, "audit.json")

    def write_audit(self, report: AuditReport) -> None:
        """Record the audit's report."""
        self.storage.write(join(self.uri, "audit.json"), _json(report))

    def read_index(self) -> IndexReceipt | None:
        """Return the receipt of the index stage; None before that stage."""
        return self._read(IndexReceipt, "index.json")

    def write_index(self, receipt: IndexReceipt) -> None:
        """Record the receipt of the index stage."""
        self.storage.write(join(self.uri, "index.json"), _json(receipt))

    def mark_alive(self) -> None:
        """Mark the run as alive: a vacuum keeps the files of runs that wrote during the grace period."""
        self.storage.write(join(self.uri, "alive"), b"")

    def write_seconds(self, stage: str, seconds: float) -> None:
        """Add the duration of an attempt to the seconds of a stage."""
        total = self.read_seconds().get(stage, 0.0) + seconds
        self.storage.write(join(self.uri, "seconds", f"{stage}.json"), json.dumps({"seconds": total}).encode())

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Record and log the duration of a stage, even if it fails, and mark the run as alive."""
        started = time.monotonic()
        self.mark_alive()
        try:
            yield
        finally:
            seconds = time.monotonic() - started
            self.write_seconds(stage, seconds)
            log.info("%s: %.1f s", stage, seconds)

    def read_seconds(self) -> dict[str, float]:
        """Return the seconds of wall time so far, by stage."""
        found = {}
        for stored in self.storage.list(join(self.uri, "seconds")):
            stage = stored.uri.rsplit("/", 1)[1].removesuffix(".json")
            # The figures are informative, so an unreadable one is skipped.
            with suppress(ValueError, KeyError, TypeError, FileNotFoundError):
                found[stage] = float(json.loads(self.storage.read(stored.uri))["seconds"])
        return found

    def _read(self, model: type[C], name: str) -> C | None:
        return read_contract(self.storage, join(self.uri, name), model)


def read_contract(storage: Storage, uri: str, model: type[C]) -> C | None:
    """Read a contract that a stage wrote; None if the file is missing, damaged or of another format."""
    try:
        return _parse(model, storage.read(uri))
    except FileNotFoundError:
        return None


def _json(model: Contract) -> bytes:
    return model.model_dump_json(indent=1).encode()


def _parse(model: type[C], data: bytes) -> C | None:
    # The stage runs again if its file is damaged or has an older format.
    try:
        return model.model_validate_json(data)
    except ValidationError:
        return None

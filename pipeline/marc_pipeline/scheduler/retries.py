"""Retries of the DAGs' tasks: only faults that may pass are retried."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

# Exit codes of the jobs for errors that a retry would meet again.
PERMANENT = {2: "the catalogue, the bundle or the configuration must be mended first", 3: "a quality gate refused"}
SUPERSEDED = {4: "another run came in between, and this stage alone cannot build on it; start the DAG run again"}


class RetryTransientFaults(RetryPolicy):
    """Retry faults of machine, network or store; fail at once on errors that a retry would meet again."""

    permanent = PERMANENT | SUPERSEDED

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: "Context | None" = None
    ) -> RetryDecision:
        """Decide by the exit code of a job, from spark-submit's failure or from one of our own errors."""
        submitted = re.search(r"Error code is: (\d+)", str(exception))
        code = int(submitted[1]) if submitted else getattr(exception, "exit_code", None)
        if code in self.permanent:
            return RetryDecision.fail(reason=f"not retried: {self.permanent[code]}")
        # Receipts make a retry cheap: only missing work is done.
        delay = timedelta(minutes=min(2**try_number, 30))
        return RetryDecision.retry(delay=delay, reason=f"the fault may pass; next try in {delay}")

    def serialize(self) -> dict[str, Any]:
        """The policy has no settings."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> "RetryTransientFaults":
        """The policy has no settings."""
        return cls()


class RetryFromTheStart(RetryTransientFaults):
    """The same for a job that runs all stages: a retry builds on the release that came in between."""

    permanent = PERMANENT


DEFAULT_ARGS: dict[str, Any] = {
    "owner": "marc",
    # Executors are lost and stores throttle: three retries.
    "retries": 3,
    "retry_policy": RetryTransientFaults(),
}

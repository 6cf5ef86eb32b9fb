"""Retry policy of the DAGs' tasks: only transient faults are retried."""

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

# Exit codes of errors that a retry cannot cure.
PERMANENT = {2: "correct the catalogue, the bundle or the configuration first", 3: "a quality gate refused"}
SUPERSEDED = {4: "another run published first, and a single stage cannot build on it; start the DAG run again"}


class RetryTransientFaults(RetryPolicy):
    """Retry faults of machine, network or store; fail at once on errors that a retry cannot cure."""

    permanent = PERMANENT | SUPERSEDED

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: "Context | None" = None
    ) -> RetryDecision:
        """Decide by the exit code, which a failed spark-submit reports and the pipeline's errors carry."""
        submitted = re.search(r"Error code is: (\d+)", str(exception))
        code = int(submitted[1]) if submitted else getattr(exception, "exit_code", None)
        if code in self.permanent:
            return RetryDecision.fail(reason=f"not retried: {self.permanent[code]}")
        # A retry is cheap: receipts limit it to the missing work.
        delay = timedelta(minutes=min(2**try_number, 30))
        return RetryDecision.retry(delay=delay, reason=f"the fault may be transient; next try in {delay}")

    def serialize(self) -> dict[str, Any]:
        """Return no settings, because the policy has none."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> "RetryTransientFaults":
        """Return the policy, which has no settings."""
        return cls()


class RetryFromTheStart(RetryTransientFaults):
    """Policy of a job that runs all stages: it also retries when superseded, on top of the newest release."""

    permanent = PERMANENT


DEFAULT_ARGS: dict[str, Any] = {
    "owner": "marc",
    # Three retries cover lost executors and throttled stores.
    "retries": 3,
    "retry_policy": RetryTransientFaults(),
}

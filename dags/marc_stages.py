"""What the DAGs share: Spark stages as tasks, and when a retry is worth it."""

import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import Asset, Param, get_current_context
from airflow.sdk.definitions.retry_policy import RetryDecision, RetryPolicy

if TYPE_CHECKING:
    from airflow.sdk.definitions.context import Context

ROOT = Path(__file__).resolve().parent.parent

ITEM_VECTORS = Asset("item_vectors", extra={"what": "MARC vectors of the item catalogue: table, index and bundle"})

CONFIG = Param(
    "",
    type="string",
    title="Configuration file",
    description="Path of marc.yaml on the workers; empty: the variable MARC_CONFIG, else the project's own.",
)


def ds_param(what: str) -> Param:
    """The parameter ``ds`` of a DAG: ``what`` it is the date of."""
    return Param(
        None,
        type=["null", "string"],
        format="date",
        title="Date",
        description=f"{what}, YYYY-MM-DD; empty: the date of the run.",
    )


def requested_ds() -> str:
    """The date that the running DAG was asked for."""
    context = get_current_context()
    # A run that was triggered without a logical date is for the day it was asked for.
    day = context["dag_run"].logical_date or context["dag_run"].run_after
    params: Any = context["params"]
    return str(params["ds"] or f"{day:%Y-%m-%d}")


# Exit codes of the jobs that say why: running the same thing again would fail the same way.
PERMANENT = {2: "the catalogue, the bundle or the configuration must be mended first", 3: "a quality gate refused"}
SUPERSEDED = {4: "another run came in between, and this stage alone cannot build on it; start the DAG run again"}


class RetryWhatMayHeal(RetryPolicy):
    """Fail at once what a retry cannot cure; retry what a machine, a network or a store may have caused."""

    permanent = PERMANENT | SUPERSEDED

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: "Context | None" = None
    ) -> RetryDecision:
        """Read the exit code of a job from spark-submit's failure, or of one of our own errors."""
        submitted = re.search(r"Error code is: (\d+)", str(exception))
        code = int(submitted[1]) if submitted else getattr(exception, "exit_code", None)
        if code in self.permanent:
            return RetryDecision.fail(reason=f"not retried: {self.permanent[code]}")
        # Receipts make a retry cheap: it does what is missing and nothing twice.
        delay = timedelta(minutes=min(2**try_number, 30))
        return RetryDecision.retry(delay=delay, reason=f"a fault that may pass; again in {delay}")

    def serialize(self) -> dict[str, Any]:
        """There is nothing to set."""
        return {}

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> "RetryWhatMayHeal":
        """There is nothing to set."""
        return cls()


class RetryFromTheStart(RetryWhatMayHeal):
    """The same for a job that goes through all stages: it builds on what came in between."""

    permanent = PERMANENT


DEFAULT_ARGS: dict[str, Any] = {
    "owner": "marc",
    # Three: executors are lost, stores throttle. What cannot heal is not retried at all.
    "retries": 3,
    "retry_policy": RetryWhatMayHeal(),
}


def spark_stage(stage: str, arguments: list[str], **settings: Any) -> SparkSubmitOperator:  # noqa: ANN401
    """The task of one stage: spark-submit of its job on the connection ``spark_default``.

    Args:
        stage: name of the job file.
        arguments: of the job; templated.
        settings: of the operator.
    """
    return SparkSubmitOperator(application_args=arguments, **submission(stage), **settings)


def submission(stage: str) -> dict[str, Any]:
    """Arguments of the operator that submits a job, all but the job's own."""
    return {
        "task_id": stage,
        "conn_id": "spark_default",
        "application": str(ROOT / "jobs" / f"{stage}.py"),
        "name": f"marc-{stage}",
        # The stages log their own outline; Spark's start-up would bury it.
        "conf": {"spark.log.level": "ERROR"},
        # The pool of work is keyed by plan and bucket, so a fresh submission is always safe.
        "durable": False,
    }

"""marc_backfill runs past dates, or some of their buckets, again. Each date ends in one release."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import Metadata, Param, dag, task

from marc_pipeline.scheduler.events import ITEM_VECTORS, release_event
from marc_pipeline.scheduler.operators import backfill_arguments, submission
from marc_pipeline.scheduler.params import CONFIG, date_param, given_params
from marc_pipeline.scheduler.retries import DEFAULT_ARGS, RetryFromTheStart
from marc_pipeline.scheduler.tasks import identify_backfills


@dag(
    schedule=None,
    start_date=datetime(2026, 11, 1),
    default_args={**DEFAULT_ARGS, "retry_policy": RetryFromTheStart()},
    params={
        "first": date_param("YYYY-MM-DD.", title="First date"),
        "last": date_param("YYYY-MM-DD. Default: the first date.", title="Last date"),
        "buckets": Param(
            [],
            type="array",
            items={"type": "integer", "minimum": 0},
            title="Buckets",
            description="Replace only these buckets. Default: all. A date without a release is always run whole.",
        ),
        "recompute": Param(
            default=False,
            type="boolean",
            title="Recompute",
            description="Re-encode unchanged items as well.",
        ),
        "config": CONFIG,
    },
    tags=["marc"],
    doc_md=__doc__,
)
def marc_backfill() -> None:
    """Declare the tasks, which :mod:`marc_pipeline.scheduler` implements."""

    @task
    def identify() -> list[dict[str, Any]]:
        """Identify the plan of every date; the run fails here if a date has no catalogue."""
        return identify_backfills(**given_params("first", "last", "buckets", "recompute", "config"))

    @task(outlets=[ITEM_VECTORS])
    def announce(plan: dict[str, Any]) -> Iterator[Metadata]:
        """Attach the facts of the release to the asset event."""
        yield release_event(ds=plan["ds"], config=plan["config"])

    plans: Any = identify()
    # Dates run one after another, because each may use the whole cluster.
    submitted = SparkSubmitOperator.partial(
        **submission("backfill", dag_file=__file__), max_active_tis_per_dagrun=1
    ).expand(application_args=plans.map(backfill_arguments))
    submitted >> announce.expand(plan=plans)


marc_backfill()

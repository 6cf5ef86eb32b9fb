"""marc_backfill: dates, or some buckets of them, from the catalogues of those days; each date ends in one release."""

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
        "last": date_param("YYYY-MM-DD; empty: the first date alone.", title="Last date"),
        "buckets": Param(
            [],
            type="array",
            items={"type": "integer", "minimum": 0},
            title="Buckets",
            description="Replace only these buckets; empty: whole dates. Dates without a release are run whole.",
        ),
        "recompute": Param(
            default=False,
            type="boolean",
            title="Recompute",
            description="Compute vectors of unchanged texts as well.",
        ),
        "config": CONFIG,
    },
    tags=["marc"],
    doc_md=__doc__,
)
def marc_backfill() -> None:
    """Declare the tasks; :mod:`marc_pipeline.scheduler` defines what they do."""

    @task
    def identify() -> list[dict[str, Any]]:
        """Name the plan of every date; a date without a catalogue ends the run before anything is started."""
        return identify_backfills(**given_params("first", "last", "buckets", "recompute", "config"))

    @task(outlets=[ITEM_VECTORS])
    def announce(day: dict[str, Any]) -> Iterator[Metadata]:
        """Attach the facts of the release to the asset."""
        yield release_event(ds=day["ds"], config=day["config"])

    days: Any = identify()
    # One date after the other: each may use all of Spark.
    submitted = SparkSubmitOperator.partial(
        **submission("backfill", dag_file=__file__), max_active_tis_per_dagrun=1
    ).expand(application_args=days.map(backfill_arguments))
    submitted >> announce.expand(day=days)


marc_backfill()

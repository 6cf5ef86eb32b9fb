"""marc_backfill: dates, or some buckets of them, from the catalogues of those days; each date ends in one release."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.sdk import Metadata, Param, dag, get_current_context, task
from marc_stages import CONFIG, DEFAULT_ARGS, ITEM_VECTORS, RetryFromTheStart, submission


def arguments(day: dict[str, Any]) -> list[str]:
    """Arguments of the job for one date."""
    buckets = [word for bucket in day["buckets"] for word in ("--bucket", str(bucket))]
    recompute = ["--recompute"] if day["recompute"] else []
    return ["--config", day["config"], "--ds", day["ds"], "--plan-id", day["plan_id"], *buckets, *recompute]


def date_param(title: str) -> Param:
    """A date that must be given."""
    return Param(None, type=["null", "string"], format="date", title=title, description="YYYY-MM-DD.")


@dag(
    schedule=None,
    start_date=datetime(2026, 11, 1),
    default_args={**DEFAULT_ARGS, "retry_policy": RetryFromTheStart()},
    params={
        "first": date_param("First date"),
        "last": Param(
            None,
            type=["null", "string"],
            format="date",
            title="Last date",
            description="YYYY-MM-DD; empty: the first date alone.",
        ),
        "buckets": Param(
            [],
            type="array",
            items={"type": "integer", "minimum": 0},
            title="Buckets",
            description="Replace only these, and no other file; empty: whole dates. Dates without a release run whole.",
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
    """Wire the dates; what they do is in ``pipeline``."""

    @task
    def identify() -> list[dict[str, Any]]:
        """Name the plan of every date; a date without a catalogue ends the run before anything is started."""
        from pipeline.errors import UserError
        from pipeline.run import identify_backfills

        params: Any = get_current_context()["params"]
        if not params["first"]:
            raise UserError("give the first date to backfill")
        return identify_backfills(
            first=params["first"],
            last=params["last"] or params["first"],
            buckets=params["buckets"],
            recompute=params["recompute"],
            config=params["config"],
        )

    @task(outlets=[ITEM_VECTORS])
    def announce(day: dict[str, Any]) -> Iterator[Metadata]:
        """Put the facts of the release on the asset, for whoever is scheduled by it."""
        from pipeline.run import release_facts

        yield Metadata(ITEM_VECTORS, extra=release_facts(ds=day["ds"], config=day["config"]))

    days: Any = identify()
    # One after the other: each has the whole of Spark.
    submitted = SparkSubmitOperator.partial(**submission("backfill"), max_active_tis_per_dagrun=1).expand(
        application_args=days.map(arguments)
    )
    submitted >> announce.expand(day=days)


marc_backfill()

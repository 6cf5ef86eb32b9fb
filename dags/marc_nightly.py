"""marc_nightly publishes one release of item vectors per date: plan, encode, audit, index, release."""

from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from typing import Any

from airflow.sdk import Metadata, dag, task

from marc_pipeline.scheduler.events import ITEM_VECTORS, release_event
from marc_pipeline.scheduler.operators import identified_arguments, spark_stage
from marc_pipeline.scheduler.params import CONFIG, ds_param, requested
from marc_pipeline.scheduler.retries import DEFAULT_ARGS
from marc_pipeline.scheduler.tasks import identify_nightly

STAGES = ("plan", "encode", "audit", "index", "release")


@dag(
    schedule="0 2 * * *",
    start_date=datetime(2026, 11, 1),
    catchup=False,
    # Two runs at once are safe, but they compete for the same machines.
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params={"ds": ds_param("Snapshot to publish"), "config": CONFIG},
    tags=["marc"],
    doc_md=__doc__,
)
def marc_nightly() -> None:
    """Declare the tasks, which :mod:`marc_pipeline.scheduler` implements."""

    @task
    def identify() -> dict[str, str]:
        """Identify the plan of the date; the run fails here without a catalogue or a bundle."""
        return identify_nightly(**requested())

    @task.short_circuit
    def is_new(plan: dict[str, str]) -> bool:
        """Skip the other tasks if this plan is already published."""
        return plan["published"] == ""

    @task(outlets=[ITEM_VECTORS])
    def announce(plan: dict[str, str]) -> Iterator[Metadata]:
        """Attach the facts of the release to the asset event."""
        yield release_event(ds=plan["ds"], config=plan["config"])

    plan: Any = identify()
    arguments = identified_arguments("config", "ds", "plan_id")
    stages = [spark_stage(name, arguments, dag_file=__file__) for name in STAGES]
    is_new(plan) >> stages[0]
    for earlier, later in pairwise(stages):
        earlier >> later
    stages[-1] >> announce(plan)


marc_nightly()

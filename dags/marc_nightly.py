"""marc_nightly: the day's catalogue becomes one release of item vectors; plan, encode, audit, index, release."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any

from airflow.sdk import Metadata, dag, get_current_context, task
from marc_stages import CONFIG, DEFAULT_ARGS, ITEM_VECTORS, ds_param, requested_ds, spark_stage

PLAN = "ti.xcom_pull(task_ids='identify')"
ARGUMENTS = [
    *("--config", f"{{{{ {PLAN}['config'] }}}}"),
    *("--ds", f"{{{{ {PLAN}['ds'] }}}}"),
    *("--plan-id", f"{{{{ {PLAN}['plan_id'] }}}}"),
]


@dag(
    schedule="0 2 * * *",
    start_date=datetime(2026, 11, 1),
    catchup=False,
    # Two nights at once are safe, but compete for the same machines.
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params={
        "ds": ds_param("Snapshot to publish"),
        "config": CONFIG,
    },
    tags=["marc"],
    doc_md=__doc__,
)
def marc_nightly() -> None:
    """Wire the stages; what they do is in ``pipeline``."""

    @task
    def identify() -> dict[str, str]:
        """Name the plan of this date; a missing catalogue or bundle ends the run here."""
        from pipeline.run import identify_for_scheduler

        params: Any = get_current_context()["params"]
        return identify_for_scheduler(ds=requested_ds(), config=params["config"])

    @task.short_circuit
    def is_new(plan: dict[str, str]) -> bool:
        """Skip everything when this very plan is published already."""
        return plan["published"] == ""

    @task(outlets=[ITEM_VECTORS])
    def announce(plan: dict[str, str]) -> Iterator[Metadata]:
        """Put the facts of the release on the asset, for whoever is scheduled by it."""
        from pipeline.run import release_facts

        yield Metadata(ITEM_VECTORS, extra=release_facts(ds=plan["ds"], config=plan["config"]))

    plan_facts: Any = identify()
    stages = [spark_stage(name, ARGUMENTS) for name in ("plan", "encode", "audit", "index", "release")]
    first, *rest = stages
    is_new(plan_facts) >> first
    for stage in rest:
        first >> stage
        first = stage
    first >> announce(plan_facts)


marc_nightly()

"""marc_maintenance: retire releases beyond retention, and remove what no release, reader or run needs any more."""

from datetime import datetime
from typing import Any

from airflow.sdk import dag, get_current_context, task
from marc_stages import CONFIG, DEFAULT_ARGS


@dag(
    schedule="0 6 * * *",
    start_date=datetime(2026, 11, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params={"config": CONFIG},
    tags=["marc"],
    doc_md=__doc__,
)
def marc_maintenance() -> None:
    """Wire the vacuum; what it does is in ``pipeline``."""

    @task
    def vacuum() -> dict[str, Any]:
        """Vacuum; what was retired, forgotten and removed."""
        from pipeline.run import vacuum_for_scheduler

        params: Any = get_current_context()["params"]
        return vacuum_for_scheduler(config=params["config"])

    vacuum()


marc_maintenance()

"""marc_maintenance retires releases beyond retention and deletes files that no release, reader or run uses."""

from datetime import datetime
from typing import Any

from airflow.sdk import dag, task

from marc_pipeline.scheduler.params import CONFIG, given_params
from marc_pipeline.scheduler.retries import DEFAULT_ARGS
from marc_pipeline.scheduler.tasks import vacuum_files


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
    """Declare the vacuum, which :mod:`marc_pipeline.scheduler` implements."""

    @task
    def vacuum() -> dict[str, Any]:
        """Retire releases and delete files; return what was retired, forgotten and deleted."""
        return vacuum_files(**given_params("config"))

    vacuum()


marc_maintenance()

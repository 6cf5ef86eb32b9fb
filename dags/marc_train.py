"""marc_train trains a bundle on a catalogue and its interactions, and promotes it if it passes the gate."""

from datetime import datetime
from typing import Any

from airflow.sdk import dag, task

from marc_pipeline.scheduler.operators import identified_arguments, spark_stage
from marc_pipeline.scheduler.params import CONFIG, ds_param, requested
from marc_pipeline.scheduler.retries import DEFAULT_ARGS
from marc_pipeline.scheduler.tasks import identify_training_run, promote_training

STAGES = ("hidden_states", "evaluate_layers", "train_marc", "evaluate_marc")


@dag(
    # Each team decides how often to train: every promotion re-encodes the whole catalogue.
    schedule=None,
    start_date=datetime(2026, 11, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params={"ds": ds_param("Catalogue to train on"), "config": CONFIG},
    tags=["marc"],
    doc_md=__doc__,
)
def marc_train() -> None:
    """Declare the tasks, which :mod:`marc_pipeline.scheduler` implements."""

    @task
    def identify() -> dict[str, str]:
        """Identify the training set of the date; the run fails here without interactions."""
        return identify_training_run(**requested())

    @task
    def promote(training: dict[str, str]) -> dict[str, Any]:
        """Make the new bundle the current one in one atomic write, unless the gate refuses it."""
        return promote_training(**{name: training[name] for name in ("config", "training_id", "decided")})

    training: Any = identify()
    arguments = identified_arguments("config", "ds", "training_id", "decided")
    states, layers, train, evaluate = (spark_stage(name, arguments, dag_file=__file__) for name in STAGES)
    training >> states >> layers >> train >> evaluate >> promote(training)


marc_train()

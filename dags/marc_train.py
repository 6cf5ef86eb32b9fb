"""marc_train: catalogue and interactions become a bundle: states, layers, train, evaluate, promote behind a gate."""

from datetime import datetime
from typing import Any

from airflow.sdk import dag, get_current_context, task
from marc_stages import CONFIG, DEFAULT_ARGS, ds_param, requested_ds, spark_stage

TRAINING = "ti.xcom_pull(task_ids='identify')"
ARGUMENTS = [
    *("--config", f"{{{{ {TRAINING}['config'] }}}}"),
    *("--ds", f"{{{{ {TRAINING}['ds'] }}}}"),
    *("--training-id", f"{{{{ {TRAINING}['training_id'] }}}}"),
    *("--decided", f"{{{{ {TRAINING}['decided'] }}}}"),
]


@dag(
    # How often a model is trained anew is the team's choice; every promotion re-encodes the whole catalogue.
    schedule=None,
    start_date=datetime(2026, 11, 1),
    catchup=False,
    max_active_runs=1,
    default_args=DEFAULT_ARGS,
    params={
        "ds": ds_param("Catalogue to learn from"),
        "config": CONFIG,
    },
    tags=["marc"],
    doc_md=__doc__,
)
def marc_train() -> None:
    """Wire the stages; what they do is in ``pipeline``."""

    @task
    def identify() -> dict[str, str]:
        """Name the training set of this date; missing interactions end the run here."""
        from pipeline.train import identify_for_scheduler

        params: Any = get_current_context()["params"]
        return identify_for_scheduler(ds=requested_ds(), config=params["config"])

    @task
    def promote(training: dict[str, str]) -> dict[str, Any]:
        """Make the new bundle the current one, unless the gate refuses: one atomic write."""
        from pipeline.train import promote_for_scheduler

        names = ("config", "training_id", "decided")
        return promote_for_scheduler(**{name: training[name] for name in names})

    training: Any = identify()
    states, layers, train, evaluate = (
        spark_stage(name, ARGUMENTS) for name in ("hidden_states", "evaluate_layers", "train_marc", "evaluate_marc")
    )
    training >> states >> layers >> train >> evaluate >> promote(training)


marc_train()

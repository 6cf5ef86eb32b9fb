"""Operators that submit the Spark jobs of a DAG, and the arguments of these jobs."""

from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator


def spark_stage(stage: str, arguments: list[str], *, dag_file: str) -> SparkSubmitOperator:
    """Return the task that submits the job of one stage; ``arguments`` are templated, ``dag_file`` is ``__file__``."""
    return SparkSubmitOperator(application_args=arguments, **submission(stage, dag_file=dag_file))


def submission(stage: str, *, dag_file: str) -> dict[str, Any]:
    """Return the arguments of the operator that submits a job on ``spark_default``, without those of the job.

    Args:
        stage: name of the job file.
        dag_file: ``__file__`` of the DAG; the folders ``dags`` and ``jobs`` have the same parent.
    """
    return {
        "task_id": stage,
        "conn_id": "spark_default",
        "application": str(Path(dag_file).resolve().parent.parent / "jobs" / f"{stage}.py"),
        "name": f"marc-{stage}",
        # Spark's start-up messages would hide the log lines of the stages.
        "conf": {"spark.log.level": "ERROR"},
        # Submitting a job again is safe, because work is keyed by plan and bucket.
        "durable": False,
    }


def identified_arguments(*names: str) -> list[str]:
    """Return templated arguments of a job, filled with results of the task ``identify``.

    Args:
        names: keys of the results, for example ``plan_id`` for ``--plan-id``.
    """
    value = "{{{{ ti.xcom_pull(task_ids='identify')['{}'] }}}}"
    return [word for name in names for word in (f"--{name.replace('_', '-')}", value.format(name))]


def backfill_arguments(plan: dict[str, Any]) -> list[str]:
    """Return the arguments of the backfill job of one date from ``identify_backfills``."""
    buckets = [word for bucket in plan["buckets"] for word in ("--bucket", str(bucket))]
    recompute = ["--recompute"] if plan["recompute"] else []
    return ["--config", plan["config"], "--ds", plan["ds"], "--plan-id", plan["plan_id"], *buckets, *recompute]

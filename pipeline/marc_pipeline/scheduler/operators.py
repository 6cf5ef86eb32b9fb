"""The Spark jobs as tasks of a DAG, and the arguments that they get."""

from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator


def spark_stage(stage: str, arguments: list[str], *, dag_file: str) -> SparkSubmitOperator:
    """The task of one stage: spark-submit of its job on the connection ``spark_default``.

    Args:
        stage: name of the job file.
        arguments: of the job; templated.
        dag_file: ``__file__`` of the DAG.
    """
    return SparkSubmitOperator(application_args=arguments, **submission(stage, dag_file=dag_file))


def submission(stage: str, *, dag_file: str) -> dict[str, Any]:
    """Arguments of the operator that submits a job, without the arguments of the job.

    Args:
        stage: name of the job file.
        dag_file: ``__file__`` of the DAG; the folders ``dags`` and ``jobs`` lie side by side.
    """
    return {
        "task_id": stage,
        "conn_id": "spark_default",
        "application": str(Path(dag_file).resolve().parent.parent / "jobs" / f"{stage}.py"),
        "name": f"marc-{stage}",
        # The stages log their own progress; Spark's start-up messages would hide it.
        "conf": {"spark.log.level": "ERROR"},
        # Work is keyed by plan and bucket, so a fresh submission is always safe.
        "durable": False,
    }


def identified_arguments(*names: str) -> list[str]:
    """Templated arguments of a job, with values that the task ``identify`` returned.

    Args:
        names: keys of those values, for example ``plan_id`` for ``--plan-id``.
    """
    value = "{{{{ ti.xcom_pull(task_ids='identify')['{}'] }}}}"
    return [word for name in names for word in (f"--{name.replace('_', '-')}", value.format(name))]


def backfill_arguments(day: dict[str, Any]) -> list[str]:
    """Arguments of the backfill job for one date, from :func:`marc_pipeline.scheduler.tasks.identify_backfills`."""
    buckets = [word for bucket in day["buckets"] for word in ("--bucket", str(bucket))]
    recompute = ["--recompute"] if day["recompute"] else []
    return ["--config", day["config"], "--ds", day["ds"], "--plan-id", day["plan_id"], *buckets, *recompute]

"""The Spark jobs of a nightly run and of a backfill."""

from marc_pipeline.jobs.arguments import job, spark_job
from marc_pipeline.nightly.stages import audit_stage, encode_stage, index_stage, plan_stage, release_stage


def plan() -> None:
    """Run the plan stage."""
    from marc_pipeline.nightly.plan_identity import identify_plan

    with spark_job(plan.__doc__, "plan") as (called, spark):
        identity = identify_plan(called.deployment, ds=called.ds)
        plan_stage(spark, called.deployment, identity, expected=called.plan_id)


def encode() -> None:
    """Run the encode stage."""
    with spark_job(encode.__doc__, "encode", gpu_tasks=True) as (called, spark):
        encode_stage(spark, called.deployment, called.plan_id)


def audit() -> None:
    """Run the audit stage."""
    with spark_job(audit.__doc__, "audit") as (called, spark):
        audit_stage(spark, called.deployment, called.plan_id)


def index() -> None:
    """Run the index stage, which starts Spark only when the index has several shards."""
    with job(index.__doc__) as called:
        index_stage(called.deployment, called.plan_id)


def release() -> None:
    """Run the release stage."""
    with job(release.__doc__) as called:
        release_stage(called.deployment, called.plan_id)


def backfill() -> None:
    """Run all stages of one date, or of some of its buckets."""
    from marc_pipeline.nightly.run import backfill as run_backfill

    with job(backfill.__doc__, backfill=True) as called:
        run_backfill(
            called.deployment,
            ds=called.ds,
            buckets=called.buckets,
            recompute=called.recompute,
            expected=called.plan_id,
        )

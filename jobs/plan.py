"""spark-submit entry point of the plan stage."""

from pipeline.entry import job
from pipeline.run import identify, plan_stage
from pipeline.session import spark_session

if __name__ == "__main__":
    with (
        job(__doc__) as called,
        spark_session(called.settings.spark, storage=called.settings.storage, name=f"marc plan {called.ds}") as spark,
    ):
        plan_stage(spark, called.settings, identify(called.settings, ds=called.ds), expected=called.plan_id)

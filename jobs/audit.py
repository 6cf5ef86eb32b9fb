"""spark-submit entry point of the audit stage."""

from pipeline.entry import job
from pipeline.run import audit_stage
from pipeline.session import spark_session

if __name__ == "__main__":
    with (
        job(__doc__) as called,
        spark_session(called.settings.spark, storage=called.settings.storage, name=f"marc audit {called.ds}") as spark,
    ):
        audit_stage(spark, called.settings, called.plan_id)

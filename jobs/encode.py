"""spark-submit entry point of the encode stage."""

from pipeline.entry import job
from pipeline.run import encode_stage
from pipeline.session import spark_session

if __name__ == "__main__":
    with (
        job(__doc__) as called,
        spark_session(
            called.settings.spark, storage=called.settings.storage, name=f"marc encode {called.ds}", gpu_tasks=True
        ) as spark,
    ):
        encode_stage(spark, called.settings, called.plan_id)

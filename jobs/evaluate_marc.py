"""spark-submit entry point of judging the trained bundle beside the current one."""

from pipeline.entry import job
from pipeline.session import spark_session
from pipeline.train import compare_stage, trained_bundle

if __name__ == "__main__":
    with (
        job(__doc__, of="training_id") as called,
        spark_session(called.settings.spark, name=f"marc evaluate {called.ds}") as spark,
    ):
        candidate = trained_bundle(called.settings, called.training_id)
        compare_stage(spark, called.settings, called.training_id, candidate)

"""spark-submit entry point of judging the trained bundle beside the current one."""

from pipeline.entry import job
from pipeline.promotion import compare_stage
from pipeline.session import spark_session
from pipeline.training_run import as_decided, trained_bundle

if __name__ == "__main__":
    with (
        job(__doc__, of="training_id") as called,
        spark_session(
            called.settings.spark, storage=called.settings.storage, name=f"marc evaluate {called.ds}"
        ) as spark,
    ):
        settings, _ = as_decided(called)
        candidate = trained_bundle(settings, called.training_id)
        compare_stage(spark, settings, called.training_id, candidate)

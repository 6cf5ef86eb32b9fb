"""spark-submit entry point of judging every layer: parts of the catalogue's sample and click models side by side."""

from pipeline.entry import job
from pipeline.layers import layers_stage, publish_report
from pipeline.session import spark_session
from pipeline.training_run import reviewed

if __name__ == "__main__":
    with (
        job(__doc__, of="training_id", announced=False) as called,
        spark_session(
            called.settings.spark, storage=called.settings.storage, name=f"marc layers {called.ds}", gpu_tasks=True
        ) as spark,
    ):
        settings = reviewed(called.settings)
        publish_report(settings, layers_stage(spark, settings, ds=called.ds, expected=called.training_id or None))

"""spark-submit entry point of a training's first stage: items, interactions and every layer's hidden states."""

from pipeline.entry import job
from pipeline.session import spark_session
from pipeline.training_run import as_decided, identify, states_stage

if __name__ == "__main__":
    with (
        job(__doc__, of="training_id") as called,
        spark_session(
            called.settings.spark, storage=called.settings.storage, name=f"marc hidden states {called.ds}"
        ) as spark,
    ):
        settings, _ = as_decided(called)
        states_stage(spark, settings, identify(settings, ds=called.ds), expected=called.training_id)

"""spark-submit entry point of training MARC: choose the layer, train, save the bundle."""

from pipeline.entry import job
from pipeline.session import spark_session
from pipeline.training_run import as_decided, train_stage

if __name__ == "__main__":
    with (
        job(__doc__, of="training_id") as called,
        spark_session(called.settings.spark, storage=called.settings.storage, name=f"marc train {called.ds}") as spark,
    ):
        settings, decision = as_decided(called)
        train_stage(spark, settings, called.training_id, decision=decision)

"""spark-submit entry point of training MARC: choose the layer, train, save the bundle."""

from pipeline.entry import job
from pipeline.session import spark_session
from pipeline.training_run import reviewed, train_stage

if __name__ == "__main__":
    with (
        job(__doc__, of="training_id") as called,
        spark_session(called.settings.spark, storage=called.settings.storage, name=f"marc train {called.ds}") as spark,
    ):
        train_stage(spark, reviewed(called.settings), called.training_id)

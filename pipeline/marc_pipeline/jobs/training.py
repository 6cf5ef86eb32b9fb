"""The Spark jobs of a training."""

from marc_pipeline.bundles.choices import LayerDecision, as_decided
from marc_pipeline.deployment import Deployment
from marc_pipeline.jobs.arguments import Job, job, spark_job
from marc_schemas.layers import Decision


def hidden_states() -> None:
    """Build the training set: items, interactions, and the hidden states of every layer."""
    from marc_pipeline.bundles.stages import states_stage
    from marc_pipeline.training.training_set import identify_training

    with spark_job(hidden_states.__doc__, "hidden states", of="training_id") as (called, spark):
        deployment, _ = _decided(called)
        states_stage(spark, deployment, identify_training(deployment, ds=called.ds), expected=called.training_id)


def evaluate_layers() -> None:
    """Evaluate every layer, and write the report."""
    from marc_pipeline.layers.judge import judge_layers, publish_report

    with job(evaluate_layers.__doc__, of="training_id", announced=False) as called:
        deployment, _ = _decided(called)
        publish_report(deployment, judge_layers(deployment, ds=called.ds, expected=called.training_id or None))


def train_marc() -> None:
    """Train MARC: choose the layer, train, save the bundle."""
    from marc_pipeline.bundles.stages import train_stage

    with spark_job(train_marc.__doc__, "train", of="training_id") as (called, spark):
        deployment, decision = _decided(called)
        train_stage(spark, deployment, called.training_id, decision=decision)


def evaluate_marc() -> None:
    """Compare the trained bundle with the current one and with PCA."""
    from marc_pipeline.bundles.promotion import compare_stage
    from marc_pipeline.bundles.stages import trained_bundle

    with job(evaluate_marc.__doc__, of="training_id") as called:
        deployment, _ = _decided(called)
        compare_stage(deployment, called.training_id, trained_bundle(deployment, called.training_id))


def _decided(called: Job) -> tuple[Deployment, Decision]:
    """Return the deployment with the decided layers and pooling, and the decision's origin."""
    return as_decided(called.deployment, LayerDecision.parse(called.decided) if called.decided else None)

"""spark-submit entry point of judging every layer: parts of the catalogue's sample and click models side by side."""

from pipeline.entry import job
from pipeline.layers import judge_layers, publish_report
from pipeline.training_run import as_decided

if __name__ == "__main__":
    with job(__doc__, of="training_id", announced=False) as called:
        settings, _ = as_decided(called)
        publish_report(settings, judge_layers(settings, ds=called.ds, expected=called.training_id or None))

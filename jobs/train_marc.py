"""spark-submit entry point of training MARC."""

from marc_pipeline.jobs.training import train_marc

if __name__ == "__main__":
    train_marc()

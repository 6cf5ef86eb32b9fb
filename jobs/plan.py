"""spark-submit entry point of the plan stage."""

from marc_pipeline.jobs.nightly import plan

if __name__ == "__main__":
    plan()

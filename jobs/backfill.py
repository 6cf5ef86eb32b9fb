"""spark-submit entry point of a backfill."""

from marc_pipeline.jobs.nightly import backfill

if __name__ == "__main__":
    backfill()

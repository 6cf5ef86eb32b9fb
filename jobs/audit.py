"""spark-submit entry point of the audit stage."""

from marc_pipeline.jobs.nightly import audit

if __name__ == "__main__":
    audit()

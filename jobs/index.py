"""spark-submit entry point of the index stage."""

from marc_pipeline.jobs.nightly import index

if __name__ == "__main__":
    index()

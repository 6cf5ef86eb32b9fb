"""spark-submit entry point of the release stage."""

from marc_pipeline.jobs.nightly import release

if __name__ == "__main__":
    release()

"""spark-submit entry point of the encode stage."""

from marc_pipeline.jobs.nightly import encode

if __name__ == "__main__":
    encode()

"""spark-submit entry point of the comparison of the trained bundle with the current one."""

from marc_pipeline.jobs.training import evaluate_marc

if __name__ == "__main__":
    evaluate_marc()

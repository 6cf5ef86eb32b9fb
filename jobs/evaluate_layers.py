"""spark-submit entry point of the evaluation of every layer."""

from marc_pipeline.jobs.training import evaluate_layers

if __name__ == "__main__":
    evaluate_layers()

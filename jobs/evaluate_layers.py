"""spark-submit entry point of the judgement of every layer."""

from marc_pipeline.jobs.training import evaluate_layers

if __name__ == "__main__":
    evaluate_layers()

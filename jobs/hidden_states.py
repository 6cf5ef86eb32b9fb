"""spark-submit entry point of building the training set."""

from marc_pipeline.jobs.training import hidden_states

if __name__ == "__main__":
    hidden_states()

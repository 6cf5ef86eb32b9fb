"""spark-submit entry point of the first stage of a training: the training set."""

from marc_pipeline.jobs.training import hidden_states

if __name__ == "__main__":
    hidden_states()

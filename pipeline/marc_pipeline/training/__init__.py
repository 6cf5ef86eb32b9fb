"""Training: interactions, objectives and the training loop of a compressor."""

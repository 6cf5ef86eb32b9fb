"""From training data to the current bundle: the stages of `marc train`, the gate, and promotion."""

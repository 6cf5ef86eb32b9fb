"""Layer metrics: evaluate every layer of a backbone, and recommend where to truncate it."""

"""Layer metrics: judge every layer of a backbone, and recommend where to truncate it."""

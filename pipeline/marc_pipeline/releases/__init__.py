"""The release log: publish rules, roll back, retention."""

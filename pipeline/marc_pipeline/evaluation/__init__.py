"""Evaluation: compares systems of vectors by the AUC of the same click model."""

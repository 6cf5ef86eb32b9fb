"""Evaluation: every system of vectors judged by the same click model."""

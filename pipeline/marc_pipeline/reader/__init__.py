"""The package that a ranker imports: open a release, read vectors, search neighbours; no torch, pyspark or airflow."""

from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release

__all__ = ["OpenRelease", "UnknownItems", "open_release"]

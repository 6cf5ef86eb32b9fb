"""The reader that rankers import: open a release, read vectors, search neighbours. No torch, pyspark or airflow."""

from marc_pipeline.reader.release import OpenRelease, UnknownItems, open_release

__all__ = ["OpenRelease", "UnknownItems", "open_release"]

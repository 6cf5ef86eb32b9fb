"""What a ranker imports: open a release, read vectors, search neighbours. Needs no torch, pyspark or airflow."""

from marc_pipeline.reader.release import OpenRelease, open_release

__all__ = ["OpenRelease", "open_release"]

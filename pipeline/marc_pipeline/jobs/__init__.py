"""The Spark jobs: one function for each file in ``jobs/``, which spark-submit runs."""

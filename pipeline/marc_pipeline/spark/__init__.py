"""The Spark session and the tasks that run on it. The only package that imports pyspark."""

"""The Spark session, and one function per bucket run on it. The only package that imports pyspark."""

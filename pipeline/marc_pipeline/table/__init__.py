"""The feature table: write, commit and read its Parquet files."""

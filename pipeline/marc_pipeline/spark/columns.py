"""Columns of a Spark frame that SQL text cannot express: of Python functions, and of names from a catalogue."""

from collections.abc import Callable, Mapping

import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as sql
from pyspark.sql.pandas.functions import arrow_udf
from pyspark.sql.types import StringType


def with_text(frame: DataFrame, name: str, column: str, function: Callable[[str], str]) -> DataFrame:
    """Return the frame with a text column ``name`` that ``function`` makes of another one; null stays null.

    A null costs little, so that the function runs only for rows that need it.
    """

    def made(values: pa.Array) -> pa.Array:
        if values.null_count == len(values):
            return pa.nulls(len(values), pa.string())
        return pa.array([None if value is None else function(value) for value in values.to_pylist()], pa.string())

    cells = arrow_udf(made, StringType())  # type: ignore[call-overload]  # the stubs know no plain function
    return frame.withColumn(name, cells(frame[column]))


def with_json(frame: DataFrame, name: str, columns: Mapping[str, str]) -> DataFrame:
    """Return the frame with a column of JSON objects: ``columns`` maps each key to a column of the frame."""
    return frame.withColumn(
        name, sql.to_json(sql.struct(*(frame[column].alias(key) for key, column in columns.items())))
    )


def with_source(frame: DataFrame, name: str) -> DataFrame:
    """Return the frame with the name of each row's file as its last column, also where a column is called _metadata."""
    return frame.select("*", frame.metadataColumn("_metadata").getField("file_name").alias(name))

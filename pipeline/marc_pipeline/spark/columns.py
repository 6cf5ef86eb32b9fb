"""Columns that Python computes from a column of a Spark frame, in Arrow batches."""

from collections.abc import Callable

import pyarrow as pa
from pyspark.sql import DataFrame
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

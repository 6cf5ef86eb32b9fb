"""Arrow schemas derived from pydantic models, so that the model is the only description of a table."""

from collections.abc import Sequence
from datetime import datetime
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel

SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}


def arrow_schema(model: type[BaseModel]) -> pa.Schema:
    """Return the columns of a table with one record of the model per row.

    All columns are nullable, because Delta can add only nullable columns to an existing table.

    Raises:
        TypeError: an annotation of the model has no Arrow type.
    """
    return pa.schema(_fields(model))


def arrow_type(annotation: object) -> pa.DataType:
    """Return the Arrow type of an annotation.

    It may be a scalar, a Literal of one type, a model, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]`` or Annotated.

    Raises:
        TypeError: the annotation has no Arrow type.
    """
    if get_origin(annotation) is Literal and len(kinds := set(map(type, get_args(annotation)))) == 1:
        (annotation,) = kinds
    if annotation in SCALARS:
        return SCALARS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return pa.struct(_fields(annotation))
    match get_origin(annotation), get_args(annotation):
        case kind, (inner, *_) if kind is Annotated:
            return arrow_type(inner)
        case kind, (inner, other) if kind in (Union, UnionType) and NoneType in (inner, other):
            return arrow_type(other if inner is NoneType else inner)
        case kind, (inner, end) if kind is tuple and end is Ellipsis:
            return pa.list_(arrow_type(inner))
        case kind, (key, inner) if kind is dict and key is str:
            return pa.map_(pa.string(), arrow_type(inner))
    raise TypeError(f"{annotation} has no Arrow type; use a type that schemas/marc_schemas/arrow.py lists")


def to_arrow(records: Sequence[BaseModel], model: type[BaseModel]) -> pa.Table:
    """Return a table with one row per record."""
    return pa.Table.from_pylist([record.model_dump() for record in records], schema=arrow_schema(model))


def from_arrow(table: pa.Table) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries for the model to validate; missing columns are left out."""
    rows: list[dict[str, Any]] = table.to_pylist(maps_as_pydicts="strict")
    return rows


def _fields(model: type[BaseModel]) -> list[pa.Field]:
    return [pa.field(name, arrow_type(field.annotation)) for name, field in model.model_fields.items()]

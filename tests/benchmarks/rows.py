"""Vectors as rows and files of the feature table, written as the encode stage writes them."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from marc_pipeline.storage import Storage
from marc_pipeline.table.write import write_bucket_file
from marc_schemas.feature_table import MANTISSA_BITS, file_schema
from marc_schemas.files import PublishedFile
from marc_schemas.identity import row_id

Matrix = NDArray[np.float32]
Ids = NDArray[np.int64]
PLAN_ID = "0" * 32
NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def unit(vectors: Matrix) -> Matrix:
    """Vectors [n, d] scaled to unit length."""
    scaled: Matrix = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def row_ids(ids: Sequence[str]) -> Ids:
    """The row id of every item [n]."""
    return np.fromiter(map(row_id, ids), np.int64, len(ids))


def feature_rows(
    ids: pa.Array,
    rows: pa.Array,
    vectors: Matrix,
    hashes: pa.Array,
    *,
    bundle: str,
    encoded_at: Sequence[datetime] = (),
) -> pa.Table:
    """Rows of the feature table; ``encoded_at`` is noon of one day unless given per row."""
    count, dim = vectors.shape
    schema = file_schema(dim)
    columns = {
        "item_id": ids,
        "row_id": rows,
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), type=schema.field("vector").type),
        "content_hash": hashes,
        "bundle": pa.repeat(bundle, count),
        "encoded_at": pa.array(encoded_at or [NOON] * count, schema.field("encoded_at").type),
    }
    return pa.table([columns[name] for name in schema.names], schema=schema)


def write_buckets(
    table_uri: str,
    ids: Sequence[str],
    vectors: Matrix,
    hashes: Sequence[str],
    *,
    buckets: int,
    ds: str,
    bundle: str,
    plan_id: str = PLAN_ID,
    encoded_at: Sequence[datetime] = (),
    mantissa_bits: int = MANTISSA_BITS,
) -> list[tuple[Ids, PublishedFile]]:
    """Write one file per bucket with items; returns the positions of its items [m] and the file."""
    names, numbers, written = np.array(ids, object), row_ids(ids), []
    for bucket in range(buckets):
        chosen = np.flatnonzero(numbers % buckets == bucket)
        chosen = chosen[np.argsort(names[chosen])]
        rows = feature_rows(
            pa.array(names[chosen], pa.string()),
            pa.array(numbers[chosen]),
            vectors[chosen],
            pa.array([hashes[place] for place in chosen]),
            bundle=bundle,
            encoded_at=[encoded_at[place] for place in chosen] if encoded_at else (),
        )
        file = write_bucket_file(
            Storage(),
            table_uri,
            [rows],
            dim=vectors.shape[1],
            ds=ds,
            bucket=bucket,
            plan_id=plan_id,
            footer={"marc.bundle": bundle},
            mantissa_bits=mantissa_bits,
        )
        if file:
            written.append((chosen, file))
    return written

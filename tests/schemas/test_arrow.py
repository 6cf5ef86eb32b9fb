"""Arrow schemas derived from models: the expected type of every column, and round trips through Arrow."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Optional

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel

from marc_schemas.arrow import arrow_schema, arrow_type, from_arrow, to_arrow
from marc_schemas.files import PublishedFile
from marc_schemas.moments import Moments
from marc_schemas.release import (
    RELEASES,
    AuditFigures,
    BundleFacts,
    Counts,
    IndexBuild,
    IndexFacts,
    IndexFigures,
    Release,
    TableFacts,
)
from marc_schemas.space import SpaceShape

FILE = "struct<path: string, bytes: int64, rows: int64, sha256: string, blocks: string>"
EXPECTED = {
    "format_version": "int64",
    "release_id": "string",
    "ds": "string",
    "turn": "int64",
    "withdrawn": "bool",
    "retired_at": "timestamp[us, tz=UTC]",
    "restores": "string",
    "created_at": "timestamp[us, tz=UTC]",
    "plan_id": "string",
    "supersedes": "string",
    "table": f"struct<uri: string, version: int64, files: list<item: {FILE}>, dim: int64, buckets: int64, "
    "template: string, mantissa_bits: int64, long_texts: string>",
    "index": f"struct<uri: string, files: list<item: {FILE}>, queries_file: {FILE}, factory: string, nprobe: int64, "
    "ef_search: int64, faiss: string, build: struct<items: int64, nprobe: int64, mean: list<item: double>, "
    "changed: int64, tombstones: int64>, k: int64, recall: double, recall_queries: int64, "
    "figures: struct<memory_bytes: int64, recall_low: double, recall_high: double, latency_ms: double, "
    "queries_per_second: double>>",
    "bundle": f"struct<version: string, uri: string, card_file: {FILE}>",
    "counts": "struct<items: int64, new: int64, changed: int64, reused: int64, deleted: int64, quarantined: int64, "
    "encoded: int64, tokens: int64, cut_texts: int64, lost_tokens: int64>",
    "moments": "struct<rows: int64, vector_sum: list<item: double>, square_sum: double>",
    "audit": "struct<quarantined_fraction: double, drift: double, "
    "space: struct<effective_rank: double, first_share: double, mean_cosine: double>>",
    "quarantine_uri": "string",
    "seconds": "map<string, double>",
    "tokens_per_second": "double",
}


def test_columns_of_the_release_log_have_these_types() -> None:
    assert {field.name: str(field.type) for field in RELEASES} == EXPECTED
    # Delta can add only nullable columns to the log of an older format.
    assert all(field.nullable for field in RELEASES)


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (str, pa.string()),
        (int, pa.int64()),
        (float, pa.float64()),
        (bool, pa.bool_()),
        (datetime, pa.timestamp("us", tz="UTC")),
        (int | None, pa.int64()),
        (None | int, pa.int64()),
        (Optional[str], pa.string()),  # noqa: UP045 - the other spelling of str | None
        (Annotated[str, AfterValidator(str.strip)], pa.string()),
        (tuple[float, ...], pa.list_(pa.float64())),
        (tuple[tuple[int, ...], ...], pa.list_(pa.list_(pa.int64()))),
        (dict[str, float], pa.map_(pa.string(), pa.float64())),
        (dict[str, int | None], pa.map_(pa.string(), pa.int64())),
        (SpaceShape, pa.struct([(name, pa.float64()) for name in ("effective_rank", "first_share", "mean_cosine")])),
        (Literal["cut", "pool"], pa.string()),
        (tuple[SpaceShape, ...] | None, pa.list_(arrow_type(SpaceShape))),
    ],
    ids=str,
)
def test_annotations_have_arrow_types(annotation: object, expected: pa.DataType) -> None:
    assert arrow_type(annotation) == expected


@pytest.mark.parametrize(
    "annotation",
    [bytes, object, Any, int | str, list[int], tuple[int, str], dict[int, str], set[str], None, Literal["a", 1]],
    ids=str,
)
def test_an_annotation_without_an_arrow_type_is_refused(annotation: object) -> None:
    with pytest.raises(TypeError, match="has no Arrow type"):
        arrow_type(annotation)


def test_a_model_with_a_field_without_an_arrow_type_is_refused() -> None:
    class Odd(BaseModel):
        inner: tuple[bytes, ...]

    with pytest.raises(TypeError, match=r"bytes.* has no Arrow type"):
        arrow_schema(Odd)


INTEGERS = st.integers(-(2**63), 2**63 - 1)
NUMBERS = st.floats(allow_nan=False)
TEXTS = st.text(max_size=20)
INSTANTS = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC))


def records(model: type[BaseModel], **given_fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Any valid record of a flat model; fields of other types are given."""
    known: dict[Any, st.SearchStrategy[Any]] = {
        str: TEXTS, int: INTEGERS, float: NUMBERS, bool: st.booleans(), datetime: INSTANTS,
        tuple[float, ...]: st.lists(NUMBERS, max_size=4).map(tuple),
    }  # fmt: skip
    known |= {Optional[kind]: st.none() | strategy for kind, strategy in known.items()}  # noqa: UP045 - of a value
    fields: dict[str, Any] = {name: known.get(field.annotation) for name, field in model.model_fields.items()}
    fields |= given_fields
    return st.builds(model, **fields)


FILES = records(PublishedFile, path=st.from_regex(r"[a-z=][a-z0-9=.]{0,9}(/[a-z0-9=]{1,9}){0,2}", fullmatch=True))
SEVERAL_FILES = st.lists(FILES, max_size=3).map(tuple)
RELEASES_OF_ANY_KIND = records(
    Release,
    table=records(TableFacts, files=SEVERAL_FILES, long_texts=st.sampled_from(["cut", "pool"])),
    index=records(
        IndexFacts, files=SEVERAL_FILES, queries_file=FILES, build=records(IndexBuild), figures=records(IndexFigures)
    ),
    bundle=records(BundleFacts, card_file=FILES),
    counts=records(Counts),
    moments=records(Moments),
    audit=records(AuditFigures, space=st.none() | records(SpaceShape)),
    seconds=st.dictionaries(TEXTS, NUMBERS, max_size=4),
)


@given(st.lists(RELEASES_OF_ANY_KIND, max_size=3))
def test_releases_read_back_from_arrow_as_they_were(releases: list[Release]) -> None:
    table = to_arrow(releases, Release)
    assert table.schema == RELEASES
    assert [Release.model_validate(row) for row in from_arrow(table)] == releases


def test_nested_maps_and_models_read_back() -> None:
    class Row(BaseModel):
        shares: dict[str, tuple[float, ...]]
        parts: tuple[Moments, ...] | None

    rows = [
        Row(shares={}, parts=None),
        Row(shares={"a": (), "b": (0.5, -1e300)}, parts=(Moments(rows=2, vector_sum=(1.0,), square_sum=3.0),)),
    ]
    assert [Row.model_validate(row) for row in from_arrow(to_arrow(rows, Row))] == rows

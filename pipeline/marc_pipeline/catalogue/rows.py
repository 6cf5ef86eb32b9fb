"""Rows of the catalogue: Spark reads them, validates ids and texts, and renders the template from any columns."""

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

import pyarrow as pa

from marc_pipeline.catalogue.cleaning import ODD_CHARACTERS, SENTENCE_END, SUSPICIOUS, UNCLEANED, text_cleaner
from marc_pipeline.catalogue.source import CatalogueSource, FileGroup
from marc_pipeline.catalogue.template import TemplateField, template_fields
from marc_pipeline.catalogue.text_records import TextFormat, batch_reader
from marc_pipeline.config import CatalogueSettings
from marc_pipeline.storage import Storage, is_s3, join
from marc_schemas.catalogue import Reason
from marc_schemas.identity import CONTENT_HASH_CHARS, ROW_ID_MASK

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

TASKS_PER_CORE = 8
BLANKS = (" ", r"\t", r"\n", r"\r")
BLANK = f"'{''.join(BLANKS)}'"
NEWEST_FIRST = "updated_at DESC NULLS LAST, content_hash DESC, source"
"""SQL order of the rows of one id; the first row counts."""
# Cut as bytes, because Spark counts the characters of a string.
CONTENT_HASH = f"CAST(substr(CAST(sha2(text, 256) AS BINARY), 1, {CONTENT_HASH_CHARS}) AS STRING)"
"""SQL of :func:`marc_schemas.identity.content_hash` of the column ``text``."""
BEFORE, JSON, MALFORMED, RECORD, SOURCE = "_before_", "_json_", "_malformed_", "_record_", "_source_"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def read_catalogue(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    """Return every row of the catalogue, usable or not, in one schema.

    Columns: ``item_id``, ``row_id``, ``text``, ``content_hash``, ``updated_at``, ``reason`` (null for a usable row,
    older duplicates included), ``row`` (JSON or the raw record of an unusable row), ``source`` (name of the file).
    """
    return _read(spark, source, catalogue, storage=storage).drop(BEFORE)


def read_uncleaned(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    """:func:`read_catalogue` for a caller that passes texts to :func:`cleaned_text` itself, which is faster.

    There is no ``content_hash``.
    """
    return _read_marked(spark, source, catalogue, storage=storage).drop(BEFORE)


@dataclass(frozen=True)
class SampledText:
    """The text of one row before and after cleaning; ``after`` is empty for a row that cleaning quarantines."""

    item_id: str
    before: str
    after: str


def sample_cleaned(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage, limit: int
) -> list[SampledText]:
    """Return at most ``limit`` texts before and after cleaning, changed texts first; a repeatable sample."""
    rows = _read(spark, source, catalogue, storage=storage).where(f"reason IS NULL OR {BEFORE} != ''")
    ordered = rows.selectExpr("item_id", BEFORE, "text", f"{BEFORE} = text AS same", f"sha2({BEFORE}, 256) AS place")
    found = ordered.orderBy("same", "place", "item_id").limit(limit).collect()
    return [SampledText(row.item_id, row[BEFORE], row.text) for row in found]


def _read(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    """Rows as of :func:`read_catalogue`, and the text before cleaning in the column ``_before_``."""
    rows = _read_marked(spark, source, catalogue, storage=storage)
    if catalogue.clean:
        from marc_pipeline.spark.columns import with_text  # noqa: PLC0415 - imports pyspark, which only a session needs

        marked = rows.withColumn("marked", rows.text.substr(1, 1) == UNCLEANED)
        marked = marked.selectExpr(
            "* EXCEPT (text)", "IF(marked, NULL, text) AS text", "IF(marked, text, NULL) AS given"
        )
        cleaned = with_text(marked, "cleaned", "given", text_cleaner(catalogue))
        record = "to_json(named_struct('item_id', item_id, 'fields', from_json(substr(given, 2), 'ARRAY<STRING>')))"
        rows = cleaned.selectExpr(
            *("item_id", "row_id", "coalesce(cleaned, text) AS text", "updated_at", "source", BEFORE),
            f"IF(cleaned = '', '{Reason.EMPTY_TEXT}', reason) AS reason",
            f"IF(cleaned = '', {record}, row) AS row",
        )
    return rows.selectExpr("*", f"{CONTENT_HASH} AS content_hash")


def _read_marked(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    frames = [_read_group(spark, group, catalogue, storage=storage) for group in source.groups]
    return reduce(lambda rows, frame: rows.unionByName(frame), frames)


def sample_texts(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage, limit: int
) -> list[str]:
    """Return at most ``limit`` distinct usable texts, a repeatable sample: those with the lowest hashes."""
    rows = read_catalogue(spark, source, catalogue, storage=storage)
    texts = rows.where("reason IS NULL").selectExpr("text", "content_hash").distinct().orderBy("content_hash")
    return [row.text for row in texts.limit(limit).collect()]


def read_items(
    spark: "SparkSession",
    source: CatalogueSource,
    catalogue: CatalogueSettings,
    *,
    storage: Storage,
    wanted: Sequence[str],
    sample: int,
) -> list[tuple[str, str]]:
    """Return item ids and texts, sorted by id: of the wanted items, and of a sample of the others.

    Wanted items that the catalogue lacks are left out. The sample takes the lowest content hashes, so that it is
    repeatable. The latest row of an id counts.
    """
    usable = read_catalogue(spark, source, catalogue, storage=storage).where("reason IS NULL")
    rank = f"row_number() OVER (PARTITION BY item_id ORDER BY {NEWEST_FIRST}) AS rank"
    latest = usable.selectExpr("item_id", "text", "content_hash", rank).where("rank = 1").drop("rank")
    ids = spark.createDataFrame(pa.table({"item_id": pa.array(wanted, pa.string())}))
    others = latest.join(ids, "item_id", "left_anti").orderBy("content_hash", "item_id").limit(sample)
    found = latest.join(ids, "item_id", "left_semi").unionAll(others).collect()
    return sorted((row.item_id, row.text) for row in found)


@dataclass(frozen=True)
class _Column:
    """A column of a file as Spark sees it: numbered, because no name from a catalogue may enter SQL.

    Attributes:
        sql: name in the frame.
        kind: kind of the values, see :class:`FileGroup`.
    """

    sql: str
    kind: str


def _numbered(columns: Mapping[str, str]) -> dict[str, _Column]:
    return {name: _Column(f"_{number}_", kind) for number, (name, kind) in enumerate(columns.items())}


def _read_group(
    spark: "SparkSession", group: FileGroup, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    from marc_pipeline.spark.columns import with_json  # noqa: PLC0415 - imports pyspark, which only a session needs

    if group.text is None:
        columns = _numbered(group.columns)
        frame = _parquet_frame(spark, group, columns, storage=storage)
    else:
        text = group.text
        if text.form == "jsonl":
            updated = [catalogue.updated_at_column] if catalogue.updated_at_column else []
            used = dict.fromkeys([catalogue.id_column, *catalogue.text_columns, *updated])
            text = replace(text, columns=tuple(used))
        columns = _numbered(dict.fromkeys(text.columns, "STRING"))
        frame = _text_frame(spark, group, text, columns, storage=storage)
    frame = with_json(frame, JSON, {name: column.sql for name, column in columns.items()})
    return _normalise(frame, columns, catalogue)


def _parquet_frame(
    spark: "SparkSession", group: FileGroup, columns: Mapping[str, _Column], *, storage: Storage
) -> "DataFrame":
    from marc_pipeline.spark.columns import with_source  # noqa: PLC0415 - imports pyspark, which only a session needs

    frame = spark.read.parquet(*_spark_paths(spark, [file.uri for file in group.files], storage))
    frame = with_source(frame, SOURCE).toDF(*(column.sql for column in columns.values()), SOURCE)
    # Spark percent-encodes the name.
    decoded = f"CASE WHEN contains({SOURCE}, '%') THEN url_decode(replace({SOURCE}, '+', '%2B')) ELSE {SOURCE} END"
    return frame.selectExpr(
        f"* EXCEPT ({SOURCE})",
        f"false AS {MALFORMED}",
        f"CAST(NULL AS STRING) AS {RECORD}",
        f"{decoded} AS {SOURCE}",
    )


def _text_frame(
    spark: "SparkSession", group: FileGroup, text: TextFormat, columns: Mapping[str, _Column], *, storage: Storage
) -> "DataFrame":
    pieces = [piece for file in group.files for piece in text.pieces(file.uri, file.bytes)]
    tasks = min(len(pieces), TASKS_PER_CORE * spark.sparkContext.defaultParallelism)
    names = [column.sql for column in columns.values()]
    schema = [f"{name} BINARY" for name in names]
    schema += [f"{MALFORMED} BOOLEAN", f"{RECORD} BINARY", f"{SOURCE} STRING"]
    read = batch_reader(text, pieces, storage)
    frame = spark.range(0, len(pieces), 1, tasks).mapInArrow(read, ", ".join(schema))
    # CSV has no nulls, so an empty field counts as null.
    value = "nullif(CAST({0} AS STRING), '') AS {0}" if text.form == "csv" else "CAST({0} AS STRING) AS {0}"
    values = [value.format(name) for name in names]
    return frame.selectExpr(*values, MALFORMED, f"CAST({RECORD} AS STRING) AS {RECORD}", SOURCE)


def _spark_paths(spark: "SparkSession", uris: Sequence[str], storage: Storage) -> list[str]:
    """Return paths that Spark can open.

    Executors of a cluster read s3:// through Hadoop's S3A. ``local[*]`` has no S3A jars, so the driver, which is the
    only machine, downloads the files first.
    """
    if not is_s3(uris[0]):
        return ["file://" + _literal_path(uri) for uri in uris]
    if not str(spark.sparkContext.master).startswith("local"):
        return [_literal_path(uri.replace("s3://", "s3a://", 1)) for uri in uris]
    folder = tempfile.mkdtemp(prefix="marc-catalogue-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    paths = []
    for number, uri in enumerate(uris):
        path = Path(join(folder, f"{number:05d}-{uri.rsplit('/', 1)[1]}"))
        storage.fetch(uri, path)
        paths.append(f"file://{_literal_path(str(path))}")
    return paths


def _literal_path(path: str) -> str:
    """Return a path with Hadoop's glob characters escaped."""
    return re.sub(r"([{}\[\]*?\\])", r"\\\1", path)


def _normalise(frame: "DataFrame", columns: Mapping[str, _Column], catalogue: CatalogueSettings) -> "DataFrame":
    item_id = _as_text(columns[catalogue.id_column])
    texts = {name: _as_text(columns[name]) for name in catalogue.text_columns}
    updated = columns[catalogue.updated_at_column] if catalogue.updated_at_column else None
    checked = [item_id, *texts.values()]
    undecodable = " OR ".join(f"NOT is_valid_utf8({x}) OR contains({x}, '{REPLACEMENT}')" for x in checked)
    has_text = " OR ".join(map(_has_text, texts.values()))
    reason = f"""CASE WHEN {MALFORMED} AND NOT is_valid_utf8({RECORD}) THEN '{Reason.UNDECODABLE}'
        WHEN {MALFORMED} THEN '{Reason.MALFORMED}'
        WHEN coalesce({undecodable}, false) THEN '{Reason.UNDECODABLE}'
        WHEN NOT coalesce({_has_text(item_id)}, false) THEN '{Reason.NULL_ID}'
        WHEN NOT coalesce({has_text}, false) THEN '{Reason.EMPTY_TEXT}' END"""
    places = {name: f"_field_{place}_" for place, name in enumerate(texts)}
    frame = frame.selectExpr(
        f"{item_id} AS item_id",
        f"{_updated_at(updated)} AS updated_at",
        f"{reason} AS reason",
        f"coalesce({RECORD}, {JSON}) AS raw",
        f"{SOURCE} AS source",
        *(f"coalesce({texts[name]}, '') AS {place}" for name, place in places.items()),
    )
    frame = _cleanable(frame, catalogue, places) if catalogue.clean else _plain(frame, catalogue.template, places)
    return frame.selectExpr(
        "CASE WHEN reason IS NULL OR is_valid_utf8(item_id) THEN item_id END AS item_id",
        f"xxhash64(item_id) & {ROW_ID_MASK}L AS row_id",
        "CASE WHEN reason IS NULL THEN text ELSE '' END AS text",
        "updated_at",
        "reason",
        "CASE WHEN reason IS NOT NULL THEN make_valid_utf8(raw) END AS row",
        "source",
        BEFORE,
    )


def _plain(frame: "DataFrame", template: str, places: Mapping[str, str]) -> "DataFrame":
    """Add the column ``text``, and the same text as ``before``."""
    frame = frame.selectExpr("*", f"{_rendered(template, places)} AS rendered")
    return frame.selectExpr("*", f"{_trimmed('rendered')} AS text").selectExpr("*", f"text AS {BEFORE}")


def _cleanable(frame: "DataFrame", catalogue: CatalogueSettings, places: Mapping[str, str]) -> "DataFrame":
    """Add the column ``text``, in which rows that cleaning may change are marked, and the text ``before``."""
    fields = [places[field.column] for field in template_fields(catalogue.template)]
    carried = ("item_id", "updated_at", "reason", "raw", "source")
    before = f"{_rendered(catalogue.template, places)} AS rendered"
    frame = frame.selectExpr(*carried, before, *(f"{_trimmed(place)} AS {place}" for place in places.values()))
    # A column of its own, because Spark would compute it again for every test.
    frame = frame.selectExpr("*", f"concat_ws('|', {', '.join(places.values())}) AS fields")
    joined, changes = _joined(template_fields(catalogue.template), fields), _may_change(fields, catalogue.boilerplate)
    marked = f"concat({_literal(UNCLEANED)}, to_json(array({', '.join(fields)})))"
    return frame.selectExpr(
        *carried,
        f"CASE WHEN reason IS NULL AND ({changes}) THEN {marked} ELSE {joined} END AS text",
        f"CASE WHEN reason IS NULL THEN {_trimmed('rendered')} ELSE '' END AS {BEFORE}",
    )


def _may_change(fields: Sequence[str], boilerplate: Sequence[str]) -> str:
    """SQL that is true for every row whose fields :func:`clean_fields` changes, and for few others.

    The column ``fields`` has all fields of a row. Regular expressions would take most of the time of a plan, so that
    cheap tests choose the rows that need one.
    """
    tests = [f"fields RLIKE r'{SUSPICIOUS}'", *(f"contains(fields, {_literal(text)})" for text in ("  ", *boilerplate))]
    tests.append(f"(length(fields) != octet_length(fields) AND fields RLIKE r'{ODD_CHARACTERS}')")
    ends = [f"contains(fields, '{mark} ')" for mark in ".!?"]
    firsts = [f"lower(left({field}, 1))" for field in fields]
    ends += [f"({one} = {other} AND {one} != '')" for one, other in combinations(firsts, 2)]
    present = ", ".join(f"nullif({field}, '')" for field in fields)
    sentences = f"split(lower(concat_ws('. ', {present})), r'{SENTENCE_END}')"
    several = " OR ".join(ends)
    return " OR ".join([*tests, f"(({several}) AND size({sentences}) > size(array_distinct({sentences})))"])


def _joined(template: Sequence[TemplateField], fields: Sequence[str]) -> str:
    """SQL of :func:`join_fields`."""
    pieces = []
    for number, (field, value) in enumerate(zip(template, fields, strict=True)):
        earlier = " OR ".join(f"{name} != ''" for name in fields[:number])
        separator = [f"CASE WHEN {earlier} THEN {_literal(field.separator)} ELSE '' END"] if earlier else []
        piece = ", ".join([*separator, _literal(field.prefix), value, _literal(field.suffix)])
        pieces.append(f"CASE WHEN {value} != '' THEN concat({piece}) ELSE '' END")
    return f"concat({', '.join(pieces)})"


def _as_text(column: _Column) -> str:
    value = column.sql
    if column.kind == "ARRAY<STRING>":
        return f"array_join(CAST({value} AS ARRAY<STRING>), ', ')"
    if column.kind == "NANOSECONDS":
        value = f"timestamp_micros({value} DIV 1000)"
    return f"CAST({value} AS STRING)"


def _rendered(template: str, texts: Mapping[str, str]) -> str:
    """SQL of the template with every column, empty or not."""
    pieces = []
    for literal, name, _, _ in Formatter().parse(template):
        if literal:
            pieces.append(_literal(literal))
        if name is not None:
            pieces.append(texts[name])
    return f"concat({', '.join(pieces)})"


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _has_text(text: str) -> str:
    """SQL that is true for a text with more than blanks. The quick comparison with ``!`` decides for most texts."""
    return f"({text} > '!' OR trim(LEADING {BLANK} FROM {text}) != '')"


def _trimmed(column: str) -> str:
    """SQL that trims blanks. Spark's ``btrim`` is slow, and few texts need it, so cheap tests come first."""
    blank_end = " OR ".join(f"endswith({column}, '{blank}')" for blank in BLANKS)
    return f"CASE WHEN {column} > '!' AND NOT ({blank_end}) THEN {column} ELSE btrim({column}, {BLANK}) END"


def _updated_at(column: _Column | None) -> str:
    if column is None:
        return "CAST(NULL AS TIMESTAMP)"
    if column.kind == "TIMESTAMP":
        return f"CAST({column.sql} AS TIMESTAMP)"
    if column.kind == "NANOSECONDS":
        return f"timestamp_micros({column.sql} DIV 1000)"
    epoch = _epoch(f"try_cast({column.sql} AS DECIMAL(38, 6))")
    if column.kind == "NUMBER":
        return epoch
    # Nine or more digits count from 1970; Spark would parse them as a year.
    return f"CASE WHEN {column.sql} RLIKE '^[0-9]{{9,}}' THEN {epoch} ELSE try_cast({column.sql} AS TIMESTAMP) END"


def _epoch(number: str) -> str:
    """SQL for seconds, milli-, micro- or nanoseconds since 1970. Size tells them apart: 1e11 seconds is year 5138."""
    micros = f"""CASE WHEN abs({number}) < 1e11BD THEN {number} * 1000000
        WHEN abs({number}) < 1e14BD THEN {number} * 1000
        WHEN abs({number}) < 1e17BD THEN {number} ELSE {number} / 1000 END"""
    return f"timestamp_micros(try_cast({micros} AS BIGINT))"

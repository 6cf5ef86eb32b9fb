"""The day's catalogue: which files it is, and how Spark reads them into rows of one shape."""

import atexit
import fnmatch
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.catalogue.text_records import (
    MALFORMED,
    RECORD,
    SOURCE,
    TextFormat,
    batch_reader,
    find_format,
    refuse_doubled,
)
from marc_pipeline.config import CatalogueSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, StoredObject, is_s3, join
from marc_schemas.catalogue import Reason
from marc_schemas.identity import CONTENT_HASH_CHARS, ROW_ID_MASK
from marc_schemas.plan import SourceFile

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

Format = Literal["parquet", "csv", "jsonl"]
ENDINGS: Mapping[str, Format] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl",
}
UPDATED_AT_TYPES = ("TIMESTAMP", "NANOSECONDS", "NUMBER", "STRING")
TASKS_PER_CORE = 8
BLANKS = (" ", r"\t", r"\n", r"\r")
BLANK = f"'{''.join(BLANKS)}'"
NEWEST_FIRST = "updated_at DESC NULLS LAST, content_hash DESC, source"
"""Which of several rows of one id counts."""
# Cut as bytes: of a string Spark counts the characters.
CONTENT_HASH = f"CAST(substr(CAST(sha2(text, 256) AS BINARY), 1, {CONTENT_HASH_CHARS}) AS STRING)"
"""SQL of :func:`marc_schemas.identity.content_hash` of the column ``text``."""
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class FileGroup:
    """Files that share one set of columns.

    Attributes:
        columns: each name with its Spark SQL type.
        files: the files.
        text: how CSV or JSON lines are read; None for Parquet.
    """

    columns: Mapping[str, str]
    files: tuple[SourceFile, ...]
    text: TextFormat | None = None


@dataclass(frozen=True)
class CatalogueSource:
    """The files of one day's catalogue, with digests of their content, in groups that are read together."""

    uri: str
    format: Format
    files: tuple[SourceFile, ...]
    groups: tuple[FileGroup, ...]


def find_source(catalogue: CatalogueSettings, uri: str, *, ds: str, storage: Storage) -> CatalogueSource:
    """Files of the catalogue at ``uri``: a file, a folder or a glob. Needs no Spark, so that mistakes show at once.

    Raises:
        UserError: nothing is there, the format cannot be told, a column is missing or cannot become text.
    """
    found = matching_files(uri, storage)
    if not found:
        raise UserError(f"no catalogue for {ds}: nothing at {uri}")
    form = _format(catalogue.format, found)
    files = tuple(SourceFile(uri=o.uri, bytes=o.bytes, digest=storage.content_digest(o)) for o in found)
    groups = _groups(uri, form, files, storage)
    for group in groups:
        _require_columns(group, catalogue)
    return CatalogueSource(uri=uri, format=form, files=files, groups=groups)


def require_unchanged(source: CatalogueSource, *, storage: Storage) -> None:
    """Refuse a catalogue whose files are no longer those that were found: to be asked after they were read.

    Raises:
        UserError: a file has other content than before, is gone, or came in between.
    """
    known = {file.uri for file in source.files}
    if late := [stored.uri for stored in matching_files(source.uri, storage) if stored.uri not in known]:
        raise UserError(f"{late[0]} came while the catalogue was read; run again when the catalogue is complete")
    for file in source.files:
        stored = storage.stat(file.uri)
        with suppress(FileNotFoundError):
            if stored and storage.content_digest(stored) == file.digest:
                continue
        raise UserError(
            f"{file.uri} was replaced or removed while it was read; run again when the catalogue is complete"
        )


def matching_files(uri: str, storage: Storage) -> list[StoredObject]:
    """The files that a file, folder or glob uri means."""
    if any(character in uri for character in "*?["):
        folder = uri[: min(uri.index(c) for c in "*?[" if c in uri)].rpartition("/")[0]
        return [o for o in storage.list(folder) if _matches(o.uri, uri)]
    single = storage.stat(uri)
    return [single] if single else storage.list(uri)


def _matches(uri: str, pattern: str) -> bool:
    # Folder by folder: fnmatch alone lets * cross slashes.
    parts, wanted = uri.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _format(wanted: str, found: Sequence[StoredObject]) -> Format:
    for form in ("parquet", "csv", "jsonl"):
        if wanted == form:
            return form
    forms = {next((f for end, f in ENDINGS.items() if o.uri.lower().endswith(end)), None) for o in found}
    if len(forms) == 1 and (form_found := forms.pop()):
        return form_found
    raise UserError(f"cannot tell the format of {found[0].uri}; set catalogue.format to parquet, csv or jsonl")


def read_rows(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    """Every row of the catalogue in one shape, good or not.

    Columns: ``item_id``, ``row_id``, ``text``, ``content_hash``, ``updated_at``, ``reason`` (null for a good
    row; older duplicates are not yet known), ``row`` (JSON or the raw record, only where there is a reason),
    ``source`` (name of the file).
    """
    frames = [_read_group(spark, group, catalogue, storage=storage) for group in source.groups]
    rows = frames[0]
    for frame in frames[1:]:
        rows = rows.unionByName(frame)
    return rows


def _groups(uri: str, form: Format, files: Sequence[SourceFile], storage: Storage) -> tuple[FileGroup, ...]:
    groups: dict[str, FileGroup] = {}
    for file in files:
        if file.bytes == 0:
            continue
        group, signature = _group(form, file, storage)
        found = groups.setdefault(signature, replace(group, files=()))
        groups[signature] = replace(found, files=(*found.files, file))
    if not groups:
        raise UserError(f"the catalogue at {uri} is empty: every file has 0 bytes")
    return tuple(groups.values())


def _group(form: Format, file: SourceFile, storage: Storage) -> tuple[FileGroup, str]:
    """A file on its own as a group, and a signature: files of one signature are read together."""
    if form == "parquet":
        filesystem, path = storage.filesystem(file.uri)
        try:
            schema = pq.read_schema(path, filesystem=filesystem).remove_metadata()
        except pa.ArrowInvalid as error:
            raise UserError(f"{file.uri} is no Parquet file: {error}") from None
        refuse_doubled(schema.names, file.uri)
        return FileGroup({field.name: _sql_type(field.type) for field in schema}, (file,)), str(schema)
    text = find_format(form, file.uri, storage)
    # JSON names its fields: their order does not matter there.
    signature = f"{text.line_end!r} {text.columns if form == 'csv' else sorted(text.columns)}"
    return FileGroup(dict.fromkeys(text.columns, "STRING"), (file,), text), signature


def _sql_type(arrow: pa.DataType) -> str:
    """What the reader needs to know of an Arrow type: how Spark sees it, and how it becomes text or a time."""
    types = pa.types
    if types.is_list(arrow) or types.is_large_list(arrow) or types.is_fixed_size_list(arrow):
        return "STRUCT" if types.is_nested(arrow.value_type) else "ARRAY<STRING>"
    kinds = {
        "STRUCT": types.is_nested(arrow),
        "NANOSECONDS": types.is_timestamp(arrow) and arrow.unit == "ns",
        "TIMESTAMP": types.is_timestamp(arrow) or types.is_date(arrow),
        "UNSUPPORTED": types.is_float16(arrow) or types.is_time(arrow) or types.is_duration(arrow),
        "NUMBER": types.is_integer(arrow) or types.is_floating(arrow) or types.is_decimal(arrow),
        "OTHER": types.is_boolean(arrow) or types.is_null(arrow) or _is_binary(arrow),
    }
    return next((kind for kind, is_it in kinds.items() if is_it), "STRING")


def _is_binary(arrow: pa.DataType) -> bool:
    return any(
        is_kind(arrow) for is_kind in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    )


def _require_columns(group: FileGroup, catalogue: CatalogueSettings) -> None:
    wanted = {"catalogue.id_column": [catalogue.id_column], "catalogue.template": catalogue.text_columns}
    if catalogue.updated_at_column:
        wanted["catalogue.updated_at_column"] = [catalogue.updated_at_column]
    uri = group.files[0].uri
    for key, names in wanted.items():
        for name in names:
            if name not in group.columns:
                have = ", ".join(n if n.isprintable() else ascii(n) for n in group.columns) or "no columns"
                raise UserError(f"{key} names column {name!r}, which {uri} does not have (it has: {have})")
            if group.columns[name] == "STRUCT":
                raise UserError(f"{key} names column {name!r} of {uri}, which is nested: it cannot be text")
            if group.columns[name] == "UNSUPPORTED":
                raise UserError(f"{key} names column {name!r} of {uri}: Spark cannot read its type")
    updated = catalogue.updated_at_column
    if updated and group.columns[updated] not in UPDATED_AT_TYPES:
        raise UserError(f"catalogue.updated_at_column names column {updated!r} of {uri}, which is no time")


def _read_group(
    spark: "SparkSession", group: FileGroup, catalogue: CatalogueSettings, *, storage: Storage
) -> "DataFrame":
    if group.text is None:
        frame = spark.read.parquet(*_spark_paths(spark, [file.uri for file in group.files], storage))
        # Spark percent-encodes the name.
        name = "_metadata.file_name"
        decoded = f"CASE WHEN contains({name}, '%') THEN url_decode(replace({name}, '+', '%2B')) ELSE {name} END"
        source = f"{decoded} AS {SOURCE}"
        frame = frame.selectExpr("*", f"false AS {MALFORMED}", f"CAST(NULL AS STRING) AS {RECORD}", source)
        return _normalise(frame, group.columns, catalogue)
    text = group.text
    if text.form == "jsonl":
        text = replace(text, columns=tuple(_used_columns(catalogue)))
    pieces = [piece for file in group.files for piece in text.pieces(file.uri, file.bytes)]
    tasks = min(len(pieces), TASKS_PER_CORE * spark.sparkContext.defaultParallelism)
    names = [_quoted(name) for name in text.columns]
    schema = [f"{name} BINARY" for name in names]
    schema += [f"{MALFORMED} BOOLEAN", f"{RECORD} BINARY", f"{SOURCE} STRING"]
    read = batch_reader(text, pieces, storage)
    frame = spark.range(0, len(pieces), 1, tasks).mapInArrow(read, ", ".join(schema))
    # In CSV an empty text cannot be told from one that is not there.
    value = "nullif(CAST({0} AS STRING), '') AS {0}" if text.form == "csv" else "CAST({0} AS STRING) AS {0}"
    values = [value.format(name) for name in names]
    frame = frame.selectExpr(*values, MALFORMED, f"CAST({RECORD} AS STRING) AS {RECORD}", SOURCE)
    return _normalise(frame, dict.fromkeys(text.columns, "STRING"), catalogue)


def _normalise(frame: "DataFrame", columns: Mapping[str, str], catalogue: CatalogueSettings) -> "DataFrame":
    item_id = _as_text(catalogue.id_column, columns)
    texts = {name: _as_text(name, columns) for name in catalogue.text_columns}
    checked = [item_id, *texts.values()]
    undecodable = " OR ".join(f"NOT is_valid_utf8({x}) OR contains({x}, '{REPLACEMENT}')" for x in checked)
    has_text = " OR ".join(map(_has_text, texts.values()))
    reason = f"""CASE WHEN {MALFORMED} AND NOT is_valid_utf8({RECORD}) THEN '{Reason.UNDECODABLE}'
        WHEN {MALFORMED} THEN '{Reason.MALFORMED}'
        WHEN coalesce({undecodable}, false) THEN '{Reason.UNDECODABLE}'
        WHEN NOT coalesce({_has_text(item_id)}, false) THEN '{Reason.NULL_ID}'
        WHEN NOT coalesce({has_text}, false) THEN '{Reason.EMPTY_TEXT}' END"""
    as_json = f"to_json(struct({', '.join(_quoted(name) for name in columns)}))"
    return (
        frame.selectExpr(
            f"{item_id} AS item_id",
            f"{_rendered(catalogue.template, texts)} AS text",
            f"{_updated_at(catalogue.updated_at_column, columns)} AS updated_at",
            f"{reason} AS reason",
            f"coalesce({RECORD}, {as_json}) AS raw",
            f"{SOURCE} AS source",
        )
        .selectExpr("item_id", f"{_trimmed('text')} AS text", "updated_at", "reason", "raw", "source")
        .selectExpr(
            "CASE WHEN reason IS NULL OR is_valid_utf8(item_id) THEN item_id END AS item_id",
            f"xxhash64(item_id) & {ROW_ID_MASK}L AS row_id",
            "CASE WHEN reason IS NULL THEN text ELSE '' END AS text",
            f"{CONTENT_HASH} AS content_hash",
            "updated_at",
            "reason",
            "CASE WHEN reason IS NOT NULL THEN make_valid_utf8(raw) END AS row",
            "source",
        )
    )


def _used_columns(catalogue: CatalogueSettings) -> Iterable[str]:
    updated = [catalogue.updated_at_column] if catalogue.updated_at_column else []
    return dict.fromkeys([catalogue.id_column, *catalogue.text_columns, *updated])


def _as_text(name: str, columns: Mapping[str, str]) -> str:
    column = _quoted(name)
    if columns[name] == "ARRAY<STRING>":
        return f"array_join(CAST({column} AS ARRAY<STRING>), ', ')"
    if columns[name] == "NANOSECONDS":
        column = f"timestamp_micros({column} DIV 1000)"
    return f"CAST({column} AS STRING)"


def _rendered(template: str, texts: Mapping[str, str]) -> str:
    pieces = []
    for literal, name, _, _ in Formatter().parse(template):
        if literal:
            pieces.append(_literal(literal))
        if name is not None:
            pieces.append(f"coalesce({texts[name]}, '')")
    return f"concat({', '.join(pieces)})"


def _has_text(text: str) -> str:
    """Whether a text is more than blanks; most begin with a character that sorts behind all of them."""
    return f"({text} > '!' OR trim(LEADING {BLANK} FROM {text}) != '')"


def _trimmed(column: str) -> str:
    """A text without blanks around it; few have any, and looking for them from the right takes Spark long."""
    blank_end = " OR ".join(f"endswith({column}, '{blank}')" for blank in BLANKS)
    return f"CASE WHEN {column} > '!' AND NOT ({blank_end}) THEN {column} ELSE btrim({column}, {BLANK}) END"


def _updated_at(name: str | None, columns: Mapping[str, str]) -> str:
    if name is None:
        return "CAST(NULL AS TIMESTAMP)"
    column = _quoted(name)
    if columns[name] == "TIMESTAMP":
        return f"CAST({column} AS TIMESTAMP)"
    if columns[name] == "NANOSECONDS":
        return f"timestamp_micros({column} DIV 1000)"
    epoch = _epoch(f"try_cast({column} AS DECIMAL(38, 6))")
    if columns[name] == "NUMBER":
        return epoch
    # Long runs of digits count from 1970; Spark would take them for years.
    return f"CASE WHEN {column} RLIKE '^[0-9]{{9,}}' THEN {epoch} ELSE try_cast({column} AS TIMESTAMP) END"


def _epoch(number: str) -> str:
    """Seconds, milli-, micro- or nanoseconds since 1970, told apart by size: seconds reach 1e11 in the year 5138."""
    micros = f"""CASE WHEN abs({number}) < 1e11BD THEN {number} * 1000000
        WHEN abs({number}) < 1e14BD THEN {number} * 1000
        WHEN abs({number}) < 1e17BD THEN {number} ELSE {number} / 1000 END"""
    return f"timestamp_micros(try_cast({micros} AS BIGINT))"


def _quoted(name: str) -> str:
    return "`" + name.replace("`", "``") + "`"


def _literal(text: str) -> str:
    return f"'{_inside_quotes(text)}'"


def _inside_quotes(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")


def _spark_paths(spark: "SparkSession", uris: Sequence[str], storage: Storage) -> list[str]:
    """Paths that Spark itself can open.

    Executors of a cluster read s3:// through Hadoop's S3A, whose jars the cluster brings. ``local[*]`` has no
    such jars: there the driver, which is the only machine, copies the day's files first.
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
    """A path as Hadoop takes it: not percent-encoded, glob characters escaped."""
    return re.sub(r"([{}\[\]*?\\])", r"\\\1", path)


def sample_texts(
    spark: "SparkSession", source: CatalogueSource, catalogue: CatalogueSettings, *, storage: Storage, limit: int
) -> list[str]:
    """Distinct usable texts of a catalogue, a sample by hash beyond ``limit``: the same catalogue, the same texts."""
    rows = read_rows(spark, source, catalogue, storage=storage)
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
    """Item ids and texts of the wanted items that there are, and of a sample of the others, in the order of the ids.

    The sample goes by content hash: the same catalogue, the same items. Of several rows of an id the latest counts.
    """
    usable = read_rows(spark, source, catalogue, storage=storage).where("reason IS NULL")
    place = f"row_number() OVER (PARTITION BY item_id ORDER BY {NEWEST_FIRST}) AS place"
    latest = usable.selectExpr("item_id", "text", "content_hash", place).where("place = 1").drop("place")
    names = spark.createDataFrame(pa.table({"item_id": pa.array(wanted, pa.string())}))
    others = latest.join(names, "item_id", "left_anti").orderBy("content_hash", "item_id").limit(sample)
    found = latest.join(names, "item_id", "left_semi").unionAll(others).collect()
    return sorted((row.item_id, row.text) for row in found)

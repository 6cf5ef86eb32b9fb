"""Files of the day's catalogue: find them, tell their format and columns, and refuse unusable columns."""

import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from marc_pipeline.catalogue.text_records import TextFormat, find_format, refuse_doubled
from marc_pipeline.config import CatalogueSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage, StoredObject
from marc_schemas.plan import SourceFile

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


@dataclass(frozen=True)
class FileGroup:
    """Files with the same columns, which Spark reads together.

    Attributes:
        columns: kind of each column by name, see :func:`_column_kind`.
        files: the files.
        text: format of CSV or JSON lines; None for Parquet.
    """

    columns: Mapping[str, str]
    files: tuple[SourceFile, ...]
    text: TextFormat | None = None


@dataclass(frozen=True)
class CatalogueSource:
    """The files of one day's catalogue with digests of their content."""

    uri: str
    format: Format
    files: tuple[SourceFile, ...]
    groups: tuple[FileGroup, ...]


def find_source(catalogue: CatalogueSettings, uri: str, *, ds: str, storage: Storage) -> CatalogueSource:
    """Find the files of the catalogue at ``uri``, which is a file, a folder or a glob. Spark is not needed.

    Raises:
        UserError: no file matches, the format is unclear, or a column is missing or cannot become text.
    """
    found = matching_files(uri, storage)
    if not found:
        raise UserError(f"no catalogue for {ds}: no file matches {uri}")
    form = _format(catalogue.format, found)
    files = tuple(SourceFile(uri=o.uri, bytes=o.bytes, digest=storage.content_digest(o)) for o in found)
    groups = _groups(uri, form, files, storage)
    for group in groups:
        _require_columns(group, catalogue)
    return CatalogueSource(uri=uri, format=form, files=files, groups=groups)


def require_unchanged(source: CatalogueSource, *, storage: Storage) -> None:
    """Refuse a catalogue whose files changed since they were found. Call this after reading them.

    Raises:
        UserError: a file was added, replaced or removed.
    """
    known = {file.uri for file in source.files}
    if late := [stored.uri for stored in matching_files(source.uri, storage) if stored.uri not in known]:
        raise UserError(f"{late[0]} was added while the catalogue was read; run again when the catalogue is complete")
    for file in source.files:
        stored = storage.stat(file.uri)
        with suppress(FileNotFoundError):
            if stored and storage.content_digest(stored) == file.digest:
                continue
        raise UserError(
            f"{file.uri} was replaced or removed while it was read; run again when the catalogue is complete"
        )


def matching_files(uri: str, storage: Storage) -> list[StoredObject]:
    """Return the files that a file, folder or glob uri matches."""
    if any(character in uri for character in "*?["):
        folder = uri[: min(uri.index(c) for c in "*?[" if c in uri)].rpartition("/")[0]
        return [o for o in storage.list(folder) if _matches(o.uri, uri)]
    single = storage.stat(uri)
    return [single] if single else storage.list(uri)


def _matches(uri: str, pattern: str) -> bool:
    # Compare folder by folder, because * of fnmatch also matches slashes.
    parts, patterns = uri.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _format(wanted: str, found: Sequence[StoredObject]) -> Format:
    for form in ("parquet", "csv", "jsonl"):
        if wanted == form:
            return form
    forms = {next((f for end, f in ENDINGS.items() if o.uri.lower().endswith(end)), None) for o in found}
    if len(forms) == 1 and (form_found := forms.pop()):
        return form_found
    raise UserError(f"cannot tell the format of {found[0].uri}; set catalogue.format to parquet, csv or jsonl")


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
    """Return a group of one file, and its signature. Files with the same signature are read together."""
    if form == "parquet":
        filesystem, path = storage.filesystem(file.uri)
        try:
            schema = pq.read_schema(path, filesystem=filesystem).remove_metadata()
        except pa.ArrowInvalid as error:
            raise UserError(f"{file.uri} is not a Parquet file: {error}") from None
        refuse_doubled(schema.names, file.uri)
        return FileGroup({field.name: _column_kind(field.type) for field in schema}, (file,)), str(schema)
    text = find_format(form, file.uri, storage)
    # JSON names its fields, so their order does not matter.
    signature = f"{text.line_end!r} {text.columns if form == 'csv' else sorted(text.columns)}"
    return FileGroup(dict.fromkeys(text.columns, "STRING"), (file,), text), signature


def _column_kind(arrow: pa.DataType) -> str:
    """Return how a column of an Arrow type becomes a text or a time."""
    types = pa.types
    is_binary = types.is_binary(arrow) or types.is_large_binary(arrow) or types.is_fixed_size_binary(arrow)
    if types.is_list(arrow) or types.is_large_list(arrow) or types.is_fixed_size_list(arrow):
        return "STRUCT" if types.is_nested(arrow.value_type) else "ARRAY<STRING>"
    kinds = {
        "STRUCT": types.is_nested(arrow),
        "NANOSECONDS": types.is_timestamp(arrow) and arrow.unit == "ns",
        "TIMESTAMP": types.is_timestamp(arrow) or types.is_date(arrow),
        "UNSUPPORTED": types.is_float16(arrow) or types.is_time(arrow) or types.is_duration(arrow),
        "NUMBER": types.is_integer(arrow) or types.is_floating(arrow) or types.is_decimal(arrow),
        "OTHER": types.is_boolean(arrow) or types.is_null(arrow) or is_binary,
    }
    return next((kind for kind, matches in kinds.items() if matches), "STRING")


def _require_columns(group: FileGroup, catalogue: CatalogueSettings) -> None:
    uri, updated = group.files[0].uri, catalogue.updated_at_column
    required = [("id_column", catalogue.id_column), *(("template", name) for name in catalogue.text_columns)]
    required += [("updated_at_column", updated)] if updated else []
    for key, name in required:
        if name not in group.columns:
            have = ", ".join(n if n.isprintable() else ascii(n) for n in group.columns) or "no columns"
            raise UserError(f"catalogue.{key} names column {name!r}, which {uri} does not have (it has: {have})")
        if group.columns[name] == "STRUCT":
            raise UserError(f"catalogue.{key} names column {name!r} of {uri}, which is nested: it cannot be text")
        if group.columns[name] == "UNSUPPORTED":
            raise UserError(f"catalogue.{key} names column {name!r} of {uri}: Spark cannot read its type")
    if updated and group.columns[updated] not in UPDATED_AT_TYPES:
        raise UserError(f"catalogue.updated_at_column names column {updated!r} of {uri}, which is not a time")

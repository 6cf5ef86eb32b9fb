"""Verification of a published release: files, checksums, rows, bundle and index."""

from collections.abc import Iterator

import numpy as np

from marc_pipeline.errors import PipelineError
from marc_pipeline.model.bundle import check_bundle, open_bundle
from marc_pipeline.reader.release import OpenRelease
from marc_pipeline.storage import Storage
from marc_pipeline.storage.checksums import check_file
from marc_pipeline.table.rows import read_rows
from marc_schemas.release import Release


def verify(storage: Storage, release: Release, *, table_uri: str) -> list[str]:
    """The problems of a release, one sentence each with the file's name; empty if the release is intact."""
    problems = list(_file_problems(storage, release, table_uri))
    if not problems:
        problems += _content_problems(storage, release, table_uri)
    return problems


def _file_problems(storage: Storage, release: Release, table_uri: str) -> Iterator[str]:
    for file in release.table.files:
        if problem := check_file(storage, table_uri, file):
            yield problem
    for file in release.index.all_files:
        if problem := check_file(storage, release.index.uri, file):
            yield problem
    expected = release.bundle
    if problem := check_file(storage, expected.uri, expected.card_file):
        yield problem
        return
    try:
        bundle = open_bundle(storage, expected.uri)
        if bundle.version != expected.version:
            yield f"{expected.uri} is bundle {bundle.version}, the release needs {expected.version}"
        yield from check_bundle(storage, bundle)
    except PipelineError as error:
        yield str(error)


def _content_problems(storage: Storage, release: Release, table_uri: str) -> Iterator[str]:
    rows, row_ids = 0, []
    for file in release.table.files:
        table = read_rows(storage, table_uri, file, columns=["row_id", "bundle"])
        rows += table.num_rows
        row_ids.append(table["row_id"].to_numpy())
        if table.num_rows != file.rows:
            yield f"{file.path} has {table.num_rows:,} rows, the release lists {file.rows:,}"
        if table["bundle"].unique().to_pylist() != [release.bundle.version]:
            yield f"{file.path} has vectors of a bundle other than {release.bundle.version}"
    if rows != release.counts.items:
        yield f"the table has {rows:,} rows, the release lists {release.counts.items:,} items"
    in_table = np.concatenate(row_ids)
    with OpenRelease(release, uri=table_uri, storage=storage) as opened:
        in_index = opened.index_row_ids()
    extra, missing = np.setdiff1d(in_index, in_table).size, np.setdiff1d(in_table, in_index).size
    if extra or missing:
        yield f"the index has {extra:,} ids that are not in the table, and {missing:,} ids of the table are missing"
    for place, ids in (("index", in_index), ("table", in_table)):
        duplicates = ids.size - np.unique(ids).size
        if duplicates:
            yield f"the {place} has {duplicates:,} duplicate ids"

"""Release logs of other formats: older ones are migrated, unreadable ones are refused."""

from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake

from marc_pipeline.errors import UserError
from marc_pipeline.releases import log as release_log
from marc_pipeline.releases.log import append, find_release, read_log, read_releases, replace
from marc_pipeline.storage import Storage
from marc_schemas.release import FORMAT_VERSION, OLDEST_FORMAT, RELEASES, Release
from published import NOON, Site, items
from release_cases import altered, like

STORAGE = Storage()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Release:
    """A published release, to derive others from."""
    return Site(tmp_path_factory.mktemp("made")).publish(items(20))


@pytest.mark.parametrize(
    ("version", "remedy"), [(OLDEST_FORMAT - 1, "publish into a new table_uri"), (FORMAT_VERSION + 1, "upgrade .*")]
)
def test_a_log_of_an_unreadable_format_is_the_users_error(
    tmp_path: Path, made: Release, version: int, remedy: str
) -> None:
    uri = str(tmp_path)
    append(STORAGE, uri, [like(made, "fine", ds="2026-11-01")])
    append(STORAGE, uri, [like(made, "odd", ds="2026-11-02", format_version=version)])
    with pytest.raises(UserError, match=f"release odd .* format {version}, .* reads formats .*; {remedy}$"):
        read_releases(STORAGE, uri)


# Fields with defaults, at every depth, that the tests treat as fields of a later format.
ADDED = {
    "retired_at",
    "restores",
    "withdrawn",
    "tombstones",
    "blocks",
    "space",
    "cut_texts",
    "lost_tokens",
    "long_texts",
}


def before_added(kind: pa.DataType) -> pa.DataType:
    """The type without the added fields, at any depth."""
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, before_added(field.type)) for field in kind if field.name not in ADDED])
    return pa.list_(before_added(kind.value_type)) if pa.types.is_list(kind) else kind


@pytest.fixture
def old_log(tmp_path: Path, made: Release, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Release]]:
    """A log without some later fields, and the records that the program must read from it."""
    monkeypatch.setattr(release_log, "FORMAT_VERSION", FORMAT_VERSION + 1)
    old = [like(made, f"r{n}", ds=f"2026-11-0{n}", hour=n) for n in (1, 2)]
    schema = pa.schema(list(before_added(pa.struct(list(RELEASES)))))
    rows = pa.Table.from_pylist([release.model_dump() for release in old], schema=schema)
    taken = CommitProperties(app_transactions=[Transaction(f"ds={release.ds}", 1) for release in old])
    write_deltalake(f"{tmp_path}/_releases", rows, commit_properties=taken)
    files = tuple(file.model_copy(update={"blocks": ""}) for file in made.table.files)
    bare = {
        "table__files": files,
        "index__files": tuple(file.model_copy(update={"blocks": ""}) for file in made.index.files),
        "index__queries_file__blocks": "",
        "bundle__card_file__blocks": "",
        "audit__space": None,
        "counts__cut_texts": None,
        "counts__lost_tokens": None,
    }
    return str(tmp_path), [altered(release, format_version=FORMAT_VERSION + 1, **bare) for release in old]


def test_records_of_an_older_format_are_migrated(old_log: tuple[str, list[Release]]) -> None:
    uri, expected = old_log
    assert read_releases(STORAGE, uri) == expected
    assert find_release(STORAGE, uri).release_id == "r2"


def test_a_log_of_an_older_format_takes_new_records(old_log: tuple[str, list[Release]], made: Release) -> None:
    uri, expected = old_log
    late = like(made, "late", ds="2026-11-03", hour=3, restores="r1", format_version=FORMAT_VERSION + 1)
    assert append(STORAGE, uri, [late])
    assert read_releases(STORAGE, uri) == [*expected, late]
    assert columns_of(uri) == RELEASES.names
    assert not append(STORAGE, uri, [late.model_copy(update={"release_id": "later"})])


def test_replace_writes_records_of_an_older_format_in_the_current_one(old_log: tuple[str, list[Release]]) -> None:
    uri, (first, second) = old_log
    retired = altered(first, retired_at=NOON)
    assert replace(STORAGE, read_log(STORAGE, uri), [retired, second])
    assert read_releases(STORAGE, uri) == [retired, second]
    assert columns_of(uri) == RELEASES.names


def test_a_log_of_the_same_format_keeps_its_schema(tmp_path: Path, made: Release) -> None:
    for number in (1, 2):
        append(STORAGE, str(tmp_path), [like(made, f"r{number}", ds=f"2026-11-0{number}")])
    # A schema change would make concurrent commits fail.
    commits = sorted((tmp_path / "_releases" / "_delta_log").glob("*.json"))
    assert ["metaData" in commit.read_text() for commit in commits] == [True, False, False]


def columns_of(uri: str) -> list[str]:
    """Columns of the log, as any Delta reader sees them, in the order of the model."""
    found = {field.name for field in DeltaTable(f"{uri}/_releases").schema().fields}
    return [name for name in RELEASES.names if name in found]

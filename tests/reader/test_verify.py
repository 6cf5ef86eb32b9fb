"""Verification: an intact release has no problems, and every problem of a damaged one is named."""

from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from hand_made_index import publish_with_indexes
from marc_pipeline.config import IndexSettings
from marc_pipeline.reader.verify import verify
from marc_schemas.identity import row_id
from marc_schemas.release import Release
from published import DIM, Site, flip, items
from release_cases import altered

VECTORS = items(80)


def problems_of(site: Site, release: Release) -> list[str]:
    return verify(site.storage, release, table_uri=site.table_uri)


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF4,Flat", "HNSW8", "SQ8", "IDMap,Flat", "PCA4,IVF4,Flat", "PCA6,Flat", "IDMap,IVF4,Flat"],
)
def test_an_intact_release_has_no_problems(site: Site, factory: str) -> None:
    release = site.publish(VECTORS, index=IndexSettings(factory=factory, target_recall=0.01))
    assert problems_of(site, release) == []


def test_releases_of_several_dates_and_plans_are_intact_together(site: Site) -> None:
    made = [
        site.publish(VECTORS, plan_id="one"),
        site.publish(items(50, seed=2), plan_id="two"),
        site.publish(items(30), ds="2026-11-01", buckets=2),
    ]
    assert [problems_of(site, release) for release in made] == [[], [], []]


def published_files(site: Site, release: Release) -> list[Path]:
    return [
        *(Path(site.table_uri) / file.path for file in release.table.files),
        *(Path(release.index.uri) / file.path for file in release.index.files),
        Path(release.bundle.uri) / "bundle.json",
        Path(release.bundle.uri) / "backbone" / "weights.txt",
    ]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(lambda path: flip(path, path.stat().st_size // 2), "does not match its SHA-256", id="flipped"),
        pytest.param(lambda path: path.unlink(), "is missing", id="missing"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-1]), "", id="short"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"x"), "", id="long"),
    ],
)
def test_only_the_damaged_file_is_named(site: Site, harm: Callable[[Path], None], message: str) -> None:
    release = site.publish(VECTORS)
    files = published_files(site, release)
    assert len(files) == 7
    for file in files:
        before = file.read_bytes()
        harm(file)
        (problem,) = problems_of(site, release)
        assert problem.startswith(str(file))
        assert message in problem
        file.write_bytes(before)
    assert problems_of(site, release) == []


def test_all_damaged_files_are_named_together(site: Site) -> None:
    release = site.publish(VECTORS)
    files = [file for file in published_files(site, release) if file.name != "bundle.json"]
    for file in files:
        flip(file, 3)
    found = problems_of(site, release)
    assert len(found) == len(files)
    assert all(problem.startswith(str(file)) for file, problem in zip(files, found, strict=True))


@pytest.mark.parametrize(
    ("ids", "problem"),
    [
        ([*VECTORS][1:], "the index has 0 ids that are not in the table, and 1 ids of the table are missing"),
        ([*VECTORS, "stranger"], "the index has 1 ids that are not in the table, and 0 ids of the table are missing"),
        ([*[*VECTORS][2:], "stranger"], "the index has 1 ids that are not in the table, and 2 ids of the table are"),
        ([*VECTORS, "item-3"], "the index has 1 duplicate ids"),
    ],
)
def test_an_index_with_other_items_than_the_table_is_a_problem(site: Site, ids: list[str], problem: str) -> None:
    index = faiss.index_factory(DIM, "IDMap2,Flat", faiss.METRIC_INNER_PRODUCT)
    vectors = np.stack([VECTORS.get(i, VECTORS["item-0"]) for i in ids])
    index.add_with_ids(vectors, np.array([row_id(i) for i in ids]))
    (found,) = problems_of(site, publish_with_indexes(site, VECTORS, [index]))
    assert found.startswith(problem)


def test_wrong_row_counts_in_the_log_are_problems(site: Site) -> None:
    release = site.publish(VECTORS)
    first = release.table.files[0]
    files = (first.model_copy(update={"rows": 99}), *release.table.files[1:])
    lying = altered(release, counts__items=81, table__files=files)
    assert problems_of(site, lying) == [
        f"{first.path} has {first.rows} rows, the release lists 99",
        "the table has 80 rows, the release lists 81 items",
    ]


def test_a_bundle_file_of_another_bundle_is_a_problem(site: Site) -> None:
    release = site.publish(VECTORS)
    other = site.bundle("other weights")
    swapped = altered(release, bundle__uri=other.uri, bundle__card_file=other.card_file)
    assert problems_of(site, swapped) != []


def test_vectors_of_another_bundle_are_a_problem(site: Site) -> None:
    def mixed(bucket: int, rows: pa.Table) -> pa.Table:
        bundles = pa.array(["another", *rows["bundle"].to_pylist()[1:]])
        return rows.set_column(4, rows.schema.field(4), bundles) if bucket == 2 else rows

    encoded = site.encoded(VECTORS, alter=mixed)
    encoded.workspace.write_audit(encoded.audit().model_copy(update={"problems": ()}))
    encoded.index()
    release = encoded.release()
    assert problems_of(site, release) == [
        f"{release.table.files[2].path} has vectors of a bundle other than {release.bundle.version}"
    ]

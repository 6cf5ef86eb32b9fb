"""The audit measures the shape of the space, reports it in the release, and refuses a degenerate space."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings
from marc_pipeline.errors import GateRefused
from marc_pipeline.model import space
from marc_pipeline.nightly.audit import audit_bucket, audit_tasks
from marc_pipeline.resources import TaskResources
from marc_schemas.files import PublishedFile
from marc_schemas.space import SpaceShape
from published import DIM, Encoded, Site, Vectors, in_buckets, items

LAX = AuditSettings(max_drift=1e9, max_deleted_fraction=1)
NAMES = list(SpaceShape.model_fields)


def measured(site: Site, files: tuple[PublishedFile, ...]) -> dict[str, float]:
    """The shape of published files, by singular values and all pairs."""
    tables = [pq.read_table(f"{site.table_uri}/{file.path}", columns=["vector"]) for file in files]
    vectors = np.array([row for table in tables for row in table["vector"].to_pylist()])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    shares = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False) ** 2
    shares /= shares.sum()
    cosines = (unit @ unit.T)[~np.eye(len(unit), dtype=bool)]
    rank = np.exp(-(shares * np.log(shares)).sum())
    return dict(zip(NAMES, map(float, (rank, shares.max(), cosines.mean())), strict=True))


def nearly_equal(count: int, *, spread: float) -> Vectors:
    """Unit vectors in a narrow cone."""
    axis = np.ones(DIM, np.float32) / np.sqrt(DIM)
    vectors = {item: axis + spread * vector for item, vector in items(count).items()}
    return {item: (vector / np.linalg.norm(vector)).astype(np.float32) for item, vector in vectors.items()}


@pytest.mark.parametrize("normalised", [True, False])
def test_the_figures_are_those_of_the_published_table(tmp_path: Path, normalised: bool) -> None:
    site = Site(tmp_path, normalised=normalised)
    lengths = np.linspace(1, 1 if normalised else 9, 90, dtype=np.float32)
    vectors = {item: v * length for (item, v), length in zip(nearly_equal(90, spread=1).items(), lengths, strict=True)}
    release = site.publish(vectors)
    assert len(release.table.files) == 4
    found = {name: release.facts()[name] for name in NAMES}
    assert found == pytest.approx(measured(site, release.table.files), abs=1e-9)
    assert 0.1 < found["mean_cosine"] < 0.9, "neither figure is at its bound"
    assert site.log == [release]
    json.dumps(release.facts())


def test_a_backfill_of_some_buckets_measures_their_files_only(site: Site) -> None:
    site.publish(items(200))
    chosen = in_buckets(nearly_equal(200, spread=0.9), 1, 2)
    release = site.publish(chosen, plan_id="some", chosen=(1, 2), audit=LAX)
    files = tuple(file for file in release.table.files if "bucket=1/" in file.path or "bucket=2/" in file.path)
    assert sum(file.rows for file in files) == len(chosen)
    found = {name: release.facts()[name] for name in NAMES}
    assert found == pytest.approx(measured(site, files), abs=1e-9)
    assert found != pytest.approx(measured(site, release.table.files), abs=1e-2)


@pytest.mark.parametrize(("count", "refused"), [(4 * DIM, True), (4 * DIM - 1, False)])
def test_a_degenerate_space_is_refused_unless_it_has_few_vectors(site: Site, count: int, refused: bool) -> None:
    encoded = site.encoded(nearly_equal(count, spread=0.05))
    report = encoded.audit()
    message = "two random vectors have a mean cosine of 0.99"
    assert [problem[: len(message)] for problem in report.problems] == [message] * refused
    assert encoded.workspace.read_audit() == report
    assert report.figures.space is not None
    encoded.index()
    if not refused:
        assert encoded.release().audit.space == report.figures.space
        return
    with pytest.raises(GateRefused, match=r"mean cosine of 0\.99.* Nothing was published$"):
        encoded.release()
    assert site.log == []


def test_equal_vectors_use_no_direction(site: Site) -> None:
    one = next(iter(items(1).values()))
    report = site.encoded(dict.fromkeys(items(100), one)).audit()
    assert [problem.split(",")[0] for problem in report.problems] == [
        "the vectors use 0.00 of 8 directions (effective rank)",
        "two random vectors have a mean cosine of 1.000",
    ]


def test_a_plan_without_vectors_has_no_shape(site: Site) -> None:
    base = site.publish(items(60))
    gone = site.publish({}, plan_id="gone", chosen=(1,), base=base, audit=LAX)
    assert (gone.audit.space, [gone.facts()[name] for name in NAMES]) == (None, [None] * 3)


def samples(encoded: Encoded) -> list[NDArray[np.float32]]:
    """The sample of each bucket."""
    site, base = encoded.site, encoded.base
    tasks = audit_tasks(
        encoded.workspace, encoded.plan, encoded.receipts, table_uri=site.table_uri, normalised=True, base=base
    )
    return [audit_bucket(task, TaskResources()).sample for task in tasks]


def test_a_large_table_is_sampled_evenly_and_the_same_every_night(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (site.encoded(items(8000), plan_id=plan_id) for plan_id in ("first", "second"))
    assert sum(map(len, samples(first))) == 8000
    whole = first.audit().figures.space
    monkeypatch.setattr(space, "SAMPLE_NUMBERS", 2000 * DIM)
    parts = samples(first)
    assert list(map(len, parts)) == pytest.approx([500] * 4, abs=80)  # 4 standard deviations
    np.testing.assert_array_equal(np.concatenate(samples(second)), np.concatenate(parts))
    drawn = first.audit().figures.space
    assert drawn == space.space_shape(np.concatenate(parts)) != whole


def test_the_written_report_stays_small(tmp_path: Path) -> None:
    site = Site(tmp_path, dim=256)
    encoded = site.encoded(items(40, dim=256))
    encoded.audit()
    stored = Path(encoded.workspace.uri, "audit.json").read_text()
    report = json.loads(stored)
    assert set(report["figures"]["space"]) == set(NAMES)
    # Two sums of vectors, and no matrix.
    assert len(stored) < 3 * 256 * 30

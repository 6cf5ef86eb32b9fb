"""Choice of the index type, and its predicted and measured size."""

import math
import re
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.index.choice import EXACT_BELOW, MEBIBYTE, WORKING_BYTES, choose, predict
from marc_pipeline.reader.release import open_release
from marc_schemas.release import Release
from published import Site, items


def factories(count: int, dim: int = 64, **given: float | str) -> list[str]:
    return [choice.factory for choice in choose(count, dim, IndexSettings(**given))]


@pytest.mark.parametrize(
    ("count", "settings", "expected"),
    [
        *((count, {}, ["Flat"]) for count in (0, 1, 1000, EXACT_BELOW - 1)),
        *((count, {"target_recall": 1.0}, ["Flat"]) for count in (0, 1, 1000, EXACT_BELOW - 1)),
        (10**6, {"target_recall": 0.999}, ["IVF2048,Flat"]),
        (10**6, {"target_recall": 0.95}, ["IVF2048,SQfp16", "IVF2048,Flat"]),
        (10, {"factory": "HNSW32"}, ["HNSW32"]),
        (10**8, {"factory": "HNSW32"}, ["HNSW32"]),
    ],
)
def test_the_choice_follows_size_recall_and_factory(count: int, settings: dict[str, Any], expected: list[str]) -> None:
    assert factories(count, **settings) == expected


@pytest.mark.parametrize("count", [EXACT_BELOW, 100_000, 1_000_000, 7_654_321, 100_000_000, 10**9])
def test_the_number_of_lists_is_about_two_square_roots_up_to_a_limit(count: int) -> None:
    first, second = factories(count)
    assert (first.split(",")[1], second.split(",")[1]) == ("SQfp16", "Flat")
    name = first.split(",")[0]
    lists = int(name.removeprefix("IVF").removesuffix("_HNSW32"))
    assert name.endswith("_HNSW32") == (lists >= 16_384)
    assert lists.bit_count() == 1
    assert 1 / math.sqrt(2) <= lists / min(65_536, 2 * math.sqrt(count)) <= math.sqrt(2)


@pytest.mark.parametrize(
    ("mib", "recall", "expected"),
    [
        (1000, 0.95, ["IVF2048,SQfp16", "IVF2048,Flat"]),
        (300, 0.95, ["IVF2048,SQfp16"]),
        (256, 0.95, ["IVF2048,SQ8"]),
        (210, 0.85, ["IVF2048,PQ32x8"]),
        (256, 0.85, ["IVF2048,SQ8"]),
    ],
)
def test_the_most_precise_index_within_the_memory_limit_is_chosen(
    mib: float, recall: float, expected: list[str]
) -> None:
    assert factories(10**6, memory_mib=mib, target_recall=recall) == expected
    for choice in choose(10**6, 64, IndexSettings(memory_mib=mib, target_recall=recall)):
        assert choice.memory_bytes <= mib * MEBIBYTE


def test_too_small_a_memory_limit_is_refused_with_the_required_size() -> None:
    message = (
        r"memory_mib 100 is too small for an index of 1,000,000 × 64 with recall 0\.95; set it to at least (\d+) MiB"
    )
    with pytest.raises(UserError, match=message) as refused:
        factories(10**6, memory_mib=100)
    (needed,) = map(int, re.findall(r"at least (\d+) MiB", str(refused.value)))
    assert factories(10**6, memory_mib=needed) == ["IVF2048,SQ8"]
    with pytest.raises(UserError):
        factories(10**6, memory_mib=needed - 1)
    with pytest.raises(UserError, match=r"HNSW32 1,\d+ MiB"):
        factories(10**6, memory_mib=100, factory="HNSW32")


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "IVF64,Flat", "IVF64,SQfp16", "IVF64,SQ8", "PCA16,IVF64,Flat", "HNSW16", "PQ8x8"]
)
def test_the_predicted_size_is_the_file_size(tmp_path: Path, factory: str) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    index = faiss.index_factory(32, factory if "IVF" in factory else f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add_with_ids(rows, np.arange(20_000))
    faiss.write_index(index, str(tmp_path / "index"))
    assert predict(factory, 20_000, 32).index_bytes == pytest.approx((tmp_path / "index").stat().st_size, rel=0.1)


# Half precision cannot distinguish such short vectors, so float32 is tried next.
def test_a_more_precise_index_is_built_if_the_first_misses_the_recall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("marc_pipeline.index.choice.EXACT_BELOW", 100)
    site = Site(tmp_path, normalised=False)
    vectors = {item: 1e-9 * vector for item, vector in items(500).items()}
    with caplog.at_level("WARNING"):
        first = published(site, vectors, ds="2026-11-19")
    assert "of IVF32,SQfp16 is only" in caplog.text
    assert first.index.factory == "IVF32,Flat"
    assert first.index.recall >= 0.95
    # The next night patches this index and does not try the others again.
    again = published(site, dict(list(vectors.items())[5:]), ds="2026-11-20", base=first)
    assert (again.index.factory, again.index.build.changed) == (first.index.factory, 5)


def published(site: Site, vectors: dict[str, np.ndarray], *, ds: str, base: Release | None = None) -> Release:
    encoded = site.encoded(vectors, ds=ds, base=base)
    assert encoded.audit().problems == ()
    encoded.index()
    return encoded.release()


def test_a_memory_limit_that_prevents_the_recall_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Little training memory, so that the size of the index decides.
    few = {"EXACT_BELOW": 100, "TRAIN_POINTS_PER_LIST": 1, "LEAST_POINTS_PER_LIST": 1, "TRAIN_POINTS_MIN": 100}
    for name, value in few.items():
        monkeypatch.setattr(f"marc_pipeline.index.choice.{name}", value)
    encoded = Site(tmp_path, normalised=False).encoded({i: 1e-9 * vector for i, vector in items(500).items()})
    half, whole = choose(500, 8, IndexSettings())
    cap = (half.memory_bytes + 100) / MEBIBYTE
    assert whole.memory_bytes > cap * MEBIBYTE
    with pytest.raises(GateRefused, match=r"raise index\.memory_mib .* for a better index"):
        encoded.index(IndexSettings(memory_mib=cap))


def test_the_release_records_predicted_and_measured_figures(site: Site) -> None:
    release = site.publish(items(300))
    figures = release.index.figures
    assert figures.memory_bytes > WORKING_BYTES
    assert figures.recall_low <= release.index.recall <= figures.recall_high
    assert figures.latency_ms > 0
    assert figures.queries_per_second > 0
    assert release.index.faiss == faiss.__version__
    assert open_release(site.table_uri).facts == release

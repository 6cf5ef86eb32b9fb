"""Which index suits so many vectors, what it was predicted to take, and what it took."""

import math
from pathlib import Path

import faiss
import numpy as np
import pytest

from marc_pipeline.config import IndexSettings
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.index import EXACT_BELOW, choose, predict
from marc_pipeline.index.choice import MEBIBYTE, WORKING_BYTES
from marc_pipeline.reader.release import open_release
from marc_schemas.release import Release
from published import Site, items


def factories(count: int, dim: int = 64, **given: float | str) -> list[str]:
    return [choice.factory for choice in choose(count, dim, IndexSettings(**given))]


def test_small_tables_are_searched_exactly() -> None:
    for count in (0, 1, 1000, EXACT_BELOW - 1):
        assert factories(count) == ["Flat"]
        assert factories(count, target_recall=1.0) == ["Flat"]


@pytest.mark.parametrize("count", [EXACT_BELOW, 100_000, 1_000_000, 7_654_321, 100_000_000, 10**9])
def test_large_ones_by_lists_of_about_two_roots_until_there_are_enough(count: int) -> None:
    first, second = factories(count)
    assert (first.split(",")[1], second.split(",")[1]) == ("SQfp16", "Flat")
    name = first.split(",")[0]
    lists = int(name.removeprefix("IVF").removesuffix("_HNSW32"))
    assert name.endswith("_HNSW32") == (lists >= 16_384)
    assert lists.bit_count() == 1
    assert 1 / math.sqrt(2) <= lists / min(65_536, 2 * math.sqrt(count)) <= math.sqrt(2)


def test_the_recall_that_is_asked_for_says_what_the_lists_may_hold() -> None:
    assert factories(10**6, target_recall=0.999) == ["IVF2048,Flat"]
    assert factories(10**6, target_recall=0.95) == ["IVF2048,SQfp16", "IVF2048,Flat"]


def test_a_factory_string_is_taken_as_it_is() -> None:
    assert factories(10, factory="HNSW32") == factories(10**8, factory="HNSW32") == ["HNSW32"]


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
def test_under_a_cap_the_most_faithful_index_that_fits_is_taken(mib: float, recall: float, expected: list[str]) -> None:
    assert factories(10**6, memory_mib=mib, target_recall=recall) == expected
    for choice in choose(10**6, 64, IndexSettings(memory_mib=mib, target_recall=recall)):
        assert choice.memory_bytes <= mib * MEBIBYTE


def test_a_cap_that_cannot_be_held_is_refused_with_what_would_fit() -> None:
    with pytest.raises(
        UserError, match=r"memory_mib 100 cannot hold an index of 1,000,000 × 64 with recall 0\.95"
    ) as no:
        factories(10**6, memory_mib=100)
    needed = int(str(no.value).split("; ")[1].split(" MiB")[0])
    assert factories(10**6, memory_mib=needed) == ["IVF2048,SQ8"]
    with pytest.raises(UserError):
        factories(10**6, memory_mib=needed - 1)
    with pytest.raises(UserError, match=r"HNSW32 1,\d+ MiB"):
        factories(10**6, memory_mib=100, factory="HNSW32")


@pytest.mark.parametrize(
    "factory", ["Flat", "SQ8", "IVF64,Flat", "IVF64,SQfp16", "IVF64,SQ8", "PCA16,IVF64,Flat", "HNSW16", "PQ8x8"]
)
def test_the_predicted_size_is_that_of_the_file(tmp_path: Path, factory: str) -> None:
    rows = np.random.default_rng(0).standard_normal((20_000, 32)).astype(np.float32)
    index = faiss.index_factory(32, factory if "IVF" in factory else f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add_with_ids(rows, np.arange(20_000))
    faiss.write_index(index, str(tmp_path / "index"))
    assert predict(factory, 20_000, 32).index_bytes == pytest.approx((tmp_path / "index").stat().st_size, rel=0.1)


# Vectors that half precision cannot tell apart: whole ones are tried next.
def test_where_the_first_choice_does_not_reach_the_recall_a_more_faithful_one_is_built(
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
    # The night after patches what stands, and does not try the others again.
    again = published(site, dict(list(vectors.items())[5:]), ds="2026-11-20", base=first)
    assert (again.index.factory, again.index.build.changed) == (first.index.factory, 5)


def published(site: Site, vectors: dict[str, np.ndarray], *, ds: str, base: Release | None = None) -> Release:
    encoded = site.encoded(vectors, ds=ds, base=base)
    assert encoded.audit().problems == ()
    encoded.index()
    return encoded.release()


def test_a_recall_that_the_cap_does_not_allow_is_refused_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("marc_pipeline.index.choice.EXACT_BELOW", 100)
    # What training takes must not hide what the index does.
    monkeypatch.setattr("marc_pipeline.index.choice.TRAIN_POINTS_PER_LIST", 1)
    monkeypatch.setattr("marc_pipeline.index.choice.LEAST_POINTS_PER_LIST", 1)
    monkeypatch.setattr("marc_pipeline.index.choice.TRAIN_POINTS_MIN", 100)
    encoded = Site(tmp_path, normalised=False).encoded({i: 1e-9 * vector for i, vector in items(500).items()})
    half, whole = choose(500, 8, IndexSettings())
    cap = (half.memory_bytes + 100) / MEBIBYTE
    assert whole.memory_bytes > cap * MEBIBYTE
    with pytest.raises(GateRefused, match=r"memory_mib .* allows no better one"):
        encoded.index(IndexSettings(memory_mib=cap))


def test_the_release_row_has_what_was_predicted_and_measured(tmp_path: Path) -> None:
    site = Site(tmp_path)
    release = site.publish(items(300))
    figures = release.index.figures
    assert figures.memory_bytes > WORKING_BYTES
    assert figures.recall_low <= release.index.recall <= figures.recall_high
    assert figures.latency_ms > 0
    assert figures.queries_per_second > 0
    assert release.index.faiss == faiss.__version__
    assert open_release(site.table_uri).facts == release

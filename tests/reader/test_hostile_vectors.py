"""Vectors that are equal, signed zeros, next to nothing or very long, in tables of one item or of few."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from marc_pipeline.config import AuditSettings, IndexSettings
from marc_pipeline.errors import GateRefused, UserError
from marc_pipeline.nightly.audit import require_passed
from marc_pipeline.reader.release import OpenRelease, open_release
from marc_pipeline.reader.verify import verify
from marc_schemas.release import Release
from published import DIM, Encoded, Site, Vector, Vectors, items

FEW = settings(deadline=None, database=None, max_examples=15)
# Equal vectors are a degenerate space.
LAX = AuditSettings(max_drift=1e30, min_effective_rank=0, max_mean_cosine=1)
ROUNDING = (DIM + 1) * 2.0**-24
# Underflow of a product in float32, in each of eight components.
UNDERFLOW = DIM * 2.0**-149
# Index types that find every one of so few vectors.
EXACT = ["Flat", "IVF1,Flat", "HNSW8"]

SMALLEST, NORMAL = float(np.float32(2.0**-149)), float(np.float32(2.0**-126))
COMPONENTS = st.sampled_from(
    [0.0, -0.0, SMALLEST, -SMALLEST, 1e-40, NORMAL, -NORMAL, 1e-30, -1e-12, 1e-6, 0.25, -0.25, 0.5, -1.0, 1.0, 1.0]
)
ANY = st.lists(COMPONENTS, min_size=DIM, max_size=DIM).filter(lambda row: max(map(abs, row)) > 0.1)
# With many equal vectors.
TABLES = st.lists(ANY, min_size=1, max_size=5).flatmap(
    lambda rows: st.lists(st.sampled_from(rows), min_size=1, max_size=12)
)

ONE: Vector = np.eye(DIM, dtype=np.float32)[0]


def named(rows: Sequence[Vector]) -> dict[str, Vector]:
    return {f"item-{number:03d}": row for number, row in enumerate(rows)}


def unit(row: Sequence[float]) -> Vector:
    found: Vector = (np.array(row) / np.linalg.norm(row)).astype(np.float32)
    return found


def published(site: Site, vectors: Vectors, factory: str = "Flat", *, target: float = 0.95) -> OpenRelease:
    encoded = site.encoded(vectors)
    assert encoded.audit(LAX).problems == ()
    encoded.index(IndexSettings(factory=factory, target_recall=target))
    made = encoded.release()
    assert verify(site.storage, made, table_uri=site.table_uri) == []
    return open_release(site.table_uri)


def assert_whole(opened: OpenRelease, vectors: Vectors) -> None:
    """Check every bit of the vectors, and that each search returns all items, best first, equal scores by id."""
    own = np.stack(list(vectors.values()))
    assert opened.vectors(list(vectors)).tobytes() == own.tobytes()
    rows = opened.dataset().to_table(columns=["item_id", "vector"]).to_pylist()
    assert {row["item_id"]: np.float32(row["vector"]).tobytes() for row in rows} == {
        name: vector.tobytes() for name, vector in vectors.items()
    }
    wide = own.astype(np.float64)
    products, lengths = wide @ wide.T, np.linalg.norm(wide, axis=1)
    place = {name: number for number, name in enumerate(vectors)}
    names, scores = opened.search(own, k=len(vectors))
    for number, (found, reported) in enumerate(zip(names.tolist(), scores, strict=True)):
        assert sorted(found) == sorted(vectors)
        order = [place[name] for name in found]
        off = np.abs(reported.astype(np.float64) - products[number, order])
        assert (off <= ROUNDING * lengths[number] * lengths[order] + UNDERFLOW).all()
        ranked = list(zip((-reported).tolist(), found, strict=True))
        assert ranked == sorted(ranked)
    for k in range(1, len(vectors) + 1):
        fewer, best = opened.search(own, k)
        np.testing.assert_array_equal(fewer, names[:, :k])
        np.testing.assert_array_equal(best, scores[:, :k])
    with pytest.raises(UserError, match=f"k is {len(vectors) + 1}; choose 1 to {len(vectors)}, the number of items"):
        opened.search(own, k=len(vectors) + 1)


@FEW
@given(rows=TABLES, factory=st.sampled_from(EXACT))
def test_any_unit_vectors_are_read_exactly_and_find_themselves(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], factory: str
) -> None:
    vectors = named([unit(row) for row in rows])
    opened = published(Site(tmp_path_factory.mktemp("site")), vectors, factory)
    assert_whole(opened, vectors)
    names, scores = opened.search(np.stack(list(vectors.values())), k=len(vectors))
    for name, found, reported in zip(vectors, names.tolist(), scores, strict=True):
        assert reported[found.index(name)] >= reported[0] - 2 * ROUNDING - 2.0**-22


@FEW
@given(rows=TABLES, lengths=st.lists(st.integers(-18, 18), min_size=12, max_size=12), factory=st.sampled_from(EXACT))
def test_vectors_of_any_length_are_ranked_by_inner_product(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]], lengths: list[int], factory: str
) -> None:
    site = Site(tmp_path_factory.mktemp("site"), normalised=False)
    scaled = [(10.0**length * unit(row)).astype(np.float32) for row, length in zip(rows, lengths, strict=False)]
    assert_whole(published(site, named(scaled), factory, target=0.01), named(scaled))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        pytest.param(0 * ONE, "1 vectors are zero", id="zero"),
        pytest.param(-0.0 * ONE, "1 vectors are zero", id="negative zero"),
        pytest.param(np.full(DIM, SMALLEST, np.float32), "1 vectors are zero", id="smallest"),
        pytest.param(1e-25 * ONE, "1 vectors are zero", id="square is nothing"),
        pytest.param(1.1e19 * ONE, "1 vectors are too long", id="square is hardly finite"),
        pytest.param(1e20 * ONE, "1 vectors are too long", id="square is infinite"),
        pytest.param(np.full(DIM, np.finfo(np.float32).max), "1 vectors are too long", id="greatest"),
    ],
)
def test_zero_and_overflowing_vectors_are_refused_even_without_normalisation(
    tmp_path: Path, row: Vector, problem: str
) -> None:
    site = Site(tmp_path, normalised=False)
    report = site.encoded(named([ONE, row.astype(np.float32), 2 * ONE])).audit()
    with pytest.raises(GateRefused, match=rf"bucket \d: {problem}[^,]*, the first is of item 'item-001'\. Nothing was"):
        require_passed(report)


@pytest.mark.parametrize("factory", [*EXACT, "SQ8", "IVF1,SQ8"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_table_of_one_or_two_items_is_searched(site: Site, factory: str, count: int) -> None:
    vectors = named([ONE, -ONE][:count])
    opened = published(site, vectors, factory)
    assert opened.facts.index.recall == 1.0
    names, scores = opened.search(np.stack(list(vectors.values())), k=count)
    assert names.tolist() == [list(vectors), list(vectors)[::-1]][:count]
    np.testing.assert_allclose(scores, np.array([[1, -1], [1, -1]])[:count, :count], atol=2 / 255)
    if factory in EXACT:
        assert_whole(opened, vectors)


def test_more_lists_than_items_are_a_user_error(site: Site) -> None:
    with pytest.raises(UserError, match="'IVF4,Flat' cannot be trained on 2 vectors"):
        published(site, named([ONE, -ONE]), "IVF4,Flat")


@pytest.mark.parametrize("factory", ["Flat", "IVF1,Flat", "IVF4,Flat", "SQ8", "IVF4,SQ8"])
def test_equal_vectors_are_all_found_in_the_order_of_their_ids(site: Site, factory: str) -> None:
    vectors = named([ONE] * 40)
    opened = published(site, vectors, factory)
    assert opened.facts.index.recall == 1.0
    for k in (1, 3, 40):
        names, scores = opened.search(ONE, k)
        assert names.tolist() == [sorted(vectors)[:k]]
        np.testing.assert_allclose(scores, 1, atol=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,SQ8"])
def test_removing_one_of_several_equal_vectors_keeps_the_others(site: Site, factory: str) -> None:
    settings = IndexSettings(factory=factory, max_changed=9, max_drift=1e30)
    vectors = named([*[ONE] * 20, *items(20).values()])
    base = site.publish(vectors, ds="2026-11-19", index=settings)
    today = {name: vector for name, vector in vectors.items() if name not in ("item-007", "item-012")}
    made = laxly(site.encoded(today, base=base), settings)
    assert made.index.build.changed == 2
    opened = open_release(site.table_uri)
    assert opened.search(ONE, k=18)[0].tolist() == [sorted(today)[:18]]
    back = laxly(site.encoded(vectors, ds="2026-11-21", base=made), settings)
    assert back.index.build.changed == 4
    assert open_release(site.table_uri).search(ONE, k=20)[0].tolist() == [sorted(vectors)[:20]]


def laxly(encoded: Encoded, settings: IndexSettings) -> Release:
    assert encoded.audit(LAX).problems == ()
    encoded.index(settings)
    return encoded.release()


def test_zeros_of_either_sign_are_equal_in_search_and_unchanged_in_the_table(site: Site) -> None:
    signed: NDArray[np.float32] = np.where(ONE == 0, np.float32(-0.0), ONE)
    vectors = named([signed, ONE, signed, ONE])
    opened = published(site, vectors)
    assert np.signbit(opened.vectors(list(vectors))).sum(axis=1).tolist() == [7, 0, 7, 0]
    for query in (ONE, signed):
        assert opened.search(query, k=4)[0].tolist() == [sorted(vectors)]


def test_a_graph_that_cannot_reach_many_equal_vectors_is_refused(site: Site) -> None:
    """Equal vectors link only to one another, so that few of them are reachable from the rest of the graph."""
    vectors = named([*[ONE] * 300, *items(50).values()])
    with pytest.raises(GateRefused, match=r"recall@10 of HNSW8 is 0\.\d+ over 350 queries"):
        published(site, vectors, "HNSW8")

"""The click model: it ranks vectors by their information, trains on the training part only, and is reproducible."""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score

from marc_pipeline.evaluation import click_model as module
from marc_pipeline.evaluation.click_data import ClickData, click_data
from marc_pipeline.evaluation.click_model import ClickScore, CtrSettings, score_together, score_vectors
from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.time_split import Split, split_by_time

Vectors = NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("one_thread")

USERS, ITEMS, RARE, ROWS, WIDTH = 40, 200, 100, 5000, 6
FAST = CtrSettings(learning_rate=3e-3, batch=256, max_epochs=8, hidden=32)


def tastes() -> tuple[Interactions, Vectors]:
    """Users who click items in the direction of their taste, and these directions; the last 100 items are rare."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    liking = rng.normal(size=(USERS, WIDTH))
    users = rng.integers(USERS, size=ROWS)
    items = np.where(rng.random(ROWS) < 0.06, rng.integers(RARE, ITEMS, size=ROWS), rng.integers(RARE, size=ROWS))
    agreement = (liking[users] * directions[items]).sum(axis=1)
    labels = (agreement + rng.normal(size=ROWS) > 0).astype(np.float32)
    return Interactions(users=users, items=items, labels=labels, times=np.arange(ROWS)), directions


@pytest.fixture(scope="module")
def directions() -> Vectors:
    return tastes()[1]


@pytest.fixture(scope="module")
def data() -> ClickData:
    interactions = tastes()[0]
    return click_data(interactions, split_by_time(interactions), n_items=ITEMS, history=10)


def score(vectors: Vectors | None, data: ClickData, *, seed: int = 0, **changes: Any) -> ClickScore:
    return score_vectors(vectors, data, seed=seed, settings=replace(FAST, **changes))


def same(one: ClickScore, other: ClickScore) -> bool:
    return one.predictions.tobytes() == other.predictions.tobytes() and one.epoch == other.epoch


def with_labels(data: ClickData, rows: slice, labels: Vectors) -> ClickData:
    changed = data.labels.copy()
    changed[rows] = labels
    return replace(data, labels=changed)


def test_informative_vectors_beat_random_ones_and_ids_alone(data: ClickData, directions: Vectors) -> None:
    noise = np.random.default_rng(1).normal(size=directions.shape).astype(np.float32)
    for seed in range(2):
        good, random, ids = (score(vectors, data, seed=seed) for vectors in (directions, noise, None))
        assert good.auc > max(random.auc, ids.auc) + 0.05
        assert good.cold_auc > max(random.cold_auc, ids.cold_auc) + 0.1
        assert good.log_loss < min(random.log_loss, ids.log_loss)


def test_scores_are_computed_from_the_predictions(data: ClickData, directions: Vectors) -> None:
    found = score(directions, data)
    labels, predictions = data.labels[data.split.test], found.predictions
    assert predictions.dtype == np.float32
    assert found.auc == roc_auc_score(labels, predictions)
    assert found.cold_auc == roc_auc_score(labels[data.cold], predictions[data.cold])
    assert found.warm_auc == roc_auc_score(labels[~data.cold], predictions[~data.cold])
    surprise = -np.log(np.where(labels > 0, predictions, 1 - predictions.astype(float))).mean()
    assert found.log_loss == pytest.approx(surprise, rel=1e-6)
    assert found.log_loss == pytest.approx(log_loss(labels, predictions.astype(float)))
    assert found.seconds > 0


# The parts


def test_each_part_has_its_own_role(data: ClickData, directions: Vectors) -> None:
    original, test = score(directions, data), data.split.test
    shuffled = with_labels(data, test, np.random.default_rng(0).permutation(data.labels[test]))
    other = score(directions, shuffled)
    assert same(original, other), "the test part has no influence on the predictions"
    assert original.validation_auc == other.validation_auc
    assert original.auc != other.auc

    flipped = with_labels(data, data.split.validation, 1 - data.labels[data.split.validation])
    one, other = (score(directions, labels, max_epochs=1) for labels in (data, flipped))
    assert same(one, other), "the validation part chooses the epoch only"
    assert one.validation_auc == pytest.approx(1 - other.validation_auc)
    assert not same(original, score(directions, flipped))

    flipped = with_labels(data, data.split.train, 1 - data.labels[data.split.train])
    assert score(directions, flipped).auc < 0.4


def test_the_epoch_is_the_best_one_before_patience_ends(data: ClickData) -> None:
    noise = np.random.default_rng(1).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    epochs = 14
    # Fast enough to overfit. With the same seed, a shorter run is the beginning of a longer one.
    walk = [score(noise, data, seed=2, learning_rate=0.1, max_epochs=n, patience=epochs) for n in range(1, epochs + 1)]
    best = [run.validation_auc for run in walk]
    assert best == sorted(best)
    rises = [n for n in range(1, epochs + 1) if n == 1 or best[n - 1] > best[n - 2]]
    assert [run.epoch for run in walk] == [max(n for n in rises if n <= last) for last in range(1, epochs + 1)]
    assert len(rises) < epochs
    assert all(same(run, walk[run.epoch - 1]) for run in walk)
    chosen = set()
    for patience in (1, 2, 3, 4):
        pauses = [later - earlier > patience for earlier, later in itertools.pairwise(rises)]
        expected = rises[pauses.index(True)] if True in pauses else rises[-1]
        run = score(noise, data, seed=2, learning_rate=0.1, max_epochs=epochs, patience=patience)
        assert same(run, walk[expected - 1])
        chosen.add(run.epoch)
    assert len(chosen) > 1


def test_dropout_is_active_in_training_only(data: ClickData, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(model: Any, part: Any) -> Any:
        modes.append((torch.is_grad_enabled(), model.training))
        return original(model, part)

    modes: list[tuple[bool, bool]] = []
    original = module._ClickModels.forward
    monkeypatch.setattr(module._ClickModels, "forward", forward)
    without, with_dropout = (score(None, data, max_epochs=2, dropout=dropout) for dropout in (0.0, 0.5))
    assert not same(without, with_dropout)
    assert set(modes) == {(True, True), (False, False)}


# Reproducibility


def test_the_seed_alone_decides_the_predictions(data: ClickData, directions: Vectors) -> None:
    one = score(directions, data, seed=3)
    torch.manual_seed(99)
    expected = torch.rand(5)
    torch.manual_seed(99)
    assert same(one, score(directions, data, seed=3))
    assert torch.equal(torch.rand(5), expected), "the global generator does not change"
    assert not same(one, score(directions, data, seed=4))


def test_the_seed_orders_the_rows(data: ClickData, monkeypatch: pytest.MonkeyPatch) -> None:
    def orders(seed: int) -> list[list[int]]:
        seen: list[list[int]] = []

        def take(part: Any, rows: Any) -> Any:
            if isinstance(rows, torch.Tensor):
                seen.append(rows.tolist())
            return original(part, rows)

        monkeypatch.setattr(module._Part, "take", take)
        score(None, data, seed=seed, max_epochs=2)
        return seen

    original = module._Part.take
    first, again, other = orders(0), orders(0), orders(1)
    assert first == again != other
    batches = len(first) // 2
    for epoch in (first[:batches], first[batches:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(data.split.train.stop))
    assert first[:batches] != first[batches:]


def test_predictions_do_not_depend_on_the_block_size(
    data: ClickData, directions: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score(directions, data, max_epochs=1).predictions
    monkeypatch.setattr(module, "PREDICTED_AT_ONCE", 7)
    np.testing.assert_allclose(score(directions, data, max_epochs=1).predictions, expected, rtol=1e-5)


# Inputs


@pytest.mark.parametrize("factor", [2.0**-100, 0.25, 2.0**100])
def test_the_length_of_vectors_has_no_influence(data: ClickData, directions: Vectors, factor: float) -> None:
    stretched = directions * np.float32(factor)
    assert np.isfinite(stretched).all()
    assert same(score(directions, data, max_epochs=2), score(stretched, data, max_epochs=2))


def test_every_vector_has_length_root_d_and_zeros_stay_zeros(directions: Vectors) -> None:
    directions = directions.copy()
    directions[5] = 0
    table = module._lookup_table([directions], ITEMS).numpy()
    lengths = np.linalg.norm(table, axis=1)
    assert table.dtype == np.float32
    assert np.flatnonzero(lengths == 0).tolist() == [5, ITEMS]
    np.testing.assert_allclose(np.delete(lengths, [5, ITEMS]), math.sqrt(WIDTH), rtol=1e-6)
    np.testing.assert_allclose(table[0] / directions[0], table[0, 0] / directions[0, 0], rtol=1e-6)


def test_a_history_is_the_mean_of_its_vectors_and_0_without_clicks(data: ClickData, directions: Vectors) -> None:
    table = module._lookup_table([directions], ITEMS)
    rows = slice(0, 600)
    model = module._ClickModels(table, 1, n_users=USERS, n_items=ITEMS, settings=FAST)
    means = model.means(module._part(data, rows).clicks)[0].numpy()
    lengths = set()
    for row in range(600):
        before = (data.users[:row] == data.users[row]) & (data.labels[:row] == 1)
        last = data.items[:row][before][-10:]
        lengths.add(len(last))
        expected = np.mean([table[item].numpy() for item in last], axis=0) if len(last) else np.zeros(WIDTH)
        np.testing.assert_allclose(means[row], expected, atol=1e-6)
    assert lengths == set(range(11))


def test_vectors_must_be_one_finite_row_per_item(data: ClickData, directions: Vectors) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        broken = directions.copy()
        broken[[8, 5], 2] = bad
        with pytest.raises(ValueError, match=r"2 of 200 vectors contain NaN or infinity; the first is row 5"):
            score(broken, data)
    for shape in ((ITEMS - 1, 4), (ITEMS + 1, 4), (ITEMS,), (ITEMS, 2, 2)):
        with pytest.raises(ValueError, match=r"vectors must be \[200, d\], one row per item, not \["):
            score(np.ones(shape, np.float32), data)


def test_vectors_and_data_are_not_changed(data: ClickData, directions: Vectors) -> None:
    before = directions.copy()
    inputs = {name: value.copy() for name, value in vars(data).items() if isinstance(value, np.ndarray)}
    score(directions, data, max_epochs=1)
    assert np.array_equal(directions, before)
    assert all(np.array_equal(vars(data)[name], value) for name, value in inputs.items())


# Data


def test_an_item_is_cold_below_five_ratings_in_the_training_part() -> None:
    # Item k has k ratings in the training part. Ratings in later parts do not count.
    items = np.array([*np.repeat(np.arange(8), np.arange(8)), *[4] * 6, *range(8)])
    n = len(items)
    split = Split(train=slice(0, 28), validation=slice(28, 34), test=slice(34, n))
    interactions = Interactions(
        users=np.arange(n) % 3, items=items, labels=(np.arange(n) % 2).astype(np.float32), times=np.arange(n)
    )
    data = click_data(interactions, split, n_items=9, history=2)
    assert data.cold.tolist() == [True] * 5 + [False] * 3
    assert (data.n_users, data.n_items, data.clicks.shape) == (3, 9, (n, 2))


def test_rows_with_one_label_have_no_auc(data: ClickData, directions: Vectors) -> None:
    def scored(**changes: Any) -> ClickScore:
        return score(directions, replace(data, **changes), max_epochs=1)

    found = scored(cold=np.zeros_like(data.cold))
    assert math.isnan(found.cold_auc)
    assert found.warm_auc == found.auc
    test = data.split.test
    labels = np.where(data.cold, 1, data.labels[test]).astype(np.float32)
    clicks_only = scored(labels=with_labels(data, test, labels).labels)
    assert math.isnan(clicks_only.cold_auc)
    assert 0 < clicks_only.warm_auc < 1
    all_clicks = scored(labels=with_labels(data, test, np.ones_like(labels)).labels)
    assert math.isnan(all_clicks.auc)
    assert math.isfinite(all_clicks.log_loss)
    validation = np.ones_like(data.labels[data.split.validation])
    with pytest.raises(ValueError, match="needs rows of both labels"):
        score(None, with_labels(data, data.split.validation, validation))

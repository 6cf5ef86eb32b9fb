"""Systems in one pass against each alone, and ranks in the whole catalogue against a model that is run for every pair."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from marc_pipeline.config import InteractionSettings
from marc_pipeline.evaluation import click_model as module
from marc_pipeline.evaluation.click_data import ClickData, sample_users, time_split_data
from marc_pipeline.evaluation.click_model import CtrSettings, score_together, score_vectors
from marc_pipeline.training.interactions import Interactions

pytestmark = pytest.mark.usefixtures("one_thread")

USERS, ITEMS, ROWS, WIDTH = 50, 60, 900, 5
FAST = CtrSettings(learning_rate=3e-3, batch=128, max_epochs=4, hidden=16)
WANTED = InteractionSettings(history=4, negatives=3)


def purchases() -> tuple[Interactions, NDArray[np.float32]]:
    """Users who take items in the direction of their taste."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(ITEMS, WIDTH)).astype(np.float32)
    wish = 3 * rng.normal(size=(USERS, WIDTH)) @ directions.T + rng.gumbel(size=(USERS, ITEMS))
    pairs = np.argwhere(wish >= np.sort(wish, axis=1)[:, [-ROWS // USERS]])
    users, items = rng.permutation(pairs).T
    return Interactions(users, items, np.ones(len(users), np.float32), np.arange(len(users)), implicit=True), directions


@pytest.fixture(scope="module")
def data() -> ClickData:
    return time_split_data(purchases()[0], items=ITEMS, settings=WANTED)


def noise(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(ITEMS, WIDTH)).astype(np.float32)


def test_a_system_has_the_same_score_in_any_company(data: ClickData) -> None:
    systems = [purchases()[1], noise(1), noise(2)]
    together = score_together(systems, data, seed=3, settings=FAST)
    for vectors, found in zip(systems, together, strict=True):
        alone = score_vectors(vectors, data, seed=3, settings=FAST)
        assert alone.epoch == found.epoch
        np.testing.assert_allclose(found.predictions, alone.predictions, atol=2e-4)
    assert together[0].auc > max(together[1].auc, together[2].auc) + 0.05


def test_early_stopping_is_that_of_each_system_alone(data: ClickData) -> None:
    impatient = replace(FAST, learning_rate=0.1, max_epochs=12, patience=1)
    systems = [noise(seed) for seed in range(6)]
    together = score_together(systems, data, seed=0, settings=impatient)
    alone = [score_vectors(vectors, data, seed=0, settings=impatient) for vectors in systems]
    assert [one.epoch for one in together] == [one.epoch for one in alone]
    assert len({one.epoch for one in together}) > 1


def test_ranks_are_those_of_a_model_that_is_run_for_every_pair(
    data: ClickData, monkeypatch: pytest.MonkeyPatch
) -> None:
    systems = [purchases()[1], noise(1)]
    models = []
    build = module._ClickModels.__init__
    monkeypatch.setattr(module._ClickModels, "__init__", lambda m, *a, **k: (models.append(m), build(m, *a, **k))[1])
    found = score_together(systems, data, seed=0, settings=FAST, ranked=True)
    (model,) = models
    test, hits, gains, looked_up = data.split.test, [], [], []
    positives = np.arange(test.start, test.stop)[data.labels[test] > 0]
    for row in positives:
        user = data.users[row]
        every = replace(
            data,
            users=np.full(ITEMS, user),
            items=np.arange(ITEMS),
            labels=np.zeros(ITEMS, np.float32),
            clicks=np.repeat(data.clicks[[row]], ITEMS, axis=0),
            weights=np.ones(ITEMS, np.float32),
        )
        with torch.no_grad():
            logits = model(module._part(every, slice(0, ITEMS))).numpy()
        earlier = slice(0, test.start)
        own = (data.users[earlier] == user) & (data.labels[earlier] > 0)
        free = np.setdiff1d(np.arange(ITEMS), data.items[earlier][own])
        ranks = [1 + (scores[free] > scores[data.items[row]]).sum() for scores in logits]
        hits.append([rank <= 10 for rank in ranks])
        gains.append([1 / np.log2(1 + rank) if rank <= 10 else 0 for rank in ranks])
        history = data.clicks[row][data.clicks[row] >= 0]
        near = []
        for vectors in systems:
            unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            cosines = unit @ unit[history].mean(axis=0) if len(history) else np.zeros(ITEMS)
            near.append(bool(len(history)) and 1 + (cosines[free] > cosines[data.items[row]]).sum() <= 10)
        looked_up.append(near)
    for place, score in enumerate(found):
        assert score.ranking.recall == pytest.approx(np.mean(hits, axis=0)[place], abs=1e-9)
        assert score.ranking.ndcg == pytest.approx(np.mean(gains, axis=0)[place], abs=1e-6)
        assert score.ranking.lookup_recall == pytest.approx(np.mean(looked_up, axis=0)[place], abs=1e-9)
    assert found[0].ranking.recall > found[1].ranking.recall + 0.1


def test_the_parts_of_purchases_are_those_of_the_positives(data: ClickData) -> None:
    interactions, _ = purchases()
    n = len(interactions)
    bounds = [0, round(0.8 * n), round(0.9 * n), n]
    for part, (start, stop) in zip(vars(data.split).values(), zip(bounds, bounds[1:], strict=False), strict=True):
        positives = data.items[part][data.labels[part] > 0]
        assert positives.tolist() == interactions.items[start:stop].tolist()
        assert (part.stop - part.start) == (1 + WANTED.negatives) * (stop - start)
    counts = np.bincount(interactions.items[: bounds[1]], minlength=ITEMS)
    assert data.cold.tolist() == (counts[data.items[data.split.test]] < 5).tolist(), "negatives are no ratings"


def test_a_sample_has_whole_users_and_about_the_wanted_rows() -> None:
    interactions, _ = purchases()
    found = sample_users(interactions, 300)
    assert 250 < len(found) <= 300
    assert found.n_users == len(np.unique(found.users)) < USERS
    whole = {tuple(interactions.items[interactions.users == user]) for user in range(USERS)}
    assert {tuple(found.items[found.users == user]) for user in range(found.n_users)} <= whole
    assert sample_users(interactions, len(interactions)) is interactions

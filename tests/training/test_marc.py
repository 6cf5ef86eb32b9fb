"""MARC's objective against loops: history pooling, matching networks, loss terms, and the initial compressor."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from clicks import HISTORY, WIDTH, learnable, train_settings
from hsic_reference import Kind, all_kinds
from marc_pipeline.evaluation.factory import new_compressor
from marc_pipeline.model.compressor import Bottleneck
from marc_pipeline.training.hsic import nhsic
from marc_pipeline.training.marc import Constraints, Marc
from marc_pipeline.training.matching import CrossingNetwork, ResidualNetwork
from marc_pipeline.training.objective import Clicks, FrozenStates, distinct
from marc_pipeline.training.regression import fit_regression
from marc_pipeline.training.user_history import HistoryPooling

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 6


def uneven(module: nn.Module) -> nn.Module:
    """The module with random changes to all parameters, because initial zeros and identities hide errors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def pooling(dim: int = DIM) -> HistoryPooling:
    module = uneven(HistoryPooling(dim))
    assert isinstance(module, HistoryPooling)
    return module


def histories(rows: int, items: int, *, length: int = HISTORY, seed: int = 0) -> Tensor:
    """Histories of every length from 0 to ``length``."""
    history = torch.randint(items, (rows, length), generator=torch.Generator().manual_seed(seed))
    return history.masked_fill(torch.arange(length) >= (torch.arange(rows) % (length + 1))[:, None], -1)


# History pooling


def naive_pooling(module: HistoryPooling, candidate: Tensor, vectors: Tensor, history: list[int]) -> Tensor:
    named = [vectors[item] for item in history if item >= 0]
    if not named:
        return module.nothing
    query = module.query.weight @ candidate
    odds = [math.exp((query @ vector).item() / len(candidate)) for vector in named]
    return torch.stack([odd / sum(odds) * vector for odd, vector in zip(odds, named, strict=True)]).sum(dim=0)


def test_pooling_equals_a_naive_loop_for_any_order_of_the_history() -> None:
    torch.manual_seed(0)
    module, vectors, candidates = pooling(), 2 * torch.randn(20, DIM), 2 * torch.randn(36, DIM)
    history = histories(36, 20)
    rows = zip(candidates, history.tolist(), strict=True)
    expected = torch.stack([naive_pooling(module, candidate, vectors, row) for candidate, row in rows])
    torch.testing.assert_close(module(candidates, vectors, history), expected, atol=1e-5, rtol=1e-5)
    for _ in range(3):
        shuffled = history[:, torch.randperm(HISTORY)]
        torch.testing.assert_close(module(candidates, vectors, shuffled), expected, atol=1e-5, rtol=1e-5)


def test_padding_of_a_history_has_no_influence() -> None:
    torch.manual_seed(0)
    module, candidates, vectors = pooling(), torch.randn(12, DIM), torch.randn(20, DIM).requires_grad_()
    history = histories(12, 19).where(histories(12, 19) < 0, histories(12, 19) + 1)  # item 0 is in no history
    found = module(candidates, vectors, history)
    found.square().sum().backward()
    assert vectors.grad is not None
    assert torch.equal(vectors.grad[0], torch.zeros(DIM))
    other = vectors.detach().clone()
    other[0] = 1e4
    assert torch.equal(module(candidates, other, history), found)
    padded = functional.pad(history, (0, 3), value=-1)
    torch.testing.assert_close(module(candidates, vectors, padded), found)


def test_only_users_without_a_history_have_the_learned_vector() -> None:
    torch.manual_seed(0)
    module, vectors = pooling(), torch.randn(20, DIM)
    history = torch.full((4, HISTORY), -1)
    found = module(torch.randn(4, DIM), vectors, history)
    assert torch.equal(found, module.nothing.expand(4, DIM))
    found.sum().backward()
    assert module.nothing.grad is not None
    assert torch.equal(module.nothing.grad, torch.full((DIM,), 4.0))
    history[:, 0] = 3
    torch.testing.assert_close(module(torch.randn(4, DIM), vectors, history), vectors[3].expand(4, DIM))


def test_initial_weights_are_the_softmax_of_the_cosines() -> None:
    vectors = functional.normalize(torch.randn(8, DIM, generator=torch.Generator().manual_seed(0)), dim=1) * DIM**0.5
    found = HistoryPooling(DIM)(vectors[:1], vectors, torch.arange(8)[None])
    weights = torch.softmax(functional.cosine_similarity(vectors[:1], vectors), dim=0)
    torch.testing.assert_close(found[0], weights @ vectors, atol=1e-5, rtol=1e-5)


# The matching networks


@pytest.mark.parametrize("network", [CrossingNetwork, ResidualNetwork])
@pytest.mark.parametrize("users", [1, 2, 3])
def test_a_matching_network_gives_a_logit_and_a_state_per_pair(
    network: type[CrossingNetwork | ResidualNetwork], users: int
) -> None:
    module = network(dim=DIM, users=users, hidden=10, dropout=0.5).eval()
    item, others = torch.randn(7, DIM), [torch.randn(7, DIM) for _ in range(users)]
    logits, states = module(item, others)
    assert logits.shape == (7,)
    assert states.shape == (7, 10)
    torch.testing.assert_close(logits, states @ module.logit.weight[0] + module.logit.bias)
    # A logit does not depend on the other rows of the batch.
    alone = torch.cat([module(item[row : row + 1], [u[row : row + 1] for u in others])[0] for row in range(7)])
    torch.testing.assert_close(alone, logits)


def test_the_crossing_network_uses_item_user_product_and_distance() -> None:
    torch.manual_seed(0)
    module = CrossingNetwork(dim=2, users=2, hidden=5, dropout=0.0)
    z, u, v = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]]), torch.tensor([[-1.0, 4.0]])
    features = [1.0, -2.0, 3.0, 0.5, 3.0, -1.0, 2.0, 2.5, -1.0, 4.0, -1.0, -8.0, 2.0, 6.0]
    seen: list[Tensor] = []
    module.first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits, states = module(z, [u, v])
    assert seen[0].tolist() == [features]
    first = (module.first.weight @ torch.tensor(features) + module.first.bias).clamp(min=0)
    state = (module.second.weight @ first + module.second.bias).clamp(min=0)
    torch.testing.assert_close(states[0], state)
    torch.testing.assert_close(logits[0], module.logit.weight[0] @ state + module.logit.bias[0])


def test_the_residual_network_has_the_compressors_structure() -> None:
    torch.manual_seed(0)
    module = ResidualNetwork(dim=DIM, users=2, hidden=10, dropout=0.0)
    like = Bottleneck(width=3 * DIM, dim=10, hidden=10)
    like.load_state_dict({name: value for name, value in module.state_dict().items() if "logit" not in name})
    item, u, v = torch.randn(3, 7, DIM)
    torch.testing.assert_close(module(item, [u, v])[1], like(torch.cat([item, u, v], dim=1)))


# The loss


def marc(
    states: Tensor,
    *,
    keep: float = 0.0,
    decouple: float = 0.0,
    dropout: float = 0.0,
    profiles: bool = False,
    **constraints: Any,
) -> Marc:
    torch.manual_seed(1)
    compressor = Bottleneck(width=states.shape[1], dim=DIM, hidden=16, dropout=dropout)
    matching = CrossingNetwork(dim=DIM, users=Marc.USERS + profiles, hidden=12, dropout=dropout)
    wanted = Constraints(keep, decouple, **constraints)
    source = FrozenStates(states)
    objective = uneven(Marc(source, compressor, matching, dim=DIM, constraints=wanted, profiles=profiles))
    assert isinstance(objective, Marc)
    return objective


@pytest.fixture(scope="module")
def states() -> Tensor:
    return torch.from_numpy(learnable()[1])


@pytest.fixture(scope="module")
def batch() -> Clicks:
    """64 rows of users with and without clicks and skips in their history."""
    training = learnable()[0].training
    rows = torch.cat([torch.arange(40), torch.arange(len(training) - 24, len(training))])
    assert (training[rows].clicked[:, 0] < 0).any()
    assert (training[rows].skipped >= 0).all(dim=1).any()
    return training[rows]


def full(batch: Clicks) -> Clicks:
    """The rows with full histories."""
    return batch[torch.nonzero((batch.clicked >= 0).all(dim=1) & (batch.skipped >= 0).all(dim=1)).squeeze(1)]


def naive_terms(objective: Marc, states: Tensor, batch: Clicks) -> dict[str, Tensor]:
    """The loss terms by a loop over rows, from the vectors of all items."""
    z = objective.compressor(states)
    z = torch.stack([row / row.norm() * math.sqrt(DIM) for row in z])
    logits, inner, chosen, losses = [], [], [], []
    for row, item in enumerate(batch.items.tolist()):
        users = [
            naive_pooling(objective.clicked, z[item], z, batch.clicked[row].tolist()),
            naive_pooling(objective.skipped, z[item], z, batch.skipped[row].tolist()),
        ]
        if objective.profile is not None and batch.profiles is not None:
            users.append(naive_pooling(objective.profile, z[item], z, batch.profiles[row].tolist()))
        logit, state = objective.matching(z[item][None], [user[None] for user in users])
        p = torch.sigmoid(logit[0].double())
        losses.append(-torch.log(p if batch.labels[row] else 1 - p))
        logits.append(logit[0])
        inner.append(state[0])
        chosen.append(z[item])
    histories = [batch.clicked, batch.skipped, *([] if batch.profiles is None else [batch.profiles])]
    touched = {item for history in histories for item in history.flatten().tolist() if item >= 0}
    items = sorted(touched | set(batch.items.tolist()))
    measure = {"kernel": objective.constraints.kernel, "estimator": objective.constraints.estimator}
    return {
        "click": torch.stack(losses).mean().float(),
        "keep": nhsic(states[items], z[items], **measure),  # type: ignore[arg-type]
        "decouple": nhsic(torch.stack(chosen), torch.stack(inner), **measure),  # type: ignore[arg-type]
        "logits": torch.stack(logits),
    }


@all_kinds
def test_the_loss_equals_a_naive_recomputation(states: Tensor, batch: Clicks, kind: Kind) -> None:
    objective = marc(states, keep=0.7, decouple=0.3, **kind)
    batch = full(batch)
    found, expected = objective(batch), naive_terms(objective, states, batch)
    assert set(found) == {"loss", "click", "keep", "decouple"}
    for name in ("click", "keep", "decouple"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    total = expected["click"] - 0.7 * expected["keep"] + 0.3 * expected["decouple"]
    torch.testing.assert_close(found["loss"], total, atol=1e-4, rtol=1e-4)


def test_terms_include_rows_with_short_histories_and_items_without_padding(states: Tensor, batch: Clicks) -> None:
    assert 0 not in torch.cat([batch.items, batch.clicked.flatten(), batch.skipped.flatten()]).tolist()
    objective = marc(states, keep=1.0, decouple=0.3)
    found, expected = objective(batch), naive_terms(objective, states, batch)
    for name in ("click", "keep", "decouple"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_a_text_about_the_user_is_a_third_vector(states: Tensor, batch: Clicks) -> None:
    # The last 15 states are texts about users; every third user has no text.
    texts = torch.arange(len(batch)) % 15 + len(states) - 15
    with_texts = replace(batch, profiles=texts.where(texts % 3 > 0, -1)[:, None])
    objective = marc(states, decouple=0.3, profiles=True)
    found, expected = objective(with_texts), naive_terms(objective, states, with_texts)
    for name in ("click", "decouple"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    scores = objective.score(objective.vectors(), with_texts)
    torch.testing.assert_close(scores, expected["logits"], atol=1e-5, rtol=1e-5)
    everybody = full(replace(batch, profiles=texts[:, None]))
    expected = naive_terms(objective, states, everybody)
    keeping = marc(states, keep=0.3, profiles=True)
    torch.testing.assert_close(keeping(everybody)["keep"], expected["keep"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", [{}, {"keep": 0.5}, {"decouple": 0.5}])
def test_a_term_without_weight_is_not_computed(states: Tensor, batch: Clicks, weights: dict[str, float]) -> None:
    found = marc(states, **weights)(batch)
    assert set(found) == {"loss", "click", *weights}
    assert torch.equal(found["loss"], found["click"]) == (not weights)


def test_an_estimate_uses_at_most_the_configured_rows(
    states: Tensor, batch: Clicks, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []

    def counted(x: Tensor, y: Tensor, **kind: Any) -> Tensor:
        sizes.append((len(x), len(y)))
        return nhsic(x, y, **kind)

    monkeypatch.setattr("marc_pipeline.training.marc.nhsic", counted)
    marc(states, keep=0.5, decouple=0.5, rows=10)(batch)
    assert sizes == [(10, 10), (10, 10)]


@pytest.mark.parametrize("term", ["keep", "decouple"])
def test_a_gradient_step_moves_a_term_in_its_direction(states: Tensor, batch: Clicks, term: str) -> None:
    weights: dict[str, Any] = {term: 50.0}
    objective = marc(states, **weights)
    batch = full(batch)
    before = objective(batch)
    before["loss"].backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-5 * parameter.grad)
    change = (objective(batch)[term] - before[term]).item()
    assert change > 1e-6 if term == "keep" else change < -1e-6


def test_scores_are_the_logits_of_the_loss(states: Tensor, batch: Clicks) -> None:
    objective = marc(states, dropout=0.5).eval()
    scores = objective.score(objective.vectors(), batch)
    torch.testing.assert_close(scores, naive_terms(objective, states, batch)["logits"], atol=1e-5, rtol=1e-5)
    loss = functional.binary_cross_entropy_with_logits(scores, batch.labels)
    torch.testing.assert_close(objective(batch)["loss"], loss)


def test_the_loss_is_invariant_to_the_length_of_vectors(states: Tensor, batch: Clicks) -> None:
    objective = marc(states, keep=0.5, decouple=0.5)
    loss, scores = objective(batch)["loss"], objective.score(objective.vectors(), batch)
    seen: list[Tensor] = []
    objective.matching.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for parameter in [*objective.compressor.linear.parameters(), *objective.compressor.down.parameters()]:  # type: ignore[union-attr]
            parameter.mul_(8.0)
    torch.testing.assert_close(objective(batch)["loss"], loss)
    torch.testing.assert_close(objective.score(objective.vectors(), batch), scores)
    for item in seen:
        torch.testing.assert_close(item.norm(dim=1), torch.full((len(batch),), DIM**0.5))


def test_every_item_of_a_batch_is_compressed_once(states: Tensor, batch: Clicks) -> None:
    items, candidate, local = distinct(batch)
    assert len(set(items.tolist())) == len(items)
    assert sorted(items[candidate].tolist()) == sorted(set(batch.items.tolist()))
    for entries, rows in zip(vars(batch).values(), (local.items, local.clicked, local.skipped), strict=False):
        assert torch.equal(items[rows].where(rows >= 0, -1), entries)
    seen: list[int] = []
    objective = marc(states)
    objective.compressor.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    objective(batch)
    assert seen == [len(items)]


def test_validation_and_vectors_change_neither_training_mode_nor_weights(states: Tensor, batch: Clicks) -> None:
    objective = marc(states, dropout=0.5)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    for mode in (True, False):
        objective.train(mode)
        assert objective.validate(batch) == objective.validate(batch)  # without dropout
        assert torch.equal(objective.vectors(), objective.vectors())
        assert all(module.training == mode for module in objective.modules())
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_interactions_validated_in_parts_have_the_same_auc(
    states: Tensor, batch: Clicks, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = uneven(marc(states))
    assert isinstance(objective, Marc)
    at_once, seen = objective.validate(batch), []
    objective.matching.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    monkeypatch.setattr("marc_pipeline.training.objective.VALIDATED_AT_ONCE", len(batch) // 3 + 1)
    assert objective.validate(batch) == pytest.approx(at_once, abs=1e-6)
    assert len(seen) == 3
    assert sum(seen) == len(batch)


# The initial compressor


@pytest.mark.parametrize("training", [True, False])
def test_a_new_compressor_equals_its_initial_projection(training: bool) -> None:
    data, states = learnable()
    start = fit_regression(states, data, dim=DIM)
    compressor = new_compressor(start, train_settings(dropout=0.5)).train(training)
    hidden = torch.from_numpy(states)
    torch.testing.assert_close(compressor(hidden), start(hidden), atol=1e-4, rtol=1e-5)
    assert compressor.linear.weight.shape == (DIM, WIDTH)
    assert torch.equal(compressor.linear.weight, start.directions)
    # The residual branch is 0 at first, but has a gradient.
    linear = compressor.linear(hidden)
    assert torch.equal(compressor(hidden), linear)
    compressor.eval()(hidden).square().sum().backward()
    assert compressor.down.weight.grad is not None
    assert compressor.down.weight.grad.abs().max() > 0

"""The baseline losses against loops over the same numbers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clicks import WIDTH, learnable
from marc_pipeline.model.compressor import Bottleneck
from marc_pipeline.training.baselines import TEMPERATURE, Autoencoder, Contrastive, Matryoshka
from marc_pipeline.training.objective import Clicks, FrozenStates, mean_of

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 8


@pytest.fixture(scope="module")
def states() -> Tensor:
    return torch.from_numpy(learnable()[1])


@pytest.fixture(scope="module")
def batch() -> Clicks:
    """Rows of users with and without histories; several rows have the same item."""
    training = learnable()[0].training
    batch = training[torch.cat([torch.arange(30), torch.arange(400, 450)])]
    assert (batch.clicked[:, 0] < 0).any()
    assert len(set(batch.items.tolist())) < len(batch)
    return batch


def compressor(dim: int = DIM) -> Bottleneck:
    torch.manual_seed(2)
    module = Bottleneck(width=WIDTH, dim=dim, hidden=16, dropout=0.0)
    with torch.no_grad():
        module.down.weight.normal_()
    return module


def cosine(a: Tensor, b: Tensor) -> float:
    lengths = a.norm().item() * b.norm().item()
    return (a @ b).item() / lengths if lengths else 0.0


def user(vectors: Tensor, clicked: list[int]) -> Tensor:
    """Mean of the clicked items' unit vectors."""
    named = [vectors[item] / vectors[item].norm() for item in clicked if item >= 0]
    return torch.stack(named).mean(dim=0) if named else torch.zeros(vectors.shape[1])


def log_loss(logit: float, label: float) -> float:
    return math.log1p(math.exp(-logit if label else logit))


def test_the_mean_of_a_history_ignores_padding(states: Tensor) -> None:
    history = torch.tensor([[3, 5, 3], [7, -1, -1], [-1, -1, -1], [-1, 2, -1]])
    expected = torch.stack([(2 * states[3] + states[5]) / 3, states[7], torch.zeros(WIDTH), states[2]])
    torch.testing.assert_close(mean_of(states, history), expected)


# Matryoshka


@pytest.mark.parametrize(
    ("dim", "sizes"), [(8, [8, 4, 2, 1]), (32, [32, 16, 8, 4]), (12, [12, 6, 3, 1]), (4, [4, 2, 1])]
)
def test_the_matryoshka_loss_is_the_mean_over_nested_cosines(
    states: Tensor, batch: Clicks, dim: int, sizes: list[int]
) -> None:
    module = compressor(dim)
    objective = Matryoshka(FrozenStates(states), module, dim=dim)
    with torch.no_grad():
        objective.scale.copy_(torch.arange(1.0, 1.0 + len(sizes)))
        objective.bias.copy_(torch.linspace(-0.5, 0.5, len(sizes)))
        vectors = module(states)
    losses = []
    for place, size in enumerate(sizes):
        scale, bias = objective.scale[place].item(), objective.bias[place].item()
        for item, clicked, label in zip(
            batch.items.tolist(), batch.clicked.tolist(), batch.labels.tolist(), strict=True
        ):
            # The user's mean is computed from whole vectors, and cut afterwards.
            agreement = cosine(user(vectors, clicked)[:size], vectors[item][:size])
            losses.append(log_loss(scale * agreement + bias, label))
    assert objective(batch)["loss"].item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_two_tower_scores_are_cosines_of_item_and_mean_of_clicks(states: Tensor, batch: Clicks) -> None:
    module = compressor()
    for objective in (Matryoshka(FrozenStates(states), module, dim=DIM), Contrastive(FrozenStates(states), module)):
        vectors = objective.vectors()
        expected = [
            cosine(user(vectors, clicked), vectors[item])
            for item, clicked in zip(batch.items.tolist(), batch.clicked.tolist(), strict=True)
        ]
        assert objective.score(vectors, batch).tolist() == pytest.approx(expected, abs=1e-5)


# Contrastive


def naive_contrastive(vectors: Tensor, batch: Clicks) -> float:
    rows = [row for row in range(len(batch)) if batch.labels[row] and batch.clicked[row, 0] >= 0]
    losses = []
    for row in rows:
        own = int(batch.items[row])
        liking = user(vectors, batch.clicked[row].tolist())
        others = [int(batch.items[other]) for other in rows if int(batch.items[other]) != own]
        odds = [math.exp(cosine(liking, vectors[item]) / TEMPERATURE) for item in [own, *others]]
        losses.append(-math.log(odds[0] / sum(odds)))
    return sum(losses) / len(losses)


def test_the_contrastive_loss_uses_other_items_of_the_batch_as_negatives(states: Tensor, batch: Clicks) -> None:
    module = compressor()
    clicked_items = batch.items[(batch.labels > 0) & (batch.clicked[:, 0] >= 0)].tolist()
    assert len(set(clicked_items)) < len(clicked_items)  # so that the mask has an effect
    found = Contrastive(FrozenStates(states), module)(batch)["loss"].item()
    assert found == pytest.approx(naive_contrastive(module(states).detach(), batch), rel=1e-5)


def test_rows_without_a_pair_and_equal_items_do_not_change_the_contrastive_loss(states: Tensor, batch: Clicks) -> None:
    objective = Contrastive(FrozenStates(states), compressor())
    rows = torch.nonzero((batch.labels > 0) & (batch.clicked[:, 0] >= 0)).squeeze(1)
    assert 2 < len(rows) < len(batch)
    assert torch.equal(objective(batch)["loss"], objective(batch[rows])["loss"])
    # The same item in another row is not a negative.
    one_item = replace(batch[rows[:6]], items=torch.full((6,), 30))
    assert objective(one_item)["loss"].item() == pytest.approx(0, abs=1e-6)


def test_a_batch_without_pairs_has_loss_0_and_gradient_0(states: Tensor, batch: Clicks) -> None:
    for changed in (
        replace(batch, labels=torch.zeros(len(batch))),
        replace(batch, clicked=torch.full_like(batch.clicked, -1)),
        replace(batch, labels=torch.eye(len(batch))[-1]),
        batch[torch.arange(0)],
    ):
        objective = Contrastive(FrozenStates(states), compressor())
        loss = objective(changed)["loss"]
        assert (loss.shape, loss.item()) == ((), 0)
        loss.backward()
        for parameter in objective.compressor.parameters():
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, torch.zeros_like(parameter))


# Autoencoder


def naive_error(objective: Autoencoder, states: Tensor, known: Tensor, items: Tensor) -> float:
    distinct = sorted(set(items.tolist()))
    wanted = (states[distinct].double() - known.double().mean(dim=0)) / known.double().std(dim=0)
    with torch.no_grad():
        found = objective.decoder(objective.compressor(states[distinct])).double()
    errors: list[float] = [((a - b) ** 2).mean().item() for a, b in zip(found, wanted, strict=True)]
    return sum(errors) / len(errors)


def test_the_autoencoder_loss_is_the_squared_error_of_standardised_states(states: Tensor, batch: Clicks) -> None:
    known = states[20:]
    objective = Autoencoder(FrozenStates(states), compressor(), states=known, dim=DIM, hidden=16)
    expected = naive_error(objective, states, known, batch.items)
    assert expected > 0.5
    assert objective(batch)["loss"].item() == pytest.approx(expected, rel=1e-4)
    other_users = replace(batch, clicked=torch.full_like(batch.clicked, -1), labels=1 - batch.labels)
    assert torch.equal(objective(other_users)["loss"], objective(batch)["loss"])


def test_the_autoencoder_validates_with_minus_its_loss_without_dropout(states: Tensor, batch: Clicks) -> None:
    module = Bottleneck(width=WIDTH, dim=DIM, hidden=16, dropout=0.5)
    with torch.no_grad():
        module.down.weight.normal_()
    objective = Autoencoder(FrozenStates(states), module, states=states, dim=DIM, hidden=16).train()
    found = objective.validate(batch)
    assert all(part.training for part in objective.modules())
    assert found == pytest.approx(-naive_error(objective.eval(), states, states, batch.items), rel=1e-4)
    assert found != pytest.approx(-objective.train()(batch)["loss"].item(), rel=1e-4)


def test_a_constant_column_has_a_finite_loss(states: Tensor, batch: Clicks) -> None:
    constant = states.clone()
    constant[:, 3] = 7.0
    objective = Autoencoder(FrozenStates(constant), compressor(), states=constant, dim=DIM, hidden=16)
    assert math.isfinite(objective(batch)["loss"].item())

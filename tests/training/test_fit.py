"""The training loop: reproducible bits, early stopping, the rows of each step, and learning rates."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clicks import train_settings
from fit_probe import DROPPING, PLAIN, Ended, Probe, data, place, rows, same, train, trained, weights
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.factory import new_objective
from marc_pipeline.storage import Storage
from marc_pipeline.training import fit as module
from marc_pipeline.training.fit import Checkpoint, fit, learn
from marc_pipeline.training.learning import LearningData
from marc_pipeline.training.objective import Clicks, ItemStates, Objective

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    first, progress = trained()
    torch.manual_seed(2)
    again, progress_again = trained()
    assert same(first, again)
    assert progress == progress_again
    assert not same(first, trained(seed=1)[0])
    # Without dropout, the order of rows still depends on the seed.
    assert not same(*(trained(seed=seed, **PLAIN)[0] for seed in (0, 1)))


def test_training_learns() -> None:
    _, progress = trained(epochs=15, patience=15, keep=0.0, learning_rate=3e-3)
    assert progress.best > 0.67
    assert progress.history[-1]["click"] < min(progress.history[0]["click"], math.log(2))


# Early stopping


@pytest.mark.parametrize(
    ("scores", "every", "steps", "best"),
    [
        pytest.param([0.5, 0.7, 0.6, 0.65, 0.9], 3, 12, 6, id="two in a row are no better"),
        pytest.param([0.5, 0.5, 0.5, 0.9], 2, 6, 2, id="an equal score is no better"),
        pytest.param([0.5, 0.4, 0.6, 0.5, 0.7, 0.1, 0.2, 0.9], 1, 7, 5, id="a better score restarts the patience"),
    ],
)
def test_early_stopping_keeps_the_weights_of_the_best_validation(
    scores: list[float], every: int, steps: int, best: int
) -> None:
    objective = Probe(scores)
    progress = train(objective, epochs=20, validate_every=every, patience=2)
    assert (progress.step, progress.best, progress.best_step, progress.bad) == (
        steps,
        scores[best // every - 1],
        best,
        2,
    )
    assert [row["validation_auc"] for row in progress.history] == scores[: steps // every]
    assert not same(objective.validated[best // every - 1], objective.validated[-1])
    assert same(weights(objective), objective.validated[best // every - 1])


def test_without_validation_the_last_weights_stay() -> None:
    probe = Probe([0.9, 0.1])
    wanted = train_settings(batch=10, epochs=2, patience=1)
    progress = fit(probe, training=rows(100), validation=None, settings=wanted, seed=0, label="")
    assert (progress.step, progress.history, probe.validated) == (20, [], [])
    validated = Probe()
    train(validated, epochs=2)
    assert torch.equal(probe.weight, validated.weight)


@pytest.mark.parametrize("max_steps", [1, 7, 10, 13])
def test_training_ends_after_max_steps_with_a_validation(max_steps: int) -> None:
    objective = Probe()
    progress = train(objective, epochs=3, max_steps=max_steps)
    assert progress.step == len(objective.batches) == max_steps
    assert [row["step"] for row in progress.history] == [*range(10, max_steps, 10), max_steps]
    assert progress.history[-1]["epoch"] == pytest.approx(max_steps / 10)
    assert train(Probe(), epochs=3, max_steps=1000).step == train(Probe(), epochs=3).step == 30


def test_history_has_the_means_since_the_previous_validation() -> None:
    objective = Probe()
    progress = train(objective, epochs=2, validate_every=4, accumulate=2)
    for number, row in enumerate(progress.history):
        expected = np.mean(objective.seen[number * 8 : number * 8 + 8])
        assert (row["loss"], row["double"]) == pytest.approx((expected, 2 * expected), rel=1e-5)


def test_without_patience_training_goes_on_and_the_last_weights_stay() -> None:
    probe = Probe([0.9, *[0.1] * 9])
    progress = train(probe, epochs=5, patience=None)
    assert (progress.step, progress.best, progress.best_step, progress.capped) == (50, 0.1, 50, False)
    assert same(weights(probe), probe.validated[-1])
    # The cap ended it, not the number of epochs.
    assert train(Probe(), epochs=5, patience=None, max_steps=40).capped


# The matching network alone


class MatchingProbe(Probe):
    """A probe with a weight outside the compressor."""

    def __init__(self, scores: Iterable[float] = ()) -> None:
        super().__init__(scores)
        self.matching = nn.Parameter(torch.ones(1))

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        terms = super().forward(batch)
        return {**terms, "loss": terms["loss"] + self.matching.square().mean()}


@pytest.mark.parametrize(("epochs", "max_steps", "alone"), [(0, 99, 0), (0.5, 99, 5), (2, 99, 20), (2, 12, 6)])
def test_the_compressor_waits_for_the_matching_network(epochs: float, max_steps: int, alone: int) -> None:
    probe = MatchingProbe()
    changes = {"matching_epochs": epochs, "max_steps": max_steps, "validate_every": 1}
    progress = train(probe, epochs=3, **changes)
    assert (progress.alone, progress.step) == (alone, min(alone + 30, max_steps))
    compressor = [state["compressor.weight"].item() for state in probe.validated]
    assert compressor[:alone] == [0.25] * alone
    assert len(set(compressor[alone:])) == len(compressor) - alone
    assert 0.25 not in compressor[alone:]
    assert probe.validated[0]["matching"] != 1


def test_marc_has_a_matching_network_that_learns_alone() -> None:
    states: list[dict[str, Tensor]] = []
    changes = {"matching_epochs": 0.25, "epochs": 1, "validate_every": 1000}

    def prepare(objective: Objective) -> None:
        objective.register_forward_pre_hook(lambda *_: states.append(weights(objective)))

    _, progress = trained(prepare=prepare, **changes)
    assert 2 < progress.alone < progress.step / 2
    for name, start in states[0].items():
        same_value = [torch.equal(start, state[name]) for state in states[: progress.alone + 1]]
        assert all(same_value) == name.startswith(("compressor.", "source."))
    assert not torch.equal(states[0]["compressor.linear.weight"], states[-1]["compressor.linear.weight"])


def test_early_stopping_begins_after_the_matching_network() -> None:
    probe = MatchingProbe([0.9, 0.8, 0.7, 0.75, 0.6, 0.6])
    progress = train(probe, epochs=9, matching_epochs=3, patience=2)
    assert (progress.alone, progress.step, progress.best, progress.best_step) == (30, 60, 0.75, 40)


def test_epochs_count_from_the_end_of_the_steps_alone() -> None:
    ended: list[tuple[int, int]] = []
    probe = MatchingProbe()
    wanted = train_settings(batch=10, epochs=2, matching_epochs=0.7, patience=None)
    after = lambda epoch: ended.append((epoch, len(probe.batches)))  # noqa: E731
    fit(probe, training=rows(100), validation=None, settings=wanted, seed=0, label="", epoch_ended=after)
    assert ended == [(1, 17), (2, 27)]


# Training again on every row


class Learning:
    """Builds probes, and records them with their data."""

    def __init__(self) -> None:
        self.probes, self.data = list[Probe](), list[LearningData]()

    def __call__(self, data: LearningData) -> Probe:
        self.probes.append(Probe([0.5, 0.9, 0.6, 0.6]))
        self.data.append(data)
        return self.probes[-1]

    def learned(self, **changes: Any) -> tuple[Objective, int]:
        """Train on 100 rows, of which the last 20 are held out, and return the objective and the best step."""
        held_out = LearningData(rows=rows(100), raters=torch.zeros(100, dtype=torch.int64), end=80, start=80)
        wanted = train_settings(batch=10, epochs=4, **changes)
        objective, progress = learn(self, held_out, settings=wanted, seed=0, label="")
        return objective, progress.best_step


def test_the_frozen_regime_trains_again_on_every_row_for_the_best_number_of_steps() -> None:
    build = Learning()
    objective, best_step = build.learned()
    first, second = build.probes
    assert (objective, best_step) == (second, 16)
    assert {row for batch in first.batches for row in batch} == set(range(80))
    # Two epochs were best, so the 100 rows are used twice.
    assert len(second.batches) == 20
    assert sorted(row for batch in second.batches for row in batch) == sorted([*range(100)] * 2)
    assert second.validated == []
    assert [len(data.training) for data in build.data] == [80, 100]


@pytest.mark.parametrize("changes", [{"refit": False}, {"regime": "tuned"}])
def test_other_settings_train_once(changes: dict[str, Any]) -> None:
    build = Learning()
    objective, _ = build.learned(**changes)
    (probe,) = build.probes
    assert objective is probe
    assert same(weights(probe), probe.validated[1])


def test_a_run_that_ended_in_the_second_training_resumes_there(tmp_path: Any) -> None:
    learned, states = data()
    wanted = train_settings(**DROPPING, checkpoint_every=2)

    def made(rows: LearningData) -> Objective:
        return new_objective("marc", states=states, data=rows, dim=wanted.dim, seed=0, train=wanted)

    def run(checkpoint: Checkpoint | None) -> dict[str, Tensor]:
        return weights(learn(made, learned, settings=wanted, seed=0, label="", checkpoint=checkpoint)[0])

    class EndsInSecond(Storage):
        def write(self, uri: str, data: bytes) -> None:
            super().write(uri, data)
            if uri.endswith(".whole"):
                raise Ended

    checkpoint = place(tmp_path)
    with pytest.raises(Ended):
        run(Checkpoint(EndsInSecond(), checkpoint.uri, checkpoint.key))
    assert (tmp_path / "checkpoint.whole").exists()
    assert same(run(checkpoint), run(None))


# Mistakes


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("call", [0, 5, 11])
def test_a_loss_that_is_not_finite_is_refused(loss: float, call: int) -> None:
    with pytest.raises(UserError, match=rf"not finite at step {call // 2}; lower train\.learning_rate"):
        train(Probe(losses=[*[0.0] * call, loss]), epochs=10, accumulate=2)


@pytest.mark.parametrize(
    ("system", "changes"),
    [
        ("mrl", {"learning_rate": 1e20, "batch": 4096, "warm_up": 0.0}),
        ("marc", {"learning_rate": 1e20, "batch": 4096, "warm_up": 0.0}),
        pytest.param("marc", {}, id="a holdout with one label"),
    ],
)
def test_a_validation_score_that_is_not_finite_is_refused(system: str, changes: dict[str, Any]) -> None:
    learned, states = data()
    wanted = train_settings(**changes)
    holdout = learned.holdout if changes else learned.holdout[torch.nonzero(learned.holdout.labels).squeeze(1)]
    objective = new_objective(system, states=states, data=learned, dim=6, seed=0, train=wanted)
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        fit(objective, training=learned.training, validation=holdout, settings=wanted, seed=0, label="")
    with pytest.raises(UserError, match="validation score is not finite"):
        train(Probe([math.nan] * 10), epochs=3)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_rows_are_refused(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} interactions are too few to train on"):
        train(Probe(), count=count)


# The rows of a step


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(100, 10, 1), (104, 10, 1), (97, 4, 3), (95, 10, 2)])
def test_an_epoch_uses_nearly_every_row_once_in_its_own_order(count: int, batch: int, accumulate: int) -> None:
    objective, epochs = Probe(), 3
    train(objective, count=count, batch=batch, accumulate=accumulate, epochs=epochs, validate_every=1)
    taken = list(itertools.chain.from_iterable(objective.batches))
    each = len(taken) // epochs
    assert count - batch * accumulate / 2 <= each <= count
    orders = [taken[epoch * each : (epoch + 1) * each] for epoch in range(epochs)]
    for order in orders:
        assert len(set(order)) == each
        assert order != sorted(order)
    assert len(set(map(tuple, orders))) == epochs
    assert max(map(len, objective.batches)) <= batch


def test_the_last_batch_has_at_least_half_the_size_and_few_rows_are_one_step() -> None:
    for count in range(20, 60):
        objective = Probe()
        train(objective, count=count, epochs=1)
        assert min(map(len, objective.batches)) >= 5
    objective = Probe()
    assert train(objective, count=4, epochs=2).step == 2
    assert [sorted(batch) for batch in objective.batches] == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(("count", "batch"), [(100, 2), (100, 3), (21, 6)])
def test_small_batches_are_possible(count: int, batch: int) -> None:
    objective = Probe()
    progress = train(objective, count=count, batch=batch, epochs=1, validate_every=1)
    assert progress.step == round(count / batch)
    assert count - batch / 2 <= sum(map(len, objective.batches)) <= count


def member(
    monkeypatch: pytest.MonkeyPatch, rank: int, world: int, **changes: Any
) -> tuple[list[list[int]], list[float]]:
    """Train as one process of a group; return its batches, and random numbers that it draws, as dropout would."""
    objective, draws = Probe(), list[float]()
    objective.register_forward_hook(lambda *_: draws.append(torch.rand(()).item()))
    with monkeypatch.context() as patch:
        patch.setattr(module, "place", lambda: (rank, world))
        patch.setattr(module, "DistributedDataParallel", lambda model, **_: model)
        train(objective, **changes)
    return objective.batches, draws


def test_dropout_depends_on_seed_process_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [member(monkeypatch, rank, 2, seed=seed, epochs=2)[1] for seed, rank in ((0, 0), (0, 1), (1, 0), (1, 0))]
    assert len(set(itertools.chain.from_iterable(runs))) == sum(map(len, runs[:3])) == 30
    assert runs[3] == runs[2]


def test_the_order_of_rows_depends_on_the_seed_and_is_shared_by_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [member(monkeypatch, 0, 1, seed=seed, epochs=1)[0] for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    alone = member(monkeypatch, 0, 1, batch=20, epochs=2)[0]
    first, second = (member(monkeypatch, rank, 2, batch=10, epochs=2)[0] for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in alone]


def test_all_processes_have_the_same_number_of_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, accumulate in itertools.product(range(20, 64), (1, 2, 3)):
        changes = {"count": count, "accumulate": accumulate, "epochs": 1}
        members = [member(monkeypatch, rank, 2, **changes)[0] for rank in (0, 1)]
        assert len(members[0]) == len(members[1]), changes


# Gradient accumulation


def test_two_accumulated_batches_equal_one_of_twice_the_size() -> None:
    # Without HSIC, which couples rows, so that the loss is a mean over rows.
    once, one = trained(count=1920, batch=128, epochs=1, **PLAIN)
    twice, two = trained(count=1920, batch=64, accumulate=2, epochs=1, **PLAIN)
    assert one.step == two.step == 15
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, atol=1e-4, rtol=1e-4)
    assert two.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("count", [115, 110])
def test_all_rows_of_a_short_last_step_have_the_same_weight(count: int) -> None:
    steps = []
    for batch, accumulate in ((20, 1), (10, 2)):
        gradients: list[float] = []
        objective = Probe()
        objective.weight.register_post_accumulate_grad_hook(
            lambda p, gradients=gradients: gradients.append(p.grad.item())
        )
        train(objective, count=count, batch=batch, accumulate=accumulate, epochs=1, learning_rate=1e-9)
        steps.append(gradients[-1])
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)


@pytest.mark.parametrize(("count", "steps"), [(128 + 66, 2), (5, 1), (128 + 64 + 5, 2)])
def test_every_part_of_a_short_step_is_large_enough_for_an_estimate(count: int, steps: int) -> None:
    _, progress = trained(count=count, batch=64, accumulate=2, epochs=1, estimator="unbiased")
    assert progress.step == steps


# Learning rates, and frozen parameters


class TunedProbe(Probe):
    """A probe with a source of states that has a parameter, as a tuned backbone has."""

    def __init__(self) -> None:
        super().__init__()
        self.source = ItemStates()
        self.source.shift = nn.Parameter(torch.ones(1))

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        terms = super().forward(batch)
        return {**terms, "loss": terms["loss"] + self.source.shift.square().mean()}


def test_learning_rates_warm_up_and_the_backbone_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step

    def recorded(optimiser: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append([group["lr"] for group in optimiser.param_groups])
        assert {group["weight_decay"] for group in optimiser.param_groups} == {0.03}
        return step(optimiser, *args, **kwargs)

    def of(objective: Probe, **changes: Any) -> np.ndarray:
        rates.clear()
        wanted = {"learning_rate": 0.08, "backbone_learning_rate": 0.004, "weight_decay": 0.03, "epochs": 1}
        train(objective, **wanted, **changes)
        return np.array(rates).T

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    shares = np.array([0.25, 0.5, 0.75, *[1.0] * 7])
    np.testing.assert_allclose(of(TunedProbe(), warm_up=0.4), [0.004 * shares, 0.08 * shares])
    np.testing.assert_allclose(of(Probe(), warm_up=0), [[0.08] * 10])
    # At most half of the steps warm up.
    np.testing.assert_allclose(of(Probe(), warm_up=0.5, max_steps=4), [[0.04, 0.08, 0.08, 0.08]])


def test_a_step_is_a_step_of_adamw() -> None:
    objective = Probe()
    train(objective, epochs=1, batch=100, learning_rate=0.05, weight_decay=0.1, warm_up=0)
    weight = torch.tensor([0.25]).requires_grad_()
    optimiser = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.1)
    torch.autograd.backward((weight - rows(100).labels).square().mean())
    optimiser.step()
    assert objective.weight.item() == pytest.approx(weight.item(), rel=1e-6)

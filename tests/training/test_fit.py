"""The training loop: its bits, its stops, its checkpoints; a process that is killed, and two that train together."""

import itertools
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clicks import learnable, train_settings
from marc_pipeline.errors import UserError
from marc_pipeline.evaluation.systems import build
from marc_pipeline.storage import Storage
from marc_pipeline.training import fit as module
from marc_pipeline.training.fit import Checkpoint, Progress, fit, learn
from marc_pipeline.training.learning import LearningData
from marc_pipeline.training.objective import Clicks, FrozenStates, ItemStates, Objective
from repository_paths import REPOSITORY

pytestmark = pytest.mark.usefixtures("one_thread")

State = dict[str, Tensor]
DROPPING: dict[str, Any] = {"dropout": 0.3, "keep": 0.5, "decouple": 0.1}
PLAIN: dict[str, Any] = {"dropout": 0.0, "keep": 0.0, "decouple": 0.0}


def rows(count: int) -> Clicks:
    """Rows whose item is their number; two of three are clicks."""
    nothing = torch.full((count, 1), -1)
    return Clicks(torch.arange(count), nothing, nothing, (torch.arange(count) % 3 > 0).float())


class Probe(Objective):
    """A weight that is pulled towards the labels' mean; validates as told, and writes down what happens to it."""

    def __init__(self, scores: Iterable[float] = (), *, losses: Iterable[float] = ()) -> None:
        super().__init__(FrozenStates(torch.zeros(1, 1)), nn.Linear(1, 1))
        nn.init.constant_(self.compressor.weight, 0.25)  # type: ignore[arg-type]
        self.scores = itertools.chain(scores, itertools.count(1))
        self.losses = itertools.chain(losses, itertools.repeat(0.0))
        self.batches: list[list[int]] = []
        self.seen: list[float] = []
        self.validated: list[State] = []

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        self.batches.append(batch.items.tolist())
        weight: Tensor = self.compressor.weight  # type: ignore[assignment]
        loss = (weight - batch.labels).square().mean() + next(self.losses)
        self.seen.append(loss.item())
        return {"loss": loss, "double": 2 * loss.detach()}

    def validate(self, batch: Clicks) -> float:
        self.validated.append(weights(self))
        return next(self.scores)


def weights(objective: nn.Module) -> State:
    return {name: value.clone() for name, value in objective.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def train(objective: Objective, *, count: int = 100, seed: int = 0, **changes: Any) -> Progress:
    wanted = train_settings(**{"batch": 10, "patience": 1000, **changes})
    return fit(objective, training=rows(count), validation=rows(8), settings=wanted, seed=seed, label="")


# MARC itself, on made-up clicks


@pytest.fixture(scope="module")
def data() -> tuple[LearningData, Any]:
    return learnable()


def trained(
    data: tuple[LearningData, Any],
    *,
    seed: int = 0,
    count: int | None = None,
    checkpoint: Checkpoint | None = None,
    prepare: Callable[[Objective], object] = lambda _: None,
    **changes: Any,
) -> tuple[State, Progress]:
    learned, states = data
    wanted = train_settings(**{**DROPPING, **changes})
    objective = build("marc", states=states, data=learned, dim=wanted.dim, seed=0, train=wanted)
    prepare(objective)
    training = learned.training if count is None else learned.training[torch.arange(count)]
    progress = fit(
        objective,
        training=training,
        validation=learned.holdout,
        settings=wanted,
        seed=seed,
        label="",
        checkpoint=checkpoint,
    )
    assert not any(part.training for part in objective.modules())
    return weights(objective), progress


def place(folder: Path, key: str = "run") -> Checkpoint:
    return Checkpoint(Storage(), str(folder / "checkpoint"), key)


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(data: tuple[LearningData, Any]) -> None:
    torch.manual_seed(1)
    first, progress = trained(data)
    torch.manual_seed(2)
    again, progress_again = trained(data)
    assert same(first, again)
    assert progress == progress_again


def test_another_seed_gives_other_weights(data: tuple[LearningData, Any]) -> None:
    assert not same(trained(data, seed=0)[0], trained(data, seed=1)[0])
    # By the order of rows alone, and by dropout alone.
    plain = [trained(data, seed=seed, **PLAIN)[0] for seed in (0, 1)]
    assert not same(*plain)


def test_training_learns_what_is_there_to_learn(data: tuple[LearningData, Any]) -> None:
    _, progress = trained(data, epochs=15, patience=15, keep=0.0)
    assert progress.best > 0.67
    assert progress.history[-1]["click"] < min(progress.history[0]["click"], math.log(2))


# When it stops, and with what


def test_early_stopping_leaves_the_weights_that_validated_best() -> None:
    objective = Probe([0.5, 0.7, 0.6, 0.65, 0.9])
    progress = train(objective, epochs=20, validate_every=3, patience=2)
    assert len(objective.validated) == 4  # two in a row were no better
    assert not same(objective.validated[1], objective.validated[3])
    assert same(weights(objective), objective.validated[1])
    assert (progress.step, progress.best, progress.best_step, progress.bad) == (12, 0.7, 6, 2)
    assert [row["validation_auc"] for row in progress.history] == [0.5, 0.7, 0.6, 0.65]


def test_without_validation_the_last_weights_stay() -> None:
    probe = Probe([0.9, 0.1])
    wanted = train_settings(batch=10, epochs=2, patience=1)
    progress = fit(probe, training=rows(100), validation=None, settings=wanted, seed=0, label="")
    assert (progress.step, progress.history, probe.validated) == (20, [], [])
    validated = Probe()
    train(validated, epochs=2)
    assert torch.equal(probe.compressor.weight, validated.compressor.weight)  # type: ignore[arg-type]


class Learning:
    """Builds probes and keeps them, with the data that each was built from."""

    def __init__(self, scores: list[float]) -> None:
        self.scores, self.probes, self.data = scores, list[Probe](), list[LearningData]()

    def __call__(self, data: LearningData) -> Probe:
        self.probes.append(Probe(self.scores))
        self.data.append(data)
        return self.probes[-1]


def held_out(count: int, *, holdout: int) -> LearningData:
    """So many rows, the last ones held out."""
    end = count - holdout
    return LearningData(rows=rows(count), raters=torch.zeros(count, dtype=torch.int64), end=end, start=end)


def test_every_row_is_learned_from_for_as_long_as_was_best() -> None:
    build, data = Learning([0.5, 0.9, 0.6, 0.6]), held_out(100, holdout=20)
    objective, progress = learn(build, data, settings=train_settings(batch=10, epochs=4), seed=0, label="")
    first, second = build.probes
    assert objective is second
    assert (progress.best_step, len(data.training)) == (16, 80)
    assert {row for batch in first.batches for row in batch} == set(range(80))
    # Two epochs were best: so many steps that 100 rows are seen twice.
    assert len(second.batches) == 20
    assert sorted(row for batch in second.batches for row in batch) == sorted([*range(100)] * 2)
    assert second.validated == []
    assert len(build.data[1].training) == 100  # what is fitted before the first step sees them as well


@pytest.mark.parametrize("changes", [{"refit": False}, {"regime": "tuned"}])
def test_one_training_may_be_all(changes: dict[str, Any]) -> None:
    build = Learning([0.5, 0.9, 0.6, 0.6])
    wanted = train_settings(batch=10, epochs=4, **changes)
    objective, _ = learn(build, held_out(100, holdout=20), settings=wanted, seed=0, label="")
    (probe,) = build.probes
    assert objective is probe
    assert same(weights(probe), probe.validated[1])


def test_a_run_ended_in_the_second_training_goes_on_there(data: tuple[LearningData, Any], tmp_path: Path) -> None:
    learned, states = data
    wanted = train_settings(**DROPPING, checkpoint_every=2)

    def made(rows: LearningData) -> Objective:
        return build("marc", states=states, data=rows, dim=wanted.dim, seed=0, train=wanted)

    def run(checkpoint: Checkpoint | None) -> State:
        return weights(learn(made, learned, settings=wanted, seed=0, label="", checkpoint=checkpoint)[0])

    undisturbed = run(None)
    checkpoint = place(tmp_path)
    second = Path(f"{checkpoint.uri}.whole")
    write = Storage.write

    def dying(storage: Storage, uri: str, data: bytes) -> None:
        write(storage, uri, data)
        if uri == str(second) and second.stat().st_size:
            raise Ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "write", dying)
        with pytest.raises(Ended):
            run(checkpoint)
    assert second.exists()
    assert same(run(checkpoint), undisturbed)


def test_an_equal_score_is_no_better() -> None:
    objective = Probe([0.5, 0.5, 0.5, 0.9])
    progress = train(objective, epochs=20, validate_every=2, patience=2)
    assert (progress.step, progress.best_step) == (6, 2)
    assert same(weights(objective), objective.validated[0])


def test_patience_begins_anew_with_every_better_score() -> None:
    objective = Probe([0.5, 0.4, 0.6, 0.5, 0.7, 0.1, 0.2, 0.9])
    progress = train(objective, epochs=20, validate_every=1, patience=2)
    assert (progress.step, progress.best_step) == (7, 5)


@pytest.mark.parametrize("max_steps", [1, 7, 10, 13])
def test_training_ends_after_max_steps_with_a_validation(max_steps: int) -> None:
    objective = Probe()
    progress = train(objective, epochs=3, max_steps=max_steps)
    assert progress.step == len(objective.batches) == max_steps
    assert [row["step"] for row in progress.history] == [*range(10, max_steps, 10), max_steps]
    assert progress.history[-1]["epoch"] == pytest.approx(max_steps / 10)


def test_more_max_steps_than_the_epochs_have_change_nothing() -> None:
    assert train(Probe(), epochs=3, max_steps=1000).step == train(Probe(), epochs=3).step == 30


def test_history_holds_the_means_since_the_validation_before() -> None:
    objective = Probe()
    progress = train(objective, epochs=2, validate_every=4, accumulate=2)
    for number, row in enumerate(progress.history):
        expected = np.mean(objective.seen[number * 8 : number * 8 + 8])
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["double"] == pytest.approx(2 * expected, rel=1e-5)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
@pytest.mark.parametrize("call", [0, 5, 11])
def test_a_loss_that_is_not_finite_is_the_users_mistake(loss: float, call: int) -> None:
    with pytest.raises(UserError, match=rf"not finite at step {call // 2}; lower train\.learning_rate"):
        train(Probe(losses=[*[0.0] * call, loss]), epochs=10, accumulate=2)


@pytest.mark.parametrize("system", ["mrl", "marc"])
def test_weights_that_are_not_finite_are_the_users_mistake_as_well(data: tuple[LearningData, Any], system: str) -> None:
    learned, states = data
    wanted = train_settings(learning_rate=1e20, batch=4096, warm_up=0)
    objective = build(system, states=states, data=learned, dim=6, seed=0, train=wanted)
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        fit(objective, training=learned.training, validation=learned.holdout, settings=wanted, seed=0, label="")


def test_a_score_that_is_no_number_does_not_pass_for_a_bad_one() -> None:
    with pytest.raises(UserError):
        train(Probe([math.nan] * 10), epochs=3)


def test_a_holdout_of_one_label_is_the_users_mistake(data: tuple[LearningData, Any]) -> None:
    learned, states = data
    clicks = learned.holdout[torch.nonzero(learned.holdout.labels).squeeze(1)]
    objective = build("marc", states=states, data=learned, dim=6, seed=0, train=train_settings())
    with pytest.raises(UserError):
        fit(objective, training=learned.training, validation=clicks, settings=train_settings(), seed=0, label="")


def drawn(monkeypatch: pytest.MonkeyPatch, *, seed: int, rank: int) -> list[float]:
    """What a member draws from torch's generator, as dropout would, step by step."""
    objective, found = Probe(), list[float]()
    objective.register_forward_hook(lambda *_: found.append(torch.rand(()).item()))
    with monkeypatch.context() as patch:
        patch.setattr(module, "place", lambda: (rank, 2))
        patch.setattr(module, "DistributedDataParallel", lambda model, **_: model)
        train(objective, seed=seed, epochs=2)
    return found


def test_what_is_dropped_hangs_on_seed_member_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [drawn(monkeypatch, seed=seed, rank=rank) for seed, rank in ((0, 0), (0, 1), (1, 0))]
    assert len(set(itertools.chain.from_iterable(runs))) == sum(map(len, runs)) == 30
    assert drawn(monkeypatch, seed=1, rank=0) == runs[2]


# Which rows a step takes


@pytest.mark.parametrize(("count", "batch", "accumulate"), [(100, 10, 1), (104, 10, 1), (97, 4, 3), (95, 10, 2)])
def test_an_epoch_takes_nearly_every_row_once_in_an_order_of_its_own(count: int, batch: int, accumulate: int) -> None:
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


def test_a_last_batch_is_full_by_half_or_more() -> None:
    for count in range(20, 60):
        objective = Probe()
        train(objective, count=count, epochs=1)
        assert min(map(len, objective.batches)) >= 5


def test_fewer_rows_than_a_batch_are_one_step() -> None:
    objective = Probe()
    assert train(objective, count=4, epochs=2).step == 2
    assert [sorted(batch) for batch in objective.batches] == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_next_to_no_rows_are_the_users_mistake(count: int) -> None:
    with pytest.raises(UserError, match=f"{count} interactions are too few to train on"):
        train(Probe(), count=count)


@pytest.mark.parametrize(("count", "batch"), [(100, 2), (100, 3), (21, 6)])
def test_the_smallest_batches_are_trained_on(count: int, batch: int) -> None:
    objective = Probe()
    progress = train(objective, count=count, batch=batch, epochs=1, validate_every=1)
    assert progress.step == round(count / batch)
    assert count - batch / 2 <= sum(map(len, objective.batches)) <= count


def test_the_order_of_rows_hangs_on_the_seed_alone() -> None:
    orders = []
    for seed in (3, 3, 4):
        objective = Probe()
        train(objective, seed=seed, epochs=1)
        orders.append(objective.batches)
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_are_permuted_once_per_epoch_and_a_resumed_run_takes_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accumulate: int
) -> None:
    keys: list[list[int]] = []
    default_rng = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda key: (keys.append(key), default_rng(key))[1])
    wanted = train_settings(batch=10 // accumulate, accumulate=accumulate, epochs=3, patience=100, checkpoint_every=4)

    def batches(checkpoint: Checkpoint | None, calls: int = 0) -> list[list[int]]:
        keys.clear()
        probe = Probe()
        ending(calls)(probe)
        with suppress(Ended):
            fit(probe, training=rows(100), validation=rows(8), settings=wanted, seed=5, label="", checkpoint=checkpoint)
        return probe.batches

    whole, epoch = batches(None), 10 * accumulate
    assert keys == [[5, 0], [5, 1], [5, 2]]
    for start in range(0, 3 * epoch, epoch):
        assert sorted(itertools.chain.from_iterable(whole[start : start + epoch])) == list(range(100))
    # Ended in the second epoch, in the step after next from the checkpoint of step 16.
    assert batches(place(tmp_path), calls=17 * accumulate + 1) == whole[: 17 * accumulate]
    assert batches(place(tmp_path)) == whole[16 * accumulate :]
    assert keys == [[5, 1], [5, 2]]


def member_batches(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, **changes: Any) -> list[list[int]]:
    """Rows that one member of a group takes."""
    objective = Probe()
    with monkeypatch.context() as patch:
        patch.setattr(module, "place", lambda: (rank, world))
        patch.setattr(module, "DistributedDataParallel", lambda model, **_: model)
        train(objective, **changes)
    return objective.batches


def test_members_of_a_group_share_a_batch_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = member_batches(monkeypatch, 0, 1, batch=20, epochs=2)
    first, second = (member_batches(monkeypatch, rank, 2, batch=10, epochs=2) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(batch) for batch in alone]


def test_members_of_a_group_go_backward_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, accumulate in itertools.product(range(20, 64), (1, 2, 3)):
        changes = {"count": count, "accumulate": accumulate, "epochs": 1}
        members = [member_batches(monkeypatch, rank, 2, **changes) for rank in (0, 1)]
        assert len(members[0]) == len(members[1]), changes


# Gradient accumulation


def test_two_accumulated_batches_are_one_of_twice_the_size(data: tuple[LearningData, Any]) -> None:
    # A plain mean: with HSIC, which couples rows, it would not be so.
    once, one = trained(data, count=1920, batch=128, epochs=1, **PLAIN)
    twice, two = trained(data, count=1920, batch=64, accumulate=2, epochs=1, **PLAIN)
    assert one.step == two.step == 15
    for name, value in once.items():
        torch.testing.assert_close(twice[name], value, atol=1e-4, rtol=1e-4)
    assert two.history[-1]["loss"] == pytest.approx(one.history[-1]["loss"], rel=1e-4)


@pytest.mark.parametrize("count", [115, 110])
def test_a_short_last_step_weighs_its_rows_alike(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    steps = []
    for batch, accumulate in ((20, 1), (10, 2)):
        gradients: list[float] = []
        objective = Probe()
        objective.compressor.weight.register_post_accumulate_grad_hook(  # type: ignore[operator]
            lambda p, gradients=gradients: gradients.append(p.grad.item())
        )
        train(objective, count=count, batch=batch, accumulate=accumulate, epochs=1, learning_rate=1e-9)
        steps.append(gradients[-1])
    assert steps[1] == pytest.approx(steps[0], rel=1e-4)


@pytest.mark.parametrize(("count", "steps"), [(128 + 66, 2), (5, 1), (128 + 64 + 5, 2)])
def test_no_part_of_a_short_step_is_too_small_for_an_estimate(
    data: tuple[LearningData, Any], count: int, steps: int
) -> None:
    _, progress = trained(data, count=count, batch=64, accumulate=2, epochs=1, estimator="unbiased")
    assert progress.step == steps


# Rates, and what is not trained


class Learned(ItemStates):
    """States that are parameters themselves, as a tuned backbone's are."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))

    def all_states(self) -> Tensor:
        return self.shift.expand(1, 1)


class TunedProbe(Probe):
    def __init__(self) -> None:
        super().__init__()
        self.source = Learned()

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        terms = super().forward(batch)
        return {**terms, "loss": terms["loss"] + (self.source.all_states() ** 2).mean()}


def test_rates_warm_up_and_the_backbone_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step

    def recorded(optimiser: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        rates.append([group["lr"] for group in optimiser.param_groups])
        assert {group["weight_decay"] for group in optimiser.param_groups} == {0.03}
        return step(optimiser, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    wanted: dict[str, Any] = {
        "learning_rate": 0.08,
        "backbone_learning_rate": 0.004,
        "weight_decay": 0.03,
        "warm_up": 4,
    }
    train(TunedProbe(), epochs=1, **wanted)
    shares = [0.25, 0.5, 0.75, *[1.0] * 7]
    assert [own for own, _ in rates] == pytest.approx([0.08 * share for share in shares])
    assert [tuned for _, tuned in rates] == pytest.approx([0.004 * share for share in shares])
    rates.clear()
    train(Probe(), epochs=1, **{**wanted, "warm_up": 0})
    assert [own for (own,) in rates] == pytest.approx([0.08] * 10)
    rates.clear()
    train(Probe(), epochs=1, max_steps=4, **{**wanted, "warm_up": 8})
    assert [own for (own,) in rates] == pytest.approx([0.04, 0.08, 0.08, 0.08])  # never more warm-up than half


def test_a_step_is_one_of_adamw(data: tuple[LearningData, Any]) -> None:
    objective = Probe()
    train(objective, epochs=1, batch=100, learning_rate=0.05, weight_decay=0.1, warm_up=0)
    weight = torch.tensor([0.25]).requires_grad_()
    optimiser = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.1)
    torch.autograd.backward((weight - rows(100).labels).square().mean())
    optimiser.step()
    assert objective.compressor.weight.item() == pytest.approx(weight.item(), rel=1e-6)  # type: ignore[operator]


class PartlyFrozen(Probe):
    """A large parameter that takes part in the loss and needs no gradient, beside one that does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(50_000, generator=generator), requires_grad=False)
        self.free = nn.Parameter(torch.randn(500, generator=generator))

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        terms = super().forward(batch)
        return {"loss": terms["loss"] + self.frozen.mean() * self.free.square().mean()}


def test_frozen_parameters_neither_move_nor_enter_checkpoints(tmp_path: Path) -> None:
    objective = PartlyFrozen()
    before = weights(objective)
    wanted = train_settings(batch=10, epochs=1, weight_decay=0.5, checkpoint_every=10)
    fit(
        objective,
        training=rows(100),
        validation=rows(8),
        settings=wanted,
        seed=0,
        label="",
        checkpoint=place(tmp_path),
    )
    assert torch.equal(objective.frozen, before["frozen"])
    assert not torch.equal(objective.free, before["free"])
    written = (tmp_path / "checkpoint").read_bytes()
    assert objective.free.detach().numpy().tobytes() in written
    assert before["frozen"].numpy().tobytes() not in written
    assert len(written) < 50_000


# Checkpoints


class Ended(Exception):
    pass


def ending(calls: int) -> Callable[[Objective], object]:
    """Makes an objective fail in its so many-th batch."""
    left = itertools.count(1)

    def end(*_: object) -> None:
        if next(left) == calls:
            raise Ended

    return lambda objective: objective.register_forward_pre_hook(end)


def test_a_run_that_was_ended_in_the_middle_goes_on_as_if_it_had_not_been(
    data: tuple[LearningData, Any], tmp_path: Path
) -> None:
    wanted: dict[str, Any] = {"epochs": 3, "validate_every": 4, "checkpoint_every": 3, "patience": 100, "warm_up": 12}
    undisturbed, progress = trained(data, **wanted)
    # The last checkpoint is older than the end: what came after it is done again.
    for calls, done in ((2, 0), (12, 9), (20, 27), (1, 27)):
        with pytest.raises(Ended):
            trained(data, checkpoint=place(tmp_path), prepare=ending(calls), **wanted)
        assert (tmp_path / "checkpoint").exists() == (done > 0)
    counted: list[int] = []
    again, resumed = trained(
        data,
        checkpoint=place(tmp_path),
        **wanted,
        prepare=lambda objective: objective.register_forward_hook(lambda *_: counted.append(1)),
    )
    assert len(counted) == progress.step - 27
    assert same(again, undisturbed)
    assert resumed == progress


def test_a_run_with_accumulated_batches_goes_on_likewise(data: tuple[LearningData, Any], tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"batch": 32, "accumulate": 4, "checkpoint_every": 3, "epochs": 1}
    undisturbed, progress = trained(data, **wanted)
    with pytest.raises(Ended):
        trained(data, checkpoint=place(tmp_path), prepare=ending(31), **wanted)  # in the third part of a step
    again, resumed = trained(data, checkpoint=place(tmp_path), **wanted)
    assert same(again, undisturbed)
    assert resumed == progress


def test_checkpoints_change_nothing(data: tuple[LearningData, Any], tmp_path: Path) -> None:
    plain, progress = trained(data)
    kept, with_checkpoints = trained(data, checkpoint=place(tmp_path), checkpoint_every=1)
    assert same(plain, kept)
    assert progress == with_checkpoints


def test_a_run_that_had_stopped_early_stays_stopped(data: tuple[LearningData, Any], tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"epochs": 40, "validate_every": 1, "checkpoint_every": 1, "patience": 2}
    first, progress = trained(data, checkpoint=place(tmp_path), **wanted)
    assert progress.bad == 2
    calls: list[int] = []
    again, resumed = trained(
        data,
        checkpoint=place(tmp_path),
        **wanted,
        prepare=lambda objective: objective.register_forward_hook(lambda *_: calls.append(1)),
    )
    assert not calls
    assert same(first, again)
    assert resumed == progress


@pytest.mark.parametrize(("key", "format_"), [("another run", module.CHECKPOINT_FORMAT), ("run", 1)])
def test_the_checkpoint_of_another_run_or_format_is_left_aside(
    data: tuple[LearningData, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, format_: int
) -> None:
    undisturbed, progress = trained(data, checkpoint_every=3)
    monkeypatch.setattr(module, "CHECKPOINT_FORMAT", format_)
    with pytest.raises(Ended):
        trained(data, seed=5, checkpoint=place(tmp_path, key), prepare=ending(8), checkpoint_every=3)
    monkeypatch.undo()
    found, own = trained(data, checkpoint=place(tmp_path), checkpoint_every=3)
    assert same(found, undisturbed)
    assert own == progress


def flipped(data: bytes, share: float) -> bytes:
    at = round(len(data) * share)
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda _: b"no checkpoint", id="another file"),
        pytest.param(lambda _: b"hello" * 100, id="another long file"),
        pytest.param(lambda _: b"", id="empty"),
    ],
)
def test_a_broken_checkpoint_is_left_aside(
    data: tuple[LearningData, Any], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    wanted: dict[str, Any] = {"checkpoint_every": 3, "epochs": 1}
    undisturbed, _ = trained(data, **wanted)
    with pytest.raises(Ended):
        trained(data, checkpoint=place(tmp_path), prepare=ending(8), **wanted)
    path = tmp_path / "checkpoint"
    path.write_bytes(damage(path.read_bytes()))
    assert same(trained(data, checkpoint=place(tmp_path), **wanted)[0], undisturbed)


def test_a_checkpoint_with_a_flipped_bit_is_left_aside(data: tuple[LearningData, Any], tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"checkpoint_every": 3, "epochs": 1}
    undisturbed, _ = trained(data, **wanted)
    with pytest.raises(Ended):
        trained(data, checkpoint=place(tmp_path), prepare=ending(8), **wanted)
    path = tmp_path / "checkpoint"
    whole = path.read_bytes()
    for share in np.linspace(0.01, 0.99, 11):
        path.write_bytes(flipped(whole, share))
        assert same(trained(data, checkpoint=place(tmp_path), **wanted)[0], undisturbed), share


# A process that is killed

LONG: dict[str, Any] = {**DROPPING, "epochs": 5, "validate_every": 7, "checkpoint_every": 3, "patience": 100}
RUN = """
import json, sys, time
import torch
from clicks import learnable, train_settings
from marc_pipeline.training.fit import Checkpoint, fit
from marc_pipeline.evaluation.systems import build
from marc_pipeline.storage import Storage

torch.set_num_threads(1)
uri, out, wanted = sys.argv[1], sys.argv[2], train_settings(**json.loads(sys.argv[3]))
data, states = learnable()
objective = build("marc", states=states, data=data, dim=wanted.dim, seed=0, train=wanted)
calls = []
def slowly(*_):
    calls.append(1)
    time.sleep(0.01)
objective.register_forward_hook(slowly)
sys.stdin.readline()
progress = fit(
    objective, training=data.training, validation=data.holdout, settings=wanted, seed=0, label="",
    checkpoint=Checkpoint(Storage(), uri, "run"),
)
torch.save({"state": objective.state_dict(), "history": progress.history, "calls": len(calls)}, out)
"""


Process = subprocess.Popen[bytes]


@contextmanager
def started(script: str, *arguments: object, **variables: str) -> Iterator[Process]:
    """A process of its own, which is gone afterwards whatever happens."""
    paths = os.pathsep.join([str(REPOSITORY / folder) for folder in ("pipeline", "schemas", "tests/fixtures")])
    command = [sys.executable, "-c", script, *map(str, arguments)]
    variables = {**os.environ, "PYTHONPATH": paths, **variables}
    with subprocess.Popen(command, env=variables, stdin=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def version(path: Path) -> tuple[int, int] | None:
    if not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def wait_for_checkpoints(process: Process, path: Path, count: int) -> None:
    """Until the process has written so many."""
    before, seen, deadline = version(path), 0, time.monotonic() + 100
    while seen < count:
        assert process.poll() is None, "the process has ended before it could be killed"
        assert time.monotonic() < deadline
        if (now := version(path)) != before:
            before, seen = now, seen + 1
        time.sleep(0.001)


def go(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


@pytest.mark.slow
def test_a_run_that_was_killed_three_times_ends_with_the_bits_of_one_that_was_not(
    data: tuple[LearningData, Any], tmp_path: Path
) -> None:
    chance, path, out = random.Random(0), tmp_path / "checkpoint", tmp_path / "out"  # noqa: S311
    with ExitStack() as stack:
        # Their imports take the most time: all at once, before each begins when it is told to.
        *killed, last = [stack.enter_context(started(RUN, path, out, json.dumps(LONG))) for _ in range(4)]
        undisturbed, progress = trained(data, **LONG)
        for process in killed:
            go(process)
            wait_for_checkpoints(process, path, chance.randint(1, 5))
            time.sleep(chance.uniform(0, 0.06))  # some step, somewhere in it
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert not out.exists()
        go(last)
        assert last.wait() == 0
    found = torch.load(out)
    assert 0 < found["calls"] < progress.step - 3
    assert found["history"] == progress.history
    assert same(found["state"], undisturbed)


# Two processes

GROUP: dict[str, dict[str, Any]] = {
    "plain": {**PLAIN, "batch": 64, "epochs": 1},
    "dropping": {**DROPPING, "batch": 64, "checkpoint_every": 3},
    "short": {**PLAIN, "batch": 50, "epochs": 1, "accumulate": 2},
}
MEMBER = """
import json, sys
from contextlib import suppress
import torch
from clicks import learnable, train_settings
from marc_pipeline.training.distributed import place, process_group
from marc_pipeline.training.fit import Checkpoint, fit
from marc_pipeline.evaluation.systems import build
from marc_pipeline.storage import Storage

torch.set_num_threads(1)
folder, GROUP, found = sys.argv[1], json.loads(sys.argv[2]), {}
data, states = learnable()
assert place() == (0, 1)
with process_group():
    rank, world = place()
    def train(changes, checkpoint=None, calls=None):
        wanted = train_settings(**changes)
        # Members begin differently: the first one's weights are to count.
        objective = build("marc", states=states, data=data, dim=wanted.dim, seed=rank, train=wanted)
        training = data.training[torch.arange(1920)]
        left = iter(range(1, 1000))
        def end(*_):
            if next(left) == calls:
                raise KeyError
        objective.register_forward_pre_hook(end)
        progress = fit(
            objective, training=training, validation=data.holdout, settings=wanted, seed=0, checkpoint=checkpoint,
        )
        torch.distributed.barrier()
        return objective.state_dict(), progress.step, progress.history
    for name, changes in GROUP.items():
        found[name] = train(changes)
    checkpoint = Checkpoint(Storage(), f"{folder}/checkpoint", "run")
    with suppress(KeyError):
        train(GROUP["dropping"], checkpoint, calls=8)
    torch.distributed.barrier()
    found["resumed"] = train(GROUP["dropping"], checkpoint)
assert place() == (0, 1)
torch.save(found, f"{folder}/member-{rank}")
"""


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[State, int, list[dict[str, float]]]]]:
    """What two processes that trained as a group ended with."""
    folder = tmp_path_factory.mktemp("group")
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(started(MEMBER, folder, json.dumps(GROUP), RANK=str(rank), **shared)) for rank in (0, 1)
        ]
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    return [torch.load(folder / f"member-{rank}") for rank in (0, 1)]


@pytest.mark.parametrize("name", [*GROUP, "resumed"])
def test_members_of_a_group_end_with_the_same_weights(members: list[Any], name: str) -> None:
    (one, step, _), (other, other_step, _) = (member[name] for member in members)
    assert same(one, other)
    assert step == other_step > 0


def test_two_members_are_one_process_with_batches_twice_as_large(
    data: tuple[LearningData, Any], members: list[Any]
) -> None:
    found, step, history = members[0]["plain"]
    alone, progress = trained(data, count=1920, **{**GROUP["plain"], "batch": 128})
    assert step == progress.step
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    assert history[-1]["validation_auc"] == pytest.approx(progress.history[-1]["validation_auc"], abs=1e-4)


def test_a_group_that_goes_on_from_a_checkpoint_ends_with_the_bits_of_one_that_did_not_stop(members: list[Any]) -> None:
    (undisturbed, step, _), (resumed, resumed_step, _) = members[0]["dropping"], members[0]["resumed"]
    assert step == resumed_step
    assert same(undisturbed, resumed)

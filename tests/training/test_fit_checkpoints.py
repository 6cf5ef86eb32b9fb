"""Checkpoints of the training loop: an ended run resumes with identical bits, and damaged checkpoints are ignored."""

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clicks import train_settings
from fit_probe import Ended, Probe, ending, place, rows, same, train, trained, weights
from marc_pipeline.training import fit as module
from marc_pipeline.training.fit import Checkpoint, fit
from marc_pipeline.training.objective import Clicks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_has_the_same_batches_and_permutes_rows_once_per_epoch(
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
    # Ended in the second epoch, two steps after the checkpoint of step 16.
    assert batches(place(tmp_path), calls=17 * accumulate + 1) == whole[: 17 * accumulate]
    assert batches(place(tmp_path)) == whole[16 * accumulate :]
    assert keys == [[5, 1], [5, 2]]


def counted(calls: list[int]) -> Callable[[nn.Module], object]:
    return lambda objective: objective.register_forward_hook(lambda *_: calls.append(1))


MIDDLE: dict[str, Any] = {"epochs": 3, "validate_every": 4, "checkpoint_every": 3, "patience": 100, "warm_up": 0.4}


@pytest.mark.parametrize(
    ("wanted", "ends"),
    [
        # A run ends after a checkpoint, so that some steps are done again.
        pytest.param(MIDDLE, ((2, 0), (12, 9), (20, 27), (1, 27)), id="several ends"),
        pytest.param(
            {"batch": 32, "accumulate": 4, "checkpoint_every": 3, "epochs": 1}, ((31, 6),), id="within a step of parts"
        ),
    ],
)
def test_an_ended_run_resumes_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, wanted: dict[str, Any], ends: tuple[tuple[int, int], ...]
) -> None:
    undisturbed, progress = trained(**wanted)
    for calls, done in ends:
        with pytest.raises(Ended):
            trained(checkpoint=place(tmp_path), prepare=ending(calls), **wanted)
        assert (tmp_path / "checkpoint").exists() == (done > 0)
    calls_again: list[int] = []
    again, resumed = trained(checkpoint=place(tmp_path), prepare=counted(calls_again), **wanted)
    assert len(calls_again) == (progress.step - ends[-1][1]) * wanted.get("accumulate", 1)
    assert same(again, undisturbed)
    assert resumed == progress


def test_checkpoints_do_not_change_the_weights_and_a_finished_run_stays_finished(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"epochs": 40, "validate_every": 1, "patience": 2}
    plain, progress = trained(**wanted)
    kept, with_checkpoints = trained(checkpoint=place(tmp_path), checkpoint_every=1, **wanted)
    calls: list[int] = []
    again, resumed = trained(checkpoint=place(tmp_path), checkpoint_every=1, prepare=counted(calls), **wanted)
    assert (progress.bad, calls) == (2, [])
    assert same(plain, kept)
    assert same(kept, again)
    assert progress == with_checkpoints == resumed


@pytest.mark.parametrize(("key", "format_"), [("another run", module.CHECKPOINT_FORMAT), ("run", 1)])
def test_the_checkpoint_of_another_run_or_format_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, format_: int
) -> None:
    undisturbed, progress = trained(checkpoint_every=3)
    monkeypatch.setattr(module, "CHECKPOINT_FORMAT", format_)
    with pytest.raises(Ended):
        trained(seed=5, checkpoint=place(tmp_path, key), prepare=ending(8), checkpoint_every=3)
    monkeypatch.undo()
    found, own = trained(checkpoint=place(tmp_path), checkpoint_every=3)
    assert same(found, undisturbed)
    assert own == progress


def test_a_damaged_checkpoint_is_ignored(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"checkpoint_every": 3, "epochs": 1}
    undisturbed, _ = trained(**wanted)
    with pytest.raises(Ended):
        trained(checkpoint=place(tmp_path), prepare=ending(8), **wanted)
    path = tmp_path / "checkpoint"
    whole = path.read_bytes()
    places = [round(len(whole) * share) for share in np.linspace(0.01, 0.99, 11)]
    flipped = [whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :] for at in places]
    for damaged in (whole[: len(whole) // 2], b"no checkpoint", b"hello" * 100, b"", *flipped):
        path.write_bytes(damaged)
        assert same(trained(checkpoint=place(tmp_path), **wanted)[0], undisturbed)


class PartlyFrozen(Probe):
    """A probe with a large frozen parameter and a trained one in the loss."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(50_000, generator=generator), requires_grad=False)
        self.free = nn.Parameter(torch.randn(500, generator=generator))

    def forward(self, batch: Clicks) -> dict[str, Tensor]:
        terms = super().forward(batch)
        return {"loss": terms["loss"] + self.frozen.mean() * self.free.square().mean()}


def test_frozen_parameters_neither_change_nor_enter_checkpoints(tmp_path: Path) -> None:
    objective = PartlyFrozen()
    before = weights(objective)
    train(objective, epochs=1, weight_decay=0.5, checkpoint_every=10, checkpoint=place(tmp_path))
    assert torch.equal(objective.frozen, before["frozen"])
    assert not torch.equal(objective.free, before["free"])
    written = (tmp_path / "checkpoint").read_bytes()
    assert objective.free.detach().numpy().tobytes() in written
    assert before["frozen"].numpy().tobytes() not in written
    assert len(written) < 50_000

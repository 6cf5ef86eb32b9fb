"""The training loop: AdamW, warm-up, early stopping, and checkpoints from which a killed run goes on exactly."""

import hashlib
import io
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LinearLR

from marc_pipeline.config import TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.storage import Storage
from marc_pipeline.training.distributed import place
from marc_pipeline.training.learning import LearningData
from marc_pipeline.training.objective import Clicks, Objective

PROGRESS_SECONDS = 10.0
DIGEST_BYTES = hashlib.sha256().digest_size
CHECKPOINT_FORMAT = 2
"""A checkpoint of another format is not resumed."""

LEAST_ROWS = 4
"""What the unbiased HSIC needs."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Where a run leaves its state, and what run it is: another run's checkpoint is not resumed."""

    storage: Storage
    uri: str
    key: str


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: optimiser steps done.
        best: validation score of the best state; best_step: when.
        bad: validations since then.
        history: one row per validation: epoch, step, mean of every loss term since the last one, validation score.
    """

    step: int = 0
    best: float = -np.inf
    best_step: int = 0
    bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    objective: Objective,
    *,
    training: Clicks,
    validation: Clicks | None,
    settings: TrainSettings,
    seed: int,
    label: str = "train",
    checkpoint: Checkpoint | None = None,
) -> Progress:
    """Train an objective and leave it with the weights that validated best, or with the last ones.

    The same arguments give the same weights, bit for bit, on the same machine with the same number of threads, whether
    or not the run was killed and resumed. With several processes (torch.distributed) every one takes its share of each
    batch and gradients are averaged.

    Args:
        objective: what to train; parameters that need no gradient stay as they are.
        training: interactions to learn from.
        validation: later ones, for early stopping; None to train to the end and keep the last weights.
        settings: optimiser, batch, epochs, patience.
        seed: of batches and dropout.
        label: of the log lines; empty for silence.
        checkpoint: where to leave the state; None for short runs.

    Raises:
        UserError: the loss or the validation score is not finite, or there is next to nothing to learn from.
    """
    rank, world = place()
    if len(training) < LEAST_ROWS * world:
        raise UserError(f"{len(training)} interactions are too few to train on; {LEAST_ROWS * world} are the least")
    device = next(objective.parameters()).device
    training, validation = training.to(device), validation and validation.to(device)
    model: nn.Module = objective
    if world > 1:
        # Buffers hold the states of all items and every member's own bank: nothing to send round at every step.
        model = DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
    optimiser = torch.optim.AdamW(_groups(objective, settings), weight_decay=settings.weight_decay)
    # A state is what training changes: frozen weights are not written again and again.
    steps = _steps(len(training), settings, seed=seed, rank=rank, world=world)
    run = _Run(objective, optimiser, _warm_up(optimiser, settings, steps.total), Progress(), _state(objective))
    if checkpoint is not None:
        run.resume(checkpoint)
    progress = run.progress
    every = settings.validate_every or steps.per_epoch
    objective.train()
    reported = time.monotonic()
    while progress.step < steps.total and progress.bad < settings.patience:
        # Anew every step: a resumed run drops out likewise, on every member and device.
        torch.manual_seed(int(np.random.SeedSequence([seed, progress.step, rank]).generate_state(1, np.uint64)[0]))
        run.step(model, training, steps.rows(progress.step))
        if validation is not None and (progress.step % every == 0 or progress.step == steps.total):
            run.validated(objective.validate(validation), epoch=progress.step / steps.per_epoch)
            if label and rank == 0:
                _log_row(label, progress.history[-1], steps.total)
        elif label and rank == 0 and time.monotonic() - reported > PROGRESS_SECONDS:
            reported = time.monotonic()
            log.info("%s: step %d of at most %d, loss %.4f", label, progress.step, steps.total, run.loss)
        if checkpoint is not None and rank == 0 and progress.step % settings.checkpoint_every == 0:
            run.save(checkpoint)
    if validation is not None:
        _load(objective, run.best)
    objective.eval()
    return progress


def learn(
    build: Callable[[LearningData], Objective],
    data: LearningData,
    *,
    settings: TrainSettings,
    seed: int,
    label: str = "train",
    checkpoint: Checkpoint | None = None,
) -> tuple[Objective, Progress]:
    """Train with early stopping; then, in the frozen regime, anew on every row for as long as was best.

    The latest rows say most about what comes next: they choose the number of steps, and are then learned from.

    Args:
        build: makes the objective with its first weights from what it may learn from.
        data: rows to train on and rows held out.
        settings: as for :func:`fit`.
        seed: as for :func:`fit`.
        label: as for :func:`fit`.
        checkpoint: as for :func:`fit`; the second training leaves its own beside it.

    Returns:
        The trained objective; and how the training with early stopping went.
    """
    objective = build(data)
    progress = fit(
        objective,
        training=data.training,
        validation=data.holdout,
        settings=settings,
        seed=seed,
        label=label,
        checkpoint=checkpoint,
    )
    if not settings.ends_on_every_row:
        return objective, progress
    whole = data.whole()
    steps = max(1, round(progress.best_step * len(whole.training) / len(data.training)))
    if label and place()[0] == 0:
        log.info("%s: once more, %d steps on all %s interactions", label, steps, f"{len(whole.training):,}")
    objective = build(whole)
    fit(
        objective,
        training=whole.training,
        validation=None,
        settings=settings.model_copy(update={"max_steps": steps}),
        seed=seed,
        label=label,
        checkpoint=checkpoint and replace(checkpoint, uri=f"{checkpoint.uri}.whole"),
    )
    return objective, progress


class _EpochOrder:
    """The order of the rows in an epoch: permuted once per epoch, from the seed and the number of the epoch alone.

    A resumed run therefore takes the same batches, without replaying the epochs before.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __call__(self, epoch: int) -> NDArray[np.int64]:
        """Every row once, [rows]."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._rows)
        return self._order


@dataclass(frozen=True)
class _Steps:
    """Which rows a step takes on this member of the group."""

    order: _EpochOrder
    batch: int
    accumulate: int
    per_epoch: int
    total: int
    rank: int
    world: int

    def rows(self, step: int) -> list[Tensor]:
        """Row numbers of each part; the parts have about one size, and every member has as many parts.

        A member with fewer parts would leave the others waiting. A short step has fewer parts, so that HSIC can be
        estimated on each.
        """
        epoch, place = divmod(step, self.per_epoch)
        size = self.batch * self.world * self.accumulate
        chosen = self.order(epoch)[place * size : (place + 1) * size]
        own = chosen[: len(chosen) // self.world * self.world][self.rank :: self.world]
        parts = max(1, min(self.accumulate, len(own) // LEAST_ROWS))
        return [torch.from_numpy(part.copy()) for part in np.array_split(own, parts)]


def _steps(rows: int, settings: TrainSettings, *, seed: int, rank: int, world: int) -> _Steps:
    size = settings.batch * world * settings.accumulate
    # The last batch of an epoch may be short, but not shorter than half: a few rows make a noisy estimate of HSIC.
    per_epoch = max(1, round(rows / size))
    total = per_epoch * settings.epochs
    total = min(total, settings.max_steps or total)
    return _Steps(_EpochOrder(rows, seed), settings.batch, settings.accumulate, per_epoch, total, rank, world)


@dataclass
class _Run:
    """All that changes while training; what a checkpoint holds."""

    objective: Objective
    optimiser: torch.optim.Optimizer
    warm_up: LinearLR
    progress: Progress
    best: dict[str, Tensor]
    sums: dict[str, float] = field(default_factory=dict)
    since: int = 0

    @property
    def loss(self) -> float:
        """Mean loss since the last validation."""
        return self.sums["loss"] / max(1, self.progress.step - self.since)

    def step(self, model: nn.Module, training: Clicks, parts: list[Tensor]) -> None:
        for rows in parts:
            share = len(rows) / sum(map(len, parts))
            terms: dict[str, Tensor] = model(training[rows])
            torch.autograd.backward(terms["loss"] * share)
            for name, value in terms.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.item() * share
        if not np.isfinite(self.sums["loss"]):
            raise UserError(f"the loss is not finite at step {self.progress.step}; lower train.learning_rate")
        self.optimiser.step()
        self.warm_up.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1

    def validated(self, score: float, *, epoch: float) -> None:
        progress = self.progress
        if not np.isfinite(score):
            raise UserError(
                f"the validation score is not finite at step {progress.step}; lower train.learning_rate, or raise "
                "train.holdout if the interactions held out are all of one label"
            )
        steps = max(1, progress.step - self.since)
        means = {name: value / steps for name, value in self.sums.items()}
        progress.history.append({"epoch": epoch, "step": progress.step, **means, "validation_auc": score})
        self.sums.clear()
        self.since = progress.step
        if score > progress.best:
            progress.best, progress.best_step, progress.bad = score, progress.step, 0
            self.best = _state(self.objective)
        else:
            progress.bad += 1

    def save(self, checkpoint: Checkpoint) -> None:
        buffer = io.BytesIO()
        content = {
            "key": [CHECKPOINT_FORMAT, checkpoint.key],
            "progress": vars(self.progress),
            "sums": self.sums,
            "since": self.since,
            "state": _state(self.objective),
            "best": self.best,
            "optimiser": self.optimiser.state_dict(),
            "warm_up": self.warm_up.state_dict(),
        }
        torch.save(content, buffer)
        data = buffer.getvalue()
        checkpoint.storage.write(checkpoint.uri, hashlib.sha256(data).digest() + data)

    def resume(self, checkpoint: Checkpoint) -> None:
        try:
            data = checkpoint.storage.read(checkpoint.uri)
        except FileNotFoundError:
            return
        digest, data = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        # torch.load takes flipped bits for numbers.
        if hashlib.sha256(data).digest() != digest:
            log.warning("train: the checkpoint at %s is broken: the training begins anew", checkpoint.uri)
            return
        # Tensors and plain values only: a checkpoint runs no code.
        content: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        if content["key"] != [CHECKPOINT_FORMAT, checkpoint.key]:
            log.info("train: the checkpoint is of another run, and is left aside")
            return
        self.progress = Progress(**content["progress"])
        self.sums, self.since, self.best = content["sums"], content["since"], content["best"]
        _load(self.objective, content["state"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.warm_up.load_state_dict(content["warm_up"])
        log.info("train: goes on from the checkpoint of step %d", self.progress.step)


def _groups(objective: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """LoRA's parameters, which belong to the source of states, learn at a rate of their own."""
    own = [p for name, p in objective.named_parameters() if p.requires_grad and not name.startswith("source.")]
    tuned = [p for name, p in objective.named_parameters() if p.requires_grad and name.startswith("source.")]
    groups = [{"params": own, "lr": settings.learning_rate}]
    return groups + ([{"params": tuned, "lr": settings.backbone_learning_rate}] if tuned else [])


def _warm_up(optimiser: torch.optim.Optimizer, settings: TrainSettings, total: int) -> LinearLR:
    """Raises the rates to their full values in ``train.warm_up`` steps, at most half of all steps."""
    steps = max(1, min(settings.warm_up, total // 2))
    return LinearLR(optimiser, start_factor=1 / steps, total_iters=steps - 1)


def _state(objective: nn.Module) -> dict[str, Tensor]:
    frozen = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    return {name: value.detach().clone() for name, value in objective.state_dict().items() if name not in frozen}


def _load(objective: nn.Module, state: dict[str, Tensor]) -> None:
    objective.load_state_dict(state, strict=False)


def _log_row(label: str, row: dict[str, float], total: int) -> None:
    terms = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in {"epoch", "step"})
    log.info("%s: epoch %.1f, step %d of at most %d: %s", label, row["epoch"], int(row["step"]), total, terms)

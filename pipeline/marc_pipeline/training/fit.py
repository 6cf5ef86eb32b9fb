"""The training loop: AdamW, warm-up, early stopping, and checkpoints from which a killed run resumes exactly.

The matching network learns alone at first. Its weights are random, and their gradients would destroy what the
compressor starts with. Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution,
ICLR 2022.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from marc_pipeline.config import TrainSettings
from marc_pipeline.errors import UserError
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import return_memory
from marc_pipeline.storage import Storage
from marc_pipeline.training.distributed import place
from marc_pipeline.training.learning import LearningData
from marc_pipeline.training.objective import Clicks, Objective
from marc_pipeline.training.steps import LEAST_ROWS, VALIDATE_STEPS, plan_steps, warm_up_steps

DIGEST_BYTES = hashlib.sha256().digest_size
CHECKPOINT_FORMAT = 3
"""A checkpoint of another format is ignored."""
REFIT_ROWS = 1_000_000
TRIM_STEPS = 100
"""Steps between returns of freed memory to the system, which take about as long as half a step of many interactions."""

log = logging.getLogger(__name__)


class TrainingRows(Protocol):
    """Interactions for the loss: ratings, or positives with negatives that every batch draws anew."""

    def __len__(self) -> int:
        """Return the number of rows, without sampled negatives."""

    def to(self, device: torch.device) -> "TrainingRows":
        """Return the rows on another device."""

    def batch(self, rows: Tensor, seed: Sequence[int]) -> Clicks:
        """Return the interactions of some rows."""


@dataclass(frozen=True)
class Checkpoint:
    """The file with the state of a run, and the key of the run: a checkpoint with another key is ignored."""

    storage: Storage
    uri: str
    key: str


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        step: optimiser steps done.
        best: best validation score; best_step: its step.
        bad: validations since the best one.
        history: one row per validation: epoch, step, mean of every loss term since the last one, validation score.
        capped: whether the training ended at a cap before early stopping or the chosen number of epochs ended it.
        alone: first steps, in which the matching network learns alone; the best validation is not among them.
    """

    step: int = 0
    best: float = -np.inf
    best_step: int = 0
    bad: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    capped: bool = False
    alone: int = 0


def fit(
    objective: Objective,
    *,
    training: TrainingRows,
    validation: Clicks | None,
    settings: TrainSettings,
    seed: int,
    label: str = "train",
    checkpoint: Checkpoint | None = None,
    steps: int | None = None,
    tick: Callable[[float], None] = lambda _: None,
    epoch_ended: Callable[[int], None] = lambda _: None,
) -> Progress:
    """Train an objective, and leave it with the weights of the best validation, or with the last weights.

    The same arguments give the same weights, bit for bit, on the same machine with the same number of threads, also
    for a run that was killed and resumed. Several processes (torch.distributed) share each batch and average gradients.

    Args:
        objective: a module; parameters without a gradient do not change.
        training: interactions for the loss.
        validation: later interactions for early stopping; None to keep the last weights, without a history.
        settings: optimiser, batch, epochs, patience; without patience, the last weights are kept.
        seed: seed of batches and dropout.
        label: start of the log lines; without it there are none.
        checkpoint: file of the state; None for short runs.
        steps: number of steps after those of the matching network alone; None: by the settings.
        tick: called with the share of the most steps that is done.
        epoch_ended: called after each epoch with its number, from 1. Epochs count from the end of the steps alone.

    Raises:
        UserError: the loss or the validation score is not finite, or there are too few interactions.
    """
    rank, world = place()
    if len(training) < LEAST_ROWS * world:
        raise UserError(f"{len(training)} interactions are too few to train on; provide at least {LEAST_ROWS * world}")
    device = next(objective.parameters()).device
    training, validation = training.to(device), validation and validation.to(device)
    model: nn.Module = objective
    if world > 1:
        # Buffers contain the states of all items and each process's own bank, so they are not synchronised.
        model = DistributedDataParallel(objective, find_unused_parameters=True, forward_sync_buffers=False)
    groups = _groups(objective)
    plan = plan_steps(
        len(training), settings, steps, first=len(groups) > 1 and "" in groups, seed=seed, rank=rank, world=world
    )
    rates = {"source": settings.backbone_learning_rate}
    optimiser = torch.optim.AdamW(
        [{"params": group, "lr": rates.get(part, settings.learning_rate)} for part, group in groups.items()],
        weight_decay=settings.weight_decay,
    )
    count = warm_up_steps(settings, plan)
    warm_up = LambdaLR(optimiser, [partial(_rate, start=plan.alone if part else 0, count=count) for part in groups])
    run = _TrainingState(objective, optimiser, warm_up, Progress(alone=plan.alone), _state(objective))
    if checkpoint is not None:
        run.resume(checkpoint)
    progress = run.progress
    every = settings.validate_every or min(plan.per_epoch, VALIDATE_STEPS)
    objective.train()
    if label and rank == 0 and plan.alone and progress.step < plan.alone:
        log.info("%s: the matching network learns alone for %d steps, then the compressor, too", label, plan.alone)
    reported = ProgressLog(label, plan.total, "steps at most")
    patience = np.inf if settings.patience is None else settings.patience
    while progress.step < plan.total and progress.bad < patience:
        # Seeded at every step, so that a resumed run has the same dropout on every process and device.
        torch.manual_seed(int(np.random.SeedSequence([seed, progress.step, rank]).generate_state(1, np.uint64)[0]))
        parts = enumerate(plan.rows(progress.step))
        run.step(model, [training.batch(rows, (seed, progress.step, rank, part)) for part, rows in parts])
        tick(progress.step / plan.total)
        if progress.step % TRIM_STEPS == 0:
            return_memory()
        since = progress.step - plan.alone
        if validation is not None and (since % every == 0 or progress.step == plan.total):
            # Without early stopping, the last weights count as the best ones.
            best = settings.patience is None or progress.step <= plan.alone
            run.validated(objective.validate(validation), epoch=progress.step / plan.per_epoch, best=best)
            if label and rank == 0:
                _log_row(label, progress.history[-1], plan.total)
        elif label and rank == 0:
            reported.at(progress.step, f"loss {run.loss:.4f}")
        if since > 0 and since % plan.per_epoch == 0:
            epoch_ended(since // plan.per_epoch)
        if checkpoint is not None and rank == 0 and progress.step % settings.checkpoint_every == 0:
            run.save(checkpoint)
    if validation is not None:
        objective.load_state_dict(run.best, strict=False)
        progress.capped = (
            progress.step >= plan.total
            and progress.bad == 0
            and (settings.patience is not None or plan.total == settings.max_steps)
        )
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
    tick: Callable[[float], None] = lambda _: None,
) -> tuple[Objective, Progress]:
    """Train without the holdout; in the frozen regime, then train again on every row, for as many epochs.

    The latest rows predict the future best. They first show how the training goes, and are then trained on. Above
    ``REFIT_ROWS`` rows, the holdout changes little, and there is no second training.

    The second training has its own checkpoint beside the first. Other arguments are those of :func:`fit`.

    Returns:
        The trained objective, and the progress of the first training.
    """
    objective = build(data)
    fitted = partial(fit, seed=seed, label=label, tick=tick)
    progress = fitted(
        objective, training=data.training, validation=data.holdout, settings=settings, checkpoint=checkpoint
    )
    if not settings.ends_on_every_row or len(data.training) > REFIT_ROWS:
        return objective, progress
    whole = data.whole()
    steps = round((progress.best_step - progress.alone) * len(whole.training) / len(data.training))
    if label and place()[0] == 0:
        log.info("%s: training again for %d steps on all %s interactions", label, steps, f"{len(whole.training):,}")
    objective = build(whole)
    fitted(
        objective,
        training=whole.training,
        validation=None,
        settings=settings,
        steps=steps,
        checkpoint=checkpoint and replace(checkpoint, uri=f"{checkpoint.uri}.whole"),
    )
    return objective, progress


@dataclass
class _TrainingState:
    """Everything that changes during training. A checkpoint contains it."""

    objective: Objective
    optimiser: torch.optim.Optimizer
    warm_up: LambdaLR
    progress: Progress
    best: dict[str, Tensor]
    sums: dict[str, float] = field(default_factory=dict)
    since: int = 0

    @property
    def loss(self) -> float:
        """Return the mean loss since the last validation."""
        return self.sums["loss"] / max(1, self.progress.step - self.since)

    def step(self, model: nn.Module, batches: Sequence[Clicks]) -> None:
        for batch in batches:
            share = len(batch) / sum(map(len, batches))
            terms: dict[str, Tensor] = model(batch)
            torch.autograd.backward(terms["loss"] * share)
            for name, value in terms.items():
                self.sums[name] = self.sums.get(name, 0.0) + value.item() * share
        if not np.isfinite(self.sums["loss"]):
            raise UserError(f"the loss is not finite at step {self.progress.step}; lower train.learning_rate")
        self.optimiser.step()
        self.warm_up.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.progress.step += 1

    def validated(self, score: float, *, epoch: float, best: bool) -> None:
        progress = self.progress
        if not np.isfinite(score):
            raise UserError(
                f"the validation score is not finite at step {progress.step}; lower train.learning_rate, or raise "
                "train.holdout if the holdout has one label only"
            )
        steps = max(1, progress.step - self.since)
        means = {name: value / steps for name, value in self.sums.items()}
        progress.history.append({"epoch": epoch, "step": progress.step, **means, "validation_auc": score})
        self.sums.clear()
        self.since = progress.step
        if best or score > progress.best:
            progress.best, progress.best_step, progress.bad = score, progress.step, 0
            self.best = _state(self.objective)
        else:
            progress.bad += 1

    def save(self, checkpoint: Checkpoint) -> None:
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
        buffer = io.BytesIO()
        torch.save(content, buffer)
        data = buffer.getvalue()
        checkpoint.storage.write(checkpoint.uri, hashlib.sha256(data).digest() + data)

    def resume(self, checkpoint: Checkpoint) -> None:
        try:
            data = checkpoint.storage.read(checkpoint.uri)
        except FileNotFoundError:
            return
        digest, data = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
        # torch.load does not detect flipped bits.
        if hashlib.sha256(data).digest() != digest:
            log.warning("train: the checkpoint at %s is damaged; training starts from the beginning", checkpoint.uri)
            return
        # weights_only: loading a checkpoint executes no code.
        content: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
        if content["key"] != [CHECKPOINT_FORMAT, checkpoint.key]:
            log.info("train: the checkpoint is of another run and is ignored")
            return
        self.progress = Progress(**content["progress"])
        self.sums, self.since, self.best = content["sums"], content["since"], content["best"]
        self.objective.load_state_dict(content["state"], strict=False)
        self.optimiser.load_state_dict(content["optimiser"])
        self.warm_up.load_state_dict(content["warm_up"])
        log.info("train: resumes from the checkpoint of step %d", self.progress.step)


def _groups(objective: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that learn: of the compressor, of LoRA, which belongs to the source, and "" the others."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        part = name.partition(".")[0]
        if parameter.requires_grad:
            found.setdefault(part if part in {"compressor", "source"} else "", []).append(parameter)
    return found


def _rate(step: int, *, start: int, count: int) -> float:
    """Return the factor of a learning rate that rises linearly for ``count`` steps from step ``start`` on."""
    return min(1.0, max(0, step + 1 - start) / count)


def _state(objective: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state without frozen weights, which never change."""
    frozen = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    return {name: value.detach().clone() for name, value in objective.state_dict().items() if name not in frozen}


def _log_row(label: str, row: dict[str, float], total: int) -> None:
    terms = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in {"epoch", "step"})
    log.info("%s: epoch %.1f, step %d of at most %d: %s", label, row["epoch"], int(row["step"]), total, terms)

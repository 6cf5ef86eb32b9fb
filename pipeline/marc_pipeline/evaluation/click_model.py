"""The click model: a small network that predicts clicks from frozen item vectors, to evaluate the vectors.

For a row of user u and item i, with v the frozen vectors and h the mean of v over the earlier clicks of u:

    p(click) = σ(MLP([v_i, h, v_i ⊙ h, e_u, e_i]))        MLP = Linear, ReLU, dropout, Linear; e = trained id embeddings

All systems share everything but v, so a difference in AUC is a difference between vectors. Inputs, widths and training
are this project's choice, see ``CtrSettings``.
"""

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from marc_pipeline.training.interactions import Interactions
from marc_pipeline.training.time_split import Split, histories

COLD_RATINGS = 5
ID_SPREAD = 0.01
PREDICTED_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class ClickData:
    """Interactions and histories for the click model, sorted by time within each part.

    Attributes:
        users, items: int64 [n].
        labels: float32 [n], 1 for a click, else 0.
        clicks: int64 [n, k], items that the row's user had clicked strictly before; −1 is padding.
        split: rows of the three parts.
        n_users, n_items: numbers of users and items.
        cold: bool [test rows], whether the item has fewer than ``COLD_RATINGS`` ratings in the training part.
    """

    users: NDArray[np.int64]
    items: NDArray[np.int64]
    labels: NDArray[np.float32]
    clicks: NDArray[np.int64]
    split: Split
    n_users: int
    n_items: int
    cold: NDArray[np.bool_]


@dataclass(frozen=True)
class CtrSettings:
    """Architecture and training of the click model.

    The values were tuned on the PCA baselines only, for a low spread between seeds. No other system influenced them.
    """

    learning_rate: float = 3e-4
    weight_decay: float = 1e-5
    batch: int = 1024
    max_epochs: int = 30
    patience: int = 3
    hidden: int = 64
    id_width: int = 16
    dropout: float = 0.2


@dataclass(frozen=True, eq=False)
class ClickScore:
    """The score of one set of vectors.

    Attributes:
        auc: AUC on the test part. Each AUC is NaN if there are no rows, or all have one label.
        cold_auc, warm_auc: AUC on the test rows of cold items, and on the other test rows.
        log_loss: log loss on the test part, nats.
        validation_auc: AUC of the chosen epoch on the validation part.
        epoch: number of the chosen epoch, from 1.
        predictions: float32 [test rows], probability of a click.
        seconds: wall time of training and prediction.
    """

    auc: float
    cold_auc: float
    warm_auc: float
    log_loss: float
    validation_auc: float
    epoch: int
    predictions: NDArray[np.float32]
    seconds: float


DEFAULTS = CtrSettings()


def click_data(
    interactions: Interactions,
    split: Split,
    *,
    n_items: int,
    history: int,
    order: NDArray[np.int64] | None = None,
) -> ClickData:
    """Add histories of at most ``history`` clicks to interactions, and mark cold items.

    ``n_items`` is the number of items in the catalogue. ``order`` are row numbers in the order of ``split``; None if
    the split has the order of time.
    """
    rows = np.arange(len(interactions)) if order is None else order
    items = interactions.items[rows]
    ratings = np.bincount(interactions.items[rows[split.train]], minlength=n_items)
    return ClickData(
        users=interactions.users[rows],
        items=items,
        labels=interactions.labels[rows],
        clicks=histories(interactions, length=history, label=1)[rows],
        split=split,
        n_users=interactions.n_users,
        n_items=n_items,
        cold=ratings[items[split.test]] < COLD_RATINGS,
    )


def score_vectors(
    vectors: NDArray[np.float32] | None, data: ClickData, *, seed: int, settings: CtrSettings = DEFAULTS
) -> ClickScore:
    """Train the click model on frozen vectors, and evaluate it on the test part.

    The training part trains it, and the validation part chooses the epoch. The same seed gives the same bits on the
    same machine with the same number of threads. Torch's global generator does not change.

    Args:
        vectors: float32 [n_items, d], which are scaled to length √d, except zeros; None for id embeddings only.
        data: interactions.
        seed: seed of initial weights, dropout and the order of rows.
        settings: architecture and training.

    Raises:
        ValueError: the vectors are not one finite row per item, or the validation part has one label only.
    """
    started = time.perf_counter()
    if len(np.unique(data.labels[data.split.validation])) < 2:
        raise ValueError("the validation part chooses the epoch by AUC and needs rows of both labels")
    table = _lookup_table(vectors, data.n_items)
    train, validation, test = (
        _part(data, rows, table) for rows in (data.split.train, data.split.validation, data.split.test)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _ClickModel(table, n_users=data.n_users, n_items=data.n_items, settings=settings)
        epoch, validation_auc = _fit(model, train, validation, seed=seed, settings=settings)
    predictions, labels = _predict(model, test), data.labels[data.split.test]
    return ClickScore(
        auc=_auc(labels, predictions),
        cold_auc=_auc(labels[data.cold], predictions[data.cold]),
        warm_auc=_auc(labels[~data.cold], predictions[~data.cold]),
        # float64, because log_loss clips predictions of 0 and 1 to the rounding of their type.
        log_loss=float(log_loss(labels, predictions.astype(np.float64), labels=[0, 1])),
        validation_auc=validation_auc,
        epoch=epoch,
        predictions=predictions,
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of one part: users [n], items [n], mean vectors of the histories [n, d] and labels [n]."""

    users: Tensor
    items: Tensor
    means: Tensor
    labels: Tensor

    def take(self, rows: Tensor | slice) -> "_Part":
        return _Part(self.users[rows], self.items[rows], self.means[rows], self.labels[rows])


class _ClickModel(nn.Module):
    """Returns logits of rows. ``table`` is frozen and not copied."""

    def __init__(self, table: Tensor, *, n_users: int, n_items: int, settings: CtrSettings) -> None:
        super().__init__()
        # Not persistent, because every best epoch copies the state.
        self.register_buffer("table", table, persistent=False)
        self.users = nn.Embedding(n_users, settings.id_width)
        self.items = nn.Embedding(n_items, settings.id_width)
        for embedding in (self.users, self.items):
            nn.init.normal_(embedding.weight, std=ID_SPREAD)
        self.net = nn.Sequential(
            nn.Linear(3 * table.shape[1] + 2 * settings.id_width, settings.hidden),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(settings.hidden, 1),
        )

    table: Tensor

    def forward(self, part: _Part) -> Tensor:
        # Looked up and multiplied per batch, because rows of all inputs would take three times the memory.
        own = functional.embedding(part.items, self.table)
        ids = self.users(part.users), self.items(part.items)
        logits: Tensor = self.net(torch.cat([own, part.means, own * part.means, *ids], dim=1))
        return logits.squeeze(1)


def _lookup_table(vectors: NDArray[np.float32] | None, n_items: int) -> Tensor:
    """Return vectors scaled to length √d, and a row of zeros for padding: float32 [n_items + 1, d]."""
    if vectors is None:
        return torch.zeros(n_items + 1, 0)
    if vectors.ndim != 2 or len(vectors) != n_items:
        raise ValueError(f"vectors must be [{n_items}, d], one row per item, not {[*vectors.shape]}")
    # float64, because squares of large float32 numbers overflow.
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    if len(bad := np.flatnonzero(~np.isfinite(lengths))):
        raise ValueError(f"{len(bad)} of {n_items} vectors contain NaN or infinity; the first is row {bad[0]}")
    scale = np.sqrt(vectors.shape[1]) / np.where(lengths > 0, lengths, 1)
    table = torch.zeros(n_items + 1, vectors.shape[1])
    np.multiply(vectors, scale[:, None], out=table[:-1].numpy(), casting="same_kind")
    return table


def _part(data: ClickData, rows: slice, table: Tensor) -> _Part:
    clicks = data.clicks[rows]
    padding = data.n_items
    return _Part(
        users=torch.from_numpy(data.users[rows]),
        items=torch.from_numpy(data.items[rows]),
        # The mean of padding only is 0.
        means=functional.embedding_bag(
            torch.from_numpy(np.where(clicks < 0, padding, clicks)), table, mode="mean", padding_idx=padding
        ),
        labels=torch.from_numpy(data.labels[rows]),
    )


def _fit(model: _ClickModel, train: _Part, validation: _Part, *, seed: int, settings: CtrSettings) -> tuple[int, float]:
    """Train until the validation AUC has not risen for ``patience`` epochs, and restore the best epoch.

    Returns:
        Number of the best epoch, from 1, and its validation AUC.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(seed)
    labels = validation.labels.numpy()
    best_epoch, best_auc, best_state = 0, -np.inf, model.state_dict()
    for epoch in range(1, settings.max_epochs + 1):
        model.train()
        for rows in torch.split(torch.randperm(len(train.labels), generator=order), settings.batch):
            batch = train.take(rows)
            optimiser.zero_grad()
            torch.autograd.backward(functional.binary_cross_entropy_with_logits(model(batch), batch.labels))
            optimiser.step()
        auc = _auc(labels, _predict(model, validation))
        if auc > best_auc:
            best_epoch, best_auc, best_state = epoch, auc, copy.deepcopy(model.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    model.load_state_dict(best_state)
    return best_epoch, best_auc


@torch.no_grad()
def _predict(model: _ClickModel, part: _Part) -> NDArray[np.float32]:
    model.eval()
    starts = range(0, len(part.labels), PREDICTED_AT_ONCE)
    logits = [model(part.take(slice(start, start + PREDICTED_AT_ONCE))) for start in starts]
    probabilities: NDArray[np.float32] = torch.sigmoid(torch.cat(logits)).numpy()
    return probabilities


def _auc(labels: NDArray[np.float32], predictions: NDArray[np.float32]) -> float:
    return float(roc_auc_score(labels, predictions)) if len(np.unique(labels)) == 2 else float("nan")

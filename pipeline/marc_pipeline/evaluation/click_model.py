"""The click model: a small network that predicts clicks from frozen item vectors, to evaluate the vectors.

For a row of user u and item i, with v the frozen vectors and h the mean of v over the earlier clicks of u:

    p(click) = σ(MLP([v_i, h, v_i ⊙ h, e_u, e_i]))        MLP = Linear, ReLU, dropout, Linear; e = trained id embeddings

All systems share everything but v, so a difference in AUC is a difference between vectors. Inputs, widths and training
are this project's choice, see ``CtrSettings``. The models of several systems are trained in one pass over the rows.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

from marc_pipeline.evaluation.click_data import ClickData
from marc_pipeline.evaluation.ranking import Ranking, ranking

ID_SPREAD = 0.01
PREDICTED_AT_ONCE = 8192
NO_RANKING = Ranking(recall=float("nan"), ndcg=float("nan"), lookup_recall=float("nan"))

Vectors = NDArray[np.float32] | None


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
        validation_predictions: float32 [validation rows].
        ranking: ranks of the test part's positives in the whole catalogue; NaN unless asked for.
        seconds: wall time of training and prediction, divided by the number of systems in the pass.
    """

    auc: float
    cold_auc: float
    warm_auc: float
    log_loss: float
    validation_auc: float
    epoch: int
    predictions: NDArray[np.float32]
    validation_predictions: NDArray[np.float32]
    ranking: Ranking
    seconds: float


DEFAULTS = CtrSettings()


def score_vectors(vectors: Vectors, data: ClickData, *, seed: int, settings: CtrSettings = DEFAULTS) -> ClickScore:
    """Train the click model on the frozen vectors of one system; see :func:`score_together`."""
    return score_together([vectors], data, seed=seed, settings=settings)[0]


def score_together(
    systems: Sequence[Vectors],
    data: ClickData,
    *,
    seed: int,
    settings: CtrSettings = DEFAULTS,
    ranked: bool = False,
    done: Callable[[float], None] = lambda _: None,
) -> list[ClickScore]:
    """Train one click model per system in one pass over the rows, and evaluate each on the test part.

    The training part trains the models, and the validation part chooses the epoch of each. They share order, dropout
    and initial weights, and nothing else: a score does not depend on the other systems, except for rounding. The same
    seed gives the same bits on the same machine with the same number of threads. Torch's global generator does not
    change.

    Args:
        systems: float32 [n_items, d] each, with the same d, which are scaled to length √d, except zeros; None for id
            embeddings only.
        data: interactions.
        seed: seed of initial weights, dropout and the order of rows.
        settings: architecture and training.
        ranked: whether the test part's positives are ranked among all items.
        done: called with the share of the most epochs that is done.

    Raises:
        ValueError: vectors are not one finite row per item, or the validation part has one label only.
    """
    started = time.perf_counter()
    if len(np.unique(data.labels[data.split.validation])) < 2:
        raise ValueError("the validation part chooses the epoch by AUC and needs rows of both labels")
    table = _lookup_table(systems, data.n_items)
    train, validation, test = (_part(data, rows) for rows in (data.split.train, data.split.validation, data.split.test))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _ClickModels(table, len(systems), n_users=data.n_users, n_items=data.n_items, settings=settings)
        epochs, aucs = _fit(model, train, validation, seed=seed, settings=settings, done=done)
    predicted, chosen = _predict(model, test), _predict(model, validation)
    ranks = [NO_RANKING] * len(systems)
    if ranked:
        ranks = ranking(data, table, model.catalogue_logits, len(systems))
    labels, weights = data.labels[data.split.test], data.weights[data.split.test]
    seconds = (time.perf_counter() - started) / len(systems)
    return [
        ClickScore(
            auc=_auc(labels, predictions, weights),
            cold_auc=_auc(labels[data.cold], predictions[data.cold], weights[data.cold]),
            warm_auc=_auc(labels[~data.cold], predictions[~data.cold], weights[~data.cold]),
            # float64, because log_loss clips predictions of 0 and 1 to the rounding of their type.
            log_loss=float(log_loss(labels, predictions.astype(np.float64), labels=[0, 1], sample_weight=weights)),
            validation_auc=auc,
            epoch=epoch,
            predictions=predictions,
            validation_predictions=validated,
            ranking=ranks[number],
            seconds=seconds,
        )
        for number, (predictions, validated, epoch, auc) in enumerate(zip(predicted, chosen, epochs, aucs, strict=True))
    ]


@dataclass(frozen=True, eq=False)
class _Part:
    """Rows of one part: users [n], items [n], histories [n, k] with padding, labels [n] and weights [n]."""

    users: Tensor
    items: Tensor
    clicks: Tensor
    labels: Tensor
    weights: Tensor

    def take(self, rows: Tensor | slice) -> "_Part":
        return _Part(*(part[rows] for part in vars(self).values()))


class _ClickModels(nn.Module):
    """Click models of g systems; returns logits [g, n]. ``table`` [n_items + 1, g · d] is frozen and not copied."""

    def __init__(self, table: Tensor, systems: int, *, n_users: int, n_items: int, settings: CtrSettings) -> None:
        super().__init__()
        self.systems, self.dropout = systems, settings.dropout
        dim = table.shape[1] // systems
        self.register_buffer("table", table, persistent=False)
        width = settings.id_width
        # The models have the same initial weights. The embeddings of one id lie side by side.
        self.users, self.items = (
            nn.Parameter(nn.init.normal_(torch.empty(n, width), std=ID_SPREAD).repeat(1, systems))
            for n in (n_users, n_items)
        )
        first, second = nn.Linear(3 * dim + 2 * width, settings.hidden), nn.Linear(settings.hidden, 1)
        self.first, self.second = (
            nn.Parameter(layer.weight.detach().T.repeat(systems, 1, 1)) for layer in (first, second)
        )
        self.first_bias, self.second_bias = (
            nn.Parameter(layer.bias.detach().repeat(systems, 1, 1)) for layer in (first, second)
        )

    table: Tensor

    def forward(self, part: _Part) -> Tensor:
        own = self._each(functional.embedding(part.items, self.table))
        means = self.means(part.clicks)
        ids = [self._each(functional.embedding(*pair)) for pair in ((part.users, self.users), (part.items, self.items))]
        hidden = functional.relu(
            torch.baddbmm(self.first_bias, torch.cat([own, means, own * means, *ids], 2), self.first)
        )
        if self.training and self.dropout:
            # One mask for all systems, so that a system's score does not depend on the others.
            kept = torch.rand(hidden.shape[1:]) >= self.dropout
            hidden = hidden * (kept / (1 - self.dropout))
        return torch.baddbmm(self.second_bias, hidden, self.second).squeeze(2)

    def means(self, clicks: Tensor) -> Tensor:
        """Return the mean vectors [g, n, d] of histories; the mean of padding only is 0."""
        padding = len(self.table) - 1
        return self._each(functional.embedding_bag(clicks, self.table, mode="mean", padding_idx=padding))

    @torch.no_grad()
    def catalogue_logits(self, users: Tensor, clicks: Tensor) -> Tensor:
        """Return logits [g, n, n_items] of every item for rows with these users [n] and histories [n, k]."""
        dim, width = self.table.shape[1] // self.systems, self.first.shape[1]
        blocks = (width - 3 * dim) // 2
        by_item, by_mean, by_product, by_user, by_id = torch.split(self.first, [dim, dim, dim, blocks, blocks], dim=1)
        items = self._each(self.table[:-1])
        per_item = items @ by_item + self._each(self.items) @ by_id  # [g, n_items, hidden]
        means = self.means(clicks)
        per_row = means @ by_mean + self._each(functional.embedding(users, self.users)) @ by_user + self.first_bias
        found = torch.empty(self.systems, len(users), items.shape[1])
        for row in range(len(users)):
            # (v ⊙ h) W = v (h ⊙ W): one product per row instead of one input per pair.
            crossed = items @ (means[:, row].unsqueeze(2) * by_product)
            hidden = functional.relu(crossed.add_(per_item).add_(per_row[:, row : row + 1]))
            found[:, row] = (hidden @ self.second + self.second_bias).squeeze(2)
        return found

    def _each(self, wide: Tensor) -> Tensor:
        """Return [n, g · d] as [g, n, d]."""
        return wide.view(len(wide), self.systems, wide.shape[1] // self.systems).transpose(0, 1)

    def copy_best(self, best: dict[str, Tensor], improved: Tensor) -> None:
        """Copy the weights of the improved systems [g] into ``best``."""
        for name, value in self.state_dict().items():
            into, new = (part if part.ndim == 3 else self._each(part) for part in (best[name], value))
            into[improved] = new[improved]


def _lookup_table(systems: Sequence[Vectors], n_items: int) -> Tensor:
    """Return vectors scaled to length √d, side by side, and a row of zeros for padding: float32 [n_items + 1, g·d]."""
    tables = []
    for vectors in systems:
        if vectors is None:
            tables.append(torch.zeros(n_items + 1, 0))
            continue
        if vectors.ndim != 2 or len(vectors) != n_items:
            raise ValueError(f"vectors must be [{n_items}, d], one row per item, not {[*vectors.shape]}")
        # float64, because squares of large float32 numbers overflow.
        lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
        if len(bad := np.flatnonzero(~np.isfinite(lengths))):
            raise ValueError(f"{len(bad)} of {n_items} vectors contain NaN or infinity; the first is row {bad[0]}")
        scale = np.sqrt(vectors.shape[1]) / np.where(lengths > 0, lengths, 1)
        table = torch.zeros(n_items + 1, vectors.shape[1])
        np.multiply(vectors, scale[:, None], out=table[:-1].numpy(), casting="same_kind")
        tables.append(table)
    if len({table.shape[1] for table in tables}) > 1:
        raise ValueError("systems of one pass must have the same dimension")
    return torch.cat(tables, dim=1)


def _part(data: ClickData, rows: slice) -> _Part:
    clicks = data.clicks[rows]
    return _Part(
        users=torch.from_numpy(data.users[rows]),
        items=torch.from_numpy(data.items[rows]),
        clicks=torch.from_numpy(np.where(clicks < 0, data.n_items, clicks)),
        labels=torch.from_numpy(data.labels[rows]),
        weights=torch.from_numpy(data.weights[rows]),
    )


def _fit(
    model: _ClickModels,
    train: _Part,
    validation: _Part,
    *,
    seed: int,
    settings: CtrSettings,
    done: Callable[[float], None],
) -> tuple[list[int], list[float]]:
    """Train until no validation AUC has risen for ``patience`` epochs, and restore each system's best epoch.

    Returns:
        Number of the best epoch, from 1, and its validation AUC, of each system.
    """
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(seed)
    labels, weights = validation.labels.numpy(), validation.weights.numpy()
    best_epochs, best_aucs = np.zeros(model.systems, int), np.full(model.systems, -np.inf)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    batches = -(-len(train.labels) // settings.batch)
    for epoch in range(1, settings.max_epochs + 1):
        model.train()
        for number, rows in enumerate(torch.split(torch.randperm(len(train.labels), generator=order), settings.batch)):
            batch = train.take(rows)
            optimiser.zero_grad()
            # Summed over systems, so that no system's gradient depends on the others.
            losses = functional.binary_cross_entropy_with_logits(
                model(batch), batch.labels.expand(model.systems, -1), weight=batch.weights, reduction="sum"
            )
            torch.autograd.backward(losses / batch.weights.sum())
            optimiser.step()
            done((epoch - 1 + (number + 1) / batches) / settings.max_epochs)
        aucs = np.array([_auc(labels, predictions, weights) for predictions in _predict(model, validation)])
        waiting = epoch - best_epochs < settings.patience
        # A system whose patience ended keeps its epoch, as if it had been trained alone.
        improved = (aucs > best_aucs) & ((epoch - 1 - best_epochs) < settings.patience)
        best_epochs[improved], best_aucs[improved] = epoch, aucs[improved]
        model.copy_best(best, torch.from_numpy(improved))
        if not (waiting | improved).any():
            break
    model.load_state_dict(best)
    return best_epochs.tolist(), best_aucs.tolist()


@torch.no_grad()
def _predict(model: _ClickModels, part: _Part) -> NDArray[np.float32]:
    """Return probabilities [g, n]."""
    model.eval()
    starts = range(0, len(part.labels), PREDICTED_AT_ONCE)
    logits = [model(part.take(slice(start, start + PREDICTED_AT_ONCE))) for start in starts]
    probabilities: NDArray[np.float32] = torch.sigmoid(torch.cat(logits, dim=1)).numpy()
    return probabilities


def _auc(labels: NDArray[np.float32], predictions: NDArray[np.float32], weights: NDArray[np.float32]) -> float:
    if len(np.unique(labels)) < 2:
        return float("nan")
    return float(roc_auc_score(labels, predictions, sample_weight=weights))

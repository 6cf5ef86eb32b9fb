"""Reference computations of layer metrics: token states by transformers alone, entropy and curvature in numpy."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_models import LAYERS, hidden_state_index
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.model.entropy import dataset_entropy, effective_rank, spectrum, unit_rows
from pipeline.model.invariance import dime, infonce, lidar
from pipeline.model.measured import UNDEFINED

Array = NDArray[np.float64]
States = list[Array]
"""Token states [t, D] of one input after 0, 1, … L blocks."""


def rotation(width: int) -> Array:
    """A random orthogonal matrix [width, width]."""
    matrix: Array = np.linalg.qr(np.random.default_rng(5).normal(size=(width, width)))[0]
    return matrix


def tensor(array: Any) -> Tensor:
    """A float64 tensor of the array."""
    return torch.as_tensor(array, dtype=torch.float64)


def text_states(architecture: str, model: PreTrainedModel, ids: Tensor) -> States:
    """States of one text [1, t]; Mamba's own list lacks the embeddings."""
    with torch.inference_mode():
        listed = model(input_ids=ids, output_hidden_states=True).hidden_states
        first = model.get_input_embeddings()(ids) if architecture == "mamba" else listed[0]
    named = [first, *(listed[hidden_state_index(architecture, kept)] for kept in range(1, LAYERS + 1))]
    return [state[0].double().numpy() for state in named]


def image_states(model: PreTrainedModel, pixels: Tensor) -> States:
    """States of one image [1, c, h, w]."""
    with torch.inference_mode():
        output = model(pixel_values=pixels, output_hidden_states=True)
    return [state[0].double().numpy() for state in [*output.hidden_states[:LAYERS], output.last_hidden_state]]


def naive_entropy(tokens: Array, order: float) -> float:
    """Entropy of the eigenvalues of the tokens' cosines."""
    rows = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(rows @ rows.T) / len(rows)
    shares = shares[shares > 1e-12]
    if order == 1:
        return float(-(shares * np.log(shares)).sum())
    return float(np.log((shares**order).sum()) / (1 - order))


def naive_curvature(tokens: Array) -> float:
    """Mean over k of arccos(⟨v_k, v_{k+1}⟩ / (‖v_k‖ ‖v_{k+1}‖)) by a loop."""
    pairs = [(a, b) for a, b in itertools.pairwise(np.diff(tokens, axis=0)) if a.any() and b.any()]
    cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in pairs]
    return float(np.mean([math.acos(np.clip(cosine, -1, 1)) for cosine in cosines])) if pairs else UNDEFINED


def naive_figures(states: States, order: float) -> list[list[float]]:
    """Entropy, tokens and curvature of every layer [L + 1][3]."""
    return [[naive_entropy(one, order), len(one), naive_curvature(one)] for one in states]


def layer_metrics(
    texts: Tensor,
    figures: Array,
    views: Tensor,
    blocks: Iterable[tuple[int, Sequence[int] | NDArray[np.int64]]],
    *,
    order: float = 1.0,
    temperature: float = 0.1,
    ridge: float = 1e-4,
    permutations: int = 5,
    seed: int = 0,
) -> dict[str, float]:
    """Metrics of one layer with all vectors in memory.

    Args:
        texts: pooled vectors [n, D].
        figures: prompt entropy, tokens and curvature of each text [n, 3].
        views: pooled vectors of views [n, q, D].
        blocks: number and rows of each block.
        order, temperature, ridge, permutations, seed: settings of the metrics.
    """
    n, width = texts.shape
    entropies, lengths, turns = figures.T
    found = []
    for number, rows in blocks:
        if len(rows) < 2:
            continue
        a, b = views[list(rows), 0], views[list(rows), 1]
        loss = infonce(a, b, temperature).item()
        gain = dime(a, b, order=order, permutations=permutations, seed=(seed, number)).item()
        found.append((len(rows), loss, math.log(len(rows)) - loss, gain))
    weights, losses, bounds, gains = np.array(found).T
    raw, several = dataset_entropy(texts, order).item(), lengths > 1
    return {
        "texts": n,
        "prompt_entropy": entropies.mean(),
        "prompt_entropy_log_rows": (entropies[several] / np.log(lengths[several])).mean(),
        "prompt_entropy_log_width": entropies.mean() / math.log(width),
        "prompt_entropy_log_least": (entropies[several] / np.log(np.minimum(lengths[several], width))).mean(),
        "curvature": turns[turns >= 0].mean(),
        "dataset_entropy": raw,
        "dataset_entropy_log_rows": raw / math.log(n),
        "dataset_entropy_log_width": raw / math.log(width),
        "dataset_entropy_log_least": raw / math.log(min(n, width)),
        "effective_rank": effective_rank(spectrum(texts)).item(),
        "infonce": np.average(losses, weights=weights),
        "information_bound": np.average(bounds, weights=weights),
        "lidar": lidar(math.sqrt(width) * unit_rows(views), ridge).item(),
        "dime": np.average(gains, weights=weights),
    }

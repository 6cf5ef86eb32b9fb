"""Reference computations of layer metrics: token states by transformers alone, entropy and curvature in numpy."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tiny_models import LAYERS, WIDTH, hidden_state_index
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.config import LayerSettings
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


def sample_metrics(
    plain: Sequence[States],
    views: Sequence[Sequence[States]],
    blocks: Sequence[tuple[int, Sequence[int]]],
    wanted: LayerSettings,
) -> list[dict[str, float]]:
    """Metrics of every layer with all states in memory.

    Args:
        plain: states of every input.
        views: states of views [q][inputs].
        blocks: number and inputs of each block.
        wanted: settings of the metrics.
    """
    found = []
    for layer in range(LAYERS + 1):
        tokens = [states[layer] for states in plain]
        pooled = torch.tensor(np.stack([one.mean(axis=0) for one in tokens]))
        seen = torch.tensor(np.stack([[states[layer].mean(axis=0) for states in view] for view in views], axis=1))
        entropies, lengths, turns = np.array(naive_figures(tokens, wanted.order)).T
        raw, rows = dataset_entropy(pooled, wanted.order).item(), len(pooled)
        several = lengths > 1
        losses, joints, weights = [], [], []
        for number, places in blocks:
            a, b = seen[list(places), 0], seen[list(places), 1]
            if len(places) < 2:
                continue
            losses.append(infonce(a, b, wanted.temperature).item())
            joints.append(dime(a, b, order=wanted.order, seed=(wanted.seed, number)).item())
            weights.append(len(places))
        bounds = [math.log(n) - loss for n, loss in zip(weights, losses, strict=True)]
        found.append(
            {
                "texts": rows,
                "prompt_entropy": entropies.mean(),
                "prompt_entropy_log_rows": (entropies[several] / np.log(lengths[several])).mean(),
                "prompt_entropy_log_width": entropies.mean() / math.log(WIDTH),
                "prompt_entropy_log_least": (entropies[several] / np.log(np.minimum(lengths[several], WIDTH))).mean(),
                "curvature": turns[turns >= 0].mean(),
                "dataset_entropy": raw,
                "dataset_entropy_log_rows": raw / math.log(rows),
                "dataset_entropy_log_width": raw / math.log(WIDTH),
                "dataset_entropy_log_least": raw / math.log(min(rows, WIDTH)),
                "effective_rank": effective_rank(spectrum(pooled)).item(),
                "infonce": np.average(losses, weights=weights),
                "information_bound": np.average(bounds, weights=weights),
                "lidar": lidar(math.sqrt(WIDTH) * unit_rows(seen)).item(),
                "dime": np.average(joints, weights=weights),
            }
        )
    return found

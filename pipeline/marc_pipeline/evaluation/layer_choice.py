"""The choice of a layer from AUC scores: the cheapest within one standard error of the best."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np


def choose_layer(scores: Mapping[int, Sequence[float]]) -> int:
    """Return the lowest layer whose mean AUC is within one standard error of the best layer's.

    Every layer costs time in every nightly run. The standard error is that of the difference to the best layer over
    the folds, because folds differ more than layers. Breiman et al. 1984, Classification and Regression Trees: the
    rule of one standard error.

    Args:
        scores: AUC of every layer, one per fold; layers with fewer folds left the search and are not chosen.
    """
    finalists = final_scores(scores)
    best = max(finalists, key=lambda layer: (fmean(finalists[layer]), -layer))
    for layer in sorted(finalists):
        behind = np.subtract(finalists[best], finalists[layer]).tolist()
        error = stdev(behind) / len(behind) ** 0.5 if len(behind) > 1 else 0.0
        # Rounding must not decide between equals.
        if fmean(behind) <= error + 1e-9:
            return layer
    return best


def final_scores(scores: Mapping[int, Sequence[float]]) -> dict[int, Sequence[float]]:
    """Return the scores of the layers that stayed in the search until its last round."""
    most = max(map(len, scores.values()))
    return {layer: aucs for layer, aucs in scores.items() if len(aucs) == most}

"""The choice of a layer from AUC scores: the maximum of a smooth curve over the layers."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

MANY_LAYERS = 12
"""From this number of layers on, the smooth curve is a quartic instead of a parabola."""


def smoothed(scores: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """Fit a parabola, or a quartic for many layers, to the mean scores of all layers, and return its values.

    The error of one layer's AUC is about as large as the differences between layers, so the best single layer is
    partly chance. Neighbouring layers are similar, so the curve is known more precisely than its points. With many
    layers, a parabola would move a peak near one end to the middle; a quartic does not.

    Args:
        scores: AUC of every layer, one per fold.
    """
    layers = sorted(scores)
    means = np.array([fmean(scores[layer]) for layer in layers])
    depth = np.linspace(-1, 1, len(layers))
    degree = 2 if len(layers) < MANY_LAYERS else 4
    curve = np.polynomial.Polynomial.fit(depth, means, deg=min(degree, len(layers) - 1))(depth)
    return dict(zip(layers, curve.round(9).tolist(), strict=True))


def choose_layer(scores: Mapping[int, Sequence[float]]) -> int:
    """Return the layer with the highest :func:`smoothed` score; of equal layers the lowest."""
    curve = smoothed(scores)
    return min(curve, key=lambda layer: (-curve[layer], layer))

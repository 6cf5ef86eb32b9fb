"""The choice of a layer from AUC scores: a smooth curve over the layers, and its highest point."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

# From this number of layers on, the smooth curve is a quartic instead of a parabola.
MANY_LAYERS = 12


def smoothed(scores: Mapping[int, Sequence[float]]) -> dict[int, float]:
    """A smooth curve through the mean scores of all layers: a parabola, or a quartic for a dozen layers or more.

    The error of one layer's AUC is about as large as the differences between layers, so the best single layer is
    partly chance. Neighbouring layers are similar, so a curve that falls towards its ends is known more precisely
    than its points. A parabola would move a peak near one end to the middle; with many layers a quartic does not.

    Args:
        scores: of every layer, one per fold.
    """
    layers = sorted(scores)
    means = np.array([fmean(scores[layer]) for layer in layers])
    depth = np.linspace(-1, 1, len(layers))
    degree = 2 if len(layers) < MANY_LAYERS else 4
    curve = np.polynomial.Polynomial.fit(depth, means, deg=min(degree, len(layers) - 1))(depth)
    return dict(zip(layers, curve.round(9).tolist(), strict=True))


def choose_layer(scores: Mapping[int, Sequence[float]]) -> int:
    """The layer where :func:`smoothed` scores are highest; of equal layers the lowest.

    Args:
        scores: AUC of every layer, one per fold.
    """
    curve = smoothed(scores)
    return min(curve, key=lambda layer: (-curve[layer], layer))

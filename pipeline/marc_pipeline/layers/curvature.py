"""Curvature: the mean angle between successive steps of a text's token states; 0 on a straight line, π for a U-turn.

With v_k = z_{k+1} − z_k, k = 1 … t − 1, of a text's tokens z [t, D]:

    curvature = mean over k of θ_k,   cos θ_k = ⟨v_k, v_{k+1}⟩ / (‖v_k‖ ‖v_{k+1}‖)
    θ = 2 atan2(‖u − w‖, ‖u + w‖)     for the unit vectors u, w along v_k, v_{k+1}

Hosseini and Fedorenko 2023, Large Language Models Implicitly Learn to Straighten Neural Sentence Trajectories to
Construct a Predictive Representation of Natural Language (NeurIPS): the measure. Skean et al. 2025, Layer by Layer
(ICML, arXiv 2502.02013): on every layer. Kahan 2006, How Futile Are Mindless Assessments of Roundoff in Floating-Point
Computation: the second formula, because arccos loses half of its digits near 0 and π. This project chose to exclude
steps between equal tokens.
"""

import torch
from torch import Tensor

from marc_pipeline.layers.entropy import unit_rows


def curvature(tokens: Tensor) -> Tensor:
    """Return the mean angle between successive steps in radians, float64 [b] in [0, π], of tokens [b, t, D].

    All texts have the same number of tokens, because padding would count as a turn. A step between equal tokens has no
    direction; the mean leaves out its angles. A text without any angle, for example one of two tokens, gets NaN.

    Raises:
        ValueError: wrong shape.
    """
    if tokens.ndim != 3:
        raise ValueError(f"tokens must be [b, t, D], not {[*tokens.shape]}")
    if tokens.shape[1] < 3 or not tokens.shape[2]:
        return torch.full((len(tokens),), torch.nan, dtype=torch.float64, device=tokens.device)
    steps = tokens.to(torch.float64).diff(dim=1)
    moves = (steps != 0).any(dim=2)  # [b, t − 1]
    defined = moves[:, 1:] & moves[:, :-1]
    steps = unit_rows(steps)
    u, w = steps[:, :-1], steps[:, 1:]  # [b, t − 2, D]
    angles = 2 * torch.atan2(torch.linalg.vector_norm(u - w, dim=2), torch.linalg.vector_norm(u + w, dim=2))
    return angles.masked_fill(~defined, 0.0).sum(dim=1) / defined.sum(dim=1)

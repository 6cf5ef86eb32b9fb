"""Compressors: map the pooled hidden state h [n, D] to the vector z [n, d] that the feature table stores."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from marc_pipeline.errors import UserError
from marc_schemas.bundle import CompressorCard

WEIGHTS = "compressor.safetensors"
ROUNDING = 8 * float(np.finfo(np.float32).eps)


class WhitenedPCA(nn.Module):
    """z = (h − μ) Wᵀ [d], with W the leading principal directions, each divided by its standard deviation; h is [D]."""

    def __init__(self, *, width: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("directions", torch.zeros(dim, width))

    mean: Tensor
    directions: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        """Whitened coordinates [n, d] of pooled hidden states [n, D]."""
        return functional.linear(hidden - self.mean, self.directions)


class Bottleneck(nn.Module):
    """z = W h + b + V gelu(U norm(h)): a linear path, and a residual branch that is 0 at first.

    Args:
        width, dim: D and d, lengths of h and z.
        hidden, dropout: width and dropout of the residual branch.
    """

    def __init__(self, *, width: int, dim: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, dim)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def start_from(self, start: WhitenedPCA) -> "Bottleneck":
        """Initialise the linear path with a whitened projection."""
        with torch.no_grad():
            self.linear.weight.copy_(start.directions)
            self.linear.bias.copy_(-(start.directions @ start.mean))
        return self

    def forward(self, hidden: Tensor) -> Tensor:
        """Compressed vectors [n, d] of pooled hidden states [n, D]."""
        branch: Tensor = self.down(self.dropout(functional.gelu(self.up(self.norm(hidden)))))
        linear: Tensor = self.linear(hidden)
        return linear + branch


class Normalised(nn.Module):
    """A compressor whose vectors are scaled to unit length."""

    def __init__(self, compressor: nn.Module) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, hidden: Tensor) -> Tensor:
        """Unit vectors [n, d] of pooled hidden states [n, D]."""
        return functional.normalize(self.compressor(hidden), dim=-1)


KINDS: Mapping[str, Callable[..., nn.Module]] = {"pca": WhitenedPCA, "bottleneck": Bottleneck}
"""Kinds of compressors in ``bundle.json``."""


def fit_pca(hidden: NDArray[np.float32], *, dim: int) -> tuple[WhitenedPCA, float]:
    """Fit a whitened PCA of d = ``dim`` directions to pooled hidden states [n, D].

    Returns:
        The compressor, and the share of the variance that its d directions explain.

    Raises:
        UserError: too few texts, too few independent directions, or d above D.
    """
    from sklearn.decomposition import PCA  # noqa: PLC0415 - training only

    count, width = hidden.shape
    if dim > width:
        raise UserError(f"train.dim is {dim}, the backbone's hidden state has {width} numbers; choose at most {width}")
    if count <= dim:
        raise UserError(
            f"whitening to {dim} dimensions needs more than {dim} distinct texts, the catalogue has {count}"
        )
    # The exact solver is deterministic: the same data gives the same bundle version.
    with np.errstate(invalid="ignore"):  # the variance of identical texts is 0
        pca = PCA(n_components=dim, whiten=True, svd_solver="covariance_eigh").fit(hidden.astype(np.float64))
    scale = np.sqrt(pca.explained_variance_)
    # Whitening would scale rounding errors of h up to variance 1.
    if not np.all(scale > ROUNDING * np.abs(hidden).max()):
        raise UserError(f"the texts span fewer than {dim} directions; lower train.dim")
    module = WhitenedPCA(width=width, dim=dim)
    module.mean.copy_(torch.from_numpy(pca.mean_))
    module.directions.copy_(torch.from_numpy(pca.components_ / scale[:, None]))
    return module, float(pca.explained_variance_ratio_.sum())


def save_compressor(module: nn.Module, folder: Path) -> None:
    """Write the weights into a bundle's folder."""
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / WEIGHTS)


def load_compressor(folder: Path, card: CompressorCard) -> nn.Module:
    """Build a bundle's compressor and read its weights.

    Raises:
        UserError: this version of the pipeline does not support the kind.
    """
    if card.kind not in KINDS:
        raise UserError(
            f"compressor kind {card.kind!r} is not supported (supported: {', '.join(KINDS)}); upgrade the pipeline"
        )
    arguments: dict[str, Any] = card.arguments
    module = KINDS[card.kind](**arguments)
    module.load_state_dict(load_file(folder / WEIGHTS))
    return module.eval()

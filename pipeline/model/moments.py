"""The figures of one layer, streamed over blocks of texts: three D × D sums, whatever the number of texts.

What is gathered, in float64:

    moment    Σ z zᵀ of pooled vectors z at unit length                    → dataset entropy, effective rank
    between   Σ_i (μ_i − μ)(μ_i − μ)ᵀ of a text's mean over its views      → LiDAR
    within    Σ_ij (x_ij − μ_i)(x_ij − μ_i)ᵀ of its views                  → LiDAR
    sums      of prompt entropies, curvatures, InfoNCE and DiME, with their weights

Scatters of two parts with n_1 and n_2 texts are joined by adding n_1 n_2 / (n_1 + n_2) · δδᵀ for the difference δ of
their means (Chan, Golub and LeVeque 1983, Algorithms for Computing the Sample Variance, The American Statistician 37):
nothing cancels, and neither the order of blocks nor their spread over processes matters beyond rounding.

The measures are those of ``entropy``, ``curvature`` and ``invariance``. Choices of this project: views are brought to
length sqrt(D) before LiDAR, so that numbers have mean square 1 and one ridge means the same for every layer and width;
InfoNCE and DiME judge each block on its own, by its first two views, and are averaged over texts, so that figures
compare only between equal block sizes; a block's permutations for DiME are drawn from the seed and its number.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.model.entropy import effective_rank, entropy, normalise, spectrum_of, unit_rows
from pipeline.model.invariance import dime, infonce, information_bound, lidar_of

MEANS = (
    "prompt_entropy",
    "prompt_entropy_log_rows",
    "prompt_entropy_log_width",
    "prompt_entropy_log_least",
    "curvature",
    "infonce",
    "information_bound",
    "dime",
)
OF_TEXTS = 5
"""The first of these are figures of a text, the others of a block."""
SPREAD_ROUNDING = 1e-13
"""Class means whose root mean square distance is below this share of their length are equal."""


@dataclass(frozen=True)
class LayerFigures:
    """What one layer measures; NaN where a figure is undefined.

    Attributes:
        texts: pooled vectors that were seen.
        prompt_entropy: of a text's tokens, mean over texts; nats.
        prompt_entropy_log_rows: mean of each text's entropy / log(its tokens), texts of one token left out.
        prompt_entropy_log_width: mean of entropy / log D.
        prompt_entropy_log_least: mean of entropy / log(min(tokens, D)).
        curvature: of a text's tokens, mean over the texts that have one; radians.
        dataset_entropy: of the pooled vectors; nats.
        dataset_entropy_log_rows: / log(texts).
        dataset_entropy_log_width: / log D.
        dataset_entropy_log_least: / log(min(texts, D)).
        effective_rank: exp of their Shannon entropy, whatever the order of the entropies.
        infonce: of two views, mean over blocks by their texts.
        information_bound: log(texts in the block) − InfoNCE, averaged likewise.
        lidar: of all views.
        dime: of two views, averaged as InfoNCE.
    """

    texts: int
    prompt_entropy: float
    prompt_entropy_log_rows: float
    prompt_entropy_log_width: float
    prompt_entropy_log_least: float
    curvature: float
    dataset_entropy: float
    dataset_entropy_log_rows: float
    dataset_entropy_log_width: float
    dataset_entropy_log_least: float
    effective_rank: float
    infonce: float
    information_bound: float
    lidar: float
    dime: float


class LayerMoments:
    """Gathers one layer's figures; 3 D² float64 of memory.

    Args:
        width: D of the layer.
        order: α of the entropies and of DiME.
        temperature: of InfoNCE.
        ridge: of LiDAR, beside views whose numbers have mean square 1.
        permutations: of DiME, per block.
        seed: of those permutations.
        device: where the sums lie and the products are made; it needs float64.

    Raises:
        ValueError: a width below 1, or a setting that its measure refuses.
    """

    def __init__(
        self,
        width: int,
        *,
        order: float = 1.0,
        temperature: float = 0.1,
        ridge: float = 1e-4,
        permutations: int = 5,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        limits = {
            "width": width >= 1,
            "order": order >= 0,
            "temperature": temperature > 0,
            "ridge": ridge > 0,
            "permutations": permutations >= 1,
            "seed": seed >= 0,
        }
        if wrong := [name for name, within in limits.items() if not within]:
            raise ValueError(f"out of range: {', '.join(wrong)}")
        self.width = width
        self.order, self.temperature, self.ridge = float(order), float(temperature), float(ridge)
        self.permutations, self.seed = permutations, seed
        self._moment, self._between, self._within = (
            torch.zeros(width, width, dtype=torch.float64, device=device) for _ in range(3)
        )
        self._class_mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._texts = self._classes = self._views = 0
        self._sums = torch.zeros(len(MEANS), dtype=torch.float64)
        self._weights = torch.zeros(len(MEANS), dtype=torch.int64)

    @torch.no_grad()
    def add(self, texts: Tensor, token_figures: Tensor | None, views: Tensor | None, *, block: int) -> None:
        """Take in one block of texts, on any device; nothing of it is kept.

        Args:
            texts: pooled vectors [n, D].
            token_figures: per text its prompt entropy (raw), number of tokens and curvature [n, 3]; NaN and whatever
                is negative is undefined.
            views: pooled vectors of q ≥ 2 views of each text [n, q, D].
            block: number of the block, its own among all that are added or merged.

        Raises:
            ValueError: shapes that do not fit, fewer than 2 views, or a negative number.
        """
        self._require_shapes(texts, token_figures, views)
        if block < 0:
            raise ValueError(f"a block's number must be at least 0, not {block}")
        device = self._moment.device
        rows = unit_rows(texts.to(device))
        self._moment.addmm_(rows.mT, rows)
        self._texts += len(rows)
        if token_figures is not None:
            self._add_tokens(token_figures.to(device="cpu", dtype=torch.float64))
        if views is not None and len(views):
            self._add_views(unit_rows(views.to(device)).mul_(math.sqrt(self.width)), block)

    @torch.no_grad()
    def merge(self, other: Self) -> None:
        """Take in what another one has gathered of other blocks of the same layer.

        Raises:
            ValueError: the other one has another width or other settings.
        """
        if self._settings() != other._settings():
            raise ValueError(f"moments of {self._settings()} cannot take in those of {other._settings()}")
        device = self._moment.device
        self._moment += other._moment.to(device)
        self._texts += other._texts
        self._sums += other._sums
        self._weights += other._weights
        if other._classes:
            self._join(other._class_mean.to(device), other._classes)
            self._between += other._between.to(device)
            self._within += other._within.to(device)
            self._views += other._views

    def tensors(self) -> dict[str, Tensor]:
        """All that was gathered, and the settings, as float64 and int64 on the CPU; there the sums themselves."""
        return {
            "moment": self._moment.cpu(),
            "between": self._between.cpu(),
            "within": self._within.cpu(),
            "class_mean": self._class_mean.cpu(),
            "sums": self._sums,
            "weights": self._weights,
            "counts": torch.tensor([self._texts, self._classes, self._views]),
            "settings": torch.tensor([self.order, self.temperature, self.ridge], dtype=torch.float64),
            "draw": torch.tensor([self.permutations, self.seed]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> Self:
        """What ``tensors`` gave, as a copy that can be added to.

        Raises:
            ValueError: a tensor is missing, or of another shape or dtype.
        """
        order, temperature, ridge = _checked(tensors, "settings", 3).tolist()
        permutations, seed = _checked(tensors, "draw", 2, dtype=torch.int64).tolist()
        width = len(_checked(tensors, "class_mean", -1))
        made = cls(
            width,
            order=order,
            temperature=temperature,
            ridge=ridge,
            permutations=permutations,
            seed=seed,
            device=device,
        )
        for name in ("moment", "between", "within"):
            getattr(made, f"_{name}").copy_(_checked(tensors, name, width, width))
        made._class_mean.copy_(tensors["class_mean"])
        made._sums.copy_(_checked(tensors, "sums", len(MEANS)))
        made._weights.copy_(_checked(tensors, "weights", len(MEANS), dtype=torch.int64))
        made._texts, made._classes, made._views = _checked(tensors, "counts", 3, dtype=torch.int64).tolist()
        return made

    @torch.no_grad()
    def figures(self) -> LayerFigures:
        """The figures of all that was gathered so far."""
        eigenvalues = spectrum_of(self._moment)
        dataset = entropy(eigenvalues, self.order)
        ratios = {
            f"dataset_entropy_{how}": normalise(dataset, self._texts, self.width, how).item()
            for how in ("log_rows", "log_width", "log_least")
        }
        seen = {"dataset_entropy": dataset.item(), "effective_rank": effective_rank(eigenvalues).item(), **ratios}
        if not self._texts:
            seen = dict.fromkeys(seen, math.nan)
        # 0 / 0 is the NaN of a figure that no text and no block had.
        means = dict(zip(MEANS, (self._sums / self._weights).tolist(), strict=True))
        return LayerFigures(texts=self._texts, lidar=self._lidar(), **seen, **means)

    def _add_tokens(self, figures: Tensor) -> None:
        """Add prompt entropies, tokens and curvatures [n, 3]."""
        raw, tokens, turns = figures.masked_fill(figures < 0, torch.nan).unbind(dim=1)
        ratios = [normalise(raw, tokens, self.width, how) for how in ("raw", "log_rows", "log_width", "log_least")]
        columns = torch.stack([*ratios, turns])
        self._sums[:OF_TEXTS] += columns.nansum(dim=1)
        self._weights[:OF_TEXTS] += (~columns.isnan()).sum(dim=1)

    def _add_views(self, views: Tensor, block: int) -> None:
        """Add views [n, q, D] of length sqrt(D)."""
        n, q, width = views.shape
        means = views.mean(dim=1)
        mean = means.mean(dim=0)
        apart, inner = means - mean, (views - means[:, None]).view(n * q, width)
        self._join(mean, n)
        self._between.addmm_(apart.mT, apart)
        self._within.addmm_(inner.mT, inner)
        self._views += n * q
        if n < 2:
            return
        a, b = views[:, 0], views[:, 1]
        loss = infonce(a, b, self.temperature)
        broken = dime(a, b, order=self.order, permutations=self.permutations, seed=(self.seed, block))
        self._sums[OF_TEXTS:] += n * torch.stack([loss, information_bound(loss, n), broken]).cpu()
        self._weights[OF_TEXTS:] += n

    def _join(self, mean: Tensor, n: int) -> None:
        """Move the mean over classes, and add what lies between the old mean and that of n more classes."""
        both = self._classes + n
        shift = mean - self._class_mean
        self._between.addr_(shift, shift, alpha=self._classes * n / both)
        self._class_mean += shift * (n / both)
        self._classes = both

    def _lidar(self) -> float:
        if self._classes < 2:
            return math.nan
        between = self._between / self._classes
        # Lengths are sqrt(D); NaN is not below the limit and stays.
        if between.trace().item() <= SPREAD_ROUNDING**2 * self.width:
            return 0.0
        return lidar_of(between, self._within / self._views, self.ridge).item()

    def _settings(self) -> dict[str, float]:
        names = ("width", "order", "temperature", "ridge", "permutations", "seed")
        return {name: getattr(self, name) for name in names}

    def _require_shapes(self, texts: Tensor, token_figures: Tensor | None, views: Tensor | None) -> None:
        width = self.width
        if texts.ndim != 2 or texts.shape[1] != width:
            raise ValueError(f"texts must be [n, {width}], not {[*texts.shape]}")
        n = len(texts)
        if token_figures is not None and token_figures.shape != (n, 3):
            raise ValueError(f"token_figures must be [{n}, 3], not {[*token_figures.shape]}")
        if views is not None and (views.ndim != 3 or views.shape[::2] != (n, width) or views.shape[1] < 2):
            raise ValueError(f"views must be [{n}, q, {width}] with q at least 2, not {[*views.shape]}")


def _checked(tensors: Mapping[str, Tensor], name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor of that name, shape (−1 for any size) and dtype."""
    found = tensors.get(name)
    if found is None:
        raise ValueError(f"moments without {name!r}")
    fits = len(found.shape) == len(shape) and all(
        size in (-1, own) for size, own in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype != dtype:
        raise ValueError(f"{name!r} must be {dtype} {[*shape]}, not {found.dtype} {[*found.shape]}")
    return found

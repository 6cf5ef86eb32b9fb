"""Layer metrics of one layer, summed over blocks of texts in three D × D sums. Memory does not grow with the texts.

The accumulated sums, in float64:

    moment    Σ z zᵀ of pooled vectors z at unit length                    → dataset entropy, effective rank
    between   Σ_i (μ_i − μ)(μ_i − μ)ᵀ of a text's mean over its views      → LiDAR
    within    Σ_ij (x_ij − μ_i)(x_ij − μ_i)ᵀ of its views                  → LiDAR
    sums      of prompt entropies, curvatures, InfoNCE and DiME, with their weights

Two scatters of n_1 and n_2 texts are merged by adding n_1 n_2 / (n_1 + n_2) · δδᵀ, with δ the difference of their
means. No term cancels: the order of blocks and the process that adds them change only the rounding. Source: Chan, Golub
and LeVeque 1983, Algorithms for Computing the Sample Variance (The American Statistician 37).

The modules ``entropy``, ``curvature`` and ``invariance`` define the metrics. Choices of this project:

- Views are scaled to length sqrt(D) before LiDAR. One ridge then means the same for every layer and width.
- InfoNCE and DiME compare the first two views within each block, and are averaged over texts. They are comparable
  only between runs with equal block sizes.
- The seed and the number of a block determine the block's permutations for DiME.
"""

import math
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from marc_pipeline.layers.entropy import effective_rank, entropy, normalise, spectrum_of, unit_rows
from marc_pipeline.layers.invariance import dime, infonce, information_bound, lidar

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
PER_TEXT = 5
"""The first five means are over texts; the others are over blocks, weighted by their texts."""
SPREAD_ROUNDING = 1e-13
"""Class means count as equal if their root mean square distance is below this share of their length."""


class LayerMoments:
    """Accumulates the metrics of one layer in 3 D² float64 numbers.

    Args:
        width: D of the layer.
        order, temperature: α of the entropies and of DiME, temperature of InfoNCE.
        ridge: ridge of LiDAR, for views whose numbers have mean square 1.
        permutations, seed: number of permutations of DiME per block, and their seed.
        device: device of the sums and products; it must support float64.

    Raises:
        ValueError: a width below 1, or a setting outside the range of its metric.
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
            "width": (width, width >= 1, "at least 1"),
            "order": (order, order >= 0, "at least 0"),
            "temperature": (temperature, temperature > 0, "above 0"),
            "ridge": (ridge, ridge > 0, "above 0"),
            "permutations": (permutations, permutations >= 1, "at least 1"),
            "seed": (seed, seed >= 0, "at least 0"),
        }
        wrong = [f"{name} must be {limit}, not {value}" for name, (value, ok, limit) in limits.items() if not ok]
        if wrong:
            raise ValueError("; ".join(wrong))
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
        """Add one block of texts, on any device, without keeping its tensors.

        Args:
            texts: pooled vectors [n, D].
            token_figures: prompt entropy (raw), number of tokens and curvature of each text [n, 3]. NaN and negative
                values are undefined.
            views: pooled vectors of q ≥ 2 views of each text [n, q, D].
            block: number of the block, unique among all blocks that are added or merged.

        Raises:
            ValueError: wrong shapes, fewer than 2 views, or a negative block number.
        """
        self._require_shapes(texts, token_figures, views)
        if block < 0:
            raise ValueError(f"the block number must be at least 0, not {block}")
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
        """Add the sums of other blocks of the same layer.

        Raises:
            ValueError: ``other`` has a different width or different settings.
        """
        if self._settings() != other._settings():
            raise ValueError(f"moments with settings {other._settings()} cannot be merged into {self._settings()}")
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
        """Return all sums and settings as float64 and int64 tensors on the CPU. They share memory with CPU sums."""
        names = ("moment", "between", "within", "class_mean", "sums", "weights")
        return {name: getattr(self, f"_{name}").cpu() for name in names} | {
            "counts": torch.tensor([self._texts, self._classes, self._views]),
            "settings": torch.tensor([self.order, self.temperature, self.ridge], dtype=torch.float64),
            "draw": torch.tensor([self.permutations, self.seed]),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, device: torch.device | str = "cpu") -> Self:
        """Restore moments from the result of ``tensors``. The tensors are copied.

        Raises:
            ValueError: a tensor is missing, or has a wrong shape or dtype.
        """
        order, temperature, ridge = _checked(tensors, "settings", 3).tolist()
        permutations, seed = _checked(tensors, "draw", 2, dtype=torch.int64).tolist()
        width = len(_checked(tensors, "class_mean", -1))
        settings = {"order": order, "temperature": temperature, "ridge": ridge}
        moments = cls(width, **settings, permutations=permutations, seed=seed, device=device)
        for name in ("moment", "between", "within"):
            getattr(moments, f"_{name}").copy_(_checked(tensors, name, width, width))
        moments._class_mean.copy_(tensors["class_mean"])
        moments._sums.copy_(_checked(tensors, "sums", len(MEANS)))
        moments._weights.copy_(_checked(tensors, "weights", len(MEANS), dtype=torch.int64))
        moments._texts, moments._classes, moments._views = _checked(tensors, "counts", 3, dtype=torch.int64).tolist()
        return moments

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Return the metrics of all texts so far; undefined ones are NaN. Entropies are in nats.

        Returns:
            texts: number of pooled vectors.
            prompt_entropy: mean entropy of a text's tokens; with the suffixes log_rows, log_width and log_least divided
                by log(tokens), log D and log(min(tokens, D)). log_rows and log_least leave out texts of one token.
            curvature: mean over the texts that have a curvature, radians.
            dataset_entropy: entropy of the pooled vectors; with the same suffixes, for texts instead of tokens.
            effective_rank: exp of the Shannon entropy of the pooled vectors, for every ``order``.
            infonce, dime: InfoNCE and DiME of two views, means over blocks weighted by their texts.
            information_bound: log(texts in the block) − InfoNCE, averaged in the same way.
            lidar: LiDAR of all views.
        """
        eigenvalues = spectrum_of(self._moment)
        dataset = entropy(eigenvalues, self.order)
        ratios = {
            f"dataset_entropy_{how}": normalise(dataset, self._texts, self.width, how).item()
            for how in ("log_rows", "log_width", "log_least")
        }
        seen = {"dataset_entropy": dataset.item(), "effective_rank": effective_rank(eigenvalues).item(), **ratios}
        if not self._texts:
            seen = dict.fromkeys(seen, math.nan)
        # 0 / 0 gives NaN for a metric that is undefined in every text or block.
        means = dict(zip(MEANS, (self._sums / self._weights).tolist(), strict=True))
        return {"texts": float(self._texts), "lidar": self._lidar(), **seen, **means}

    def _add_tokens(self, figures: Tensor) -> None:
        """Add prompt entropies, tokens and curvatures [n, 3]."""
        raw, tokens, turns = figures.masked_fill(figures < 0, torch.nan).unbind(dim=1)
        ratios = [normalise(raw, tokens, self.width, how) for how in ("raw", "log_rows", "log_width", "log_least")]
        columns = torch.stack([*ratios, turns])
        self._sums[:PER_TEXT] += columns.nansum(dim=1)
        self._weights[:PER_TEXT] += (~columns.isnan()).sum(dim=1)

    def _add_views(self, views: Tensor, block: int) -> None:
        """Add views [n, q, D] of length sqrt(D)."""
        n, q, width = views.shape
        means = views.mean(dim=1)  # [n, D]
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
        gained = dime(a, b, order=self.order, permutations=self.permutations, seed=(self.seed, block))
        self._sums[PER_TEXT:] += n * torch.stack([loss, information_bound(loss, n), gained]).cpu()
        self._weights[PER_TEXT:] += n

    def _join(self, mean: Tensor, n: int) -> None:
        """Update the mean over classes with n more classes, and add the distance of both means to the scatter."""
        both = self._classes + n
        shift = mean - self._class_mean
        self._between.addr_(shift, shift, alpha=self._classes * n / both)
        self._class_mean += shift * (n / both)
        self._classes = both

    def _lidar(self) -> float:
        if self._classes < 2:
            return math.nan
        between = self._between / self._classes
        # Lengths are sqrt(D). NaN ≤ x is false, so the result is NaN if a number is NaN.
        if between.trace().item() <= SPREAD_ROUNDING**2 * self.width:
            return 0.0
        return lidar(between, self._within / self._views, self.ridge).item()

    def _settings(self) -> dict[str, float]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

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
    """Return the tensor of this name after checking its shape (−1 is any size) and dtype."""
    found = tensors.get(name)
    if found is None:
        raise ValueError(f"moments: the tensor {name!r} is missing")
    fits = len(found.shape) == len(shape) and all(
        size in (-1, own) for size, own in zip(shape, found.shape, strict=True)
    )
    if not fits or found.dtype != dtype:
        raise ValueError(f"{name!r} must be {dtype} {[*shape]}, not {found.dtype} {[*found.shape]}")
    return found

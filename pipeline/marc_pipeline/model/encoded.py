"""The result of encoding texts, and the work of one window of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from marc_pipeline.model.device import DeviceClock


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 [n, d] in the order of the texts, and their cost.

    Attributes:
        vectors: zeros for a text that failed.
        tokens: of all texts; ``padded_tokens``: including padding.
        model_seconds: compute time of the model on its device.
        cut_texts, lost_tokens: number of texts beyond the limit of the tokenizer, and estimate of their tokens beyond.
        failed: reason by row, for each text that fails even as the only one of its batch.
    """

    vectors: NDArray[np.float32]
    tokens: int
    padded_tokens: int
    model_seconds: float
    cut_texts: int = 0
    lost_tokens: int = 0
    failed: dict[int, str] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Sequence["Encoded"]) -> Self:
        """Return the parts, of which no text failed, as one; without parts, vectors [0, 0]."""
        figures = [one.name for one in fields(cls) if one.name not in ("vectors", "failed")]
        vectors = np.concatenate([part.vectors for part in parts]) if parts else np.empty((0, 0), np.float32)
        return cls(vectors, **{name: sum(getattr(part, name) for part in parts) for name in figures})


@dataclass(frozen=True)
class WindowWork:
    """Token ids of texts or chunks of one window.

    Attributes:
        ids: token ids by row.
        head: maps pooled states to the output of a row.
        clock: measures the model.
        failed: reason by row; filled during the work.
        texts_per_row: number of texts that a finished row counts as in the progress.
    """

    ids: list[NDArray[np.int32]]
    head: nn.Module
    clock: DeviceClock
    failed: dict[int, str]
    texts_per_row: int = 1

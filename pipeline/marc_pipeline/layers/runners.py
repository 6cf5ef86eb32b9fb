"""Model runners of the layer sweep: a block of texts or images and its views through the model, all layers at once."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image

from marc_pipeline.config import EncodeSettings, LayerSettings, TrainSettings
from marc_pipeline.errors import Unencodable
from marc_pipeline.layers.image_files import read_images
from marc_pipeline.layers.image_views import image_views
from marc_pipeline.layers.images import ImageEncoder, load_processor, load_vision
from marc_pipeline.layers.measured import TOKEN_FIGURES, MeasuredLayers, weights_bytes
from marc_pipeline.layers.views import text_views
from marc_pipeline.model.backbone import blocks, load_backbone
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.model.tokens import CHARACTERS_PER_TOKEN
from marc_pipeline.training.states import cutting_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class BlockStates:
    """States of every layer for a block of n inputs.

    Attributes:
        plain: pooled states and token figures [n, L + 1, D + 3].
        views: pooled states [q, n, L + 1, D] of q views.
        failed: reason for each row whose input, or one of its views, the model cannot process.
    """

    plain: NDArray[np.float32]
    views: NDArray[np.float32]
    failed: dict[int, str]


class TextRunner:
    """Runs texts through a language model, with the encoder of the nightly run."""

    def __init__(
        self,
        train: TrainSettings,
        encode: EncodeSettings,
        layers: LayerSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        backbone = load_backbone(train.backbone, dtype=dtype)
        tokenizer, max_tokens = cutting_tokenizer(backbone, train)
        self.measured = MeasuredLayers(backbone, train.pooling, order=layers.order)
        self.facts = _facts(backbone, device, dtype, max_tokens=max_tokens)
        # Views use this many first characters only, because the tokenizer truncates the rest anyway.
        self._characters = CHARACTERS_PER_TOKEN * max_tokens
        self._layers = layers
        self._encoder = Encoder(
            self.measured,
            tokenizer,
            head=torch.nn.Identity(),
            device=device,
            dtype=dtype,
            token_budget=encode.token_budget,
        )

    def run(self, inputs: Sequence[str], first: int) -> BlockStates:
        """Return all layers of texts and of their views; ``first`` is the first text's number in the sample."""
        wanted = self._layers
        cut = [text[: self._characters] for text in inputs]
        views = text_views(cut, views=wanted.views, seed=wanted.seed, probability=wanted.probability, first=first)
        failed: dict[int, str] = {}
        with self.measured.measuring():
            plain = self._encoded(inputs, failed)
        width = self.facts["width"]
        states = np.empty((len(views), *plain.shape[:2], width), np.float32)
        for number, texts in enumerate(views):
            states[number] = self._encoded(texts, failed)[..., :width]
        return BlockStates(plain, states, failed)

    def _encoded(self, texts: Sequence[str], failed: dict[int, str]) -> NDArray[np.float32]:
        ((_, encoded),) = self._encoder.stream([(None, texts)])
        failed.update(encoded.failed)
        # If all texts fail, the encoder does not know the shape of a row.
        shape = (len(texts), self.facts["layers"] + 1, self.facts["width"] + len(TOKEN_FIGURES))
        return encoded.vectors if len(encoded.failed) < len(texts) else np.zeros(shape, np.float32)


class ImageRunner:
    """Runs images through a vision model."""

    def __init__(
        self, train: TrainSettings, layers: LayerSettings, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        backbone = load_vision(train.backbone, dtype=dtype)
        self.measured = MeasuredLayers(backbone, train.pooling, order=layers.order)
        self.facts = _facts(backbone, device, dtype, max_tokens=0)
        self._layers = layers
        self._encoder = ImageEncoder(self.measured, load_processor(train.backbone), device=device, dtype=dtype)

    def run(self, inputs: Sequence[str], first: int) -> BlockStates:
        """Return all layers of the images at these paths, and of their views."""
        layers, width = self.facts["layers"] + 1, self.facts["width"]
        plain = np.zeros((len(inputs), layers, width + len(TOKEN_FIGURES)), np.float32)
        views = np.zeros((self._layers.views, len(inputs), layers, width), np.float32)
        failed: dict[int, str] = {}
        # A decoded photograph is about a hundred times larger than its states, so that few are in memory at a time.
        for start in range(0, len(inputs), IMAGES_AT_ONCE):
            images, broken = read_images([Path(path) for path in inputs[start : start + IMAGES_AT_ONCE]])
            failed.update({start + place: f"{inputs[start + place]}: {why}" for place, why in broken.items()})
            rows = [row for row in range(start, min(start + IMAGES_AT_ONCE, len(inputs))) if row not in failed]
            with self.measured.measuring():
                plain[rows], odd = self._encoded(images)
            for states, augmented in zip(views, self._views(images, [first + row for row in rows]), strict=True):
                found, more = self._encoded(augmented)
                states[rows], odd = found[..., :width], {**odd, **more}
            failed.update({rows[place]: f"{inputs[rows[place]]}: {why}" for place, why in odd.items()})
        return BlockStates(plain, views, failed)

    def _views(self, images: Sequence[Image], numbers: Sequence[int]) -> list[list[Image]]:
        """Return views [q][n] of images, each with its number in the sample."""
        views: list[list[Image]] = [[] for _ in range(self._layers.views)]
        for number, image in zip(numbers, images, strict=True):
            made = image_views([image], views=self._layers.views, seed=self._layers.seed, first=number)
            for view, (augmented,) in zip(views, made, strict=True):
                view.append(augmented)
        return views

    def _encoded(self, images: Sequence[Image]) -> tuple[NDArray[np.float32], dict[int, str]]:
        """Return rows [n, L + 1, D + 3]; images with NaN or infinity get zeros and a reason."""
        rows = np.zeros((len(images), self.facts["layers"] + 1, self.facts["width"] + len(TOKEN_FIGURES)), np.float32)
        failed: dict[int, str] = {}
        if not images:
            return rows, failed
        with suppress(Unencodable):
            rows[:] = self._encoder.encode(images)
            return rows, failed
        for place, image in enumerate(images):
            try:
                rows[place] = self._encoder.encode([image])[0]
            except Unencodable as error:
                failed[place] = str(error)
        return rows, failed


def _facts(backbone: "PreTrainedModel", device: torch.device, dtype: torch.dtype, *, max_tokens: int) -> dict[str, Any]:
    return {
        "layers": len(blocks(backbone)[2]),
        "width": backbone.config.hidden_size,
        "max_tokens": max_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "weights_bytes": weights_bytes(backbone, item_bytes=dtype.itemsize),
    }

"""Augmented views of images: random crops, flips and colours, with a fixed seed per image and view."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from marc_pipeline.errors import UserError

# The longest side of a view, in pixels: at least the input size of common models, and small enough to augment fast.
VIEW_SIDE = 1024


def image_views(images: Sequence[Image.Image], *, views: int, seed: int, first: int = 0) -> list[list[Image.Image]]:
    """Return augmented copies of images, [views][images], before a processor's resizing.

    ``seed``, the number of the view and the number of the image in the whole sample determine a view. A block of a
    sample, whose first image has the number ``first``, therefore gets the same views as in the whole sample. The
    longest side of a view is at most :data:`VIEW_SIDE` pixels.

    Raises:
        UserError: kornia is not installed.
    """
    try:
        from kornia import augmentation  # noqa: PLC0415 - only vision needs it
    except ModuleNotFoundError as error:
        raise UserError(f"views of images need {error.name}: install marc-pipeline[vision]") from None

    made: list[list[Image.Image]] = [[] for _ in range(views)]
    for number, image in enumerate(images, start=first):
        pixels = _pixels(image)
        augment = _augmentation(augmentation, *pixels.shape[2:])
        for view in range(views):
            words = np.random.SeedSequence((seed, view, number)).generate_state(1, np.uint64)
            # kornia uses only the CPU's global generator; fork_rng restores its state.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(words[0] >> 1))
                augmented: Tensor = augment(pixels)[0]
            values = (augmented.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)  # [h, w, 3]
            made[view].append(Image.fromarray(values.numpy()))
    return made


def _pixels(image: Image.Image) -> Tensor:
    """Return pixels [1, 3, h, w] in [0, 1], scaled down to at most the size of a view."""
    small = image.convert("RGB")
    small.thumbnail((VIEW_SIDE, VIEW_SIDE))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255


def _augmentation(kornia: Any, height: int, width: int) -> nn.Module:  # noqa: ANN401 - a module without types
    """Return a random crop of 50 to 100 % of the area, a flip with probability 0.5, and a colour change."""
    shape = width / height
    return nn.Sequential(
        # Relative to the image's own shape, so that resizing distorts it by a third at most.
        kornia.RandomResizedCrop((height, width), scale=(0.5, 1.0), ratio=(0.75 * shape, shape / 0.75)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    )

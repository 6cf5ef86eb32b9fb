"""Vision backbones: load a vision transformer and its image processor, and encode images like texts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from marc_pipeline.errors import Unencodable, UserError
from marc_pipeline.model.backbone import blocks, load_backbone, locate
from marc_pipeline.model.batches import TokenBatch
from marc_pipeline.model.device import OutOfMemory, is_out_of_memory
from marc_schemas.bundle import Pooling

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


@dataclass(frozen=True)
class ImageBatch:
    """Images of one size. Tokens are the model's own (CLS, registers), followed by one per patch.

    Attributes:
        pixels: [b, c, h, w], normalised.
    """

    pixels: Tensor

    def run(self, model: "PreTrainedModel") -> Tensor:
        """Return the model's last hidden states [b, t, D]."""
        states: Tensor = model(pixel_values=self.pixels.to(model.dtype)).last_hidden_state
        return states

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """Pool states [b, t, D] to one float32 vector per image [b, D]. A mean includes all tokens, CLS too."""
        if pooling == "mean":
            return states.float().mean(dim=1)
        return states[:, 0 if pooling == "cls" else -1].float()

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all row numbers [b] and states [b, t, D] as one group: images of one size have equally many tokens."""
        yield torch.arange(len(states), device=states.device), states

    def to(self, device: torch.device) -> Self:
        """Return the batch on another device."""
        return type(self)(self.pixels.to(device))


def is_vision(model: "PreTrainedModel") -> bool:
    """Return whether a model's input is pixels."""
    return model.main_input_name == "pixel_values"


def load_vision(name: str, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Load a vision transformer by id, path or ``package:`` name, in evaluation mode.

    ViT, DeiT, DINOv2, DINOv3 and BEiT work, among others. Of CLIP and SigLIP, this is the vision tower.

    Raises:
        UserError: the model is unknown, does not take pixels, or changes its tokens between blocks.
    """
    model = load_backbone(name, dtype=dtype)
    model = getattr(model, "vision_model", model)
    if not is_vision(model):
        raise UserError(f"backbone {name!r} takes {model.main_input_name}; choose a vision model, which takes pixels")
    reason = _incomparable(model)
    if reason:
        raise UserError(
            f"backbone {name!r} ({type(model).__name__}) is not a vision transformer of constant width: {reason}"
        )
    return model


@torch.inference_mode()
def _incomparable(model: "PreTrainedModel") -> str | None:
    """Return why the states of a model's layers cannot be compared, or None if they can.

    A trial pass decides, not a list of names. Pyramids (Swin, ConvNeXt) change their width between blocks, masked
    autoencoders drop random patches, and some models need more inputs than pixels.
    """
    config, layers = model.config, len(blocks(model)[2])
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else size
    noise = torch.rand(getattr(config, "num_channels", 3), height, width, generator=torch.Generator().manual_seed(0))
    twins = torch.stack([noise, noise]).to(model.dtype)
    try:
        output = model(pixel_values=twins, output_hidden_states=True)
        states: list[Tensor] = [*output.hidden_states, output.last_hidden_state]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        return f"it fails on images of {height} × {width} pixels ({str(error).splitlines()[0]})"
    shapes = {tuple(layer.shape) for layer in states}
    if len(states) != layers + 2 or len(shapes) > 1 or states[0].shape[::2] != (2, getattr(config, "hidden_size", 0)):
        return f"for two images its layers have the shapes {', '.join(map(str, sorted(shapes)))}"
    # The tolerance allows for rounding, but not for other tokens.
    if any((layer[0] - layer[1]).abs().max() > 0.1 * layer.abs().max() for layer in states):
        return "it gives different states for the same image"
    return None


def load_processor(name: str) -> "BaseImageProcessor":
    """Load the backbone's image processor, which resizes, crops and normalises. It does not need torchvision.

    Raises:
        UserError: the backbone has no image processor.
    """
    from transformers import AutoImageProcessor  # noqa: PLC0415 - as slow as the models'

    try:
        # The PIL backend gives the same pixels with and without torchvision.
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            locate(name), backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the image processor of {name!r}: {str(error).splitlines()[0]}") from None
    return processor


class ImageEncoder:
    """Encodes images with a vision backbone and pooling, on one device.

    Args:
        module: maps an :class:`ImageBatch` to one row per image [b, ...], for example
            :class:`~marc_pipeline.model.backbone.PooledLayers` [b, L + 1, D]. It is moved and cast in place.
        processor: the backbone's image processor.
        dtype: type of the module's weights; pooling is in float32.
        batch: images per pass, halved when the device runs out of memory.
    """

    def __init__(
        self,
        module: nn.Module,
        processor: "BaseImageProcessor",
        *,
        device: torch.device,
        dtype: torch.dtype,
        batch: int = 32,
    ) -> None:
        self._module: Callable[[TokenBatch], Tensor] = module.to(device=device, dtype=dtype)
        self._processor = processor
        self.device = device
        self.batch = batch

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return float32 rows [n, ...] of RGB images, in the same order.

        Raises:
            Unencodable: an image's row contains NaN or infinity.
            OutOfMemory: the device lacks memory for a single image.
        """
        parts: list[NDArray[np.float32]] = []
        start = 0
        while start < len(images):
            rows = self._rows(images[start : start + self.batch])
            if rows is None:
                continue
            finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
            if not finite.all():
                raise Unencodable(f"image {start + int(finite.argmin())} cannot be encoded: the result is not finite")
            parts.append(rows)
            start += len(rows)
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)

    def _rows(self, images: Sequence[Image.Image]) -> NDArray[np.float32] | None:
        """Return the rows of a batch; None if it did not fit, after halving the batch size."""
        pixels: Tensor = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        try:
            rows: NDArray[np.float32] = self._module(ImageBatch(pixels).to(self.device)).float().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        else:
            return rows
        # Outside the except block, so that the error's traceback no longer keeps the tensors alive.
        if len(images) == 1:
            raise OutOfMemory(f"{self.device} lacks memory for a single image: {reason}")
        self.batch = len(images) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

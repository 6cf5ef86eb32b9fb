"""Vision backbones: images read, seen in augmented views, and encoded like texts."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor, nn

from pipeline.errors import Unencodable, UserError
from pipeline.model.backbone import blocks, load_backbone, locate
from pipeline.model.batches import TokenBatch
from pipeline.model.encoder import OutOfMemory, is_out_of_memory
from schemas.bundle import Pooling

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

# 0.4 GB as RGB: the photographs of nearly all cameras, and less than the 179 million that Pillow refuses to open.
MAX_PIXELS = 1 << 27
# A processor that scales the shorter side up to some hundred pixels makes a bomb of a line.
MAX_RATIO = 50
# The longest side of a view: as much as any processor leaves, and little enough to augment thousands.
VIEW_SIDE = 1024


class UnreadableImage(ValueError):
    """A file that holds no image, or not a whole one: a matter of this file alone."""


@dataclass(frozen=True)
class ImageBatch:
    """Images of one size; a token is a patch, and before the patches comes what the model puts there (CLS, registers).

    Attributes:
        pixels: [b, c, h, w], normalised.
    """

    pixels: Tensor

    def run(self, model: "PreTrainedModel") -> Tensor:
        """The model's last states [b, t, D]."""
        states: Tensor = model(pixel_values=self.pixels.to(model.dtype)).last_hidden_state
        return states

    def pool(self, states: Tensor, pooling: Pooling) -> Tensor:
        """One float32 vector per image: [b, t, D] to [b, D]; a mean counts every token, also CLS."""
        if pooling == "mean":
            return states.float().mean(dim=1)
        return states[:, 0 if pooling == "cls" else -1].float()

    def by_length(self, states: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places of all images [b] and their states [b, t, D]: images of one size have as many tokens."""
        yield torch.arange(len(states), device=states.device), states

    def to(self, device: torch.device) -> Self:
        """The same batch on another device."""
        return type(self)(self.pixels.to(device))


def is_vision(model: "PreTrainedModel") -> bool:
    """Whether a model takes pixels."""
    return model.main_input_name == "pixel_values"


def load_vision(name: str, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """A vision transformer by id, path or ``package:`` name, in evaluation mode: ViT, DeiT, DINOv2, DINOv3, BEiT.

    Of a model with two towers, as CLIP and SigLIP are, the one that sees.

    Raises:
        UserError: there is no such model, or its blocks do not hand on the same tokens.
    """
    model = load_backbone(name, dtype=dtype)
    model = getattr(model, "vision_model", model)
    if not is_vision(model):
        raise UserError(f"backbone {name!r} takes {model.main_input_name}: it is no vision model")
    trouble = _trouble(model)
    if trouble:
        raise UserError(f"backbone {name!r} ({type(model).__name__}) is no vision transformer of one width: {trouble}")
    return model


@torch.inference_mode()
def _trouble(model: "PreTrainedModel") -> str | None:
    """Why the states of a model's layers cannot be compared; None where they can.

    Seen by a pass, not by a list of names: pyramids (Swin, ConvNeXt) change their width on the way, masked autoencoders
    see another part of the image each time, others take more than pixels.
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
        return f"of two images its layers give {', '.join(map(str, sorted(shapes)))}"
    # Other tokens, not other roundings.
    if any((layer[0] - layer[1]).abs().max() > 0.1 * layer.abs().max() for layer in states):
        return "it does not see the same in the same image"
    return None


def load_processor(name: str) -> "BaseImageProcessor":
    """What a backbone does to images before it sees them: size, crop, normalisation. Needs no torchvision.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoImageProcessor  # noqa: PLC0415 - as slow as the models'

    try:
        # The same pixels whether torchvision is installed or not.
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            locate(name), backend="pil", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the image processor of {name!r}: {str(error).splitlines()[0]}") from None
    return processor


def image_files(folder: Path) -> list[Path]:
    """Files below a folder whose names are those of images, in order; what is hidden is left out."""
    kinds = set(Image.registered_extensions())
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in kinds and not hidden and path.is_file():
            found.append(path)
    return found


def read_image(path: Path) -> Image.Image:
    """An image as people see it: 8-bit RGB, upright; of a film the first picture.

    Raises:
        UnreadableImage: the file is no image, is broken or cut short, or would be too large.
        OSError: the file cannot be read.
    """
    try:
        # What Pillow warns of is either ruled out here or mended by it.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            _require_size(image)
            return _rgb(ImageOps.exif_transpose(image))
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:
        # Decoders raise all sorts of things on broken files. What has a number is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableImage(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


def read_images(paths: Sequence[Path]) -> tuple[list[Image.Image], dict[int, str]]:
    """The images that can be read, in order, and the reasons, by place among the paths, why others cannot.

    Raises:
        OSError: a file cannot be read, or is not there.
    """
    images: list[Image.Image] = []
    failed: dict[int, str] = {}
    for number, path in enumerate(paths):
        try:
            images.append(read_image(path))
        except UnreadableImage as error:
            failed[number] = str(error)
    return images, failed


def _require_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImage(f"{width} × {height} pixels are more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnreadableImage(f"{width} × {height} pixels: one side is more than {MAX_RATIO} times the other")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would cut 16 bits off at 255: a white image.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise UnreadableImage("32 bits per pixel: what is black and what is white is not known")
    return image.convert("RGB")


class ImageEncoder:
    """A vision backbone with pooling, on one device.

    Args:
        module: from an :class:`ImageBatch` to one row per image [b, ...], for example
            :class:`~pipeline.model.backbone.PooledLayers` [b, L + 1, D]. It is altered: moved and cast.
        processor: the backbone's own.
        device: where to run.
        dtype: of the module's weights; pooling is float32.
        batch: images at once, halved where the device lacks memory.
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
        """Rows float32 [n, ...] of RGB images, in their order.

        Raises:
            Unencodable: an image's row holds NaN or infinity.
            OutOfMemory: the device cannot hold a single image.
        """
        parts: list[NDArray[np.float32]] = []
        start = 0
        while start < len(images):
            rows = self._rows(images[start : start + self.batch])
            if rows is None:
                continue
            finite = np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)
            if not finite.all():
                raise Unencodable(f"image {start + int(finite.argmin())} cannot be encoded: it gives NaN or infinity")
            parts.append(rows)
            start += len(rows)
        return np.concatenate(parts) if parts else np.empty((0, 0), np.float32)

    def _rows(self, images: Sequence[Image.Image]) -> NDArray[np.float32] | None:
        """Rows of a batch; None where it was too large, and smaller ones are to come."""
        pixels: Tensor = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        try:
            rows: NDArray[np.float32] = self._module(ImageBatch(pixels).to(self.device)).float().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        else:
            return rows
        # Outside of the handler: the error's frames no longer hold on to what filled the memory.
        if len(images) == 1:
            raise OutOfMemory(f"{self.device} lacks memory for a single image: {reason}")
        self.batch = len(images) // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def image_views(images: Sequence[Image.Image], *, views: int, seed: int, first: int = 0) -> list[list[Image.Image]]:
    """Augmented copies of images, [views][images], before a processor's resizing: random crops, flips and colours.

    A view is seeded with ``seed``, its number, and the number of the image in the whole sample: a block of a sample
    gets the views that it would get in the whole. The longest side of a view is at most :data:`VIEW_SIDE` pixels.

    Args:
        images: of the block, RGB.
        views: of each image.
        seed: of the sample.
        first: number of the block's first image in the sample.

    Raises:
        UserError: kornia is not installed.
    """
    try:
        from kornia import augmentation  # noqa: PLC0415 - only vision needs it
    except ModuleNotFoundError as error:
        raise UserError(f"views of images need {error.name}: install marc-pipeline[vision]") from None

    seen: list[list[Image.Image]] = [[] for _ in range(views)]
    for number, image in enumerate(images, start=first):
        pixels = _pixels(image)
        augment = _augmentation(augmentation, *pixels.shape[2:])
        for view in range(views):
            words = np.random.SeedSequence((seed, view, number)).generate_state(1, np.uint64)
            # Only the CPU's generator is drawn from, and put back.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(int(words[0] >> 1))
                augmented: Tensor = augment(pixels)[0]
            bytes_ = (augmented.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
            seen[view].append(Image.fromarray(bytes_.numpy()))
    return seen


def _pixels(image: Image.Image) -> Tensor:
    """Pixels [1, 3, h, w] in [0, 1] of an image, scaled down where it is larger than a view."""
    small = image.convert("RGB")
    small.thumbnail((VIEW_SIDE, VIEW_SIDE))
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)[None].float() / 255


def _augmentation(kornia: Any, height: int, width: int) -> nn.Module:  # noqa: ANN401 - a module without types
    """A random crop of half of the area to all of it, scaled up again, a flip in one of two, and other colours."""
    shape = width / height
    return nn.Sequential(
        # Relative to the image's own shape: what is scaled back is distorted by a third at most.
        kornia.RandomResizedCrop((height, width), scale=(0.5, 1.0), ratio=(0.75 * shape, shape / 0.75)),
        kornia.RandomHorizontalFlip(),
        kornia.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
    )

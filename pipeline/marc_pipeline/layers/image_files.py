"""Image files: find them below a folder, read each one upright as 8-bit RGB, and report unreadable ones."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# 0.4 GB as RGB. Nearly all cameras make smaller images; Pillow itself refuses images above 179 million pixels.
MAX_PIXELS = 1 << 27
# A processor scales the shorter side up to some hundred pixels, so that a very long image would exhaust the memory.
MAX_RATIO = 50


class UnreadableImage(ValueError):
    """The file is not an image, is damaged, or is too large. Other files are not affected."""


def image_files(folder: Path) -> list[Path]:
    """Return the files below a folder whose suffix is that of an image format, sorted, without hidden files."""
    suffixes = set(Image.registered_extensions())
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in suffixes and not hidden and path.is_file():
            found.append(path)
    return found


def read_image(path: Path) -> Image.Image:
    """Return an image as upright 8-bit RGB; of an animation, the first frame.

    Raises:
        UnreadableImage: the file is not an image, is damaged or truncated, or is too large.
        OSError: the file cannot be read from disk.
    """
    try:
        # Pillow's warnings concern sizes, which are checked here, and metadata, which Pillow repairs.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            _require_size(image)
            return _rgb(ImageOps.exif_transpose(image))
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:
        # Decoders raise many kinds of errors on damaged files. An OSError with an errno comes from the disk.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UnreadableImage(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None


def read_images(paths: Sequence[Path]) -> tuple[list[Image.Image], dict[int, str]]:
    """Return the readable images, in order, and for each unreadable file its index in ``paths`` and the reason.

    Raises:
        OSError: a file is missing or cannot be read from disk.
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
        # Pillow would clip 16-bit values at 255, which makes the image white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in {"I", "F"}:
        raise UnreadableImage("32 bits per pixel: the values of black and white are unknown")
    return image.convert("RGB")

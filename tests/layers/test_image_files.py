"""Reading image files: any format becomes upright 8-bit RGB, and each unreadable file is reported with its reason."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from marc_pipeline.layers.image_files import UnreadableImage, read_image, read_images
from tiny_models import noise_image

RED, GREY = (200, 10, 20), (130, 130, 130)


def palette_image() -> Image.Image:
    image = Image.new("RGB", (6, 4), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = bytes([128] * 4)
    return image


@pytest.mark.parametrize(
    ("image", "suffix", "expected"),
    [
        (Image.new("RGB", (6, 4), RED), "png", RED),
        (Image.new("RGBA", (6, 4), (*RED, 128)), "png", RED),
        (palette_image(), "png", RED),
        (Image.new("P", (6, 4), 0), "gif", (0, 0, 0)),
        (Image.new("L", (6, 4), 130), "png", GREY),
        (Image.new("LA", (6, 4), (130, 7)), "png", GREY),
        (Image.new("1", (6, 4), 1), "png", (255, 255, 255)),
        (Image.new("I;16", (6, 4), 130 * 256 + 7), "png", GREY),
        (Image.new("I;16", (6, 4), 130 * 256 + 7), "tiff", GREY),
        (Image.new("CMYK", (6, 4), (125, 125, 125, 0)), "tiff", GREY),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_any_kind_of_image_becomes_8_bit_rgb(
    tmp_path: Path, image: Image.Image, suffix: str, expected: tuple[int, int, int]
) -> None:
    image.save(tmp_path / f"image.{suffix}")
    found = read_image(tmp_path / f"image.{suffix}")
    assert (found.mode, found.size) == ("RGB", (6, 4))
    assert found.getpixel((2, 2)) == expected


# The transformation that each value of the EXIF tag Orientation (274) describes, in numpy.
ORIENTATIONS = {
    1: lambda rows: rows,
    2: lambda rows: rows[:, ::-1],
    3: lambda rows: rows[::-1, ::-1],
    4: lambda rows: rows[::-1],
    5: lambda rows: rows.swapaxes(0, 1),
    6: lambda rows: np.rot90(rows, 1),
    7: lambda rows: rows[::-1, ::-1].swapaxes(0, 1),
    8: lambda rows: np.rot90(rows, -1),
}


@pytest.mark.parametrize("orientation", sorted(ORIENTATIONS))
def test_an_image_is_read_upright_and_damaged_metadata_is_ignored(tmp_path: Path, orientation: int) -> None:
    upright = np.asarray(noise_image(7, 5))
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "image.png")), upright)
    for damaged in (b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\xff\xff\xff\x0f"):
        noise_image().save(tmp_path / "image.jpg", exif=damaged)
        assert read_image(tmp_path / "image.jpg").size == (40, 30)


def bytes_of(image: Image.Image, path: Path) -> bytes:
    image.save(path)
    return path.read_bytes()


def test_every_unreadable_file_is_reported_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marc_pipeline.layers.image_files.MAX_PIXELS", 2000)
    jpeg = bytes_of(noise_image(), tmp_path / "0.jpg")
    png = bytes_of(noise_image(), tmp_path / "0.png")
    broken = bytearray(png)
    broken[len(png) // 2] ^= 255
    contents: list[tuple[bytes, str | None]] = [
        (jpeg, None),
        (b"", "cannot identify image file"),
        (b"no image\n" * 100, "cannot identify image file"),
        (jpeg[:-500], "truncated"),
        (png[:-500], "truncated"),
        (png, None),
        (bytes(broken), "Error"),
        (bytes_of(noise_image(50, 41), tmp_path / "large.png"), "50 × 41 pixels are more than 2,000"),
        (bytes_of(noise_image(151, 3), tmp_path / "line.png"), "one side is more than 50 times the other"),
        (bytes_of(Image.new("I", (4, 4), 7), tmp_path / "32.tiff"), "32 bits per pixel"),
        (bytes_of(Image.new("F", (4, 4), 0.5), tmp_path / "float.tiff"), "32 bits per pixel"),
        (jpeg, None),
    ]
    paths = [tmp_path / f"{number}.file" for number in range(len(contents))]
    for path, (content, _) in zip(paths, contents, strict=True):
        path.write_bytes(content)
    images, failed = read_images(paths)
    assert set(failed) == {number for number, (_, reason) in enumerate(contents) if reason is not None}
    for number, reason in failed.items():
        assert (contents[number][1] or "") in reason, number
        with pytest.raises(UnreadableImage):
            read_image(paths[number])
    assert [image.tobytes() for image in images] == [read_image(paths[number]).tobytes() for number in (0, 5, 11)]
    assert images[0].tobytes() != images[1].tobytes()


@pytest.mark.parametrize("pixels", [1500, 500])
def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    monkeypatch.setattr("marc_pipeline.layers.image_files.MAX_PIXELS", 1000)
    # Pillow warns above its own limit, and refuses images above twice the limit.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    noise_image(40, 45).save(tmp_path / "image.png")
    with warnings.catch_warnings(action="error"), pytest.raises(UnreadableImage, match=r"pixels|bomb"):
        read_image(tmp_path / "image.png")


def test_a_missing_file_or_a_folder_is_not_an_unreadable_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_images([tmp_path / "none.png"])
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)

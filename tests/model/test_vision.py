"""Vision: any vision transformer's layers are what transformers says they are, and no image is lost silently."""

import copy
import itertools
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from tiny_models import (
    IMAGE_SIDE,
    LAYERS,
    PATCH,
    VISION_ARCHITECTURES,
    WIDTH,
    save_tiny_backbone,
    save_tiny_vision_backbone,
    tiny_model,
    tiny_vision_model,
)
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.errors import Unencodable, UserError
from pipeline.model.backbone import HiddenStates, PooledLayers, PooledStates, blocks, load_backbone, truncate
from pipeline.model.batches import TokenBatch
from pipeline.model.encoder import OutOfMemory
from pipeline.model.images import (
    VIEW_SIDE,
    ImageBatch,
    ImageEncoder,
    UnreadableImage,
    image_views,
    is_vision,
    load_processor,
    load_vision,
    read_image,
    read_images,
)
from schemas.bundle import Pooling

TOKENS = (IMAGE_SIDE // PATCH) ** 2 + 1
SMALL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}
SEEING = {**SMALL, "image_size": IMAGE_SIDE, "patch_size": PATCH}
READING = {**SMALL, "vocab_size": 64, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
# What has been seen to work besides the two of tiny_models.
OTHERS = (
    "BeitConfig",
    "CLIPVisionConfig",
    "DINOv3ViTConfig",
    "Data2VecVisionConfig",
    "DeiTConfig",
    "Dinov2WithRegistersConfig",
    "IJepaConfig",
    "SiglipVisionConfig",
    "ViTMSNConfig",
)
EVERY_MODEL = pytest.mark.parametrize("architecture", [*VISION_ARCHITECTURES, *OTHERS])
EVERY_POOLING = pytest.mark.parametrize("pooling", ["mean", "cls", "last"])


def config_of(name: str, **fields: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, name)(**fields)
    return config


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModel.from_config(config)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """One whole model of every architecture, without a pooler, as it is loaded; tests copy what they change."""
    found = {name: tiny_vision_model(name) for name in VISION_ARCHITECTURES}
    return found | {name: random_model(config_of(name, **SEEING)) for name in OTHERS}


@pytest.fixture(scope="module")
def batch() -> ImageBatch:
    """Three images."""
    return ImageBatch(torch.randn(3, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(1)))


def noise_image(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def whole_states(model: PreTrainedModel, batch: ImageBatch) -> list[Tensor]:
    """Entry l is what block l gets, the last one what the model puts out: the first L of transformers' list, and its
    last state, which went through the final norm where there is one."""
    with torch.inference_mode():
        output = model(pixel_values=batch.pixels, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    return [*output.hidden_states[:LAYERS], output.last_hidden_state]


@EVERY_MODEL
@pytest.mark.parametrize("kept", range(1, LAYERS + 1))
def test_truncated_states_are_bit_for_bit_the_hidden_states_of_the_whole_model(
    models: dict[str, PreTrainedModel], batch: ImageBatch, tmp_path: Path, architecture: str, kept: int
) -> None:
    states = whole_states(models[architecture], batch)
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(states))
    truncated = truncate(copy.deepcopy(models[architecture]), kept)
    truncated.save_pretrained(tmp_path)
    loaded = load_vision(str(tmp_path))
    assert loaded.config.num_hidden_layers == kept == len(blocks(loaded)[2])
    for model in (truncated, loaded):
        with torch.inference_mode():
            assert torch.equal(HiddenStates(model, whole=kept == LAYERS)(batch), states[kept])


@EVERY_MODEL
@EVERY_POOLING
def test_one_pass_gives_every_layer_bit_for_bit(
    models: dict[str, PreTrainedModel], batch: ImageBatch, architecture: str, pooling: Pooling
) -> None:
    states = whole_states(models[architecture], batch)
    with torch.inference_mode():
        found: Tensor = PooledLayers(copy.deepcopy(models[architecture]), pooling)(batch)
    assert (found.shape, found.dtype) == ((3, LAYERS + 1, WIDTH), torch.float32)
    for layer, expected in enumerate(states):
        assert torch.equal(found[:, layer], batch.pool(expected, pooling)), layer


@pytest.mark.parametrize("architecture", VISION_ARCHITECTURES)
def test_only_the_whole_model_ends_with_its_final_norm(
    models: dict[str, PreTrainedModel], batch: ImageBatch, architecture: str
) -> None:
    model = copy.deepcopy(models[architecture])
    with torch.inference_mode():
        before, after = HiddenStates(model, whole=False)(batch), HiddenStates(model, whole=True)(batch)
        assert torch.equal(model.layernorm(before), after)
    assert not torch.allclose(before, after)


@EVERY_POOLING
def test_pooling_equals_a_loop_over_the_tokens(pooling: Pooling) -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pooled = ImageBatch(torch.empty(2, 3, 8, 8)).pool(states, pooling)
    for image, vector in zip(states.double().numpy(), pooled, strict=True):
        expected = {"mean": image.mean(axis=0), "cls": image[0], "last": image[4]}[pooling]
        np.testing.assert_allclose(vector.numpy(), expected, rtol=1e-6)
    assert pooled.dtype == torch.float32


def test_images_come_in_one_group_with_all_their_tokens(models: dict[str, PreTrainedModel], batch: ImageBatch) -> None:
    with torch.inference_mode():
        states = batch.run(models["vit"])
    assert states.shape == (3, TOKENS, WIDTH)
    [(places, group)] = batch.by_length(states)
    assert places.tolist() == [0, 1, 2]
    assert places.dtype == torch.int64
    assert group is states
    assert batch.to(torch.device("meta")).pixels.device.type == "meta"


@pytest.mark.parametrize("architecture", VISION_ARCHITECTURES)
def test_a_saved_backbone_is_loaded_in_evaluation_mode_without_a_pooler(tmp_path: Path, architecture: str) -> None:
    name = save_tiny_vision_backbone(tmp_path / "backbone", architecture)
    model = load_vision(name)
    assert is_vision(model)
    assert not model.training
    assert getattr(model, "pooler", None) is None
    assert load_vision(name, torch.bfloat16).dtype == torch.bfloat16


def test_what_reads_is_not_taken_for_what_sees(tmp_path: Path) -> None:
    assert not is_vision(tiny_model("bert"))
    with pytest.raises(UserError, match="takes input_ids: it is no vision model"):
        load_vision(save_tiny_backbone(tmp_path / "backbone"))


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_of_two_towers_the_one_that_sees_is_taken(batch: ImageBatch, tmp_path: Path, family: str) -> None:
    towers = {
        "text_config": config_of(f"{family}TextConfig", **READING).to_dict(),
        "vision_config": config_of(f"{family}VisionConfig", **SEEING).to_dict(),
    }
    both = random_model(config_of(f"{family}Config", **towers))
    both.save_pretrained(tmp_path / "both")
    model = load_vision(str(tmp_path / "both"))
    with torch.inference_mode():
        assert torch.equal(batch.run(model), both.vision_model(pixel_values=batch.pixels).last_hidden_state)
    truncate(model, 2).save_pretrained(tmp_path / "cut")
    expected = whole_states(both.vision_model, batch)[2]
    with torch.inference_mode():
        assert torch.equal(HiddenStates(load_vision(str(tmp_path / "cut")), whole=False)(batch), expected)
    with pytest.raises(UserError, match=f"{family}Model names no number of layers"):
        truncate(load_backbone(str(tmp_path / "both")), 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("ViTMAEConfig", SEEING), "ViTMAEModel.*it does not see the same in the same image"),
        (("PixtralVisionConfig", SEEING), r"PixtralVisionModel.*its layers give \(1, 32, 32\)"),
        (("VideoMAEConfig", SEEING), "VideoMAEModel.*fails on images of 32 × 32 pixels"),
        (("Siglip2VisionConfig", SMALL), "Siglip2VisionModel.*fails on images"),
        (
            ("SwinConfig", {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8, "image_size": 32, "window_size": 4}),
            "SwinModel.*its layers give",
        ),
        (("ResNetConfig", {"depths": [1, 1], "hidden_sizes": [8, 8]}), "ResNetModel names no number of layers"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_model_whose_layers_cannot_be_compared_is_refused(
    tmp_path: Path, config: tuple[str, dict[str, Any]], message: str
) -> None:
    random_model(config_of(config[0], **config[1])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_vision(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_model_that_drops_tokens_on_the_way_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dropping(name: str, *, dtype: torch.dtype) -> PreTrainedModel:
        model = load_backbone(name, dtype=dtype)
        blocks(model)[2][1].register_forward_hook(lambda _module, _inputs, states: states[:, :-1])
        return model

    monkeypatch.setattr("pipeline.model.images.load_backbone", load_dropping)
    with pytest.raises(UserError, match=r"its layers give \(2, 16, 32\), \(2, 17, 32\)"):
        load_vision(save_tiny_vision_backbone(tmp_path / "backbone"))


def test_the_processor_needs_no_torchvision_and_warns_of_nothing(tmp_path: Path) -> None:
    name = save_tiny_vision_backbone(tmp_path / "backbone")
    image = noise_image(IMAGE_SIDE, IMAGE_SIDE)
    image.save(tmp_path / "image.png")
    code = (
        "import sys, warnings; sys.modules['torchvision'] = None; import numpy as np; from pathlib import Path;"
        "from pipeline.model.images import load_processor, read_image; warnings.simplefilter('error');"
        f"processor = load_processor({name!r}); image = read_image(Path({str(tmp_path / 'image.png')!r}));"
        "pixels = processor(images=[image], return_tensors='pt')['pixel_values'];"
        f"np.save({str(tmp_path / 'pixels.npy')!r}, pixels.numpy())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = (np.asarray(image).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5
    np.testing.assert_allclose(np.load(tmp_path / "pixels.npy"), expected, atol=1e-6)


def test_a_backbone_without_a_processor_is_the_users_mistake(tmp_path: Path) -> None:
    name = save_tiny_vision_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="cannot load the image processor of") as caught:
        load_processor(name)
    assert "\n" not in str(caught.value)


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


# What each value of the EXIF tag Orientation (274) says has been done to an image that is stored, in numpy's words.
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
def test_an_image_is_read_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.asarray(noise_image(7, 5))
    exif = Image.Exif()
    exif[274] = orientation
    stored = np.ascontiguousarray(ORIENTATIONS[orientation](upright))
    Image.fromarray(stored).save(tmp_path / "image.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "image.png")), upright)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\xff\xff\xff\x0f"])
def test_a_whole_image_with_broken_notes_is_read(tmp_path: Path, exif: bytes) -> None:
    noise_image().save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg").size == (40, 30)


def bytes_of(image: Image.Image, path: Path) -> bytes:
    image.save(path)
    return path.read_bytes()


def test_what_cannot_be_read_is_told_of_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.model.images.MAX_PIXELS", 2000)
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
def test_a_decompression_bomb_does_not_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixels: int) -> None:
    monkeypatch.setattr("pipeline.model.images.MAX_PIXELS", 1000)
    # Pillow warns above its own limit, and refuses above twice of it.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)
    noise_image(40, 45).save(tmp_path / "image.png")
    with warnings.catch_warnings(action="error"), pytest.raises(UnreadableImage, match=r"pixels|bomb"):
        read_image(tmp_path / "image.png")


def test_a_file_that_is_not_there_is_no_broken_image(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_images([tmp_path / "none.png"])
    with pytest.raises(IsADirectoryError):
        read_image(tmp_path)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_vision_backbone(tmp_path_factory.mktemp("vit"))


IMAGES = [noise_image(20 + 3 * number, 60 - 4 * number, seed=number) for number in range(7)]


def encoder_of(
    name: str, *, batch: int = 32, dtype: torch.dtype = torch.float32, module: nn.Module | None = None
) -> ImageEncoder:
    pooled = module or PooledLayers(load_vision(name), "mean")
    return ImageEncoder(pooled, load_processor(name), device=torch.device("cpu"), dtype=dtype, batch=batch)


def one_by_one(name: str) -> NDArray[np.float32]:
    """Every layer's mean state of every image, from transformers' own list."""
    model, processor = load_vision(name), load_processor(name)
    rows = [whole_states(model, ImageBatch(processor(images=[i], return_tensors="pt")["pixel_values"])) for i in IMAGES]
    return np.array([[layer[0].double().mean(dim=0).numpy() for layer in states] for states in rows], np.float32)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_encoded_images_are_the_models_states_in_their_order(vit: str, size: int) -> None:
    found = encoder_of(vit, batch=size).encode(IMAGES)
    assert (found.shape, found.dtype) == ((7, LAYERS + 1, WIDTH), np.float32)
    np.testing.assert_allclose(found, one_by_one(vit), rtol=1e-4, atol=1e-4)


def test_one_layer_is_encoded_as_well_and_nothing_gives_nothing(vit: str) -> None:
    cut = PooledStates(HiddenStates(truncate(load_vision(vit), 2), whole=False), "mean")
    found = encoder_of(vit, module=cut).encode(IMAGES)
    np.testing.assert_allclose(found, one_by_one(vit)[:, 2], rtol=1e-4, atol=1e-4)
    assert len(encoder_of(vit).encode([])) == 0


def test_bfloat16_comes_close_and_is_given_as_float32(vit: str) -> None:
    found = encoder_of(vit, dtype=torch.bfloat16).encode(IMAGES)
    expected = one_by_one(vit)
    assert found.dtype == np.float32
    assert not np.array_equal(found, expected)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


class Choking(nn.Module):
    """Puts the number of the batch's images out; on more than ``most`` it fails.

    Args:
        most: images.
        error: what it fails with.
    """

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.most, self.error, self.seen = most, error, list[int]()

    def forward(self, batch: TokenBatch) -> Tensor:
        assert isinstance(batch, ImageBatch)
        self.seen.append(len(batch.pixels))
        if len(batch.pixels) > self.most:
            raise self.error
        return batch.pixels.mean(dim=(2, 3))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_none_is_as_large_again(vit: str, error: Exception) -> None:
    module = Choking(2, error)
    found = encoder_of(vit, batch=6, module=module).encode(IMAGES)
    np.testing.assert_array_equal(found, encoder_of(vit, module=Choking(99, error)).encode(IMAGES))
    assert module.seen == [6, 3, 1, 1, 1, 1, 1, 1, 1]


def test_an_image_that_does_not_fit_alone_is_the_devices_trouble(vit: str) -> None:
    with pytest.raises(OutOfMemory, match="cpu lacks memory for a single image: no room"):
        encoder_of(vit, module=Choking(0, torch.OutOfMemoryError("no room"))).encode(IMAGES)


def test_other_errors_are_not_taken_for_a_lack_of_memory(vit: str) -> None:
    module = Choking(0, RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        encoder_of(vit, module=module).encode(IMAGES)
    assert module.seen == [7]


def test_a_row_that_is_no_number_names_its_image(vit: str) -> None:
    class Odd(Choking):
        def forward(self, batch: TokenBatch) -> Tensor:
            rows = super().forward(batch)
            rows[:, 1] = torch.where(rows[:, 1] == rows[:, 1].max(), torch.nan, 1.0)
            return rows

    brightest = [*IMAGES[:4], Image.new("RGB", (9, 9), "white"), *IMAGES[4:]]
    with pytest.raises(Unencodable, match="image 4 cannot be encoded"):
        encoder_of(vit, module=Odd(99, ValueError())).encode(brightest)
    with pytest.raises(Unencodable, match="image 0 "):
        encoder_of(vit, batch=1, module=Odd(99, ValueError())).encode(brightest)


def halves(width: int = 32, height: int = 24) -> Image.Image:
    """Dark on the left, bright on the right."""
    image = Image.new("RGB", (width, height), (40, 60, 50))
    image.paste((190, 200, 180), (width // 2, 0, width, height))
    return image


def arrays(views: list[list[Image.Image]]) -> list[list[NDArray[np.uint8]]]:
    return [[np.asarray(image) for image in view] for view in views]


def test_views_are_images_of_the_same_shape_and_no_two_are_the_same() -> None:
    views = image_views(IMAGES, views=4, seed=0)
    assert [[image.size for image in view] for view in views] == [[image.size for image in IMAGES]] * 4
    assert {image.mode for view in views for image in view} == {"RGB"}
    seen = {image.tobytes() for image in IMAGES} | {image.tobytes() for view in views for image in view}
    assert len(seen) == 5 * len(IMAGES)


def test_a_block_gets_the_views_of_the_whole_sample() -> None:
    whole = image_views(IMAGES, views=3, seed=5)
    for first, last in ((0, 1), (2, 6), (4, 4)):
        assert image_views(IMAGES[first:last], views=3, seed=5, first=first) == [view[first:last] for view in whole]
    assert image_views(IMAGES, views=2, seed=5) == whole[:2]
    assert image_views(IMAGES[:1], views=1, seed=6) != [whole[0][:1]]
    assert image_views(IMAGES[:1], views=1, seed=5, first=1) != [whole[0][:1]]


def test_views_neither_hear_nor_move_the_generators_of_others() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    found = image_views(IMAGES[:2], views=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])  # type: ignore[index]
    torch.manual_seed(2)
    assert image_views(IMAGES[:2], views=2, seed=0) == found


def test_views_are_mirrored_cropped_and_coloured_to_a_degree() -> None:
    seen = [view[0] for view in arrays(image_views([halves()], views=200, seed=0))]
    mirrored = [int(view[:, 0].sum()) > int(view[:, -1].sum()) for view in seen]
    assert 70 < sum(mirrored) < 130
    # Where dark becomes bright, a fraction of the width: in the middle but for the crop, which leaves half of it.
    edges = []
    for view, mirror in zip(seen, mirrored, strict=True):
        row = (view[:, ::-1] if mirror else view)[12].astype(int).sum(axis=1)
        edges.append(np.abs(np.diff(row)).argmax() / 32)
    assert 0.1 < min(edges) < 0.4
    assert 0.55 < max(edges) < 0.9
    colours = np.array([view[12, [0, -1]].astype(int).sum(axis=0) for view in seen])
    assert (colours.std(axis=0) > 10).all()
    # A view is still of this picture: bright and dark are far apart in nearly all.
    contrasts = [abs(int(view[12, 0].sum()) - int(view[12, -1].sum())) for view in seen]
    assert np.median(contrasts) > 200


@pytest.mark.parametrize(("size", "expected"), [((1, 1), (1, 1)), ((2, 90), (2, 90)), ((3000, 1500), (1024, 512))])
def test_views_of_specks_and_of_giants(size: tuple[int, int], expected: tuple[int, int]) -> None:
    [[view]] = image_views([Image.new("L", size, 130)], views=1, seed=0)
    assert (view.size, view.mode) == (expected, "RGB")
    assert max(expected) <= VIEW_SIDE


def test_views_without_kornia_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(UserError, match=r"need kornia: install marc-pipeline\[vision\]"):
        image_views(IMAGES, views=1, seed=0)

"""Vision backbones: layers equal those of transformers for every architecture, and failing images raise an error."""

import copy
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from marc_pipeline.errors import Unencodable, UserError
from marc_pipeline.layers.images import ImageBatch, ImageEncoder, is_vision, load_processor, load_vision
from marc_pipeline.model.backbone import HiddenStates, PooledLayers, PooledStates, blocks, load_backbone, truncate
from marc_pipeline.model.batches import TokenBatch
from marc_pipeline.model.device import OutOfMemory
from marc_schemas.bundle import Pooling
from tiny_models import (
    IMAGE_SIDE,
    LAYERS,
    PATCH,
    VISION_ARCHITECTURES,
    WIDTH,
    noise_image,
    save_tiny_backbone,
    save_tiny_vision_backbone,
    tiny_model,
    tiny_vision_model,
)

TOKENS = (IMAGE_SIDE // PATCH) ** 2 + 1
Models = dict[str, PreTrainedModel]
FIELDS = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.2,
}  # fmt: skip
VISION_FIELDS = {**FIELDS, "image_size": IMAGE_SIDE, "patch_size": PATCH}
TEXT_FIELDS = {**FIELDS, "vocab_size": 64, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
# Architectures that work, besides the two of tiny_models.
OTHERS = (
    "BeitConfig", "CLIPVisionConfig", "DINOv3ViTConfig", "Data2VecVisionConfig", "DeiTConfig",
    "Dinov2WithRegistersConfig", "IJepaConfig", "SiglipVisionConfig", "ViTMSNConfig",
)  # fmt: skip
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
def models() -> Models:
    """One whole model of every architecture, without a pooler; tests change copies only."""
    found = {name: tiny_vision_model(name) for name in VISION_ARCHITECTURES}
    return found | {name: random_model(config_of(name, **VISION_FIELDS)) for name in OTHERS}


@pytest.fixture(scope="module")
def batch() -> ImageBatch:
    """Three images."""
    return ImageBatch(torch.randn(3, 3, IMAGE_SIDE, IMAGE_SIDE, generator=torch.Generator().manual_seed(1)))


def whole_states(model: PreTrainedModel, batch: ImageBatch) -> list[Tensor]:
    """The input of each block, and the model's output after its final norm, if it has one."""
    with torch.inference_mode():
        output = model(pixel_values=batch.pixels, output_hidden_states=True)
    assert len(output.hidden_states) == LAYERS + 1
    return [*output.hidden_states[:LAYERS], output.last_hidden_state]


@EVERY_MODEL
@pytest.mark.parametrize("kept", range(1, LAYERS + 1))
def test_truncated_states_are_bit_for_bit_the_hidden_states_of_the_whole_model(
    models: Models, batch: ImageBatch, tmp_path: Path, architecture: str, kept: int
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
    models: Models, batch: ImageBatch, architecture: str, pooling: Pooling
) -> None:
    states = whole_states(models[architecture], batch)
    with torch.inference_mode():
        found: Tensor = PooledLayers(copy.deepcopy(models[architecture]), pooling)(batch)
    assert (found.shape, found.dtype) == ((3, LAYERS + 1, WIDTH), torch.float32)
    for layer, expected in enumerate(states):
        assert torch.equal(found[:, layer], batch.pool(expected, pooling)), layer


@pytest.mark.parametrize("architecture", VISION_ARCHITECTURES)
def test_only_the_whole_model_ends_with_its_final_norm(models: Models, batch: ImageBatch, architecture: str) -> None:
    model = copy.deepcopy(models[architecture])
    with torch.inference_mode():
        before, after = HiddenStates(model, whole=False)(batch), HiddenStates(model, whole=True)(batch)
        assert torch.equal(model.layernorm(before), after)
    assert not torch.allclose(before, after)


@EVERY_POOLING
def test_pooling_of_images_equals_a_loop_over_the_tokens(pooling: Pooling) -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    pooled = ImageBatch(torch.empty(2, 3, 8, 8)).pool(states, pooling)
    for image, vector in zip(states.double().numpy(), pooled, strict=True):
        expected = {"mean": image.mean(axis=0), "cls": image[0], "last": image[4]}[pooling]
        np.testing.assert_allclose(vector.numpy(), expected, rtol=1e-6)
    assert pooled.dtype == torch.float32


def test_all_images_form_one_group_with_all_tokens(models: Models, batch: ImageBatch) -> None:
    with torch.inference_mode():
        states = batch.run(models["vit"])
    assert states.shape == (3, TOKENS, WIDTH)
    [(places, group)] = batch.by_length(states)
    assert torch.equal(places, torch.arange(3))
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


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_the_vision_tower_of_two_is_loaded(batch: ImageBatch, tmp_path: Path, family: str) -> None:
    towers = {
        "text_config": config_of(f"{family}TextConfig", **TEXT_FIELDS).to_dict(),
        "vision_config": config_of(f"{family}VisionConfig", **VISION_FIELDS).to_dict(),
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
    with pytest.raises(UserError, match=f"{family}Model has no num_hidden_layers"):
        truncate(load_backbone(str(tmp_path / "both")), 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (("ViTMAEConfig", VISION_FIELDS), "ViTMAEModel.*it gives different states for the same image"),
        (("PixtralVisionConfig", VISION_FIELDS), r"PixtralVisionModel.*its layers have the shapes \(1, 32, 32\)"),
        (("VideoMAEConfig", VISION_FIELDS), "VideoMAEModel.*fails on images of 32 × 32 pixels"),
        (("Siglip2VisionConfig", FIELDS), "Siglip2VisionModel.*fails on images"),
        (
            ("SwinConfig", {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8, "image_size": 32, "window_size": 4}),
            "SwinModel.*its layers have the shapes",
        ),
        (("ResNetConfig", {"depths": [1, 1], "hidden_sizes": [8, 8]}), "ResNetModel has no num_hidden_layers"),
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


def test_a_model_that_drops_tokens_between_blocks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dropping(name: str, *, dtype: torch.dtype) -> PreTrainedModel:
        model = load_backbone(name, dtype=dtype)
        blocks(model)[2][1].register_forward_hook(lambda _module, _inputs, states: states[:, :-1])
        return model

    monkeypatch.setattr("marc_pipeline.layers.images.load_backbone", load_dropping)
    with pytest.raises(UserError, match=r"its layers have the shapes \(2, 16, 32\), \(2, 17, 32\)"):
        load_vision(save_tiny_vision_backbone(tmp_path / "backbone"))


def test_the_processor_works_without_torchvision_and_without_warnings(tmp_path: Path) -> None:
    name = save_tiny_vision_backbone(tmp_path / "backbone")
    image = noise_image(IMAGE_SIDE, IMAGE_SIDE)
    image.save(tmp_path / "image.png")
    code = (
        "import sys, warnings; sys.modules['torchvision'] = None; import numpy as np; from pathlib import Path;"
        "from marc_pipeline.layers.images import load_processor; warnings.simplefilter('error');"
        "from marc_pipeline.layers.image_files import read_image;"
        f"processor = load_processor({name!r}); image = read_image(Path({str(tmp_path / 'image.png')!r}));"
        "pixels = processor(images=[image], return_tensors='pt')['pixel_values'];"
        f"np.save({str(tmp_path / 'pixels.npy')!r}, pixels.numpy())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = (np.asarray(image).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5
    np.testing.assert_allclose(np.load(tmp_path / "pixels.npy"), expected, atol=1e-6)


def test_backbones_without_pixels_or_a_processor_are_refused(tmp_path: Path) -> None:
    assert not is_vision(tiny_model("bert"))
    with pytest.raises(UserError, match="takes input_ids; choose a vision model"):
        load_vision(save_tiny_backbone(tmp_path / "text"))
    name = save_tiny_vision_backbone(tmp_path / "backbone")
    (tmp_path / "backbone" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="cannot load the image processor of") as caught:
        load_processor(name)
    assert "\n" not in str(caught.value)


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
    """Mean state of every layer for every image, from transformers' own list."""
    model, processor = load_vision(name), load_processor(name)
    rows = [whole_states(model, ImageBatch(processor(images=[i], return_tensors="pt")["pixel_values"])) for i in IMAGES]
    return np.array([[layer[0].double().mean(dim=0).numpy() for layer in states] for states in rows], np.float32)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_encoded_images_equal_the_models_states_in_order(vit: str, size: int) -> None:
    found = encoder_of(vit, batch=size).encode(IMAGES)
    assert (found.shape, found.dtype) == ((7, LAYERS + 1, WIDTH), np.float32)
    np.testing.assert_allclose(found, one_by_one(vit), rtol=1e-4, atol=1e-4)


def test_single_layers_empty_lists_and_bfloat16_are_encoded(vit: str) -> None:
    expected = one_by_one(vit)
    cut = PooledStates(HiddenStates(truncate(load_vision(vit), 2), whole=False), "mean")
    found = encoder_of(vit, module=cut).encode(IMAGES)
    np.testing.assert_allclose(found, expected[:, 2], rtol=1e-4, atol=1e-4)
    assert len(encoder_of(vit).encode([])) == 0
    narrow = encoder_of(vit, dtype=torch.bfloat16).encode(IMAGES)
    assert narrow.dtype == np.float32
    assert 0 < np.abs(narrow - expected).max() < 0.05 * np.abs(expected).max()


class Limited(nn.Module):
    """Records the batch sizes, and raises ``error`` on batches of more than ``most`` images."""

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
def test_a_batch_that_does_not_fit_is_halved_for_all_later_batches(vit: str, error: Exception) -> None:
    module = Limited(2, error)
    found = encoder_of(vit, batch=6, module=module).encode(IMAGES)
    np.testing.assert_array_equal(found, encoder_of(vit, module=Limited(99, error)).encode(IMAGES))
    assert module.seen == [6, 3, 1, 1, 1, 1, 1, 1, 1]


def test_a_single_image_that_does_not_fit_and_other_errors_are_raised(vit: str) -> None:
    with pytest.raises(OutOfMemory, match="cpu lacks memory for a single image: no room"):
        encoder_of(vit, module=Limited(0, torch.OutOfMemoryError("no room"))).encode(IMAGES)
    module = Limited(0, RuntimeError("CUDA error"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        encoder_of(vit, module=module).encode(IMAGES)
    assert module.seen == [7]


def test_a_row_that_is_not_finite_names_its_image(vit: str) -> None:
    class Odd(Limited):
        def forward(self, batch: TokenBatch) -> Tensor:
            rows = super().forward(batch)
            rows[:, 1] = torch.where(rows[:, 1] == rows[:, 1].max(), torch.nan, 1.0)
            return rows

    brightest = [*IMAGES[:4], Image.new("RGB", (9, 9), "white"), *IMAGES[4:]]
    with pytest.raises(Unencodable, match="image 4 cannot be encoded"):
        encoder_of(vit, module=Odd(99, ValueError())).encode(brightest)
    with pytest.raises(Unencodable, match="image 0 "):
        encoder_of(vit, batch=1, module=Odd(99, ValueError())).encode(brightest)

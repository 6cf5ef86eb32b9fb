"""Tiny random models with real architectures, their tokenizers and processors, and bundles trained on them."""

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    BertConfig,
    Dinov2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    ViTConfig,
    ViTImageProcessorPil,
)

from pipeline.config import EncodeSettings, TrainSettings
from pipeline.model.bundle import Bundle, promote
from pipeline.model.training import train_pca
from pipeline.resources import TaskResources
from pipeline.storage import Storage

# Tiny models lose time by handing work between threads.
torch.set_num_threads(1)

ARCHITECTURES = ("bert", "llama", "qwen3", "mamba")
VISION_ARCHITECTURES = ("vit", "dinov2")
LAYERS = 4
WIDTH = 32
MAX_TOKENS = 48
IMAGE_SIDE = 32
PATCH = 8
TEMPLATE = "{title}. {genres}"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
CPU_FLOAT32 = EncodeSettings(device="cpu", dtype="float32", token_budget=256)
ONE_CORE = TaskResources(cpus=1)

_FIRST = ("The Quiet", "A Golden", "Last", "My Electric", "Beyond the", "Señor", "Seven", "No")
_SECOND = ("River", "Detective", "Kitchen", "Moon over Berlin", "Machine", "Wedding")
_GENRES = ("Dramas, International Movies", "Comedies", "Docuseries", "Kids' TV, Anime Features", "Thrillers, Crime")
TEXTS: list[str] = [
    f"{first} {second}. {_GENRES[number % len(_GENRES)]}" + " and more" * (number % 7)
    for number, (first, second) in enumerate(itertools.product(_FIRST, _SECOND))
]
"""48 distinct texts of different lengths."""


def tiny_config(architecture: str, *, vocabulary: int, layers: int = LAYERS) -> PreTrainedConfig:
    """A configuration of width 32 with random weights so large that every layer changes the states."""
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    attention: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    if architecture == "bert":
        return BertConfig(**shape, **attention)
    if architecture == "llama":
        return LlamaConfig(**shape, **attention, num_key_value_heads=2)
    if architecture == "qwen3":
        return Qwen3Config(**shape, **attention, num_key_value_heads=2, head_dim=8)
    if architecture == "mamba":
        return MambaConfig(**shape, state_size=8)
    raise ValueError(f"no tiny {architecture!r}; there are {ARCHITECTURES}")


def tiny_model(architecture: str, *, vocabulary: int = 64, layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; the same arguments give the same weights."""
    config = tiny_config(architecture, vocabulary=vocabulary, layers=layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _random_model(config)
        with torch.no_grad():
            # The padding token's row is initialised with zeros, so that the text "[PAD]" would have a zero vector.
            model.get_input_embeddings().weight[0].normal_()
    return model.eval()


def tiny_vision_model(architecture: str, *, layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    """A random model of images of 32 × 32 pixels in patches of 8 × 8: 17 tokens with CLS."""
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIDE,
        "patch_size": PATCH,
        "initializer_range": 0.2,
    }
    if architecture == "vit":
        config: PreTrainedConfig = ViTConfig(**shape, intermediate_size=64)
    elif architecture == "dinov2":
        config = Dinov2Config(**shape, mlp_ratio=2)
    else:
        raise ValueError(f"no tiny {architecture!r}; there are {VISION_ARCHITECTURES}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _random_model(config).eval()


def noise_image(width: int = 40, height: int = 30, *, seed: int = 0) -> Image.Image:
    """An RGB image of random pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModel.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm weights are initialised with 1, which hides errors such as a missing final norm.
            if "norm" in name.lower():
                parameter.add_(torch.rand_like(parameter))
    return model


def tiny_tokenizer(architecture: str) -> Tokenizer:
    """A new tokenizer of the architecture's usual kind."""
    return Tokenizer.from_str(_wordpiece() if architecture == "bert" else _byte_bpe())


@lru_cache(maxsize=1)
def _wordpiece() -> str:
    """A BERT tokenizer for the words of :data:`TEXTS` and printable ASCII; all else is [UNK]."""
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = sorted({word.lower() for text in TEXTS for word in text.replace(".", " ").replace(",", " ").split()})
    pieces = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters), *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106 - a token, no password
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.decoder = decoders.WordPiece()
    return str(tokenizer.to_str())


@lru_cache(maxsize=1)
def _byte_bpe() -> str:
    """A byte-level BPE tokenizer without special tokens, as in decoders: an empty text has no tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return str(tokenizer.to_str())


def save_tiny_backbone(folder: Path, architecture: str = "bert", *, layers: int = LAYERS, seed: int = 0) -> str:
    """Save a random model and its tokenizer as a Hugging Face folder; returns its path."""
    tokenizer = tiny_tokenizer(architecture)
    model = tiny_model(architecture, vocabulary=tokenizer.get_vocab_size(), layers=layers, seed=seed)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        cls_token="[CLS]",  # noqa: S106
        sep_token="[SEP]",  # noqa: S106
    ).save_pretrained(folder)
    return str(folder)


def save_tiny_vision_backbone(folder: Path, architecture: str = "vit", *, layers: int = LAYERS, seed: int = 0) -> str:
    """Save a random vision model and its image processor as a Hugging Face folder; returns its path."""
    tiny_vision_model(architecture, layers=layers, seed=seed).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}).save_pretrained(folder)
    return str(folder)


def train_tiny_bundle(
    folder: Path,
    architecture: str = "bert",
    *,
    texts: list[str] | None = None,
    seed: int = 0,
    encode: EncodeSettings = CPU_FLOAT32,
    **train: Any,
) -> Bundle:
    """Train a bundle of a tiny backbone below ``folder`` and make it current.

    Args:
        folder: parent of ``backbone-ARCHITECTURE-SEED`` and ``bundles``.
        architecture: one of :data:`ARCHITECTURES`.
        texts: training texts, :data:`TEXTS` by default.
        seed: of the backbone's weights.
        encode: device and token budget of the pass over the texts.
        train: fields of :class:`pipeline.config.TrainSettings`.
    """
    backbone = folder / f"backbone-{architecture}-{seed}"
    if not backbone.is_dir():
        save_tiny_backbone(backbone, architecture, seed=seed)
    settings = {"backbone": str(backbone), "max_tokens": MAX_TOKENS, "dim": 8, **train}
    bundle = train_pca(
        TEXTS if texts is None else texts,
        template=TEMPLATE,
        train=TrainSettings(**settings),
        encode=encode,
        storage=Storage(),
        bundle_uri=str(folder / "bundles"),
        resources=ONE_CORE,
    )
    promote(Storage(), str(folder / "bundles"), bundle.version)
    return bundle


def hidden_state_index(architecture: str, layers: int) -> int:
    """Index in transformers' ``hidden_states`` of the state after so many of the :data:`LAYERS` blocks.

    Mamba's list starts after the first block, not with the embeddings. It contains the last state twice: before and
    after the final norm.
    """
    return layers - 1 if architecture == "mamba" and layers < LAYERS else layers


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine of each row of ``left`` with the same row of ``right``, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    return np.asarray((a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)))

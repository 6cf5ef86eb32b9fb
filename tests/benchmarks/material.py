"""Texts and weights that the encoder benchmarks work on, and the speed of matrix products."""

import csv
import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from measuring import CORES
from tokenizers import Tokenizer
from torch import nn
from transformers.utils import logging

from marc_pipeline.config import EncodeSettings, TrainSettings
from marc_pipeline.model.backbone import blocks, load_backbone, load_tokenizer, truncate
from marc_pipeline.model.bundle import Bundle, save_bundle
from marc_pipeline.model.compressor import WhitenedPCA, save_compressor
from marc_pipeline.model.device import choose_dtype
from marc_pipeline.storage import Storage
from marc_schemas.bundle import BundleCard, CompressorCard

BACKBONE = TrainSettings().backbone
MAX_TOKENS = 256
# Text lengths are log-normal with this standard deviation. 1 % of the texts (the quantile) exceed MAX_TOKENS.
SPREAD, QUANTILE = 0.9, 2.326


def netflix(data: Path) -> list[str]:
    """Title and description of every row of the catalogue."""
    path = data / "netflix_titles.csv"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; docs/benchmarks.md says where to get it; pass --data FOLDER")
    with path.open(encoding="utf-8", newline="") as file:
        return [f"{row['title']}. {row['description']}" for row in csv.DictReader(file)]


def sample(texts: Sequence[str], count: int) -> list[str]:
    """``count`` texts drawn without replacement; if there are fewer texts, they repeat."""
    draw = random.Random(0)  # noqa: S311 - no secret
    chosen: list[str] = []
    while len(chosen) < count:
        chosen += draw.sample(texts, min(len(texts), count - len(chosen)))
    return chosen


def long_tail(texts: Sequence[str], count: int) -> list[str]:
    """Texts of random words whose lengths in tokens are log-normal; 1 % exceed the limit."""
    draw = random.Random(1)  # noqa: S311
    words = [word for text in texts for word in text.split()]
    tokenizer = whole_tokenizer()
    cost = lru_cache(maxsize=None)(lambda word: len(tokenizer.encode(word, add_special_tokens=False).ids))
    middle = math.log(MAX_TOKENS) - QUANTILE * SPREAD
    made = []
    for _ in range(count):
        wanted = draw.lognormvariate(middle, SPREAD)
        text, tokens = [draw.choice(words)], 3
        while tokens < wanted:
            text.append(draw.choice(words))
            tokens += cost(text[-1])
        made.append(" ".join(text))
    return made


def short(texts: Sequence[str], count: int) -> list[str]:
    """Distinct texts of two to six random words."""
    draw = random.Random(2)  # noqa: S311
    words = [word for text in texts for word in text.split()]
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(draw.choices(words, k=draw.randint(2, 6)))] = None
    return list(made)


def whole_tokenizer(max_tokens: int | None = None) -> Tokenizer:
    """The backbone's tokenizer without padding."""
    tokenizer: Tokenizer = load_tokenizer(BACKBONE).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if max_tokens:
        tokenizer.enable_truncation(max_length=max_tokens)
    return tokenizer


def plain_bundle(folder: Path, layers: int) -> Bundle:
    """A bundle with an identity compressor: its vectors are the pooled states, as in other libraries."""

    def write(target: Path) -> BundleCard:
        model = load_backbone(BACKBONE)
        total, width = len(blocks(model)[2]), model.config.hidden_size
        truncate(model, layers).save_pretrained(target / "backbone")
        load_tokenizer(BACKBONE).save_pretrained(target / "backbone")
        compressor = WhitenedPCA(width=width, dim=width)
        nn.init.eye_(compressor.directions)
        save_compressor(compressor, target)
        return BundleCard(
            backbone=BACKBONE,
            layers_kept=layers,
            backbone_layers=total,
            pooling="mean",
            max_tokens=MAX_TOKENS,
            width=width,
            dim=width,
            normalised=False,
            template="{title}. {description}",
            compressor=CompressorCard(kind="pca", arguments={"width": width, "dim": width}),
            training={},
            metrics={},
            files={},
        )

    return save_bundle(Storage(), str(folder / f"layers-{layers}"), write)


def native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 natively."""
    return choose_dtype(EncodeSettings(), torch.device("cpu")) == torch.bfloat16


def matrix_rate(dtype: torch.dtype, *, side: int = 2048, tries: int = 7) -> float:
    """GFLOP/s of a product of square matrices on all cores; the best of several tries."""
    torch.set_num_threads(CORES)
    left, right = torch.randn(side, side, dtype=dtype), torch.randn(side, side, dtype=dtype)
    seconds = []
    for _ in range(tries):
        started = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds) / 1e9


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for child processes; restores the whole environment afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off progress bars and warnings of the libraries, here and in child processes."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    variables = {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore:resource_tracker",
        "DAFT_PROGRESS_BAR": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    with environment(**variables):
        yield

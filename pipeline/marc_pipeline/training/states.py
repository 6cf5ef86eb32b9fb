"""Hidden states of every layer for a list of texts: one pass over the backbone, streamed to a .npy file."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import nn

from marc_pipeline.config import EncodeSettings, TrainSettings
from marc_pipeline.model.backbone import PooledLayers, PooledStates, blocks, load_backbone, load_tokenizer
from marc_pipeline.model.device import choose_device, choose_dtype
from marc_pipeline.model.encoder import Encoder
from marc_pipeline.progress import ProgressLog
from marc_pipeline.resources import TaskResources
from marc_pipeline.training.training_set import StatesFacts, require_shape

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

TEXTS_AT_ONCE = 2048

log = logging.getLogger(__name__)


def write_states(
    texts: list[str],
    path: Path,
    *,
    train: TrainSettings,
    encode: EncodeSettings,
    resources: TaskResources,
    dims: Sequence[int] = (),
) -> StatesFacts:
    """Write pooled states float32 [L + 1, texts, D] to a ``.npy`` file, and return facts about them.

    Memory does not grow with the number of texts. ``dims`` are the dimensions of vectors that will be made from the
    states; they are checked before the pass.

    Raises:
        UserError: the backbone is unknown, or has too few layers or too small a width.
    """
    backbone = load_backbone(train.backbone)
    layers, width = len(blocks(backbone)[2]), backbone.config.hidden_size
    require_shape(train, dims, layers=layers, width=width)
    tokenizer, max_tokens = cutting_tokenizer(backbone, train)
    encoder = state_encoder(PooledLayers(backbone, train.pooling), tokenizer, encode=encode, resources=resources)
    log.info("states: %s texts through all %d layers of %s", f"{len(texts):,}", layers, train.backbone)
    states = open_memmap(path, mode="w+", dtype=np.float32, shape=(layers + 1, len(texts), width))
    progress, done, tokens = ProgressLog("states", len(texts), "texts"), 0, 0

    def report(more: int, more_tokens: int) -> None:
        nonlocal done, tokens
        done, tokens = done + more, tokens + more_tokens
        progress.at(done, f"{tokens:,} tokens")

    encoder.on_batch = report
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        encoded = encoder.encode(texts[start : start + TEXTS_AT_ONCE])
        states[:, start : start + TEXTS_AT_ONCE] = encoded.vectors.swapaxes(0, 1)
    states.flush()
    dtype = str(encoder.dtype).removeprefix("torch.")
    return StatesFacts(layers=layers, width=width, max_tokens=max_tokens, dtype=dtype, device=str(encoder.device))


def state_encoder(
    pooled: PooledStates | PooledLayers, tokenizer: "Tokenizer", *, encode: EncodeSettings, resources: TaskResources
) -> Encoder:
    """Return an encoder without a compressor, whose vectors are the pooled states."""
    if threads := encode.threads or resources.cpus:
        torch.set_num_threads(threads)
    device = choose_device(encode, resources)
    return Encoder(
        pooled,
        tokenizer,
        head=nn.Identity(),
        device=device,
        dtype=choose_dtype(encode, device),
        token_budget=encode.token_budget,
        long_texts=encode.long_texts,
    )


def cutting_tokenizer(backbone: "PreTrainedModel", train: TrainSettings) -> "tuple[Tokenizer, int]":
    """Return the backbone's tokenizer, which truncates and does not pad, and its limit in tokens."""
    max_tokens = min(train.max_tokens, positions(backbone) or train.max_tokens)
    tokenizer: Tokenizer = load_tokenizer(train.backbone).backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length=max_tokens)
    return tokenizer, max_tokens


def positions(backbone: "PreTrainedModel") -> int | None:
    """Return the backbone's number of token positions. RoBERTa and similar models start after the padding index."""
    limit: int | None = getattr(backbone.config, "max_position_embeddings", None)
    for name, module in backbone.named_modules():
        if limit and name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            return limit - int(module.padding_idx) - 1
    return limit

"""The encoder: texts in, vectors out, in length-sorted batches of a bounded number of padded tokens."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config import EncodeSettings
from pipeline.errors import UserError
from pipeline.model.backbone import HiddenStates, PooledLayers, PooledStates, load_backbone
from pipeline.model.bundle import local_bundle
from pipeline.model.compressor import load_compressor
from pipeline.model.tokens import load_tokenizer
from pipeline.resources import TaskResources
from pipeline.storage import Storage

TOKENISE_TEXTS = 4096


@dataclass(frozen=True)
class Encoded:
    """Vectors float32 [n, d] in the order of the texts, and what they cost."""

    vectors: NDArray[np.float32]
    tokens: int
    padded_tokens: int
    model_seconds: float


class Encoder:
    """A backbone with pooling, and a head, on one device.

    Args:
        pooled: from token ids and mask to pooled states.
        tokenizer: truncates, does not pad.
        head: from pooled states [b, D] to vectors [b, d]; runs on the device, so that nothing wider leaves it.
        device: where to run.
        dtype: of the backbone; pooling and head are float32.
        token_budget: padded tokens per batch; a single longer text still makes a batch.
    """

    def __init__(
        self,
        pooled: PooledStates | PooledLayers,
        tokenizer: Tokenizer,
        *,
        head: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        token_budget: int,
    ) -> None:
        self._pooled = pooled.to(device=device, dtype=dtype)
        self._head = head.to(device=device)
        self._tokenizer = tokenizer
        self._token_budget = token_budget
        self.device = device
        self.dtype = dtype

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Encoded:
        """Vectors of texts, in their order. The result does not depend on which texts come together.

        Args:
            texts: any number, of any length; what exceeds the bundle's tokens is cut off.
        """
        tokens: list[NDArray[np.int32]] = []
        for start in range(0, len(texts), TOKENISE_TEXTS):
            # In pieces: the tokenizer's own records take a hundred times the room of the ids.
            encodings = self._tokenizer.encode_batch(list(texts[start : start + TOKENISE_TEXTS]))
            tokens += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        lengths = np.array([len(ids) for ids in tokens], dtype=np.int64)
        parts, padded, model_seconds = [], 0, 0.0
        order = np.argsort(-lengths, kind="stable")
        for rows in token_batches(lengths[order], self._token_budget):
            chosen = order[rows]
            ids, mask = pad_tokens([tokens[i] for i in chosen.tolist()])
            padded += ids.numel()
            started = time.perf_counter()
            parts.append(self._forward(ids, mask).cpu())
            model_seconds += time.perf_counter() - started
        if not parts:
            return Encoded(np.empty((0, 0), np.float32), 0, 0, 0.0)
        sorted_vectors = torch.cat(parts).numpy()
        vectors = np.empty_like(sorted_vectors)
        vectors[order] = sorted_vectors
        return Encoded(vectors, int(lengths.sum()), padded, model_seconds)

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        ids, mask = ids.to(self.device), mask.to(self.device)
        vectors: Tensor = self._head(self._pooled(ids, mask))
        return vectors


class Normalised(nn.Module):
    """A compressor whose vectors are scaled to unit length."""

    def __init__(self, compressor: nn.Module) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, hidden: Tensor) -> Tensor:
        """Unit vectors [n, d] of pooled hidden states [n, D]."""
        return functional.normalize(self.compressor(hidden), dim=-1)


def token_batches(lengths: NDArray[np.int64], budget: int) -> Iterator[slice]:
    """Cut lengths, longest first, into runs whose rows × longest stay within ``budget`` (one row at least)."""
    start = 0
    while start < len(lengths):
        rows = max(1, budget // max(1, int(lengths[start])))
        yield slice(start, min(start + rows, len(lengths)))
        start += rows


def choose_device(settings: EncodeSettings, resources: TaskResources) -> torch.device:
    """The GPU that the scheduler assigned, else the first one when asked for, else the CPU."""
    cuda = torch.cuda.is_available()
    if settings.device == "cpu" or (settings.device == "auto" and not (cuda and resources.gpu is not None)):
        return torch.device("cpu")
    if not cuda:
        raise UserError("encode.device is cuda, but torch finds no CUDA device; set encode.device to auto or cpu")
    return torch.device(f"cuda:{resources.gpu or 0}")


def choose_dtype(settings: EncodeSettings, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it natively, unless the settings say otherwise."""
    if settings.dtype != "auto":
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def use_threads(count: int) -> None:
    """Let torch use so many cores in this process."""
    torch.set_num_threads(count)


@lru_cache(maxsize=1)
def load_encoder(
    storage: Storage, bundle_uri: str, version: str, settings: EncodeSettings, resources: TaskResources
) -> Encoder:
    """The encoder of a bundle, every file verified; loaded once per process and kept for the next call.

    Raises:
        CorruptFile: a file of the bundle differs from its checksum.
    """
    folder, bundle = local_bundle(storage, bundle_uri, version)
    card = bundle.card
    device = choose_device(settings, resources)
    dtype = choose_dtype(settings, device)
    if device.type == "cpu":
        torch.set_num_threads(settings.threads or resources.cpus)
    backbone = load_backbone(str(folder / "backbone"), dtype=dtype)
    compressor = load_compressor(folder, card.compressor)
    return Encoder(
        PooledStates(HiddenStates(backbone, whole=card.layers_kept == card.backbone_layers), card.pooling),
        load_tokenizer(storage, bundle.uri, card.max_tokens),
        head=Normalised(compressor) if card.normalised else compressor,
        device=device,
        dtype=dtype,
        token_budget=settings.token_budget,
    )


def pad_tokens(ids: Sequence[NDArray[np.int32]]) -> tuple[Tensor, Tensor]:
    """Token ids and mask [n, t], padded on the right with 0, which the mask hides."""
    width = max(1, *map(len, ids))
    out = np.zeros((len(ids), width), dtype=np.int64)
    mask = np.zeros((len(ids), width), dtype=np.int64)
    for row, tokens in enumerate(ids):
        out[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return torch.from_numpy(out), torch.from_numpy(mask)

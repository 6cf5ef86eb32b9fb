"""Packed attention: an attention function of transformers for batches of texts in one row, without padding.

Every text attends to itself only. On CUDA, one variable-length flash attention computes the whole batch. On a CPU,
attention is computed once for each run of texts of equal length, without a mask.
"""

import inspect
import logging
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from marc_pipeline.model.batches import PackedTokens, PaddedTokens, TokenBatch, current_batch
from marc_pipeline.model.onednn import multiplies_bfloat16

NAME = "marc_packed"
# Below this length, two batched products are twice as fast as torch's fused attention on a CPU that multiplies bf16.
# With AVX2 alone, bf16 products are up to 40 times slower.
PRODUCTS_BELOW = 160
# oneDNN caches a program for every shape. Products therefore use groups of equal shape with about this number of
# tokens; the remaining texts use fused attention.
GROUP_TOKENS = 2048
# Options that do not change the result. Others, such as soft caps, sinks and biases, are not supported.
HARMLESS = {"output_attentions", "output_hidden_states", "use_cache", "position_ids", "cache_position", "is_causal"}
PROBE_LENGTHS = (9, 5, 5, 2)
PROBE_COSINE = {torch.float32: 0.9999}
LEAST_PROBE_COSINE = 0.99

log = logging.getLogger(__name__)


class NotPackable(Exception):
    """The model's attention needs an option that packed attention does not support."""


def use_packed(pooled: nn.Module, model: PreTrainedModel, *, longest: int) -> int | None:
    """Switch a model to packed attention, if it then gives the same vectors as for each text alone.

    A trial on random texts decides, because the configuration does not show every way to mix tokens, such as Mamba's
    scan or convolutions.

    Args:
        pooled: maps a :class:`TokenBatch` to vectors.
        model: the backbone inside ``pooled``; its attention is replaced.
        longest: largest number of tokens of a text; the trial includes such a text.

    Returns:
        The model's number for the position of the first token; None if the model must run padded texts.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters or not model._can_set_attn_implementation():
        return None
    before = model.config._attn_implementation
    first_position = _first_position(model)
    rng, vocabulary = np.random.default_rng(0), model.config.vocab_size
    # Ids of the upper half: padding has a low id, and RoBERTa does not count its position.
    texts = [rng.integers(vocabulary // 2, vocabulary, length).astype(np.int32) for length in (longest, *PROBE_LENGTHS)]
    with torch.inference_mode():
        alone = torch.cat([_run(pooled, model, PaddedTokens.of([text])) for text in texts])
        model.set_attn_implementation(NAME)
        try:
            packed = _run(pooled, model, PackedTokens.of(texts, first_position=first_position))
        except Exception as error:
            # A model may raise any error; it then runs padded texts.
            log.debug("packed texts: %s", error)
            packed = torch.zeros_like(alone)
    least = PROBE_COSINE.get(model.dtype, LEAST_PROBE_COSINE)
    if packed.shape == alone.shape and functional.cosine_similarity(packed, alone, dim=-1).min() >= least:
        return first_position
    model.set_attn_implementation(before)
    return None


def _run(pooled: nn.Module, model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    vectors: Tensor = pooled(batch.to(model.device))
    return vectors


def _first_position(model: PreTrainedModel) -> int:
    """0, or for models like RoBERTa the first number after the padding index."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            return int(module.padding_idx) + 1
    return 0


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,  # noqa: ANN401 - depends on the model
) -> tuple[Tensor, None]:
    """Attention of every text to itself: query [1, H, T, d], key and value [1, H' <= H, T, d] to [1, T, H, d].

    Outside a packed pass, this is transformers' own attention.

    Raises:
        NotPackable: the model needs an unsupported option or a mask.
    """
    batch = current_batch()
    if batch is None:
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
        )
        return found, None
    unsupported = {name for name, value in options.items() if value is not None and name not in HARMLESS}
    window = options.get("sliding_window")
    if isinstance(window, int) and window >= max(length for _, length in batch.runs):
        unsupported.discard("sliding_window")
    if unsupported or attention_mask is not None:
        names = ", ".join(sorted(unsupported)) or "a mask"
        raise NotPackable(f"{type(module).__name__}: packed attention does not support {names}")
    given = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if given is None else given)
    attend = _attend_varlen if _has_varlen(query) else _attend_by_length
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend(q, k, v, batch, causal=causal, scaling=scaling)[None], None


def _has_varlen(query: Tensor) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedTokens, *, causal: bool, scaling: float | None
) -> Tensor:
    # It imports torch's compiler, which takes a second; only GPU workers need it.
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    longest = max(length for _, length in batch.runs)
    found = varlen_attn(
        *(query.contiguous(), key.contiguous(), value.contiguous(), batch.bounds, batch.bounds, longest, longest),
        scale=scaling,
        window_size=(-1, 0) if causal else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return cast("Tensor", found)


def _attend_by_length(
    query: Tensor, key: Tensor, value: Tensor, batch: PackedTokens, *, causal: bool, scaling: float | None
) -> Tensor:
    """Attention [T, H, d] of queries [T, H, d], keys and values [T, H', d]."""
    found = torch.empty_like(query, memory_format=torch.contiguous_format)
    products = _has_fast_products(query) and not causal and query.shape[1] == key.shape[1]
    start = 0
    for texts, length in batch.runs:
        end = start + texts * length
        parts = [x[start:end].view(texts, length, *x.shape[1:]).transpose(1, 2) for x in (query, key, value)]
        size = GROUP_TOKENS // length if products and 1 < length < PRODUCTS_BELOW else texts + 1
        by_products = texts // size * size
        out = found[start:end].view(texts, length, *query.shape[1:]).transpose(1, 2)
        for first in range(0, by_products, size):
            group = slice(first, first + size)
            out[group] = _attend_by_products(*(part[group] for part in parts), scaling=scaling)
        if by_products < texts:
            q, k, v = (part[by_products:] for part in parts)
            # The attention of a single token is its own value.
            out[by_products:] = (
                v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
                if length == 1
                else functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
                )
            )
        start = end
    return found


def _has_fast_products(query: Tensor) -> bool:
    return query.dtype == torch.bfloat16 and not query.is_cuda and multiplies_bfloat16()


def _attend_by_products(query: Tensor, key: Tensor, value: Tensor, *, scaling: float | None) -> Tensor:
    """Attention [n, H, t, d] as two batched products."""
    shape = query.shape
    scale = shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = ((x * scale if x is query else x).reshape(-1, *shape[2:]) for x in (query, key, value))
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v).view(shape)


def _mask(*arguments: Any, **named: Any) -> Tensor | None:  # noqa: ANN401 - transformers' own
    # A packed batch needs no mask: its runs define the texts.
    return None if current_batch() is not None else sdpa_mask(*arguments, **named)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)

"""Attention over packed texts, as an attention function of transformers: any model that asks for one can use it.

Every text attends to itself alone. On CUDA one variable-length flash attention does the whole batch; elsewhere texts
of one length are attended to together, so that there is neither padding nor a mask.
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
# Two batched products, with the scores in memory between them, are twice as fast as torch's fused attention for short
# texts on a CPU that multiplies bf16, and slower for long ones. On AVX2 alone bf16 products are up to 40 times slower.
PRODUCTS_BELOW = 160
# oneDNN keeps a program for every shape that it met: texts of one length are multiplied in groups of one size, of about
# so many tokens; those that are left over are fused.
GROUP_TOKENS = 2048
# What attention may be asked for besides; anything else (soft caps, sinks, biases) is not done here.
HARMLESS = {"output_attentions", "output_hidden_states", "use_cache", "position_ids", "cache_position", "is_causal"}
PROBE_LENGTHS = (9, 5, 5, 2)
PROBE_COSINE = {torch.float32: 0.9999}
LEAST_PROBE_COSINE = 0.99

log = logging.getLogger(__name__)


class NotPackable(Exception):
    """The model asks its attention for something that packed texts cannot have."""


def use_packed(pooled: nn.Module, model: PreTrainedModel, *, longest: int) -> int | None:
    """Let a model run packed texts, if that gives what it gives for every text alone.

    Asked of the model itself, on a few random texts: what mixes tokens otherwise than by attention (Mamba's scan,
    convolutions) cannot be told from its configuration.

    Args:
        pooled: from a :class:`TokenBatch` to vectors.
        model: the backbone inside of it; its attention is replaced.
        longest: tokens that a text may have; one of the random texts is that long.

    Returns:
        What the model calls the first token's position; None where it must run padded texts.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters or not model._can_set_attn_implementation():
        return None
    before = model.config._attn_implementation
    first_position = _first_position(model)
    rng, vocabulary = np.random.default_rng(0), model.config.vocab_size
    # From the upper half: what stands for padding comes early, and RoBERTa counts no position for it.
    texts = [rng.integers(vocabulary // 2, vocabulary, length).astype(np.int32) for length in (longest, *PROBE_LENGTHS)]
    with torch.inference_mode():
        alone = torch.cat([_run(pooled, model, PaddedTokens.of([text])) for text in texts])
        model.set_attn_implementation(NAME)
        try:
            packed = _run(pooled, model, PackedTokens.of(texts, first_position=first_position))
        except Exception as error:
            # Whatever a model says to this: it runs padded texts.
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
    """RoBERTa and its like count from behind the padding index."""
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
    **asked: Any,  # noqa: ANN401 - whatever a model asks for
) -> tuple[Tensor, None]:
    """Attention of every text to itself: query [1, H, T, d], key and value [1, H' <= H, T, d] to [1, T, H, d].

    Outside of a packed batch's pass it is transformers' own.
    """
    batch = current_batch()
    if batch is None:
        found, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **asked
        )
        return found, None
    odd = {name for name, what in asked.items() if what is not None and name not in HARMLESS}
    window = asked.get("sliding_window")
    if isinstance(window, int) and window >= max(length for _, length in batch.runs):
        odd.discard("sliding_window")
    if odd:
        raise NotPackable(f"{type(module).__name__} asks for {', '.join(sorted(odd))}")
    if attention_mask is not None:
        raise NotPackable(f"{type(module).__name__} brings a mask of its own")
    given = asked.get("is_causal")
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
    # A second of imports (torch's compiler) that only a GPU's worker pays.
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
            # A token that is alone attends to itself.
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
    # A packed batch needs none: its runs say who attends to whom.
    return None if current_batch() is not None else sdpa_mask(*arguments, **named)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)

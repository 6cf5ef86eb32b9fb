"""The tuned regime: LoRA adapters on the backbone's kept layers, trained with the compressor and matching network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from marc_pipeline.model.backbone import HiddenStates, PooledStates
from marc_pipeline.model.batches import PaddedTokens, token_batches
from marc_pipeline.training.objective import ItemStates
from marc_schemas.bundle import Pooling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_ALPHA_PER_RANK = 2
LORA_DROPOUT = 0.05
# Mamba's scan reads the weights of these modules without calling the modules: adapters would have no effect.
UNCALLED_MODULES = ["dt_proj", "out_proj"]


class TunedStates(ItemStates):
    """States of items from a backbone that is being tuned.

    Candidates go through the backbone, with gradients. Items of histories come from a bank with the latest state of
    every item, because encoding ten history items per candidate would cost ten times as much.

    Args:
        backbone: truncated backbone with LoRA adapters.
        tokens: token ids of every item's text.
        states: pooled states [items, D] of the original backbone, which initialise the bank.
        whole: whether the backbone has all its layers.
        pooling: how token states become one vector.
        dtype: type of the passes through the backbone (autocast); weights stay float32.
        token_budget: padded tokens per pass.
    """

    def __init__(
        self,
        backbone: "PeftModel",
        tokens: Sequence[NDArray[np.int32]],
        states: Tensor,
        *,
        whole: bool,
        pooling: Pooling,
        dtype: torch.dtype,
        token_budget: int,
    ) -> None:
        super().__init__()
        self.pooled = PooledStates(
            HiddenStates(cast("PreTrainedModel", backbone.get_base_model()), whole=whole), pooling
        )
        self.tokens = tokens
        self.dtype = dtype
        self.token_budget = token_budget
        # Persistent, because a resumed run needs the same bank.
        self.register_buffer("bank", states.clone())

    bank: Tensor

    def forward(self, items: Tensor, candidate: Tensor) -> Tensor:
        """Return states [m, D] of items [m]; those of candidates [m] are newly computed, with gradients."""
        fresh = self._encoded(items[candidate])
        with torch.no_grad():
            self.bank[items[candidate]] = fresh
        return functional.embedding(items, self.bank).index_put((torch.nonzero(candidate).squeeze(1),), fresh)

    @torch.no_grad()
    def all_states(self) -> Tensor:
        """Recompute the states [items, D] of all items, store them in the bank, and return them."""
        self.bank.copy_(self._encoded(torch.arange(len(self.bank), device=self.bank.device)))
        return self.bank

    def _encoded(self, items: Tensor) -> Tensor:
        chosen = items.tolist()
        lengths = np.array([len(self.tokens[item]) for item in chosen], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        parts = []
        for rows in token_batches(lengths[order], self.token_budget):
            batch = PaddedTokens.of([self.tokens[chosen[place]] for place in order[rows]]).to(items.device)
            with torch.autocast(items.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
                parts.append(self.pooled(batch).float())
        found = torch.cat(parts)  # [m, D], in the order of length
        return torch.empty_like(found).index_copy(0, torch.from_numpy(order).to(items.device), found)


def add_lora(backbone: "PreTrainedModel", *, rank: int, seed: int) -> "PeftModel":
    """Add LoRA adapters to every linear layer of the blocks, and freeze all other weights.

    Hu et al., LoRA, ICLR 2022 (arXiv 2106.09685). The adapters are initialised so that the states do not change.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - takes seconds, and only the tuned regime needs it

    config = LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA_PER_RANK * rank,
        lora_dropout=LORA_DROPOUT,
        target_modules="all-linear",
        exclude_modules=UNCALLED_MODULES if "mamba" in str(backbone.config.model_type) else None,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("PeftModel", get_peft_model(backbone, config))


def merged(backbone: "PeftModel") -> "PreTrainedModel":
    """Return the plain backbone, with the adapters merged into its weights."""
    return cast("PreTrainedModel", backbone.merge_and_unload())

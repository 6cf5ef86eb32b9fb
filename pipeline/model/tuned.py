"""The tuned regime: LoRA adapters on the backbone's kept layers, trained with compressor and matching network."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.model.backbone import HiddenStates, PooledStates
from pipeline.model.batches import PaddedTokens
from pipeline.model.encoder import token_batches
from pipeline.model.objective import Source
from schemas.bundle import Pooling

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

LORA_ALPHA_PER_RANK = 2
LORA_DROPOUT = 0.05
# Mamba's scan reads these as weights and never calls them: an adapter beside them would not be heard.
READ_AS_WEIGHTS = ["dt_proj", "out_proj"]


class TunedStates(Source):
    """States of items from a backbone that is being tuned.

    Candidates go through the backbone, with gradients. Items of histories are read from a bank that holds the latest
    state of every item: encoding ten earlier items per candidate anew would cost ten times as much.

    Args:
        backbone: truncated, with LoRA adapters.
        tokens: ids of every item's text.
        states: pooled states [items, D] of the untouched backbone, the bank's first content.
        whole: whether no layer was cut off.
        pooling: how token states become one vector.
        dtype: of the passes through the backbone (autocast); weights stay float32.
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
        # Persistent: a resumed run must find the bank as it was.
        self.register_buffer("bank", states.clone())

    bank: Tensor

    def forward(self, items: Tensor, candidate: Tensor) -> Tensor:
        """States [m, D] of items [m]; those of candidates [m] with gradients, and fresh."""
        fresh = self._encoded(items[candidate])
        with torch.no_grad():
            self.bank[items[candidate]] = fresh
        return functional.embedding(items, self.bank).index_put((torch.nonzero(candidate).squeeze(1),), fresh)

    @torch.no_grad()
    def all_states(self) -> Tensor:
        """States [items, D] of all items, fresh; the bank holds them afterwards."""
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
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy(0, torch.from_numpy(order).to(items.device), found)


def add_lora(backbone: "PreTrainedModel", *, rank: int, seed: int) -> "PeftModel":
    """Adapters of low rank beside every linear map of the blocks; nothing else is trained.

    Hu et al., LoRA, ICLR 2022 (arXiv 2106.09685). They begin as zero: the model begins as the untouched one.
    """
    from peft import LoraConfig, get_peft_model  # noqa: PLC0415 - seconds that only the tuned regime pays

    config = LoraConfig(
        r=rank,
        lora_alpha=LORA_ALPHA_PER_RANK * rank,
        lora_dropout=LORA_DROPOUT,
        target_modules="all-linear",
        exclude_modules=READ_AS_WEIGHTS if "mamba" in str(backbone.config.model_type) else None,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cast("PeftModel", get_peft_model(backbone, config))


def merged(backbone: "PeftModel") -> "PreTrainedModel":
    """The backbone with its adapters added to the weights: an ordinary model again."""
    return cast("PreTrainedModel", backbone.merge_and_unload())

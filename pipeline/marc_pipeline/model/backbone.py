"""The backbone: any Hugging Face AutoModel, truncated after a layer; hidden and pooled states of one or all layers."""

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from marc_pipeline.errors import UserError
from marc_pipeline.model.batches import TokenBatch
from marc_schemas.bundle import Pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "package:"


def locate(name: str) -> str:
    """Return the folder of ``package:NAME/FOLDER`` inside a Python package; any other name unchanged.

    Raises:
        UserError: the package is not installed, or the folder has no ``config.json``.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, folder = name.removeprefix(PACKAGE).partition("/")
    try:
        path = Path(str(importlib.resources.files(package))) / folder
    except (ModuleNotFoundError, ValueError):
        raise UserError(f"train.backbone {name!r}: the package {package} is not installed") from None
    if not (path / "config.json").is_file():
        raise UserError(f"train.backbone {name!r}: {path} has no config.json")
    return str(path)


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """Load an AutoModel by id, path or ``package:`` name, in evaluation mode. Remote code is never run.

    Raises:
        UserError: the model does not exist, or its checkpoint lacks weights.
    """
    from transformers import AutoModel  # noqa: PLC0415 - the import takes half a second

    model: PreTrainedModel
    try:
        model, loading = AutoModel.from_pretrained(
            locate(name), dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load backbone {name!r}: {str(error).splitlines()[0]}") from None
    # A text needs one pass, so that a decoder's cache of keys and values would only use memory.
    model.config.use_cache = False
    # The pipeline pools by itself; a pooler that the checkpoint lacks would have random weights.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"backbone {name!r} lacks {len(missing)} weights of its architecture, for example {missing[0]}")
    model.train(mode=False)
    return model


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load the fast tokenizer of a backbone.

    Raises:
        UserError: the backbone has no fast tokenizer, or lacks its files.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise UserError(f"backbone {name!r} has no fast tokenizer (tokenizer.json), which the pipeline needs")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"backbone {name!r} lacks the files of its tokenizer: the tokenizer has special tokens only")
    return tokenizer


def blocks(model: "PreTrainedModel") -> tuple[nn.Module, str, nn.ModuleList]:
    """Return the stack of layers: its parent module, its attribute name there, and the list itself.

    Raises:
        UserError: the model has no list of ``num_hidden_layers`` modules.
    """
    wanted = getattr(model.config, "num_hidden_layers", None)
    if wanted is None:
        raise UserError(f"{type(model).__name__} has no num_hidden_layers: only a single stack of layers is supported")
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == wanted:
                return owner, name, child
    raise UserError(f"{type(model).__name__} has no list of {wanted} layers: it cannot be truncated")


def truncate(model: "PreTrainedModel", layers: int) -> "PreTrainedModel":
    """Drop every block after the first ``layers`` in place, so that they are neither computed nor saved.

    For 0 layers the first block stays, because transformers loads no model without blocks. :func:`kept_states` does not
    compute it.

    Raises:
        UserError: the model has fewer blocks.
    """
    owner, name, stack = blocks(model)
    if layers > len(stack):
        raise UserError(f"{layers} layers are to be kept, the backbone has {len(stack)}; keep at most {len(stack)}")
    layers = max(1, layers)
    setattr(owner, name, stack[:layers])
    config = model.config
    config.num_hidden_layers = layers
    # In Mamba, layer_types is a property that follows num_hidden_layers.
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:layers]
    # Configurations like DINOv2's list names of blocks; a saved model with names of dropped blocks cannot be loaded.
    if vars(config).get("stage_names"):
        config.stage_names = config.stage_names[: layers + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    return model


class HiddenStates(nn.Module):
    """Token states after the last kept block: the input of the next block of the whole model.

    A truncated decoder's states are not normalised, because the final norm belongs to the dropped layers. They are
    entry ``layers_kept`` of the whole model's ``hidden_states``; Mamba's list lacks the embeddings.

    Args:
        model: a truncated backbone.
        whole: whether the backbone has all layers; the model's own final norm then applies.
    """

    def __init__(self, model: "PreTrainedModel", *, whole: bool) -> None:
        super().__init__()
        self.model = model
        self._whole = whole
        self._state: Tensor | None = None
        if not whole:
            blocks(model)[2][-1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._state = output[0] if isinstance(output, tuple) else output

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the hidden states of a batch of token ids, in the layout of the batch."""
        last = batch.run(self.model)
        if self._whole:
            return last
        state, self._state = self._state, None
        if state is None:
            raise RuntimeError("the model did not run its last kept block, so there are no hidden states")
        return state


class _BeforeBlocks(Exception):
    """The input of the first block, on its way out of the model's forward pass."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


class InputStates(nn.Module):
    """Token states before the first block: layer 0, the embeddings alone. No block is computed.

    The forward pass ends at the first block, so that whatever the architecture adds to the embeddings is included:
    positions, norms, scaling. A pass keeps no state in this module, so that several threads may share it.

    Args:
        model: a truncated backbone. Its first block loses its weights, which would only use memory.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        first = blocks(model)[2][0]
        for name, _ in [*first.named_children(), *first.named_parameters(recurse=False)]:
            delattr(first, name)
        first.register_forward_pre_hook(_leave_model, with_kwargs=True)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return the states of a batch of token ids, in the layout of the batch."""
        try:
            batch.run(self.model)
        except _BeforeBlocks as reached:
            return reached.states
        raise RuntimeError("the model did not run its first block, so there are no states before it")


def _leave_model(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
    raise _BeforeBlocks(_block_input(inputs, named))


def _block_input(inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> Tensor:
    return inputs[0] if inputs else named["hidden_states"]


def kept_states(model: "PreTrainedModel", *, layers: int, of: int) -> HiddenStates | InputStates:
    """Return the token states after the kept ``layers`` of a backbone with ``of`` blocks, truncated there."""
    return HiddenStates(model, whole=layers == of) if layers else InputStates(model)


class PooledLayers(nn.Module):
    """Pooled states of every layer in one pass, equal to :func:`kept_states` of the model truncated there.

    Entry 0 is the input of the first block; entry L is the output of the whole model.
    """

    def __init__(self, model: "PreTrainedModel", pooling: Pooling) -> None:
        super().__init__()
        self.model = model
        self.pooling: Pooling = pooling
        self._batch: TokenBatch | None = None
        self._pooled: list[Tensor] = []
        stack = blocks(model)[2]
        stack[0].register_forward_pre_hook(self._enter, with_kwargs=True)
        for block in stack[:-1]:
            block.register_forward_hook(self._leave)

    def _enter(self, _module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self._keep(_block_input(inputs, named))

    def _leave(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, states: Tensor) -> None:
        if self._batch is None:
            raise RuntimeError("a block ran outside PooledLayers.forward; call PooledLayers, not the model")
        # Pooling at once keeps the token states of one layer in memory, not of all layers.
        self._pooled.append(self.summary(self._batch, states))

    def summary(self, batch: TokenBatch, states: Tensor) -> Tensor:
        """Return one row per text [b, D] of a layer's token states."""
        return batch.pool(states, self.pooling)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return pooled states [b, L + 1, D], float32, of a batch of token ids."""
        self._batch, self._pooled = batch, []
        try:
            last = batch.run(self.model)
            return torch.stack([*self._pooled, self.summary(batch, last)], dim=1)
        finally:
            self._batch, self._pooled = None, []


class PooledStates(nn.Module):
    """Pooled states of the last layer of a truncated backbone."""

    def __init__(self, states: HiddenStates | InputStates, pooling: Pooling) -> None:
        super().__init__()
        self.states = states
        self.pooling: Pooling = pooling

    @property
    def model(self) -> "PreTrainedModel":
        """The truncated backbone."""
        return self.states.model

    def forward(self, batch: TokenBatch) -> Tensor:
        """Return pooled states [b, D], float32, of a batch of token ids."""
        return batch.pool(self.states(batch), self.pooling)

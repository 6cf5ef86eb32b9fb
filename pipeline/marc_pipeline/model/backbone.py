"""The backbone: the first layers of any Hugging Face AutoModel, and how its token states become one vector."""

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
    """A Hugging Face id or a path as it is; ``package:NAME/FOLDER`` as the folder inside that Python package.

    Raises:
        UserError: the package is not installed, or has no such folder.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, folder = name.removeprefix(PACKAGE).partition("/")
    try:
        path = Path(str(importlib.resources.files(package))) / folder
    except (ModuleNotFoundError, ValueError):
        raise UserError(f"train.backbone {name!r}: the package {package} is not installed") from None
    if not (path / "config.json").is_file():
        raise UserError(f"train.backbone {name!r}: {path} holds no config.json")
    return str(path)


def load_backbone(name: str, *, dtype: torch.dtype = torch.float32) -> "PreTrainedModel":
    """An AutoModel by id, path or ``package:`` name, in evaluation mode. Remote code is never run.

    Raises:
        UserError: there is no such model.
    """
    from transformers import AutoModel  # noqa: PLC0415 - half a second that only those who load a model pay

    model: PreTrainedModel
    try:
        model, loading = AutoModel.from_pretrained(
            locate(name), dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load backbone {name!r}: {str(error).splitlines()[0]}") from None
    # One pass per text: a decoder's cache of keys and values would only cost memory.
    model.config.use_cache = False
    # Pooling is ours: the model's own pooler is never used, and where a checkpoint lacks it, it is random.
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"backbone {name!r} lacks {len(missing)} weights of its architecture, for example {missing[0]}")
    model.train(mode=False)
    return model


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The fast tokenizer of a backbone.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from None
    if not tokenizer.is_fast:
        raise UserError(f"backbone {name!r} has no fast tokenizer (tokenizer.json), which the pipeline needs")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UserError(f"backbone {name!r} comes without the files of its tokenizer: it knows special tokens only")
    return tokenizer


def blocks(model: "PreTrainedModel") -> tuple[nn.Module, str, nn.ModuleList]:
    """The stack of layers: its owner, its name there, and the list itself.

    Raises:
        UserError: no list of ``num_hidden_layers`` modules is found.
    """
    wanted = getattr(model.config, "num_hidden_layers", None)
    if wanted is None:
        raise UserError(f"{type(model).__name__} names no number of layers: it is no single stack of them")
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == wanted:
                return owner, name, child
    raise UserError(f"{type(model).__name__} has no list of {wanted} layers: it cannot be truncated")


def truncate(model: "PreTrainedModel", layers: int) -> "PreTrainedModel":
    """Drop every block after the first ``layers``, in place: what is not needed is not computed nor saved.

    Raises:
        UserError: the model has fewer blocks.
    """
    owner, name, stack = blocks(model)
    if layers > len(stack):
        raise UserError(f"{layers} layers are to be kept, the backbone has {len(stack)}")
    setattr(owner, name, stack[:layers])
    config = model.config
    config.num_hidden_layers = layers
    # Where it is a property (Mamba), it follows num_hidden_layers by itself.
    if vars(config).get("layer_types"):
        config.layer_types = config.layer_types[:layers]
    # DINOv2 and its like name their blocks and those they put out: a dropped one's name could not be loaded again.
    if vars(config).get("stage_names"):
        config.stage_names = config.stage_names[: layers + 1]
        config.set_output_features_output_indices(out_features=None, out_indices=None)
    return model


class HiddenStates(nn.Module):
    """Token states after the last kept block.

    The state that the next block of the whole model would get: for a truncated decoder that is before the final
    norm, which belongs to the layers that were cut off. In transformers' ``hidden_states`` of the whole model it
    is entry ``layers_kept`` (Mamba's list lacks the embeddings: there one earlier).

    Args:
        model: a truncated backbone.
        whole: whether no layer was cut off; then the model's own final norm applies.
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
        """Hidden states of a batch of token ids, in its own layout."""
        last = batch.run(self.model)
        if self._whole:
            return last
        state, self._state = self._state, None
        if state is None:
            raise RuntimeError("the last kept block was not run")
        return state


class PooledLayers(nn.Module):
    """Pooled states of every layer in one pass, each as :class:`HiddenStates` of the model truncated there gives it.

    Entry 0 is what the first block gets; entry L is the whole model's output.

    Args:
        model: a whole backbone.
        pooling: how token states become one vector.
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
        self._keep(inputs[0] if inputs else named["hidden_states"])

    def _leave(self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, states: Tensor) -> None:
        if self._batch is None:
            raise RuntimeError("a block was run outside of PooledLayers")
        # Summarised at once: token states of one layer at a time.
        self._pooled.append(self.summary(self._batch, states))

    def summary(self, batch: TokenBatch, states: Tensor) -> Tensor:
        """What is kept of a layer's token states: one row per text [b, D]."""
        return batch.pool(states, self.pooling)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Pooled states [b, L + 1, D], float32, of a batch of token ids."""
        self._batch, self._pooled = batch, []
        try:
            last = batch.run(self.model)
            return torch.stack([*self._pooled, self.summary(batch, last)], dim=1)
        finally:
            self._batch, self._pooled = None, []


class PooledStates(nn.Module):
    """Pooled states of one layer.

    Args:
        states: of the truncated backbone.
        pooling: how token states become one vector.
    """

    def __init__(self, states: HiddenStates, pooling: Pooling) -> None:
        super().__init__()
        self.states = states
        self.pooling: Pooling = pooling

    @property
    def model(self) -> "PreTrainedModel":
        """The truncated backbone."""
        return self.states.model

    def forward(self, batch: TokenBatch) -> Tensor:
        """Pooled states [b, D], float32, of a batch of token ids."""
        return batch.pool(self.states(batch), self.pooling)

"""oneDNN on a CPU: bf16 linear layers with prepacked weights and fused GELU; whether the CPU multiplies bf16."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# A typical number of rows of a product; the packed layout depends on it slightly.
ROWS = 2048


class PrepackedLinear(nn.Module):
    """A bf16 linear layer whose weights are packed once; :class:`torch.nn.Linear` packs them in every call.

    It uses the operators that torch's compiler emits for a frozen model.

    Args:
        linear: the layer; its weights are copied.
        gelu: whether GELU follows.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Not a parameter, because only the operator can read the packed layout.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs [..., out] for inputs [..., in]."""
        after, algorithm = ("gelu", "none") if self._gelu else ("none", "")
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, after, [], algorithm)
        return found


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has bf16 instructions and oneDNN uses them. Every choice of bf16 on a CPU depends on it.

    The CPU's flags do not suffice: oneDNN may disable bf16, for example under ``ONEDNN_MAX_CPU_ISA=AVX2``, and then
    refuses bf16 weights. oneDNN's answer does not suffice either: with AVX512 alone it emulates bf16 in float32.
    """
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return bool(native) and _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_prepack() -> bool:
    """Return whether this CPU multiplies bf16 and this build of torch can pack weights for that."""
    return multiplies_bfloat16() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def _has_onednn() -> bool:
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(built) and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")


def prepack(model: nn.Module) -> Callable[[], None]:
    """Replace every bf16 linear layer of a model on the CPU, in place, together with BERT's GELU after it.

    Call it only if :func:`can_prepack` is true: otherwise torch refuses the layout or emulates the products. The
    caller must compare the results, because some models (Mamba's scan) read the weights of their layers directly.

    Returns:
        A function that restores the old layers, which it keeps in memory.
    """
    before: list[tuple[nn.Module, str, nn.Module | Tensor]] = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and not child.weight.is_cuda:
                gelu = name == "dense" and _is_gelu(getattr(module, "intermediate_act_fn", None))
                before.append((module, name, child))
                setattr(module, name, PrepackedLinear(child, gelu=gelu))
                if gelu:
                    before.append((module, "intermediate_act_fn", module.intermediate_act_fn))
                    module.intermediate_act_fn = nn.Identity()

    def undo() -> None:
        for module, name, child in before:
            setattr(module, name, child)

    return undo


def _is_gelu(activation: object) -> bool:
    return type(activation).__name__ == "GELUActivation" or (
        isinstance(activation, nn.GELU) and activation.approximate == "none"
    )

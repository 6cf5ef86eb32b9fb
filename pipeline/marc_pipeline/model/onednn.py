"""Linear maps as oneDNN wants them on a CPU: weights laid out once for bf16 products, GELU done in the same pass."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Rows that a product usually has; the layout of the weights depends on it a little.
ROWS = 2048


class PrepackedLinear(nn.Module):
    """A bf16 linear map whose weights lie as the product reads them; :class:`torch.nn.Linear` lays them out per call.

    The operators are those that torch's own compiler emits for a frozen model.

    Args:
        linear: the map; its weights are copied.
        gelu: whether GELU follows.
    """

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # No parameter: nothing can read the layout but the operator.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """The map of [..., in] to [..., out]."""
        after, algorithm = ("gelu", "none") if self._gelu else ("none", "")
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, after, [], algorithm)
        return found


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has bf16 instructions and oneDNN uses them. Every choice of bf16 on a CPU asks here.

    The CPU's flags are not enough: oneDNN refuses bf16 weights where its own answer is no, for example under
    ``ONEDNN_MAX_CPU_ISA=AVX2``. oneDNN's answer is not enough either: with AVX512 alone it emulates bf16 in float32.
    """
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return bool(native) and _has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def can_prepack() -> bool:
    """Return whether this CPU multiplies bf16 and this build of torch can lay out weights for that."""
    return multiplies_bfloat16() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def _has_onednn() -> bool:
    built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(built) and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")


def prepack(model: nn.Module) -> Callable[[], None]:
    """Replace every bf16 linear map of a model on the CPU, in place; where BERT's GELU follows one, it joins it.

    Call it only where :func:`can_prepack` is true: elsewhere torch refuses the layout, or emulates the products.
    Some models read the weights of their maps themselves (Mamba's scan): what they give then must be looked at.

    Returns:
        What undoes it; the old weights live as long as that.
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

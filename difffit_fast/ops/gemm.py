"""Matrix products with frozen weights.

Operands are 2-D (B·T flattened). On a CPU without bf16 (or fp16) matrix instructions PyTorch's half-precision products
run ten to fifty times slower than float32 ones, so there the operands are widened, multiplied in float32 and rounded once:
the same result, or a better one. Weights of which :mod:`.eight_bit` keeps copies are multiplied by those; what they are
multiplied with may come quantised already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._devices import cpu_has_fast
from .eight_bit import Rows, eight_bit_of, multiply, multiply_rows
from .weights import layout_of


def widen(x: Tensor) -> bool:
    """Whether products of tensors like ``x`` are to be computed in float32 on this device."""
    return x.device.type == "cpu" and not cpu_has_fast(x.dtype)


def linear(x: Tensor | Rows, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K) transposed, plus bias (N): (M, N) in the dtype of x."""
    if isinstance(x, Rows):
        return multiply_rows(x, weight, bias, False)
    kept = eight_bit_of(weight)
    if kept is not None:
        return multiply(x, weight, kept, bias, False, lambda: _linear(x, weight, bias))
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if widen(x):
        x32, w32 = x.float(), weight.float()
        out = torch.mm(x32, w32.t()) if bias is None else torch.addmm(bias.float(), x32, w32.t())
        return out.to(x.dtype)
    layout = layout_of(weight, x.shape[0]) if x.device.type == "cpu" else None
    if layout is not None:
        bias = None if bias is None else bias.to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "")
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias.to(x.dtype), x, weight.t())


def dgrad(dy: Tensor | Rows, weight: Tensor) -> Tensor:
    """dy (M, N) times weight (N, K): the gradient of the input of ``linear``, (M, K)."""
    if isinstance(dy, Rows):
        return multiply_rows(dy, weight, None, True)
    kept = eight_bit_of(weight)
    if kept is not None:
        return multiply(dy, weight, kept, None, True, lambda: _dgrad(dy, weight))
    return _dgrad(dy, weight)


def _dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    if widen(dy):
        return torch.mm(dy.float(), weight.float()).to(dy.dtype)
    return torch.mm(dy, weight)


def check_operands(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise with both sides' shapes and dtypes when ``linear(x, weight)`` cannot work."""
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: weight must be (out, in) with in = {x.shape[-1]}, the last size of x {tuple(x.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: x and the frozen weight must have one dtype; got {x.dtype} and {weight.dtype}")

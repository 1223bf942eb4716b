"""Matrix products with frozen weights.

Operands are 2-D (B·T flattened). On a CPU without bf16 (or fp16) matrix instructions PyTorch's half-precision products
run ten to fifty times slower than float32 ones, so there the operands are widened, multiplied in float32 and rounded once:
the same result, or a better one.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from .._devices import cpu_has_fast
from ..errors import DiffFitError


def widen(x: Tensor) -> bool:
    """Whether products of tensors like ``x`` are to be computed in float32 on this device."""
    return x.device.type == "cpu" and not cpu_has_fast(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (M, K) times weight (N, K) transposed, plus bias (N): (M, N) in the dtype of x."""
    if widen(x):
        x32, w32 = x.float(), weight.float()
        out = torch.mm(x32, w32.t()) if bias is None else torch.addmm(bias.float(), x32, w32.t())
        return out.to(x.dtype)
    packed = _packed(weight, x.shape[0]) if x.device.type == "cpu" else None
    if packed is not None:
        bias = None if bias is None else bias.to(x.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    if bias is None:
        return torch.mm(x, weight.t())
    return torch.addmm(bias.to(x.dtype), x, weight.t())


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """dy (M, N) times weight (N, K): the gradient of the input of ``linear``, (M, K)."""
    if widen(dy):
        return torch.mm(dy.float(), weight.float()).to(dy.dtype)
    return torch.mm(dy, weight)


# -- packing: what freezing allows on a CPU ------------------------------------------------------------------------
class Packed:
    """oneDNN's own layout of one frozen weight for the forward product, made on first use and kept.

    Plain products lay the weight out again at every call; a frozen one needs that once. It costs a second copy of the
    weight, so it is done where that copy is small (half precision), or where ``DIFFFIT_FAST_PACK=1`` asks for it. Only
    weights with at least as many rows as columns are packed: for the others the plain product is as fast. A write to the
    weight is seen by its version counter, which ``weight.data.copy_`` and the like go round: use ``torch.no_grad`` instead.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()  # keeps the memory alive, so that its address names no other tensor
        self.version = -1
        self.layout: Tensor | None = None

    def get(self, weight: Tensor, rows: int) -> Tensor | None:
        if weight.shape != self.weight.shape or weight.dtype != self.weight.dtype:
            return None
        if self.layout is None or self.version != weight._version:
            self.version = weight._version
            self.layout = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), rows)
        return self.layout


_PACKED: weakref.WeakValueDictionary[int, Packed] = weakref.WeakValueDictionary()


def pack_wanted(weight: Tensor) -> bool:
    """Whether :func:`keep_packed` should keep a second, packed copy of this weight."""
    asked = os.environ.get("DIFFFIT_FAST_PACK", "auto")
    if asked not in ("auto", "0", "1"):
        raise DiffFitError(f"DIFFFIT_FAST_PACK must be auto, 0 or 1; got {asked!r}")
    if asked == "0" or weight.device.type != "cpu" or weight.shape[0] < weight.shape[1]:
        return False
    if not torch.backends.mkldnn.is_available() or not cpu_has_fast(weight.dtype):
        return False
    half = weight.dtype == torch.bfloat16
    return half or (asked == "1" and weight.dtype == torch.float32)


def keep_packed(weights: Iterable[Tensor]) -> list[Packed]:
    """Pack these frozen weights from now on, as long as the caller keeps the returned list."""
    kept = []
    for weight in weights:
        if pack_wanted(weight):
            packed = Packed(weight)
            _PACKED[weight.data_ptr()] = packed
            kept.append(packed)
    return kept


def _packed(weight: Tensor, rows: int) -> Tensor | None:
    if not _PACKED or not rows:
        return None
    packed = _PACKED.get(weight.data_ptr())
    return None if packed is None else packed.get(weight, rows)


def has_packed(weight: Tensor) -> bool:
    """Whether :func:`keep_packed` keeps a copy of this weight."""
    return bool(_PACKED) and weight.data_ptr() in _PACKED


def check_operands(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise with both sides' shapes and dtypes when ``linear(x, weight)`` cannot work."""
    if weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: weight must be (out, in) with in = {x.shape[-1]}, the last size of x {tuple(x.shape)}; "
            f"got {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: x and the frozen weight must have one dtype; got {x.dtype} and {weight.dtype}")

"""Who makes the products with a block's frozen weights on the CPU: PyTorch's library, or our C++ kernels, which do them piece
by piece, with what stands between two products in the core's cache.

``DIFFFIT_FAST_PRODUCTS`` says so: ``pieces`` wherever they can (float32, bfloat16 where the processor multiplies it as it is,
sizes that whole vectors divide), ``library`` nowhere, ``auto`` where they were measured to be faster: on processors of AMD.
By the machine and the sizes, not by the clock: a run that goes on on the same machine computes the same bits.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .. import _ext
from ..errors import DiffFitError
from .dispatch import cpp_ops, room
from .eight_bit import eight_bit_of
from .weights import has_layout, layouts_asked

_GRANULE, _FEW_ROWS = 16, 256


def asked() -> str:
    """What ``DIFFFIT_FAST_PRODUCTS`` says, ``auto`` where it says nothing."""
    said = os.environ.get("DIFFFIT_FAST_PRODUCTS", "auto") or "auto"
    if said not in ("auto", "pieces", "library"):
        raise DiffFitError(f"DIFFFIT_FAST_PRODUCTS must be auto, pieces or library; got {said!r}")
    return said


def possible(like: Tensor) -> bool:
    """Whether our kernels multiply tensors of this device and dtype here."""
    if like.device.type != "cpu" or room(like.device, like.dtype) != "cpp" or cpp_ops() is None:
        return False
    return like.dtype == torch.float32 or (like.dtype == torch.bfloat16 and _ext.cpu_multiplies_bf16())


def in_pieces(h: Tensor, *weights: Tensor) -> bool:
    """Whether the products of ``h`` (..., D) with ``weights``, the first of which is fc1 (F, D), are ours."""
    said, fc1 = asked(), weights[0]
    if said == "library" or 0 in fc1.shape or fc1.shape[0] % _GRANULE or fc1.shape[1] % _GRANULE or not possible(h):
        return False
    if any(eight_bit_of(weight) is not None for weight in weights):
        return False
    if said == "pieces":
        return True
    # Few rows are not worth packing the weights for, and weights whose layout is kept need no packing. A product of bfloat16
    # takes half the time, so it takes more rows.
    few = _FEW_ROWS if h.dtype == torch.float32 else max(_FEW_ROWS, 2 * fc1.shape[1] // 3)
    return h.numel() >= few * fc1.shape[1] and _ext.cpu_is_amd() and not has_layout(fc1)


def usual(weight: Tensor) -> bool:
    """Whether products with a frozen weight of this kind are ours but for few rows, so that no other layout need be kept."""
    ours = asked() == "pieces" or (asked() == "auto" and _ext.cpu_is_amd())
    return ours and layouts_asked() != "1" and possible(weight)


def _choice() -> dict[str, Any]:
    return {
        "DIFFFIT_FAST_PRODUCTS": asked(),
        "processor of AMD": _ext.cpu_is_amd(),
        "bfloat16": _ext.cpu_multiplies_bf16(),
    }


_ext.register_choice("products", _choice)

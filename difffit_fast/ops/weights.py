"""Frozen weights in memory: what is kept beside them for speed, and how it notices that they have become others.

The parameters are the truth. Whatever happens to one of them (its data replaced, written to, moved, sharded), what is kept
here is looked at again before every use, at run time, and is not used where it no longer fits:

- **side by side**: :func:`lay_together` moves parameters into one piece of memory, where one product can read them all
  (:func:`together`). Nothing is stored twice. Each keeps a storage of its own, a window on that memory, so that whoever
  saves, shares or resizes a tensor meets an ordinary one and no neighbours. Seen by addresses and sizes.
- **in oneDNN's layout**: :func:`keep_layout`, a second copy. Seen by a checksum of the whole weight, since a write through
  ``weight.data`` leaves no other trace.

Both end with the memory that they are about; nothing has to be told.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._devices import cpu_has_fast
from ..errors import DiffFitError

PLAIN = (Tensor, nn.Parameter)


# -- side by side --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Whole:
    """The memory of several weights, which lives as long as one of their windows on it does, and how they lie there."""

    memory: weakref.ref[torch.UntypedStorage]
    sizes: tuple[int, ...]
    look: list[list[Any]]


_WHOLE: dict[int, _Whole] = {}  # by the address of the first
_DTYPE = operator.attrgetter("dtype")


def _look(weights: Sequence[Tensor]) -> list[list[Any]]:
    return [list(map(of, weights)) for of in (Tensor.data_ptr, Tensor.size, Tensor.stride, _DTYPE)]


@torch.no_grad()
def lay_together(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters (N_i, ...) into one piece of memory, in this order; their values and objects stay.

    Nothing is done where they lie so, differ in dtype, device or the sizes behind the first, are in memory that others
    look at (shared between processes, pinned), or are no ordinary tensors in the memory of a CPU or a CUDA device.
    """
    first = parameters[0]
    for p in parameters:
        if type(p) not in PLAIN or p.device.type not in ("cpu", "cuda") or p.numel() == 0:
            return
        if (p.dtype, p.device, p.shape[1:]) != (first.dtype, first.device, first.shape[1:]):
            return
        if p.device.type == "cpu" and (p.is_shared() or p.is_pinned()):
            return
    if together(parameters) is not None:
        return
    whole = torch.cat([p.detach() for p in parameters])
    memory, start = whole.untyped_storage(), 0
    for p in parameters:
        stop = start + p.numel() * p.element_size()
        p.data = whole.new_empty(0).set_(memory[start:stop], 0, p.shape)
        start = stop
    _WHOLE[whole.data_ptr()] = _Whole(weakref.ref(memory), tuple(whole.shape), _look(parameters))
    weakref.finalize(memory, _WHOLE.pop, whole.data_ptr(), None)


def together(weights: Sequence[Tensor]) -> Tensor | None:
    """The tensor (Σ N_i, ...) of these weights (N_i, ...), which shares their memory; None where they do not lie side by side."""
    known = _WHOLE.get(weights[0].data_ptr())
    memory = None if known is None else known.memory()
    if memory is None or _look(weights) != known.look:
        return None
    return weights[0].new_empty(0).set_(memory, 0, known.sizes)


# -- in oneDNN's layout --------------------------------------------------------------------------------------------
def checksum(weight: Tensor) -> Tensor:
    """A sum of its bits for each row of a weight (N, ...), (N,) int64: equal weights have equal ones, others do not, unless
    changes within one row cancel."""
    rows = weight.detach().unsqueeze(-1).flatten(1)
    if not rows.numel():
        return torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    size = rows.element_size()
    wide = rows.shape[1] * size % 8 == 0 and rows.is_contiguous() and rows.storage_offset() * size % 8 == 0
    bits = torch.int64 if wide else {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return rows.view(bits).sum(1, dtype=torch.int64)


class _Layout:
    """oneDNN's own layout of one frozen weight for the forward product, made on first use and again when the weight changes."""

    def __init__(self, weight: Tensor) -> None:
        self.kind = weight.data_ptr(), weight.dtype, weight.shape
        self.checksum: Tensor | None = None
        self.layout: Tensor | None = None

    def get(self, weight: Tensor, rows: int) -> Tensor | None:
        if (weight.data_ptr(), weight.dtype, weight.shape) != self.kind or not weight.is_contiguous():
            return None
        now = checksum(weight)
        if self.checksum is None or not torch.equal(now, self.checksum):
            self.checksum = now
            self.layout = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        return self.layout


_LAYOUTS: weakref.WeakKeyDictionary[torch.UntypedStorage, _Layout] = weakref.WeakKeyDictionary()


def layouts_asked() -> str:
    """What ``DIFFFIT_FAST_PACK`` says: ``auto``, ``0`` or ``1``."""
    asked = os.environ.get("DIFFFIT_FAST_PACK", "auto")
    if asked not in ("auto", "0", "1"):
        raise DiffFitError(f"DIFFFIT_FAST_PACK must be auto, 0 or 1; got {asked!r}")
    return asked


def layout_wanted(weight: Tensor) -> bool:
    """Whether :func:`keep_layout` should keep a second copy of this weight, in oneDNN's layout.

    Plain products lay the weight out again at every call; a frozen one needs that once, and a look at it costs a fraction.
    The copy is small in half precision; ``DIFFFIT_FAST_PACK=1`` asks for it in float32, too, and 0 forbids it. Only
    weights with at least as many rows as columns: for the others the plain product is as fast.
    """
    asked = layouts_asked()
    if asked == "0" or type(weight) not in PLAIN or weight.device.type != "cpu" or weight.shape[0] < weight.shape[1]:
        return False
    if not torch.backends.mkldnn.is_available() or not cpu_has_fast(weight.dtype):
        return False
    return weight.dtype == torch.bfloat16 or (asked == "1" and weight.dtype == torch.float32)


def keep_layout(weights: Iterable[Tensor]) -> None:
    """Let :func:`.gemm.linear` multiply by these weights (N, K) in oneDNN's layout from now on, until their memory goes."""
    for weight in weights:
        if layout_wanted(weight) and weight.numel():
            memory = weight.untyped_storage()
            kept = _LAYOUTS.get(memory)
            if kept is None or kept.kind != _Layout(weight).kind:
                _LAYOUTS[memory] = _Layout(weight)


def layout_of(weight: Tensor, rows: int) -> Tensor | None:
    """The layout that is kept of ``weight``, for products with matrices of ``rows`` rows; None where none is."""
    if not _LAYOUTS or not rows:
        return None
    kept = _LAYOUTS.get(weight.untyped_storage())
    return None if kept is None else kept.get(weight, rows)


def has_layout(weight: Tensor) -> bool:
    """Whether :func:`keep_layout` keeps a copy of this weight."""
    return bool(_LAYOUTS) and weight.untyped_storage() in _LAYOUTS

"""One way to register an operation with ``torch.library``: schema, implementation, fake, autograd."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .weights import PLAIN

_LIBRARY = torch.library.Library("difffit_fast", "DEF")


def rows(x: torch.Tensor) -> torch.Tensor:
    """(..., n) as (M, n); ``reshape(-1, n)`` cannot tell M where n is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def autocast_on(device: str) -> bool:
    """Whether autocast is on for this type of device; there is none for "meta", say."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable:
    """Define ``difffit_fast::<schema>`` and return the function that calls it.

    ``implementation`` is one Python function for all devices: it picks the kernels by the tensors it gets
    (:mod:`.dispatch`). Autocast is off inside it: the caller has decided the dtypes.

    The function goes through the dispatcher only where something looks on (a compiler, a tracer, a functorch transform, a
    tensor subclass). Otherwise it runs ``implementation`` itself, under an ``autograd.Function`` of the same
    ``setup_context`` and ``backward``: the dispatcher and the registered autograd formula, in Python both, cost several
    times as much as that, at every call.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if autocast_on(device):
            with torch.autocast(device, enabled=False):
                return implementation(*args)
        return implementation(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"difffit_fast::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.difffit_fast, name).default
    if backward is None:
        direct = run
    else:
        torch.library.register_autograd(f"difffit_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
        direct = _function(name, run, setup_context, backward).apply

    @functools.wraps(implementation)
    def call(*args: Any) -> Any:
        return overload(*args) if torch.compiler.is_compiling() or _watched(args) else direct(*args)

    return call


def _function(name: str, run: Callable, setup_context: Callable, backward: Callable) -> type[torch.autograd.Function]:
    """The same autograd as the registered one. (``setup_context`` as a method of its own would have PyTorch inspect the
    signature of ``forward`` at every call.)"""

    def forward(ctx: Any, *args: Any) -> Any:
        out = run(*args)
        setup_context(ctx, args, out)
        return out

    methods = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), methods)


def _watched(args: tuple[Any, ...]) -> bool:
    """Whether a dispatch mode, a functorch transform or a tensor subclass must see the operation as such."""
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(
        isinstance(t, torch.Tensor) and type(t) not in PLAIN
        for a in args
        for t in (a if isinstance(a, (list, tuple)) else (a,))
    )


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums: float32, or float64 for float64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_frozen(ctx: Any, index: int, name: str) -> None:
    """Refuse a weight that wants a gradient: these operations never compute one."""
    if ctx.needs_input_grad[index]:
        raise frozen_weight_error(name)


def frozen_weight_error(name: str) -> RuntimeError:
    return RuntimeError(
        f"{name} is frozen in DiffFit and gets no gradient, but its requires_grad is True; "
        f"set requires_grad_(False), or train it with the plain DiT"
    )

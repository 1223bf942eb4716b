"""One way to register an operation with ``torch.library``: schema, implementation, fake, autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("difffit_fast", "DEF")


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define ``difffit_fast::<schema>`` and return the callable.

    ``implementation`` is one Python function for all devices: it picks the kernels by the tensors it gets
    (:mod:`.dispatch`). Autocast is off inside it: the caller has decided the dtypes.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return implementation(*args)
        return implementation(*args)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"difffit_fast::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"difffit_fast::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.difffit_fast, name).default


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

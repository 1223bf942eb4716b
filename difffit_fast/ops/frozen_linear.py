"""frozen_linear: y = x·Wᵀ + b with a frozen W. The weight gradient is never computed and the input is never saved.

dx = dy·W,   db = Σ dy over all rows (float32, fixed order)

With DiffFit's γ behind it, y = γ·z, z = x·Wᵀ + b. Saved: z. One pass over dy and z, the one that ends a branch
(:mod:`.residual`), gives dz = γ·dy, dγ = Σ dy·z and s = Σ dy; then db = γ·s and dx = dz·W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import check_frozen, register, rows, wide
from .colsum import colsum
from .dispatch import pick
from .gemm import check_operands, dgrad, linear
from .residual import residual_backward


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_operands("frozen_linear", x, weight)
    return linear(rows(x), weight, bias).view(*x.shape[:-1], weight.shape[0])


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_operands("frozen_linear", x, weight)
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _backward(dy: Tensor, weight: Tensor, need_dx: bool, need_db: bool) -> tuple[Tensor, Tensor]:
    k = weight.shape[1]
    dy2 = rows(dy).contiguous()
    dx = dgrad(dy2, weight).view(*dy.shape[:-1], k) if need_dx else dy.new_empty(0)
    db = colsum(dy2) if need_db else dy.new_empty(0, dtype=wide(dy.dtype))
    return dx, db


def _backward_fake(dy: Tensor, weight: Tensor, need_dx: bool, need_db: bool) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    dx = dy.new_empty(*dy.shape[:-1], k) if need_dx else dy.new_empty(0)
    return dx, dy.new_empty(n if need_db else 0, dtype=wide(dy.dtype))


backward_op = register(
    "frozen_linear_backward(Tensor dy, Tensor weight, bool need_dx, bool need_db) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weight, bias = inputs
    check_frozen(ctx, 1, "the weight of a linear layer")
    ctx.bias_dtype = None if bias is None else bias.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(weight)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    need_dx, _, need_db = ctx.needs_input_grad
    dx, db = backward_op(dy, ctx.saved_tensors[0], need_dx, need_db)
    return dx if need_dx else None, None, db.to(ctx.bias_dtype) if need_db else None


_frozen_linear = register(
    "frozen_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)


# -- with γ --------------------------------------------------------------------------------------------------------
def _check_gamma(weight: Tensor, gamma: Tensor) -> None:
    if gamma.shape != weight.shape[:1]:
        raise ValueError(
            f"frozen_linear: gamma must be one factor for each of {weight.shape[0]} outputs; got {tuple(gamma.shape)}"
        )


def _scaled_forward(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor) -> tuple[Tensor, Tensor]:
    check_operands("frozen_linear", x, weight)
    _check_gamma(weight, gamma)
    z = linear(rows(x), weight, bias)
    return (z * gamma).to(x.dtype).view(*x.shape[:-1], weight.shape[0]), z


def _scaled_forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor) -> tuple[Tensor, Tensor]:
    check_operands("frozen_linear", x, weight)
    _check_gamma(weight, gamma)
    m = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(m, weight.shape[0])


def _scaled_backward(
    dy: Tensor, weight: Tensor, z: Tensor, gamma: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    gamma = gamma.to(wide(dy.dtype)).contiguous()
    dz, dgamma, total = pick("residual", residual_backward, dy, z.dtype)(
        rows(dy).contiguous()[None], z[None], gamma[None]
    )
    dx = dgrad(dz[0], weight).view(*dy.shape[:-1], weight.shape[1]) if need_dx else dy.new_empty(0)
    return dx, dgamma[0], gamma * total[0]


def _scaled_backward_fake(
    dy: Tensor, weight: Tensor, z: Tensor, gamma: Tensor, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if need_dx else dy.new_empty(0)
    sums = gamma.new_empty(gamma.shape, dtype=wide(dy.dtype))
    return dx, sums, torch.empty_like(sums)


scaled_backward_op = register(
    "frozen_linear_scaled_backward(Tensor dy, Tensor weight, Tensor z, Tensor gamma, bool need_dx)"
    " -> (Tensor, Tensor, Tensor)",
    _scaled_backward,
    _scaled_backward_fake,
)


def _scaled_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, weight, bias, gamma = inputs
    check_frozen(ctx, 1, "the weight of a linear layer")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.dtypes = None if bias is None else bias.dtype, gamma.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(weight, output[1], gamma)


def _scaled_autograd(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    if dy is None:
        return None, None, None, None
    need_dx, _, need_db, need_dgamma = ctx.needs_input_grad
    dx, dgamma, db = scaled_backward_op(dy, *ctx.saved_tensors, need_dx)
    return (
        dx if need_dx else None,
        None,
        db.to(ctx.dtypes[0]) if need_db else None,
        dgamma.to(ctx.dtypes[1]) if need_dgamma else None,
    )


_frozen_linear_scaled = register(
    "frozen_linear_scaled(Tensor x, Tensor weight, Tensor? bias, Tensor gamma) -> (Tensor, Tensor)",
    _scaled_forward,
    _scaled_forward_fake,
    setup_context=_scaled_setup,
    backward=_scaled_autograd,
)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None) -> Tensor:
    """γ·(x·weightᵀ + bias) with a frozen weight.

    Args:
        x: (..., K), the compute dtype.
        weight: frozen, (N, K), the dtype of ``x``; asking for its gradient is an error.
        bias: (N,), usually float32, or None.
        gamma: (N,), usually float32, or None for 1.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    return _frozen_linear(x, weight, bias) if gamma is None else _frozen_linear_scaled(x, weight, bias, gamma)[0]

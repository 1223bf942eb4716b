"""frozen_linear: y = x·Wᵀ + b with a frozen W. The weight gradient is never computed and the input is never saved.

dx = dy·W,   db = Σ dy over all rows (float32, fixed order)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._register import check_frozen, register, rows, wide
from .colsum import colsum
from .gemm import check_operands, dgrad, linear


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


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias with a frozen weight.

    Args:
        x: (..., K), the compute dtype.
        weight: frozen, (N, K), the dtype of ``x``; asking for its gradient is an error.
        bias: (N,), usually float32, or None.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    return _frozen_linear(x, weight, bias)

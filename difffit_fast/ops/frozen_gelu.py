"""frozen_gelu: g = gelu(x·Wᵀ + b) with a frozen W and the tanh GELU: the first half of an MLP whose second is elsewhere.

    du = dg·gelu′(u),   db = Σ du,   dx = du·W

Saved: the pre-activation u. One pass over dg and u gives du and its sum: the kernel of :mod:`.frozen_mlp`, in C++ and
Triton. The forward pass makes its product and GELU with PyTorch, so that a model which takes this operation in computes
what it did, bit for bit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ._register import check_frozen, register, rows, wide
from .dispatch import pick
from .frozen_mlp import gelu_backward
from .gemm import check_operands, dgrad, linear


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    check_operands("frozen_gelu", x, weight)
    u = linear(rows(x), weight, bias)
    return F.gelu(u, approximate="tanh").view(*x.shape[:-1], weight.shape[0]), u


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    check_operands("frozen_gelu", x, weight)
    m = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(m, weight.shape[0])


def _backward(dg: Tensor, weight: Tensor, u: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    du, db = pick("frozen_mlp", gelu_backward, u)(rows(dg).contiguous(), u)
    dx = dgrad(du, weight).view(*dg.shape[:-1], weight.shape[1]) if need_dx else dg.new_empty(0)
    return dx, db


def _backward_fake(dg: Tensor, weight: Tensor, u: Tensor, need_dx: bool) -> tuple[Tensor, Tensor]:
    dx = dg.new_empty(*dg.shape[:-1], weight.shape[1]) if need_dx else dg.new_empty(0)
    return dx, dg.new_empty(weight.shape[0], dtype=wide(dg.dtype))


backward_op = register(
    "frozen_gelu_backward(Tensor dg, Tensor weight, Tensor u, bool need_dx) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, weight, bias = inputs
    check_frozen(ctx, 1, "the weight of a linear layer")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(weight, output[1])


def _autograd(ctx: Any, dg: Tensor | None, _: Any) -> tuple:
    if dg is None:
        return None, None, None
    need_dx, _, need_db = ctx.needs_input_grad
    dx, db = backward_op(dg, *ctx.saved_tensors, need_dx)
    return dx if need_dx else None, None, db.to(ctx.bias_dtype) if need_db else None


_frozen_gelu = register(
    "frozen_gelu(Tensor x, Tensor weight, Tensor? bias) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)


def frozen_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """gelu_tanh(x·weightᵀ + bias) with a frozen weight.

    Args:
        x: (..., K), the compute dtype.
        weight: frozen, (N, K), the dtype of ``x``; asking for its gradient is an error.
        bias: (N,), usually float32, or None.

    Returns:
        (..., N) in the dtype of ``x``.
    """
    return _frozen_gelu(x, weight, bias)[0]

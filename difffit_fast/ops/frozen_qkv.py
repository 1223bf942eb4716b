"""frozen_qkv: the projection to queries, keys and values, whose backward needs the fewest column sums.

    q = γ_q·(W_q h + b_q),   k = γ_k·W_k h,   v = γ_v·W_v h

Softmax does not see a constant key bias, and a constant value bias leaves the attention as it came (rows of the
probabilities sum to one): b_k is left out, its gradient is exactly 0, and γ_v·b_v moves behind the attention into the bias
of proj. So of dqkv only the query third is summed. Σ dq·q = Σ dk·k per channel (both are the diagonal of qᵀ·dS·k), so one
reduction serves γ_q and γ_k. Saved: nothing without γ; with γ the output, which attention keeps anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ext
from ._register import check_frozen, register, wide
from .dispatch import pick
from .gemm import check_operands, dgrad, linear


# -- the plain reference -------------------------------------------------------------------------------------------
def qkv_scale(qkv: Tensor, gamma: Tensor, bias_q: Tensor) -> None:
    out = qkv.to(wide(qkv.dtype))
    out[:, : bias_q.shape[0]] += bias_q
    qkv.copy_(out * gamma)


def qkv_backward(dqkv: Tensor, qkv: Tensor | None, gamma: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    w, d = wide(dqkv.dtype), dqkv.shape[1] // 3
    sum_dq = dqkv[:, :d].to(w).sum(0)
    if gamma is None or qkv is None:
        return dqkv, sum_dq, dqkv.new_empty(0, dtype=w)
    dz = (dqkv.to(w) * gamma).to(dqkv.dtype)
    dq_q = (dqkv[:, :d].to(w) * qkv[:, :d].to(w)).sum(0)
    dv_v = (dqkv[:, 2 * d :].to(w) * qkv[:, 2 * d :].to(w)).sum(0)
    return dz, gamma[:d] * sum_dq, torch.cat([dq_q, dq_q, dv_v]) / gamma


# -- registration --------------------------------------------------------------------------------------------------
def _safe(gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """γ kept away from 0 by an invisible amount, so that the output divided by γ still tells the unscaled value."""
    tiny = 1e-4 if dtype == torch.float16 else 1e-20
    return torch.where(gamma.abs() < tiny, torch.copysign(torch.full_like(gamma, tiny), gamma), gamma)


def _forward(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None) -> Tensor:
    check_operands("frozen_qkv", h, weight)
    d = bias_q.shape[0]
    if weight.shape[0] != 3 * d:
        raise ValueError(f"frozen_qkv: weight must have 3·{d} rows for a query bias of {d}; got {tuple(weight.shape)}")
    h2 = h.reshape(-1, h.shape[-1])
    if gamma is None:
        bias = torch.cat([bias_q.to(h.dtype), bias_q.new_zeros(2 * d, dtype=h.dtype)])
        qkv = linear(h2, weight, bias)
    else:
        qkv = linear(h2, weight)
        w = wide(h.dtype)
        pick("frozen_qkv", qkv_scale, qkv)(qkv, _safe(gamma.to(w), h.dtype).contiguous(), bias_q.to(w).contiguous())
    return qkv.view(*h.shape[:-1], 3 * d)


def _forward_fake(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None) -> Tensor:
    check_operands("frozen_qkv", h, weight)
    return h.new_empty(*h.shape[:-1], weight.shape[0])


def _backward(
    dqkv: Tensor, weight: Tensor, qkv: Tensor | None, gamma: Tensor | None, need_dh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, w = weight.shape[0], wide(dqkv.dtype)
    d2 = dqkv.reshape(-1, n).contiguous()
    qkv2 = None if qkv is None else qkv.reshape(-1, n).contiguous()
    safe = None if gamma is None else _safe(gamma.to(w), dqkv.dtype).contiguous()
    dz, dbias_q, dgamma = pick("frozen_qkv", qkv_backward, d2)(d2, qkv2, safe)
    dh = dgrad(dz, weight).view(*dqkv.shape[:-1], weight.shape[1]) if need_dh else dqkv.new_empty(0)
    return dh, dbias_q, dgamma


def _backward_fake(
    dqkv: Tensor, weight: Tensor, qkv: Tensor | None, gamma: Tensor | None, need_dh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, k = weight.shape
    w = wide(dqkv.dtype)
    dh = dqkv.new_empty(*dqkv.shape[:-1], k) if need_dh else dqkv.new_empty(0)
    return dh, dqkv.new_empty(n // 3, dtype=w), dqkv.new_empty(0 if gamma is None else n, dtype=w)


backward_op = register(
    "frozen_qkv_backward(Tensor dqkv, Tensor weight, Tensor? qkv, Tensor? gamma, bool need_dh)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, weight, bias_q, gamma = inputs
    check_frozen(ctx, 1, "the weight of qkv")
    ctx.dtypes = bias_q.dtype, None if gamma is None else gamma.dtype
    ctx.with_gamma = gamma is not None
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(weight, *((output, gamma) if gamma is not None else ()))


def _autograd(ctx: Any, dqkv: Tensor) -> tuple:
    need = ctx.needs_input_grad
    weight, *rest = ctx.saved_tensors
    qkv, gamma = rest if ctx.with_gamma else (None, None)
    dh, dbias_q, dgamma = backward_op(dqkv, weight, qkv, gamma, need[0])
    return (
        dh if need[0] else None,
        None,
        dbias_q.to(ctx.dtypes[0]) if need[2] else None,
        dgamma.to(ctx.dtypes[1]) if need[3] else None,
    )


_frozen_qkv = register(
    "frozen_qkv(Tensor h, Tensor weight, Tensor bias_q, Tensor? gamma) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_ext.register_operation("frozen_qkv")


def frozen_qkv(h: Tensor, weight: Tensor, bias_q: Tensor, gamma: Tensor | None = None) -> Tensor:
    """Queries, keys and values in one product with a frozen weight.

    Args:
        h: (B, T, D), the compute dtype.
        weight: frozen, (3D, D), the dtype of ``h``; its gradient is never computed and asking for it is an error.
        bias_q: query bias, (D,).
        gamma: DiffFit's scale on the projection, (3D,), or None.

    Returns:
        (B, T, 3D): q, k, v side by side, each head-major.
    """
    return _frozen_qkv(h, weight, bias_q, gamma)

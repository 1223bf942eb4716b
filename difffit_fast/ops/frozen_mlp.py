"""frozen_mlp: branch = W₂·gelu(W₁ h + b₁) with frozen W₁, W₂ and the tanh GELU. Saved: the pre-activation u, nothing else.

    dg = dbranch·W₂,   du = dg·gelu′(u),   db₁ = Σ du,   dh = du·W₁

Where each sample of a batch has a b₁ of its own, (B, F), the u that is saved is the bare product W₁ h: GELU and its backward
add the sample's bias to it on the way, in float32, and db₁ (B, F) is the sum over the tokens of each sample.

The second bias is not here: it enters with the residual (see :mod:`.residual`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _ext
from ._register import check_frozen, register, rows, wide
from .dispatch import cpp_ops, pick
from .eight_bit import Rows, quantize_fp8, takes_rows
from .gemm import check_operands, dgrad, linear
from .linear_gelu import dgelu_dgrad, linear_gelu
from .pieces import in_pieces

_K = math.sqrt(2 / math.pi)


# -- the plain reference -------------------------------------------------------------------------------------------
# ``bias``: None, or (B, F) where each sample has its own, which u (B·T, F) is then without; wide and contiguous.
def gelu_forward(u: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(_biased(u, bias), approximate="tanh").to(u.dtype)


def gelu_backward(dg: Tensor, u: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    du, db = _gelu_backward(dg, u, bias)
    return du.to(u.dtype), db


def _gelu_backward(dg: Tensor, u: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    w = _biased(u, bias)
    t = torch.tanh(_K * (w + 0.044715 * w**3))
    slope = 0.5 * (1 + t) + 0.5 * w * (1 - t * t) * _K * (1 + 3 * 0.044715 * w * w)
    du = dg.to(w.dtype) * slope
    return du, du.sum(0) if bias is None else _by_sample(du, bias).sum(1)


def gelu_forward_fp8(u: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """:func:`gelu_forward` as e4m3, quantised before any other rounding, and a scale for each row (plain PyTorch and Triton)."""
    return quantize_fp8(F.gelu(_biased(u, bias), approximate="tanh"), False)


def gelu_backward_fp8(dg: Tensor, u: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`gelu_backward` with du likewise: its values, their scales, and db of what is not rounded."""
    du, db = _gelu_backward(dg, u, bias)
    return *quantize_fp8(du, False), db


def _biased(u: Tensor, bias: Tensor | None) -> Tensor:
    w = u.to(wide(u.dtype))
    return w if bias is None else (_by_sample(w, bias) + bias[:, None]).view(u.shape)


def _by_sample(rows: Tensor, bias: Tensor) -> Tensor:
    samples = bias.shape[0]
    return rows.view(samples, rows.shape[0] // samples if samples else 0, rows.shape[1])


# -- registration --------------------------------------------------------------------------------------------------
def check_bias(op: str, h: Tensor, w1: Tensor, b1: Tensor) -> None:
    """Refuse a bias of fc1 that is neither (F,) nor, of h (B, ..., D), (B, F)."""
    features = w1.shape[0]
    if b1.shape != (features,) and (h.dim() < 2 or b1.shape != (h.shape[0], features)):
        each = f" or ({h.shape[0]}, {features})" if h.dim() > 1 else ""
        raise ValueError(f"{op}: fc1's bias must be ({features},){each}; got {tuple(b1.shape)}")


def _check(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
    check_operands("frozen_mlp (fc1)", h, w1)
    if w2.dim() != 2 or w2.shape[1] != w1.shape[0] or w2.dtype != w1.dtype:
        raise ValueError(
            f"frozen_mlp: fc2's weight must be (out, {w1.shape[0]}) in {w1.dtype}; got {tuple(w2.shape)} in {w2.dtype}"
        )
    check_bias("frozen_mlp", h, w1, b1)


def forward(h: Tensor | Rows, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    """branch (M, D) and u (M, F) of a matrix h (M, D): u = h·w1ᵀ + b1 with b1 (F,), u = h·w1ᵀ where each sample has its own b1
    (B, F), of M / B rows."""
    if isinstance(h, Tensor) and in_pieces(h, w1, w2):
        return cpp_ops().mlp_forward(h.contiguous(), w1.contiguous(), b1.float().contiguous(), w2.contiguous())
    each, fp8 = b1.dim() == 2, takes_rows(w2, h, False)
    if isinstance(h, Tensor) and h.device.type == "cuda" and not (each or fp8):
        g, u = linear_gelu(h, w1, b1, pick("frozen_mlp", gelu_forward, h))  # in one cuBLASLt call where that is faster
        return linear(g, w2), u
    u = linear(h, w1, None if each else b1)  # no epilogue adds what each sample has
    own = (_wide(u, b1),) if each else ()
    if fp8:
        return linear(Rows(*pick("frozen_mlp", gelu_forward_fp8, u)(u, *own), u.dtype), w2), u
    return linear(pick("frozen_mlp", gelu_forward, u)(u, *own), w2), u


def _wide(like: Tensor, bias: Tensor) -> Tensor:
    return bias.to(wide(like.dtype)).contiguous()


def backward(
    dbranch: Tensor | Rows, w1: Tensor, w2: Tensor, u: Tensor, need_dh: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """dh (M, D), empty where it is not needed, and db1, float32, from the gradient of the branch, (M, D).

    ``bias``: the b1 (B, F) that :func:`forward` was given and u is without, for a db1 (B, F); None for one (F,).
    """
    bias = None if bias is None else _wide(u, bias)
    own = () if bias is None else (bias,)
    if isinstance(dbranch, Tensor) and in_pieces(dbranch, w1, w2):
        dh, db1 = cpp_ops().mlp_backward(dbranch.contiguous(), w1.contiguous(), w2.contiguous(), u, need_dh, bias)
        return (dh if need_dh else dbranch.new_empty(0)), db1
    if need_dh and takes_rows(w1, u, True):
        *rows, db1 = pick("frozen_mlp", gelu_backward_fp8, u)(dgrad(dbranch, w2), u, *own)
        return dgrad(Rows(*rows, u.dtype), w1), db1
    gelu = pick("frozen_mlp", gelu_backward, u)
    if isinstance(dbranch, Tensor) and u.device.type == "cuda" and not own:
        du, db1 = dgelu_dgrad(dbranch, w2, u, gelu)
    else:
        du, db1 = gelu(dgrad(dbranch, w2), u, *own)
    return (dgrad(du, w1) if need_dh else u.new_empty(0)), db1


def _forward(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    _check(h, w1, b1, w2)
    branch, u = forward(rows(h), w1, b1, w2)
    return branch.view(*h.shape[:-1], w2.shape[0]), u


def _forward_fake(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    _check(h, w1, b1, w2)
    rows = h.numel() // h.shape[-1] if h.shape[-1] else 0
    return h.new_empty(*h.shape[:-1], w2.shape[0]), h.new_empty(rows, w1.shape[0])


def _backward(
    dbranch: Tensor, w1: Tensor, w2: Tensor, u: Tensor, need_dh: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dbranch2 = rows(dbranch).contiguous()
    dh, db1 = backward(dbranch2, w1, w2, u, need_dh, bias)
    return (dh.view(*dbranch.shape[:-1], w1.shape[1]) if need_dh else dh), db1


def _backward_fake(
    dbranch: Tensor, w1: Tensor, w2: Tensor, u: Tensor, need_dh: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    dh = dbranch.new_empty(*dbranch.shape[:-1], w1.shape[1]) if need_dh else dbranch.new_empty(0)
    return dh, dbranch.new_empty(w1.shape[:1] if bias is None else bias.shape, dtype=wide(dbranch.dtype))


backward_op = register(
    "frozen_mlp_backward(Tensor dbranch, Tensor w1, Tensor w2, Tensor u, bool need_dh, Tensor? bias=None) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, w1, b1, w2 = inputs
    check_frozen(ctx, 1, "the weight of fc1")
    check_frozen(ctx, 3, "the weight of fc2")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = b1.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(w1, w2, output[1], *([b1] if b1.dim() == 2 else []))


def _autograd(ctx: Any, dbranch: Tensor | None, _: Any) -> tuple:
    if dbranch is None:
        return None, None, None, None
    need_dh, _, need_db, _ = ctx.needs_input_grad
    w1, w2, u, *own = ctx.saved_tensors
    dh, db1 = backward_op(dbranch, w1, w2, u, need_dh, *own)
    return dh if need_dh else None, None, db1.to(ctx.bias_dtype) if need_db else None, None


_frozen_mlp = register(
    "frozen_mlp(Tensor h, Tensor w1, Tensor b1, Tensor w2) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_ext.register_operation("frozen_mlp")


def frozen_mlp(h: Tensor, w1: Tensor, b1: Tensor, w2: Tensor) -> Tensor:
    """fc2(gelu_tanh(fc1(h))) without fc2's bias, both weights frozen.

    Args:
        h: (..., D), the compute dtype; (B, ..., D) where each sample has its own bias.
        w1, w2: frozen weights of fc1 (F, D) and fc2 (D, F), the dtype of ``h``; asking for their gradient is an error.
        b1: bias of fc1, usually float32: (F,), or (B, F), one for each sample. Only the latter is added in float32, to the
            product as it is stored: in half precision (1, F) and (F,) differ by a rounding.

    Returns:
        (..., D) in the dtype of ``h``.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: a weight that wants a gradient.
    """
    return _frozen_mlp(h, w1, b1, w2)[0]

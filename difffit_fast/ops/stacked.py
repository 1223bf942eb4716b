"""stacked: many frozen weights of one width in one product, read as they lie, side by side (:mod:`.weights`).

    stacked_linear    y = [x·W₀ᵀ | x·W₁ᵀ | …]     one x for all;      dx = Σ_i dy_i·W_i
    stacked_matvec    y_i = W_i·v_i               v of its own each;  dv_i = W_iᵀ·dy_i

Weights that do not lie side by side (one was replaced, or came from elsewhere) give the same by one product each. Weights
of another dtype than x or v, as under autocast, are cast to it, once for both ways. Their gradient is never computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._register import frozen_weight_error, register, wide
from .gemm import dgrad, linear, widen
from .weights import together


def _operand(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The weights as one tensor (Σ N_i, K) in ``dtype``, None where they lie apart; and the copy that was made for it, or an
    empty tensor."""
    whole = weights[0] if len(weights) == 1 else together(weights)
    none = weights[0].new_empty(0, dtype=dtype)
    if all(w.dtype == dtype for w in weights):
        return whole, none
    copy = torch.cat([w.to(dtype) for w in weights]) if whole is None else whole.to(dtype)
    return copy, copy


def _check(name: str, x: Tensor, weights: Sequence[Tensor], dims: tuple[int, ...] = (2,)) -> None:
    if x.dim() not in dims or not weights or any(w.dim() != 2 or w.shape[1] != x.shape[-1] for w in weights):
        raise ValueError(
            f"{name}: the weights must be (out, in) with in = {x.shape[-1]}, the last size of the input {tuple(x.shape)}; "
            f"got {', '.join(str(tuple(w.shape)) for w in weights) or 'none'}"
        )


def _check_frozen(weights: Sequence[Tensor]) -> None:
    if any(w.requires_grad for w in weights):
        raise frozen_weight_error("one of the stacked weights")


# -- stacked_linear ------------------------------------------------------------------------------------------------
def _linear_forward(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check("stacked_linear", x, weights)
    whole, copy = _operand(weights, x.dtype)
    return (torch.cat([linear(x, w) for w in weights], 1) if whole is None else linear(x, whole)), copy


def _linear_forward_fake(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check("stacked_linear", x, weights)
    rows = sum(w.shape[0] for w in weights)
    same = all(w.dtype == x.dtype for w in weights)
    return x.new_empty(x.shape[0], rows), x.new_empty(0 if same else (rows, x.shape[1]))


def _linear_backward(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    whole, _ = _operand(weights, dy.dtype)
    if whole is not None:
        return dgrad(dy.contiguous(), whole)
    parts = dy.split([w.shape[0] for w in weights], 1)
    return sum(dgrad(d, w).to(wide(dy.dtype)) for d, w in zip(parts, weights, strict=True)).to(dy.dtype)


linear_backward_op = register(
    "stacked_linear_backward(Tensor dy, Tensor[] weights) -> Tensor",
    _linear_backward,
    lambda dy, weights: dy.new_empty(dy.shape[0], weights[0].shape[1]),
)


def _save(ctx: Any, weights: Sequence[Tensor], copy: Tensor) -> None:
    _check_frozen(weights)
    ctx.mark_non_differentiable(copy)
    ctx.set_materialize_grads(False)
    if ctx.needs_input_grad[0]:
        ctx.save_for_backward(*([copy] if copy.numel() else weights))


def _no_gradient(ctx: Any) -> Any:
    """For the weights: one None for each where PyTorch has taken the list apart, as for a registered operation."""
    return [None] * len(ctx.needs_input_grad[1]) if isinstance(ctx.needs_input_grad[1], list) else None


def _linear_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _save(ctx, inputs[1], output[1])


def _linear_autograd(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    return (None if dy is None else linear_backward_op(dy, list(ctx.saved_tensors))), _no_gradient(ctx)


_stacked_linear = register(
    "stacked_linear(Tensor x, Tensor[] weights) -> (Tensor, Tensor)",
    _linear_forward,
    _linear_forward_fake,
    setup_context=_linear_setup,
    backward=_linear_autograd,
)


def stacked_linear(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """x times each weight transposed, side by side.

    Args:
        x: (M, K), the compute dtype.
        weights: frozen, (N_i, K), of any floating dtype; asking for their gradient is an error.

    Returns:
        (M, Σ N_i) in the dtype of ``x``.
    """
    return _stacked_linear(x, list(weights))[0]


# -- stacked_matvec ------------------------------------------------------------------------------------------------
def _products(v: Tensor, weights: Sequence[Tensor], whole: Tensor | None, rows: int, transposed: bool) -> Tensor:
    """v_i times weight i, or its transpose: (L, ..., N) or (L, ..., K) of v (L, ..., K) or (L, ..., N); ``rows`` is N."""
    narrow = v.dtype
    if widen(v):
        v, whole = v.float(), None if whole is None else whole.float()
    columns = v[:, :, None] if v.dim() == 2 else v.transpose(1, 2)
    if whole is None:
        each = (w.to(v.dtype) for w in weights)
        out = torch.stack([(w.t() if transposed else w) @ x for w, x in zip(each, columns, strict=True)])
    else:
        batch = whole.view(v.shape[0], rows, whole.shape[1])
        out = torch.bmm(batch.transpose(1, 2) if transposed else batch, columns)
    return (out[:, :, 0] if v.dim() == 2 else out.transpose(1, 2).contiguous()).to(narrow)


def _matvec_forward(v: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check_matvec(v, weights)
    whole, copy = _operand(weights, v.dtype)
    return _products(v, weights, whole, weights[0].shape[0], False), copy


def _matvec_forward_fake(v: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _check_matvec(v, weights)
    same = all(w.dtype == v.dtype for w in weights)
    rows, width = weights[0].shape
    return v.new_empty(*v.shape[:-1], rows), v.new_empty(0 if same else (v.shape[0] * rows, width))


def _check_matvec(v: Tensor, weights: Sequence[Tensor]) -> None:
    _check("stacked_matvec", v, weights, (2, 3))
    if len(weights) != v.shape[0] or any(w.shape != weights[0].shape for w in weights):
        raise ValueError(
            f"stacked_matvec: one weight of one size for each of {v.shape[0]} vectors is needed; got "
            + ", ".join(str(tuple(w.shape)) for w in weights)
        )


def _matvec_backward(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    whole, _ = _operand(weights, dy.dtype)
    return _products(dy, weights, whole, dy.shape[-1], True)


matvec_backward_op = register(
    "stacked_matvec_backward(Tensor dy, Tensor[] weights) -> Tensor",
    _matvec_backward,
    lambda dy, weights: dy.new_empty(*dy.shape[:-1], weights[0].shape[1]),
)


def _matvec_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _save(ctx, inputs[1], output[1])


def _matvec_autograd(ctx: Any, dy: Tensor | None, _: Any) -> tuple:
    return (None if dy is None else matvec_backward_op(dy, list(ctx.saved_tensors))), _no_gradient(ctx)


_stacked_matvec = register(
    "stacked_matvec(Tensor v, Tensor[] weights) -> (Tensor, Tensor)",
    _matvec_forward,
    _matvec_forward_fake,
    setup_context=_matvec_setup,
    backward=_matvec_autograd,
)


def stacked_matvec(v: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Each weight times a vector of its own, or several.

    Args:
        v: (L, K), or (L, M, K) for M vectors each, the compute dtype.
        weights: L frozen ones, (N, K), of any floating dtype; asking for their gradient is an error.

    Returns:
        (L, N), or (L, M, N), in the dtype of ``v``.
    """
    return _stacked_matvec(v, list(weights))[0]

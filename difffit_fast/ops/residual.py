"""residual: the end of a branch; residual_adaln: the end of one branch and the start of the next in one pass.

    y = x + s·f + r,                 s = gate·γ, r = s·bias, one vector per sample
    h = ŷ·a + c,                     ŷ = LayerNorm(y) without parameters

The branch's last linear has no bias: its bias enters as r = s·b, so that Σ_t dy, which falls out of the same pass, is
all that the bias gradient needs, and autograd on [B, D] vectors does the rest (dgate, every dγ, dbias).
Saved: f, s and, for residual_adaln, y, mean, rstd, a. The residual stream is read and written once per branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import register, wide
from .adaln import _check, adaln_forward, layer_norm_backward
from .dispatch import pick


# -- the plain reference -------------------------------------------------------------------------------------------
def residual_forward(x: Tensor, f: Tensor, s: Tensor, r: Tensor) -> Tensor:
    w = wide(x.dtype)
    return (x.to(w) + s[:, None] * f.to(w) + r[:, None]).to(x.dtype)


def residual_backward(dy: Tensor, f: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.to(wide(dy.dtype))
    return (dy * s[:, None]).to(f.dtype), (dy * f.to(dy.dtype)).sum(1), dy.sum(1)


def residual_adaln_forward(
    x: Tensor, f: Tensor, s: Tensor, r: Tensor, a: Tensor, c: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = residual_forward(x, f, s, r)
    return (y, *adaln_forward(y, a, c, eps, f.dtype))


def residual_adaln_backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, f: Tensor, s: Tensor, a: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = wide(y.dtype)
    dh = dh.to(w)
    yhat = (y.to(w) - mean[..., None]) * rstd[..., None]
    g = layer_norm_backward(dh * a[:, None], yhat, rstd)
    if dy is not None:
        g = g + dy.to(w)
    df = (g * s[:, None]).to(f.dtype)
    return g.to(y.dtype), df, (g * f.to(w)).sum(1), g.sum(1), (dh * yhat).sum(1), dh.sum(1)


# -- residual ------------------------------------------------------------------------------------------------------
def _vectors(x: Tensor, *vectors: Tensor) -> list[Tensor]:
    return [v.to(wide(x.dtype)).contiguous() for v in vectors]


def _check_branch(name: str, x: Tensor, f: Tensor, vectors: dict[str, Tensor]) -> None:
    _check(name, x, vectors)
    if f.shape != x.shape:
        raise ValueError(f"{name}: the branch f must have the shape of x, {tuple(x.shape)}; got {tuple(f.shape)}")


def _forward(x: Tensor, f: Tensor, s: Tensor, r: Tensor) -> Tensor:
    _check_branch("residual", x, f, {"s": s, "r": r})
    return pick("residual", residual_forward, x)(x.contiguous(), f.contiguous(), *_vectors(x, s, r))


def _forward_fake(x: Tensor, f: Tensor, s: Tensor, r: Tensor) -> Tensor:
    _check_branch("residual", x, f, {"s": s, "r": r})
    return x.new_empty(x.shape)


def _backward(dy: Tensor, f: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pick("residual", residual_backward, dy)(dy.contiguous(), f.contiguous(), *_vectors(dy, s))


def _backward_fake(dy: Tensor, f: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ds = s.new_empty(s.shape, dtype=wide(dy.dtype))
    return f.new_empty(f.shape), ds, torch.empty_like(ds)


residual_backward_op = register(
    "residual_backward(Tensor dy, Tensor f, Tensor s) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, f, s, r = inputs
    ctx.dtypes = s.dtype, r.dtype
    if any(ctx.needs_input_grad[1:]):
        ctx.save_for_backward(f, s)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    need = ctx.needs_input_grad
    if not any(need[1:]):
        return dy, None, None, None
    df, ds, dr = residual_backward_op(dy, *ctx.saved_tensors)
    return (
        dy if need[0] else None,
        df if need[1] else None,
        ds.to(ctx.dtypes[0]) if need[2] else None,
        dr.to(ctx.dtypes[1]) if need[3] else None,
    )


_residual = register(
    "residual(Tensor x, Tensor f, Tensor s, Tensor r) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)


def residual(x: Tensor, f: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """y = x + s·f + r.

    Args:
        x: residual stream, (B, T, D).
        f: output of the branch without its last bias, (B, T, D), the compute dtype.
        s, r: scale of the branch and its scaled bias, (B, D), float32.

    Returns:
        (B, T, D) in the dtype of ``x``.
    """
    return _residual(x, f, s, r)


# -- residual_adaln ------------------------------------------------------------------------------------------------
def _join_forward(
    x: Tensor, f: Tensor, s: Tensor, r: Tensor, a: Tensor, c: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_branch("residual_adaln", x, f, {"s": s, "r": r, "a": a, "c": c})
    x, f = x.contiguous(), f.contiguous()
    return pick("residual", residual_adaln_forward, x)(x, f, *_vectors(x, s, r, a, c), eps)


def _join_forward_fake(
    x: Tensor, f: Tensor, s: Tensor, r: Tensor, a: Tensor, c: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_branch("residual_adaln", x, f, {"s": s, "r": r, "a": a, "c": c})
    statistics = x.new_empty(x.shape[:2], dtype=wide(x.dtype))
    return x.new_empty(x.shape), f.new_empty(f.shape), statistics, torch.empty_like(statistics)


def _join_backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, f: Tensor, s: Tensor, a: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dy = None if dy is None else dy.contiguous()
    s, a = _vectors(y, s, a)
    return pick("residual", residual_adaln_backward, y)(dh.contiguous(), dy, y, f.contiguous(), s, a, mean, rstd)


def _join_backward_fake(
    dh: Tensor, dy: Tensor | None, y: Tensor, f: Tensor, s: Tensor, a: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = [s.new_empty(s.shape, dtype=wide(y.dtype)) for _ in range(4)]
    return y.new_empty(y.shape), f.new_empty(f.shape), sums[0], sums[1], sums[2], sums[3]


residual_adaln_backward_op = register(
    "residual_adaln_backward(Tensor dh, Tensor? dy, Tensor y, Tensor f, Tensor s, Tensor a, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _join_backward,
    _join_backward_fake,
)


def _join_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, f, s, r, a, c, _ = inputs
    y, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = s.dtype, r.dtype, a.dtype, c.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(y, f, s, a, mean, rstd)


def _join_autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple:
    need = ctx.needs_input_grad
    if dy is None and dh is None:
        return (None,) * 7
    y, f, s, a, mean, rstd = ctx.saved_tensors
    if dh is None:
        df, ds, dr = residual_backward_op(dy, f, s)
        dx, da, dc = dy, None, None
    else:
        dx, df, ds, dr, da, dc = residual_adaln_backward_op(dh, dy, y, f, s, a, mean, rstd)
    grads = [dx, df]
    grads += [None if g is None else g.to(d) for g, d in zip((ds, dr, da, dc), ctx.dtypes, strict=True)]
    return (*(g if n else None for g, n in zip(grads, need, strict=False)), None)


_residual_adaln = register(
    "residual_adaln(Tensor x, Tensor f, Tensor s, Tensor r, Tensor a, Tensor c, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _join_forward,
    _join_forward_fake,
    setup_context=_join_setup,
    backward=_join_autograd,
)


def residual_adaln(
    x: Tensor, f: Tensor, s: Tensor, r: Tensor, a: Tensor, c: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """y = x + s·f + r and h = LayerNorm(y)·a + c, in one pass.

    Args:
        x: residual stream, (B, T, D).
        f: output of the branch without its last bias, (B, T, D), the compute dtype.
        s, r: scale of the branch and its scaled bias, (B, D), float32.
        a, c: scale and shift of the next branch's LayerNorm, (B, D), float32.

    Returns:
        y (B, T, D) in the dtype of ``x`` and h (B, T, D) in the dtype of ``f``.
    """
    y, h, _, _ = _residual_adaln(x, f, s, r, a, c, eps)
    return y, h

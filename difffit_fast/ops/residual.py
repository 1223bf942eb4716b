"""residual: the end of a branch; residual_adaln: the end of one branch and the start of the next in one pass.

    y = x + gate·branch + bias       one gate and one bias per sample
    h = ŷ·scale + shift              ŷ = LayerNorm(y) without parameters; one scale and one shift per sample

``gate`` is the full factor on the branch, DiT's gate times every γ of the branch. The branch's last linear is computed
without its bias b: it enters as bias = gate·b, so that Σ_t dy, which falls out of the same pass, is all that the bias
gradient needs, and autograd on [B, D] vectors does the rest. ``scale`` is the full factor on ŷ (see :mod:`.adaln`).
Saved: branch, gate and, for residual_adaln, y, scale, mean, rstd. The residual stream is read and written once per branch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ext
from ._register import register, wide
from .adaln import adaln_forward, check_vectors, layer_norm_backward
from .dispatch import pick
from .eight_bit import quantize_fp8


# -- the plain reference -------------------------------------------------------------------------------------------
def residual_forward(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    w = wide(x.dtype)
    return (x.to(w) + gate[:, None] * branch.to(w) + bias[:, None]).to(x.dtype)


def residual_backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.to(wide(dy.dtype))
    return (dy * gate[:, None]).to(branch.dtype), (dy * branch.to(dy.dtype)).sum(1), dy.sum(1)


def residual_adaln_forward(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float, fp8: bool = False
) -> tuple[Tensor, ...]:
    """y, h, mean, rstd. ``fp8``: h as e4m3, and the scales of its rows behind the others (plain PyTorch and Triton have this)."""
    y = residual_forward(x, branch, gate, bias)
    h, mean, rstd = adaln_forward(y, scale, shift, eps, wide(y.dtype) if fp8 else branch.dtype)
    h, *h_scale = _quantized(h) if fp8 else (h,)
    return y, h, mean, rstd, *h_scale


def residual_adaln_backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor,
    fp8: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dx, dbranch and the sums. ``fp8``: dbranch as e4m3, and the scales of its rows behind the others."""
    w = wide(y.dtype)
    dh = dh.to(w)
    yhat = (y.to(w) - mean[..., None]) * rstd[..., None]
    g = layer_norm_backward(dh * scale[:, None], yhat, rstd)
    if dy is not None:
        g = g + dy.to(w)
    dbranch = g * gate[:, None]
    dbranch, *dbranch_scale = _quantized(dbranch) if fp8 else (dbranch.to(branch.dtype),)
    sums = [(g * branch.to(w)).sum(1), g.sum(1), (dh * yhat).sum(1), dh.sum(1)]
    return g.to(y.dtype), dbranch, torch.stack(sums), *dbranch_scale


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) as e4m3 and a scale for each row, (B, T)."""
    values, scale = quantize_fp8(x.flatten(0, 1), False)
    return values.view(x.shape), scale.view(x.shape[:2])


# -- residual ------------------------------------------------------------------------------------------------------
def _vectors(x: Tensor, *vectors: Tensor) -> list[Tensor]:
    return [v.to(wide(x.dtype)).contiguous() for v in vectors]


def _check_branch(name: str, x: Tensor, branch: Tensor, vectors: dict[str, Tensor]) -> None:
    check_vectors(name, x, vectors)
    if branch.shape != x.shape:
        raise ValueError(f"{name}: branch must have the shape of x, {tuple(x.shape)}; got {tuple(branch.shape)}")


def _forward(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    _check_branch("residual", x, branch, {"gate": gate, "bias": bias})
    return pick("residual", residual_forward, x, branch.dtype)(
        x.contiguous(), branch.contiguous(), *_vectors(x, gate, bias)
    )


def _forward_fake(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    _check_branch("residual", x, branch, {"gate": gate, "bias": bias})
    return x.new_empty(x.shape)


def _backward(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return pick("residual", residual_backward, dy, branch.dtype)(
        dy.contiguous(), branch.contiguous(), *_vectors(dy, gate)
    )


def _backward_fake(dy: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dgate = gate.new_empty(gate.shape, dtype=wide(dy.dtype))
    return branch.new_empty(branch.shape), dgate, torch.empty_like(dgate)


residual_backward_op = register(
    "residual_backward(Tensor dy, Tensor branch, Tensor gate) -> (Tensor, Tensor, Tensor)", _backward, _backward_fake
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, branch, gate, bias = inputs
    ctx.dtypes = gate.dtype, bias.dtype
    if any(ctx.needs_input_grad[1:]):
        ctx.save_for_backward(branch, gate)


def _autograd(ctx: Any, dy: Tensor) -> tuple:
    need = ctx.needs_input_grad
    if not any(need[1:]):
        return dy, None, None, None
    dbranch, dgate, dbias = residual_backward_op(dy, *ctx.saved_tensors)
    return (
        dy if need[0] else None,
        dbranch if need[1] else None,
        dgate.to(ctx.dtypes[0]) if need[2] else None,
        dbias.to(ctx.dtypes[1]) if need[3] else None,
    )


_residual = register(
    "residual(Tensor x, Tensor branch, Tensor gate, Tensor bias) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)


def residual(x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
    """y = x + gate·branch + bias.

    Args:
        x: residual stream, (B, T, D).
        branch: output of the branch without its last bias, (B, T, D), the compute dtype.
        gate, bias: factor on the branch (gate·γ) and its bias times that factor, (B, D), float32.

    Returns:
        (B, T, D) in the dtype of ``x``.
    """
    return _residual(x, branch, gate, bias)


# -- residual_adaln ------------------------------------------------------------------------------------------------
def _join_forward(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_branch("residual_adaln", x, branch, {"gate": gate, "bias": bias, "scale": scale, "shift": shift})
    x, branch = x.contiguous(), branch.contiguous()
    return pick("residual", residual_adaln_forward, x, branch.dtype)(
        x, branch, *_vectors(x, gate, bias, scale, shift), eps
    )


def _join_forward_fake(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_branch("residual_adaln", x, branch, {"gate": gate, "bias": bias, "scale": scale, "shift": shift})
    statistics = x.new_empty(x.shape[:2], dtype=wide(x.dtype))
    return x.new_empty(x.shape), branch.new_empty(branch.shape), statistics, torch.empty_like(statistics)


def _join_backward(
    dh: Tensor, dy: Tensor | None, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy = None if dy is None else dy.contiguous()
    gate, scale = _vectors(y, gate, scale)
    return pick("residual", residual_adaln_backward, y, branch.dtype, dh.dtype)(
        dh.contiguous(), dy, y, branch.contiguous(), gate, scale, mean, rstd
    )


def _join_backward_fake(
    dh: Tensor, dy: Tensor | None, y: Tensor, branch: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), branch.new_empty(branch.shape), gate.new_empty(4, *gate.shape, dtype=wide(y.dtype))


residual_adaln_backward_op = register(
    "residual_adaln_backward(Tensor dh, Tensor? dy, Tensor y, Tensor branch, Tensor gate, Tensor scale, Tensor mean,"
    " Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _join_backward,
    _join_backward_fake,
)


def _join_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, gate, bias, scale, shift, _ = inputs
    y, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = gate.dtype, bias.dtype, scale.dtype, shift.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(y, branch, gate, scale, mean, rstd)


def _join_autograd(ctx: Any, dy: Tensor | None, dh: Tensor | None, *_: Any) -> tuple:
    need = ctx.needs_input_grad
    if dy is None and dh is None:
        return (None,) * 7
    y, branch, gate, scale, mean, rstd = ctx.saved_tensors
    if dh is None:
        dbranch, dgate, dbias = residual_backward_op(dy, branch, gate)
        dx, dscale, dshift = dy, None, None
    else:
        dx, dbranch, sums = residual_adaln_backward_op(dh, dy, y, branch, gate, scale, mean, rstd)
        dgate, dbias, dscale, dshift = sums
    grads = [dx, dbranch]
    grads += [None if g is None else g.to(d) for g, d in zip((dgate, dbias, dscale, dshift), ctx.dtypes, strict=True)]
    return (*(g if n else None for g, n in zip(grads, need, strict=False)), None)


_residual_adaln = register(
    "residual_adaln(Tensor x, Tensor branch, Tensor gate, Tensor bias, Tensor scale, Tensor shift, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _join_forward,
    _join_forward_fake,
    setup_context=_join_setup,
    backward=_join_autograd,
)
_ext.register_operation("residual")


def residual_adaln(
    x: Tensor, branch: Tensor, gate: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """y = x + gate·branch + bias and h = LayerNorm(y)·scale + shift, in one pass.

    Args:
        x: residual stream, (B, T, D).
        branch: output of the branch without its last bias, (B, T, D), the compute dtype.
        gate, bias: factor on the branch (gate·γ) and its bias times that factor, (B, D), float32.
        scale, shift: of the next branch's LayerNorm, (B, D), float32; ``scale`` is the whole factor (DiT's 1 + scale).

    Returns:
        y (B, T, D) in the dtype of ``x`` and h (B, T, D) in the dtype of ``branch``.
    """
    y, h, _, _ = _residual_adaln(x, branch, gate, bias, scale, shift, eps)
    return y, h

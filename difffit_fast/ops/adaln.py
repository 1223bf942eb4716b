"""adaln: LayerNorm without parameters, then a scale and a shift per sample.

    h = x̂·scale + shift,   x̂ = (x − mean)·rstd,   scale, shift one vector per sample, broadcast over tokens

``scale`` is the full factor on x̂: DiT's modulation calls 1 + scale what is scale here. An affine LayerNorm (w, b) under
it gives scale = w·(1 + DiT's scale), shift = b·(1 + DiT's scale) + DiT's shift, so autograd on [B, D] vectors gives every
small gradient. Saved: x, scale, mean, rstd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ext
from ._register import register, wide
from .dispatch import pick


# -- the plain reference -------------------------------------------------------------------------------------------
def adaln_forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.to(wide(x.dtype))
    mean = x.mean(-1)
    rstd = (x.var(-1, correction=0) + eps).rsqrt() if x.numel() else torch.zeros_like(mean)
    h = (x - mean[..., None]) * rstd[..., None] * scale[:, None] + shift[:, None]
    return h.to(out_dtype), mean, rstd


def layer_norm_backward(dxhat: Tensor, xhat: Tensor, rstd: Tensor) -> Tensor:
    """dx of x̂ = (x − mean)·rstd: the part of dx̂ orthogonal to 1 and to x̂, times rstd."""
    m1 = dxhat.mean(-1, keepdim=True)
    m2 = (dxhat * xhat).mean(-1, keepdim=True)
    return (dxhat - m1 - xhat * m2) * rstd[..., None]


def adaln_backward(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype, dh = x.dtype, dh.to(wide(x.dtype))
    xhat = (x.to(wide(dtype)) - mean[..., None]) * rstd[..., None]
    dx = layer_norm_backward(dh * scale[:, None], xhat, rstd)
    return dx.to(dtype), (dh * xhat).sum(1), dh.sum(1)


# -- registration --------------------------------------------------------------------------------------------------
def check_vectors(name: str, x: Tensor, vectors: dict[str, Tensor]) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name}: x must be (batch, tokens, channels); got shape {tuple(x.shape)}")
    for key, v in vectors.items():
        if v.shape != (x.shape[0], x.shape[2]):
            raise ValueError(
                f"{name}: {key} must be one vector per sample, shape {(x.shape[0], x.shape[2])}; got {tuple(v.shape)}"
            )


def _forward(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    check_vectors("adaln", x, {"scale": scale, "shift": shift})
    x, scale, shift = x.contiguous(), scale.to(wide(x.dtype)).contiguous(), shift.to(wide(x.dtype)).contiguous()
    return pick("adaln", adaln_forward, x, out_dtype)(x, scale, shift, eps, out_dtype)


def _forward_fake(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    check_vectors("adaln", x, {"scale": scale, "shift": shift})
    statistics = x.new_empty(x.shape[:2], dtype=wide(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), statistics, torch.empty_like(statistics)


def _backward(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, scale = x.contiguous(), scale.to(wide(x.dtype)).contiguous()
    return pick("adaln", adaln_backward, x, dh.dtype)(dh.contiguous(), x, scale, mean, rstd)


def _backward_fake(dh: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        scale.new_empty(scale.shape, dtype=wide(x.dtype)),
        scale.new_empty(scale.shape, dtype=wide(x.dtype)),
    )


adaln_backward_op = register(
    "adaln_backward(Tensor dh, Tensor x, Tensor scale, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, scale, shift, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.dtypes = scale.dtype, shift.dtype
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(x, scale, mean, rstd)


def _autograd(ctx: Any, dh: Tensor | None, *_: Any) -> tuple:
    if dh is None:
        return (None,) * 5
    dx, dscale, dshift = adaln_backward_op(dh, *ctx.saved_tensors)
    need = ctx.needs_input_grad
    return (
        dx if need[0] else None,
        dscale.to(ctx.dtypes[0]) if need[1] else None,
        dshift.to(ctx.dtypes[1]) if need[2] else None,
        None,
        None,
    )


_op = register(
    "adaln(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_ext.register_operation("adaln")


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6, out_dtype: torch.dtype | None = None) -> Tensor:
    """LayerNorm of every token without parameters, times ``scale`` plus ``shift``.

    Args:
        x: residual stream, (B, T, D), float32/bfloat16/float16.
        scale, shift: one vector per sample, (B, D), float32; ``scale`` is the whole factor (DiT's 1 + scale).
        eps: added to the variance, as in DiT.
        out_dtype: dtype of the result (the compute dtype); that of ``x`` if None.

    Returns:
        (B, T, D) in ``out_dtype``. Statistics and sums are float32 (float64 for float64 input).

    Raises:
        ValueError: the shapes do not fit; the message names both.
    """
    return _op(x, scale, shift, eps, out_dtype or x.dtype)[0]

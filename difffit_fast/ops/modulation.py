"""modulation: what modulates the layers, one vector for each sample, prepared for all branches in one pass.

With shift, scale and gate of branch j, the sum of the modulation product m (B, 3·J + 2, D) and its bias:

    scale_j ← w_j·(1 + scale_j)      shift_j ← shift_j + v_j·(1 + scale_j)      w, v: weight and bias of LayerNorm j
    gate_j  ← γ_j·gate_j             bias_j  = gate_j·β_j                       β: bias of the branch's last linear

The last two rows of m are shift and scale of the final layer, LayerNorm number J. The result is one tensor of 4·J + 2 planes
(B, D): scale_0, shift_0, gate_0, bias_0, scale_1, … Four planes from number 2 + 4·j on, gate_j, bias_j, scale_{j+1} and
shift_{j+1}, are what a join (:mod:`.residual`) wants. Saved: the inputs, nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _ext
from ._register import register, wide
from .dispatch import pick


# -- the plain reference -------------------------------------------------------------------------------------------
def _parts(m: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """shift, scale + 1 (J + 1, B, D), gate (J, B, D), wide."""
    full = (m.to(wide(m.dtype)) + bias.to(wide(m.dtype))).transpose(0, 1)
    branches = full[:-2].unflatten(0, (-1, 3)) if full.shape[0] > 2 else full[:0].reshape(0, 3, *full.shape[1:])
    return torch.cat([branches[:, 0], full[-2:-1]]), 1 + torch.cat([branches[:, 1], full[-1:]]), branches[:, 2]


def _planes(vectors: Tensor, like: Tensor, dims: int) -> Tensor:
    """Those of all samples (..., D) as (..., 1, D), one for each sample (B, ..., D) as (..., B, D); of ``dims`` without B."""
    vectors = vectors.to(like.dtype)
    return vectors.unsqueeze(-2) if vectors.dim() == dims else vectors.movedim(0, -2)


def modulation_forward(m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor) -> Tensor:
    shift, scale, gate = _parts(m, bias)
    if norm is not None:
        weight, offset = _planes(norm, scale, 3).unbind(1)
        scale, shift = weight * scale, shift + offset * scale
    if gamma is not None:
        gate = _planes(gamma, gate, 2) * gate
    joints = torch.stack([gate, gate * _planes(beta, gate, 2), scale[1:], shift[1:]], 1)
    return torch.cat([scale[:1], shift[:1], joints.flatten(0, 1)])


def modulation_backward(
    dvectors: Tensor, m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, scale, gate = _parts(m, bias)
    w = scale.dtype
    dvectors = dvectors.to(w)
    dscale, dshift, dgate, dbias = dvectors[0::4], dvectors[1::4], dvectors[2::4], dvectors[3::4]
    dnorm, dgamma, factor = scale.new_empty(0), scale.new_empty(0), 1.0
    if norm is not None:
        dnorm = torch.stack([(dscale * scale).sum(1), (dshift * scale).sum(1)], 1)
        weight, offset = norm.to(w)[:, :, None].unbind(1)
        dscale = weight * dscale + offset * dshift
    dgate = dgate + dbias * beta.to(w)[:, None]
    if gamma is not None:
        dgamma, factor = (dgate * gate).sum(1), gamma.to(w)[:, None]
    dbeta = (dbias * factor * gate).sum(1)
    branches = torch.stack([dshift[:-1], dscale[:-1], factor * dgate], 1).flatten(0, 1)
    dm = torch.cat([branches, dshift[-1:], dscale[-1:]]).transpose(0, 1)
    return dm.to(m.dtype).contiguous(), dm.sum(0), dnorm, dgamma, dbeta


# -- registration --------------------------------------------------------------------------------------------------
def _check(m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor) -> None:
    if m.dim() != 3 or m.shape[1] % 3 != 2:
        raise ValueError(f"modulation: m must be (B, 3·branches + 2, D); got {tuple(m.shape)}")
    branches, d = m.shape[1] // 3, m.shape[2]
    wanted = {"bias": (m.shape[1], d), "norm": (branches + 1, 2, d), "gamma": (branches, d), "beta": (branches, d)}
    for name, x in (("bias", bias), ("norm", norm), ("gamma", gamma), ("beta", beta)):
        if x is not None and x.shape != wanted[name]:
            raise ValueError(f"modulation: {name} must have shape {wanted[name]}; got {tuple(x.shape)}")


def _wide(like: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.to(wide(like.dtype)).contiguous() for t in tensors]


def _forward(m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor) -> Tensor:
    _check(m, bias, norm, gamma, beta)
    return pick("modulation", modulation_forward, m)(m.contiguous(), *_wide(m, bias, norm, gamma, beta))


def _forward_fake(m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor) -> Tensor:
    _check(m, bias, norm, gamma, beta)
    b, rows, d = m.shape
    return m.new_empty(rows // 3 * 4 + 2, b, d, dtype=wide(m.dtype))


def _backward(
    dvectors: Tensor, m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return pick("modulation", modulation_backward, m)(
        *_wide(m, dvectors), m.contiguous(), *_wide(m, bias, norm, gamma, beta)
    )


def _backward_fake(
    dvectors: Tensor, m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = wide(m.dtype)
    grads = [m.new_empty(0 if x is None else x.shape, dtype=w) for x in (bias, norm, gamma, beta)]
    return m.new_empty(m.shape), grads[0], grads[1], grads[2], grads[3]


backward_op = register(
    "modulation_backward(Tensor dvectors, Tensor m, Tensor bias, Tensor? norm, Tensor? gamma, Tensor beta)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.given = [x is not None for x in inputs]
    if any(ctx.needs_input_grad):
        ctx.save_for_backward(*(x for x in inputs if x is not None))


def _autograd(ctx: Any, dvectors: Tensor) -> tuple:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if given else None for given in ctx.given]
    grads = backward_op(dvectors, *inputs)
    need = ctx.needs_input_grad
    return tuple(g.to(x.dtype) if n else None for g, x, n in zip(grads, inputs, need, strict=True))


_modulation = register(
    "modulation(Tensor m, Tensor bias, Tensor? norm, Tensor? gamma, Tensor beta) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_setup,
    backward=_autograd,
)
_ext.register_operation("modulation")


def modulation(m: Tensor, bias: Tensor, norm: Tensor | None, gamma: Tensor | None, beta: Tensor) -> Tensor:
    """The vectors of all joints, for J branches.

    Args:
        m: (B, 3·J + 2, D), the bare product of all modulation layers: shift, scale, gate of each branch, shift and scale of
            the final layer.
        bias: of that product, (3·J + 2, D), float32.
        norm: weight and bias of every LayerNorm, (J + 1, 2, D), or None where they have none.
        gamma: the product of every γ of a branch, (J, D), or None.
        beta: bias of the last linear of each branch, (J, D).

    Each of the last four may be (B, ...), one for each sample. Such ones are few and small, and are left to PyTorch.

    Returns:
        (4·J + 2, B, D), float32 (float64 for float64): scale and shift of the first LayerNorm, then gate, bias, scale and
        shift of each joint.

    Raises:
        ValueError: shapes that do not fit.
    """
    shared = ((bias, 2), (norm, 3), (gamma, 2), (beta, 2))
    if all(x is None or x.dim() == dims for x, dims in shared):
        return _modulation(m, bias, norm, gamma, beta)
    ones = [x[0] if x is not None and x.dim() == dims + 1 and len(x) == len(m) else x for x, dims in shared]
    _check(m, *ones)
    return modulation_forward(m, bias, norm, gamma, beta)

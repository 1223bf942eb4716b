"""modulation: scale, shift, gate and bias of every joint from the one modulation product, forward and backward.

    sum:        shift, scale, gate of branch j  =  m + bias, rows 3j, 3j + 1, 3j + 2 (the last two rows: shift, scale of the end)
    forward:    scale ← w·(1 + scale),  shift ← shift + v·(1 + scale);   gate ← γ·gate,  bias = gate·β
    backward:   the gradients of m, and over the samples those of bias, w, v, γ, β

Bytes for J branches, float32 vectors beside a bfloat16 m: forward (6 + 16)·B·J·D, backward (6 + 16 + 6)·B·J·D; all else is
without the factor B.

Who owns what: a program owns one branch and a block of columns and walks over the samples; so each sum over them stays in
its registers and there is no second stage. Of the 4·J + 2 planes [B, D] it owns number 4·j to 4·j + 3: scale, shift, gate, bias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, launch, modulation_plan
from .tiles import narrow


@triton.jit
def _load(ptr, row, rows, cols, mask, B, stride, D: tl.constexpr):
    """Row ``row`` of (B, ·, D) for the samples ``rows``: float32 [ROWS, COLS]."""
    at = rows[:, None].to(tl.int64) * stride + row * D + cols[None, :]
    return tl.load(ptr + at, mask=(rows < B)[:, None] & mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, value, row, rows, cols, mask, B, stride, D: tl.constexpr):
    at = rows[:, None].to(tl.int64) * stride + row * D + cols[None, :]
    tl.store(ptr + at, narrow(value, ptr.dtype.element_ty), mask=(rows < B)[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["B", "branches"])
def _modulation_forward_kernel(
    m_ptr, bias_ptr, norm_ptr, gamma_ptr, beta_ptr, vectors_ptr, B, branches,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    j = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    mask = cols < D
    stride = (3 * branches + 2) * D
    shift_0 = tl.load(bias_ptr + 3 * j * D + cols, mask=mask, other=0.0)[None, :]
    scale_0 = tl.load(bias_ptr + (3 * j + 1) * D + cols, mask=mask, other=0.0)[None, :]
    if NORM:
        weight = tl.load(norm_ptr + 2 * j * D + cols, mask=mask, other=0.0)[None, :]
        offset = tl.load(norm_ptr + (2 * j + 1) * D + cols, mask=mask, other=0.0)[None, :]
    is_branch = mask & (j < branches)
    gate_0 = tl.load(bias_ptr + (3 * j + 2) * D + cols, mask=is_branch, other=0.0)[None, :]
    beta = tl.load(beta_ptr + j * D + cols, mask=is_branch, other=0.0)[None, :]
    if GAMMA:
        gamma = tl.load(gamma_ptr + j * D + cols, mask=is_branch, other=0.0)[None, :]
    start = 0
    while start < B:
        rows = start + tl.arange(0, ROWS)
        shift = _load(m_ptr, 3 * j, rows, cols, mask, B, stride, D) + shift_0
        scale = 1.0 + (_load(m_ptr, 3 * j + 1, rows, cols, mask, B, stride, D) + scale_0)
        gate = _load(m_ptr, 3 * j + 2, rows, cols, is_branch, B, stride, D) + gate_0
        if NORM:
            shift += offset * scale
            scale *= weight
        if GAMMA:
            gate *= gamma
        _store(vectors_ptr, scale, 4 * j * B, rows, cols, mask, B, D, D)
        _store(vectors_ptr, shift, (4 * j + 1) * B, rows, cols, mask, B, D, D)
        _store(vectors_ptr, gate, (4 * j + 2) * B, rows, cols, is_branch, B, D, D)
        _store(vectors_ptr, gate * beta, (4 * j + 3) * B, rows, cols, is_branch, B, D, D)
        start += ROWS


@triton.jit(do_not_specialize=["B", "branches"])
def _modulation_backward_kernel(
    dvectors_ptr, m_ptr, bias_ptr, norm_ptr, gamma_ptr, beta_ptr,
    dm_ptr, dbias_ptr, dnorm_ptr, dgamma_ptr, dbeta_ptr, B, branches,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, NORM: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    j = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    mask = cols < D
    stride = (3 * branches + 2) * D
    is_branch = mask & (j < branches)
    if NORM:
        scale_0 = tl.load(bias_ptr + (3 * j + 1) * D + cols, mask=mask, other=0.0)[None, :]
        weight = tl.load(norm_ptr + 2 * j * D + cols, mask=mask, other=0.0)[None, :]
        offset = tl.load(norm_ptr + (2 * j + 1) * D + cols, mask=mask, other=0.0)[None, :]
        sum_weight = tl.zeros([ROWS, COLS], dtype=tl.float32)
        sum_offset = tl.zeros([ROWS, COLS], dtype=tl.float32)
    gate_0 = tl.load(bias_ptr + (3 * j + 2) * D + cols, mask=is_branch, other=0.0)[None, :]
    beta = tl.load(beta_ptr + j * D + cols, mask=is_branch, other=0.0)[None, :]
    if GAMMA:
        gamma = tl.load(gamma_ptr + j * D + cols, mask=is_branch, other=0.0)[None, :]
        sum_gamma = tl.zeros([ROWS, COLS], dtype=tl.float32)
    sum_shift = tl.zeros([ROWS, COLS], dtype=tl.float32)
    sum_scale = tl.zeros([ROWS, COLS], dtype=tl.float32)
    sum_gate = tl.zeros([ROWS, COLS], dtype=tl.float32)
    sum_beta = tl.zeros([ROWS, COLS], dtype=tl.float32)
    start = 0
    while start < B:
        rows = start + tl.arange(0, ROWS)
        dscale = _load(dvectors_ptr, 4 * j * B, rows, cols, mask, B, D, D)
        dshift = _load(dvectors_ptr, (4 * j + 1) * B, rows, cols, mask, B, D, D)
        if NORM:
            scale = 1.0 + (_load(m_ptr, 3 * j + 1, rows, cols, mask, B, stride, D) + scale_0)
            sum_weight += dscale * scale
            sum_offset += dshift * scale
            dscale = weight * dscale + offset * dshift
        dgate = _load(dvectors_ptr, (4 * j + 2) * B, rows, cols, is_branch, B, D, D)
        dbias = _load(dvectors_ptr, (4 * j + 3) * B, rows, cols, is_branch, B, D, D)
        gate = _load(m_ptr, 3 * j + 2, rows, cols, is_branch, B, stride, D) + gate_0
        dgate += dbias * beta
        if GAMMA:
            sum_gamma += dgate * gate
            gate *= gamma
            dgate *= gamma
        sum_beta += dbias * gate
        sum_shift += dshift
        sum_scale += dscale
        sum_gate += dgate
        _store(dm_ptr, dshift, 3 * j, rows, cols, mask, B, stride, D)
        _store(dm_ptr, dscale, 3 * j + 1, rows, cols, mask, B, stride, D)
        _store(dm_ptr, dgate, 3 * j + 2, rows, cols, is_branch, B, stride, D)
        start += ROWS
    tl.store(dbias_ptr + 3 * j * D + cols, tl.sum(sum_shift, axis=0), mask=mask)
    tl.store(dbias_ptr + (3 * j + 1) * D + cols, tl.sum(sum_scale, axis=0), mask=mask)
    tl.store(dbias_ptr + (3 * j + 2) * D + cols, tl.sum(sum_gate, axis=0), mask=is_branch)
    tl.store(dbeta_ptr + j * D + cols, tl.sum(sum_beta, axis=0), mask=is_branch)
    if NORM:
        tl.store(dnorm_ptr + 2 * j * D + cols, tl.sum(sum_weight, axis=0), mask=mask)
        tl.store(dnorm_ptr + (2 * j + 1) * D + cols, tl.sum(sum_offset, axis=0), mask=mask)
    if GAMMA:
        tl.store(dgamma_ptr + j * D + cols, tl.sum(sum_gamma, axis=0), mask=is_branch)


def modulation_forward(
    m: torch.Tensor, bias: torch.Tensor, norm: torch.Tensor | None, gamma: torch.Tensor | None, beta: torch.Tensor
) -> torch.Tensor:
    """Args: m [B, 3J + 2, D]; float32: bias [3J + 2, D], norm [J + 1, 2, D] or None, gamma [J, D] or None, beta [J, D].

    Returns: [4J + 2, B, D] float32: scale, shift, gate, bias of each branch in turn, then scale and shift of the end.
    """
    B, R, D = m.shape
    J = R // 3
    vectors = torch.empty((4 * J + 2, B, D), dtype=torch.float32, device=m.device)
    if B * D == 0:
        return vectors
    plan = modulation_plan(architecture(m.device))
    launch(
        _modulation_forward_kernel, (J + 1) * -(-D // plan.cols), m.device, m, bias, _or(norm, bias), _or(gamma, bias), beta,
        vectors, B, J,
        D=D, ROWS=plan.rows, COLS=plan.cols, NORM=norm is not None, GAMMA=gamma is not None, num_warps=plan.warps,
    )  # fmt: skip
    return vectors


def modulation_backward(
    dvectors: torch.Tensor,
    m: torch.Tensor,
    bias: torch.Tensor,
    norm: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`modulation_forward`.

    Args: dvectors [4J + 2, B, D] float32; the rest as the forward's.
    Returns: dm in the type of m; float32 dbias, dnorm, dgamma, dbeta of the shapes of their tensors, empty for None.
    """
    B, R, D = m.shape
    J = R // 3
    dm = torch.empty_like(m)
    make = torch.zeros if B * D == 0 else torch.empty
    dbias, dnorm, dgamma, dbeta = (
        make((0,) if x is None else x.shape, dtype=torch.float32, device=m.device) for x in (bias, norm, gamma, beta)
    )
    if B * D == 0:
        return dm, dbias, dnorm, dgamma, dbeta
    plan = modulation_plan(architecture(m.device))
    launch(
        _modulation_backward_kernel, (J + 1) * -(-D // plan.cols), m.device, dvectors, m, bias, _or(norm, bias),
        _or(gamma, bias), beta, dm, dbias, dnorm, dgamma, dbeta, B, J,
        D=D, ROWS=plan.rows, COLS=plan.cols, NORM=norm is not None, GAMMA=gamma is not None, num_warps=plan.warps,
    )  # fmt: skip
    return dm, dbias, dnorm, dgamma, dbeta


def _or(given: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if given is None else given

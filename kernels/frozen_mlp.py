"""frozen_mlp: the activation between fc1 and fc2, g = GELU(u), and its backward with fc1's bias gradient.

    z(u) = √(2/π)·(u + 0.044715·u³),   σ = 1 / (1 + e^(−2z)) = ½·(1 + tanh z)
    GELU(u) = u·σ,   GELU'(u) = σ + u·σ·(1 − σ)·2·z'(u),   z'(u) = √(2/π)·(1 + 3·0.044715·u²)
    du = dg·GELU'(u),   db = Σ_m du  (of the float32 values, before they are rounded)

Bytes per element in bfloat16: forward 4 (reads u, writes g), backward 6 (reads dg, u, writes du).

Who owns what: the forward is element by element. In the backward a program owns a chunk of rows and 128 columns, keeps
their sums in registers and writes one row of [chunks, N], which ``sums.finish`` adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, flat_plan, launch, tile_plan, vector
from .sums import finish
from .tiles import load_stack, narrow, store_stack

_LINEAR = tl.constexpr(-2.302208198144325)  # −2·√(2/π)·log₂ e
_CUBIC = tl.constexpr(-0.10294323958002349)  # 0.044715 times that
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _gelu(u):
    """u·σ. The exponential overflows to infinity, or vanishes, where u²·u does, and both are right."""
    return u / (1.0 + tl.exp2(u * (_LINEAR + _CUBIC * (u * u))))


@triton.jit
def _gelu_slope(u):
    """GELU'(u). Beyond ±10 it is 0 or 1 to the last bit of float32, and u² must not overflow there."""
    u = tl.minimum(tl.maximum(u, -10.0), 10.0)
    square = u * u
    sigma = 1.0 / (1.0 + tl.exp2(u * (_LINEAR + _CUBIC * square)))
    return sigma * (1.0 - (1.0 - sigma) * (u * _LN_2 * (_LINEAR + 3.0 * _CUBIC * square)))


@triton.jit
def _gelu_forward_kernel(u_ptr, g_ptr, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    at = tl.arange(0, BLOCK)
    mask = at < tl.minimum(n - start, BLOCK).to(tl.int32)
    u = tl.load(u_ptr + start + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + start + at, narrow(_gelu(u), g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _gelu_backward_kernel(
    dg_ptr, u_ptr, du_ptr, db_ptr, M, chunk_rows,
    N: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = chunk * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    inside = cols < N
    db = tl.zeros([SUB, COLS], dtype=tl.float32)
    dg_ptr += first * N
    u_ptr += first * N
    du_ptr += first * N
    start = 0
    while start < count:
        dg = load_stack(dg_ptr, start, count, cols, inside, N, SUB, COUNT)
        u = load_stack(u_ptr, start, count, cols, inside, N, SUB, COUNT)
        du = ()
        for i in tl.static_range(COUNT):
            du_i = dg[i] * _gelu_slope(u[i])
            db += du_i
            du = du + (du_i,)
        store_stack(du_ptr, du, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT
    tl.store(db_ptr + (chunk * N + cols), tl.sum(db, axis=0), mask=inside)


def gelu_forward(u: torch.Tensor) -> torch.Tensor:
    """g = GELU(u), tanh form, computed in float32. Args: u [M, N]. Returns: [M, N] in the type of u."""
    g = torch.empty_like(u)
    n = u.numel()
    if n == 0:
        return g
    plan = flat_plan(architecture(u.device))
    launch(_gelu_forward_kernel, -(-n // plan.cols), u.device, u, g, n, BLOCK=plan.cols, num_warps=plan.warps)
    return g


def gelu_backward(dg: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """du = dg·GELU'(u) in the type of u, and db = Σ_m du, float32 [N]. Args: dg, u [M, N]."""
    M, N = u.shape
    du = torch.empty_like(u)
    if u.numel() == 0:
        return du, u.new_zeros((N,), dtype=torch.float32)
    plan = tile_plan(architecture(u.device), vector(u))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, blocks)
    db = torch.empty((1, chunks, N), dtype=torch.float32, device=u.device)
    launch(
        _gelu_backward_kernel, chunks * blocks, u.device, dg, u, du, db, M, chunk_rows,
        N=N, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return du, finish(db)[0].view(N)

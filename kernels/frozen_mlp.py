"""frozen_mlp: the activation between fc1 and fc2, g = GELU(u), and its backward with fc1's bias gradient.

    z(u) = √(2/π)·(u + 0.044715·u³),   σ = 1 / (1 + e^(−2z)) = ½·(1 + tanh z)
    GELU(u) = u·σ,   GELU'(u) = σ + u·σ·(1 − σ)·2·z'(u),   z'(u) = √(2/π)·(1 + 3·0.044715·u²)
    du = dg·GELU'(u),   db = Σ_m du  (of the float32 values, before they are rounded)

Where each sample has a bias of its own, u is the bare product and both add the bias to it on the way: g = GELU(u + b),
du = dg·GELU'(u + b), db = Σ_t du of each sample.

Bytes per element in bfloat16: forward 4 (reads u, writes g), backward 6 (reads dg, u, writes du), and a bias per sample
once per chunk of rows. Where g or du leaves as e4m3, with a scale for each row, 3 and 5.

Who owns what: the forward is element by element. In the backward, and in the forward with a bias per sample, a program owns
a chunk of the rows of one sample and 128 columns; the backward keeps their sums in registers and writes one row of
[samples, chunks, N], which ``sums.finish`` adds up. A scale is of a whole row: for e4m3 a program owns all N columns of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, flat_plan, gelu_rows_plan, launch, tile_plan, vector
from .eight_bit import TOP_FP8, empty_fp8, quantize_rows
from .sums import finish
from .tiles import add, load_rows, load_stack, load_vector, narrow, store_stack, store_sums, widen, zero_rows

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


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _gelu_bias_forward_kernel(
    u_ptr, bias_ptr, g_ptr, T, chunk_rows, chunks,
    N: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = tl.program_id(0) // blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    row = sample * T + first
    inside = cols < N
    bias = tl.load(bias_ptr + (sample * N + cols), mask=inside, other=0.0)
    u_ptr += row * N
    g_ptr += row * N
    start = 0
    while start < count:
        u = load_stack(u_ptr, start, count, cols, inside, N, SUB, COUNT)
        g = ()
        for i in tl.static_range(COUNT):
            g = g + (_gelu(u[i] + bias[None, :]),)
        store_stack(g_ptr, g, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _gelu_backward_kernel(
    dg_ptr, u_ptr, bias_ptr, du_ptr, db_ptr, T, chunk_rows, chunks,
    BIAS: tl.constexpr, N: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    inside = cols < N
    first = chunk * chunk_rows
    row = first
    if BIAS:  # otherwise there is one sample, of all rows
        sample = chunk // chunks
        first = (chunk % chunks) * chunk_rows
        row = sample * T + first
        bias = tl.load(bias_ptr + (sample * N + cols), mask=inside, other=0.0)
    count = tl.minimum(T - first, chunk_rows).to(tl.int32)
    db = tl.zeros([SUB, COLS], dtype=tl.float32)
    dg_ptr += row * N
    u_ptr += row * N
    du_ptr += row * N
    start = 0
    while start < count:
        dg = load_stack(dg_ptr, start, count, cols, inside, N, SUB, COUNT)
        u = load_stack(u_ptr, start, count, cols, inside, N, SUB, COUNT)
        du = ()
        for i in tl.static_range(COUNT):
            if BIAS:
                du_i = dg[i] * _gelu_slope(u[i] + bias[None, :])
            else:
                du_i = dg[i] * _gelu_slope(u[i])
            db += du_i
            du = du + (du_i,)
        store_stack(du_ptr, du, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT
    tl.store(db_ptr + (chunk * N + cols), tl.sum(db, axis=0), mask=inside)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _gelu_fp8_forward_kernel(
    u_ptr, bias_ptr, g_ptr, g_scale_ptr, T, chunk_rows, chunks,
    BIAS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    row = sample * T + first
    u_ptr += row * N
    g_ptr += row * N
    g_scale_ptr += row
    if BIAS:
        bias = load_vector(bias_ptr + sample * N, N, WIDTH)
    next_u = load_rows(u_ptr, tl.arange(0, ROWS), count, N, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        u = widen(next_u, N, WIDTH)
        next_u = load_rows(u_ptr, rows + ROWS, count, N, WIDTH)  # on their way while this row is reduced
        if BIAS:
            u = add(u, bias, N, WIDTH)
        g = ()
        for p in tl.static_range((N + WIDTH - 1) // WIDTH):
            g = g + (_gelu(u[p]),)
        quantize_rows(g_ptr, g_scale_ptr, g, rows, count, TOP_FP8, N, ROWS, WIDTH)
        start += ROWS


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _gelu_fp8_backward_kernel(
    dg_ptr, u_ptr, bias_ptr, du_ptr, du_scale_ptr, db_ptr, T, chunk_rows, chunks,
    BIAS: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    row = sample * T + first
    dg_ptr += row * N
    u_ptr += row * N
    du_ptr += row * N
    du_scale_ptr += row
    db = zero_rows(N, ROWS, WIDTH)
    next_dg = load_rows(dg_ptr, tl.arange(0, ROWS), count, N, WIDTH)
    next_u = load_rows(u_ptr, tl.arange(0, ROWS), count, N, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        dg = widen(next_dg, N, WIDTH)
        u = widen(next_u, N, WIDTH)
        next_dg = load_rows(dg_ptr, rows + ROWS, count, N, WIDTH)  # on their way while this row is reduced
        next_u = load_rows(u_ptr, rows + ROWS, count, N, WIDTH)
        if BIAS:  # from the cache, row after row: beside the sums there are no registers for it
            u = add(u, load_vector(bias_ptr + sample * N, N, WIDTH), N, WIDTH)
        du = ()
        for p in tl.static_range((N + WIDTH - 1) // WIDTH):
            du = du + (dg[p] * _gelu_slope(u[p]),)
        db = add(db, du, N, WIDTH)
        quantize_rows(du_ptr, du_scale_ptr, du, rows, count, TOP_FP8, N, ROWS, WIDTH)
        start += ROWS
    store_sums(db_ptr + tl.program_id(0).to(tl.int64) * N, db, N, WIDTH)


def gelu_forward(u: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """g = GELU(u), tanh form, computed in float32; GELU(u + bias) where each sample has one.

    Args: u [M, N]; bias float32 [samples, N]: row m is of sample m·samples/M. Returns: [M, N] in the type of u.
    """
    g = torch.empty_like(u)
    n = u.numel()
    if n == 0:
        return g
    if bias is not None:
        samples, N = bias.shape
        T = u.shape[0] // samples
        plan = tile_plan(architecture(u.device), vector(u))
        blocks = -(-N // plan.cols)
        chunk_rows, chunks = chunks_of(T, plan, samples * blocks)
        launch(
            _gelu_bias_forward_kernel, samples * chunks * blocks, u.device, u, bias, g, T, chunk_rows, chunks,
            N=N, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
        )  # fmt: skip
        return g
    plan = flat_plan(architecture(u.device))
    launch(_gelu_forward_kernel, -(-n // plan.cols), u.device, u, g, n, BLOCK=plan.cols, num_warps=plan.warps)
    return g


def gelu_backward(
    dg: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """du = dg·GELU'(u) in the type of u, and db = Σ_m du, float32 [N].

    With a bias, as in :func:`gelu_forward`: du = dg·GELU'(u + bias), and db [samples, N] of the rows of each sample.

    Args: dg, u [M, N]; bias float32 [samples, N] or None.
    """
    M, N = u.shape
    sums = (N,) if bias is None else bias.shape
    du = torch.empty_like(u)
    if u.numel() == 0:
        return du, u.new_zeros(sums, dtype=torch.float32)
    samples = 1 if bias is None else bias.shape[0]
    T = M // samples
    plan = tile_plan(architecture(u.device), vector(u))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, samples * blocks)
    db = torch.empty((samples, chunks, N), dtype=torch.float32, device=u.device)
    launch(
        _gelu_backward_kernel, samples * chunks * blocks, u.device, dg, u, bias, du, db, T, chunk_rows, chunks,
        BIAS=bias is not None, N=N, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return du, finish(db)[0].view(sums)


def gelu_forward_fp8(u: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gelu_forward` in eight bits: e4m3 [M, N], and the scales of its rows, float32 [M]."""
    M, N = u.shape
    g, g_scale = empty_fp8(u)
    if u.numel() == 0:
        return g, g_scale
    samples = 1 if bias is None else bias.shape[0]
    T = M // samples
    plan = gelu_rows_plan(False, architecture(u.device), N, vector(u) if bias is None else vector(u, bias))
    chunk_rows, chunks = chunks_of(T, plan, samples)
    launch(
        _gelu_fp8_forward_kernel, samples * chunks, u.device, u, bias, g, g_scale, T, chunk_rows, chunks,
        BIAS=bias is not None, N=N, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return g, g_scale


def gelu_backward_fp8(
    dg: torch.Tensor, u: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`gelu_backward` with du in eight bits: e4m3 [M, N], the scales of its rows, float32 [M], and db as before."""
    M, N = u.shape
    sums = (N,) if bias is None else bias.shape
    du, du_scale = empty_fp8(u)
    if u.numel() == 0:
        return du, du_scale, u.new_zeros(sums, dtype=torch.float32)
    samples = 1 if bias is None else bias.shape[0]
    T = M // samples
    plan = gelu_rows_plan(True, architecture(u.device), N, vector(u) if bias is None else vector(u, bias))
    chunk_rows, chunks = chunks_of(T, plan, samples)
    db = torch.empty((samples, chunks, N), dtype=torch.float32, device=u.device)
    launch(
        _gelu_fp8_backward_kernel, samples * chunks, u.device, dg, u, bias, du, du_scale, db, T, chunk_rows, chunks,
        BIAS=bias is not None, N=N, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return du, du_scale, finish(db)[0].view(sums)

"""residual: y = x + s·f + r, and residual_adaln: the same, then h = ŷ·a + c in one pass; s, r, a, c per sample.

Forward:   y = x + s·f + r,   ŷ = (y − mean)·rstd over D (of y as stored),   h = ŷ·a + c
Backward, with w = dh·a and g the gradient of y from both its uses:
    g = dy + rstd·(w − Σ_j w_j / D − ŷ·Σ_j w_j ŷ_j / D)
    dx = g,   df = s·g,   ds = Σ_t g·f,   dr = Σ_t g,   da = Σ_t dh·ŷ,   dc = Σ_t dh

Bytes per element (residual stream float32, branches bfloat16: 4, 2):
    residual        forward reads x, f, writes y (10);     backward reads dy, f, writes df (8)
    residual_adaln  forward reads x, f, writes y, h (12);  backward reads dh, dy, y, f, writes dx, df (18; 14 without dy)
Besides: the vectors once per chunk of tokens, two float32 statistics per token, one partial row per sum and chunk.

Who owns what: in residual_adaln a program owns a chunk of the tokens of one sample with all D columns: both sums over D
and all four sums over tokens are its own, kept in registers. In residual, which needs no sum over D, a program owns
a chunk of tokens and 128 columns. Sums over tokens leave as one row of [B, chunks, D] for ``sums.finish``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, row_plan, tile_plan, vector
from .sums import finish
from .tiles import (
    add,
    centre,
    load_rows,
    load_stack,
    load_vector,
    multiply,
    multiply_add,
    narrow,
    norm_backward,
    scale,
    store_rows,
    store_stack,
    store_sums,
    total,
    widen,
    zero_rows,
)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_forward_kernel(
    x_ptr, f_ptr, s_ptr, r_ptr, y_ptr, T, chunk_rows, chunks,
    D: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = tl.program_id(0) // blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    inside = cols < D
    s = tl.load(s_ptr + (sample * D + cols), mask=inside, other=0.0)
    r = tl.load(r_ptr + (sample * D + cols), mask=inside, other=0.0)
    x_ptr += token * D
    f_ptr += token * D
    y_ptr += token * D
    start = 0
    while start < count:
        x = load_stack(x_ptr, start, count, cols, inside, D, SUB, COUNT)
        f = load_stack(f_ptr, start, count, cols, inside, D, SUB, COUNT)
        y = ()
        for i in tl.static_range(COUNT):
            y = y + (x[i] + s[None, :] * f[i] + r[None, :],)
        store_stack(y_ptr, y, start, count, cols, inside, D, SUB, COUNT)
        start += SUB * COUNT


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_backward_kernel(
    dy_ptr, f_ptr, s_ptr, df_ptr, ds_ptr, dr_ptr, T, chunk_rows, chunks,
    D: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (D + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = tl.program_id(0) // blocks
    sample = (chunk // chunks).to(tl.int64)
    first = (chunk % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    inside = cols < D
    s = tl.load(s_ptr + (sample * D + cols), mask=inside, other=0.0)
    ds = tl.zeros([SUB, COLS], dtype=tl.float32)
    dr = tl.zeros([SUB, COLS], dtype=tl.float32)
    dy_ptr += token * D
    f_ptr += token * D
    df_ptr += token * D
    start = 0
    while start < count:
        dy = load_stack(dy_ptr, start, count, cols, inside, D, SUB, COUNT)
        f = load_stack(f_ptr, start, count, cols, inside, D, SUB, COUNT)
        df = ()
        for i in tl.static_range(COUNT):
            ds += dy[i] * f[i]
            dr += dy[i]
            df = df + (s[None, :] * dy[i],)
        store_stack(df_ptr, df, start, count, cols, inside, D, SUB, COUNT)
        start += SUB * COUNT
    part = chunk.to(tl.int64) * D + cols
    tl.store(ds_ptr + part, tl.sum(ds, axis=0), mask=inside)
    tl.store(dr_ptr + part, tl.sum(dr, axis=0), mask=inside)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_adaln_forward_kernel(
    x_ptr, f_ptr, s_ptr, r_ptr, a_ptr, c_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, eps, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    x_ptr += token * D
    f_ptr += token * D
    y_ptr += token * D
    h_ptr += token * D
    mean_ptr += token
    rstd_ptr += token
    s = load_vector(s_ptr + sample * D, D, WIDTH)
    r = load_vector(r_ptr + sample * D, D, WIDTH)
    a = load_vector(a_ptr + sample * D, D, WIDTH)
    c = load_vector(c_ptr + sample * D, D, WIDTH)
    next_x = load_rows(x_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    next_f = load_rows(f_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        x = widen(next_x, D, WIDTH)
        f = widen(next_f, D, WIDTH)
        next_x = load_rows(x_ptr, rows + ROWS, count, D, WIDTH)  # on their way while this row is reduced
        next_f = load_rows(f_ptr, rows + ROWS, count, D, WIDTH)
        y = ()
        for p in tl.static_range((D + WIDTH - 1) // WIDTH):
            y_p = x[p] + s[p] * f[p] + r[p]
            y = y + (narrow(y_p, y_ptr.dtype.element_ty).to(tl.float32),)  # the statistics are those of y as stored
        store_rows(y_ptr, y, rows, count, D, WIDTH)
        mean = total(y, D, WIDTH) / D
        y = centre(y, mean, D, WIDTH)
        rstd = tl.rsqrt(total(multiply(y, y, D, WIDTH), D, WIDTH) / D + eps)
        tl.store(mean_ptr + rows[:, None], mean, mask=rows[:, None] < count)
        tl.store(rstd_ptr + rows[:, None], rstd, mask=rows[:, None] < count)
        yhat = scale(y, rstd, D, WIDTH)
        store_rows(h_ptr, multiply_add(yhat, a, c, D, WIDTH), rows, count, D, WIDTH)
        start += ROWS


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_adaln_backward_kernel(
    dh_ptr, dy_ptr, y_ptr, f_ptr, s_ptr, a_ptr, mean_ptr, rstd_ptr,
    dx_ptr, df_ptr, ds_ptr, dr_ptr, da_ptr, dc_ptr, T, chunk_rows, chunks,
    HAS_DY: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    dh_ptr += token * D
    if HAS_DY:
        dy_ptr += token * D
    y_ptr += token * D
    f_ptr += token * D
    dx_ptr += token * D
    df_ptr += token * D
    mean_ptr += token
    rstd_ptr += token
    s = load_vector(s_ptr + sample * D, D, WIDTH)
    a = load_vector(a_ptr + sample * D, D, WIDTH)
    ds = zero_rows(D, ROWS, WIDTH)
    dr = zero_rows(D, ROWS, WIDTH)
    da = zero_rows(D, ROWS, WIDTH)
    dc = zero_rows(D, ROWS, WIDTH)
    next_dh = load_rows(dh_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    next_y = load_rows(y_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        dh = widen(next_dh, D, WIDTH)
        y = widen(next_y, D, WIDTH)
        next_dh = load_rows(dh_ptr, rows + ROWS, count, D, WIDTH)  # on their way while this row is reduced
        next_y = load_rows(y_ptr, rows + ROWS, count, D, WIDTH)
        f = load_rows(f_ptr, rows, count, D, WIDTH)  # f and dy are wanted after the reduction only
        if HAS_DY:
            dy = load_rows(dy_ptr, rows, count, D, WIDTH)
        mean = tl.load(mean_ptr + rows, mask=rows < count, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)[:, None]
        yhat = scale(centre(y, mean, D, WIDTH), rstd, D, WIDTH)
        da = multiply_add(dh, yhat, da, D, WIDTH)
        dc = add(dc, dh, D, WIDTH)
        g = norm_backward(multiply(dh, a, D, WIDTH), yhat, rstd, D, WIDTH)
        if HAS_DY:
            g = add(g, widen(dy, D, WIDTH), D, WIDTH)
        ds = multiply_add(g, widen(f, D, WIDTH), ds, D, WIDTH)
        dr = add(dr, g, D, WIDTH)
        store_rows(dx_ptr, g, rows, count, D, WIDTH)
        store_rows(df_ptr, multiply(g, s, D, WIDTH), rows, count, D, WIDTH)
        start += ROWS
    part = tl.program_id(0).to(tl.int64) * D
    store_sums(ds_ptr + part, ds, D, WIDTH)
    store_sums(dr_ptr + part, dr, D, WIDTH)
    store_sums(da_ptr + part, da, D, WIDTH)
    store_sums(dc_ptr + part, dc, D, WIDTH)


def residual_forward(x: torch.Tensor, f: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """y = x + s·f + r in the type of x. Args: x, f [B, T, D]; s, r float32 [B, D]."""
    B, T, D = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    plan = tile_plan(architecture(x.device), vector(x, f))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, B * blocks)
    launch(
        _residual_forward_kernel, B * chunks * blocks, x.device, x, f, s, r, y, T, chunk_rows, chunks,
        D=D, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return y


def residual_backward(
    dy: torch.Tensor, f: torch.Tensor, s: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`residual_forward` but dx, which is dy: df in the type of f; ds, dr float32 [B, D].

    Args: dy, f [B, T, D]; s float32 [B, D].
    """
    B, T, D = dy.shape
    df = torch.empty_like(f)
    if dy.numel() == 0:
        return df, dy.new_zeros((B, D), dtype=torch.float32), dy.new_zeros((B, D), dtype=torch.float32)
    plan = tile_plan(architecture(dy.device), vector(dy, f))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, B * blocks)
    ds = torch.empty((B, chunks, D), dtype=torch.float32, device=dy.device)
    dr = torch.empty((B, chunks, D), dtype=torch.float32, device=dy.device)
    launch(
        _residual_backward_kernel, B * chunks * blocks, dy.device, dy, f, s, df, ds, dr, T, chunk_rows, chunks,
        D=D, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return df, *finish(ds, dr)


def residual_adaln_forward(
    x: torch.Tensor, f: torch.Tensor, s: torch.Tensor, r: torch.Tensor, a: torch.Tensor, c: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = x + s·f + r, then h = LayerNorm(y)·a + c.

    Args: x, f [B, T, D]; s, r, a, c float32 [B, D].
    Returns: y in the type of x; h in the type of f; mean, rstd float32 [B, T].
    """
    B, T, D = x.shape
    y = torch.empty_like(x)
    h = torch.empty_like(f)
    if x.numel() == 0:
        return y, h, x.new_zeros((B, T), dtype=torch.float32), x.new_zeros((B, T), dtype=torch.float32)
    mean = torch.empty((B, T), dtype=torch.float32, device=x.device)
    rstd = torch.empty((B, T), dtype=torch.float32, device=x.device)
    plan = row_plan("residual_adaln_forward", architecture(x.device), D, vector(x, f))
    chunk_rows, chunks = chunks_of(T, plan, B)
    launch(
        _residual_adaln_forward_kernel, B * chunks, x.device, x, f, s, r, a, c, y, h, mean, rstd, eps,
        T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return y, h, mean, rstd


def residual_adaln_backward(
    dh: torch.Tensor,
    dy: torch.Tensor | None,
    y: torch.Tensor,
    f: torch.Tensor,
    s: torch.Tensor,
    a: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`residual_adaln_forward`, in one pass: dx, df, ds, dr, da, dc.

    Args: dh, y, f [B, T, D] as the forward gave them; dy the gradient of y from its other use, or None when it has
        none; s, a float32 [B, D]; mean, rstd float32 [B, T].
    Returns: dx in the type of y, df in the type of f, and the four sums over tokens, float32 [B, D].
    """
    B, T, D = y.shape
    dx = torch.empty_like(y)
    df = torch.empty_like(f)
    if y.numel() == 0:
        return dx, df, *(y.new_zeros((B, D), dtype=torch.float32) for _ in range(4))
    plan = row_plan("residual_adaln_backward", architecture(y.device), D, vector(y, f))
    chunk_rows, chunks = chunks_of(T, plan, B)
    sums = [torch.empty((B, chunks, D), dtype=torch.float32, device=y.device) for _ in range(4)]
    launch(
        _residual_adaln_backward_kernel, B * chunks, y.device, dh, dy, y, f, s, a, mean, rstd, dx, df, *sums,
        T, chunk_rows, chunks,
        HAS_DY=dy is not None, D=D, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return dx, df, *finish(*sums)

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

from .config import architecture, chunks_of, launch, row_plan, tile_plan
from .sums import finish
from .tiles import centre, load_tile, load_vector, store_tile, store_vector


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_forward_kernel(
    x_ptr, f_ptr, s_ptr, r_ptr, y_ptr, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
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
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & inside[None, :]
        at = token * D + (rows[:, None] * D + cols[None, :])
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
        y = x + s[None, :] * f + r[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_backward_kernel(
    dy_ptr, f_ptr, s_ptr, df_ptr, ds_ptr, dr_ptr, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
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
    ds = tl.zeros([ROWS, COLS], dtype=tl.float32)
    dr = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & inside[None, :]
        at = token * D + (rows[:, None] * D + cols[None, :])
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        f = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
        ds += dy * f
        dr += dy
        tl.store(df_ptr + at, (s[None, :] * dy).to(df_ptr.dtype.element_ty), mask=mask)
    part = chunk.to(tl.int64) * D + cols
    tl.store(ds_ptr + part, tl.sum(ds, axis=0), mask=inside)
    tl.store(dr_ptr + part, tl.sum(dr, axis=0), mask=inside)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_adaln_forward_kernel(
    x_ptr, f_ptr, s_ptr, r_ptr, a_ptr, c_ptr, y_ptr, h_ptr, mean_ptr, rstd_ptr, eps, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
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
    s_ptr += sample * D
    r_ptr += sample * D
    a_ptr += sample * D
    c_ptr += sample * D

    s = load_vector(s_ptr, 0, MAIN, D)
    r = load_vector(r_ptr, 0, MAIN, D)
    a = load_vector(a_ptr, 0, MAIN, D)
    c = load_vector(c_ptr, 0, MAIN, D)
    if TAIL > 0:
        s_tail = load_vector(s_ptr, MAIN, TAIL, D)
        r_tail = load_vector(r_ptr, MAIN, TAIL, D)
        a_tail = load_vector(a_ptr, MAIN, TAIL, D)
        c_tail = load_vector(c_ptr, MAIN, TAIL, D)

    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < count
        x = load_tile(x_ptr, rows, live, 0, MAIN, D)
        f = load_tile(f_ptr, rows, live, 0, MAIN, D)
        y = x + s[None, :] * f + r[None, :]
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)  # the statistics are those of y as it is stored
        store_tile(y_ptr, y, rows, live, 0, MAIN, D)
        total = tl.sum(y, axis=1)
        if TAIL > 0:
            x_tail = load_tile(x_ptr, rows, live, MAIN, TAIL, D)
            f_tail = load_tile(f_ptr, rows, live, MAIN, TAIL, D)
            y_tail = x_tail + s_tail[None, :] * f_tail + r_tail[None, :]
            y_tail = y_tail.to(y_ptr.dtype.element_ty).to(tl.float32)
            store_tile(y_ptr, y_tail, rows, live, MAIN, TAIL, D)
            total += tl.sum(y_tail, axis=1)
        mean = total / D
        y = y - mean[:, None]
        square = tl.sum(y * y, axis=1)
        if TAIL > 0:
            y_tail = centre(y_tail, mean, MAIN, TAIL, D)
            square += tl.sum(y_tail * y_tail, axis=1)
        rstd = tl.rsqrt(square / D + eps)
        tl.store(mean_ptr + rows, mean, mask=live)
        tl.store(rstd_ptr + rows, rstd, mask=live)
        store_tile(h_ptr, y * rstd[:, None] * a[None, :] + c[None, :], rows, live, 0, MAIN, D)
        if TAIL > 0:
            h_tail = y_tail * rstd[:, None] * a_tail[None, :] + c_tail[None, :]
            store_tile(h_ptr, h_tail, rows, live, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_adaln_backward_kernel(
    dh_ptr, dy_ptr, y_ptr, f_ptr, s_ptr, a_ptr, mean_ptr, rstd_ptr,
    dx_ptr, df_ptr, ds_ptr, dr_ptr, da_ptr, dc_ptr, T, chunk_rows, chunks,
    HAS_DY: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
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
    s_ptr += sample * D
    a_ptr += sample * D

    s = load_vector(s_ptr, 0, MAIN, D)
    a = load_vector(a_ptr, 0, MAIN, D)
    ds = tl.zeros([MAIN], dtype=tl.float32)
    dr = tl.zeros([MAIN], dtype=tl.float32)
    da = tl.zeros([MAIN], dtype=tl.float32)
    dc = tl.zeros([MAIN], dtype=tl.float32)
    if TAIL > 0:
        s_tail = load_vector(s_ptr, MAIN, TAIL, D)
        a_tail = load_vector(a_ptr, MAIN, TAIL, D)
        # The tail's rows are spread over the warps: its sums stay two-dimensional until the end.
        ds_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)
        dr_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)
        da_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)
        dc_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)

    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < count
        mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
        # All loads first, so that they are in flight together.
        dh = load_tile(dh_ptr, rows, live, 0, MAIN, D)
        y = load_tile(y_ptr, rows, live, 0, MAIN, D)
        f = load_tile(f_ptr, rows, live, 0, MAIN, D)
        if HAS_DY:
            dy = load_tile(dy_ptr, rows, live, 0, MAIN, D)
        if TAIL > 0:
            dh_tail = load_tile(dh_ptr, rows, live, MAIN, TAIL, D)
            y_tail = load_tile(y_ptr, rows, live, MAIN, TAIL, D)
            f_tail = load_tile(f_ptr, rows, live, MAIN, TAIL, D)
            if HAS_DY:
                dy_tail = load_tile(dy_ptr, rows, live, MAIN, TAIL, D)

        yhat = (y - mean[:, None]) * rstd[:, None]
        w = dh * a[None, :]
        sum_w = tl.sum(w, axis=1)
        sum_wy = tl.sum(w * yhat, axis=1)
        da += tl.sum(dh * yhat, axis=0)
        dc += tl.sum(dh, axis=0)
        if TAIL > 0:
            yhat_tail = (y_tail - mean[:, None]) * rstd[:, None]
            w_tail = dh_tail * a_tail[None, :]
            sum_w += tl.sum(w_tail, axis=1)
            sum_wy += tl.sum(w_tail * yhat_tail, axis=1)
            da_tail += dh_tail * yhat_tail
            dc_tail += dh_tail
        mean_w = sum_w / D
        mean_wy = sum_wy / D

        g = (w - mean_w[:, None] - yhat * mean_wy[:, None]) * rstd[:, None]
        if HAS_DY:
            g += dy
        ds += tl.sum(g * f, axis=0)
        dr += tl.sum(g, axis=0)
        store_tile(dx_ptr, g, rows, live, 0, MAIN, D)
        store_tile(df_ptr, g * s[None, :], rows, live, 0, MAIN, D)
        if TAIL > 0:
            g_tail = (w_tail - mean_w[:, None] - yhat_tail * mean_wy[:, None]) * rstd[:, None]
            if HAS_DY:
                g_tail += dy_tail
            ds_tail += g_tail * f_tail
            dr_tail += g_tail
            store_tile(dx_ptr, g_tail, rows, live, MAIN, TAIL, D)
            store_tile(df_ptr, g_tail * s_tail[None, :], rows, live, MAIN, TAIL, D)

    part = tl.program_id(0).to(tl.int64) * D
    store_vector(ds_ptr + part, ds, 0, MAIN, D)
    store_vector(dr_ptr + part, dr, 0, MAIN, D)
    store_vector(da_ptr + part, da, 0, MAIN, D)
    store_vector(dc_ptr + part, dc, 0, MAIN, D)
    if TAIL > 0:
        store_vector(ds_ptr + part, tl.sum(ds_tail, axis=0), MAIN, TAIL, D)
        store_vector(dr_ptr + part, tl.sum(dr_tail, axis=0), MAIN, TAIL, D)
        store_vector(da_ptr + part, tl.sum(da_tail, axis=0), MAIN, TAIL, D)
        store_vector(dc_ptr + part, tl.sum(dc_tail, axis=0), MAIN, TAIL, D)


def residual_forward(x: torch.Tensor, f: torch.Tensor, s: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """y = x + s·f + r in the type of x. Args: x, f [B, T, D]; s, r float32 [B, D]."""
    B, T, D = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    plan = tile_plan(architecture(x.device))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, B * blocks)
    launch(
        _residual_forward_kernel, B * chunks * blocks, x.device, x, f, s, r, y, T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, COLS=plan.cols, num_warps=plan.warps,
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
    plan = tile_plan(architecture(dy.device))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, B * blocks)
    ds = torch.empty((B, chunks, D), dtype=torch.float32, device=dy.device)
    dr = torch.empty((B, chunks, D), dtype=torch.float32, device=dy.device)
    launch(
        _residual_backward_kernel, B * chunks * blocks, dy.device, dy, f, s, df, ds, dr, T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, COLS=plan.cols, num_warps=plan.warps,
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
    plan = row_plan(architecture(x.device), D, backward=False)
    chunk_rows, chunks = chunks_of(T, plan, B)
    launch(
        _residual_adaln_forward_kernel, B * chunks, x.device, x, f, s, r, a, c, y, h, mean, rstd, eps,
        T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, MAIN=plan.cols, TAIL=plan.tail, num_warps=plan.warps,
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
    plan = row_plan(architecture(y.device), D, backward=True)
    chunk_rows, chunks = chunks_of(T, plan, B)
    sums = [torch.empty((B, chunks, D), dtype=torch.float32, device=y.device) for _ in range(4)]
    launch(
        _residual_adaln_backward_kernel, B * chunks, y.device, dh, dy, y, f, s, a, mean, rstd, dx, df, *sums,
        T, chunk_rows, chunks,
        HAS_DY=dy is not None, D=D, ROWS=plan.rows, MAIN=plan.cols, TAIL=plan.tail, num_warps=plan.warps,
    )  # fmt: skip
    return dx, df, *finish(*sums)

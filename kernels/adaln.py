"""adaln: h = x̂·a + c, x̂ = (x − mean)·rstd over D, with a and c one vector per sample.

Forward, per token:   mean = Σ_j x_j / D,   rstd = (Σ_j (x_j − mean)² / D + eps)^−½,   h = x̂·a + c
Backward, with w = dh·a:   dx = rstd·(w − Σ_j w_j / D − x̂·Σ_j w_j x̂_j / D),   da = Σ_t dh·x̂,   dc = Σ_t dh

Bytes per element (x, h in float32, bfloat16: 4, 2): forward reads x, writes h (6); backward reads dh, x, writes dx (10).
Besides: a and c once per chunk of tokens, two float32 statistics per token, two partial sums per chunk.

Who owns what: a program owns a chunk of the tokens of one sample, all D columns. The sums over D are its own; the sums
over tokens it keeps in registers, writes as one row of [B, chunks, D] and leaves to ``sums.finish``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, row_plan
from .sums import finish
from .tiles import centre, load_tile, load_vector, store_tile, store_vector


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _adaln_forward_kernel(
    x_ptr, a_ptr, c_ptr, h_ptr, mean_ptr, rstd_ptr, eps, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    x_ptr += token * D
    h_ptr += token * D
    mean_ptr += token
    rstd_ptr += token
    a_ptr += sample * D
    c_ptr += sample * D

    a = load_vector(a_ptr, 0, MAIN, D)
    c = load_vector(c_ptr, 0, MAIN, D)
    if TAIL > 0:
        a_tail = load_vector(a_ptr, MAIN, TAIL, D)
        c_tail = load_vector(c_ptr, MAIN, TAIL, D)

    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < count
        x = load_tile(x_ptr, rows, live, 0, MAIN, D)
        total = tl.sum(x, axis=1)
        if TAIL > 0:
            x_tail = load_tile(x_ptr, rows, live, MAIN, TAIL, D)
            total += tl.sum(x_tail, axis=1)
        mean = total / D
        x = x - mean[:, None]
        square = tl.sum(x * x, axis=1)
        if TAIL > 0:
            x_tail = centre(x_tail, mean, MAIN, TAIL, D)
            square += tl.sum(x_tail * x_tail, axis=1)
        rstd = tl.rsqrt(square / D + eps)
        tl.store(mean_ptr + rows, mean, mask=live)
        tl.store(rstd_ptr + rows, rstd, mask=live)
        store_tile(h_ptr, x * rstd[:, None] * a[None, :] + c[None, :], rows, live, 0, MAIN, D)
        if TAIL > 0:
            h_tail = x_tail * rstd[:, None] * a_tail[None, :] + c_tail[None, :]
            store_tile(h_ptr, h_tail, rows, live, MAIN, TAIL, D)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _adaln_backward_kernel(
    dh_ptr, x_ptr, a_ptr, mean_ptr, rstd_ptr, dx_ptr, da_ptr, dc_ptr, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    dh_ptr += token * D
    x_ptr += token * D
    dx_ptr += token * D
    mean_ptr += token
    rstd_ptr += token
    a_ptr += sample * D

    a = load_vector(a_ptr, 0, MAIN, D)
    da = tl.zeros([MAIN], dtype=tl.float32)
    dc = tl.zeros([MAIN], dtype=tl.float32)
    if TAIL > 0:
        a_tail = load_vector(a_ptr, MAIN, TAIL, D)
        # The tail's rows are spread over the warps: its sums stay two-dimensional until the end.
        da_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)
        dc_tail = tl.zeros([ROWS, TAIL], dtype=tl.float32)

    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < count
        mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
        dh = load_tile(dh_ptr, rows, live, 0, MAIN, D)
        xhat = (load_tile(x_ptr, rows, live, 0, MAIN, D) - mean[:, None]) * rstd[:, None]
        w = dh * a[None, :]
        sum_w = tl.sum(w, axis=1)
        sum_wx = tl.sum(w * xhat, axis=1)
        da += tl.sum(dh * xhat, axis=0)
        dc += tl.sum(dh, axis=0)
        if TAIL > 0:
            dh_tail = load_tile(dh_ptr, rows, live, MAIN, TAIL, D)
            xhat_tail = (load_tile(x_ptr, rows, live, MAIN, TAIL, D) - mean[:, None]) * rstd[:, None]
            w_tail = dh_tail * a_tail[None, :]
            sum_w += tl.sum(w_tail, axis=1)
            sum_wx += tl.sum(w_tail * xhat_tail, axis=1)
            da_tail += dh_tail * xhat_tail
            dc_tail += dh_tail
        mean_w = sum_w / D
        mean_wx = sum_wx / D
        dx = (w - mean_w[:, None] - xhat * mean_wx[:, None]) * rstd[:, None]
        store_tile(dx_ptr, dx, rows, live, 0, MAIN, D)
        if TAIL > 0:
            dx_tail = (w_tail - mean_w[:, None] - xhat_tail * mean_wx[:, None]) * rstd[:, None]
            store_tile(dx_ptr, dx_tail, rows, live, MAIN, TAIL, D)

    part = tl.program_id(0).to(tl.int64) * D
    store_vector(da_ptr + part, da, 0, MAIN, D)
    store_vector(dc_ptr + part, dc, 0, MAIN, D)
    if TAIL > 0:
        store_vector(da_ptr + part, tl.sum(da_tail, axis=0), MAIN, TAIL, D)
        store_vector(dc_ptr + part, tl.sum(dc_tail, axis=0), MAIN, TAIL, D)


def adaln_forward(
    x: torch.Tensor, a: torch.Tensor, c: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = LayerNorm(x)·a + c.

    Args: x [B, T, D]; a, c float32 [B, D]. Returns: h [B, T, D] in ``out_dtype``; mean, rstd float32 [B, T].
    """
    B, T, D = x.shape
    h = torch.empty((B, T, D), dtype=out_dtype, device=x.device)
    if x.numel() == 0:
        return h, x.new_zeros((B, T), dtype=torch.float32), x.new_zeros((B, T), dtype=torch.float32)
    mean = torch.empty((B, T), dtype=torch.float32, device=x.device)
    rstd = torch.empty((B, T), dtype=torch.float32, device=x.device)
    plan = row_plan(architecture(x.device), D, backward=False)
    chunk_rows, chunks = chunks_of(T, plan, B)
    launch(
        _adaln_forward_kernel, B * chunks, x.device, x, a, c, h, mean, rstd, eps, T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, MAIN=plan.cols, TAIL=plan.tail, num_warps=plan.warps,
    )  # fmt: skip
    return h, mean, rstd


def adaln_backward(
    dh: torch.Tensor, x: torch.Tensor, a: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`adaln_forward`: dx [B, T, D] in the type of x; da, dc float32 [B, D].

    Args: dh, x [B, T, D]; a float32 [B, D]; mean, rstd float32 [B, T] as the forward returned them.
    """
    B, T, D = x.shape
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, x.new_zeros((B, D), dtype=torch.float32), x.new_zeros((B, D), dtype=torch.float32)
    plan = row_plan(architecture(x.device), D, backward=True)
    chunk_rows, chunks = chunks_of(T, plan, B)
    da = torch.empty((B, chunks, D), dtype=torch.float32, device=x.device)
    dc = torch.empty((B, chunks, D), dtype=torch.float32, device=x.device)
    launch(
        _adaln_backward_kernel, B * chunks, x.device, dh, x, a, mean, rstd, dx, da, dc, T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, MAIN=plan.cols, TAIL=plan.tail, num_warps=plan.warps,
    )  # fmt: skip
    return dx, *finish(da, dc)

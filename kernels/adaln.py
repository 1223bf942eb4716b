"""adaln: h = x̂·scale + shift, x̂ = (x − mean)·rstd over D, with scale and shift one vector per sample.

Forward, per token:   mean = Σ_j x_j / D,   rstd = (Σ_j (x_j − mean)² / D + eps)^−½,   h = x̂·scale + shift
Backward, with w = dh·scale:
    dx = rstd·(w − Σ_j w_j / D − x̂·Σ_j w_j x̂_j / D),   dscale = Σ_t dh·x̂,   dshift = Σ_t dh

Bytes per element (x, h in float32, bfloat16: 4, 2): forward reads x, writes h (6); backward reads dh, x, writes dx (10).
Besides: scale and shift once per chunk of tokens, two float32 statistics per token, two partial sums per chunk.

Who owns what: a program owns a chunk of the tokens of one sample, all D columns. The sums over D are its own; the sums
over tokens it keeps in registers, writes as one row of [B, chunks, D] and leaves to ``sums.finish``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, row_plan, vector
from .sums import finish
from .tiles import (
    add,
    centre,
    load_rows,
    load_vector,
    multiply,
    multiply_add,
    norm_backward,
    scale_rows,
    store_rows,
    store_sums,
    total,
    widen,
    zero_rows,
)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _adaln_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, h_ptr, mean_ptr, rstd_ptr, eps, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    x_ptr += token * D
    h_ptr += token * D
    mean_ptr += token
    rstd_ptr += token
    scale = load_vector(scale_ptr + sample * D, D, WIDTH)
    shift = load_vector(shift_ptr + sample * D, D, WIDTH)
    next_x = load_rows(x_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        x = widen(next_x, D, WIDTH)
        next_x = load_rows(x_ptr, rows + ROWS, count, D, WIDTH)  # on its way while this row is reduced
        mean = total(x, D, WIDTH) / D
        x = centre(x, mean, D, WIDTH)
        rstd = tl.rsqrt(total(multiply(x, x, D, WIDTH), D, WIDTH) / D + eps)
        tl.store(mean_ptr + rows[:, None], mean, mask=rows[:, None] < count)
        tl.store(rstd_ptr + rows[:, None], rstd, mask=rows[:, None] < count)
        xhat = scale_rows(x, rstd, D, WIDTH)
        store_rows(h_ptr, multiply_add(xhat, scale, shift, D, WIDTH), rows, count, D, WIDTH)
        start += ROWS


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _adaln_backward_kernel(
    dh_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dscale_ptr, dshift_ptr, T, chunk_rows, chunks,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
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
    scale = load_vector(scale_ptr + sample * D, D, WIDTH)
    dscale = zero_rows(D, ROWS, WIDTH)
    dshift = zero_rows(D, ROWS, WIDTH)
    next_dh = load_rows(dh_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    next_x = load_rows(x_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        dh = widen(next_dh, D, WIDTH)
        x = widen(next_x, D, WIDTH)
        next_dh = load_rows(dh_ptr, rows + ROWS, count, D, WIDTH)  # on their way while this row is reduced
        next_x = load_rows(x_ptr, rows + ROWS, count, D, WIDTH)
        mean = tl.load(mean_ptr + rows, mask=rows < count, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)[:, None]
        xhat = scale_rows(centre(x, mean, D, WIDTH), rstd, D, WIDTH)
        dscale = multiply_add(dh, xhat, dscale, D, WIDTH)
        dshift = add(dshift, dh, D, WIDTH)
        dx = norm_backward(multiply(dh, scale, D, WIDTH), xhat, rstd, D, WIDTH)
        store_rows(dx_ptr, dx, rows, count, D, WIDTH)
        start += ROWS
    part = tl.program_id(0).to(tl.int64) * D
    store_sums(dscale_ptr + part, dscale, D, WIDTH)
    store_sums(dshift_ptr + part, dshift, D, WIDTH)


def adaln_forward(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = LayerNorm(x)·scale + shift.

    Args: x [B, T, D]; scale, shift float32 [B, D]. Returns: h [B, T, D] in ``out_dtype``; mean, rstd float32 [B, T].
    """
    B, T, D = x.shape
    h = torch.empty((B, T, D), dtype=out_dtype, device=x.device)
    if x.numel() == 0:
        return h, x.new_zeros((B, T), dtype=torch.float32), x.new_zeros((B, T), dtype=torch.float32)
    mean = torch.empty((B, T), dtype=torch.float32, device=x.device)
    rstd = torch.empty((B, T), dtype=torch.float32, device=x.device)
    plan = row_plan("adaln_forward", architecture(x.device), D, vector(x, h))
    chunk_rows, chunks = chunks_of(T, plan, B)
    launch(
        _adaln_forward_kernel, B * chunks, x.device, x, scale, shift, h, mean, rstd, eps, T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return h, mean, rstd


def adaln_backward(
    dh: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`adaln_forward`: dx [B, T, D] in the type of x; dscale, dshift float32 [B, D].

    Args: dh, x [B, T, D]; scale float32 [B, D]; mean, rstd float32 [B, T] as the forward returned them.
    """
    B, T, D = x.shape
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, x.new_zeros((B, D), dtype=torch.float32), x.new_zeros((B, D), dtype=torch.float32)
    plan = row_plan("adaln_backward", architecture(x.device), D, vector(x, dh))
    chunk_rows, chunks = chunks_of(T, plan, B)
    dscale = torch.empty((B, chunks, D), dtype=torch.float32, device=x.device)
    dshift = torch.empty((B, chunks, D), dtype=torch.float32, device=x.device)
    launch(
        _adaln_backward_kernel, B * chunks, x.device, dh, x, scale, mean, rstd, dx, dscale, dshift, T, chunk_rows, chunks,
        D=D, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return dx, *finish(dscale, dshift)

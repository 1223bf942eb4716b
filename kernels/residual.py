"""residual: y = x + gate·branch + bias, and residual_adaln: the same, then h = ŷ·scale + shift in one pass.

gate, bias, scale and shift are one vector per sample.

Forward:   y = x + gate·branch + bias,   ŷ = (y − mean)·rstd over D (of y as stored),   h = ŷ·scale + shift
Backward, with w = dh·scale and g the gradient of y from both its uses:
    g = dy + rstd·(w − Σ_j w_j / D − ŷ·Σ_j w_j ŷ_j / D)
    dx = g,   dbranch = gate·g,   dgate = Σ_t g·branch,   dbias = Σ_t g,   dscale = Σ_t dh·ŷ,   dshift = Σ_t dh

Bytes per element (residual stream float32, branches bfloat16: 4, 2):
    residual        forward reads x, branch, writes y (10);     backward reads dy, branch, writes dbranch (8)
    residual_adaln  forward reads x, branch, writes y, h (12);  backward reads dh, dy, y, branch, writes dx, dbranch (18;
                    14 without dy)
    in fp8          h and dbranch leave as e4m3 with a scale for each row, of the float32 values: one less (11; 17, 13)
Besides: the vectors once per chunk of tokens, two float32 statistics per token, one partial row per sum and chunk.

Who owns what: in residual_adaln a program owns a chunk of the tokens of one sample with all D columns: both sums over D
and all four sums over tokens are its own, kept in registers. In residual, which needs no sum over D, a program owns
a chunk of tokens and 128 columns. Sums over tokens leave as one row of [B, chunks, D] for ``sums.finish``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, registers, row_plan, tile_plan, vector
from .eight_bit import TOP_FP8, empty_fp8, quantize_rows
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
    scale_rows,
    store_rows,
    store_stack,
    store_sums,
    total,
    widen,
    zero_rows,
)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, bias_ptr, y_ptr, T, chunk_rows, chunks,
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
    gate = tl.load(gate_ptr + (sample * D + cols), mask=inside, other=0.0)
    bias = tl.load(bias_ptr + (sample * D + cols), mask=inside, other=0.0)
    x_ptr += token * D
    branch_ptr += token * D
    y_ptr += token * D
    start = 0
    while start < count:
        x = load_stack(x_ptr, start, count, cols, inside, D, SUB, COUNT)
        branch = load_stack(branch_ptr, start, count, cols, inside, D, SUB, COUNT)
        y = ()
        for i in tl.static_range(COUNT):
            y = y + (x[i] + gate[None, :] * branch[i] + bias[None, :],)
        store_stack(y_ptr, y, start, count, cols, inside, D, SUB, COUNT)
        start += SUB * COUNT


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_backward_kernel(
    dy_ptr, branch_ptr, gate_ptr, dbranch_ptr, dgate_ptr, dbias_ptr, T, chunk_rows, chunks,
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
    gate = tl.load(gate_ptr + (sample * D + cols), mask=inside, other=0.0)
    dgate = tl.zeros([SUB, COLS], dtype=tl.float32)
    dbias = tl.zeros([SUB, COLS], dtype=tl.float32)
    dy_ptr += token * D
    branch_ptr += token * D
    dbranch_ptr += token * D
    start = 0
    while start < count:
        dy = load_stack(dy_ptr, start, count, cols, inside, D, SUB, COUNT)
        branch = load_stack(branch_ptr, start, count, cols, inside, D, SUB, COUNT)
        dbranch = ()
        for i in tl.static_range(COUNT):
            dgate += dy[i] * branch[i]
            dbias += dy[i]
            dbranch = dbranch + (gate[None, :] * dy[i],)
        store_stack(dbranch_ptr, dbranch, start, count, cols, inside, D, SUB, COUNT)
        start += SUB * COUNT
    part = chunk.to(tl.int64) * D + cols
    tl.store(dgate_ptr + part, tl.sum(dgate, axis=0), mask=inside)
    tl.store(dbias_ptr + part, tl.sum(dbias, axis=0), mask=inside)


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_adaln_forward_kernel(
    x_ptr, branch_ptr, gate_ptr, bias_ptr, scale_ptr, shift_ptr, y_ptr, h_ptr, h_scale_ptr, mean_ptr, rstd_ptr, eps,
    T, chunk_rows, chunks,
    FP8: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    x_ptr += token * D
    branch_ptr += token * D
    y_ptr += token * D
    h_ptr += token * D
    if FP8:
        h_scale_ptr += token
    mean_ptr += token
    rstd_ptr += token
    gate = load_vector(gate_ptr + sample * D, D, WIDTH)
    bias = load_vector(bias_ptr + sample * D, D, WIDTH)
    scale = load_vector(scale_ptr + sample * D, D, WIDTH)
    shift = load_vector(shift_ptr + sample * D, D, WIDTH)
    next_x = load_rows(x_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    next_branch = load_rows(branch_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        x = widen(next_x, D, WIDTH)
        branch = widen(next_branch, D, WIDTH)
        next_x = load_rows(x_ptr, rows + ROWS, count, D, WIDTH)  # on their way while this row is reduced
        next_branch = load_rows(branch_ptr, rows + ROWS, count, D, WIDTH)
        y = ()
        for p in tl.static_range((D + WIDTH - 1) // WIDTH):
            y_p = x[p] + gate[p] * branch[p] + bias[p]
            y = y + (narrow(y_p, y_ptr.dtype.element_ty).to(tl.float32),)  # the statistics are those of y as stored
        store_rows(y_ptr, y, rows, count, D, WIDTH)
        mean = total(y, D, WIDTH) / D
        y = centre(y, mean, D, WIDTH)
        rstd = tl.rsqrt(total(multiply(y, y, D, WIDTH), D, WIDTH) / D + eps)
        tl.store(mean_ptr + rows[:, None], mean, mask=rows[:, None] < count)
        tl.store(rstd_ptr + rows[:, None], rstd, mask=rows[:, None] < count)
        yhat = scale_rows(y, rstd, D, WIDTH)
        h = multiply_add(yhat, scale, shift, D, WIDTH)
        if FP8:
            quantize_rows(h_ptr, h_scale_ptr, h, rows, count, TOP_FP8, D, ROWS, WIDTH)
        else:
            store_rows(h_ptr, h, rows, count, D, WIDTH)
        start += ROWS


@triton.jit(do_not_specialize=["T", "chunk_rows", "chunks"])
def _residual_adaln_backward_kernel(
    dh_ptr, dy_ptr, y_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, dbranch_scale_ptr, dgate_ptr, dbias_ptr, dscale_ptr, dshift_ptr, T, chunk_rows, chunks,
    HAS_DY: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks) * chunk_rows
    count = tl.minimum(T - first, chunk_rows)
    token = sample * T + first
    dh_ptr += token * D
    if HAS_DY:
        dy_ptr += token * D
    y_ptr += token * D
    branch_ptr += token * D
    dx_ptr += token * D
    dbranch_ptr += token * D
    if FP8:
        dbranch_scale_ptr += token
    mean_ptr += token
    rstd_ptr += token
    gate = load_vector(gate_ptr + sample * D, D, WIDTH)
    scale = load_vector(scale_ptr + sample * D, D, WIDTH)
    dgate = zero_rows(D, ROWS, WIDTH)
    dbias = zero_rows(D, ROWS, WIDTH)
    dscale = zero_rows(D, ROWS, WIDTH)
    dshift = zero_rows(D, ROWS, WIDTH)
    next_dh = load_rows(dh_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    next_y = load_rows(y_ptr, tl.arange(0, ROWS), count, D, WIDTH)
    start = 0
    while start < count:
        rows = start + tl.arange(0, ROWS)
        dh = widen(next_dh, D, WIDTH)
        y = widen(next_y, D, WIDTH)
        next_dh = load_rows(dh_ptr, rows + ROWS, count, D, WIDTH)  # on their way while this row is reduced
        next_y = load_rows(y_ptr, rows + ROWS, count, D, WIDTH)
        branch = load_rows(branch_ptr, rows, count, D, WIDTH)  # branch and dy are wanted after the reduction only
        if HAS_DY:
            dy = load_rows(dy_ptr, rows, count, D, WIDTH)
        mean = tl.load(mean_ptr + rows, mask=rows < count, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < count, other=0.0)[:, None]
        yhat = scale_rows(centre(y, mean, D, WIDTH), rstd, D, WIDTH)
        dscale = multiply_add(dh, yhat, dscale, D, WIDTH)
        dshift = add(dshift, dh, D, WIDTH)
        g = norm_backward(multiply(dh, scale, D, WIDTH), yhat, rstd, D, WIDTH)
        if HAS_DY:
            g = add(g, widen(dy, D, WIDTH), D, WIDTH)
        store_rows(dx_ptr, g, rows, count, D, WIDTH)
        dgate = multiply_add(g, widen(branch, D, WIDTH), dgate, D, WIDTH)
        dbias = add(dbias, g, D, WIDTH)
        dbranch = multiply(g, gate, D, WIDTH)
        if FP8:
            quantize_rows(dbranch_ptr, dbranch_scale_ptr, dbranch, rows, count, TOP_FP8, D, ROWS, WIDTH)
        else:
            store_rows(dbranch_ptr, dbranch, rows, count, D, WIDTH)
        start += ROWS
    part = tl.program_id(0).to(tl.int64) * D
    store_sums(dgate_ptr + part, dgate, D, WIDTH)
    store_sums(dbias_ptr + part, dbias, D, WIDTH)
    store_sums(dscale_ptr + part, dscale, D, WIDTH)
    store_sums(dshift_ptr + part, dshift, D, WIDTH)


def residual_forward(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """y = x + gate·branch + bias in the type of x. Args: x, branch [B, T, D]; gate, bias float32 [B, D]."""
    B, T, D = x.shape
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    plan = tile_plan(architecture(x.device), vector(x, branch))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, B * blocks)
    launch(
        _residual_forward_kernel, B * chunks * blocks, x.device, x, branch, gate, bias, y, T, chunk_rows, chunks,
        D=D, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return y


def residual_backward(
    dy: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of :func:`residual_forward` but dx, which is dy: dbranch in the type of branch; dgate, dbias float32
    [B, D].

    Args: dy, branch [B, T, D]; gate float32 [B, D].
    """
    B, T, D = dy.shape
    dbranch = torch.empty_like(branch)
    if dy.numel() == 0:
        return dbranch, dy.new_zeros((B, D), dtype=torch.float32), dy.new_zeros((B, D), dtype=torch.float32)
    plan = tile_plan(architecture(dy.device), vector(dy, branch))
    blocks = -(-D // plan.cols)
    chunk_rows, chunks = chunks_of(T, plan, B * blocks)
    dgate = torch.empty((B, chunks, D), dtype=torch.float32, device=dy.device)
    dbias = torch.empty((B, chunks, D), dtype=torch.float32, device=dy.device)
    launch(
        _residual_backward_kernel, B * chunks * blocks, dy.device, dy, branch, gate, dbranch, dgate, dbias, T, chunk_rows, chunks,
        D=D, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return dbranch, *finish(dgate, dbias)


def residual_adaln_forward(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    bias: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    eps: float,
    fp8: bool = False,
) -> tuple[torch.Tensor, ...]:
    """y = x + gate·branch + bias, then h = LayerNorm(y)·scale + shift.

    Args: x, branch [B, T, D]; gate, bias, scale, shift float32 [B, D]; fp8: h in eight bits.
    Returns: y in the type of x; h in the type of branch; mean, rstd float32 [B, T]. ``fp8``: h is e4m3, and the scales of its
        rows, float32 [B, T], are the last.
    """
    B, T, D = x.shape
    y = torch.empty_like(x)
    h, *h_scale = empty_fp8(branch) if fp8 else (torch.empty_like(branch),)
    if x.numel() == 0:
        return y, h, x.new_zeros((B, T), dtype=torch.float32), x.new_zeros((B, T), dtype=torch.float32), *h_scale
    mean = torch.empty((B, T), dtype=torch.float32, device=x.device)
    rstd = torch.empty((B, T), dtype=torch.float32, device=x.device)
    plan = row_plan("residual_adaln_forward", architecture(x.device), D, vector(x, branch, *h_scale))
    chunk_rows, chunks = chunks_of(T, plan, B)
    launch(
        _residual_adaln_forward_kernel, B * chunks, x.device, x, branch, gate, bias, scale, shift, y, h, *(h_scale or [None]),
        mean, rstd, eps, T, chunk_rows, chunks,
        FP8=fp8, D=D, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return y, h, mean, rstd, *h_scale


def residual_adaln_backward(
    dh: torch.Tensor,
    dy: torch.Tensor | None,
    y: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    fp8: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Gradients of :func:`residual_adaln_forward`, in one pass.

    Args: dh, y, branch [B, T, D] as the forward gave them; dy the gradient of y from its other use, or None when it has
        none; gate, scale float32 [B, D]; mean, rstd float32 [B, T]; fp8: dbranch in eight bits.
    Returns: dx in the type of y, dbranch in the type of branch, and the sums over tokens, float32 [4, B, D]: dgate,
        dbias, dscale, dshift. ``fp8``: dbranch is e4m3, and the scales of its rows, float32 [B, T], are the last.
    """
    B, T, D = y.shape
    dx = torch.empty_like(y)
    dbranch, *dbranch_scale = empty_fp8(branch) if fp8 else (torch.empty_like(branch),)
    if y.numel() == 0:
        return dx, dbranch, y.new_zeros((4, B, D), dtype=torch.float32), *dbranch_scale
    arch = architecture(y.device)
    # In fp8 a thread has as many values as beside a float32 stream: of more the compiler would spill.
    plan = row_plan("residual_adaln_backward", arch, D, vector(y, branch, *dbranch_scale))
    limit = {"maxnreg": registers(plan, arch)} if fp8 else {}
    chunk_rows, chunks = chunks_of(T, plan, B)
    sums = torch.empty((4, B, chunks, D), dtype=torch.float32, device=y.device)
    launch(
        _residual_adaln_backward_kernel, B * chunks, y.device, dh, dy, y, branch, gate, scale, mean, rstd,
        dx, dbranch, *(dbranch_scale or [None]), *sums, T, chunk_rows, chunks,
        HAS_DY=dy is not None, FP8=fp8, D=D, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps, **limit,
    )  # fmt: skip
    return dx, dbranch, finish(sums.view(4 * B, chunks, D))[0].view(4, B, D), *dbranch_scale

"""eight_bit: rows in eight bits with a scale for each, rotated before or not, and what becomes of the int8 product.

    largest = max_k |x_k|,   scale = largest / top,   q_k = x_k·(top / largest) to the nearest       top = 127 or 448
    y_mn = product_mn·column_n·row_m + bias_n              product_mn = Σ_k q_mk·values_nk

A row with a value that is not finite has the scale NaN. Rotated: each BLOCK channels times a Hadamard matrix over √BLOCK, which
tensor cores multiply with, exactly but for float32's sums; once to find the largest, once more to store. (log₂ BLOCK additions of
each value are fewer operations, but each exchanges values between threads: on an H200 0.7 ms for 8192 × 1152, 59 copies' time.)

Bytes per element in bfloat16: quantizing 3 (reads x, writes q) and, rotated, 2 that are read again, from L2; rescale 6 (reads
int32, writes y), which product_int8 saves, and the 4 of the int32 that it never writes: 2 in place of 10. Kernels that hold a row
anyway (``residual``, ``frozen_mlp``) end in :func:`quantize_rows`: 1, and the row is neither written in bfloat16 nor read.

Who owns what: a program of quantizing owns ROWS rows; one of rescale a tile, as the kernels of ``frozen_mlp``; one of
product_int8 a tile of y, GROUP tiles below each other before the next column of tiles, so that what neighbours read stays in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, product_plan, rotation_plan, row_plan, tile_plan, vector
from .tiles import CUTS_OFF, load_rows, load_stack, narrow, store_stack, widen

_LEAST = tl.constexpr(1e-30)  # a row whose largest value is less is all zeros
_MAGIC = tl.constexpr(12582912.0)  # 1.5·2²³: a sum with it is rounded to an integer, ties to even
_SMALL = tl.constexpr(24576.0)  # 1.5·2¹⁴: a sum with it is rounded to a multiple of 2⁻⁹
TOP = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
TOP_FP8 = tl.constexpr(448.0)
_BLOCKS = (64, 16, 4)


def block_of(channels: int) -> int:
    """Channels that are rotated together, of so many; 1 where none of the sizes divides them."""
    return next((block for block in _BLOCKS if channels % block == 0), 1)


@triton.jit
def _hadamards(BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """[CHANNELS, CHANNELS], a Hadamard matrix for each BLOCK of the diagonal, without its factor: −1 where the places of row and
    column have an odd number of bits in common."""
    i, j = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    common = i & j & (BLOCK - 1)
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return tl.where(i // BLOCK == j // BLOCK, 1.0 - 2.0 * (common & 1), 0.0)


@triton.jit
def _rotated(x_ptr, rows, count, first, matrix, D: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr):
    """Channels ``first`` … of rows of x, rotated: float32 [ROWS, CHANNELS], zero from D on, for D is whole blocks."""
    cols = first + tl.arange(0, CHANNELS)
    at = rows[:, None] * D + cols[None, :]
    if D % CHANNELS == 0:
        x = tl.load(x_ptr + at, mask=(rows < count)[:, None], other=0.0)
    else:
        x = tl.load(x_ptr + at, mask=(rows < count)[:, None] & (cols < D)[None, :], other=0.0)
    return tl.dot(x.to(matrix.dtype), matrix, input_precision="ieee") * BLOCK**-0.5


@triton.jit
def _scaling(largest, bad, TOP: tl.constexpr):
    """Of rows whose largest value and Σ 0·x are known, each [ROWS, 1]: which are finite, the factor before they are rounded, and
    the scale."""
    finite = bad == 0.0
    largest = tl.maximum(tl.where(finite, largest, 1.0), _LEAST)
    top = tl.full(largest.shape, TOP, tl.float32)
    return finite, tl.math.div_rn(top, largest), tl.where(finite, tl.math.div_rn(largest, top), bad)


@triton.jit
def quantized(pieces, TOP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Float32 pieces of rows, zero beyond D, as what is to be stored, float32 still, and the scale [ROWS, 1] of each row."""
    largest = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    bad = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        largest = tl.maximum(largest, tl.abs(pieces[p]))
        bad += pieces[p] * 0.0  # NaN where one is not finite
    finite, factor, scale = _scaling(tl.max(largest, axis=1)[:, None], tl.sum(bad, axis=1)[:, None], TOP)
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (tl.where(finite, pieces[p], 0.0) * factor,)
    return out, scale


@triton.jit
def _to_e4m3(value):
    """The nearest e4m3 value, ties to even, as float32: steps of 2⁻⁹ below 2⁻⁶, three bits behind the first above."""
    small = (value + _SMALL) - _SMALL
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    return tl.where(tl.abs(value) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def _store(ptr, value, rows, count, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """Channels ``first`` … of rows, float32, rounded to int8 or e4m3."""
    cols = first + tl.arange(0, WIDTH)
    mask = (rows < count)[:, None] & (cols < D)[None, :]
    if ptr.dtype.element_ty == tl.int8:
        value = (value + _MAGIC) - _MAGIC
    elif CUTS_OFF:
        value = _to_e4m3(value)
    tl.store(ptr + (rows[:, None] * D + cols[None, :]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_quantized(ptr, pieces, rows, count, D: tl.constexpr, WIDTH: tl.constexpr):
    """What :func:`quantized` gave, rounded to int8 or e4m3."""
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        _store(ptr, pieces[p], rows, count, p * WIDTH, D, WIDTH)


@triton.jit
def quantize_rows(
    ptr, scale_ptr, pieces, rows, count,
    TOP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store float32 pieces of rows, zero beyond D, in eight bits, and their scales."""
    pieces, scale = quantized(pieces, TOP, D, ROWS, WIDTH)
    store_quantized(ptr, pieces, rows, count, D, WIDTH)
    tl.store(scale_ptr + rows[:, None], scale, mask=rows[:, None] < count)


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, M, TOP: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    count = tl.minimum(M - first, ROWS).to(tl.int32)
    rows = tl.arange(0, ROWS)
    x = widen(load_rows(x_ptr + first * D, rows, count, D, WIDTH), D, WIDTH)
    quantize_rows(q_ptr + first * D, scale_ptr + first, x, rows, count, TOP, D, ROWS, WIDTH)


@triton.jit
def _quantize_rotated_kernel(
    x_ptr, q_ptr, scale_ptr, M,
    TOP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    count = tl.minimum(M - first, ROWS).to(tl.int32)
    rows = tl.arange(0, ROWS)
    x_ptr += first * D
    q_ptr += first * D
    matrix = _hadamards(BLOCK, CHANNELS).to(tl.float32 if CUTS_OFF else x_ptr.dtype.element_ty)
    largest = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    bad = tl.zeros([ROWS, CHANNELS], dtype=tl.float32)
    for step in tl.range(0, (D + CHANNELS - 1) // CHANNELS, num_stages=STAGES):
        x = _rotated(x_ptr, rows, count, step * CHANNELS, matrix, D, BLOCK, CHANNELS)
        largest = tl.maximum(largest, tl.abs(x))
        bad += x * 0.0
    finite, factor, scale = _scaling(tl.max(largest, axis=1)[:, None], tl.sum(bad, axis=1)[:, None], TOP)
    tl.store(scale_ptr + first + rows[:, None], scale, mask=rows[:, None] < count)
    for step in tl.range(0, (D + CHANNELS - 1) // CHANNELS, num_stages=STAGES):
        x = _rotated(x_ptr, rows, count, step * CHANNELS, matrix, D, BLOCK, CHANNELS)
        _store(q_ptr, tl.where(finite, x, 0.0) * factor, rows, count, step * CHANNELS, D, CHANNELS)


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _rescale_kernel(
    product_ptr, row_ptr, column_ptr, bias_ptr, y_ptr, M, chunk_rows,
    BIAS: tl.constexpr, N: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    inside = cols < N
    column = tl.load(column_ptr + cols, mask=inside, other=0.0)
    if BIAS:
        bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    product_ptr += first * N
    row_ptr += first
    y_ptr += first * N
    start = 0
    while start < count:
        product = load_stack(product_ptr, start, count, cols, inside, N, SUB, COUNT)
        y = ()
        for i in tl.static_range(COUNT):
            rows = start + i * SUB + tl.arange(0, SUB)
            row = tl.load(row_ptr + rows, mask=rows < count, other=0.0)
            y_i = product[i] * column[None, :] * row[:, None]
            if BIAS:
                y_i += bias[None, :]
            y = y + (y_i,)
        store_stack(y_ptr, y, start, count, cols, inside, N, SUB, COUNT)
        start += SUB * COUNT


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    q_ptr, row_ptr, values_ptr, column_ptr, bias_ptr, y_ptr, M,
    BIAS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    group = tl.program_id(0) // (GROUP * blocks)
    height = tl.minimum(tl.cdiv(M, ROWS) - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * blocks)
    first = (group * GROUP + place % height).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    count = tl.minimum(M - first, ROWS).to(tl.int32)
    cols = (place // height) * COLS + tl.arange(0, COLS)
    inside = cols < N
    # Rows and columns beyond the end are read from within, which no mask need be asked for, and not stored.
    here, there = tl.where(rows < count, rows, 0), tl.where(inside, cols, 0)
    q_ptr += first * K
    depth = tl.arange(0, DEPTH)
    a_ptr = q_ptr + (here[:, None] * K + depth[None, :])
    b_ptr = values_ptr + (there[None, :].to(tl.int64) * K + depth[:, None])
    acc = tl.zeros([ROWS, COLS], dtype=tl.int32)
    for step in tl.range(0, (K + DEPTH - 1) // DEPTH, num_stages=STAGES):
        if K % DEPTH == 0:
            a, b = tl.load(a_ptr), tl.load(b_ptr)
        else:
            left = depth < K - step * DEPTH
            a, b = tl.load(a_ptr, mask=left[None, :], other=0), tl.load(b_ptr, mask=left[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        a_ptr += DEPTH
        b_ptr += DEPTH
    column = tl.load(column_ptr + cols, mask=inside, other=0.0)
    row = tl.load(row_ptr + first + rows, mask=rows < count, other=0.0)
    y = acc.to(tl.float32) * column[None, :] * row[:, None]
    if BIAS:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)[None, :]
    y_ptr += first * N
    mask = (rows < count)[:, None] & inside[None, :]
    tl.store(y_ptr + (rows[:, None] * N + cols[None, :]), narrow(y, y_ptr.dtype.element_ty), mask=mask)


def empty_fp8(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For what :func:`quantize_rows` stores of rows like those of ``like`` [..., D]: e4m3 [..., D], float32 [...]."""
    scale = torch.empty(like.shape[:-1], dtype=torch.float32, device=like.device)
    if like.numel() == 0:  # no kernel will
        scale.fill_(_LEAST.value / TOP_FP8.value)
    return torch.empty_like(like, dtype=torch.float8_e4m3fn), scale


def _quantize(x: torch.Tensor, dtype: torch.dtype, turn: bool) -> tuple[torch.Tensor, torch.Tensor]:
    M, K = x.shape
    q = torch.empty((M, K), dtype=dtype, device=x.device)
    scale = torch.empty((M,), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return q, scale.fill_(_LEAST.value / TOP[dtype])
    arch, block = architecture(x.device), block_of(K)
    if turn and block > 1:
        plan = rotation_plan(arch)
        launch(
            _quantize_rotated_kernel, -(-M // plan.rows), x.device, x, q, scale, M,
            TOP=TOP[dtype], BLOCK=block, D=K, ROWS=plan.rows, CHANNELS=plan.channels, STAGES=plan.stages,
            num_warps=plan.warps,
        )  # fmt: skip
        return q, scale
    plan = row_plan("adaln_forward", arch, K, vector(x))
    launch(
        _quantize_kernel, -(-M // plan.rows), x.device, x, q, scale, M,
        TOP=TOP[dtype], D=K, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return q, scale


def quantize_int8(x: torch.Tensor, turn: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x [M, K] as int8 [M, K], and their scales, float32 [M]; rotated before where ``turn``."""
    return _quantize(x, torch.int8, turn)


def quantize_fp8(x: torch.Tensor, turn: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as e4m3."""
    return _quantize(x, torch.float8_e4m3fn, turn)


def rescale(
    product: torch.Tensor, row: torch.Tensor, column: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """product [M, N], int32 or float32, times row [M] and column [N], plus bias [N] or None: [M, N] in ``dtype``."""
    M, N = product.shape
    y = torch.empty((M, N), dtype=dtype, device=product.device)
    if y.numel() == 0:
        return y
    plan = tile_plan(architecture(product.device), vector(product))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, blocks)
    launch(
        _rescale_kernel, chunks * blocks, product.device, product, row, column, bias, y, M, chunk_rows,
        BIAS=bias is not None, N=N, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return y


def product_int8(
    q: torch.Tensor,
    row: torch.Tensor,
    values: torch.Tensor,
    column: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """q [M, K] times values [N, K] transposed, int8, times row [M] and column [N], plus bias [N] or None: [M, N] in ``dtype``."""
    (M, K), N = q.shape, values.shape[0]
    y = torch.empty((M, N), dtype=dtype, device=q.device)
    if y.numel() == 0:
        return y
    plan = product_plan(architecture(q.device))
    launch(
        _product_kernel, -(-M // plan.rows) * -(-N // plan.cols), q.device, q, row, values, column, bias, y, M,
        BIAS=bias is not None, N=N, K=K, ROWS=plan.rows, COLS=plan.cols, DEPTH=plan.depth, GROUP=plan.group,
        STAGES=plan.stages, num_warps=plan.warps,
    )  # fmt: skip
    return y

"""eight_bit: rows in eight bits with a scale for each, rotated before or not, and what becomes of the int8 product.

    largest = max_k |x_k|,   scale = largest / top,   q_k = x_k·(top / largest) to the nearest       top = 127 or 448
    y_mn = product_mn·column_n·row_m + bias_n              product_mn = Σ_k q_mk·values_nk

A row with a value that is not finite has the scale NaN. Rotated: each BLOCK channels times a Hadamard matrix over √BLOCK, by
log₂ BLOCK additions of each value.

Bytes per element in bfloat16: quantizing 3 (reads x, writes q); rescale 6 (reads int32, writes y), which product_int8 saves,
and the 4 of the int32 that it never writes: 2 in place of 10. Kernels that hold a row
anyway (``residual``, ``frozen_mlp``) end in :func:`quantize_rows`: 1, and the row is neither written in bfloat16 nor read.

Who owns what: a program of quantizing owns ROWS rows; one of rescale a tile, as the kernels of ``frozen_mlp``; one of
product_int8 a tile of y, GROUP tiles below each other before the next column of tiles, so that what neighbours read stays in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, product_plan, quantize_plan, tile_plan, vector
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
def _butterfly(x, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """a + b and a − b of the values [ROWS, WIDTH] that lie HALF apart."""
    pairs = tl.permute(tl.reshape(x, [ROWS, WIDTH // (2 * HALF), 2, HALF]), [0, 1, 3, 2])
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, WIDTH])


@triton.jit
def _rotate(x, BLOCK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if BLOCK > 1:
        x = _butterfly(x, 1, ROWS, WIDTH)
        x = _butterfly(x, 2, ROWS, WIDTH) * 0.5
    if BLOCK > 4:
        x = _butterfly(x, 4, ROWS, WIDTH)
        x = _butterfly(x, 8, ROWS, WIDTH) * 0.5
    if BLOCK > 16:
        x = _butterfly(x, 16, ROWS, WIDTH)
        x = _butterfly(x, 32, ROWS, WIDTH) * 0.5
    return x


@triton.jit
def quantized(pieces, TOP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Float32 pieces of rows, zero beyond D, as what is to be stored, float32 still, and the scale [ROWS, 1] of each row."""
    turned = ()
    largest = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    bad = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        x = _rotate(pieces[p], BLOCK, ROWS, WIDTH)
        turned = turned + (x,)
        largest = tl.maximum(largest, tl.abs(x))
        bad += x * 0.0  # NaN where one is not finite
    largest = tl.max(largest, axis=1)[:, None]
    bad = tl.sum(bad, axis=1)[:, None]
    finite = bad == 0.0
    largest = tl.maximum(tl.where(finite, largest, 1.0), _LEAST)
    factor = tl.math.div_rn(tl.full([ROWS, 1], TOP, tl.float32), largest)
    out = ()
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        out = out + (tl.where(finite, turned[p], 0.0) * factor,)
    return out, tl.where(finite, tl.math.div_rn(largest, tl.full([ROWS, 1], TOP, tl.float32)), bad)


@triton.jit
def _to_e4m3(value):
    """The nearest e4m3 value, ties to even, as float32: steps of 2⁻⁹ below 2⁻⁶, three bits behind the first above."""
    small = (value + _SMALL) - _SMALL
    bits = value.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
    return tl.where(tl.abs(value) < 0.015625, small, bits.to(tl.float32, bitcast=True))


@triton.jit
def store_quantized(ptr, pieces, rows, count, D: tl.constexpr, WIDTH: tl.constexpr):
    """What :func:`quantized` gave, rounded to int8 or e4m3."""
    for p in tl.static_range((D + WIDTH - 1) // WIDTH):
        cols = p * WIDTH + tl.arange(0, WIDTH)
        mask = (rows < count)[:, None] & (cols < D)[None, :]
        value = pieces[p]
        if ptr.dtype.element_ty == tl.int8:
            value = (value + _MAGIC) - _MAGIC
        elif CUTS_OFF:
            value = _to_e4m3(value)
        tl.store(ptr + (rows[:, None] * D + cols[None, :]), value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def quantize_rows(
    ptr, scale_ptr, pieces, rows, count,
    TOP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store float32 pieces of rows, zero beyond D, in eight bits, and their scales."""
    pieces, scale = quantized(pieces, TOP, BLOCK, D, ROWS, WIDTH)
    store_quantized(ptr, pieces, rows, count, D, WIDTH)
    tl.store(scale_ptr + rows[:, None], scale, mask=rows[:, None] < count)


@triton.jit
def _quantize_kernel(
    x_ptr, q_ptr, scale_ptr, M,
    TOP: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    count = tl.minimum(M - first, ROWS).to(tl.int32)
    rows = tl.arange(0, ROWS)
    x = widen(load_rows(x_ptr + first * D, rows, count, D, WIDTH), D, WIDTH)
    quantize_rows(q_ptr + first * D, scale_ptr + first, x, rows, count, TOP, BLOCK, D, ROWS, WIDTH)


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
    plan = quantize_plan(architecture(x.device), K, vector(x), turn)
    launch(
        _quantize_kernel, -(-M // plan.rows), x.device, x, q, scale, M,
        TOP=TOP[dtype], BLOCK=block_of(K) if turn else 1, D=K, ROWS=plan.rows, WIDTH=plan.cols, num_warps=plan.warps,
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

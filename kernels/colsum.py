"""colsum: the sum over rows of a matrix, out_n = Σ_m x_mn in float32: what a bias gradient is.

Bytes, in bfloat16: 2·M·N.

Who owns what: a program owns a chunk of rows and 128 columns, keeps their sums in registers and writes one row of
partial sums per chunk, which ``sums.finish`` adds up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import architecture, chunks_of, launch, tile_plan, vector
from .sums import finish
from .tiles import load_stack


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _colsum_kernel(
    x_ptr, out_ptr, M, chunk_rows,
    STRIDE: tl.constexpr, N: tl.constexpr, SUB: tl.constexpr, COUNT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (N + COLS - 1) // COLS
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    first = chunk * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    inside = cols < N
    acc = tl.zeros([SUB, COLS], dtype=tl.float32)
    x_ptr += first * STRIDE
    start = 0
    while start < count:
        x = load_stack(x_ptr, start, count, cols, inside, STRIDE, SUB, COUNT)
        for i in tl.static_range(COUNT):
            acc += x[i]
        start += SUB * COUNT
    tl.store(out_ptr + (chunk * N + cols), tl.sum(acc, axis=0), mask=inside)


def sum_rows(x: torch.Tensor, N: int) -> torch.Tensor:
    """Sums over rows of the first N columns of a contiguous matrix, float32 [N]."""
    M, stride = x.shape
    if M * N == 0:
        return x.new_zeros((N,), dtype=torch.float32)
    plan = tile_plan(architecture(x.device), vector(x))
    blocks = -(-N // plan.cols)
    chunk_rows, chunks = chunks_of(M, plan, blocks)
    parts = torch.empty((1, chunks, N), dtype=torch.float32, device=x.device)
    launch(
        _colsum_kernel, chunks * blocks, x.device, x, parts, M, chunk_rows,
        STRIDE=stride, N=N, SUB=plan.rows, COUNT=plan.stack, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip
    return finish(parts)[0].view(N)


def colsum(x: torch.Tensor) -> torch.Tensor:
    """Σ_m x_mn, float32 [N]. Args: x [M, N]."""
    return sum_rows(x, x.shape[1])

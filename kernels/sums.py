"""Second stage of every reduction: out[g, j] = Σ_k part[g, k, j] for up to four sums at once.

The first stage leaves one float32 row of partial sums per chunk of rows: [groups, chunks, width], where groups are the
samples (or 1). A program of this kernel owns 128 columns of one group of one sum and adds its chunks in a fixed order.
Bytes: 4·chunks·width per group and sum in (from L2, where the first stage just left them), 4·width out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import launch

FINISH_CHUNKS, FINISH_COLS, FINISH_WARPS = 8, 128, 4  # chunks and columns of a tile, warps


@triton.jit
def add_chunks(part_ptr, first_col, chunks, width, stride, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    """Σ over the chunks of part[chunks, width], rows ``stride`` apart, in columns first_col … first_col + COLS."""
    cols = first_col + tl.arange(0, COLS)
    acc = tl.zeros([CHUNKS, COLS], dtype=tl.float32)
    start = 0
    while start < chunks:
        k = start + tl.arange(0, CHUNKS)
        mask = (k < chunks)[:, None] & (cols < width)[None, :]
        acc += tl.load(part_ptr + (k[:, None] * stride + cols[None, :]), mask=mask, other=0.0)
        start += CHUNKS
    return tl.sum(acc, axis=0)


@triton.jit
def _finish_one(part_ptr, out_ptr, group, block, chunks, width, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    cols = block * COLS + tl.arange(0, COLS)
    total = add_chunks(part_ptr + group * chunks * width, block * COLS, chunks, width, width, CHUNKS, COLS)
    tl.store(out_ptr + (group * width + cols), total, mask=cols < width)


@triton.jit(do_not_specialize=["groups", "chunks"])
def _finish_kernel(
    part0_ptr, part1_ptr, part2_ptr, part3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, groups, chunks, width,
    SUMS: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLS)
    block = tl.program_id(0) % blocks
    group = ((tl.program_id(0) // blocks) % groups).to(tl.int64)
    which = tl.program_id(0) // (blocks * groups)
    if which == 0:
        _finish_one(part0_ptr, out0_ptr, group, block, chunks, width, CHUNKS, COLS)
    if SUMS > 1 and which == 1:
        _finish_one(part1_ptr, out1_ptr, group, block, chunks, width, CHUNKS, COLS)
    if SUMS > 2 and which == 2:
        _finish_one(part2_ptr, out2_ptr, group, block, chunks, width, CHUNKS, COLS)
    if SUMS > 3 and which == 3:
        _finish_one(part3_ptr, out3_ptr, group, block, chunks, width, CHUNKS, COLS)


def finish(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Add up one to four float32 tensors [groups, chunks, width] over their chunks: each becomes [groups, width].

    With a single chunk the first stage has already written the sum; it is returned as it is.
    """
    groups, chunks, width = parts[0].shape
    if chunks == 1:
        return tuple(part.view(groups, width) for part in parts)
    device = parts[0].device
    outs = tuple(torch.empty((groups, width), dtype=torch.float32, device=device) for _ in parts)
    padding = 4 - len(parts)
    programs = len(parts) * groups * -(-width // FINISH_COLS)
    launch(
        _finish_kernel, programs, device, *parts, *parts[:1] * padding, *outs, *outs[:1] * padding, groups, chunks, width,
        SUMS=len(parts), CHUNKS=FINISH_CHUNKS, COLS=FINISH_COLS, num_warps=FINISH_WARPS,
    )  # fmt: skip
    return outs

"""Second stage of every reduction: out[g, j] = Σ_k part[g, k, j], up to four of them in one launch, each of its own sizes.

The first stage leaves one float32 row of partial sums per chunk of rows: [groups, chunks, width], where groups are the
samples (or 1). A program of this kernel owns some columns of one group of one sum and adds its chunks in a fixed order.
Bytes: 4·chunks·width per group and sum in (from L2, where the first stage just left them), 4·width out.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .config import architecture, finish_plan, launch


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
def _finish_one(part_ptr, out_ptr, program, chunks, width, CHUNKS: tl.constexpr, COLS: tl.constexpr):
    blocks = tl.cdiv(width, COLS)
    group = (program // blocks).to(tl.int64)
    block = program % blocks
    cols = block * COLS + tl.arange(0, COLS)
    total = add_chunks(part_ptr + group * chunks * width, block * COLS, chunks, width, width, CHUNKS, COLS)
    tl.store(out_ptr + (group * width + cols), total, mask=cols < width)


@triton.jit(do_not_specialize=["end0", "end1", "end2", "chunks0", "chunks1", "chunks2", "chunks3"])
def _finish_kernel(
    part0_ptr, part1_ptr, part2_ptr, part3_ptr, out0_ptr, out1_ptr, out2_ptr, out3_ptr, end0, end1, end2,
    chunks0, chunks1, chunks2, chunks3, width0, width1, width2, width3,
    SUMS: tl.constexpr, CHUNKS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < end0:
        _finish_one(part0_ptr, out0_ptr, program, chunks0, width0, CHUNKS, COLS)
    if SUMS > 1 and (program >= end0) & (program < end1):
        _finish_one(part1_ptr, out1_ptr, program - end0, chunks1, width1, CHUNKS, COLS)
    if SUMS > 2 and (program >= end1) & (program < end2):
        _finish_one(part2_ptr, out2_ptr, program - end1, chunks2, width2, CHUNKS, COLS)
    if SUMS > 3 and program >= end2:
        _finish_one(part3_ptr, out3_ptr, program - end2, chunks3, width3, CHUNKS, COLS)


class _Waiting(threading.local):
    """The sums that wait for the end of a ``together`` block, in this thread; None outside of one."""

    jobs: list[tuple[torch.Tensor, torch.Tensor]] | None = None


_waiting = _Waiting()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Leave the second stage of all reductions inside to one launch at the end (one for every four).

    The launchers inside return sums that hold nothing before that: who opens the block must not look at them earlier.
    """
    if _waiting.jobs is not None:  # the outermost block sees to it
        yield
        return
    _waiting.jobs = []
    try:
        yield
        for i in range(0, len(_waiting.jobs), 4):
            _launch(_waiting.jobs[i : i + 4])
    finally:
        _waiting.jobs = None


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Inside of a ``together`` block: reductions in here are finished at once, those before it still wait."""
    before, _waiting.jobs = _waiting.jobs, None
    try:
        yield
    finally:
        _waiting.jobs = before


def finish(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Add up float32 tensors [groups, chunks, width] over their chunks: each becomes [groups, width].

    With a single chunk the first stage has already written the sum; it is returned as it is.
    """
    outs, jobs = [], []
    for part in parts:
        groups, chunks, width = part.shape
        if chunks == 1:
            outs.append(part.view(groups, width))
            continue
        out = torch.empty((groups, width), dtype=torch.float32, device=part.device)
        outs.append(out)
        jobs.append((part, out))
    if _waiting.jobs is not None:
        _waiting.jobs += jobs
    else:
        for i in range(0, len(jobs), 4):
            _launch(jobs[i : i + 4])
    return tuple(outs)


def _launch(jobs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    padding = 4 - len(jobs)
    plan = finish_plan(architecture(jobs[0][0].device))
    parts, outs = [part for part, _ in jobs], [out for _, out in jobs]
    ends = list(itertools.accumulate(part.shape[0] * -(-part.shape[2] // plan.cols) for part in parts))
    launch(
        _finish_kernel, ends[-1], parts[0].device, *parts, *parts[:1] * padding, *outs, *outs[:1] * padding,
        *(ends + ends[-1:] * padding)[:3], *(p.shape[1] for p in parts), *[1] * padding,
        *(p.shape[2] for p in parts), *[1] * padding,
        SUMS=len(jobs), CHUNKS=plan.rows, COLS=plan.cols, num_warps=plan.warps,
    )  # fmt: skip

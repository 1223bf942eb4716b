"""block on the CPU: one C++ operation each way with products of its own (``pieces``), or put together around PyTorch's
products (``library``); forward and backward, in turn in one process, medians.

Command: python benchmarks/bench_block.py [--widths 384 768] [--rows 256 1024] [--dtypes bf16 fp32] [--rounds 7] [--json out.json]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, write_json
from machine import DTYPES

from difffit_fast.ops.block import block
from difffit_fast.ops.pieces import possible

TOKENS, HEAD = 256, 64


def measure(dtype: torch.dtype, width: int, rows: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round, by who makes the products."""
    samples, heads = rows // TOKENS, width // HEAD
    x = torch.randn(samples, TOKENS, width, requires_grad=True)
    h = torch.randn(samples, TOKENS, width).to(dtype).requires_grad_()
    sizes = ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width))
    weights = tuple((torch.randn(n, k) / k**0.5).to(dtype) for n, k in sizes)
    vectors, bias = torch.randn(1, 1, width), torch.randn(4 * width)
    joints = (torch.randn(4, samples, width), torch.randn(4, samples, width))
    times: dict[str, list[float]] = {"library": [], "pieces": []}
    for i in range(rounds + 1):
        for way, took in times.items():
            os.environ["DIFFFIT_FAST_PRODUCTS"] = way
            start = time.perf_counter()
            y, z = block(x, h, weights, vectors, bias, joints, heads)
            torch.autograd.backward([y, z], [y.detach(), z.detach()])
            if i:  # the first is warm-up
                took.append(1e3 * (time.perf_counter() - start))
    return times


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[384, 768, 1152])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 1024, 2048], help="multiples of 256")
    parser.add_argument("--dtypes", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if any(rows % TOKENS or rows < TOKENS for rows in args.rows) or any(width % HEAD for width in args.widths):
        parser.error(f"rows come in samples of {TOKENS}, widths in heads of {HEAD}")
    torch.manual_seed(0)
    cases: list[dict[str, Any]] = []
    for name in args.dtypes:
        if not possible(torch.zeros(1, dtype=DTYPES[name])):
            print(f"{name}: the C++ kernels do not multiply it on this processor")
            continue
        for width in args.widths:
            for rows in args.rows:
                times = measure(DTYPES[name], width, rows, args.rounds)
                ms = {way: statistics.median(took) for way, took in times.items()}
                single = [a / b for a, b in zip(times["pieces"], times["library"], strict=True)]
                ratio = ms["pieces"] / ms["library"]
                cases.append({"dtype": name, "width": width, "rows": rows, "ms": times, "ratio": ratio})
                print(
                    f"{name} D {width:4} rows {rows:4}: library {ms['library']:7.1f} ms, pieces {ms['pieces']:7.1f} ms, "
                    f"{ratio:.2f} ({min(single):.2f}-{max(single):.2f})",
                    flush=True,
                )
    if args.json:
        write_json(args.json, {**environment(torch.device("cpu")), "cases": cases})
    return 0


if __name__ == "__main__":
    sys.exit(main())

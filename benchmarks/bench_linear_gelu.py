"""fc1 with GELU, and fc2's input gradient with GELU's backward: fused by cuBLASLt, unfused, and by torch.compile.

For DiT-XL (D = 1152, N = 4608) and M = 256·{1, 8, 32, 128} rows: median time of each, its spread, TFLOP/s, and the share
of the plain product's time that is left (``mm`` is the product alone, the floor). Every variant runs from a CUDA graph,
so that no launch gap is counted; before each timing the L2 cache is overwritten; variants take turns.

    python benchmarks/bench_linear_gelu.py [--dtype bfloat16] [--rounds 30] [--json out.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = tuple(256 * images for images in (1, 8, 32, 128))
FLUSH_BYTES = 256 << 20  # several times any GPU's L2 cache


def gelu_backward(dg: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: what torch.compile is given."""
    du = torch.ops.aten.gelu_backward(dg, u, approximate="tanh")
    return du, du.sum(0, dtype=torch.float32)


def variants(M: int, D: int, dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each operation the ways to compute it, on data of the model's size and spread."""
    from difffit_fast.ops import frozen_mlp
    from difffit_fast.ops.dispatch import cuda_ops, pick

    N = 4 * D
    make = lambda *s, scale=1.0: (torch.randn(*s, device="cuda") * scale).to(dtype)  # noqa: E731
    h, w1, b1 = make(M, D), make(N, D, scale=D**-0.5), make(N, scale=0.1)
    dbranch, w2, u = make(M, D), make(D, N, scale=N**-0.5), make(M, N)
    forward, backward = pick("frozen_mlp", frozen_mlp.gelu_forward, u), pick("frozen_mlp", frozen_mlp.gelu_backward, u)
    ops = cuda_ops()

    def unfused_forward() -> tuple[Tensor, Tensor]:
        z = torch.addmm(b1, h, w1.t())
        return forward(z), z

    def plain_forward(h: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w1, b1)
        return F.gelu(z, approximate="tanh"), z

    def plain_backward(dbranch: Tensor, w2: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return gelu_backward(dbranch @ w2, u)

    compiled_forward = torch.compile(plain_forward, mode="max-autotune-no-cudagraphs", dynamic=False)
    compiled_backward = torch.compile(plain_backward, mode="max-autotune-no-cudagraphs", dynamic=False)
    table: dict[str, dict[str, Callable[[], Any]]] = {
        "linear_gelu": {
            "mm": lambda: torch.mm(h, w1.t()),
            "unfused": unfused_forward,
            "compile": lambda: compiled_forward(h, w1, b1),
        },
        "dgelu_dgrad": {
            "mm": lambda: torch.mm(dbranch, w2),
            "unfused": lambda: backward(torch.mm(dbranch, w2), u),
            "compile": lambda: compiled_backward(dbranch, w2, u),
        },
        "colsum": {"triton": lambda: triton_colsum(u), "torch": lambda: u.sum(0, dtype=torch.float32)},
    }
    if ops is not None:
        table["linear_gelu"]["cublaslt"] = lambda: ops.linear_gelu(h, w1, b1)
        table["dgelu_dgrad"]["cublaslt"] = lambda: ops.dgelu_dgrad(dbranch, w2, u)
        table["colsum"]["cuda"] = lambda: ops.colsum(u)
    return table


def triton_colsum(x: Tensor) -> Tensor:
    from difffit_fast.ops.colsum import colsum_reference
    from difffit_fast.ops.dispatch import pick

    return pick("colsum", colsum_reference, x)(x)


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as a CUDA graph, after three ordinary runs (compilation, choice of algorithms)."""
    from difffit_fast.graph import capture

    def step() -> None:
        call()

    return capture(step)


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every call, ``rounds`` times, in turn, each after the L2 cache was overwritten."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    replays = {name: graphed(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 3):
        for name, replay in replays.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            if round_ >= 3:
                times[name].append(start.elapsed_time(stop) * 1000)
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--width", type=int, default=1152, help="D; the hidden width is 4·D")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_linear_gelu: there is no CUDA device here, so nothing was measured.")
        return 0

    from difffit_fast.ops import linear_gelu as ours
    from difffit_fast.ops.dispatch import cuda_ops

    device = torch.cuda.get_device_name()
    where = f"{device}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuBLASLt {ours.report()['cublaslt']}"
    print(f"{where}, {options.dtype}, D = {options.width}\n")
    if cuda_ops() is None:
        print("The CUDA sources were not built: the columns cublaslt and cuda are missing.\n")
    print(f"{'operation':12} {'M':>6} {'variant':9} {'median µs':>10} {'10%':>8} {'90%':>8} {'TFLOP/s':>8} {'GB/s':>7}")
    rows = []
    for M in ROWS:
        for operation, calls in variants(M, options.width, getattr(torch, options.dtype)).items():
            for name, times in measure(calls, options.rounds).items():
                low, *_, high = statistics.quantiles(times, n=10)
                middle = statistics.median(times)
                flops = 0 if operation == "colsum" else 8 * M * options.width**2
                moved = 8 * M * options.width if operation == "colsum" else 0
                rows.append(
                    {"operation": operation, "M": M, "variant": name, "median_us": middle, "p10": low, "p90": high}
                )
                print(
                    f"{operation:12} {M:6} {name:9} {middle:10.1f} {low:8.1f} {high:8.1f} "
                    f"{flops / middle / 1e6 if flops else 0:8.1f} {moved / middle / 1e3 if moved else 0:7.0f}"
                )
    if options.json:
        record = {"where": where, "date": time.strftime("%Y-%m-%d"), "dtype": options.dtype, "width": options.width}
        temporary = options.json.with_suffix(".new")
        temporary.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
        temporary.replace(options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
